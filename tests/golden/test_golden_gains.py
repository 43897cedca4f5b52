"""Gains of the authors' code on the titles of books-small, verbatim (without title hygiene)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from igd_ds.data.dataset import InteractionDataset, Split
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import entropy, information_gain, zero_gain
from igd_ds.items.trie import TokenTrie

pytestmark = pytest.mark.isa

EOS = "<|endoftext|>"

# Relative to the root's entropy (about 8 nats), because a gain is a difference of two entropies.
# Both sides are fp64 (2e-16) and sum up to 16,000 terms in another order. Measured: 6e-14.
GAIN_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Golden:
    """The reference's outputs, and our trie of the same titles."""

    expected: dict[str, Any]
    trie: TokenTrie
    rows: list[tuple[dict[str, Any], np.ndarray, np.ndarray]]
    """Per title: the reference's row, our token ids, our nodes."""


def dataset_of(titles: list[str], counts: np.ndarray) -> InteractionDataset:
    """A dataset in memory in which item i is the target of counts[i] training rows."""
    targets = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    train = Split(
        name="train",
        user_ids=np.arange(len(targets)),
        history_items=np.empty(0, np.int32),
        history_offsets=np.zeros(len(targets) + 1, np.int64),
        targets=targets,
        timestamps=None,
    )
    return InteractionDataset(
        folder=Path("in memory"),
        info={},
        titles=titles,
        semantic_ids=None,
        splits={"train": train},
        fingerprint="",
    )


@pytest.fixture(scope="module")
def golden(shared) -> Golden:
    folder = shared / "golden" / "books"
    frequency = json.loads((folder / "frequency.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=EOS, pad_token=EOS
    )
    titles = list(frequency)
    catalogue = Catalogue.build(dataset_of(titles, np.array(list(frequency.values()))), tokenizer)
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    nodes = trie.path_nodes(catalogue.offsets)

    item = {title: i for i, title in enumerate(titles)}
    expected = json.loads((folder / "ig.json").read_text())
    rows = []
    for row in expected["rows"]:
        begin, end = catalogue.offsets[item[row["title"]] :][:2]
        rows.append((row, catalogue.token_ids[begin:end], nodes[begin:end]))
    return Golden(expected, trie, rows)


def test_tokens_counts_and_nodes(golden):
    # The reference does not count the root.
    assert golden.trie.num_nodes - 1 == golden.expected["n_nodes"]
    assert golden.trie.train_count[0] == golden.expected["total_frequency"]
    assert len(golden.rows) == 300
    for row, tokens, nodes in golden.rows:
        assert tokens.tolist() == row["token_ids"]
        assert golden.trie.train_count[nodes[-1]] == row["frequency"]


@pytest.mark.parametrize(
    ("name", "root", "column"),
    [
        ("prior", "root_score_official", "ig_official"),
        ("conditional", "root_entropy_conditional", "ig_conditional"),
    ],
)
def test_gains(golden, name, root, column):
    of_root = golden.expected[root]
    assert entropy(golden.trie, name)[0] == pytest.approx(of_root, rel=GAIN_TOLERANCE)
    gain = information_gain(golden.trie, name)
    for row, _, nodes in golden.rows:
        np.testing.assert_allclose(gain[nodes], row[column], rtol=0, atol=GAIN_TOLERANCE * of_root)


def test_zero_sets_are_identical(golden):
    zero = zero_gain(golden.trie)
    for row, _, nodes in golden.rows:
        of_reference = [gain == 0 for gain in row["ig_official"]]
        assert zero[nodes].tolist() == row["structural_zero"] == of_reference
