"""Sources: the shared data's layout, its errors, and the synthetic generator with its rule."""

import json
from collections import Counter

import numpy as np
import pytest
from raw_source import reading

from igd_ds.data.protocols import ProtocolOptions, leave_one_out
from igd_ds.data.sources import find_files
from igd_ds.data.sources.synthetic import (
    EPSILON,
    SUCCESSOR_PROBS,
    make_chain,
    make_synthetic,
)
from igd_ds.errors import UsageError

ITEMS = [
    {"item_id": 1, "title": "b"},
    {"item_id": 0, "title": None},
    {"item_id": 2, "title": "c", "extra": 1},
]
USERS = [
    {"user_id": 4, "items": [0, 1, 1]},
    {"user_id": 2, "items": []},
    {"user_id": 3, "items": [2]},
]


def folder_of(path, items=ITEMS, users=USERS):
    path.mkdir(exist_ok=True)
    for name, entries in [("items", items), ("sequences", users)]:
        text = "".join(
            (entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries
        )
        (path / f"{name}.jsonl").write_text(text)
    return path


def read(name, *inputs, **options):
    with reading(name, inputs, **options) as data:
        return data


def test_sequences_reads_items_in_any_order(tmp_path):
    data = read("sequences", folder_of(tmp_path / "s"))
    assert data.titles == [None, "b", "c"]
    assert data.semantic_ids is None
    assert data.interactions.timestamps is None
    assert data.interactions.users.tolist() == [4, 4, 4, 3]
    assert data.interactions.items.tolist() == [0, 1, 1, 2]
    assert (data.interactions.users.dtype, data.interactions.items.dtype) == (np.int64, np.int32)
    found = find_files("sequences", [tmp_path / "s"])
    assert [path.name for paths in found.values() for path in paths] == [
        "items.jsonl",
        "sequences.jsonl",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"items": [*ITEMS, {"item_id": 1, "title": "x"}]},
            r"items.jsonl:4: duplicate item_id 1, first on line 1",
        ),
        (
            {"items": [*ITEMS, {"item_id": 4, "title": "x"}]},
            r"items.jsonl: 4 items, but no item_id 3",
        ),
        ({"items": [*ITEMS, "{"]}, r"items.jsonl:4: not valid JSON"),
        ({"items": [*ITEMS, "[]"]}, r"items.jsonl:4: need an object with an integer item_id"),
        ({"items": [*ITEMS, {"item_id": True}]}, r"items.jsonl:4: need an object"),
        (
            {"items": [{"item_id": 0, "title": 5}]},
            r"items.jsonl:1: title must be a string or null, found 5",
        ),
        (
            {"items": [{"item_id": 0, "semantic_id": [5]}]},
            r"items.jsonl:1: semantic_id must be a list of strings",
        ),
        (
            {"items": [*ITEMS, {"item_id": 3, "semantic_id": ["a"]}]},
            r"items.jsonl:4: item 3 has a semantic_id, unlike",
        ),
        ({"items": []}, r"items.jsonl: no items"),
        (
            {"users": [*USERS, {"user_id": 4, "items": [0]}]},
            r"sequences.jsonl:4: duplicate user_id 4, first on line 1",
        ),
        (
            {"users": [*USERS, {"user_id": 5, "items": [0, 3]}]},
            r"sequences.jsonl:4: item 3 of user 5 is not in items.jsonl",
        ),
        ({"users": [{"user_id": 5, "items": [-1]}]}, r"sequences.jsonl:1: item -1"),
        (
            {"users": [{"user_id": 5, "items": ["0"]}]},
            r"sequences.jsonl:1: items must be a list of item ids",
        ),
        (
            {"users": [{"user_id": 5, "items": [1.5]}]},
            r"sequences.jsonl:1: items must be a list of item ids",
        ),
        (
            {"users": [{"user_id": 5, "items": [[1], 2]}]},
            r"sequences.jsonl:1: items must be a list of item ids",
        ),
        ({"users": [{"user_id": 5}]}, r"sequences.jsonl:1: items must be a list of item ids"),
        (
            {"users": [{"user_id": "5", "items": [1]}]},
            r"sequences.jsonl:1: need an object with an integer user_id",
        ),
    ],
)
def test_sequences_errors_name_file_and_line(tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        read("sequences", folder_of(tmp_path / "s", **change))


def test_sequences_refuses_a_line_without_end(tmp_path):
    folder = folder_of(tmp_path / "s")
    with open(folder / "sequences.jsonl", "ab") as file:
        file.truncate((1 << 24) * 20)  # zeros without a newline
    with pytest.raises(UsageError, match=r"sequences.jsonl:4: the line is longer than 16 MiB"):
        read("sequences", folder)


def test_sequences_refuses_wrong_arguments(tmp_path):
    with pytest.raises(UsageError, match=r"needs --input with items \(items.jsonl\), got nothing"):
        read("sequences")
    folder_of(tmp_path / "s")
    (tmp_path / "s" / "items.jsonl").unlink()
    with pytest.raises(UsageError, match="needs --input with items"):
        read("sequences", tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "users", "items", "interactions", "levels"),
    [
        ("books-small", 14_585, 6_344, 136_932, None),
        ("instruments", 24_772, 9_922, 206_153, 4),
        ("industrial", 3_285, 3_686, 22_743, 3),
    ],
)
def test_real_data_has_the_documented_size(shared, name, users, items, interactions, levels):
    data = read("sequences", shared / "data" / name)
    assert (len(np.unique(data.interactions.users)), len(data.titles), len(data.interactions)) == (
        users,
        items,
        interactions,
    )
    assert (
        data.semantic_ids is None
        if levels is None
        else {len(codes) for codes in data.semantic_ids} == {levels}
    )


