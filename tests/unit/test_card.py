"""igd_ds/data/card.py against counting in plain Python."""

import hashlib
from collections import Counter

import matplotlib
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from igd_ds.data.card import Measures, escape, write_card

TITLES = [
    "a\u00a0b c",
    "",
    None,
    "  one\x1ftwo\u2003three ",
    "日本 語\x85x",
    "a|b\n# c",
    "plain",
    "x" * 10_000,
    "two words",
    "y",
]
DAY = 86_400
INFO = {
    "name": "toy|\n*set*", "domain": "books", "protocol": "d3",
    "parameters": {"k_core": 5, "window": None, "seed": 12_345},
    "counts": {}, "sources": [{"path": "re|views_5.json", "sha256": "ab" * 32}],
    "hygiene": {"policy": "placeholder",
                "entities": {"count": 1234, "examples": [[3, "A &amp; <b>|\nB", "A & B"]]},
                "whitespace": {"count": 1, "examples": [[4, "a  b", "a b"]]},
                "unusable": {"count": 0, "examples": []}},
    "funnel": [{"step": "read re|views", "rows": 1_234_567},
               {"step": "5-core, pass 1", "users": 10, "items": 9, "years": 2}],
    "expected": {"items": [8, 10], "sparsity": [0.5, 0.25], "users": [0, 3]},
}  # fmt: skip


def items_table(titles, codes=None, **metadata):
    columns = {
        "item_id": pa.array(range(len(titles)), pa.int32()),
        "title": pa.array(titles, pa.string()),
        "semantic_id": pa.array(codes or [None] * len(titles), pa.list_(pa.string())),
        "source_id": pa.array(map(str, range(len(titles)))),
    }
    return pa.table(columns | metadata)


