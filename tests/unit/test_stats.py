"""Statistics of a small catalogue, worked out by hand, and the command's output."""

import json
from pathlib import Path

import numpy as np
import pytest
import test_prompts
from test_trie import CASES, brute_force, ragged

from igd_ds.commands import stats
from igd_ds.data.dataset import InteractionDataset, Split
from igd_ds.data.row_statistics import ROW_KEYS, row_statistics
from igd_ds.data.statistics import KEYS, catalogue_statistics
from igd_ds.errors import UsageError
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import ENTROPIES
from igd_ds.items.trie import TokenTrie

# Tokens: 1 = "The", 2 … = the rest, 0 = EOS. Items 0 and 3 share a path, 2 and 4 are cold.
PATHS = [[1, 2, 0], [1, 3, 0], [1, 4, 5, 0], [1, 2, 0], [6, 5, 0]]
TARGETS = [0, 0, 0, 1, 1, 3]


def make_split(name, targets, history):
    """Return a split whose rows have these targets; the first row has the whole history."""
    targets, history = np.array(targets, np.int32), np.array(history, np.int32)
    offsets = np.full(len(targets) + 1, len(history), np.int64)
    offsets[0] = 0
    return Split(name, np.arange(len(targets)), history, offsets, targets, None)


def make_dataset(name, num_items, **splits):
    """Return a dataset of titles; `splits` are (targets, history) by name."""
    titles = [f"title {item}" for item in range(num_items)]
    rows = {split: make_split(split, *values) for split, values in splits.items()}
    return InteractionDataset(Path("nowhere"), {"name": name}, titles, None, rows, "")


def make_catalogue(paths, counts, kind="text"):
    token_ids, offsets = ragged(paths)
    catalogue = Catalogue(token_ids, offsets, np.asarray(counts, np.int64), 0, kind, "", "")
    return catalogue, TokenTrie.build(token_ids, offsets, catalogue.counts)


@pytest.fixture
def worked():
    train, valid, test = (TARGETS, [4, 0, 1]), ([1], [0]), ([2, 4, 0, 2], [1])
    dataset = make_dataset("worked", len(PATHS), train=train, valid=valid, test=test)
    catalogue, trie = make_catalogue(PATHS, np.bincount(TARGETS, minlength=len(PATHS)))
    return dataset, catalogue, trie


def test_worked_example(worked):
    found = catalogue_statistics(*worked)
    # Of 6 training rows, edge 1 has all 6 (zero gain, not forced), 1-2 has 4 and 1-3 has 2. Their
    # EOS edges are forced.
    expected = {
        "items": 5,
        "train_rows": 6,
        "valid_rows": 1,
        "test_rows": 4,
        "target_tokens": 18,
        "zero_ig_tokens": 12,  # token 1 six times, EOS six times
        "zero_ig_share": 12 / 18,
        "forced_tokens": 6,
        "forced_share": 6 / 18,
        "negative_ig_tokens": 0,
        "catalogue_tokens": 16,
        "catalogue_zero_ig_tokens": 4
        + 3
        + 2
        + 2,  # token 1; EOS of items 0, 1, 3; below the cold prefixes 1-4 and 6
        "catalogue_zero_ig_share": 11 / 16,
        "catalogue_forced_share": (3 + 2 + 2) / 16,
        "nodes": 12,
        "mean_length": 16 / 5,
        "median_length": 3.0,
        "max_length": 4,
        "root_children": 2,
        "branching_nodes": 2,
        "mean_branching": 2.5,
        "duplicate_paths": 1,
        "duplicate_items": 2,
        "cold_items": 2,
        "cold_item_share": 0.4,
        "test_unseen_share": 3 / 4,
        "test_unseen_anywhere_share": 2 / 4,  # item 4 is in a training history
        "filtering_ratio": [(1 / 5 + 4 / 5) / 2, (2 / 4 + 3 / 4 + 3 / 4 + 0) / 4, 0.0],
    }

    for key, value in expected.items():
        assert found[key] == pytest.approx(value), key
    root = -(4 / 6 * np.log(4 / 6) + 2 / 6 * np.log(2 / 6))
    assert found["root_entropy"] == pytest.approx(root)
    gains = 4 * (root + 4 / 6 * np.log(4 / 6)) + 2 * (root + 2 / 6 * np.log(2 / 6))
    assert found["mean_ig"] == pytest.approx(gains / 18)


