"""Catalogue: titles and codes to paths, the tokenizer's fingerprint, the folder on disk."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from igd_ds.data.dataset import InteractionDataset, Split
from igd_ds.errors import UsageError
from igd_ds.items import catalogue as catalogue_module
from igd_ds.items.catalogue import Catalogue, tokenizer_fingerprint
from igd_ds.items.decisiveness import MEASURES, edge_gain, information_gain, zero_gain
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.store import StoredCatalogue, load_catalogue, save_catalogue
from igd_ds.items.trie import TokenTrie

TITLES = ["The Hobbit", "The Hobbit (Illustrated)", "Dune", "Dune", "Emma.", "Café 2, vol. 1 (end)"]
CODES = [["<a_1>", "<b_2>"], ["<a_1>", "<b_3>"], ["<a_2>", "<b_2>"], ["<a_1>", "<b_2>"]]


def make_tokenizer(text="The Hobbit (Illustrated)\nDune. end)\n" * 50, codes=()):
    """Byte-level BPE whose text teaches it merges such as ')' + newline."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", *codes],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def make_dataset(titles=None, codes=None, targets=(0, 0, 1, 3), fingerprint="dataset-1"):
    """A dataset in memory whose training rows have these targets and no history."""
    rows = len(targets)
    train = Split(
        name="train",
        user_ids=np.arange(rows),
        history_items=np.empty(0, np.int32),
        history_offsets=np.zeros(rows + 1, np.int64),
        targets=np.array(targets, np.int32),
        timestamps=None,
    )
    return InteractionDataset(
        folder=Path("in memory"),
        info={},
        titles=titles if titles is not None else [None] * len(codes),
        semantic_ids=codes,
        splits={"train": train},
        fingerprint=fingerprint,
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_text_items_are_tokenized_whole_and_end_in_eos(tokenizer, monkeypatch):
    monkeypatch.setattr(catalogue_module, "TOKENIZE_CHUNK", 4)  # the items span two calls
    catalogue = Catalogue.build(make_dataset(TITLES), tokenizer)
    assert catalogue.kind == "text" and catalogue.num_items == len(TITLES)
    for item, title in enumerate(TITLES):
        expected = tokenizer.encode(title + "\n", add_special_tokens=False) + [
            tokenizer.eos_token_id
        ]
        assert catalogue.path(item).tolist() == expected
    assert catalogue.max_length == max(len(catalogue.path(i)) for i in range(len(TITLES)))
    assert catalogue.counts.tolist() == [2, 1, 0, 1, 0, 0]
    assert (catalogue.token_ids.dtype, catalogue.offsets.dtype, catalogue.counts.dtype) == (
        np.int32,
        np.int64,
        np.int64,
    )
    merged = tokenizer.encode("The Hobbit (Illustrated)", add_special_tokens=False)
    # ')' and the newline are one token, so a title alone has other tokens than title and newline.
    assert catalogue.path(1)[: len(merged)].tolist() != merged


def test_semantic_ids_are_one_token_per_code():
    tokenizer = make_tokenizer(codes=sorted({code for codes in CODES for code in codes}))
    for dataset in (make_dataset(codes=CODES), make_dataset(titles=["x"] * 4, codes=CODES)):
        catalogue = Catalogue.build(
            dataset, tokenizer, None if dataset.titles[0] is None else "semantic-id"
        )
        assert catalogue.kind == "semantic-id"
        for item, codes in enumerate(CODES):
            assert catalogue.path(item).tolist() == tokenizer.convert_tokens_to_ids(
                [*codes, "<eos>"]
            )


def test_bad_items_are_named(tokenizer):
    with pytest.raises(UsageError, match=r"item 1 has no title \(2 such items\).*hygiene"):
        Catalogue.build(make_dataset(["a", None, None, "b"]), tokenizer)

    # An EOS token that is a letter cannot be told from text.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    with pytest.raises(UsageError, match="item 2 .*contains the EOS token 'y'"):
        Catalogue.build(
            make_dataset(["a", "b", "yes", "c"]),
            PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="y"),
        )
    with pytest.raises(
        UsageError, match=r"code '<a_1>' of item 0 is \d+ tokens.*igd tokenizer --semantic_ids"
    ):
        Catalogue.build(make_dataset(codes=CODES), tokenizer)

    with pytest.raises(UsageError, match="item 1 has no semantic ID"):
        Catalogue.build(make_dataset(codes=[["<eos>"], [], ["<eos>"], ["<eos>"]]), tokenizer)
    with pytest.raises(UsageError, match="item 0 .*contains the EOS token"):
        Catalogue.build(make_dataset(codes=[["<eos>"]] * 4), tokenizer)

    with pytest.raises(UsageError, match="no semantic IDs"):
        Catalogue.build(make_dataset(TITLES), tokenizer, "semantic-id")
    with pytest.raises(UsageError, match="known: text, semantic-id"):
        Catalogue.build(make_dataset(TITLES), tokenizer, "title")

    with pytest.raises(UsageError, match="no EOS token"):
        Catalogue.build(
            make_dataset(TITLES),
            PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer),
        )


