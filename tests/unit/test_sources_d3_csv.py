"""Source `d3-csv` on generated and real rows of D3 and MiniOneRec, against csv and ast."""

import ast
import csv
import gzip
import io
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_source import events_of, items_of, reading, refused_or_read

from igd_ds.data.dataset import ROW_SCHEMA, SPLITS
from igd_ds.errors import UsageError

TITLES = {
    4: 'Inch "marks" 6" \tx',
    0: "Café, “Été” ‏\u200f",
    2: "",
    7: "['not', 'a list']",
    12: "same",
    13: "same",
}
CODES = {item: ["<a_1>", f"<b_{item % 4}>"] for item in TITLES}
# user, history, target, timestamp
ROWS = {
    "train": [
        ("A2", [4], 0, 1506816000),
        ("A1", [0], 4, 1506816000),
        ("A2", [4, 0], 4, 1506902400),
    ],
    "valid": [("A1", [0, 4], 12, 1507075200)],
    "test": [("A3", [7, 7], 2, 1507161600), ("A1", [0, 4, 12], 0, 1507248000)],
}


def d3_text(rows):
    """Return the text that D3's csv.writer writes: Python lists, lines ending in CR LF."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    names = "user_id,item_asins,item_asin,history_item_id,item_id,history_item_title,item_title"
    names += ",history_rating,rating,history_timestamp,timestamp"
    writer.writerow(names.split(","))

    for user, history, target, at in rows:
        titles = [TITLES.get(item, "?") + "\nnext line" for item in history]
        asins, ratings, times = (
            [f"B{item}" for item in history],
            [5.0] * len(history),
            [at - 1] * len(history),
        )
        cells = [
            user,
            asins,
            f"B{target}",
            history,
            target,
            titles,
            TITLES.get(target),
            ratings,
            4.0,
            times,
            at,
        ]
        writer.writerow(cells)
    return text.getvalue()


def minionerec_text(rows):
    """Return the text that pandas writes for MiniOneRec."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = (
        "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid"
    )
    writer.writerow(names.split(","))
    for user, history, target, _ in rows:
        titles, sids = (
            [TITLES[item] for item in history],
            ["".join(CODES[item]) for item in history],
        )
        writer.writerow(
            [user, titles, TITLES[target], history, target, sids, "".join(CODES[target])]
        )
    return text.getvalue()


def write(folder, form=d3_text, rows=ROWS, info=None, index=None):
    """Write the files under the names that MiniOneRec gives them; return the folder."""
    if info is None:
        first = {
            item: "".join(CODES[item]) + "\t" if form is minionerec_text else "" for item in TITLES
        }
        info = "".join(f"{first[item]}{title}\t{item}\n" for item, title in TITLES.items())
    texts = {
        f"{name}/X.csv": rows[name] if isinstance(rows[name], str) else form(rows[name])
        for name in SPLITS
    } | {"info/X.txt": info}
    if index is not None:
        texts["index/X.index.json"] = json.dumps(index)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, newline="")
    return folder


def rows_of(data, split):
    """The rows by the source's names: (user, history, target, timestamp)."""
    users, items = data.user_names.to_pylist(), [int(name) for name in data.item_names.to_pylist()]
    columns = (data.splits[split][name].to_pylist() for name in ROW_SCHEMA.names)
    return [
        (users[user], [items[i] for i in history], items[target], at)
        for user, history, target, at in zip(*columns, strict=True)
    ]


