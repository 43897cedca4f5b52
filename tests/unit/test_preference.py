"""Preference losses against formulas, negatives against the trie by brute force, stored pairs."""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny_run
import torch
from small_catalogue import stored_catalogue

from igd_ds.config.options import parse
from igd_ds.contracts import MASKED_ROW, Batch, RowTree
from igd_ds.data.negatives import NEGATIVES, LeafTable, check_negatives
from igd_ds.errors import UsageError
from igd_ds.evaluation.parts import read_part, write_part
from igd_ds.objectives.preference import choice_kl, dpo, softmax_dpo
from igd_ds.prefer_config import PreferConfig
from igd_ds.preference.pairs import Pairs
from igd_ds.preference.start import load_start
from igd_ds.preference.training import PreferenceBatch, PreferenceTraining

DS = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {}, "bf16": {"enabled": False}}
ROWS = np.array([0, 3, 9, MASKED_ROW])
ITEMS = np.array([[8, 5, 2, 0], [4, 0, 1, 9], [3, 5, 7, 6], [0, 0, 0, 0]], np.int32)
"""Items of ROWS, the targets first. Items 2 and 3 have one path."""


def training_of(folder: Path, *flags: str) -> PreferenceTraining:
    """Return a training that goes on from the tiny run, with its test rows as training rows."""
    run = folder / "run"
    if not run.is_dir():
        tiny_run.make(folder)
    words = ["--ds_config", "none.json", "--dataset", str(folder / "data"), "--model", str(run)]
    config = parse(PreferConfig, [*words, "--output_dir", str(folder / "new"), *flags])
    start = load_start(config)
    start.inputs.dataset.splits["train"] = start.inputs.dataset.splits["test"]
    (folder / "new").mkdir(exist_ok=True)
    return PreferenceTraining(config, folder / "new", start, DS)


def batch_of(training: PreferenceTraining, reference: torch.Tensor) -> PreferenceBatch:
    """Return the batch of ROWS and ITEMS."""
    branches = training.collator.branches(ROWS, ITEMS)
    return PreferenceBatch(branches, reference, torch.from_numpy(ROWS != MASKED_ROW))


def item_logprobs(model, plain: tiny_run.Plain, split, temperature=None) -> torch.Tensor:
    """Return log π of ITEMS by one full forward pass per item, (4, 4); 0 where masked.

    With a temperature, the softmax runs over the trie's next tokens.
    """
    values = torch.zeros(ITEMS.shape, dtype=next(model.parameters()).dtype)
    for row, place in np.ndindex(ITEMS.shape):
        if ROWS[row] == MASKED_ROW:
            continue
        prompt, path = plain.prompt(split.history(ROWS[row])), plain.paths[ITEMS[row, place]]
        logits = model(torch.tensor([[*prompt, *path]])).logits[0]
        for t, token in enumerate(path):
            behind = logits[len(prompt) + t - 1]
            if temperature is not None:
                legal = plain.siblings(path, t)
                behind, token = behind[legal] / temperature, legal.index(token)
            values[row, place] = values[row, place] + behind.log_softmax(0)[token]
    return values


