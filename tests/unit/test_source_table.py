"""Source `csv`: tables of the user's own, from files and from Python."""

import gzip
import importlib.util
import json

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_source import events_of, items_of, reading

import igd_ds
from igd_ds.commands import prepare
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.sources import find_files
from igd_ds.errors import UsageError

EVENTS = [("ann", "x1", 100, "Tea, green"), ("bob", "x2", 50, "Cup"), ("ann", "x2", 70, "Cup")]
EXPECTED = [("ann", "x1", 100), ("bob", "x2", 50), ("ann", "x2", 70)]
IN_TIME = [("bob", "x2", 50), ("ann", "x2", 70), ("ann", "x1", 100)]


def written(path, text: str, compress: bool = False):
    path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())
    return path


def csv_of(events, header: str, delimiter: str = ",") -> str:
    lines = [header]
    for user, item, time, title in events:
        title = f'"{title}"' if delimiter in title else title
        lines.append(delimiter.join([user, item, str(time), title]))
    return "\n".join(lines) + "\n"


def read(*paths, **options):
    """Return what the source reads, in order of time."""
    with reading("csv", list(paths), **options) as data:
        return sorted(events_of(data), key=lambda event: event[2] or 0), items_of(data)


# ---- forms of files


@pytest.mark.parametrize(
    ("name", "header", "delimiter"),
    [
        ("shop.csv", "user,item,timestamp,title", ","),
        ("shop.tsv", "user_id\titem_id\ttimestamp\ttitle", "\t"),
        ("shop.csv", "Customer ID;SKU;Order Date;Product Name", ";"),
        ("shop.txt", "visitorid|asin|unixReviewTime|name", "|"),
    ],
)
@pytest.mark.parametrize("compress", [False, True])
def test_delimited_text_by_common_names(tmp_path, name, header, delimiter, compress):
    path = written(tmp_path / name, csv_of(EVENTS, header, delimiter), compress)
    events, items = read(path)
    assert events == IN_TIME
    assert {item: values[0] for item, values in items.items()} == {"x1": "Tea, green", "x2": "Cup"}


def test_json_lines_and_parquet(tmp_path):
    columns = ("userId", "itemId", "ts", "title")
    entries = [dict(zip(columns, event, strict=True)) for event in EVENTS]
    lines = written(tmp_path / "shop.jsonl", "".join(json.dumps(e) + "\n" for e in entries))
    pq.write_table(pa.Table.from_pylist(entries), tmp_path / "shop.parquet")
    assert read(lines) == read(tmp_path / "shop.parquet")
    assert read(lines)[0] == IN_TIME


def test_what_pandas_and_spreadsheets_write(tmp_path):
    """An index column without a name, a quoted header, a byte order mark, a comma in a name."""
    text = '\ufeff"","user","item","Price, EUR","timestamp"\n"0","ann","x1","3","100"\n'
    path = written(tmp_path / "shop.csv", text)
    assert read(path)[0] == [("ann", "x1", 100)]


def test_a_file_of_items_takes_the_place_of_what_interactions_say(tmp_path):
    events = written(tmp_path / "events.csv", csv_of(EVENTS, "user,item,time,title"))
    items = written(
        tmp_path / "items.csv",
        "sku,title,brand,category,price\nx1,Green tea,Leaf,Food|Tea,$3.50\nx3,New,,,\n"
        'x2,Cup,Clay,"Home, Kitchen",\n',
    )
    _, found = read(events, items)
    assert found == {
        "x1": ("Green tea", None, None, ["Food", "Tea"], "Leaf", 3.5),
        "x2": ("Cup", None, None, ["Home", "Kitchen"], "Clay", None),
        "x3": ("New", None, None, None, None, None),
    }


def test_several_files_of_interactions_are_read_one_after_the_other(tmp_path):
    parts = [
        written(tmp_path / f"part-{n}.csv", csv_of(part, "user,item,time,title"))
        for n, part in enumerate((EVENTS[:1], EVENTS[1:]))
    ]
    assert read(*parts)[0] == IN_TIME
    other = written(tmp_path / "other.csv", "client,item\nann,x1\n")
    with pytest.raises(UsageError, match="part-0.csv and .*other.csv have other forms or columns"):
        read(parts[0], other)


