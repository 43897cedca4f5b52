"""Reading raw lines: what is rejected and counted, and what is refused.

Fuzz tests check that any other input gives data or a UsageError, and never another exception.
"""

import gzip
import json
import tempfile
from pathlib import Path

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import RawRequest, parse_python, sniff
from igd_ds.errors import UsageError

COLUMNS = {"user": "VARCHAR", "item": "VARCHAR", "time": "BIGINT"}
INTERACTIONS = 'SELECT "user", item, "time", rowid AS position FROM lines'
DAY = 86_400


def read_json(path, timed=True, **options):
    with (
        tempfile.TemporaryDirectory() as scratch,
        RawReader(RawRequest((path,), **options), Path(scratch)) as raw,
    ):
        raw.read_json_lines("lines", [path], COLUMNS)
        return raw.source_data(INTERACTIONS, timed=timed)


def read_csv(path, **options):
    with (
        tempfile.TemporaryDirectory() as scratch,
        RawReader(RawRequest((path,), **options), Path(scratch)) as raw,
    ):
        raw.read_csv("lines", [path], COLUMNS, delimiter=",", quote='"')
        return raw.source_data(INTERACTIONS)


def events(data):
    users, items, found = (
        data.user_names.to_pylist(),
        data.item_names.to_pylist(),
        data.interactions,
    )
    times = [None] * len(found) if found.timestamps is None else found.timestamps.tolist()
    return [
        (users[u], items[i], t)
        for u, i, t in zip(found.users.tolist(), found.items.tolist(), times, strict=True)
    ]


def line(user="u", item="i", time=DAY, **more):
    return json.dumps({"user": user, "item": item, "time": time} | more).encode()


def written(path, lines, end=b"\n"):
    data = end.join(lines) + end
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_broken_lines_are_counted_up_to_a_limit(tmp_path):
    good = [line(item=f"i{n}", time=DAY * n) for n in range(1, 98)]
    lines = [*good[:40], b"", b"{broken", b"   ", *good[40:], b"[1, 2]", b'{"other": 1}']
    path = written(tmp_path / "r.json.gz", lines)
    data = read_json(path, max_bad_lines=0.05)
    assert events(data) == [("u", f"i{n}", DAY * n) for n in range(1, 98)]
    assert data.funnel[0] == {"step": "read r.json.gz", "rows": 100}
    assert data.funnel[1] == {
        "step": "broken lines in r.json.gz: line 42: no such object: '{broken'; "
        "line 101: no such object: '[1, 2]'; "
        "line 102: no such object: '{\"other\": 1}'",
        "rows": 3,
    }
    # The same three lines, as interactions without user, item and time.
    assert data.funnel[2]["rows"] == 3

    message = r"r.json.gz: 3 of 100 lines cannot be used \(3.00%, --max_bad_lines allows 0.10%\): "
    with pytest.raises(UsageError, match=message + "line 42"):
        read_json(path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(), line(time=DAY * 10**9)], "1 look like seconds and 1 like milliseconds"),
        ([line(time=-5)], "timestamps span -5 to -5"),
        ([line(time=10**15)], "before the year 5138"),
        (
            [line(), line(user=None)],
            r"1 of 2 interactions cannot be used \(without user 1, item 0, time 0\)",
        ),
        ([line(), line(item="")], "without user 0, item 1"),
        ([line(), line(time="soon")], "without user 0, item 0, time 1"),
        ([b"\x00\x01\x02"], "lines cannot be used"),
        ([b"", b"  "], "the file is empty"),
    ],
)
def test_what_is_refused(tmp_path, lines, message):
    with pytest.raises(UsageError, match=message):
        read_json(written(tmp_path / "r.json", lines))