@pytest.mark.parametrize("milliseconds", [1, 1000])
def test_d3_rows_stay_as_they_are(tmp_path, milliseconds):
    rows = {
        name: [(*row[:3], row[3] * milliseconds) for row in split] for name, split in ROWS.items()
    }
    rows["train"].sort(
        key=lambda row: row[0]
    )  # not in the order of time: rows stay in the file's order even so
    seconds = {
        name: [(*row[:3], row[3] // milliseconds) for row in split] for name, split in rows.items()
    }
    with reading("d3-csv", [write(tmp_path / "d3", rows=rows)]) as data:
        assert {name: rows_of(data, name) for name in SPLITS} == seconds
        assert all(table.schema == ROW_SCHEMA for table in data.splits.values())
        events = [
            (user, str(item), at) for split in seconds.values() for user, _, item, at in split
        ]
        assert sorted(events_of(data)) == sorted(events)
        assert milliseconds > 1 or events_of(data) == events
        expected = {str(item): (title or None, *[None] * 5) for item, title in TITLES.items()}
        assert items_of(data) == expected and data.semantic_ids is None

    orders = set()
    for seed in range(5):
        with reading("d3-csv", [tmp_path / "d3"], seed=seed) as data:
            assert rows_of(data, "test") == seconds["test"]
            orders.add(tuple(data.item_names.to_pylist()))
    assert len(orders) > 1


def test_minionerec_takes_codes_of_index_or_info(tmp_path):
    folder = write(tmp_path / "m", minionerec_text)
    timeless = {name: [(*row[:3], None) for row in rows] for name, rows in ROWS.items()}
    with reading("d3-csv", [folder]) as data:
        assert {name: rows_of(data, name) for name in SPLITS} == timeless
        assert data.interactions.timestamps is None
        assert {
            int(item): (title, codes) for item, (title, codes, *_) in items_of(data).items()
        } == {item: (TITLES[item] or None, CODES[item]) for item in TITLES}
    write(folder, minionerec_text, index={str(item): [f"<z_{item}>"] for item in [*TITLES, 99]})
    with reading("d3-csv", [folder]) as data:
        assert {int(item): codes for item, (_, codes, *_) in items_of(data).items()} == {
            i: [f"<z_{i}>"] for i in TITLES
        }


def broken(split, place, cell):
    """The rows of D3 with one cell of one row replaced."""
    rows = [list(row) for row in ROWS[split]]
    rows[-1][place] = cell
    return {"rows": ROWS | {split: rows}}


INFO = "".join(f"{title}\t{item}\n" for item, title in TITLES.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken("train", 1, [4, 99]), r"train/X.csv: row 3: item 99 is not in .*info/X.txt"),
        (broken("test", 2, 5), r"test/X.csv: row 2: item 5 is not in .*info/X.txt"),
        (
            broken("train", 1, "[4, 0"),
            r"train/X.csv: row 3: need .* found .*history_item_id '\[4, 0'",
        ),
        (broken("train", 1, []), r"train/X.csv: row 3: need .* found .*history_item_id '\[\]'"),
        (broken("train", 1, [4, None]), r"train/X.csv: row 3: need"),
        (broken("train", 1, "__import__('os').abort()"), r"train/X.csv: row 3: need"),
        (broken("train", 1, "[99999999999999999999]"), r"train/X.csv: row 3: need"),
        (broken("valid", 2, "4.5"), r"valid/X.csv: row 1: need .* item_id '4.5'"),
        (broken("valid", 2, ""), r"valid/X.csv: row 1: need .* item_id 'None'"),
        (broken("valid", 0, ""), r"valid/X.csv: row 1: need a user"),
        (
            broken("test", 3, 1507248000000),
            r"1 look like milliseconds|look like seconds and 1 like milliseconds",
        ),
        ({"rows": ROWS | {"valid": []}}, r"valid/X.csv: no rows"),
        ({"rows": ROWS | {"valid": ""}}, r"valid/X.csv: the file is empty"),
        (
            {"rows": ROWS | {"test": "user_id,item_id\nA,4\n"}},
            r"test/X.csv: no column history_item_id",
        ),
        ({"info": INFO + "no tab\n"}, r"info/X.txt:7: need title TAB item_id"),
        ({"info": INFO + "x\tB01\n"}, r"info/X.txt:7: item 'B01': item ids must be integers"),
        ({"info": INFO + "x\t12\n"}, r"info/X.txt:7: item 12 is there twice, first on line 5"),
        (
            {"info": "<a_1><b_2>\tx\t0\nno code\ty\t1\n"},
            r"info/X.txt:2: need a semantic id such as <a_1><b_2> first",
        ),
        ({"info": "\n"}, r"info/X.txt: no items"),
        (
            {"index": {"4": ["<a_1>"]}},
            r"X.index.json: 5 items of .*X.txt, such as 0, have no semantic id",
        ),
        (
            {"index": {str(item): "<a_1>" for item in TITLES}},
            r"X.index.json: item '4': need a list of codes",
        ),
    ],
)
def test_d3_csv_refuses(tmp_path, change, message):
    with (
        pytest.raises(UsageError, match=message),
        reading("d3-csv", [write(tmp_path / "d", **change)]),
    ):
        pass