def gradient(model, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("packing", ["tree", "rows"])
@pytest.mark.parametrize("softmax", ["full", "masked"])
@pytest.mark.parametrize("objective", ["dpo", "s-dpo"])
def test_loss_and_gradient_equal_the_formula(tmp_path, objective, softmax, packing):
    flags = ["--objective", objective, "--softmax", softmax, "--beta", "0.3", "--sft_weight", "0.2"]
    training = training_of(tmp_path, *flags, "--packing", packing)
    plain = tiny_run.Plain(tmp_path / "run")
    model, split = plain.model, training.collator.split
    reference = torch.randn(ITEMS.shape, generator=torch.Generator().manual_seed(0)) - 8
    reference[ROWS == MASKED_ROW] = 0

    batch = batch_of(training, reference)
    assert isinstance(batch.branches.inputs, RowTree) == (packing == "tree")
    terms = training.loss.terms(model, batch)
    assert terms.normalisers.tolist() == training.loss.normalisers(batch).tolist() == [3, 3]
    loss = (terms.numerators / 3 * training.loss.coefficients(0)).sum()
    found = gradient(model, loss).double()

    # The same in float64, with loops over rows, items and tokens.
    model.double()
    policy = item_logprobs(model, plain, split, 1.0 if softmax == "masked" else None)
    expected = torch.zeros((), dtype=torch.float64)
    for row in np.flatnonzero(ROWS != MASKED_ROW):
        ratio = policy[row] - reference[row].double()
        margins = [0.3 * (ratio[0] - other) for other in ratio[1:]]
        if objective == "dpo":
            expected = expected - sum(torch.sigmoid(m).log() for m in margins) / 3
        else:
            total = sum(torch.exp(-m) for m in margins)
            expected = expected - torch.sigmoid(-torch.log(total)).log()
        expected = expected - 0.2 * policy[row, 0]
    expected = expected / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = gradient(model, expected)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    ratio = (policy - reference.double())[:3].detach()
    assert terms.statistics["chosen"].item() == pytest.approx(ratio[:, 0].sum().item(), rel=1e-4)


def test_one_batch_of_trl(tmp_path, monkeypatch):
    """TRL's DPOTrainer has the same loss and gradient on one batch of pairs."""
    monkeypatch.syspath_prepend(os.environ.get("IGD_DS_TRL", ""))
    trl = pytest.importorskip("trl", reason="trl is not installed; IGD_DS_TRL may name its folder")
    from datasets import Dataset

    training = training_of(tmp_path, "--objective", "dpo", "--beta", "0.3")
    plain = tiny_run.Plain(tmp_path / "run")
    model, split = plain.model, training.collator.split
    reference = torch.randn((3, 2), generator=torch.Generator().manual_seed(0)) - 8
    branches = training.collator.branches(ROWS[:3], ITEMS[:3, :2])
    batch = PreferenceBatch(branches, reference, torch.ones(3, dtype=torch.bool))
    loss = training.loss.terms(model, batch).numerators[0] / 3
    found = gradient(model, loss)

    examples = [
        {
            "prompt_ids": plain.prompt(split.history(row)),
            "chosen_ids": list(plain.paths[items[0]]),
            "rejected_ids": list(plain.paths[items[1]]),
            "ref_chosen_logps": ref[0],
            "ref_rejected_logps": ref[1],
        }
        for row, items, ref in zip(ROWS[:3], ITEMS[:3], reference.tolist(), strict=True)
    ]
    settings = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.3, use_cpu=True, report_to="none", bf16=False,
        gradient_checkpointing=False, precompute_ref_log_probs=True,
    )  # fmt: skip
    texts = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = trl.DPOTrainer(
        model=model, args=settings, train_dataset=texts, processing_class=plain.tokenizer
    )
    expected = trainer._compute_loss(
        trainer.model, trainer.data_collator(examples), return_outputs=False
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = gradient(model, expected)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_softmax_dpo_in_float64():
    """S-DPO in its two forms: −log σ(−log Σ exp(−m)) = log(1 + Σ exp(−m))."""
    generator = torch.Generator().manual_seed(0)
    margins = 4 * torch.randn((6, 5), generator=generator, dtype=torch.float64)
    expected = [math.log1p(sum(math.exp(-m) for m in row)) for row in margins.tolist()]
    assert softmax_dpo(margins).tolist() == pytest.approx(expected, rel=1e-13)
    torch.testing.assert_close(softmax_dpo(margins[:, :1]), dpo(margins[:, :1]))
    assert softmax_dpo(torch.full((1, 2), -1e4)).isfinite().all()


def test_kl_over_the_listed_items():
    policy, reference = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    p, q = policy.exp(), reference.exp()
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    torch.testing.assert_close(choice_kl(policy, reference), (p * (p / q).log()).sum(1))
    assert (choice_kl(policy, policy + 3).abs() < 1e-12).all()


def test_a_batch_without_rows_gives_zeros_with_a_graph(tmp_path):
    training = training_of(tmp_path)
    model = tiny_run.Plain(tmp_path / "run").model
    nobody = np.full(2, MASKED_ROW)
    branches: Batch = training.collator.branches(nobody, np.zeros((2, 4), np.int32))
    batch = PreferenceBatch(branches, torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool))
    terms = training.loss.terms(model, batch)
    assert terms.numerators.tolist() == terms.normalisers.tolist() == [0, 0]
    terms.numerators.sum().backward()


# ---- negatives

PATHS = [
    [1, 2, 0],
    [1, 3, 4, 0],
    [1, 3, 5, 0],
    [1, 3, 6, 7, 0],
    [1, 2, 0],
    [8, 9, 2, 0],
    [8, 9, 3, 0],
    [8, 9, 0],
    [2, 0],
]
COUNTS = np.array([3, 1, 2, 0, 1, 0, 4, 0, 2])


def shared_prefix(first: int, second: int) -> int:
    pairs = zip(PATHS[first], PATHS[second], strict=False)
    return next((t for t, (a, b) in enumerate(pairs) if a != b), len(PATHS[first]))


@pytest.mark.parametrize("name", NEGATIVES)
def test_negatives_are_different_paths_without_the_targets(name):
    leaves = LeafTable.build(stored_catalogue(PATHS, COUNTS).trie)
    targets = np.tile(np.arange(9), 40)
    most = 4 if name == "popularity" else 7  # 5 of 8 paths have training targets
    for number in range(1, most + 1):
        drawn = NEGATIVES[name](leaves, targets, number, np.random.default_rng(0))
        items = leaves.item[drawn]
        assert items.shape == (360, number)
        for target, row in zip(targets, items.tolist(), strict=True):
            paths = {tuple(PATHS[item]) for item in row}
            assert len(paths) == number and tuple(PATHS[target]) not in paths
            if name == "popularity":
                assert all(COUNTS[item] or item in (0, 4) for item in row)
            if name == "sibling":
                # No path that was left out shares a longer prefix than one that was taken.
                shortest = min(shared_prefix(target, item) for item in row)
                others = [i for i in leaves.item if tuple(PATHS[i]) != tuple(PATHS[target])]
                assert all(shared_prefix(target, i) <= shortest for i in set(others) - set(row))