def test_files_are_read_in_the_order_that_was_given(tmp_path):
    january = written(tmp_path / "january.csv", "user,item\nann,x1\nann,x2\n")
    february = written(tmp_path / "february.csv", "user,item\nann,x3\n")
    found = find_files("csv", [january, february])
    with reading("csv", found["tables"]) as data:
        assert [item for _, item, _ in events_of(data)] == ["x1", "x2", "x3"]


def test_what_a_file_of_items_does_not_say_is_taken_from_the_interactions(tmp_path):
    events = written(
        tmp_path / "events.csv",
        "user,item,title,brand,sid\nann,x1,,Leaf,1 1\nann,x1,Tea,,1 2\nbob,x2,Cup,Clay,2 1\n",
    )
    items = written(tmp_path / "items.csv", "sku,brand,category\nx1,Twig,Food\nx3,New,\n")
    _, found = read(events, items)
    assert found == {
        "x1": ("Tea", ["<a_1>", "<b_2>"], None, ["Food"], "Twig", None),
        "x2": ("Cup", ["<a_2>", "<b_1>"], None, None, "Clay", None),
        "x3": (None, None, None, None, "New", None),
    }

    # A title on any of its lines comes before that of the interactions.
    lines = [{"item": "x1", "title": "", "brand": ""}, {"item": "x1", "title": "New", "brand": ""}]
    items = written(tmp_path / "items.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    _, found = read(events, items)
    assert found["x1"] == ("New", ["<a_1>", "<b_2>"], None, None, None, None)
    assert found["x2"] == ("Cup", ["<a_2>", "<b_1>"], None, None, "Clay", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 7", ["<a_12>", "<b_7>"]),
        ("[12, 7]", ["<a_12>", "<b_7>"]),
        ("<a_12><b_7>", ["<a_12>", "<b_7>"]),
        ("x_3 y_4", ["x_3", "y_4"]),
    ],
)
def test_semantic_ids_and_numbers_prefixed_by_level(tmp_path, text, expected):
    path = written(tmp_path / "shop.csv", f'user,item,sid\nann,x1,"{text}"\n')
    assert read(path)[1]["x1"][1] == expected


@pytest.mark.parametrize(
    "lines",
    [
        "A2SUAM1J3GNN3B,B00000JGVX,5.0,1350000000\nA2SUAM1J3GNN3C,0321714113,4.0,1360000000\n",
        "B00000JGVX,A2SUAM1J3GNN3B,5.0,1350000000\n0321714113,A2SUAM1J3GNN3C,4.0,1360000000\n",
    ],
    ids=["2014", "2018"],
)
def test_amazons_ratings_without_a_header(tmp_path, lines):
    events, _ = read(written(tmp_path / "ratings.csv", lines))
    assert events == [
        ("A2SUAM1J3GNN3B", "B00000JGVX", 1350000000),
        ("A2SUAM1J3GNN3C", "0321714113", 1360000000),
    ]


# ---- columns that are named by flags


def test_columns_by_name_and_by_number(tmp_path):
    named = written(tmp_path / "a.csv", "kunde,artikel,am\nann,x1,5\n")
    columns = {"user": "kunde", "item": "artikel", "timestamp": "am"}
    assert read(named, columns=columns)[0] == [("ann", "x1", 5)]
    bare = written(tmp_path / "b.csv", "9,x1,ann\n5,x2,bob\n")
    columns = {"user": "3", "item": "2", "timestamp": "1"}
    assert read(bare, columns=columns)[0] == [("bob", "x2", 5), ("ann", "x1", 9)]


def test_a_flag_beats_a_common_name(tmp_path):
    path = written(tmp_path / "a.csv", "user,item,asin,name\nann,1,x1,Tea\n")
    assert read(path)[0] == [("ann", "x1", None)], "asin is the more telling name"
    assert read(path, columns={"item": "item"})[0] == [("ann", "1", None)]