@pytest.fixture(scope="module")
def synthetic():
    return make_synthetic(600, 1500, 0)


def test_synthetic_depends_on_the_seed_alone(synthetic):
    again, other = read("synthetic"), read("synthetic", seed=1)
    assert again.titles == synthetic.titles != other.titles
    for name in ("users", "items", "timestamps"):
        assert np.array_equal(
            getattr(again.interactions, name), getattr(synthetic.interactions, name)
        )


def test_synthetic_catalogue_looks_real(synthetic):
    chain = make_chain(600, 0)
    assert chain.titles == synthetic.titles and len(synthetic.titles) == 600
    shared = [count for count in Counter(synthetic.titles).values() if count > 1]
    assert 2 <= len(shared) <= 6
    cold = chain.draw_probs == 0
    assert 0.02 < cold.mean() < 0.09
    assert not cold[chain.successors].any() and not cold[synthetic.interactions.items].any()
    # Titles share their stem within a series and first words across series; ids are in no order.
    stems = Counter(title.split(",")[0] for title in synthetic.titles)
    assert 100 < len(stems) < 150
    assert max(stems.values()) <= 9
    assert len({stem.split()[0] for stem in stems}) == 32
    assert any("&amp;" in title for title in synthetic.titles)
    assert np.corrcoef(np.arange(600), chain.draw_probs)[0, 1] < 0.15


def test_synthetic_users_follow_the_rule(synthetic):
    chain, data = make_chain(600, 0), synthetic.interactions
    same = data.users[1:] == data.users[:-1]
    followed = chain.successors[data.items[:-1][same]] == data.items[1:][same][:, None]
    draws = (
        EPSILON * chain.draw_probs[data.items[1:][same]].mean()
    )  # a draw may hit a successor too
    expected = (1 - EPSILON) * SUCCESSOR_PROBS
    assert np.allclose(followed.mean(axis=0), expected, atol=0.03 + draws)
    assert (np.diff(data.timestamps)[same] >= 0).all()
    assert (np.diff(data.timestamps)[same] == 0).any()
    lengths = np.bincount(data.users)
    assert lengths.min() >= 5 and lengths.max() <= 50 and 9 < lengths.mean() < 11


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_rule_reaches_the_hit_rates_of_the_docstring(synthetic, k):
    chain = make_chain(600, 0)
    rows = leave_one_out(synthetic, ProtocolOptions(20, 0))
    test = rows.splits["test"]
    last = np.array([history[-1] for history in test["history"].to_pylist()])
    targets = test["target"].to_numpy()
    law = np.tile(
        EPSILON * chain.draw_probs, (len(last), 1)
    )  # (R, N): the rule's exact distribution
    for column, prob in enumerate(SUCCESSOR_PROBS):
        law[np.arange(len(last)), chain.successors[last, column]] += (1 - EPSILON) * prob
    assert np.allclose(law.sum(axis=1), 1)

    best = np.argsort(-law, axis=1, kind="stable")[:, :k]
    expected = np.take_along_axis(law, best, axis=1).sum(axis=1).mean()
    assert (best == targets[:, None]).any(axis=1).mean() == pytest.approx(expected, abs=0.04)

    # What the docstring promises.
    popular = np.argsort(
        -np.bincount(rows.splits["train"]["target"].to_numpy(), minlength=600), kind="stable"
    )[:k]
    if k == 10:
        assert round(expected, 2) == 0.83 and round(np.isin(targets, popular).mean(), 2) == 0.12
    if k == 1:
        assert round(expected, 2) == 0.48


def test_synthetic_scales(synthetic):
    data = make_synthetic(100_000, 20_000, 0)
    assert len(data.titles) == 100_000
    assert len(set(data.titles)) == 99_500
    assert len(np.unique(data.interactions.users)) == 20_000


def test_synthetic_refuses_wrong_arguments(tmp_path):
    with pytest.raises(UsageError, match="leave out --input"):
        find_files("synthetic", [tmp_path])
    with pytest.raises(UsageError, match="at least 10 items"):
        make_synthetic(3, 10, 0)
