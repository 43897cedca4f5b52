"""Source `steam` on files in the published form (Python 2 dicts), against ast.literal_eval."""

import ast
import calendar
import gzip
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_source import events_of, items_of, reading, refused_or_read

from igd_ds.data.sources import find_files
from igd_ds.errors import UsageError


def python2(value):
    """Return what Python 2 prints for a dict of the crawler: u'' strings, all but ASCII escaped."""
    if isinstance(value, str):
        return f"u{ascii(value)}"
    if isinstance(value, list):
        return f"[{', '.join(map(python2, value))}]"
    return (
        f"{{{', '.join(f'{python2(k)}: {python2(v)}' for k, v in value.items())}}}"
        if isinstance(value, dict)
        else repr(value)
    )


def review(user, game, date, **more):
    start = {
        "username": user,
        "hours": 0.1,
        "products": 41,
        "product_id": game,
        "page_order": 0,
        "date": date,
    }
    return (
        start
        | {"text": "It's \"good\"\nreally {u'x': 1} ™", "early_access": False, "page": 1}
        | more
    )


REVIEWS = [
    review("Chaos Syren", "725280", "2017-12-17"),
    review("₮ʜᴇ Wᴀʀ's", "328100", "2017-08-02", user_id="76561198007483075"),
    review("Chaos Syren", "328100", "2017-12-17", compensation="Product received for free"),
    review("hello?<", "725280", "2011-01-03", found_funny=5),
    review("Chaos Syren", "999", "2010-10-15"),
]
GAMES = [
    {
        "publisher": "Kotoshiro",
        "genres": ["Action", "Indie"],
        "app_name": "Lost Summoner Kitty",
        "title": "Lost Summoner Kitty",
    }
    | {
        "tags": ["Strategy", "Action"],
        "price": 4.99,
        "id": "725280",
        "developer": "Kotoshiro Games",
        "early_access": False,
    },
    {
        "genres": ["Free to Play"],
        "app_name": "",
        "title": 'L\'été "π"\tx',
        "price": "Free To Play",
        "id": "328100",
        "publisher": "P",
    },
    {"app_name": "Never reviewed", "price": "Starting at $499.00", "id": "5"},
    {"app_name": "no id", "url": "http://store.steampowered.com/"},
]


def folder_of(folder, reviews=REVIEWS, games=GAMES, write=python2):
    folder.mkdir()
    for name, entries in [("steam_reviews", reviews), ("steam_games", games)]:
        text = "".join(
            (entry if isinstance(entry, str) else write(entry)) + "\n" for entry in entries
        )
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(text.encode()))
    return [folder]


def seconds(date):
    return calendar.timegm(time.strptime(date, "%Y-%m-%d"))


def test_steam_equals_plain_parsing(tmp_path):
    inputs = folder_of(tmp_path / "steam")
    lines = (
        gzip.decompress((inputs[0] / "steam_reviews.json.gz").read_bytes()).decode().splitlines()
    )
    plain = [ast.literal_eval(line) for line in lines]
    assert plain == REVIEWS and lines[0].startswith("{u'username': u'Chaos Syren', u'hours': 0.1")
    with reading("steam", inputs) as data:
        assert events_of(data) == [
            (entry["username"], entry["product_id"], seconds(entry["date"])) for entry in plain
        ]
        assert items_of(data) == {
            "725280": (
                "Lost Summoner Kitty",
                None,
                None,
                ["Strategy", "Action"],
                "Kotoshiro Games",
                4.99,
            ),
            "328100": ('L\'été "π"\tx', None, None, ["Free to Play"], "P", 0.0),
            "999": (None,) * 6,
        }
        found = {path.name for paths in find_files("steam", inputs).values() for path in paths}
        assert data.semantic_ids is None
        assert found == {"steam_reviews.json.gz", "steam_games.json.gz"}
        first = [data.interactions.items.tolist(), data.item_names.to_pylist()]

    numbered = set()
    for seed in range(5):  # the numbers depend on the seed, what they stand for does not
        with reading("steam", inputs, seed=seed) as data:
            assert sorted(items_of(data)) == ["328100", "725280", "999"]
            numbered.add(tuple(data.item_names.to_pylist()))
            assert seed or first == [data.interactions.items.tolist(), data.item_names.to_pylist()]
    assert len(numbered) > 1
    with reading(
        "steam", folder_of(tmp_path / "json", write=json.dumps)
    ) as data:  # as some mirrors have it
        assert len(events_of(data)) == 5 and items_of(data)["725280"][0] == "Lost Summoner Kitty"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reviews": [*REVIEWS, "{u'username': "]},
            r"steam_reviews.json.gz: 1 of 6 lines cannot be used .*line 6",
        ),
        (
            {"reviews": [*REVIEWS, review("a", "1", "soon")]},
            r"1 of 6 interactions cannot be used .*time 1",
        ),
        (
            {"reviews": [*REVIEWS, review("", "1", "2017-01-01")]},
            r"1 of 6 interactions cannot be used .*user 1",
        ),
        ({"reviews": []}, r"steam_reviews.json.gz: the file is empty"),
        ({"games": []}, r"steam_games.json.gz: the file is empty"),
    ],
)
def test_steam_refuses(tmp_path, change, message):
    with (
        pytest.raises(UsageError, match=message),
        reading("steam", folder_of(tmp_path / "s", **change)),
    ):
        pass


def test_steam_skips_few_bad_lines_and_refuses_cut_gzip(tmp_path):
    inputs = folder_of(
        tmp_path / "s", reviews=[*REVIEWS, "__import__('os').abort()", "{'username': open('x')}"]
    )
    with reading("steam", inputs, max_bad_lines=0.3) as data:
        assert len(events_of(data)) == 5
        assert any("line 6" in step["step"] and "line 7" in step["step"] for step in data.funnel)
    path = inputs[0] / "steam_reviews.json.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with (
        pytest.raises(UsageError, match="steam_reviews.json.gz: not a whole gzip file"),
        reading("steam", inputs),
    ):
        pass


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.text(), max_size=2)
)
ENTRIES = st.dictionaries(
    st.sampled_from(["username", "product_id", "date", "id", "app_name", "tags", "price"]),
    VALUES,
    max_size=7,
)
LINES = st.lists(
    st.one_of(
        ENTRIES.map(repr),
        ENTRIES.map(python2),
        st.text(max_size=40),
        st.sampled_from([*map(python2, REVIEWS)]),
    )
)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(reviews=LINES, games=LINES, tail=st.binary(max_size=10))
def test_steam_fuzz(tmp_path_factory, reviews, games, tail):
    folder = tmp_path_factory.mktemp("fuzz")
    paths = [folder / "steam_reviews.json", folder / "steam_games.json"]
    for path, lines in zip(paths, [reviews, games], strict=True):
        path.write_bytes("\n".join(lines).encode("utf-8", "replace") + tail)
    refused_or_read("steam", paths)