def test_what_the_columns_are_is_told(tmp_path, capsys):
    read(written(tmp_path / "a.csv", "user,item,product_id\nann,1,x1\n"))
    assert "a.csv: user = user, item = product_id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("header", "chosen"),
    [
        ("user_id,item_id,timestamp,session", "user = user_id (not session), item = item_id, time"),
        ("member,customer_id,sku,title", "user = customer_id (not member), item = sku, title"),
        ("user,session_id,item", "user = user (not session_id), item = item"),
        ("date,time,user,item", "timestamp = date (not time)"),
        ("time,user,item,name,title", "timestamp = time, title = title"),
    ],
)
def test_of_several_columns_the_likeliest_is_taken_and_the_others_are_told(
    tmp_path, capsys, header, chosen
):
    cells = {"date": "2024-01-31", "timestamp": "2024-01-31"}
    line = ",".join(cells.get(name, "1") for name in header.split(","))
    read(written(tmp_path / "a.csv", f"{header}\n{line}\n"))
    assert chosen in capsys.readouterr().err


def test_a_first_line_that_is_taken_for_data_is_shown(tmp_path, capsys):
    path = written(tmp_path / "a.csv", "kunde;artikel;preis\nu1;a1;3\n")
    message = "items among kunde, artikel, preis: .*; where this is no header, COLUMN is a number"
    with pytest.raises(UsageError, match=message):
        read(path)
    read(path, columns={"user": "1", "item": "2"})
    assert "no header: the first line (kunde, artikel, preis) is taken for data" in (
        capsys.readouterr().err
    )
    assert read(path, columns={"user": "kunde", "item": "artikel"})[0] == [("u1", "a1", None)]


def test_a_first_line_without_a_header_is_data(tmp_path):
    """Numbers of columns and words such as Book are no column names there."""
    path = written(tmp_path / "a.csv", "1,31,1600000000,Book\n2,32,1600000001,Game\n")
    columns = {"user": "1", "item": "2", "timestamp": "3", "title": "4"}
    events, items = read(path, columns=columns)
    assert [item for _, item, _ in events] == ["31", "32"]
    assert (items["31"][0], items["32"][0]) == ("Book", "Game")


def test_keys_of_json_lines_are_those_of_many_lines(tmp_path):
    lines = [{"user": "ann", "item": "x1"}, {"user": "bob", "item": "x2", "time": 5, "title": "T"}]
    path = written(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UsageError, match="1 of 2 interactions cannot be used"):
        read(path)
    events, items = read(path, max_bad_lines=0.5)
    assert events == [("bob", "x2", 5)] and items["x2"][0] == "T"


@pytest.mark.parametrize("word", ["nan", "NULL", "None", "", "N/A", "<NA>"])
def test_missing_ids_are_no_ids(tmp_path, word):
    text = f"user,item\nann, x1\n{word},x1\nann,{word}\n bob ,x1\n"
    events, _ = read(written(tmp_path / "a.csv", text), max_bad_lines=0.6)
    assert sorted(event[:2] for event in events) == [("ann", "x1"), ("bob", "x1")]


def test_whole_floats_of_parquet_are_integers(tmp_path):
    """pandas makes floats of integers where one is missing."""
    frame = pandas.DataFrame({"user": [1, None, 2], "item": [7, 8, 7.5]})
    frame.to_parquet(tmp_path / "a.parquet")
    other = pandas.DataFrame({"user": ["x"], "item": [9]})
    other.to_parquet(tmp_path / "b.parquet")
    events, _ = read(tmp_path / "a.parquet", tmp_path / "b.parquet", max_bad_lines=0.5)
    assert {event[:2] for event in events} == {("1", "7"), ("2", "7.5"), ("x", "9")}


def test_tabs_need_no_quotes(tmp_path):
    path = written(tmp_path / "a.tsv", 'user\titem\ttitle\nann\tx1\t"Heroes" by Bowie\n')
    assert read(path)[1]["x1"][0] == '"Heroes" by Bowie'


def test_what_pandas_quotes_between_tabs(tmp_path):
    titles = ['The "Big" one', "a\tb", "plain", '7" single']
    frame = pandas.DataFrame({"user": "ann", "item": ["x1", "x2", "x3", "x4"], "title": titles})
    frame = frame[frame["title"] != "a\tb"]  # a tab inside of quotes ends the field all the same
    frame.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    found = read(tmp_path / "a.tsv")[1]
    assert {item: values[0] for item, values in found.items()} == {
        "x1": titles[0], "x3": titles[2], "x4": titles[3]
    }  # fmt: skip