def test_d3_csv_refuses_what_it_cannot_read(tmp_path):
    folder = write(tmp_path / "d")
    (folder / "info" / "X.txt").write_bytes(b"caf\xe9\t0\n")
    with pytest.raises(UsageError, match="X.txt:1: not UTF-8"), reading("d3-csv", [folder]):
        pass
    write(folder)
    shutil.copy(folder / "valid" / "X.csv", folder / "valid" / "Y.csv")
    with (
        pytest.raises(UsageError, match="X.csv, .*Y.csv: name the one"),
        reading("d3-csv", [folder]),
    ):
        pass
    (folder / "valid" / "Y.csv").unlink()
    packed = gzip.compress((folder / "test" / "X.csv").read_bytes())
    (folder / "test" / "X.csv").write_bytes(packed[:-12])
    with pytest.raises(UsageError, match="test/X.csv"), reading("d3-csv", [folder]):
        pass


def test_real_minionerec_files_equal_plain_parsing(shared, tmp_path):
    """Upstream's train.csv is missing here: the validation rows stand in for it."""
    folder = shared / "data" / "raw" / "d3-csv"
    shutil.copy(folder / "valid.csv.gz", tmp_path / "train.csv.gz")
    index = json.loads((folder / "index.json").read_bytes())
    info = [line.split("\t") for line in (folder / "info.txt").read_text().splitlines()]
    plain = {}
    for name in ("valid", "test"):
        with gzip.open(folder / f"{name}.csv.gz", "rt", newline="") as file:
            plain[name] = [
                (
                    row["user_id"],
                    ast.literal_eval(row["history_item_id"]),
                    int(row["item_id"]),
                    None,
                )
                for row in csv.DictReader(file)
            ]
    plain["train"] = plain["valid"]
    with reading("d3-csv", [tmp_path / "train.csv.gz", folder]) as data:
        assert {name: rows_of(data, name) for name in SPLITS} == plain
        assert events_of(data) == [
            (user, str(item), None) for name in SPLITS for user, _, item, _ in plain[name]
        ]
        items = items_of(data)
        assert {item: (title, codes) for item, (title, codes, *_) in items.items()} == {
            item: (title, index[item]) for _, title, item in info
        }

    files = [
        tmp_path / "train.csv.gz",
        *(folder / name for name in ("valid.csv.gz", "test.csv.gz", "info.txt")),
    ]
    with reading("d3-csv", files) as data:  # the info file's codes are those of index.json
        assert items_of(data) == items
        assert [table.num_rows for table in data.splits.values()] == [4532, 4532, 4533]


CELLS = st.one_of(
    st.sampled_from(["4", "0", "[4]", "[4, 0]", "[0", '"', "A1", "", "99"]),
    st.text(max_size=6),
    st.integers().map(str),
)
LINES = st.lists(st.lists(CELLS, min_size=3, max_size=5).map(",".join), max_size=4).map("\n".join)
INFO_LINES = st.lists(
    st.tuples(st.text(max_size=6), st.sampled_from(["\t", " "]), st.integers(-1, 9)), max_size=4
)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    train=st.none() | LINES,
    info=st.none() | INFO_LINES,
    header=st.just("user_id,history_item_id,item_id") | st.text(max_size=8),
    tail=st.binary(max_size=8),
)
def test_d3_csv_fuzz(tmp_path_factory, train, info, header, tail):
    rows = ROWS if train is None else ROWS | {"train": f"{header}\n{train}"}
    text = (
        None
        if info is None
        else INFO + "".join(f"{title}{tab}{item + 20}\n" for title, tab, item in info)
    )
    try:
        folder = write(tmp_path_factory.mktemp("fuzz") / "d", rows=rows, info=text)
    except UnicodeEncodeError:  # half an emoji cannot be written
        return
    with open(folder / "train" / "X.csv", "ab") as file:
        file.write(tail)
    refused_or_read(
        "d3-csv", [folder / f"{name}/X.csv" for name in SPLITS] + [folder / "info/X.txt"]
    )
