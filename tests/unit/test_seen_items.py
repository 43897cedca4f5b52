"""Items that users have met before, compared with a walk over each user's complete sequence."""

import json

import numpy as np
import pyarrow as pa
import pytest
import tiny_run

from igd_ds.config.options import checked
from igd_ds.data import dataset as dataset_module
from igd_ds.data.dataset import (
    InteractionDataset,
    Interactions,
    SourceData,
    item_table,
    user_table,
    write_dataset,
)
from igd_ds.data.protocols import PROTOCOLS, ProtocolOptions
from igd_ds.data.seen_items import SeenItems, with_seen
from igd_ds.eval_config import EvalConfig

NUM_ITEMS = 25


def source(seed=0):
    """Return random users of 1 to 12 interactions, whose times are all different."""
    random = np.random.default_rng(seed)
    users = np.repeat(np.arange(40), random.integers(1, 13, 40))
    times = random.permutation(len(users)).astype(np.int64)
    items = random.integers(0, NUM_ITEMS, len(users)).astype(np.int32)
    titles = [f"item {number}" for number in range(NUM_ITEMS)]
    return SourceData(titles, None, Interactions(users, items, times))


def prepared(folder, protocol, monkeypatch, **options):
    """Write a dataset whose histories are cut to two items; return it and its source."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    data = source()
    given = {"max_history": 2, "k_core": 0, "min_items": 1} | options
    rows = PROTOCOLS[protocol](data, ProtocolOptions(**given))
    titles = [data.titles[item] for item in rows.kept_items]
    names = pa.array(rows.kept_items.astype(str))
    users = user_table(rows.splits, None)
    info = tiny_run.INFO | {"protocol": protocol}
    write_dataset(folder / "data", item_table(titles, None, names), users, rows.splits, info)
    return InteractionDataset.load(folder / "data"), data.interactions, rows.kept_items


@pytest.mark.parametrize(
    ("protocol", "options"),
    [("leave-one-out", {}), ("d3", {"window": (0, 10**6)}), ("d3", {"cold_items": "drop"})],
)
def test_what_a_cut_history_lost_is_known_from_earlier_rows(
    tmp_path, monkeypatch, protocol, options
):
    dataset, events, kept = prepared(tmp_path, protocol, monkeypatch, **options)
    order = np.argsort(events.timestamps)
    lost = 0
    for name, split in dataset.splits.items():
        seen = dataset.seen_items(name)
        repeats = []
        for row, found in enumerate(seen.of(np.arange(len(split)))):
            # A row is the last interaction of its user that its history and target belong to.
            of_user = order[events.users[order] == split.user_ids[row]]
            items, times = events.items[of_user], events.timestamps[of_user]
            place = len(items) - {"valid": 2, "test": 1}.get(name, 0)
            if protocol == "d3":
                place = int(np.flatnonzero(times == split.timestamps[row])[0])
            elif name == "train":
                earlier = split.user_ids[:row] == split.user_ids[row]
                place = 1 + int(earlier.sum())
            met = set(items[:place].tolist())
            assert {int(kept[item]) for item in found} <= met
            if "cold_items" not in options:  # else rows are missing whose targets were met
                assert {int(kept[item]) for item in found} == met
            assert set(split.history(row)) <= set(found)
            lost += len(set(found)) > len(set(split.history(row)))
            repeats.append(split.targets[row] in found)
        assert seen.is_repeat().tolist() == repeats and 0 < sum(repeats) < len(repeats)
    assert lost > 20


def test_rows_without_a_known_order_count_their_own_history_alone(tmp_path, monkeypatch):
    dataset, *_ = prepared(tmp_path, "leave-one-out", monkeypatch)
    for split in dataset.splits.values():
        seen = SeenItems.build(dataset.splits, split.name, "given")
        rows = np.arange(len(split))
        for row, found in enumerate(seen.of(rows)):
            assert np.array_equal(found, split.history(row))
        in_history = [split.targets[row] in split.history(row) for row in rows]
        assert seen.is_repeat().tolist() == in_history


def test_auto_is_decided_once_and_stands_in_the_dataset(tmp_path, monkeypatch):
    dataset, *_ = prepared(tmp_path, "leave-one-out", monkeypatch)
    rate = dataset.seen_items("train").is_repeat().mean()
    path = tmp_path / "data" / "dataset.json"
    info = json.loads(path.read_text())
    assert info["repeats"] == {"training_targets": rate, "exclude_seen": "no"} and rate > 0.1
    card = (tmp_path / "data" / "README.md").read_text()
    assert f"{100 * rate:.1f} % of the training targets are items" in card
    assert "`--exclude_seen auto` keeps seen items in" in card
    assert [dataset.excludes_seen(asked) for asked in ("auto", "yes", "no")] == [False, True, False]
    assert "kept in the lists (--exclude_seen auto" in dataset.describe_exclusion("auto")

    # A dataset of an earlier version does not say so.
    del info["repeats"]
    path.write_text(json.dumps(info))
    older = InteractionDataset.load(tmp_path / "data")
    assert older.repeat_rate == rate and older.fingerprint == dataset.fingerprint
    monkeypatch.setattr(dataset_module, "MOST_REPEATS", rate)
    assert older.excludes_seen("auto")
    assert "left out of the lists (--exclude_seen auto" in older.describe_exclusion("auto")


def test_deny_lists_with_seen_items():
    seen = [np.array([1, 2]), np.array([3])]
    assert [found.tolist() for found in with_seen(None, seen)] == [[1, 2], [3]]
    both = with_seen([np.array([7]), None], seen)
    assert [found.tolist() for found in both] == [[7, 1, 2], [3]]


def test_yaml_reads_yes_and_no_as_booleans():
    words = [checked(EvalConfig, "exclude_seen", value, "t.yaml") for value in (True, False, "no")]
    assert words == ["yes", "no", "no"]
