"""Catalogue: titles and codes to paths, the tokenizer's fingerprint, the folder on disk."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from igd_ds.items import catalogue as catalogue_module
from igd_ds.items.catalogue import Catalogue, tokenizer_fingerprint
from igd_ds.items.decisiveness import information_gain, zero_gain
from igd_ds.items.store import load_catalogue, save_catalogue
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
    num_items = len(titles if titles is not None else codes)
    return SimpleNamespace(
        titles=titles if titles is not None else [None] * num_items,
        semantic_ids=codes,
        splits={"train": SimpleNamespace(targets=np.array(targets, np.int32))},
        fingerprint=fingerprint,
        num_items=num_items,
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
    assert (
        catalogue.path(1)[: len(merged)].tolist() != merged
    )  # the trap: ')' and newline are one token


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
    with pytest.raises(ValueError, match=r"item 1 has no title \(2 such items\).*hygiene"):
        Catalogue.build(make_dataset(["a", None, None, "b"]), tokenizer)
    with pytest.raises(ValueError, match="item 2 .*contains the EOS token '<eos>'"):
        Catalogue.build(make_dataset(["a", "b", "say <eos> now", "c"]), tokenizer)
    with pytest.raises(
        ValueError, match=r"code '<a_1>' of item 0 is \d+ tokens.*train_tokenizer.py --semantic_ids"
    ):
        Catalogue.build(make_dataset(codes=CODES), tokenizer)
    with pytest.raises(ValueError, match="item 1 has no semantic ID"):
        Catalogue.build(make_dataset(codes=[["<eos>"], [], ["<eos>"], ["<eos>"]]), tokenizer)
    with pytest.raises(ValueError, match="item 0 .*contains the EOS token"):
        Catalogue.build(make_dataset(codes=[["<eos>"]] * 4), tokenizer)
    with pytest.raises(ValueError, match="no semantic IDs"):
        Catalogue.build(make_dataset(TITLES), tokenizer, "semantic-id")
    with pytest.raises(ValueError, match="known: text, semantic-id"):
        Catalogue.build(make_dataset(TITLES), tokenizer, "title")
    with pytest.raises(ValueError, match="no EOS token"):
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


@pytest.fixture
def stored(tokenizer, tmp_path):
    dataset = make_dataset(TITLES)
    catalogue = Catalogue.build(dataset, tokenizer)
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    gain = information_gain(trie)
    save_catalogue(tmp_path / "catalogue", catalogue, trie, gain, "prior")
    return SimpleNamespace(
        folder=tmp_path / "catalogue", dataset=dataset, catalogue=catalogue, trie=trie, gain=gain
    )


def test_store_gives_back_what_was_saved_memory_mapped(stored, tokenizer):
    loaded = load_catalogue(stored.folder, tokenizer, stored.dataset)
    for name, value in vars(stored.catalogue).items():
        np.testing.assert_array_equal(getattr(loaded.catalogue, name), value, err_msg=name)
    for name, value in vars(stored.trie).items():
        np.testing.assert_array_equal(getattr(loaded.trie, name), value, err_msg=name)
        assert getattr(loaded.trie, name).dtype == value.dtype
        assert (
            isinstance(getattr(loaded.trie, name), np.memmap)
            and not getattr(loaded.trie, name).flags.writeable
        )
    assert loaded.entropy == "prior" and loaded.gain.dtype == np.float32
    np.testing.assert_array_equal(loaded.gain, stored.gain.astype(np.float32))
    np.testing.assert_array_equal(loaded.gain[1:] == 0, zero_gain(loaded.trie)[1:])
    loaded.trie.to("cpu").token.add_(1)  # tensors are copies: writing one must not touch the map
    assert list(stored.folder.parent.iterdir()) == [stored.folder]


def test_store_refuses_what_does_not_belong(stored, tokenizer):
    with pytest.raises(ValueError, match="another tokenizer"):
        load_catalogue(stored.folder, make_tokenizer("Another text\n" * 9))
    with pytest.raises(ValueError, match="another dataset"):
        load_catalogue(stored.folder, tokenizer, make_dataset(TITLES, fingerprint="dataset-2"))
    with pytest.raises(ValueError, match="never overwritten"):
        save_catalogue(stored.folder, stored.catalogue, stored.trie, stored.gain, "prior")
    with pytest.raises(ValueError, match="known: prior, conditional"):
        save_catalogue(
            stored.folder.with_name("b"), stored.catalogue, stored.trie, stored.gain, "shannon"
        )
    with pytest.raises(ValueError, match="catalogue.json is missing"):
        load_catalogue(stored.folder.parent)


def test_store_names_a_damaged_file(stored):
    path = stored.folder / "parent.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"parent\.npy has .* cut off"):
        load_catalogue(stored.folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"parent\.npy is missing"):
        load_catalogue(stored.folder)
    path.write_bytes(whole)
    description = stored.folder / "catalogue.json"
    text = description.read_text()
    description.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        load_catalogue(stored.folder)
    description.write_text(text[:50])
    with pytest.raises(ValueError, match="not valid JSON"):
        load_catalogue(stored.folder)


def test_a_failed_save_leaves_nothing(stored, monkeypatch):
    folder = stored.folder.with_name("other")

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_catalogue(folder, stored.catalogue, stored.trie, stored.gain, "prior")
    assert list(stored.folder.parent.iterdir()) == [stored.folder]
