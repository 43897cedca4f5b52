"""The validation loss by information gain: groups, borders and means against a loop over the tokens."""

import math
import types

import numpy as np
import pytest
import tiny_run
import torch
from test_decisiveness import Definitions
from test_trie import CASES, ragged
from tiny_run import Plain

from igd_ds import distributed
from igd_ds.backbones import causal_lm
from igd_ds.data.batches import MASKED_ROW, Collator
from igd_ds.evaluation import validation
from igd_ds.items import decisiveness
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.store import StoredCatalogue
from igd_ds.items.trie import TokenTrie


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Plain(tiny_run.make(tmp_path_factory.mktemp("validation")))


def decile_of(gain, every):
    """The first decile j whose border, the least gain that (j + 1) / 10 of all tokens do not exceed, is not below `gain`."""
    ordered = sorted(every)
    return next(
        (j for j in range(9) if gain <= ordered[math.ceil((j + 1) * len(ordered) / 10) - 1]), 9
    )


@pytest.mark.parametrize("entropy", decisiveness.ENTROPIES)
@pytest.mark.parametrize("name", [name for name in CASES if 0 < CASES[name][1].sum() < 1000])
def test_borders_of_the_deciles(name, entropy):
    paths, counts = CASES[name]
    token_ids, offsets = ragged(paths)
    trie = TokenTrie.build(token_ids, offsets, counts)
    gain = decisiveness.information_gain(trie, entropy)
    nodes, mass = trie.path_nodes(offsets), Definitions(paths, counts).mass
    every = []  # the gain of each training target's tokens that drop any mass
    for item, count in enumerate(counts):
        for t in range(len(paths[item])):
            if mass(tuple(paths[item][:t])) != mass(tuple(paths[item][: t + 1])):
                every += [gain[nodes[offsets[item] + t]]] * int(count)
    borders = decisiveness.gain_deciles(trie, gain)
    if not every:
        assert len(borders) == 0
    else:
        assert [int(np.searchsorted(borders, g)) for g in sorted(set(every))] == [
            decile_of(g, every) for g in sorted(set(every))
        ]


def measure(plain, batches):
    """What validation says of batches of rows of the validation split."""
    catalogue = Catalogue.build(
        plain.dataset, causal_lm.load_tokenizer(str(plain.model.name_or_path))
    )
    stored = StoredCatalogue(catalogue, plain.trie, plain.gain.astype(np.float32), "prior")
    zero = decisiveness.zero_gain(plain.trie)[plain.trie.path_nodes(catalogue.offsets)]
    weights = np.ones((len(zero), 1), np.float32)
    split = plain.dataset.splits["test"]
    collator = Collator(
        split, plain.prompts, catalogue.token_ids, catalogue.offsets, weights, zero, tiny_run.EOS
    )
    with torch.no_grad():
        return validation.validation_nll(plain.model, causal_lm, collator, stored, batches)


def brute_force(plain, rows):
    """The same by one forward pass per row and a loop over its tokens; every group's list of NLLs."""
    counts = np.bincount(tiny_run.TRAIN_TARGETS, minlength=10)
    defined, split, groups = Definitions(plain.paths, counts), plain.dataset.splits["test"], {}

    def gain(path, t):
        return defined.prior(path[:t]) - defined.prior(path[: t + 1])

    every = [
        np.float32(gain(plain.paths[item], t))
        for item in tiny_run.TRAIN_TARGETS
        for t in range(len(plain.paths[item]))
        if defined.mass(plain.paths[item][:t]) != defined.mass(plain.paths[item][: t + 1])
    ]
    for row in rows:
        prompt, path = plain.prompt(split.history(row)), plain.paths[split.targets[row]]
        with torch.no_grad():
            logits = plain.model(torch.tensor([[*prompt, *path]])).logits[0].double()
        for t, token in enumerate(path):
            zero = defined.mass(path[:t]) == defined.mass(path[: t + 1])
            group = "zero" if zero else decile_of(np.float32(gain(path, t)), every)
            nll = -torch.log_softmax(logits[len(prompt) + t - 1], 0)[token].item()
            groups.setdefault(f"valid/nll_gain_{group}", []).append(nll)
    return groups


def test_validation_by_gain(plain):
    rows = np.arange(tiny_run.NUM_TEST)
    found = measure(plain, [rows[:4], rows[4:8], np.array([*rows[8:], MASKED_ROW])])
    groups = brute_force(plain, rows)
    assert {tag for tag in found if "gain" in tag} == set(groups) and len(
        groups
    ) > 4  # a group without tokens is left out
    for tag, losses in groups.items():
        assert found[tag] == pytest.approx(np.mean(losses), rel=1e-5), tag
    every = np.concatenate(list(groups.values()))
    assert found["valid/nll_per_token"] == pytest.approx(every.mean(), rel=1e-5)
    assert found["valid/nll"] == pytest.approx(every.sum() / len(rows), rel=1e-5)


def test_sums_are_over_all_ranks(plain, monkeypatch):
    """Two ranks, one of them with a batch that only fills up: each returns what one rank with all rows does."""
    rows = np.arange(tiny_run.NUM_TEST)
    whole = measure(plain, [rows])
    shares = [[rows[::2]], [rows[1::2], np.array([MASKED_ROW, MASKED_ROW])]]
    sums = []
    monkeypatch.setattr(
        validation,
        "distributed",
        types.SimpleNamespace(
            device=distributed.device, all_reduce_sum=lambda s: sums.append(s.clone()) or s
        ),
    )
    alone = [measure(plain, share) for share in shares]
    assert alone[0] != whole
    for rank, share in enumerate(shares):
        other = sums[1 - rank]
        monkeypatch.setattr(
            validation.distributed, "all_reduce_sum", lambda s, other=other: s + other
        )
        assert measure(plain, share) == pytest.approx(whole, rel=1e-5)
