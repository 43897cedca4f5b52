"""Protocols against plain Python loops over random interactions."""

from collections import Counter

import numpy as np
import pytest

from igd_ds.data import protocols
from igd_ds.data.dataset import Interactions
from igd_ds.data.protocols import YEAR, ProtocolOptions, d3, k_core, leave_one_out, sample_users
from igd_ds.data.sources.sequences import read_sequences


def random_interactions(seed, users=30, items=12, count=300, timed=True):
    rng = np.random.default_rng(seed)
    times = np.sort(rng.integers(0, 40, count)) if seed % 2 else rng.integers(0, 40, count)  # many ties
    return Interactions(
        rng.integers(0, users, count) * 1000 - 5000,
        rng.zipf(1.3, count).clip(1, items).astype(np.int32) - 1,
        times * 86_400 if timed else None,
    )


def listed(interactions):
    times = [0] * len(interactions) if interactions.timestamps is None else interactions.timestamps.tolist()
    return list(zip(interactions.users.tolist(), interactions.items.tolist(), times, range(len(interactions)), strict=True))


def brute_core(events, k):
    while k:
        users, items = Counter(e[0] for e in events), Counter(e[1] for e in events)
        kept = [e for e in events if users[e[0]] >= k and items[e[1]] >= k]
        if len(kept) == len(events):
            break
        events = kept
    return events


def by_user(events):
    sequences = {}
    for event in sorted(events, key=lambda e: (e[0], e[2], e[3])):
        sequences.setdefault(event[0], []).append(event)
    return sequences


def brute_leave_one_out(events, max_history):
    splits = {"train": [], "valid": [], "test": []}
    for user, sequence in by_user(events).items():
        if len(sequence) < 3:
            continue
        for end in range(1, len(sequence)):
            name = {len(sequence) - 1: "test", len(sequence) - 2: "valid"}.get(end, "train")
            history = [e[1] for e in sequence[:end]][-max_history:]
            splits[name].append((user, history, sequence[end][1], sequence[end][2]))
    return splits


def brute_d3(events, max_history):
    rows = []
    for user, sequence in by_user(events).items():
        for end in range(1, len(sequence)):
            history = [e[1] for e in sequence[max(end - max_history, 0) : end]]
            rows.append((sequence[end][2], sequence[end][3], (user, history, sequence[end][1], sequence[end][2])))
    rows = [row for _, _, row in sorted(rows, key=lambda r: r[:2])]
    first, second = int(len(rows) * 0.8), int(len(rows) * 0.9)
    return {"train": rows[:first], "valid": rows[first:second], "test": rows[second:]}