def test_quotes_between_tabs_are_taken_off_once(tmp_path):
    """R quotes the header too, and then quotes are read as such."""
    text = 'user\titem\ttitle\nann\tx1\t"""Big"""\n'
    assert read(written(tmp_path / "a.tsv", text))[1]["x1"][0] == '"Big"'
    quoted = text.replace("user\titem\ttitle", '"user"\t"item"\t"title"')
    assert read(written(tmp_path / "b.tsv", quoted))[1]["x1"][0] == '"Big"'


# ---- times

SECONDS = [1600000000, 1500000000, 1550000000]
DAYS = [1599955200, 1599868800, 1599782400]


@pytest.mark.parametrize(
    ("times", "expected", "options"),
    [
        (("100", "50.5", "50.25"), [100, 50, 50], {}),
        ((f"1600{9 * '0'}", f"1500{9 * '0'}", f"1550{9 * '0'}"), SECONDS, {}),
        ((f"1600{12 * '0'}", f"1500{12 * '0'}", f"1550{12 * '0'}"), SECONDS, {}),
        ((f"1600{15 * '0'}", f"1500{15 * '0'}", f"1550{15 * '0'}"), SECONDS, {}),
        (("2020-09-13", "2020-09-12T01:00:00+01:00", "2020-09-11 00:00:00"), DAYS, {}),
        (("13.09.2020", "12.09.2020", "11.09.2020"), DAYS, {"time_format": "%d.%m.%Y"}),
        (("20200913", "20200912", "20200911"), DAYS, {"time_format": "%Y%m%d"}),
    ],
    ids=["seconds", "milli", "micro", "nano", "ISO", "German", "digits"],
)
def test_times_are_numbers_or_dates(tmp_path, times, expected, options):
    lines = [f"ann,x{place},{time}" for place, time in enumerate(times)]
    path = written(tmp_path / "a.csv", "user,item,time\n" + "\n".join(lines) + "\n")
    with reading("csv", [path], **options) as data:
        found = events_of(data)
    by_item = {item: time for _, item, time in found}
    assert [by_item[f"x{place}"] for place in range(3)] == expected
    if times[1] == "50.5":
        assert [item for _, item, _ in found] == ["x2", "x1", "x0"], "the fraction decides"


def test_without_times_the_lines_are_in_order(tmp_path):
    path = written(tmp_path / "a.csv", "user,item\nann,x2\nann,x1\n")
    with reading("csv", [path]) as data:
        assert events_of(data) == [("ann", "x2", None), ("ann", "x1", None)]


@pytest.mark.parametrize("time", ["nan", "inf", "-5", "0001-01-01", ""])
def test_one_time_that_is_none_is_left_out(tmp_path, time):
    """Whatever the unit of the others."""
    good = "".join(f"ann,x1,{1_700_000_000_000_000 + n}\n" for n in range(9))
    path = written(tmp_path / "a.csv", f"user,item,time\nbob,x1,{time}\n{good}")
    events, _ = read(path, max_bad_lines=0.2)
    assert {event[0] for event in events} == {"ann"} and events[0][2] == 1_700_000_000
    with pytest.raises(UsageError, match="a.csv"):
        read(path)