def test_popular_items_are_drawn_as_often_as_they_are_targets():
    leaves = LeafTable.build(stored_catalogue(PATHS, COUNTS).trie)
    targets = np.full(20_000, 8)
    drawn = NEGATIVES["popularity"](leaves, targets, 1, np.random.default_rng(0))
    share = np.bincount(leaves.item[drawn[:, 0]], minlength=9) / len(targets)
    expected = np.array([4, 1, 2, 0, 0, 0, 4, 0, 0]) / 11  # items 0 and 4 have one path
    assert np.abs(share - expected).max() < 0.015  # four standard errors


@pytest.mark.parametrize(("name", "most", "where"), [
    ("random", 7, "the catalogue has"), ("sibling", 7, "the catalogue has"),
    ("beam", 7, "the catalogue has"), ("popularity", 4, "the training rows have"),
])  # fmt: skip
def test_more_negatives_than_items_are_refused(name, most, where):
    leaves = LeafTable.build(stored_catalogue(PATHS, COUNTS).trie)
    check_negatives(leaves, name, most)
    with pytest.raises(UsageError, match=f"--num_negatives {most + 1} .* {where} {most} items"):
        check_negatives(leaves, name, most + 1)


# ---- stored pairs


def stored_pairs(training: PreferenceTraining, folder: Path) -> tuple[Pairs, Path]:
    """Make and store the pairs of all rows; return them and the only part."""
    training.pair_maker.claim(is_begun=False)
    rows = np.arange(len(training.collator.split))
    pairs = training.pair_maker.make(None, 0, rows)
    return pairs, folder / "new" / "pairs" / "epoch-0000" / "part-000000000.parquet"


def test_pairs_hold_the_log_probabilities_of_the_start(tmp_path, capsys):
    training = training_of(tmp_path, "--negatives", "sibling", "--num_negatives", "3")
    pairs, part = stored_pairs(training, tmp_path)
    plain, split = tiny_run.Plain(tmp_path / "run"), training.collator.split
    for row in (0, 10):
        for item, found in zip(pairs.items[row], pairs.reference[row], strict=True):
            prompt, path = plain.prompt(split.history(row)), plain.paths[item]
            logits = plain.model(torch.tensor([[*prompt, *path]])).logits[0].double()
            behind = logits[len(prompt) - 1 : -1].log_softmax(1)
            expected = sum(behind[t, token].item() for t, token in enumerate(path))
            assert found == pytest.approx(expected, rel=1e-5)

    # A damaged part is made again, the same.
    before = part.read_bytes()
    part.write_bytes(before[:50] + bytes(20) + before[70:])
    again, _ = stored_pairs(training_of(tmp_path, "--negatives", "sibling"), tmp_path)
    assert "damaged" in capsys.readouterr().out and part.read_bytes() == before
    assert np.array_equal(again.items, pairs.items)


def test_a_negative_that_equals_its_target_is_refused(tmp_path):
    training = training_of(tmp_path)
    _, part = stored_pairs(training, tmp_path)
    table, counts = read_part(part)
    items = np.array(table["items"].to_pylist(), np.int32)
    row = int(np.flatnonzero(items[:, 0] == 3)[0])
    items[row, 1] = 2  # another item, with the path of item 3
    column = pa.FixedSizeListArray.from_arrays(pa.array(items.ravel()), items.shape[1])
    table = table.set_column(1, "items", column).replace_schema_metadata({"counts": "{}"})
    write_part(part, table)
    with pytest.raises(UsageError, match=f"row {row} has a negative that equals its target"):
        stored_pairs(training_of(tmp_path), tmp_path)


def test_pairs_of_another_model_are_refused_once_the_run_has_begun(tmp_path):
    stored_pairs(training_of(tmp_path), tmp_path)
    model = tmp_path / "run" / "model" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    changed = training_of(tmp_path)
    with pytest.raises(UsageError, match="do not belong to this training; these differ: model"):
        changed.pair_maker.claim(is_begun=True)
    changed.pair_maker.claim(is_begun=False)
    assert not (tmp_path / "new" / "pairs" / "epoch-0000").exists()


def test_a_reference_must_belong_to_the_model(tmp_path):
    tiny_run.make(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "run", other)
    training = training_of(tmp_path, "--reference", str(other))
    assert training.start.reference == other / "model"

    tiny_run.set_likelihood(other / "model", {"softmax": "masked", "temperature": 2.0})
    with pytest.raises(UsageError, match="does not belong to --model .*differ: likelihood"):
        training_of(tmp_path, "--reference", str(other))
    with pytest.raises(UsageError, match="no model of igd train there"):
        training_of(tmp_path, "--reference", str(tmp_path / "data"))
    with pytest.raises(UsageError, match="no adapter to switch off"):
        training_of(tmp_path, "--reference", "adapter-off")
