"""The dataset folder: round trip, equal bytes, strict checks, memory maps, concurrent loading."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from igd_ds.data.dataset import (
    FILES,
    InteractionDataset,
    item_table,
    sha256_of,
    user_table,
    write_dataset,
)
from igd_ds.errors import UsageError

INFO = {
    "name": "toy",
    "domain": "items",
    "protocol": "none",
    "parameters": {},
    "counts": {},
    "sources": [],
    "hygiene": {},
    "funnel": [],
}
TITLES = ["a", "b\nü", None, "a"]
HISTORIES = {"train": [[0, 1], [2], [3, 3, 0]], "valid": [[1]], "test": [[0], [1, 2]]}
TARGETS = {"train": [1, 2, 0], "valid": [3], "test": [2, 2]}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def rows(histories, targets, times=None):
    columns = [
        pa.array(np.arange(len(targets)) + 7, pa.int64()),
        pa.array(histories, pa.list_(pa.int32())),
        pa.array(targets, pa.int32()),
        pa.array(times or [None] * len(targets), pa.int64()),
    ]
    return pa.table(columns, names=["user_id", "history", "target", "timestamp"])


def tables(**changes):
    return {name: rows(HISTORIES[name], TARGETS[name]) for name in HISTORIES} | changes


def write(folder, items=None, **changes):
    items = items if items is not None else item_table(TITLES, None, pa.array(range(4)))
    splits = tables(**changes)
    write_dataset(folder, items, user_table(splits, None), splits, INFO)
    return folder


def rewrite(folder, name, table):
    """Replace a file and its hash, as a foreign writer would."""
    pq.write_table(table, folder / name)
    info = json.loads((folder / "dataset.json").read_text())
    info["files"][name] = sha256_of(folder / name)
    (folder / "dataset.json").write_text(json.dumps(info))


def test_round_trip(tmp_path):
    dataset = InteractionDataset.load(
        write(tmp_path / "d", valid=rows([[1]], [3], [1_500_000_000]))
    )
    assert dataset.num_items == 4 and dataset.titles == TITLES and dataset.semantic_ids is None
    assert dataset.info["name"] == "toy" and dataset.info["version"] == 2
    for name, split in dataset.splits.items():
        assert split.name == name and len(split) == len(TARGETS[name])
        assert [split.history(row).tolist() for row in range(len(split))] == HISTORIES[name]
        assert split.targets.tolist() == TARGETS[name]
        assert split.user_ids.tolist() == [7 + row for row in range(len(split))]
        dtypes = [
            a.dtype
            for a in (split.user_ids, split.history_items, split.history_offsets, split.targets)
        ]
        assert dtypes == [np.int64, np.int32, np.int64, np.int32]
    assert dataset.splits["train"].timestamps is None
    assert dataset.splits["valid"].timestamps.tolist() == [1_500_000_000]


def test_columns_are_views_even_for_many_rows(tmp_path):
    count = 5000  # more than the batch of 1000 that `datasets` writes by itself
    histories = [[row % 4] * (row % 3 + 1) for row in range(count)]
    split = InteractionDataset.load(
        write(tmp_path / "d", train=rows(histories, [1] * count))
    ).splits["train"]
    assert [split.history(row).tolist() for row in range(count)] == histories
    assert not any(
        array.flags.owndata for array in (split.user_ids, split.history_items, split.targets)
    )


def test_several_row_groups_read_the_same(tmp_path):
    histories, targets = [[row % 4, 2] for row in range(50)], [row % 4 for row in range(50)]
    folder = write(tmp_path / "d", train=rows(histories, targets))
    pq.write_table(rows(histories, targets), folder / "train.parquet", row_group_size=7)
    info = json.loads((folder / "dataset.json").read_text())
    info["files"]["train.parquet"] = sha256_of(folder / "train.parquet")
    (folder / "dataset.json").write_text(json.dumps(info))
    split = InteractionDataset.load(folder).splits["train"]
    assert [split.history(row).tolist() for row in range(50)] == histories
    assert split.targets.tolist() == targets


def test_semantic_ids(tmp_path):
    codes = [["<a_1>", "<b_2>"], ["<a_1>"], ["<a_2>", "<b_2>"], ["<a_1>"]]
    dataset = InteractionDataset.load(
        write(tmp_path / "d", item_table([None] * 4, codes, pa.array(range(4))))
    )
    assert dataset.semantic_ids == codes and dataset.titles == [None] * 4
    with pytest.raises(UsageError, match="item 1 has semantic_id None"):
        InteractionDataset.load(
            write(
                tmp_path / "e",
                item_table([None] * 4, [["x"], None, ["y"], ["z"]], pa.array(range(4))),
            )
        )


def test_equal_bytes_and_fingerprint(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert all(
        (first / f).read_bytes() == (second / f).read_bytes() for f in (*FILES, "dataset.json")
    )
    other = write(tmp_path / "c", valid=rows([[2]], [3]))
    prints = [InteractionDataset.load(folder).fingerprint for folder in (first, second, other)]
    assert prints[0] == prints[1] != prints[2]


def test_rewritten_at_the_same_path_is_not_read_from_the_cache(tmp_path):
    folder = write(tmp_path / "d")
    before = InteractionDataset.load(folder)
    times = {
        name: (os.stat(folder / name).st_atime_ns, os.stat(folder / name).st_mtime_ns)
        for name in FILES
    }
    rewrite(folder, "valid.parquet", rows([[2]], [3]))
    for name, when in times.items():
        os.utime(folder / name, ns=when)
    assert InteractionDataset.load(folder).splits["valid"].history(0).tolist() == [2]
    assert before.splits["valid"].history(0).tolist() == [1]


def test_two_processes_load_at_once_and_quietly(tmp_path):
    folder = write(tmp_path / "d")
    code = (
        "from igd_ds.data.dataset import InteractionDataset\n"
        f"dataset = InteractionDataset.load({str(folder)!r})\n"
        "print(dataset.splits['train'].history(2))"
    )
    env = os.environ | {
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    ranks = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
        assert out == "[3 3 0]\n" and "it/s" not in err and "examples" not in err


def test_write_refuses_existing_folder_and_empty_split(tmp_path):
    folder = write(tmp_path / "d")
    with pytest.raises(UsageError, match="exists already"):
        write(folder)
    with pytest.raises(UsageError, match=r"empty split: valid \(rows: train 3, valid 0, test 2\)"):
        write(tmp_path / "e", valid=rows([], []))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]


def test_failed_write_leaves_nothing(tmp_path):
    with pytest.raises((ValueError, KeyError)):
        write(tmp_path / "d", test=rows([[0]], [1]).drop_columns(["timestamp"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        (
            "test.parquet",
            rows([[0], [1, 4]], [2, 2]),
            r"row 1 of split test: history item 4 is not in \[0, 4\)",
        ),
        ("test.parquet", rows([[-1], [1]], [2, 2]), r"row 0 of split test: history item -1"),
        ("train.parquet", rows([[0], [1], [2]], [0, 0, 9]), r"row 2 of split train: target item 9"),
        ("valid.parquet", rows([], []), "valid.parquet: the split is empty"),
        ("valid.parquet", rows([[0], None], [1, 1]), "column history holds 1 null"),
        ("valid.parquet", rows([[0, None]], [1]), "column history holds 1 null"),
        ("valid.parquet", rows([[0], [1]], [1, 1], [5, None]), "column timestamp holds 1 null"),
        (
            "valid.parquet",
            rows([[0]], [1]).drop_columns(["user_id"]),
            "column user_id must be int64, found nothing",
        ),
        (
            "items.parquet",
            item_table(TITLES, None, pa.array(range(4))).take([0, 1, 1, 3]),
            "row 2 has item_id 1: a duplicate",
        ),
        (
            "items.parquet",
            item_table(TITLES, None, pa.array(range(4))).take([0, 1, 3]),
            "row 2 has item_id 3: ids must be dense",
        ),
        (
            "items.parquet",
            item_table(TITLES, None, pa.array(range(4))).drop_columns(["title"]),
            "no column title",
        ),
    ],
)
def test_load_refuses_bad_files(tmp_path, name, table, message):
    folder = write(tmp_path / "d")
    rewrite(folder, name, table)
    with pytest.raises(UsageError, match=message):
        InteractionDataset.load(folder)


def test_load_refuses_incomplete_and_changed_folders(tmp_path):
    with pytest.raises(UsageError, match="no dataset.json"):
        InteractionDataset.load(tmp_path)
    folder = write(tmp_path / "d")
    pq.write_table(rows([[1]], [2]), folder / "valid.parquet")
    with pytest.raises(UsageError, match="not the file that dataset.json describes"):
        InteractionDataset.load(folder)
    (folder / "valid.parquet").unlink()
    with pytest.raises(UsageError, match="valid.parquet is missing"):
        InteractionDataset.load(folder)
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(info | {"version": 1}))
    with pytest.raises(UsageError, match="version 1"):
        InteractionDataset.load(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        InteractionDataset.load(folder)


def test_broken_unicode_is_named():
    with pytest.raises(UsageError, match="not valid Unicode"):
        item_table(["ok", "half \ud83d"], None, pa.array(range(2)))
