"""igd tokenizer: a trained BPE, a vocabulary of codes alone, and codes that cannot be tokens."""

import json

import pytest
from transformers import AutoTokenizer

from igd_ds.commands import prepare as prepare_command
from igd_ds.commands import tokenizer as tokenizer_command
from igd_ds.data.dataset import InteractionDataset
from igd_ds.errors import UsageError
from igd_ds.semantic_ids.code_tokens import (
    bpe_with_codes,
    check_codes_stay_apart,
    tokenizer_of_codes,
)

TITLES = ["A &amp; B", None, "Same", "Same", "Longer title, Volume 1", "Longer title, Volume 2"]
SEQUENCES = [[0, 1, 2, 3, 4], [5, 2, 1], [3, 3, 0, 5], [2, 3, 0, 5, 1]]


def prepare(source, output, *flags):
    """Make a dataset of a folder of sequences."""
    where = ["--source", "sequences", "--input", str(source), "--output", str(output)]
    assert prepare_command.main([*where, "--protocol", "leave-one-out", *flags]) == 0


def make(dataset, output, *flags) -> int:
    """Run igd tokenizer."""
    where = ["--dataset", str(dataset), "--output", str(output)]
    return tokenizer_command.main([*where, *map(str, flags)])


@pytest.fixture
def titles(tmp_path):
    """Make a dataset with titles."""
    folder = tmp_path / "source"
    folder.mkdir()
    items = [json.dumps({"item_id": i, "title": title}) for i, title in enumerate(TITLES)]
    users = [json.dumps({"user_id": i, "items": items}) for i, items in enumerate(SEQUENCES)]
    (folder / "items.jsonl").write_text("\n".join(items) + "\n")
    (folder / "sequences.jsonl").write_text("\n".join(users) + "\n")
    prepare(folder, tmp_path / "d", "--domain", "books")
    return tmp_path / "d"


def test_tokenizer_of_titles(titles, tmp_path, capsys):
    assert make(titles, tmp_path / "tok", "--vocab_size", 400) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == 0
    assert tokenizer.bos_token is None and 259 <= len(tokenizer) <= 400
    for text in ["Longer title, Volume 1\n", "never seen: ü 日本 \x00 😀\n", "don't  stop 123\n\n"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and 0 not in ids
    assert len(tokenizer("Recent books")["input_ids"]) <= 3  # a template's words are whole tokens

    # Equal requests give equal bytes and are made once; other requests are refused.
    assert make(titles, tmp_path / "again", "--vocab_size", 400) == 0
    for name in ("tokenizer.json", "training.json"):
        assert (tmp_path / "tok" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    capsys.readouterr()
    assert make(titles, tmp_path / "tok", "--vocab_size", 400) == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"--output .*/tok exists .* \(these differ: vocab_size\)"):
        make(titles, tmp_path / "tok", "--vocab_size", 300)
    with pytest.raises(UsageError, match="256 bytes and 3 special tokens must fit"):
        make(titles, tmp_path / "small", "--vocab_size", 200)
    for flags in (["--semantic_ids"], ["--codes_only"]):
        with pytest.raises(UsageError, match=f"has no semantic IDs; leave out {flags[0]}"):
            make(titles, tmp_path / "codes", *flags)
    assert not (tmp_path / "codes").exists()


def test_tokenizer_uses_the_golden_split(shared):
    path = shared / "golden" / "books" / "tokenizer.json"
    golden = json.loads(path.read_text(encoding="utf-8"))
    ours = json.loads(bpe_with_codes(["A title"], ["text"], 300, [])._tokenizer.to_str())
    assert ours["normalizer"] == golden["normalizer"]
    split, theirs = (found["pre_tokenizer"]["pretokenizers"][0] for found in (ours, golden))
    assert split == theirs
    added = [[token["content"] for token in found["added_tokens"]] for found in (ours, golden)]
    assert added[0] == added[1]


def test_tokenizer_of_semantic_ids(shared, tmp_path, capsys):
    prepare(shared / "data" / "instruments", tmp_path / "d")
    data, output = tmp_path / "d", tmp_path / "tok"
    with pytest.raises(UsageError, match="add --semantic_ids"):
        make(data, output, "--vocab_size", 512)

    # Behind a BPE.
    assert make(data, output, "--vocab_size", 512, "--semantic_ids") == 0
    tokenizer = AutoTokenizer.from_pretrained(output)
    semantic_ids = InteractionDataset.load(data).semantic_ids
    codes = sorted({code for path in semantic_ids for code in path})
    ids = [tokenizer(code, add_special_tokens=False)["input_ids"] for code in codes]
    assert [len(found) for found in ids] == [1] * len(codes) and len(codes) == 150 + 3 * 256
    assert ids == [[ids[0][0] + i] for i in range(len(codes))]  # sorted order
    for path in semantic_ids[:50]:
        found = tokenizer("".join(path), add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(found) == path
        assert tokenizer.decode(found, skip_special_tokens=True).replace(" ", "") == "".join(path)

    # Alone.
    output = tmp_path / "codes"
    assert make(data, output, "--codes_only") == 0
    tokenizer = AutoTokenizer.from_pretrained(output)
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert vocabulary == ["<pad>", "<|endoftext|>", "<unk>", *codes]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    found = tokenizer(["".join(path) for path in semantic_ids])["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in found] == semantic_ids
    assert tokenizer.decode(found[0] + [1], skip_special_tokens=True) == "".join(semantic_ids[0])
    capsys.readouterr()
    assert make(data, output, "--codes_only") == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UsageError, match="was made from another request"):
        make(data, output, "--vocab_size", 512, "--semantic_ids")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--codes_only"], "--codes_only has none"),
        (["--add_codes_to", "T"], "--add_codes_to trains nothing"),
        (["--codes_only", "--semantic_ids"], "not allowed with argument"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit):
        make("d", "o", "--vocab_size", 512, *flags)
    assert message in capsys.readouterr().err


def test_codes_must_be_tokens_of_their_own():
    with pytest.raises(UsageError, match="code '<pad>' is also a token of the tokenizer"):
        tokenizer_of_codes(["<a>", "<pad>"])
    with pytest.raises(UsageError, match="code 'a' is also a token"):
        bpe_with_codes(["A title"], ["text"], 300, ["a"])
    tokenizer = tokenizer_of_codes(["a", "bc", "ab", "c"])
    with pytest.raises(
        UsageError,
        match=r"codes \['a', 'bc'\] merge with each other: 'abc' is read as \['ab', 'c'\]",
    ):
        check_codes_stay_apart(tokenizer, [["a", "bc"], ["ab", "c"]])