def rows_table(rows):
    """Return a table of rows (user, history, target, time) in several chunks, as protocols make."""
    types = [pa.int64(), pa.list_(pa.int32()), pa.int32(), pa.int64()]
    names = ["user_id", "history", "target", "timestamp"]
    parts = [part for part in (rows[: len(rows) // 3], rows[len(rows) // 3 :]) if part]
    return pa.concat_tables(
        pa.table(
            [pa.array([row[c] for row in part], kind) for c, kind in enumerate(types)], names=names
        )
        for part in parts
    )


@pytest.fixture
def rows():
    random = np.random.default_rng(0)

    def some(count, first_day):
        return [
            (int(random.integers(20)), random.integers(0, 10, random.integers(1, 8)).tolist(),
             int(min(random.geometric(0.4), 8) - 1 + (first_day > 0)), (first_day + i) * DAY)
            for i in range(count)
        ]  # fmt: skip

    return {"train": some(120, 0), "valid": some(15, 120), "test": some(15, 135)}


def make(folder, info, items, splits):
    folder.mkdir()
    write_card(folder, info, items, splits)
    return (folder / "README.md").read_text(encoding="utf-8")


def row_of(text, first):
    """Return the cells of the table row that begins with `first`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line[2:-2].split(" | ")][1:]


def quantile(values, share):
    """The smallest value that this share of the values does not exceed."""
    return next(
        v for v in sorted(values) if sum(other <= v for other in values) >= share * len(values)
    )


def test_numbers_equal_plain_counting(rows, tmp_path):
    metadata = {"brand": pa.array(["b"] * 5 + [None] * 5)}
    text = make(
        tmp_path / "d",
        INFO,
        items_table(TITLES, **metadata),
        {name: rows_table(found) for name, found in rows.items()},
    )
    users = {row[0] for found in rows.values() for row in found}
    assert (
        f"10 items (books) and {len(users)} users, in 120 training, 15 validation and 15 test rows."
        in text
    )
    assert "from 1970-01-01 to 1970-05-30 (UTC)" in text
    assert "k\\_core" not in text
    assert "k_core = 5, window = none" in text
    assert "9 items have a title, none a semantic ID." in text
    assert "brand (50.0 % of the items)" in text

    popularity = Counter(row[2] for row in rows["train"])
    times = [popularity[item] for item in range(10)]
    for name, found in rows.items():
        cold = f"{100 * sum(not popularity[row[2]] for row in found) / len(found):.1f} %"
        dates = [str(np.datetime64(found[i][3], "s"))[:10] for i in (0, -1)]
        assert row_of(text, name) == [
            str(len(found)),
            str(len({row[0] for row in found})),
            cold,
            f"{100 * sum(row[2] in row[1] for row in found) / len(found):.1f} %",
            *dates,
        ]

    words = [len(title.split()) for title in TITLES if title is not None]
    for what, values in [
        *(
            (f"history length, {name}", [len(row[1]) for row in found])
            for name, found in rows.items()
        ),
        ("training rows per item", times),
        ("title words", words),
        ("title characters", [len(title) for title in TITLES if title is not None]),
    ]:
        wanted = [f"{len(values):,}", f"{sum(values) / len(values):,.2f}"]
        wanted += [f"{quantile(values, share):,}" for share in (0, 0.1, 0.5, 0.9, 0.99, 1)]
        assert row_of(text, what) == wanted

    cold = times.count(0)
    assert cold and row_of(text, "cold items") == [str(cold), f"{10 * cold:.1f} % of the items"]
    assert row_of(text, "the most popular 1 % of the items") == [
        "1",
        f"{100 * max(times) / 120:.1f} % of the training targets",
    ]

    random = np.random.default_rng(1)
    many = [(0, [1], int(target), None) for target in random.zipf(1.5, 3000) % 250]
    splits = {
        "train": rows_table(many),
        "valid": rows_table(many[:1]),
        "test": rows_table(many[:1]),
    }
    ranked = sorted(Counter(row[2] for row in many).values(), reverse=True)
    measures = Measures.of(items_table(["t"] * 250), splits)
    assert measures.top(100) == (3, sum(ranked[:3]) / 3000)
    assert measures.top(10) == (25, sum(ranked[:25]) / 3000)
    assert measures.span() is None


def test_what_dataset_json_says_is_quoted(rows, tmp_path):
    splits = {name: rows_table(found) for name, found in rows.items()}
    text = make(tmp_path / "d", INFO, items_table(TITLES), splits)
    assert text.startswith("# toy\\| \\*set\\*\n\n")
    # A column that no step fills is left out.
    assert "| step | users | items | rows | years |" in text
    assert "| read re\\|views |  |  | 1,234,567 |  |" in text
    assert row_of(text, "5-core, pass 1") == ["10", "9", "", "2"]
    assert row_of(text, "items") == ["8", "10", "+2 (+25.0 %)"]
    assert row_of(text, "users") == ["0", "3", "+3"]
    assert row_of(text, "sparsity") == ["0.5", "0.25", "-0.25 (-50.0 %)"]
    assert row_of(text, "entities") == ["A \\&amp; \\<b\\>\\| B → A \\& B", "1,234"]
    assert row_of(text, "whitespace") == ["", "1"] and row_of(text, "unusable") == ["", "0"]
    assert f"| re\\|views_5.json | `{'ab' * 32}` |" in text and "(file position)" in text
    assert "InteractionDataset.load(" in text
    assert all(line.count("|") > 2 for line in text.splitlines() if line[:1] == "|")

    bare = {key: INFO[key] for key in INFO.keys() - {"funnel", "expected"}} | {
        "sources": [],
        "hygiene": {},
        "protocol": "given",
    }
    text = make(tmp_path / "bare", bare, items_table(TITLES), splits)
    assert "From the source" not in text
    assert "paper" not in text
    assert "hygiene" not in text
    assert "generated" in text
    assert "Protocol given: the rows are the source's own." in text
    assert "Rows are in the order of the source's files." in text
    assert escape("_a_ b_c\u202e\ud800 \t `x`") == "\\_a\\_ b_c \\`x\\`"
    assert escape("z" * 999) == "z" * 200 + "…"


def test_figures(rows, tmp_path):
    """The figures open, show something and are small; matplotlib settings do not change a byte."""
    splits = {name: rows_table(found) for name, found in rows.items()}
    text = make(tmp_path / "a", INFO, items_table(TITLES), splits)
    with matplotlib.rc_context(
        {"font.size": 20, "lines.linewidth": 9, "savefig.dpi": 30, "timezone": "Asia/Tokyo"}
    ):
        make(tmp_path / "b", INFO, items_table(TITLES), splits)
        # The user's settings are back.
        assert matplotlib.rcParams["font.size"] == 20
        assert matplotlib.rcParams["axes.spines.top"]

    figures = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
    assert figures == ["history_length.png", "popularity.png", "time.png", "title_length.png"]
    for name in figures:
        assert f"]({name})" in text
        path = tmp_path / "a" / name
        with Image.open(path) as image:
            assert image.size == (640, 400) and len(image.convert("RGB").getcolors(100_000)) > 2
        assert path.stat().st_size < 60_000

    first, second = (
        {
            path.name: hashlib.sha256(path.read_bytes()).digest()
            for path in (tmp_path / name).iterdir()
        }
        for name in "ab"
    )
    assert len(first) == 5 and first == second


def test_a_small_density_is_not_rounded_to_0(tmp_path):
    splits = {
        name: rows_table([(user, [0], 2, None)])
        for user, name in enumerate(("train", "valid", "test"))
    }
    text = make(tmp_path / "d", INFO, items_table(["t"] * 3000), splits)
    assert "Density: 0.033 % of the pairs" in text, "3 of 3 × 3000"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "time", [None, 1_500_000_000, 10**13], ids=["no timestamps", "one second", "no date"]
)
def test_three_rows_of_semantic_ids(tmp_path, time):
    splits = {
        name: rows_table([(i, [0] * (i + 1), 2, time)])
        for i, name in enumerate(("train", "valid", "test"))
    }
    items = items_table([None] * 3, [["<a_1>"], ["<a_1>", "<b_2>"], ["<a_2>"]])
    text = make(tmp_path / "d", INFO | {"domain": "items"}, items, splits)
    assert text.split("\n\n")[1].startswith(
        "3 items and 3 users, in 1 training, 1 validation and 1 test rows."
    )
    assert "0 items have a title, 3 a semantic ID of 1 to 2 codes." in text
    assert "No figure of title lengths" in text
    assert "title words" not in text and row_of(text, "cold items") == ["2", "66.7 % of the items"]

    drawn = {path.name for path in (tmp_path / "d").glob("*.png")}
    assert drawn == {"history_length.png", "popularity.png"} | (
        {"time.png"} if time == 1_500_000_000 else set()
    )
    assert ("No figure over time" in text) == (time != 1_500_000_000)

    date = {None: None, 1_500_000_000: "2017-07-14", 10**13: "318857-05-20"}[time]
    assert row_of(text, "train") == ["1", "1", "0.0 %", "0.0 %", *([date, date] if date else [])]
    assert ("There are no timestamps." in text) == (time is None)
    assert ("Interactions are ordered by time." in text) == (time is not None)
    assert "Density: 33.3 % of the pairs" in text, "3 of 3 × 3"
