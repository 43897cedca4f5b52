"""igd prepare, run in this process: whole commands, bad input, equal bytes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from igd_ds.commands import prepare as prepare_command
from igd_ds.data.dataset import FILES, InteractionDataset
from igd_ds.data.presets import PRESETS
from igd_ds.data.sources import SOURCES
from igd_ds.errors import UsageError

prepare = prepare_command.main
REPOSITORY = Path(__file__).parents[2]
TITLES = [
    "A &amp; B",
    None,
    "Same",
    "Same",
    'Books" />',
    "Longer title, Volume 1",
    "Longer title, Volume 2",
]
SEQUENCES = [[0, 1, 2, 3, 4], [5, 6, 2, 1], [5, 1], [3, 3, 0, 5], [2, 3, 0, 5, 6]]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    items = [json.dumps({"item_id": i, "title": title}) for i, title in enumerate(TITLES)]
    users = [json.dumps({"user_id": i, "items": items}) for i, items in enumerate(SEQUENCES)]
    (folder / "items.jsonl").write_text("\n".join(items) + "\n")
    (folder / "sequences.jsonl").write_text("\n".join(users) + "\n")
    return folder


def arguments(source, output, *more):
    where = ["--source", "sequences", "--input", str(source), "--output", str(output)]
    return [*where, "--protocol", "leave-one-out", *map(str, more)]


def rows(dataset, name):
    split = dataset.splits[name]
    return [
        (int(split.user_ids[r]), split.history(r).tolist(), int(split.targets[r]))
        for r in range(len(split))
    ]


def test_sequences_end_to_end(source, tmp_path, capsys):
    assert prepare(arguments(source, tmp_path / "d", "--domain", "books")) == 0

    printed = capsys.readouterr().out
    assert str(tmp_path / "d") in printed
    assert "users_too_short 1" in printed
    assert "train 6" in printed

    dataset = InteractionDataset.load(tmp_path / "d")
    assert rows(dataset, "test")[0] == (0, [0, 1, 2, 3], 4)
    assert rows(dataset, "valid")[0] == (0, [0, 1, 2], 3)
    assert rows(dataset, "train")[:3] == [(0, [0], 1), (0, [0, 1], 2), (1, [5], 6)]
    assert dataset.titles[0] == "A & B" and dataset.titles[2:4] == ["Same", "Same"]
    assert all(dataset.titles[i].startswith("Untitled item ") for i in (1, 4))

    info = dataset.info
    assert (info["name"], info["domain"], info["protocol"]) == ("d", "books", "leave-one-out")
    assert info["parameters"]["max_history"] == 20 and info["parameters"]["titles"] == "placeholder"
    assert [entry["path"] for entry in info["sources"]] == ["items.jsonl", "sequences.jsonl"]
    assert info["hygiene"]["unusable"]["count"] == 2
    assert info["counts"]["catalogue"] == {
        "items": 7,
        "cold_items": 7 - len({t for _, _, t in rows(dataset, "train")}),
    }


def test_hygiene_off_and_drop(source, tmp_path):
    assert prepare(arguments(source, tmp_path / "raw", "--titles", "verbatim")) == 0

    raw = InteractionDataset.load(tmp_path / "raw")
    assert raw.titles == TITLES
    assert raw.info["hygiene"] == {"policy": "verbatim", "items_sharing_a_title": 2}
    assert prepare(arguments(source, tmp_path / "clean")) == 0

    clean = InteractionDataset.load(tmp_path / "clean")
    # Hygiene changes titles, not rows.
    assert all(rows(raw, name) == rows(clean, name) for name in raw.splits)
    assert prepare(arguments(source, tmp_path / "drop", "--titles", "drop")) == 0

    dropped = InteractionDataset.load(tmp_path / "drop")
    assert dropped.titles == [
        "A & B",
        "Same",
        "Same",
        "Longer title, Volume 1",
        "Longer title, Volume 2",
    ]
    assert rows(dropped, "test")[0] == (0, [0, 1], 2) and rows(dropped, "test")[1] == (1, [3, 4], 1)


def test_k_core_closes_ranks_and_remembers_the_source(source, tmp_path):
    assert prepare(arguments(source, tmp_path / "d", "--k_core", 2, "--max_history", 2)) == 0
    dataset = InteractionDataset.load(tmp_path / "d")
    ids = [
        int(name)
        for name in pq.read_table(tmp_path / "d" / "items.parquet")["source_id"].to_pylist()
    ]
    assert ids == [0, 1, 2, 3, 5, 6] and dataset.titles[2:] == [TITLES[i] for i in ids[2:]]
    kept = {user: [i for i in items if i in ids] for user, items in enumerate(SEQUENCES)}
    for user, history, target in rows(dataset, "test"):
        assert [ids[i] for i in (*history, target)] == kept[user][-3:]


def test_equal_bytes_no_op_and_refusal(source, tmp_path, capsys):
    for name in ("a", "b"):
        assert prepare(arguments(source, tmp_path / name, "--name", "same")) == 0
    for name in (*FILES, "dataset.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    # The same request again changes nothing.
    before = (tmp_path / "a" / "dataset.json").stat().st_mtime_ns
    capsys.readouterr()
    assert prepare(arguments(source, tmp_path / "a", "--name", "same")) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "a" / "dataset.json").stat().st_mtime_ns == before

    # Another request, other input and a broken output are refused.
    with pytest.raises(UsageError, match=r"holds another dataset \(parameters"):
        prepare(arguments(source, tmp_path / "a", "--name", "same", "--seed", 1))
    with open(source / "sequences.jsonl", "a") as file:
        file.write('{"user_id": 9, "items": [1, 2, 3]}\n')
    with pytest.raises(UsageError, match=r"holds another dataset \(sources"):
        prepare(arguments(source, tmp_path / "a", "--name", "same"))
    (tmp_path / "a" / "test.parquet").unlink()
    with pytest.raises(UsageError, match="test.parquet is missing"):
        prepare(arguments(source, tmp_path / "a", "--name", "same"))


def test_licence_and_page_of_the_source(source, tmp_path, capsys):
    page = "https://example.org/my_shop"
    words = ["--name", "same", "--license", "CC *BY* 4.0", "--source_url", page]
    assert prepare(arguments(source, tmp_path / "a", *words)) == 0
    assert prepare(arguments(source, tmp_path / "b", "--name", "same")) == 0

    info, bare = (InteractionDataset.load(tmp_path / name).info for name in "ab")
    assert (info.pop("license"), info.pop("source_url")) == ("CC *BY* 4.0", page)
    assert info == bare, "without the flags, dataset.json has no such keys"
    card, without = ((tmp_path / name / "README.md").read_text() for name in "ab")
    said = f"Page of the source: <{page}>. Licence of the source: CC \\*BY\\* 4.0.\n\n"
    assert said in card and card.replace(said, "") == without

    # Whoever does not repeat them finds the dataset made; whoever asks for others is refused.
    assert prepare(arguments(source, tmp_path / "a", "--name", "same")) == 0
    with pytest.raises(UsageError, match='license: there null, asked "MIT"'):
        prepare(arguments(source, tmp_path / "b", "--name", "same", "--license", "MIT"))


def test_a_preset_knows_the_page_of_its_source(tmp_path):
    (tmp_path / "ratings.dat").write_text(
        "".join(f"{u}::{i}::5::{100 * u + i}\n" for u in range(1, 7) for i in range(1, 7))
    )
    (tmp_path / "movies.dat").write_text(
        "".join(f"{i}::Film {i} (1999)::Drama\n" for i in range(1, 7))
    )
    words = ["--preset", "ml-1m", "--input", str(tmp_path), "--output", str(tmp_path / "out" / "d")]
    assert prepare(words) == 0
    info = InteractionDataset.load(tmp_path / "out" / "d").info
    assert info["source_url"] == "https://grouplens.org/datasets/movielens/"
    assert f"<{info['source_url']}>" in (tmp_path / "out" / "d" / "README.md").read_text()

    # A dataset that was made before presets knew pages is still this one.
    path = tmp_path / "out" / "d" / "dataset.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "source_url"})
    )
    assert prepare(words) == 0

    for name, preset in PRESETS.items():
        about = " ".join(SOURCES[preset.source].about.split())
        assert preset.page in about, f"{name}: the source's help names the page"

    assert (
        prepare([*words[:-1], str(tmp_path / "out" / "own"), "--source_url", "http://a.b/c"]) == 0
    )
    assert InteractionDataset.load(tmp_path / "out" / "own").info["source_url"] == "http://a.b/c"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k_core", "50"], "nothing is left after the 50-core: pass 1 left 0 users"),
        (["--max_history", "-1"], "--max_history -1: must be a whole number of at least 0"),
        (["--max_bad_lines", "1"], "--max_bad_lines 1.0: a share, from 0 to below 1"),
        (["--num_items", "5"], "--num_items is for synthetic data"),
        (["--min_items", "5"], "--min_items 5 is for --protocol d3"),
        (["--from", "2017"], "--from 2017: need a date like 2017-10-01"),
        (["--source_url", "my shop"], "--source_url my shop: need an address like https://"),
    ],
)
def test_bad_flags_are_named(source, tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        prepare(arguments(source, tmp_path / "d", *flags))
    assert not list(tmp_path.glob("d*"))


def test_missing_flags_are_named(source, tmp_path):
    where = ["--source", "sequences", "--input", str(source), "--output", str(tmp_path / "d")]
    with pytest.raises(UsageError, match="--protocol is missing: give it, or a --preset"):
        prepare(where)
    with pytest.raises(UsageError, match="no timestamps; use --protocol leave-one-out"):
        prepare([*where, "--protocol", "d3"])
    with pytest.raises(UsageError, match="--source is missing"):
        prepare(["--protocol", "d3", "--output", str(tmp_path / "d")])


def test_the_command_prints_one_line_and_exits_with_2(source, tmp_path):
    command = [sys.executable, "-m", "igd_ds.cli", "prepare"]
    command += arguments(source, tmp_path / "d", "--k_core", 50)
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2 and done.stdout == ""
    told = [line for line in done.stderr.splitlines() if "nothing is left" in line]
    assert len(told) == 1 and told == done.stderr.splitlines()[-1:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "x.jsonl"),
            "x.jsonl: Permission denied",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "/d: No space left .*; make room on the",
        ),
    ],
)
def test_errors_of_the_system_that_users_can_repair_are_one_line(
    source, tmp_path, monkeypatch, error, message
):
    def fails(*arguments):
        raise error

    monkeypatch.setattr("igd_ds.data.prepare.write_dataset", fails)
    with pytest.raises(UsageError, match=message):
        prepare(arguments(source, tmp_path / "d"))


def test_other_errors_of_the_system_are_defects(source, tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError("a library's own")

    monkeypatch.setattr("igd_ds.data.prepare.write_dataset", fails)
    with pytest.raises(OSError, match="a library's own"):
        prepare(arguments(source, tmp_path / "d"))


def test_an_output_below_a_file_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"):
        prepare(arguments(source, tmp_path / "file" / "d"))


def test_an_interrupted_command_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    # Everything is written but the card.
    with monkeypatch.context() as patch:
        patch.setattr("igd_ds.data.dataset.write_card", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(arguments(source, tmp_path / "out" / "d"))
    assert not list((tmp_path / "out").iterdir())

    # Folders of a killed process are removed; the folder of a living process stays.
    process = subprocess.Popen(["true"])
    process.wait()
    for kind in ("scratch", "tmp"):
        (tmp_path / "out" / f"d.{kind}-{process.pid}").mkdir()
    living = f"d.scratch-{os.getppid()}"
    (tmp_path / "out" / living).mkdir()
    assert prepare(arguments(source, tmp_path / "out" / "d")) == 0
    assert capsys.readouterr().err.count("left by a process that was killed") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["d", living]


def test_synthetic_d3_and_a_user_with_many_rows(tmp_path):
    options = ["--num_items", "200", "--num_users", "150", "--seed", "3"]
    assert (
        prepare(
            ["--source", "synthetic", "--protocol", "d3", "--output", str(tmp_path / "d"), *options]
        )
        == 0
    )
    dataset = InteractionDataset.load(tmp_path / "d")
    sizes = [len(dataset.splits[name]) for name in ("train", "valid", "test")]
    total = sum(sizes)
    assert sizes == [total * 8 // 10, total * 9 // 10 - total * 8 // 10, total - total * 9 // 10]
    times = np.concatenate([split.timestamps for split in dataset.splits.values()])
    assert (np.diff(times) >= 0).all()
    assert np.bincount(dataset.splits["train"].user_ids).max() > 3
    assert max(len(dataset.splits["train"].history(row)) for row in range(sizes[0])) == 10


@pytest.mark.parametrize("name", ["books-small", "instruments", "industrial"])
def test_real_data(shared, tmp_path, name):
    assert (
        prepare(arguments(shared / "data" / name, tmp_path / name, "--num_users", 300, "--seed", 1))
        == 0
    )

    dataset = InteractionDataset.load(tmp_path / name)
    assert len(dataset.splits["test"]) == len(dataset.splits["valid"]) == 300
    with open(shared / "data" / name / "items.jsonl", encoding="utf-8") as file:
        assert dataset.num_items == sum(1 for _ in file)

    sequences = {}
    with open(shared / "data" / name / "sequences.jsonl", encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            sequences[entry["user_id"]] = entry["items"]
    for user, history, target in rows(dataset, "test"):
        assert (history, target) == (sequences[user][:-1][-20:], sequences[user][-1])
    assert (dataset.semantic_ids is None) == (name == "books-small")
    if name == "instruments":
        assert set(dataset.titles) == {None} and dataset.info["hygiene"] == {"policy": "no titles"}
    else:
        assert None not in dataset.titles
