"""Source `recbole` on atomic files of the form that RecBole's tools write, against plain Python."""

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_source import events_of, items_of, reading, refused_or_read

from igd_ds.errors import UsageError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ML = INTER + (
    "196\t242\t3\t881250949\n186\t302\t3\t891717742\n"
    "22\t377\t1\t878887116.0\n196\t302\t2\t8.81250949E8\n"
)
ML_ITEMS = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
242\tKolya\t1996\tComedy
302\tL.A. "Confidential\t1997\tCrime Film-Noir  Mystery
5\tNever rated\t1990\t
"""
# The form that pandas writes: quotes around fields that hold quotes, and Python's text of a set as
# categories.
AMAZON_ITEMS = (
    "item_id:token\ttitle:token\tsales_type:token\tsales_rank:float\t"
    "categories:token_seq\tprice:float\tbrand:token\n"
    '242\t"6"" x 4"" frame, black"\tHome\t5.0\t'
    '"\'Arts, Crafts & Sewing\', ""Kid\'s"", \'Toys\'"\t12.99\tAcme & Co\n'
    "302\t\tHome\t\t'Sports & Outdoors'\t\t\n"
    "377\tÜber\tHome\t\tPubs, Bars & Food\tfree\t\n"
)


def write(folder, **texts):
    """Write NAME_part.kind for each NAME_part__kind = text; return the folder."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_recbole_equals_plain_parsing(tmp_path):
    folder = write(
        tmp_path / "ml-100k",
        ml__inter=ML,
        ml__item=ML_ITEMS,
        ml__user="user_id:token\tage:token\n1\t24\n",
    )
    plain = [line.split("\t") for line in ML.splitlines()[1:]]
    events = [(user, item, int(float(at))) for user, item, _, at in plain]

    with reading("recbole", [folder]) as data:
        assert events_of(data) == sorted(events, key=lambda event: event[2])
        assert items_of(data) == {
            "242": ("Kolya", None, None, ["Comedy"], None, None),
            "302": (
                'L.A. "Confidential',
                None,
                None,
                ["Crime", "Film-Noir", "Mystery"],
                None,
                None,
            ),
            "377": (None,) * 6,
        }

    amazon = write(tmp_path / "amazon", Toys__inter=ML, Toys__item=AMAZON_ITEMS)
    with reading("recbole", [amazon]) as data:
        assert items_of(data) == {
            "242": (
                '6" x 4" frame, black',
                None,
                None,
                ["Arts, Crafts & Sewing", "Kid's", "Toys"],
                "Acme & Co",
                12.99,
            ),
            "302": (None, None, None, ["Sports & Outdoors"], None, None),
            "377": ("Über", None, None, ["Pubs", "Bars & Food"], None, None),
        }

    # The .item file is optional.
    with reading("recbole", [tmp_path / "amazon" / "Toys.inter"]) as data:
        assert events_of(data) == sorted(events, key=lambda event: event[2])
        assert set(items_of(data).values()) == {(None,) * 6}