def rows_of(table, timed=True):
    columns = [table[name].to_pylist() for name in ("user_id", "history", "target", "timestamp")]
    assert timed or columns[3] == [None] * table.num_rows
    return list(zip(*columns[:3], columns[3] if timed else [0] * table.num_rows, strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("timed", [True, False])
def test_leave_one_out_equals_a_loop(seed, k, timed, monkeypatch):
    monkeypatch.setattr(protocols, "ROWS_PER_CHUNK", 16)
    interactions = random_interactions(seed, users=90, timed=timed)
    events = brute_core(listed(interactions), k)
    found = leave_one_out(interactions, 15, ProtocolOptions(max_history=4, k_core=k))
    expected = brute_leave_one_out(events, 4)
    assert {name: rows_of(table, timed) for name, table in found.splits.items()} == expected
    short = sum(len(sequence) < 3 for sequence in by_user(events).values())
    assert found.counts["rows"] == {"users_too_short": short} | {name: len(rows) for name, rows in expected.items()}
    assert found.kept_items.tolist() == (sorted({e[1] for e in events}) if k else list(range(15)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [0, 4])
def test_d3_equals_a_loop(seed, k, monkeypatch):
    monkeypatch.setattr(protocols, "ROWS_PER_CHUNK", 16)
    interactions = random_interactions(seed, users=60)
    events = brute_core(listed(interactions), k)
    found = d3(interactions, 15, ProtocolOptions(max_history=3, k_core=k))
    assert {name: rows_of(table) for name, table in found.splits.items()} == brute_d3(events, 3)
    assert found.counts["rows"]["users_too_short"] == sum(len(s) == 1 for s in by_user(events).values())


def test_leave_one_out_by_hand():
    users, items = np.array([5, 9, 5, 5, 9, 5, 7, 7, 7]), np.array([0, 1, 2, 2, 3, 4, 1, 2, 3], dtype=np.int32)
    found = leave_one_out(Interactions(users, items, None), 5, ProtocolOptions(20, 0))
    rows = {name: [row[:3] for row in rows_of(table, timed=False)] for name, table in found.splits.items()}
    assert rows == {
        "train": [(5, [0], 2)],
        "valid": [(5, [0, 2], 2), (7, [1], 2)],
        "test": [(5, [0, 2, 2], 4), (7, [1, 2], 3)],
    }
    assert found.counts["rows"]["users_too_short"] == 1


@pytest.mark.parametrize("min_items", [1, 3, 4, 7, 12, 15, 10_000])
def test_d3_window_moves_back_a_year_at_a_time(min_items):
    # Every year three users meet the same three new items, so every whole year adds three items to the core.
    times = np.repeat(np.arange(6), 9) * YEAR + np.tile(np.arange(9), 6) * 100
    items = (np.repeat(np.arange(6), 9) * 3 + np.tile([0, 1, 2], 18)).astype(np.int32)
    data = Interactions(np.repeat(np.arange(18), 3), items, times)
    for years in range(1, 7):
        start = times.max() - years * YEAR
        events = brute_core([event for event in listed(data) if event[2] >= start], 3)
        if len({event[1] for event in events}) >= min_items:
            break
    found = d3(data, 18, ProtocolOptions(10, 3, min_items=min_items))
    assert found.counts["window"]["years"] == years == min(-(-min_items // 3), 6)
    assert found.kept_items.tolist() == sorted({event[1] for event in events})
    assert {name: rows_of(table) for name, table in found.splits.items()} == brute_d3(events, 10)


def test_d3_refuses_data_without_seconds():
    data = random_interactions(0)
    with pytest.raises(ValueError, match="no timestamps"):
        d3(Interactions(data.users, data.items, None), 12, ProtocolOptions(10, 5))
    with pytest.raises(ValueError, match="not milliseconds"):
        d3(Interactions(data.users, data.items, data.timestamps + 1_500_000_000_000), 12, ProtocolOptions(10, 5))


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 100])
def test_k_core_equals_a_loop(k):
    for seed in range(5):
        interactions = random_interactions(seed, users=50, items=40)
        kept = [e[3] for e in brute_core(listed(interactions), k)]
        assert np.flatnonzero(k_core(interactions, k)).tolist() == kept


def test_k_core_peels_a_chain_to_nothing():
    # A path: user u meets items u and u+1. Its ends have one interaction, so a 2-core eats it one by one.
    users = np.repeat(np.arange(50), 2)
    items = (users + np.tile([0, 1], 50)).astype(np.int32)
    assert not k_core(Interactions(users, items, None), 2).any()
    closed = np.where(items == 50, 0, items).astype(np.int32)
    assert k_core(Interactions(users, closed, None), 2).all()


@pytest.mark.parametrize("protocol", [leave_one_out, d3])
def test_nothing_left_is_empty_not_a_crash(protocol):
    interactions = random_interactions(1)
    found = protocol(interactions, 12, ProtocolOptions(10, 1000))
    assert [table.num_rows for table in found.splits.values()] == [0, 0, 0] and len(found.kept_items) == 0


def test_user_sample_is_seeded_and_nested():
    interactions = random_interactions(0)
    samples = [set(interactions.users[sample_users(interactions, n, 3)].tolist()) for n in (5, 9, 1000)]
    assert [len(s) for s in samples] == [5, 9, len(set(interactions.users.tolist()))]
    assert samples[0] < samples[1] < samples[2]
    assert samples[1] != set(interactions.users[sample_users(interactions, 9, 4)].tolist())
    found = leave_one_out(interactions, 12, ProtocolOptions(10, 0, num_users=9, seed=3))
    users = {user for table in found.splits.values() for user in table["user_id"].to_pylist()}
    assert users == {u for u in samples[1] if np.count_nonzero(interactions.users == u) >= 3}
    assert len(found.kept_items) == 12


def test_real_sequences(shared):
    data = read_sequences([shared / "data" / "books-small"], 0, 0, 0)
    found = leave_one_out(data.interactions, len(data.titles), ProtocolOptions(20, 0))
    rows = {name: [row[:3] for row in rows_of(table, timed=False)] for name, table in found.splits.items()}
    expected = brute_leave_one_out(listed(data.interactions), 20)
    assert rows == {name: [row[:3] for row in split] for name, split in expected.items()}
    assert [len(split) for split in rows.values()] == [93_177, 14_585, 14_585]
