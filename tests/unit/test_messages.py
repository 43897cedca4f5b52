"""Messages about inputs that people really have: one line, what was found, what to do.

Each file here was met in bug reports: pandas' index column, a quoted header, a JSON array, ids that
are written in two ways, half an emoji. What can be read is read; the rest is refused by name.
"""

import importlib
import json
from pathlib import Path

import pytest
import tiny_run
import torch
from raw_source import events_of, items_of, reading
from safetensors.torch import load_file, save_file

from igd_ds.backbones.causal_lm import load_weights
from igd_ds.backbones.tokenizer import load_tokenizer
from igd_ds.commands import prepare
from igd_ds.config.options import parse
from igd_ds.data.sources import find_files
from igd_ds.errors import UsageError
from igd_ds.train_config import TrainConfig

REVIEW = {"reviewerID": "u1", "asin": "i1", "unixReviewTime": 1_400_000_000, "verified": True}
META = {"asin": "i1", "title": "One", "category": ["A"]}


def write_lines(path: Path, *lines: object) -> Path:
    """Write texts as they are and other values as JSON lines."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def refusal(source: str, *inputs: Path) -> str:
    """Return the message with which a source refuses files; it is one line."""
    with pytest.raises(UsageError) as caught, reading(source, inputs):
        pass
    message = str(caught.value)
    assert "\n" not in message and "b'" not in message
    return message


# ---- delimited text

RATINGS = "userId,movieId,rating,timestamp\n1,10,4.0,964982703\n2,20,3.5,964982704\n"
EVENTS = [("1", "10", 964982703), ("2", "20", 964982704)]


@pytest.mark.parametrize(
    "text",
    [
        RATINGS,
        "".join(f"{row},{line}\n" for row, line in zip(["", 0, 1], RATINGS.split(), strict=True)),
        "".join('"' + line.replace(",", '","') + '"\n' for line in RATINGS.split()),
        '"","userId","movieId","rating","timestamp"\n'
        '"0","1","10","4.0","964982703"\n"1","2","20","3.5","964982704"\n',
    ],
    ids=["plain", "pandas index", "quoted", "both"],
)
def test_a_table_as_pandas_and_r_write_it(tmp_path, text):
    movies = write_lines(tmp_path / "movies.csv", "movieId,title,genres", "10,Ten,A", "20,Two,B")
    (tmp_path / "ratings.csv").write_text(text)
    with reading("movielens", [tmp_path / "ratings.csv", movies]) as data:
        assert events_of(data) == EVENTS
        assert {item: row[0] for item, row in items_of(data).items()} == {"10": "Ten", "20": "Two"}


def test_recbole_with_commas_is_refused(tmp_path):
    path = write_lines(tmp_path / "x.inter", "user_id:token,item_id:token", "1,2")
    message = refusal("recbole", path)
    assert message == (
        f"{path}: the fields of atomic files are separated by tabs; its header is "
        "'user_id:token,item_id:token'"
    )


def test_recbole_without_titles_has_items_without_titles(tmp_path):
    write_lines(tmp_path / "x.inter", "user_id:token\titem_id:token", "1\t2", "1\t3")
    write_lines(tmp_path / "x.item", "item_id:token\tbrand:token", "2\tAcme", "3\tZeta")
    with reading("recbole", [tmp_path]) as data:
        found = items_of(data)
    assert found["2"][0] is None and found["3"][0] is None
    assert "Acme" in found["2"] and "Zeta" in found["3"]


# ---- JSON lines


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_instead_of_lines_is_refused(tmp_path, indent):
    path = tmp_path / "reviews.json"
    path.write_text(json.dumps([REVIEW, REVIEW], indent=indent))
    message = refusal("amazon-2018", path)
    assert message.startswith(f"{path}: one JSON array, where one object per line is needed: jq ")


def test_half_an_emoji_loses_no_interaction(tmp_path):
    lines = [json.dumps(REVIEW | {"asin": item}) for item in ("i1", "i2", "i3")]
    lines[1] = lines[1].replace('"verified"', '"reviewText": "so good \\ud83d", "verified"')
    reviews = write_lines(tmp_path / "reviews.json", *lines)
    titles = [json.dumps(META), json.dumps(META | {"asin": "i2"}).replace("One", "Two \\ud83d")]
    metadata = write_lines(tmp_path / "meta_x.json", *titles)
    with reading("amazon-2018", [reviews, metadata], max_bad_lines=0) as data:
        assert [item for _, item, _ in events_of(data)] == ["i1", "i2", "i3"]
        found = items_of(data)
    assert found["i1"][0] == "One" and found["i2"][0] == "Two ?"
    assert found["i2"][3] == ["A"]


def test_a_broken_line_is_shown_as_text(tmp_path):
    path = write_lines(tmp_path / "reviews.json", REVIEW, '{"asin": "é', REVIEW)
    assert 'line 2: no such object: \'{"asin": "é\'' in refusal("amazon-2018", path)


def test_metadata_in_latin_1_are_refused_by_line(tmp_path):
    reviews = write_lines(tmp_path / "reviews.json", REVIEW)
    metadata = tmp_path / "meta_x.json"
    metadata.write_bytes(
        json.dumps(META | {"title": "Café"}, ensure_ascii=False).encode("latin-1") + b"\n"
    )
    message = refusal("amazon-2018", reviews, metadata)
    assert str(metadata) in message and "UTF-8" in message


def test_metadata_that_describe_no_item_are_refused(tmp_path):
    reviews = write_lines(tmp_path / "reviews.json", REVIEW | {"asin": "0.0"})
    metadata = write_lines(tmp_path / "meta_x.json", META | {"asin": "0"})
    message = refusal("amazon-2018", reviews, metadata)
    assert "ids there are such as '0', here such as '0.0'" in message


@pytest.mark.parametrize("megabytes", [5, 40])
def test_long_lines_of_metadata(tmp_path, megabytes):
    """They are read up to 16 MiB; no message asks for room on the disk."""
    reviews = write_lines(tmp_path / "reviews.json", REVIEW)
    metadata = write_lines(
        tmp_path / "meta_x.json",
        META,
        META | {"asin": "i2", "description": ["x" * 1000] * 1000 * megabytes},
    )
    if megabytes > 16:
        message = refusal("amazon-2018", reviews, metadata)
        assert message == f"{metadata}: a line is longer than 16 MiB: shorten it"
        return
    with reading("amazon-2018", [reviews, metadata]) as data:
        assert items_of(data)["i1"][0] == "One"


def folder_of_sequences(folder: Path) -> Path:
    write_lines(folder / "items.jsonl", {"item_id": 0, "title": "A"}, {"item_id": 1, "title": "B"})
    write_lines(folder / "sequences.jsonl", {"user_id": 0, "items": [0, 1]})
    return folder


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["items.jsonl", "sequences.jsonl"])
def test_an_array_of_sequences_is_refused(tmp_path, name, indent):
    path = folder_of_sequences(tmp_path) / name
    path.write_text(json.dumps([{"item_id": 0, "user_id": 0, "items": [0]}], indent=indent))
    message = refusal("sequences", tmp_path)
    assert message.startswith(f"{path}: one JSON array, where one object per line is needed: jq ")


def test_sequences_show_a_wrong_line_as_text(tmp_path):
    path = folder_of_sequences(tmp_path) / "items.jsonl"
    write_lines(path, {"item": "é"})
    wanted = f'{path}:1: need an object with an integer item_id, found \'{{"item": '
    assert refusal("sequences", tmp_path).startswith(wanted)


def test_latin_1_has_the_same_advice_in_every_source(tmp_path):
    wanted = "2: not UTF-8 (iconv -f LATIN1 -t UTF-8 FILE converts Latin-1): '"
    path = folder_of_sequences(tmp_path) / "items.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"B"', b'"Caf\xe9"'))
    assert refusal("sequences", tmp_path).startswith(f"{path}:{wanted}")

    inter = write_lines(tmp_path / "X.inter.json", {"0": [0]})
    path = tmp_path / "X.item.json"
    path.write_bytes(b'{"0":\n {"title": "Caf\xe9"}}\n')
    assert refusal("lcrec-json", inter, path).startswith(f"{path}:{wanted}")


# ---- whose file is it?


def test_files_of_letter_are_named_by_their_source(tmp_path):
    write_lines(tmp_path / "X.inter.json", {"0": [0, 1]})
    path = write_lines(tmp_path / "X.index.json", {"0": ["<a_0>"], "1": ["<a_1>"]})
    with pytest.raises(UsageError, match="this looks like lcrec-json .*use --source lcrec-json"):
        find_files("recbole", [path])


def test_a_large_loss_is_told_with_its_likely_reason(tmp_path, capsys):
    """Few users with many items each: the columns may be swapped."""
    users = [{"user_id": user, "items": list(range(30 * user, 30 * user + 35))} for user in (0, 1)]
    write_lines(tmp_path / "sequences.jsonl", *users)
    write_lines(tmp_path / "items.jsonl", *({"item_id": i, "title": f"T {i}"} for i in range(65)))
    words = ["--source", "sequences", "--input", str(tmp_path), "--protocol", "leave-one-out"]
    assert prepare.main([*words, "--k_core", "2", "--output", str(tmp_path / "out")]) == 0
    warning = next(line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert "the 2-core dropped 0% of the users and 92% of the items" in warning
    assert "more items (65) than users (2): are the columns swapped?" in warning


# ---- models


def gone(model: Path) -> None:
    (model / "model.safetensors").unlink()


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def shard_gone(model: Path) -> None:
    """One of two shards is missing."""
    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    half = {name: weights[name] for name in names[: len(names) // 2]}
    save_file(half, model / shards[0], metadata={"format": "pt"})
    index = {name: shards[0] if name in half else shards[1] for name in names}
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )
    (model / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [gone, cut, shard_gone])
def test_weights_that_are_not_whole_are_named(tmp_path, damage):
    tiny_run.write_model(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UsageError) as caught:
        load_weights(str(tmp_path / "model"), torch.float32, False, torch.device("cpu"))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'model'}: its weights are missing, cut off or damaged")
    assert "\n" not in message


def test_a_tokenizer_that_needs_sentencepiece_says_so(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UsageError) as caught:
        load_tokenizer(str(tmp_path))
    assert "needs the package sentencepiece" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", ""),
        ("tokenizer_config.json", "[]"),
        ("tokenizer.json", '{"a": 1}'),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}'),
    ],
)
def test_a_damaged_tokenizer_is_told_in_one_line(tmp_path, name, content):
    tiny_run.letter_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    if '"model"' not in content:
        assert str(caught.value).startswith(str(tmp_path / name))


def test_a_file_instead_of_a_tokenizers_folder_names_the_folder(tmp_path):
    tiny_run.letter_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"this is a file; give the folder, {tmp_path},"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


# ---- flags


@pytest.mark.parametrize(
    ("module", "words", "near"),
    [
        ("prepare", ["--sorce", "yelp"], "--source"),
        ("embed", ["--datset", "x"], "--dataset"),
        ("ids", ["--quantiser=pq"], "--quantizer"),
        ("tokenizer", ["--vocabsize", "300"], "--vocab_size"),
    ],
)
def test_a_typo_of_a_flag_names_the_nearest(capsys, module, words, near):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"igd_ds.commands.{module}").main(words)
    assert ended.value.code == 2
    flag = words[0].partition("=")[0]
    assert f"unrecognized arguments: {flag}, did you mean '{near}'?" in capsys.readouterr().err


def test_a_typo_of_a_setting_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(TrainConfig, ["--lerning_rate", "1e-4"])
    assert ended.value.code == 2
    found = capsys.readouterr().err
    assert "unrecognized arguments: --lerning_rate, did you mean '--learning_rate'?" in found


@pytest.mark.parametrize("content", [b"a: [1\nb: 2\n", b"dataset: Caf\xe9\n"])
def test_a_damaged_yaml_file_is_told_in_one_line(tmp_path, content):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UsageError, match="x.yaml is not valid YAML") as caught:
        parse(TrainConfig, ["--config", str(tmp_path / "x.yaml")])
    assert "\n" not in str(caught.value)


SHOP = "user,item,title,time\n" + "".join(
    f"u{n},x{n % 5},{'Tea' if n % 5 else ''},{1_500_000_000 + 86_400 * n}\n" for n in range(20)
)
SHOP += "".join(f"v{n % 4},x{n % 3},Tea,{1_600_000_000 + n}\n" for n in range(24))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "leave-one-out (3 interactions needed) dropped 83% of the users"),
        (["--from", "2020-01-01"], "--from and --to dropped 83% of the users and 40% of the items"),
        (["--titles", "drop"], None),
        (["--cold_items", "drop"], None),
    ],
)
def test_each_rule_that_drops_a_fifth_says_so(tmp_path, capsys, flags, expected):
    (tmp_path / "shop.csv").write_text(SHOP)
    words = ["--source", "csv", "--input", str(tmp_path / "shop.csv"), *flags]
    assert prepare.main([*words, "--output", str(tmp_path / "data")]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "dropped" in line]
    assert (f"warning: {expected}" in warnings) == (expected is not None), warnings


def test_dropped_titles_and_cold_rows_are_told(tmp_path, capsys):
    """Users 0 to 3 end with an item of their own, users 4 to 7 with one that everybody knows."""
    events = "".join(
        f"u{n},x0\nu{n},x1\nu{n},x1\nu{n},{f'y{n}' if n < 4 else 'x1'}\n" for n in range(8)
    )
    titles = "x0,T\nx1,T\n" + "".join(f"y{n},T\n" for n in range(4)) + "a,\nb,\n"
    (tmp_path / "events.csv").write_text("user,item\n" + events)
    (tmp_path / "items.csv").write_text("item,title\n" + titles)
    inputs = [str(tmp_path / "events.csv"), str(tmp_path / "items.csv")]
    words = ["--source", "csv", "--input", *inputs, "--titles", "drop", "--cold_items", "drop"]
    assert prepare.main([*words, "--output", str(tmp_path / "data")]) == 0
    told = capsys.readouterr().err
    assert "warning: --titles drop dropped 25% of the items" in told
    assert "warning: --cold_items drop dropped 25% of the rows" in told