def test_every_key_is_documented_and_json(worked):
    found = catalogue_statistics(*worked)
    assert list(found) == list(KEYS)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("entropy", ENTROPIES)
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][1].sum()])
def test_counts_equal_brute_force(name, entropy):
    paths, counts = CASES[name][0], np.minimum(CASES[name][1], 100)
    targets = np.repeat(np.arange(len(paths)), counts)
    rows = (targets, targets)
    dataset = make_dataset("", len(paths), train=rows, valid=rows, test=rows)
    found = catalogue_statistics(dataset, *make_catalogue(paths, counts), entropy)

    _, items = brute_force(paths)
    children = {}
    for prefix in items:
        children.setdefault(prefix[:-1], set()).add(prefix)
    tokens = zero = forced = 0
    for target in targets:
        for t in range(len(paths[target])):
            before, after = tuple(paths[target][:t]), tuple(paths[target][: t + 1])
            tokens += 1
            zero += sum(counts[i] for i in items[before]) == sum(counts[i] for i in items[after])
            forced += len(children[before] - {()}) == 1

    assert (found["target_tokens"], found["zero_ig_tokens"], found["forced_tokens"]) == (
        tokens,
        zero,
        forced,
    )
    assert found["test_unseen_share"] == 0.0
    if name.startswith("semantic"):
        assert len(found["filtering_ratio"]) == 3  # codes only, not the level of EOS


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_command(worked, flags, monkeypatch, capsys):
    dataset, catalogue, _ = worked
    monkeypatch.setattr(stats.InteractionDataset, "load", lambda folder: dataset)
    monkeypatch.setattr(stats, "load_tokenizer", lambda name: None)
    monkeypatch.setattr(stats.Catalogue, "build", lambda *arguments: catalogue)
    assert (
        stats.main(["--dataset", "D", "--tokenizer", "T", "--entropy", "conditional", *flags]) == 0
    )
    printed = capsys.readouterr().out
    if flags:
        assert json.loads(printed)["zero_ig_tokens"] == 12 and printed.count("\n") == 1
    else:
        assert [line.split()[0] for line in printed.splitlines()] == list(KEYS)
        assert "66.67%" in printed


def list_of_three_users():
    """Return a dataset of titles "a" to "e" with the users' chains of 1, 2 and 3 rows."""
    rows = [([0], 1), ([2], 3), ([2, 3], 4), ([4], 0), ([4, 0], 1), ([4, 0, 1], 2)]
    split = Split(
        "train",
        np.array([7, 8, 8, 9, 9, 9]),
        np.concatenate([history for history, _ in rows]).astype(np.int32),
        np.cumsum([0, *(len(history) for history, _ in rows)]),
        np.array([target for _, target in rows], np.int32),
        None,
    )
    info = {"name": "", "domain": "books"}
    dataset = InteractionDataset(Path("nowhere"), info, list("abcde"), None, {"train": split}, "")
    return dataset, Catalogue.build(dataset, test_prompts.tokenizer())


@pytest.mark.parametrize("micro_batch", [6, 8])
def test_rows_as_a_list_by_hand(micro_batch):
    """Each item has 3 tokens: letter, line break, EOS; EOS stands before the first one."""
    dataset, catalogue = list_of_three_users()
    found = row_statistics(
        dataset, test_prompts.tokenizer(), catalogue, "list", max_length=40, micro_batch=micro_batch
    )
    assert found.keys() == ROW_KEYS.keys() and found["rows_counted"] == 6
    rows = [7, 7, 10, 7, 10, 13]
    assert found["row_tokens"] == pytest.approx(np.mean(rows))
    # A tree has EOS, and each user's whole sequence without its last EOS.
    assert found["tree_tokens"] == pytest.approx((1 + 5 + 8 + 11) / 6)
    assert found["padded_tokens"] == pytest.approx(16 * micro_batch / 6)
    assert found["row_saving"] == pytest.approx(np.sum(rows) / 25)
    assert found["chain_length"] == 2.0


def test_trees_of_shuffled_rows_share_less_than_those_of_chains():
    """Micro-batches of 2 rows: chains of 1, 2 and 3 rows hold together, shuffled rows do not."""
    dataset, catalogue = list_of_three_users()
    counted = [dataset, test_prompts.tokenizer(), catalogue, "list", 40, 2]
    chains, rows = (row_statistics(*counted, batching) for batching in ("chains", "rows"))
    assert chains["row_tokens"] == rows["row_tokens"]
    assert chains["tree_tokens"] < rows["tree_tokens"]


def test_rows_are_printed_where_a_prompt_is_named(worked, monkeypatch, capsys):
    _, catalogue, _ = worked
    dataset, _ = list_of_three_users()
    monkeypatch.setattr(stats.InteractionDataset, "load", lambda folder: dataset)
    monkeypatch.setattr(stats, "load_tokenizer", lambda name: test_prompts.tokenizer())
    monkeypatch.setattr(stats, "catalogue_statistics", lambda *arguments: {})
    words = ["--dataset", "D", "--tokenizer", "T", "--prompt", "short", "--max_length"]
    assert stats.main([*words, "80"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ROW_KEYS)
    for size in ("0", "20"):
        with pytest.raises(UsageError, match="--max_length"):
            stats.main([*words, size])