def test_fingerprint_is_stable_and_tells_tokenizers_apart(tokenizer, tmp_path):
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(again) == fingerprint
    again.pad_token = again.eos_token
    again(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(again) == fingerprint
    again.save_pretrained(tmp_path / "used")
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "used")) == fingerprint
    again.add_tokens(["<new>"])
    assert tokenizer_fingerprint(again) != fingerprint
    assert tokenizer_fingerprint(make_tokenizer("Some other text\n" * 50)) != fingerprint


@dataclass(frozen=True)
class Saved:
    """A catalogue, and the folder that it was saved to."""

    folder: Path
    dataset: InteractionDataset
    stored: StoredCatalogue


@pytest.fixture
def saved(tokenizer, tmp_path) -> Saved:
    dataset = make_dataset(TITLES)
    catalogue = Catalogue.build(dataset, tokenizer)
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    stored = StoredCatalogue.build(catalogue, trie, information_gain(trie), "prior")
    save_catalogue(tmp_path / "catalogue", stored)
    return Saved(tmp_path / "catalogue", dataset, stored)


def assert_same_catalogues(loaded: StoredCatalogue, stored: StoredCatalogue) -> None:
    for name, value in vars(stored.catalogue).items():
        np.testing.assert_array_equal(getattr(loaded.catalogue, name), value, err_msg=name)
    for name, value in vars(stored.trie).items():
        np.testing.assert_array_equal(getattr(loaded.trie, name), value, err_msg=name)
        assert getattr(loaded.trie, name).dtype == value.dtype
    for name in ("gain", "zero_gain", "token_node"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(stored, name), err_msg=name)
        assert getattr(loaded, name).dtype == getattr(stored, name).dtype
    assert (loaded.entropy, loaded.decisiveness) == (stored.entropy, stored.decisiveness)


def test_zero_gain_and_node_of_every_catalogue_token(saved):
    stored = saved.stored
    node, zero, position = stored.token_node, zero_gain(stored.trie), 0
    assert (node.dtype, stored.zero_gain.dtype, stored.gain.dtype) == (np.int32, bool, np.float32)
    for item in range(stored.catalogue.num_items):
        parent = 0
        for token in stored.catalogue.path(item):
            assert stored.trie.parent[node[position]] == parent
            assert stored.trie.token[node[position]] == token
            assert stored.zero_gain[position] == zero[node[position]]
            parent, position = node[position], position + 1
        assert parent == stored.trie.leaf_of_item[item]
    assert position == len(stored.catalogue.token_ids)
    assert 0 < stored.zero_gain.sum() < position


