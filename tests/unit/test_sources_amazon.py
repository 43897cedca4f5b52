"""Amazon's three releases: real bytes of 2018, generated files of 2014 and 2023, whole commands."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from raw_source import events_of, items_of, reading
from test_prepare import prepare

from igd_ds.data.dataset import FILES, InteractionDataset
from igd_ds.data.sources import find_files
from igd_ds.errors import UsageError

META_2018 = [
    {"category": ["Beauty", "Hair"], "tech1": "", "description": ["One.", "Two &amp; three"],
     "title": "Comb", "brand": "X",
     "price": "$1,012.50", "asin": "B1"},
    {"category": [], "description": [], "title": "A\tB \"C\"\n\u200fD", "brand": "",
     "price": ".a-box-inner{color:red}", "asin": "B2"},
    {"category": ["Beauty"], "description": [""], "title": "", "brand": "Y", "price": "",
     "asin": "B3"},
    {"category": ["Beauty"], "description": [""], "title": "Late title", "brand": "Z",
     "price": "$3", "asin": "B3"},
    {"category": ["Beauty"], "title": "x" * 10_000, "asin": "B4"},
    {"category": ["Nobody"], "title": "never reviewed", "asin": "B9"},
]  # fmt: skip
META_2014 = [
    {"asin": "B1", "categories": [["Toys", "Cars"], ["Toys", "Red"]], "title": "It's a \"car\"",
     "price": 9.99,
     "imUrl": "http://x", "salesRank": {"Toys": 3}, "brand": "B", "description": "Small, red."},
    {"asin": "B2", "categories": [["Toys"]], "imUrl": "http://y"},
]  # fmt: skip
META_2023 = [
    {"main_category": "Musical Instruments", "title": "Tuner", "average_rating": 4.5,
     "description": ["Clip.", "On."], "price": 12.5, "store": "Snark",
     "categories": ["Musical Instruments", "Tuners"], "parent_asin": "B1", "details": {}},
    {"main_category": None, "title": "Strings", "description": [], "price": "from 3.99",
     "store": None, "categories": [],
     "parent_asin": "B2"},
]  # fmt: skip


def review_2018(user, item, time, **more):
    return {"overall": 5.0, "verified": True, "reviewTime": "09 1, 2016", "reviewerID": user,
            "asin": item, "style": {"Size:": " 7"}, "reviewerName": "N",
            "reviewText": "Text, \"quoted\" \u00e9", "summary": "S",
            "unixReviewTime": time} | more  # fmt: skip


def review_2014(user, item, time):
    return {"reviewerID": user, "asin": item, "reviewerName": "N", "helpful": [0, 0],
            "reviewText": "t", "overall": 5.0, "summary": "s", "unixReviewTime": time,
            "reviewTime": "07 9, 2013"}  # fmt: skip


def review_2023(user, item, time):
    return {"rating": 5.0, "title": "Good", "text": "t", "images": [], "asin": "B0",
            "parent_asin": item, "user_id": user, "timestamp": time, "helpful_vote": 0,
            "verified_purchase": True}  # fmt: skip


def write_lines(path, entries, spell=json.dumps):
    data = "".join(
        (entry if isinstance(entry, str) else spell(entry)) + "\n" for entry in entries
    ).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_real_reviews_equal_plain_parsing(shared):
    path = shared / "data" / "raw" / "amazon2018" / "All_Beauty_5.json.gz"
    with gzip.open(path) as lines:
        reviews = [json.loads(line) for line in lines]
    with reading("amazon-2018", [path]) as data:
        assert events_of(data) == [
            (r["reviewerID"], r["asin"], r["unixReviewTime"]) for r in reviews
        ]
        assert data.funnel[0] == {"step": "read All_Beauty_5.json.gz", "rows": 5269}
        assert set(data.titles) == {None}
        names = data.item_names.to_pylist()
        assert len(names) == 85 and names != sorted(names)  # ids carry no order …
    with reading("amazon-2018", [path.parent], seed=1) as other:
        assert other.item_names.to_pylist() != names
        assert sorted(other.item_names.to_pylist()) == sorted(names)
    with reading("amazon-2018", [path]) as again:  # … and depend on the seed alone
        assert again.item_names.to_pylist() == names and again.user_names.equals(data.user_names)


def test_real_reviews_to_a_dataset(shared, tmp_path, capsys):
    path = shared / "data" / "raw" / "amazon2018" / "All_Beauty_5.json.gz"
    with gzip.open(path) as lines:
        reviews = [json.loads(line) for line in lines]
    meta = [
        {"asin": asin, "title": f"Beauty product {asin}", "category": []}
        for asin in sorted({r["asin"] for r in reviews})
    ]
    write_lines(tmp_path / "meta_All_Beauty.json", meta)
    command = [
        "--source",
        "amazon-2018",
        "--input",
        str(path),
        str(tmp_path / "meta_All_Beauty.json"),
        "--min_items",
        "50",
    ]
    command += ["--protocol", "d3", "--from", "2017-10-01", "--to", "2018-11-01", "--titles", "d3"]
    assert prepare([*command, "--output", str(tmp_path / "d")]) == 0
    assert "window 2016-10-01 to 2018-11-01" in capsys.readouterr().out

    # The same by loops: the 5-core inside a window whose start moves back until 50 items are left.
    for year in range(2017, 1995, -1):
        begin, end = (
            int(np.datetime64(day, "s").astype(int)) for day in (f"{year}-10-01", "2018-11-01")
        )
        events = [
            (r["reviewerID"], r["asin"], r["unixReviewTime"], i) for i, r in enumerate(reviews)
        ]
        events = [event for event in events if begin <= event[2] <= end]
        while True:
            users, items = Counter(e[0] for e in events), Counter(e[1] for e in events)
            kept = [e for e in events if users[e[0]] >= 5 and items[e[1]] >= 5]
            if len(kept) == len(events):
                break
            events = kept
        if len(items) >= 50:
            break
    expected = []
    for event in sorted(events, key=lambda e: e[2:]):
        history = sorted(
            (e for e in events if e[0] == event[0] and e[2:] < event[2:]), key=lambda e: e[2:]
        )
        if history:
            expected.append((event[0], [e[1] for e in history[-10:]], event[1], event[2]))
    dataset = InteractionDataset.load(tmp_path / "d")
    users = dict(
        zip(*pq.read_table(tmp_path / "d" / "users.parquet").to_pydict().values(), strict=True)
    )
    asins = pq.read_table(tmp_path / "d" / "items.parquet")["source_id"].to_pylist()
    found = [
        (
            users[int(split.user_ids[r])],
            [asins[i] for i in split.history(r)],
            asins[split.targets[r]],
            int(split.timestamps[r]),
        )
        for split in dataset.splits.values()
        for r in range(len(split))
    ]
    assert found == expected and len(dataset.splits["train"]) == int(len(expected) * 0.8)
    assert dataset.titles == [f"Beauty product {asin}" for asin in asins]


def test_2018_metadata_and_duplicates(tmp_path):
    reviews = [
        review_2018("u1", item, 1_500_000_000 + i)
        for i, item in enumerate(["B1", "B2", "B3", "B4", "B5"])
    ]
    paths = [
        write_lines(tmp_path / "Beauty.json.gz", reviews),
        write_lines(tmp_path / "meta_Beauty.json.gz", META_2018),
    ]

    with reading("amazon-2018", paths) as data:
        assert items_of(data) == {
            "B1": ("Comb", None, "One. Two &amp; three", ["Beauty", "Hair"], "X", 1012.5),
            "B2": ('A\tB "C"\n\u200fD', None, "", [], "", None),
            "B3": ("Late title", None, "", ["Beauty"], "Z", 3.0),  # the first line with a title
            "B4": ("x" * 10_000, None, None, ["Beauty"], None, None),
            "B5": (None, None, None, None, None, None),  # reviewed, without metadata
        }
        assert data.funnel[-1] == {
            "step": "items with metadata (1 without, 1 on several lines, 1 with several titles)",
            "items": 4,
        }


def test_2014_python_lines(tmp_path):
    reviews = [
        review_2014(user, item, time)
        for user, item, time in [("u1", "B1", 9), ("u2", "B2", 9), ("u1", "B2", 3)]
    ]
    write_lines(tmp_path / "reviews_Toys_5.json.gz", reviews)
    write_lines(tmp_path / "meta_Toys.json.gz", META_2014, repr)

    with reading("amazon-2014", [tmp_path]) as data:
        assert events_of(data) == [("u1", "B1", 9), ("u2", "B2", 9), ("u1", "B2", 3)]
        items = items_of(data)
        assert items["B1"] == (
            'It\'s a "car"',
            None,
            "Small, red.",
            ["Toys", "Cars", "Red"],
            "B",
            9.99,
        )
        assert items["B2"] == (None, None, None, ["Toys"], None, None)
    assert not list(tmp_path.glob("*.tmp*"))


def test_2023_milliseconds_decide_and_csv_equals_jsonl(tmp_path):
    events = [
        ("U1", "B2", 1_600_000_000_900),
        ("U1", "B1", 1_600_000_000_100),
        ("U2", "B1", 1_500_000_000_000),
    ]
    write_lines(tmp_path / "meta_X.jsonl", META_2023)
    raw = write_lines(tmp_path / "X.jsonl.gz", [review_2023(*event) for event in events])
    header = "user_id,parent_asin,rating,timestamp"
    rows = [f"{user},{item},5.0,{time}" for user, item, time in events]
    table = write_lines(tmp_path / "X.csv.gz", [header, *rows])
    ordered = [
        ("U2", "B1", 1_500_000_000),
        ("U1", "B1", 1_600_000_000),
        ("U1", "B2", 1_600_000_000),
    ]
    found = []
    for path in (raw, table):
        with reading("amazon-2023", [path, tmp_path / "meta_X.jsonl"]) as data:
            assert events_of(data) == ordered
            found.append(items_of(data))
    assert found[0] == found[1]
    assert found[0]["B1"] == (
        "Tuner",
        None,
        "Clip. On.",
        ["Musical Instruments", "Tuners"],
        "Snark",
        12.5,
    )
    assert found[0]["B2"] == ("Strings", None, "", [], None, None)
    with (
        pytest.raises(UsageError, match="either a file of reviews or CSVs"),
        reading("amazon-2023", [raw, table]),
    ):
        pass

    splits = [
        write_lines(tmp_path / f"Y.{name}.csv", [header, row])
        for name, row in zip(("test", "train", "valid"), rows, strict=True)
    ]
    with reading("amazon-2023", splits) as data:
        assert events_of(data) == ordered

    same = [
        write_lines(tmp_path / f"Z.{name}.csv", [header, f"U,{name},5,1"])
        for name in ("test", "train", "valid")
    ]
    with reading("amazon-2023", same) as data:  # of equal time: in the order train, valid, test
        assert [item for _, item, _ in events_of(data)] == ["train", "valid", "test"]
    with (
        pytest.raises(UsageError, match="need one .csv file, or NAME.train.csv, "),
        reading("amazon-2023", [table, *same]),
    ):
        pass
    with pytest.raises(UsageError, match="names .*X.csv.gz twice"):
        find_files("amazon-2023", [table, tmp_path / "." / "X.csv.gz"])


def test_wrong_files_are_told_whose_they_are(tmp_path):
    old = write_lines(tmp_path / "old.json", [review_2014("u", "B1", 9)])
    new = write_lines(tmp_path / "new.jsonl", [review_2023("u", "B1", 9)])
    with pytest.raises(
        UsageError, match=r"new.jsonl: this looks like amazon-2023 \(reviews\), not amazon-2018"
    ):
        find_files("amazon-2018", [new])
    with pytest.raises(UsageError, match=r"old.json: this looks like amazon-2014 \(reviews\)"):
        find_files("amazon-2018", [old])

    incomplete = write_lines(
        tmp_path / "part.json", [{"reviewerID": "u", "asin": "B1", "verified": True, "x": 1}]
    )
    with pytest.raises(
        UsageError,
        match="as reviews it lacks unixReviewTime; its first line has reviewerID, asin, verified",
    ):
        find_files("amazon-2018", [incomplete])

    meta = write_lines(tmp_path / "meta_X.json", META_2018)
    with pytest.raises(
        UsageError,
        match=r"with reviews \(lines with asin, reviewerID, unixReviewTime, verified\), got",
    ):
        find_files("amazon-2018", [meta])
    with pytest.raises(UsageError, match="there is no such file"):
        find_files("amazon-2018", [tmp_path / "nothing.json"])

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "reviews.json").symlink_to(old)
    with pytest.raises(UsageError, match="is a link to .*old.json, outside of --input"):
        find_files("amazon-2014", [folder])

    (folder / "reviews.json").unlink()
    for name in ("a.json", "b.json"):
        write_lines(folder / name, [review_2014("u", "B1", 9)])
    with pytest.raises(UsageError, match="reads one file of reviews, found .*a.json, .*b.json"):
        find_files("amazon-2014", [folder])
    assert find_files("amazon-2014", [folder / "b.json"]) == {"reviews": [folder / "b.json"]}


def test_equal_bytes_on_any_number_of_cores(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    reviews = [
        review_2018(f"A{u}", f"B{i}", int(t), reviewText="x" * int(n))
        for u, i, t, n in zip(
            *(rng.integers(0, top, 30_000) for top in (2000, 300, 40, 5000)), strict=True
        )
    ]
    write_lines(tmp_path / "R.json", reviews)
    write_lines(
        tmp_path / "meta_R.json",
        [{"asin": f"B{i}", "title": f"Item {i}", "category": ["c"]} for i in range(300)],
    )

    made = []
    for threads in (1, 3):
        monkeypatch.setattr("igd_ds.data.raw.THREADS", {"threads": threads})
        output = tmp_path / f"t{threads}"
        inputs = [str(tmp_path / name) for name in ("R.json", "meta_R.json")]
        command = ["--source", "amazon-2018", "--input", *inputs, "--name", "same"]
        command += ["--protocol", "d3", "--min_items", "100", "--output", str(output)]
        assert prepare(command) == 0
        made.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert made[0] == made[1] and {*FILES, "dataset.json", "README.md"} <= made[0].keys()


def test_preset_prints_found_beside_expected(tmp_path, capsys):
    events = [
        (f"U{u}", f"B{1 + (u + i) % 2}", 1_600_000_000_000 + i) for u in range(6) for i in range(5)
    ]
    write_lines(tmp_path / "X.jsonl", [review_2023(*event) for event in events])
    write_lines(tmp_path / "meta_X.jsonl", META_2023)
    inputs = [str(tmp_path / name) for name in ("X.jsonl", "meta_X.jsonl")]
    assert (
        prepare(
            ["--preset", "instruments-2023", "--input", *inputs, "--output", str(tmp_path / "d")]
        )
        == 0
    )

    printed = capsys.readouterr().out
    assert "items 24,587 (MTC Table 2), found 2: -24,585 (-99.99%)" in printed

    info = InteractionDataset.load(tmp_path / "d").info
    assert info["expected"] == {
        "interactions": [511836, 30],
        "users": [57439, 6],
        "items": [24587, 2],
    }
    assert info["parameters"]["k_core"] == 5
    assert info["parameters"]["max_history"] == 20
    assert info["domain"] == "musical instruments"

    card = Path(tmp_path / "d" / "README.md").read_text()
    assert "24,587" in card
    with pytest.raises(UsageError, match="--preset yelp is made of source yelp, not of --source s"):
        prepare(["--preset", "yelp", "--source", "steam", "--output", str(tmp_path / "e")])
    with pytest.raises(SystemExit):
        prepare(["--preset", "games", "--help"])

    shown = capsys.readouterr().out
    assert "https://nijianmo.github.io/amazon/" in shown and "12 GB" in shown
