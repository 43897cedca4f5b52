"""Validation, compared with one forward pass per row and a loop over its tokens.

NLLs are compared relatively, with 1e-5: they are sums of fp32 log-probabilities in batches of other
shapes. The brute force computes them in fp64.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import tiny_run
import torch
from test_decisiveness import Definitions
from test_trie import CASES, ragged
from tiny_run import Plain

from igd_ds import distributed
from igd_ds.backbones import CausalLM
from igd_ds.contracts import MASKED_ROW, Objective, ObjectiveContext
from igd_ds.data.batches import Collator, TokenColumns
from igd_ds.evaluation.validation import ValidationTask, validation_ndcg, validation_nll
from igd_ds.items import decisiveness
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.trie import TokenTrie
from igd_ds.objectives.msl import MSL, MSLOptions
from igd_ds.objectives.position import Uniform
from igd_ds.objectives.weighted import NoOptions

RTOL = 1e-5
TAU = 2.5
ROWS = np.arange(tiny_run.NUM_TEST)
IN_BATCHES = [ROWS[:4], ROWS[4:8], np.array([*ROWS[8:], MASKED_ROW])]

UNIFORM = Uniform(NoOptions(), total_steps=1)
MASKED = MSL(MSLOptions(msl_tau=str(TAU)), total_steps=1)


@dataclass(frozen=True)
class Engine:
    """What validation uses of a DeepSpeed engine: the model, and the stage of ZeRO."""

    module: torch.nn.Module

    def __call__(self, *arguments, **named):
        return self.module(*arguments, **named)

    def zero_optimization_stage(self) -> int:
        return 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Plain(tiny_run.make(tmp_path_factory.mktemp("validation")))


def decile_of(gain, every):
    """Return the first decile whose border is not below `gain`.

    The border of decile j is the smallest gain that (j + 1) / 10 of all tokens do not exceed.
    """
    ordered = sorted(every)
    for j in range(9):
        if gain <= ordered[math.ceil((j + 1) * len(ordered) / 10) - 1]:
            return j
    return 9


@pytest.mark.parametrize("entropy", decisiveness.ENTROPIES)
@pytest.mark.parametrize("name", [name for name in CASES if 0 < CASES[name][1].sum() < 1000])
def test_borders_of_the_deciles(name, entropy):
    paths, counts = CASES[name]
    token_ids, offsets = ragged(paths)
    trie = TokenTrie.build(token_ids, offsets, counts)
    gain = decisiveness.information_gain(trie, entropy)
    nodes, mass = trie.path_nodes(offsets), Definitions(paths, counts).mass

    # The gain of each training target's tokens that rule out some training target.
    every = []
    for item, count in enumerate(counts):
        for t in range(len(paths[item])):
            if mass(tuple(paths[item][:t])) != mass(tuple(paths[item][: t + 1])):
                every += [gain[nodes[offsets[item] + t]]] * int(count)

    borders = decisiveness.gain_deciles(trie, gain)
    if not every:
        assert len(borders) == 0
    else:
        found = [int(np.searchsorted(borders, g)) for g in sorted(set(every))]
        assert found == [decile_of(g, every) for g in sorted(set(every))]


@pytest.fixture
def on_device(device, monkeypatch):
    """Let validations run on the CPU and, in a second test, on a pretend accelerator."""
    monkeypatch.setattr(distributed, "device", lambda: device)


def engine_of(plain: Plain) -> Engine:
    """Return an engine around a copy of the model on the device."""
    return Engine(copy.deepcopy(plain.model).to(distributed.device()))


def task_of(plain: Plain, objective: Objective) -> ValidationTask:
    """Return the validation of the tiny run's test rows under an objective."""
    trie = SearchTrie.build(plain.trie, distributed.device())
    context = ObjectiveContext(plain.stored, trie, str(plain.dataset.folder))
    columns = TokenColumns.build(plain.stored, objective.weights(context))
    split = plain.dataset.splits["test"]
    rows = Collator(split, plain.prompts, columns, tiny_run.EOS)
    return ValidationTask(CausalLM(), objective, context, rows)


@torch.no_grad()
def measured_nll(plain: Plain, batches, objective: Objective = UNIFORM) -> dict[str, float]:
    return validation_nll(engine_of(plain), task_of(plain, objective), batches)


@torch.no_grad()
def full_logprobs(plain: Plain, prompt, path) -> list[float]:
    """Return log p of each token of a path under a softmax over the vocabulary, in fp64."""
    logits = plain.model(torch.tensor([[*prompt, *path]])).logits[0].double().log_softmax(-1)
    return [logits[len(prompt) + t - 1, token].item() for t, token in enumerate(path)]


def masked_logprobs(plain: Plain, prompt, path) -> list[float]:
    return plain.masked_logprobs(prompt, path, TAU)


