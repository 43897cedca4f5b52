"""Source `yelp` on files in the published form, against json.loads per line."""

import calendar
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_source import events_of, items_of, reading, refused_or_read

from igd_ds.errors import UsageError


def review(user, business, date, **more):
    start = {
        "review_id": "KU_O5udG6zpxOg-VcAEodg",
        "user_id": user,
        "business_id": business,
        "stars": 3.0,
        "useful": 0,
    }
    return start | {"funny": 0, "cool": 0, "text": 'If you decide\n"this" …', "date": date} | more


def business(key, name, categories, city="Santa Barbara", state="CA"):
    start = {
        "business_id": key,
        "name": name,
        "address": "1616 Chapala St, Ste 2",
        "city": city,
        "state": state,
    }
    rest = {"postal_code": "93101", "latitude": 34.4, "stars": 5.0, "review_count": 7, "is_open": 0}
    return (
        start
        | rest
        | {"attributes": {"ByAppointmentOnly": "True"}, "categories": categories, "hours": None}
    )


REVIEWS = [
    review("mh_-eMZ6K5RLWhZyISBhwA", "XQfwVwDr-v0ZS3_CbbE5Xw", "2018-07-07 22:09:11"),
    review("OyoGAe7OKpv6SyGZT5g77Q", "7ATYjTIgM3jUlt4UM3IypQ", "2012-01-03 15:28:18"),
    review("mh_-eMZ6K5RLWhZyISBhwA", "7ATYjTIgM3jUlt4UM3IypQ", "2018-07-07 22:09:10", stars=1.0),
    review("mh_-eMZ6K5RLWhZyISBhwA", "gone", "2005-02-16 03:23:22"),
]
BUSINESSES = [
    business(
        "XQfwVwDr-v0ZS3_CbbE5Xw",
        "Café “L'Été” \t滋味",
        "Restaurants, Food ,Bubble Tea,, Ice Cream & Frozen Yogurt",
    ),
    business("7ATYjTIgM3jUlt4UM3IypQ", "", None, city="", state=""),
    business("never", "Never reviewed", "Pubs", state=""),
]


def folder_of(folder, reviews=REVIEWS, businesses=BUSINESSES):
    folder.mkdir()
    for name, entries in [("review", reviews), ("business", businesses)]:
        text = "".join(
            (entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries
        )
        (folder / f"yelp_academic_dataset_{name}.json").write_text(text)
    return [folder]


def test_yelp_equals_plain_parsing(tmp_path):
    inputs = folder_of(tmp_path / "yelp")
    (tmp_path / "yelp" / "yelp_academic_dataset_tip.json").write_text(
        '{"user_id": "a", "business_id": "b", "date": "", "text": ""}'
    )
    lines = (tmp_path / "yelp" / "yelp_academic_dataset_review.json").read_text().splitlines()
    plain = [json.loads(line) for line in lines]
    times = [calendar.timegm(time.strptime(entry["date"], "%Y-%m-%d %H:%M:%S")) for entry in plain]

    with reading("yelp", inputs) as data:
        assert events_of(data) == [
            (e["user_id"], e["business_id"], t) for e, t in zip(plain, times, strict=True)
        ]
        categories = ["Restaurants", "Food", "Bubble Tea", "Ice Cream & Frozen Yogurt"]
        assert items_of(data) == {
            "XQfwVwDr-v0ZS3_CbbE5Xw": (
                "Café “L'Été” \t滋味",
                None,
                "Santa Barbara, CA",
                categories,
                None,
                None,
            ),
            "7ATYjTIgM3jUlt4UM3IypQ": ("", None, None, None, None, None),
            "gone": (None,) * 6,
        }
        assert data.semantic_ids is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reviews": [*REVIEWS, '{"user_id": "a"']},
            r"yelp_academic_dataset_review.json: 1 of 5 lines cannot be used .*line 5",
        ),
        (
            {"reviews": [*REVIEWS, review("a", "b", "02/03/2018")]},
            r"1 of 5 interactions cannot be used .*time 1",
        ),
        (
            {"reviews": [*REVIEWS, review(None, "b", "2018-02-03 00:00:00")]},
            r"1 of 5 interactions cannot be used .*user 1",
        ),
        ({"reviews": []}, r"yelp_academic_dataset_review.json: the file is empty"),
    ],
)
def test_yelp_refuses(tmp_path, change, message):
    with (
        pytest.raises(UsageError, match=message),
        reading("yelp", folder_of(tmp_path / "y", **change)),
    ):
        pass


KEYS = ["user_id", "business_id", "date", "name", "categories", "city"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda part: st.lists(part, max_size=2),
    max_leaves=3,
)
ENTRIES = st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6).map(json.dumps)
LINES = st.lists(
    st.one_of(
        ENTRIES, st.text(max_size=30), st.sampled_from([*map(json.dumps, REVIEWS + BUSINESSES)])
    ),
    max_size=6,
)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(reviews=LINES, businesses=LINES, tail=st.binary(max_size=10))
def test_yelp_fuzz(tmp_path_factory, reviews, businesses, tail):
    folder = tmp_path_factory.mktemp("fuzz")
    paths = [folder / f"yelp_academic_dataset_{name}.json" for name in ("review", "business")]
    for path, lines in zip(paths, [reviews, businesses], strict=True):
        path.write_bytes("\n".join(lines).encode("utf-8", "replace") + tail)
    refused_or_read("yelp", paths)