# ---- bad input


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b,c\n1,2,3\n", {}, r"a.csv: no column of items among a, b, c: name"),
        ("item,title\nx1,Tea\n", {}, r"a.csv: no column of users among item, title: name it"),
        ("user,item\nann,x1\n", {"columns": {"title": "label"}}, r"--columns title=label: no such"),
        ("user,item,time\nann,x1,yesterday\n", {}, r"1 of 1 times cannot be read .*as 'yest"),
        ("user,item,time\nann,x1,20240131\n", {}, r"add --time_format %Y%m%d"),
        ("", {}, r"a.csv: the file is empty"),
        ("user,item,time\n", {}, r"a.csv: no line behind the header"),
        ("user,item,time\nann,x1,5\nbob,x1,5000000000000000\n", {}, r"all must be of one kind"),
        ("user,item,time\nann,x1,5\n", {"time_format": "%Q"}, r"--time_format %Q: "),
        ("user,item\nann,x1\n", {"columns": {"title": "9"}}, r"--columns title=9: no such column"),
        ("user,item\nann,x1\n", {"columns": {"user": "item", "item": "item"}}, r"are both item"),
        ("user,item\nann,x1\n", {"columns": {"usr": "user"}}, r"unknown field usr, did you mean"),
        ("user,item\nann,x1\n", {"columns": {"user": 0}}, r"as text"),
        ("user,item\rann,x1\r", {}, r"a.csv: the first line cannot be read .*tr "),
        ("\x00", {}, r"a.csv: no column of items"),
        ('user,item\nann,x1,"' + "y" * 9000 + '"\n', {}, r"a.csv: .{,400}$"),
        ("{'user': 'ann', 'item': 'x1'}\n", {}, r"a.csv: Python dicts"),
    ],
)
def test_bad_tables_are_named(tmp_path, text, options, message):
    path = written(tmp_path / "a.csv", text)
    with pytest.raises(UsageError, match=message), reading("csv", [path], **options):
        pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04rest", "an Excel or zip file: save the table as CSV"),
        ("user,item\nann,x1\n".encode("utf-16"), "UTF-16 text: iconv"),
        (b"BZh91AY", "a bzip2 file: unpack it"),
        (b"\xfd7zXZ\x00", "an xz file: unpack it"),
        (b"user,item\nann,x1\r\nann,x2\nann,x3\r\n", "in CR LF or CR and others in LF: sed"),
        (b"PAR1", "no whole Parquet file"),
        ("user,item\nann,Caf\u00e9\n".encode("latin-1"), "iconv -f LATIN1 -t UTF-8"),
    ],
)
def test_files_that_are_no_tables_are_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with (
        pytest.raises(UsageError, match=f"a.csv: .*{message}"),
        reading("csv", [tmp_path / "a.csv"]),
    ):
        pass


def test_metadata_of_other_ids_is_refused_or_told(tmp_path, capsys):
    events = written(tmp_path / "a.csv", csv_of(EVENTS, "user,item,time,title"))
    other = written(tmp_path / "b.csv", "item,title\ny1,A\ny2,B\n")
    with pytest.raises(UsageError, match="none of the 2 lines of metadata .* such as 'y1', here"):
        read(events, other)
    many = written(tmp_path / "c.csv", "user,item\n" + "".join(f"u,x{n}\n" for n in range(9)))
    some = written(tmp_path / "d.csv", "item,title\nx1,A\n")
    read(many, some)
    assert "warning: only 1 of 9 items with interactions have metadata" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "csv", "--columns", "user=a", "user=b"], "names user twice: a and b"),
        (["--source", "csv", "--columns", "usr=a"], "unknown field usr, did you mean 'user'"),
        (["--source", "csv", "--columns", "user"], "--columns user: write FIELD=COLUMN"),
        (
            ["--source", "yelp", "--protocol", "d3", "--columns", "user=a"],
            "--columns is for --source csv",
        ),
        (
            ["--source", "yelp", "--protocol", "d3", "--time_format", "%Y"],
            "--time_format is for --source csv",
        ),
    ],
)
def test_bad_flags_are_named(tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        prepare.main([*flags, "--output", str(tmp_path / "data")])


# ---- the command, and Python


def shop(people: int = 12, visits: int = 5) -> pandas.DataFrame:
    rows = [
        {
            "customer": f"c-{person}",
            "sku": f"s-{(person + visit) % 7}",
            "ordered_at": pandas.Timestamp("2024-01-01") + pandas.Timedelta(days=visit),
            "product_name": f"Product {(person + visit) % 7}",
        }
        for person in range(people)
        for visit in range(visits)
    ]
    return pandas.DataFrame(rows)


def test_a_shops_export_with_an_index_and_quotes(shared, tmp_path):
    """The case a_shop of shared/faults: 4,000 lines, 400 customers, 200 products."""
    path = shared / "faults" / "make_inputs.py"
    spec = importlib.util.spec_from_file_location("make_inputs", path)
    make_inputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_inputs)
    make_inputs.a_shop(tmp_path / "shop")

    events, items = read(tmp_path / "shop" / "shop.csv")
    assert len(events) == 4000 and len({user for user, _, _ in events}) == 400
    assert events[-1][2] == 1_600_000_000 + 3999 * 977
    assert set(items) == {f"sku-{number:04d}" for number in range(200)}
    assert items["sku-0007"][0] == "Product, number 7"