def test_recbole_finds_columns_by_name_and_joins_benchmark_files(tmp_path):
    steam = "user_id:token\tplay_hours:float\tproduct_id:token\ttimestamp:float\n"
    steam += "u\t0.1\t7\t1513468800\n"
    games = "app_name:token\tid:token\ttitle:token\nKitty\t7\tLost Kitty\n"
    with reading(
        "recbole", [write(tmp_path / "steam", steam__inter=steam, steam__item=games)]
    ) as data:
        assert events_of(data) == [("u", "7", 1513468800)]
        assert items_of(data)["7"][0] == "Lost Kitty"

    yelp = "review_id:token\tuser_id:token\tbusiness_id:token\tdate:float\nr\tu\tb\t1531001351\n"
    shops = "business_id:token\titem_name:token_seq\tcategories:token_seq\n"
    shops += "b\tCafé 1\tBubble Tea, Food\n"
    with reading("recbole", [write(tmp_path / "yelp", yelp__inter=yelp, yelp__item=shops)]) as data:
        assert events_of(data) == [("u", "b", 1531001351)]
        assert items_of(data)["b"] == ("Café 1", None, None, ["Bubble Tea", "Food"], None, None)

    fractions = "user_id:token\titem_id:token\ttimestamp:float\nu\ta\t100.9\nu\tb\t100.1\n"
    with reading("recbole", [write(tmp_path / "fractions", x__inter=fractions)]) as data:
        assert events_of(data) == [("u", "b", 100), ("u", "a", 100)]

    untimed = write(
        tmp_path / "untimed", x__inter="user_id:token\titem_id:token\nb\t1\na\t2\nb\t2\n"
    )
    with reading("recbole", [untimed]) as data:
        assert events_of(data) == [("b", "1", None), ("a", "2", None), ("b", "2", None)]
        assert data.interactions.timestamps is None

    head, *rows = ML.splitlines(keepends=True)
    parts = {
        "x.test": head + rows[3],
        "x.train": head + rows[0] + rows[1],
        "x.valid": head + rows[2],
    }
    folder = write(tmp_path / "parts", **{f"{name}__inter": text for name, text in parts.items()})
    packed = folder / "x.train.inter.gz"
    packed.write_bytes(gzip.compress((folder / "x.train.inter").read_bytes()))
    (folder / "x.train.inter").unlink()
    with reading("recbole", [folder]) as data:
        assert [(user, item) for user, item, _ in events_of(data)] == [
            tuple(row.split("\t")[:2])
            for row in sorted(rows, key=lambda row: float(row.split("\t")[3]))
        ]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            {"x__inter": "user_id:token\trating:float\n1\t2\n"},
            "x.inter: no column item_id or business_id .*user_id:token, rating:float",
        ),
        ({"x__inter": "item_id:token\trating:float\n1\t2\n"}, "x.inter: no column user_id or"),
        (
            {"x__inter": "user_id\titem_id\n1\t2\n"},
            "x.inter: column 'user_id' of the header has no type",
        ),
        (
            {"x__inter": "user_id:token\titem_id_list:token_seq\titem_id:token\n1\t2 3\t4\n"},
            "x.inter: column item_id_list holds a hist",
        ),
        (
            {"x__inter": "user_id:token\titem_id:token\titem_id:float\n1\t2\t3\n"},
            "x.inter: the header names a column twice",
        ),
        ({"x__inter": ML, "y__inter": ML}, "need one .inter file, or NAME.train.inter"),
        ({"x.train__inter": ML, "x__inter": ML}, "need one .inter file, or NAME.train.inter"),
        ({"x__inter": ""}, "x.inter: the file is empty"),
        ({"x__inter": INTER}, "x.inter: 0 of 0 interactions"),
        ({"x__inter": ML + "1\t2\t3\n"}, "x.inter: 1 of . lines cannot be used .*line 6"),
        ({"x__inter": ML + "1\t\t3\t881250949\n"}, "1 of 5 interactions cannot be used .*item 1"),
        ({"x__inter": ML + "1\t2\t3\tnan\n"}, "1 of 5 interactions cannot be used .*time 1"),
        (
            {"x__inter": ML, "x__item": "item_id:token\tyear:float\n1\t2\n"},
            "none of the 1 lines of metadata has the id of an item",
        ),
        (
            {"x__inter": ML, "x__item": "key:token\ttitle:token\n1\t2\n"},
            "x.item: no column item_id or",
        ),
    ],
)
def test_recbole_refuses(tmp_path, texts, message):
    with (
        pytest.raises(UsageError, match=message),
        reading("recbole", [write(tmp_path / "r", **texts)]),
    ):
        pass


NAMES = [
    "user_id:token",
    "item_id:token",
    "timestamp:float",
    "title:token",
    "categories:token_seq",
    "price:float",
    "id:token",
]
HEADERS = st.lists(st.sampled_from(NAMES) | st.text(max_size=8), max_size=5).map("\t".join)
CELLS = st.one_of(
    st.integers(0, 3).map(str),
    st.floats().map(str),
    st.text(max_size=8),
    st.sampled_from(['"', '"a"', "'a', \"b\"", "\t"]),
)
ROWS = st.lists(st.lists(CELLS, min_size=2, max_size=5).map("\t".join), max_size=5)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    inter=st.tuples(HEADERS | st.just(INTER.strip()), ROWS),
    item=st.tuples(
        HEADERS | st.just("item_id:token\ttitle:token\tcategories:token_seq\tprice:float"), ROWS
    ),
    good=st.booleans(),
    tail=st.binary(max_size=8),
)
def test_recbole_fuzz(tmp_path_factory, inter, item, good, tail):
    folder = tmp_path_factory.mktemp("fuzz")
    paths = [folder / "x.inter", folder / "x.item"]
    for path, (header, rows) in zip(paths, [inter, item], strict=True):
        path.write_bytes("\n".join([header, *rows]).encode("utf-8", "replace") + tail)
    if good:
        paths[0].write_text(ML)
    refused_or_read("recbole", paths)
