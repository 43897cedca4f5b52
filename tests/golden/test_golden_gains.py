"""Gains of the authors' code on books-small titles (verbatim, hygiene off), to 1e-9 before they become fp32."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import entropy, information_gain, zero_gain
from igd_ds.items.trie import TokenTrie

EOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "golden" / "books"
    frequency = json.loads((folder / "frequency.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=EOS, pad_token=EOS
    )
    counts = np.array(list(frequency.values()))
    dataset = SimpleNamespace(
        titles=list(frequency),
        semantic_ids=None,
        splits={"train": SimpleNamespace(targets=np.repeat(np.arange(len(counts)), counts))},
        fingerprint="",
        num_items=len(counts),
    )
    catalogue = Catalogue.build(dataset, tokenizer)
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    nodes = trie.path_nodes(catalogue.offsets)
    item = {title: i for i, title in enumerate(dataset.titles)}
    expected = json.loads((folder / "ig.json").read_text())
    slices = [slice(*catalogue.offsets[item[row["title"]] :][:2]) for row in expected["rows"]]
    rows = [
        (row, catalogue.token_ids[s], nodes[s])
        for row, s in zip(expected["rows"], slices, strict=True)
    ]
    return SimpleNamespace(expected=expected, trie=trie, rows=rows)


def test_tokens_counts_and_nodes(golden):
    assert (
        golden.trie.num_nodes - 1 == golden.expected["n_nodes"]
    )  # the reference does not count the root
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
    assert entropy(golden.trie, name)[0] == pytest.approx(golden.expected[root], abs=1e-9)
    gain = information_gain(golden.trie, name)
    for row, _, nodes in golden.rows:
        np.testing.assert_allclose(gain[nodes], row[column], rtol=0, atol=1e-9)


def test_zero_sets_are_identical(golden):
    zero = zero_gain(golden.trie)
    for row, _, nodes in golden.rows:
        assert (
            zero[nodes].tolist()
            == row["structural_zero"]
            == [gain == 0 for gain in row["ig_official"]]
        )