def test_truncated_and_mislabelled_gzip(tmp_path):
    whole = written(
        tmp_path / "r.json.gz", [line(item=f"item {n * 7919}") for n in range(5000)]
    ).read_bytes()
    for cut in (len(whole) // 2, 15, 5):
        (tmp_path / "cut.json.gz").write_bytes(whole[:cut])
        with pytest.raises(UsageError, match="cut.json.gz: .*download it again"):
            read_json(tmp_path / "cut.json.gz")

    # Gzip is recognised by its content, not by its name.
    (tmp_path / "members.json").write_bytes(
        gzip.compress(line() + b"\n") + gzip.compress(line(user="v"))
    )
    assert events(read_json(tmp_path / "members.json")) == [("u", "i", DAY), ("v", "i", DAY)]

    # The name is no pattern, and its quote does not end a string.
    plain = written(tmp_path / "r [1]*'s.json", [line()])
    plain.rename(tmp_path / "plain [1]*'s.json.gz")
    assert events(read_json(tmp_path / "plain [1]*'s.json.gz")) == [("u", "i", DAY)]


def test_csv_rejects_and_missing_columns(tmp_path):
    rows = [
        b"x,time,user,item",
        *[b"1,%d,u,i%d" % (n, n) for n in range(50)],
        b"1,2,3",
        b'1,7,"u, ""q""\nnew",i',
        b"1,2,u,i,5",
    ]
    path = written(tmp_path / "r.csv", rows)
    data = read_csv(path, max_bad_lines=0.1)
    assert events(data) == [*[("u", f"i{n}", n) for n in range(50)], ('u, "q"\nnew', "i", 7)]
    assert [step["rows"] for step in data.funnel[:2]] == [51, 2]
    assert "line 52: missing columns: '1,2,3'" in data.funnel[1]["step"]
    with pytest.raises(UsageError, match="r.csv: 2 of 53 lines cannot be used"):
        read_csv(path)
    with pytest.raises(UsageError, match="no column user, item; its header has x, time"):
        read_csv(written(tmp_path / "s.csv", [b"x,time", b"1,2"]))

    # Two errors on a line.
    twice = [
        b"user,item,time",
        *[b"u,i%d,%d" % (n, n) for n in range(200)],
        b"u,i,x,y",
        b"u,i,x,",
    ]
    assert read_csv(written(tmp_path / "t.csv", twice), max_bad_lines=0.01).funnel[1]["rows"] == 2
    with pytest.raises(UsageError, match="the first line is blank"):
        read_csv(written(tmp_path / "b.csv", [b"", *twice]))
    with pytest.raises(UsageError, match="names a column twice"):
        read_csv(written(tmp_path / "s.csv", [b"user,item,time,User", b"1,2,3,4"]))
    assert events(read_csv(written(tmp_path / "s.csv", [b"user,item,time,it's", b"1,2,3,4"]))) == [
        ("1", "2", 3)
    ]


def test_a_byte_order_mark_costs_no_line(tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(b"\xef\xbb\xbf" + line() + b"\n" + line(user="v") + b"\n")
    assert events(read_json(path)) == [("u", "i", DAY), ("v", "i", DAY)]


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*arguments):
        raise duckdb.IOException("IO Error: Could not write file: No space left on device")

    monkeypatch.setattr(RawReader, "_choose_lines", full)
    with pytest.raises(
        UsageError, match="r.json: .*No space left on device; make room on the disk of --output"
    ):
        read_json(written(tmp_path / "r.json", [line()]))


def test_no_times_at_all_and_windows_line_ends(tmp_path):
    path = written(
        tmp_path / "r.json", [b'{"user": "u", "item": 5}', b'{"user": 7, "item": "i"}'], end=b"\r\n"
    )
    with pytest.raises(
        UsageError, match=r"2 of 2 interactions cannot be used \(without user 0, item 0, time 2\)"
    ):
        read_json(path)
    data = read_json(path, timed=False)
    assert events(data) == [("u", "5", None), ("7", "i", None)]
    assert data.interactions.timestamps is None


def test_python_lines_are_literals_only(tmp_path):
    assert parse_python(b"{u'a': 'it\\'s', 'b': [1, {'c': None}], 'd': True}") == {
        "a": "it's",
        "b": [1, {"c": None}],
        "d": True,
    }
    for text in (
        b"__import__('os').system('x')",
        b"{'a': open('/etc/passwd')}",
        b"[1]",
        b"{'a': 1",
        b"{'a': \x00}",
        b"\xff",
        b"{" * 300,
    ):
        assert parse_python(text) is None

    big = b"{'user': 0x" + b"f" * 5000 + b"}"
    for odd in (
        b"{'user': 'u', 'item': [b'x']}",
        b"{'user': {1, 2}}",
        b"{'user': ..., 'item': {(1, 2): 3}}",
        big,
    ):
        path = written(tmp_path / "odd.json", [repr(json.loads(line())).encode(), odd])
        with pytest.raises(UsageError, match="lines cannot be used"):
            read_json(path)
        assert events(read_json(path, max_bad_lines=0.5)) == [("u", "i", DAY)]

    lines = [
        repr({"user": f"u{n}", "item": "it's", "time": n, "text": 'a "b"\n'}).encode()
        for n in range(1, 40)
    ]
    data = read_json(
        written(tmp_path / "r.json", [*lines[:5], b"{'user': open('x')}", *lines[5:], line()]),
        max_bad_lines=0.05,
    )
    assert events(data) == [*[(f"u{n}", "it's", n) for n in range(1, 40)], ("u", "i", DAY)]
    assert "line 6: no such object: \"{'user': open" in data.funnel[1]["step"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=6)
WHOLE = st.fixed_dictionaries(
    {"user": NAMES, "item": NAMES, "time": st.integers(0, 10**10)}, optional={"x": JSON_VALUES}
)
ODD = st.fixed_dictionaries(
    {}, optional={"user": st.text() | JSON_VALUES, "item": st.text(), "time": JSON_VALUES}
)
BYTES = st.binary(max_size=30).map(lambda data: data.replace(b"\n", b""))
LINES = st.lists(WHOLE.map(lambda o: json.dumps(o).encode()) | BYTES, min_size=1, max_size=8)
ODD_LINES = st.lists(
    (WHOLE | ODD).map(lambda o: json.dumps(o).encode()) | BYTES, min_size=1, max_size=8
)


def wanted(raw):
    """Return the event on a line by plain Python, or None if there is none."""
    try:
        entry = json.loads(raw)
    except ValueError:
        return None
    if not isinstance(entry, dict):
        return None
    user, item, time = (entry.get(key) for key in ("user", "item", "time"))
    simple = (
        all(isinstance(value, str) and value and value.isprintable() for value in (user, item))
        and type(time) is int
    )
    return (user, item, time) if simple and 0 <= time < 10**11 else "unclear"


compared = []


@settings(max_examples=120, deadline=None, derandomize=True)
@given(LINES | ODD_LINES)
def test_any_lines_give_the_events_of_plain_python_or_an_error(lines):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.json"
        path.write_bytes(b"\n".join(lines))
        expected = [wanted(text) for text in lines]
        try:
            found = events(read_json(path, max_bad_lines=1.0))
        except UsageError as error:
            assert "fuzz.json" in str(error)
            assert not all(isinstance(event, tuple) for event in expected)
        else:
            if "unclear" not in expected:
                compared.append(found)
                assert found == [event for event in expected if event]


def test_the_fuzz_compared_something():
    """The test before this one read and compared many of its examples instead of refusing them."""
    assert not compared or len(compared) > 20


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=60))
def test_any_bytes_can_be_sniffed(data):
    with tempfile.TemporaryDirectory() as folder:
        for name in ("f", "g.gz"):
            path = Path(folder) / name
            path.write_bytes(data)
            try:
                form, keys = sniff(path)
            except UsageError as error:
                assert str(path) in str(error)
            else:
                assert form in ("json", "python", "text")
                assert all(isinstance(key, str) for key in keys)