def nll_by_group(plain: Plain, logprobs) -> dict[str, list[float]]:
    """Return the NLLs of the tokens of all rows, by group of information gain."""
    counts = np.bincount(tiny_run.TRAIN_TARGETS, minlength=10)
    defined, split = Definitions(plain.paths, counts), plain.dataset.splits["test"]

    def gain(path, t):
        return np.float32(defined.prior(path[:t]) - defined.prior(path[: t + 1]))

    def is_zero(path, t):
        return defined.mass(path[:t]) == defined.mass(path[: t + 1])

    trained = [plain.paths[item] for item in tiny_run.TRAIN_TARGETS]
    every = [gain(path, t) for path in trained for t in range(len(path)) if not is_zero(path, t)]

    groups = {}
    for row in ROWS:
        prompt, path = plain.prompt(split.history(row)), plain.paths[split.targets[row]]
        for t, logprob in enumerate(logprobs(plain, prompt, path)):
            group = "zero" if is_zero(path, t) else decile_of(gain(path, t), every)
            groups.setdefault(f"valid/nll_gain_{group}", []).append(-logprob)
    return groups


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    ("objective", "logprobs"),
    [(UNIFORM, full_logprobs), (MASKED, masked_logprobs)],
    ids=["uniform", "msl"],
)
def test_nll_is_that_of_the_objectives_softmax(plain, objective, logprobs):
    found, groups = measured_nll(plain, IN_BATCHES, objective), nll_by_group(plain, logprobs)
    assert len(groups) > 4
    assert {tag for tag in found if "gain" in tag} == set(groups)  # no group without tokens
    for tag, losses in groups.items():
        assert found[tag] == pytest.approx(np.mean(losses), rel=RTOL), tag

    every = np.concatenate(list(groups.values()))
    assert found["valid/nll_per_token"] == pytest.approx(every.mean(), rel=RTOL)
    assert found["valid/nll"] == pytest.approx(every.sum() / len(ROWS), rel=RTOL)


def test_the_masked_softmax_gives_another_nll_than_the_full_one(plain):
    full = measured_nll(plain, IN_BATCHES, UNIFORM)
    masked = measured_nll(plain, IN_BATCHES, MASKED)
    assert masked["valid/nll"] < full["valid/nll"] / 2


@torch.no_grad()
def test_forced_tokens_have_a_masked_nll_of_exactly_zero(plain):
    task = task_of(plain, MASKED)
    batch = task.rows(ROWS)
    logits = CausalLM().label_logits(plain.model, batch)
    nll = MASKED.nll(batch, logits, task.context).tolist()

    targets = plain.dataset.splits["test"].targets
    number = [len(plain.siblings(plain.paths[i], t)) for i in targets
              for t in range(len(plain.paths[i]))]  # fmt: skip
    forced = [value for value, n in zip(nll, number, strict=True) if n == 1]
    others = [value for value, n in zip(nll, number, strict=True) if n > 1]
    assert set(forced) == {0.0}
    assert len(forced) > 10
    assert min(others) > 0


@torch.no_grad()
@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    ("objective", "logprobs"),
    [(UNIFORM, full_logprobs), (MASKED, masked_logprobs)],
    ids=["uniform", "msl"],
)
def test_ndcg_is_that_of_a_ranking_by_the_objectives_softmax(plain, objective, logprobs):
    """Ten beams are more than the catalogue has leaves, so the beam search misses nothing."""
    found = validation_ndcg(engine_of(plain), task_of(plain, objective), IN_BATCHES)
    assert found == {"valid/ndcg@10": pytest.approx(ranked_ndcg(plain, logprobs))}


def test_the_two_softmaxes_rank_differently(plain):
    assert ranked_ndcg(plain, full_logprobs) != ranked_ndcg(plain, masked_logprobs)


def ranked_ndcg(plain: Plain, logprobs) -> float:
    """Return the mean NDCG (item match) of the targets in a ranking of the whole catalogue."""
    split, gains = plain.dataset.splits["test"], []
    for row in ROWS:
        prompt, target = plain.prompt(split.history(row)), plain.paths[split.targets[row]]
        scores = {path: sum(logprobs(plain, prompt, path)) for path in plain.different_paths}
        rank = 1 + sum(score > scores[target] for score in scores.values())
        num_items = sum(path == target for path in plain.paths)
        gains.append(1 / num_items / math.log2(rank + 1))
    return float(np.mean(gains))


def test_sums_are_over_all_ranks(plain, monkeypatch):
    """Two ranks return what one rank with all rows returns; one has a batch without real rows."""
    whole = measured_nll(plain, [ROWS])
    shares = [[ROWS[::2]], [ROWS[1::2], np.array([MASKED_ROW, MASKED_ROW])]]

    # Each rank alone: note what it adds.
    sums = []

    def note(own):
        sums.append(own.clone())
        return own

    monkeypatch.setattr(distributed, "all_reduce_sum", note)
    alone = [measured_nll(plain, share) for share in shares]
    assert alone[0] != whole

    # Each rank together with the other.
    for rank, share in enumerate(shares):
        other = sums[1 - rank]
        monkeypatch.setattr(distributed, "all_reduce_sum", lambda own, other=other: own + other)
        assert measured_nll(plain, share) == pytest.approx(whole, rel=RTOL)
