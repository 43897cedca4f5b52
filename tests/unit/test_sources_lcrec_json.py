"""Source `lcrec-json` against json.load and, for the same data, against source `sequences`."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_source import events_of, items_of, reading, refused_or_read

from igd_ds.data.protocols import ProtocolOptions, leave_one_out
from igd_ds.errors import UsageError

INTER = {"0": [0, 1, 2, 1], "1": [], "B07": [2]}
INDEX = {
    "0": ["<a_1>", "<b_2>"],
    "2": ["<a_1>", "<b_2>"],
    "1": ["<a_1>", "<b_3>"],
    "7": ["<a_9>", "<b_9>"],
}
ITEM = {
    "0": {
        "title": 'The "Great"\tGreek\n‏شارع',
        "description": "Diners, Greek",
        "brand": "Acme",
        "categories": "Food,  Diners,",
    },
    "1": {
        "title": "half an emoji \ud83d",
        "description": ["a", "b"],
        "brand": "",
        "categories": ["Musical, loud", "Drums"],
    },
    "2": {"title": "", "description": None},
}


def write(folder, inter=INTER, index=INDEX, item=ITEM):
    """Write what is not None: objects pretty-printed as published, and texts as they are."""
    folder.mkdir()
    for name, content in [("inter", inter), ("index", index), ("item", item)]:
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content, indent=4)
            (folder / f"X.{name}.json").write_text(text)
    return folder


def test_lcrec_json_equals_plain_parsing(tmp_path):
    events = [(user, str(item), None) for user, listed in INTER.items() for item in listed]
    folder = write(tmp_path / "all")
    with reading("lcrec-json", [folder]) as data:
        assert events_of(data) == events and data.interactions.timestamps is None
        assert items_of(data) == {
            "0": (
                ITEM["0"]["title"],
                INDEX["0"],
                "Diners, Greek",
                ["Food", "Diners"],
                "Acme",
                None,
            ),
            "1": ("half an emoji �", INDEX["1"], "a b", ["Musical, loud", "Drums"], "", None),
            "2": ("", INDEX["2"], None, None, None, None),
            "7": (None, INDEX["7"], None, None, None, None),
        }
    with reading("lcrec-json", [folder / "X.inter.json", folder / "X.index.json"]) as data:
        assert events_of(data) == events and set(data.titles) == {None}
        assert {item: codes for item, (_, codes, *_) in items_of(data).items()} == INDEX
    with reading("lcrec-json", [folder / "X.inter.json", folder / "X.item.json"]) as data:
        assert events_of(data) == events and data.semantic_ids is None and len(data.titles) == 3

    orders = set()
    for seed in range(6):
        with reading("lcrec-json", [folder], seed=seed) as data:
            orders.add(tuple(data.item_names.to_pylist()))
    assert len(orders) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": None, "item": None}, r"X.inter.json alone does not say which items"),
        ({"inter": {"0": [0, 3]}}, r"X.inter.json: user '0': item 3 is not in .*X.index.json"),
        (
            {"inter": {"0": [], "1": [0], "2": [0, 1, 8]}, "index": None},
            r"user '2': item 8 is not in .*X.item.json",
        ),
        (
            {"inter": {"0": ["0"]}},
            r"X.inter.json: user '0': need a list of item ids, found \['0'\]",
        ),
        ({"inter": {"0": [True]}}, r"X.inter.json: user '0': need a list of item ids"),
        ({"inter": {"0": [-1]}}, r"X.inter.json: user '0': need a list of item ids"),
        ({"inter": {"0": 1}}, r"X.inter.json: user '0': need a list of item ids, found 1"),
        (
            {"inter": '{"0": [1], "1": [2],\n "0": [0]}'},
            r"X.inter.json: not one JSON object: key '0' occurs twice",
        ),
        ({"inter": '{"0": [1],\n "1": [2'}, r"X.inter.json: not one JSON object: .*line 2 column"),
        ({"inter": [[1]]}, r"X.inter.json: need a JSON object that is not empty, found \[\[1\]\]"),
        ({"inter": {}}, r"X.inter.json: need a JSON object that is not empty"),
        ({"inter": ""}, r"X.inter.json"),
        ({"inter": {"0": []}}, r"X.inter.json.*: 0 of 0 interactions"),
        (
            {"index": INDEX | {"x": ["<a_1>"]}},
            r"X.index.json: item 'x': item ids must be integers from 0",
        ),
        ({"index": INDEX | {"01": ["<a_1>"]}}, r"X.index.json: item '01': item ids"),
        ({"index": INDEX | {"5": []}}, r"X.index.json: item '5': need a list of codes, found \[\]"),
        (
            {"index": INDEX | {"5": [1]}},
            r"X.index.json: item '5': need a list of codes, found \[1\]",
        ),
        ({"item": ITEM | {"9": {}}}, r"X.item.json: 1 items, such as 9, are not in .*X.index.json"),
        ({"item": ITEM | {"0": "x"}}, r"X.item.json: item '0': need an object with a title"),
        (
            {"item": ITEM | {"0": {"title": 5}}},
            r"X.item.json: item '0': title must be a text, found 5",
        ),
        ({"item": ITEM | {"0": {"title": ["x"]}}}, r"X.item.json: item '0': title must be a text"),
        (
            {"item": ITEM | {"0": {"categories": [["x"]]}}},
            r"X.item.json: item '0': categories must be a text",
        ),
    ],
)
def test_lcrec_json_refuses(tmp_path, change, message):
    with (
        pytest.raises(UsageError, match=message),
        reading("lcrec-json", [write(tmp_path / "x", **change)]),
    ):
        pass


def test_lcrec_json_refuses_cut_gzip(tmp_path):
    folder = write(tmp_path / "x", item=None)
    whole = (folder / "X.inter.json").read_bytes()
    (folder / "X.inter.json").unlink()
    (folder / "X.inter.json.gz").write_bytes(gzip.compress(whole)[:-5])
    with (
        pytest.raises(UsageError, match="X.inter.json.gz: not a whole gzip file"),
        reading("lcrec-json", [folder]),
    ):
        pass


def test_real_lcrec_json_makes_the_rows_of_sequences(shared):
    folder = shared / "data" / "raw" / "lcrec-json"
    plain = json.loads(gzip.decompress((folder / "Instruments.inter.json.gz").read_bytes()))
    index = json.loads((folder / "Instruments.index.json").read_bytes())

    splits = []
    for name, inputs in [("lcrec-json", folder), ("sequences", shared / "data" / "instruments")]:
        with reading(name, [inputs], seed=5) as data:
            rows = leave_one_out(data, ProtocolOptions(20, 0)).splits
            if name == "lcrec-json":
                assert events_of(data) == [
                    (user, str(item), None) for user, listed in plain.items() for item in listed
                ]
                users, items = (
                    [int(key) for key in names.to_pylist()]
                    for names in (data.user_names, data.item_names)
                )
                codes = dict(zip(data.item_names.to_pylist(), data.semantic_ids, strict=True))
                assert codes == index and items != sorted(items)
            else:
                users, items = range(len(plain)), range(len(index))

        splits.append({})
        for split in ("valid", "test"):
            columns = (
                rows[split][column].to_pylist() for column in ("user_id", "history", "target")
            )
            splits[-1][split] = sorted(
                (users[user], [items[item] for item in history], items[target])
                for user, history, target in zip(*columns, strict=True)
            )
        assert rows["train"].num_rows == 131_837

    assert splits[0] == splits[1]
    assert [len(split) for split in splits[0].values()] == [24_772, 24_772]


PARTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=3)
    ),
    max_leaves=6,
)
IDS = st.integers(0, 3)
USERS = st.dictionaries(st.text(max_size=3), st.lists(IDS, max_size=3) | PARTS, max_size=4)
CODES = st.dictionaries(
    IDS.map(str), st.lists(st.text(max_size=3), min_size=1, max_size=2) | PARTS, max_size=4
)
TEXT = st.none() | st.text(max_size=5) | PARTS
ENTRY = st.dictionaries(st.sampled_from(["title", "description", "brand", "categories"]), TEXT)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    inter=USERS | st.just(INTER),
    index=CODES | st.just(INDEX),
    item=st.none() | st.dictionaries(IDS.map(str), ENTRY | PARTS, max_size=3),
    tail=st.sampled_from([b"", b"", b"", b"}", b"\x00", b"\xff"]),
)
def test_lcrec_json_fuzz(tmp_path_factory, inter, index, item, tail):
    folder = write(tmp_path_factory.mktemp("fuzz") / "x", inter, index, item)
    with open(folder / "X.inter.json", "ab") as file:
        file.write(tail)
    refused_or_read("lcrec-json", sorted(folder.iterdir()))