class Stream:
    """What polars and others hand over: Arrow's stream interface and nothing else."""

    def __init__(self, table: pa.Table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


def test_one_command_makes_a_dataset_of_a_csv(tmp_path, capsys):
    shop().to_csv(tmp_path / "shop.csv")
    words = ["--source", "csv", "--input", str(tmp_path / "shop.csv")]
    assert prepare.main([*words, "--output", str(tmp_path / "data")]) == 0
    data = InteractionDataset.load(tmp_path / "data")
    assert data.info["protocol"] == "leave-one-out" and len(data.splits["test"]) == 12
    assert "column 1" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "make",
    [lambda frame: frame, pa.Table.from_pandas, lambda f: Stream(pa.Table.from_pandas(f))],
    ids=["pandas", "Arrow", "Arrow's stream"],
)
def test_frames_and_files_give_the_same_dataset(tmp_path, make):
    frame = shop()
    frame.to_csv(tmp_path / "shop.csv", index=False)
    of_file = igd_ds.prepare(tmp_path / "shop.csv", tmp_path / "a" / "shop", max_history=3)
    of_frame = igd_ds.prepare(make(frame), tmp_path / "b" / "shop", max_history=3)
    for name in ("items", "users", "train", "valid", "test"):
        ours, theirs = (tmp_path / side / "shop" / f"{name}.parquet" for side in "ab")
        assert pq.read_table(ours).equals(pq.read_table(theirs)), name
    assert of_frame.titles == of_file.titles
    assert max(len(of_frame.splits["test"].history(row)) for row in range(12)) == 3
    again = igd_ds.prepare(make(frame), tmp_path / "b" / "shop", max_history=3)
    assert again.fingerprint == of_frame.fingerprint


def test_items_may_come_as_a_second_frame(tmp_path):
    items = pandas.DataFrame({"sku": [f"s-{n}" for n in range(9)], "title": list("abcdefghi")})
    data = igd_ds.prepare(shop(), tmp_path / "data", items=items)
    assert sorted(data.titles) == list("abcdefghi")


def test_a_bad_line_of_a_frame_may_be_left_out(tmp_path):
    frame = shop()
    frame.loc[3, "customer"] = None
    with pytest.raises(UsageError, match=r"^interactions: 1 of 60 .*--max_bad_lines allows"):
        igd_ds.prepare(frame, tmp_path / "data")
    data = igd_ds.prepare(frame, tmp_path / "data", max_bad_lines=0.1)
    assert data.info["parameters"]["max_bad_lines"] == 0.1
    with pytest.raises(UsageError, match="--max_bad_lines 1: a share"):
        igd_ds.prepare(frame, tmp_path / "other", max_bad_lines=1)


def test_semantic_ids_of_some_items_alone_are_refused_before_anything_is_written(tmp_path):
    frame = shop()
    frame["sid"] = "1 " + frame["sku"].str[2:]
    frame.loc[frame["sku"] == frame["sku"][0], "sid"] = None
    with pytest.raises(UsageError, match=r"1 of \d+ items have no semantic ID, such as 's-"):
        igd_ds.prepare(frame, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_histroy": 3}, "unknown option max_histroy, did you mean 'max_history'"),
        ({"protocol": "leave-one"}, "protocol 'leave-one', did you mean 'leave-one-out'"),
        ({"items": 3}, "items: a int is no table"),
        ({"k_core": "5"}, "--k_core 5: must be a whole number"),
        ({"max_history": -1}, "--max_history -1: must be a whole number of at least 0"),
        ({"window": ("2017-01-01", None)}, "window .*: give seconds since 1970"),
        ({"num_users": -1}, "--num_users -1: must be"),
    ],
)
def test_bad_options_in_python(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        igd_ds.prepare(shop(), tmp_path / "data", **options)