def test_store_gives_back_what_was_saved_memory_mapped(saved, tokenizer):
    loaded = load_catalogue(saved.folder, tokenizer, saved.dataset)
    assert_same_catalogues(loaded, saved.stored)
    arrays = [*vars(loaded.trie).values(), loaded.gain, loaded.zero_gain, loaded.token_node]
    assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in arrays)
    np.testing.assert_array_equal(loaded.gain[1:] == 0, zero_gain(loaded.trie)[1:])
    # Tensors are copies: writing to one must not touch the map.
    SearchTrie.build(loaded.trie).token.add_(1)
    assert list(saved.folder.parent.iterdir()) == [saved.folder]


@pytest.mark.parametrize("decisiveness", MEASURES)
def test_the_store_takes_every_measure(saved, decisiveness):
    stored = saved.stored
    gain = edge_gain(stored.trie, decisiveness, "conditional")
    other = StoredCatalogue.build(stored.catalogue, stored.trie, gain, "conditional", decisiveness)
    np.testing.assert_array_equal(other.gain, gain.astype(np.float32))
    np.testing.assert_array_equal(other.zero_gain, stored.zero_gain)  # decided on counts alone
    save_catalogue(saved.folder.with_name("other"), other)
    assert_same_catalogues(load_catalogue(saved.folder.with_name("other")), other)


def test_a_catalogue_of_version_1_can_be_read(saved, tokenizer):
    """Version 1 had neither the arrays over tokens nor the name of the measure."""
    path = saved.folder / "catalogue.json"
    description = json.loads(path.read_text())
    for name in ("zero_gain", "token_node"):
        (saved.folder / f"{name}.npy").unlink()
        del description["bytes"][name]
    del description["decisiveness"]
    path.write_text(json.dumps(description | {"version": 1}))
    assert_same_catalogues(load_catalogue(saved.folder, tokenizer, saved.dataset), saved.stored)


def test_an_information_gain_may_not_underflow_and_other_measures_may(saved):
    stored = saved.stored
    gain = information_gain(stored.trie)
    gain[np.argmax(gain > 0)] = 1e-60
    build = functools.partial(StoredCatalogue.build, stored.catalogue, stored.trie, gain, "prior")
    with pytest.raises(AssertionError, match="underflowed to zero"):
        build()
    assert build("gini").zero_gain.tolist() == stored.zero_gain.tolist()


def test_store_refuses_what_does_not_belong(saved, tokenizer):
    stored = saved.stored
    with pytest.raises(UsageError, match="another tokenizer"):
        load_catalogue(saved.folder, make_tokenizer("Another text\n" * 9))
    with pytest.raises(UsageError, match="another dataset"):
        load_catalogue(saved.folder, tokenizer, make_dataset(TITLES, fingerprint="dataset-2"))
    with pytest.raises(UsageError, match="never overwritten"):
        save_catalogue(saved.folder, stored)
    with pytest.raises(UsageError, match="known: prior, conditional"):
        StoredCatalogue.build(stored.catalogue, stored.trie, stored.gain, "shannon")
    with pytest.raises(UsageError, match="unknown --decisiveness 'shannon'"):
        StoredCatalogue.build(stored.catalogue, stored.trie, stored.gain, "prior", "shannon")
    with pytest.raises(UsageError, match="catalogue.json is missing"):
        load_catalogue(saved.folder.parent)


def test_store_names_a_damaged_file(saved):
    path = saved.folder / "parent.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(UsageError, match=r"parent\.npy has .* cut off"):
        load_catalogue(saved.folder)
    path.unlink()
    with pytest.raises(UsageError, match=r"parent\.npy is missing"):
        load_catalogue(saved.folder)
    path.write_bytes(whole)
    description = saved.folder / "catalogue.json"
    text = description.read_text()
    description.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(UsageError, match="version 99"):
        load_catalogue(saved.folder)
    description.write_text(text[:50])
    with pytest.raises(UsageError, match="catalogue.json cannot be read"):
        load_catalogue(saved.folder)


def test_a_failed_save_leaves_nothing(saved, monkeypatch):
    folder = saved.folder.with_name("other")

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_catalogue(folder, saved.stored)
    assert list(saved.folder.parent.iterdir()) == [saved.folder]
