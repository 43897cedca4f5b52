"""Protocols against plain Python loops over random interactions."""

from collections import Counter
from datetime import UTC, datetime

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from igd_ds.data import protocols
from igd_ds.data.dataset import ROW_SCHEMA, Interactions, SourceData
from igd_ds.data.protocols import (
    DUPLICATES,
    PROTOCOLS,
    ProtocolOptions,
    d3,
    given,
    k_core,
    leave_one_out,
    number_users,
    order_by,
    sample_users,
    years_before,
)
from igd_ds.data.sources import sequences
from igd_ds.errors import UsageError

DAY = 86_400


def second(*when):
    return int(datetime(*when, tzinfo=UTC).timestamp())


def random_interactions(seed, users=30, items=12, count=300, timed=True):
    rng = np.random.default_rng(seed)
    times = (
        np.sort(rng.integers(0, 40, count)) if seed % 2 else rng.integers(0, 40, count)
    )  # many ties
    ids = rng.integers(0, users, count)
    return Interactions(
        ids.astype(np.int32)
        if seed % 3 == 0
        else ids * 1000 - 5000,  # numbers that can be counted with, and others
        rng.zipf(1.3, count).clip(1, items).astype(np.int32) - 1,
        times * DAY if timed else None,
    )


def source(interactions, num_items=15, splits=None):
    return SourceData([f"title {i}" for i in range(num_items)], None, interactions, splits=splits)


def listed(interactions):
    times = (
        [0] * len(interactions)
        if interactions.timestamps is None
        else interactions.timestamps.tolist()
    )
    return list(
        zip(
            interactions.users.tolist(),
            interactions.items.tolist(),
            times,
            range(len(interactions)),
            strict=True,
        )
    )


def sizes(events):
    return {
        "users": len({e[0] for e in events}),
        "items": len({e[1] for e in events}),
        "interactions": len(events),
    }


def brute_window(events, start, end):
    return [e for e in events if (start is None or e[2] >= start) and (end is None or e[2] <= end)]


def brute_duplicates(events, policy):
    met, kept = set(), []
    for event in sorted(events, key=lambda e: e[2:]) if policy == "first" else events:
        key = {"keep": event, "exact": event[:3], "first": event[:2]}[policy]
        if key not in met:
            kept.append(event)
        met.add(key)
    return sorted(kept, key=lambda e: e[3])


def brute_core(events, k):
    """Return the core and the sizes after each pass, without the last pass, which drops nothing.

    The first pass is always there.
    """
    passes = []
    while k:
        users, items = Counter(e[0] for e in events), Counter(e[1] for e in events)
        kept = [e for e in events if users[e[0]] >= k and items[e[1]] >= k]
        if passes and len(kept) == len(events):
            break
        events = kept
        passes.append(sizes(events))
    return events, passes


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
            rows.append(
                (
                    sequence[end][2],
                    sequence[end][3],
                    (user, history, sequence[end][1], sequence[end][2]),
                )
            )
    rows = [row for _, _, row in sorted(rows, key=lambda r: r[:2])]
    first, second = int(len(rows) * 0.8), int(len(rows) * 0.9)
    return {"train": rows[:first], "valid": rows[first:second], "test": rows[second:]}


def brute_cold(splits, rules):
    for name, column in {"cold_items": 2, "cold_users": 0}.items():
        if name in rules:
            warm = {row[column] for row in splits["train"]}
            kept = {
                split: [row for row in splits[split] if row[column] in warm]
                for split in ("valid", "test")
            }
            splits = splits | kept
    return splits


def rows_of(table, timed=True):
    columns = [table[name].to_pylist() for name in ("user_id", "history", "target", "timestamp")]
    assert timed or columns[3] == [None] * table.num_rows
    return list(zip(*columns[:3], columns[3] if timed else [0] * table.num_rows, strict=True))


def check(found, expected, timed=True):
    """Compare rows, whose items are places in kept_items, with rows that have the source's ids."""
    kept = found.kept_items.tolist()
    for name, table in found.splits.items():
        assert table.schema == ROW_SCHEMA
        rows = [
            (user, [kept[i] for i in history], kept[target], time)
            for user, history, target, time in rows_of(table, timed)
        ]
        assert rows == expected[name], name
        assert found.counts["rows"][name] == found.funnel[-1][name] == len(rows)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("timed", [True, False])
def test_leave_one_out_equals_a_loop(seed, k, timed, monkeypatch):
    monkeypatch.setattr(protocols, "ITEMS_PER_CHUNK", 16)
    interactions = random_interactions(seed, users=90, timed=timed)
    events, passes = brute_core(listed(interactions), k)
    found = leave_one_out(source(interactions), ProtocolOptions(max_history=4, k_core=k))
    expected = brute_leave_one_out(events, 4)
    check(found, expected, timed)
    assert found.kept_items.tolist() == (sorted({e[1] for e in events}) if k else list(range(15)))

    short = sum(len(sequence) < 3 for sequence in by_user(events).values())
    rows = {"users_too_short": short} | {name: len(rows) for name, rows in expected.items()}
    assert found.counts["rows"] == rows
    assert found.funnel == [
        {"step": "interactions of the source"} | sizes(listed(interactions)),
        *[{"step": f"3-core, pass {i}"} | left for i, left in enumerate(passes, start=1)],
        {"step": "rows"} | rows,
    ]

    check(
        leave_one_out(source(interactions), ProtocolOptions(0, k)),
        brute_leave_one_out(events, 10_000),
        timed,
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [0, 4])
def test_d3_equals_a_loop(seed, k, monkeypatch):
    monkeypatch.setattr(protocols, "ITEMS_PER_CHUNK", 16)
    interactions = random_interactions(seed, users=60)
    events, _ = brute_core(listed(interactions), k)
    found = d3(source(interactions), ProtocolOptions(max_history=3, k_core=k))
    check(found, brute_d3(events, 3))
    assert found.counts["rows"]["users_too_short"] == sum(
        len(s) == 1 for s in by_user(events).values()
    )


def test_leave_one_out_by_hand():
    users, items = (
        np.array([5, 9, 5, 5, 9, 5, 7, 7, 7]),
        np.array([0, 1, 2, 2, 3, 4, 1, 2, 3], dtype=np.int32),
    )
    found = leave_one_out(source(Interactions(users, items, None), 5), ProtocolOptions(20, 0))
    rows = {
        name: [row[:3] for row in rows_of(table, timed=False)]
        for name, table in found.splits.items()
    }
    assert rows == {
        "train": [(5, [0], 2)],
        "valid": [(5, [0, 2], 2), (7, [1], 2)],
        "test": [(5, [0, 2, 2], 4), (7, [1, 2], 3)],
    }
    assert found.counts["rows"]["users_too_short"] == 1


DAYS = st.integers(0, 8)
EVENTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4), DAYS), min_size=1, max_size=60)
RULES = {
    "window": st.tuples(st.none() | DAYS, st.none() | DAYS).filter(
        lambda days: None in days or days[0] <= days[1]
    ),
    "duplicates": st.sampled_from(sorted(DUPLICATES)),
    "k_core": st.integers(0, 3),
    "cold": st.sets(st.sampled_from(["cold_items", "cold_users"])),
}


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(EVENTS, st.fixed_dictionaries(RULES), st.sampled_from(["leave-one-out", "d3"]))
def test_rules_together_equal_loops(triples, rules, protocol):
    users, items, days = (np.array(column) for column in zip(*triples, strict=True))
    data = source(Interactions(users, items.astype(np.int32), days * DAY))
    start, end = (None if day is None else day * DAY for day in rules["window"])
    cold = dict.fromkeys(rules["cold"], "drop")
    options = ProtocolOptions(
        2, rules["k_core"], min_items=1, window=(start, end), duplicates=rules["duplicates"], **cold
    )
    # One item is enough for d3's window, so that its start moves back only if nothing is left.
    for begin in [start] if protocol == "leave-one-out" else [start, None]:
        windowed = brute_window(listed(data.interactions), begin, end)
        kept = brute_duplicates(windowed, options.duplicates)
        events, passes = brute_core(kept, options.k_core)
        if events:
            break
    if not events:
        with pytest.raises(
            UsageError, match="nothing is left after the .-core: pass 1 left|holds none of"
        ):
            PROTOCOLS[protocol](data, options)
        return
    before = {"leave-one-out": brute_leave_one_out, "d3": brute_d3}[protocol](events, 2)
    expected = brute_cold(before, rules["cold"])
    gone = {name: len(before[name]) - len(expected[name]) for name in ("valid", "test")}
    if any(gone[name] and not expected[name] for name in gone):
        with pytest.raises(
            UsageError, match=r"--cold_(items|users) drop leaves none of \d+ (valid|test) rows"
        ):
            PROTOCOLS[protocol](data, options)
        return
    found = PROTOCOLS[protocol](data, options)
    check(found, expected)
    steps = {
        step["step"]: {key: number for key, number in step.items() if key != "step"}
        for step in found.funnel
    }
    assert [left for step, left in steps.items() if "-core, pass" in step] == passes
    assert steps.get(f"duplicates: {options.duplicates}", sizes(windowed)) == sizes(kept)

    texts = [step.split(": ")[1].split() for step in steps if step.startswith("cold")]
    assert len(texts) == len(rules["cold"])
    assert [sum(int(words[i]) for words in texts) for i in (0, 3)] == list(gone.values())


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    st.integers(0, 30),
    st.lists(st.sampled_from([1, 2, 20, 31, 45, 63]), min_size=1, max_size=3),
    st.integers(0, 1000),
)
def test_order_by_equals_lexsort(length, bits, seed):
    rng = np.random.default_rng(seed)
    keys = []
    for width in bits:
        units = [unit for unit in (1, DAY) if unit < 2 ** (width - 1)] or [1]
        unit = int(rng.choice(units))
        key = rng.integers(-(2 ** (width - 1)) // unit, 2 ** (width - 1) // unit, length) * unit
        key[rng.random(length) < 0.5] = unit  # ties
        keys.append(key)
    small = [(key % 5).astype(np.int32) - 2 for key in keys]
    for each in (keys, small):
        assert order_by(*each).tolist() == np.lexsort(each[::-1]).tolist()


@pytest.mark.parametrize("min_items", [1, 3, 4, 7, 12, 15, 10_000])
@pytest.mark.parametrize(
    "start", [None, second(2016, 2, 29), second(2013, 1, 1), second(2000, 1, 1), second(2030, 1, 1)]
)
@pytest.mark.parametrize("end", [None, second(2016, 5, 1), second(2040, 1, 1)])
def test_d3_window_moves_back_a_calendar_year_at_a_time(min_items, start, end):
    # Every year at the end of April three users meet the same three new items, so that every whole
    # year adds three items to the core.
    times = (
        np.repeat([second(year, 5, 1) - 800 for year in range(2011, 2017)], 9)
        + np.tile(np.arange(9), 6) * 100
    )
    items = (np.repeat(np.arange(6), 9) * 3 + np.tile([0, 1, 2], 18)).astype(np.int32)
    data = Interactions(np.repeat(np.arange(18), 3), items, times)
    if start is not None and end is not None and start > end:
        with pytest.raises(UsageError, match="--from 2030-01-01 is after --to 2016-05-01"):
            ProtocolOptions(10, 3, window=(start, end))
        return
    anchor = datetime.fromtimestamp(times.max() if start is None else start, UTC)
    last = datetime.fromtimestamp(times.max() if end is None else end, UTC)
    expected = []
    for years in range(start is None, 100):
        leap_day = (anchor.month, anchor.day) == (2, 29) and (anchor.year - years) % 4
        begin = anchor.replace(year=anchor.year - years, day=28 if leap_day else anchor.day)
        window = brute_window(listed(data), begin.timestamp(), end)
        events, passes = brute_core(window, 3)
        text = f"window {begin:%Y-%m-%d} to {last:%Y-%m-%d}"
        core = sizes(events)
        if core["items"] >= min_items or begin.timestamp() <= times.min():
            break
        expected.append(
            {"step": f"{text}: {core['items']} items in the 3-core, fewer than {min_items:,}"}
            | core
        )
    expected.append(
        {"step": text + (", all there is" if core["items"] < min_items else "")} | sizes(window)
    )
    expected += [{"step": f"3-core, pass {i}"} | left for i, left in enumerate(passes, start=1)]
    found = d3(source(data, 18), ProtocolOptions(10, 3, min_items=min_items, window=(start, end)))
    assert found.counts["window"] == {"years": years} | core
    assert found.kept_items.tolist() == sorted({event[1] for event in events})
    assert found.funnel[1:-1] == expected

    check(found, brute_d3(events, 10))


def test_years_before():
    for moment, years, expected in [
        ((2017, 10, 1), 1, (2016, 10, 1)),
        ((2016, 2, 29, 23, 59, 59), 1, (2015, 2, 28, 23, 59, 59)),
        ((2016, 2, 29), 4, (2012, 2, 29)),
        ((2018, 10, 2, 13), 0, (2018, 10, 2, 13)),
        ((1970, 3, 1), 3, (1967, 3, 1)),
    ]:
        assert years_before(second(*moment), years) == second(*expected)


def test_window_of_leave_one_out():
    interactions = random_interactions(2, count=600)
    for start, end, text in [
        (10 * DAY, 25 * DAY, "window 1970-01-11 to 1970-01-26"),
        (10 * DAY + 1, None, "window from 1970-01-11"),
        (None, 25 * DAY - 1, "window to 1970-01-25"),
    ]:
        events = brute_window(listed(interactions), start, end)
        found = leave_one_out(source(interactions), ProtocolOptions(10, 0, window=(start, end)))
        check(found, brute_leave_one_out(events, 10))
        assert found.funnel[1] == {"step": text} | sizes(events)


def test_options_that_cannot_be():
    data = random_interactions(0)
    untimed = Interactions(data.users, data.items, None)
    milliseconds = Interactions(data.users, data.items, data.timestamps + 1_500_000_000_000)
    window = ProtocolOptions(10, 0, window=(0, None))
    for protocol, interactions, options, message in [
        (d3, untimed, ProtocolOptions(10, 5), "no timestamps; use --protocol leave-one-out"),
        (d3, milliseconds, ProtocolOptions(10, 5), "not milliseconds"),
        (leave_one_out, milliseconds, window, "not milliseconds"),
        (leave_one_out, untimed, window, "--from and --to .* no timestamps"),
        (
            leave_one_out,
            untimed,
            ProtocolOptions(10, 0, duplicates="exact"),
            "--duplicates exact .* no timestamps",
        ),
    ]:
        with pytest.raises(UsageError, match=message):
            protocol(source(interactions), options)
    with pytest.raises(UsageError, match="--duplicates last: must be one of keep, exact, first"):
        ProtocolOptions(10, 0, duplicates="last")
    with pytest.raises(UsageError, match="--cold_users yes: must be one of keep, drop"):
        ProtocolOptions(10, 0, cold_users="yes")

    found = leave_one_out(source(untimed), ProtocolOptions(10, 0, duplicates="first"))
    check(found, brute_leave_one_out(brute_duplicates(listed(untimed), "first"), 10), timed=False)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 100])
def test_k_core_equals_a_loop(k):
    for seed in range(5):
        interactions = random_interactions(seed, users=50, items=40)
        numbers, ids = number_users(interactions.users)
        assert (numbers if ids is None else ids[numbers]).tolist() == interactions.users.tolist()
        assert ids is None or ids.tolist() == sorted(set(interactions.users.tolist()))
        kept, passes = brute_core(listed(interactions), k)
        found = k_core(Interactions(numbers, interactions.items, None), k)
        assert np.flatnonzero(found[0]).tolist() == [e[3] for e in kept] and found[1] == passes


def a_chain():
    """User u meets items u and u + 1. The ends have one interaction, so a 2-core peels them."""
    users = np.repeat(np.arange(50), 2)
    return Interactions(
        users, (users + np.tile([0, 1], 50)).astype(np.int32), second(2014, 1, 1) + users * DAY
    )


def test_k_core_peels_a_chain_to_nothing():
    chain = a_chain()
    mask, passes = k_core(chain, 2)
    assert not mask.any() and passes[-1] == {"users": 0, "items": 0, "interactions": 0}
    closed = Interactions(chain.users, np.where(chain.items == 50, 0, chain.items), None)
    mask, passes = k_core(closed, 2)
    assert mask.all() and passes == [{"users": 50, "items": 50, "interactions": 100}]


@pytest.mark.parametrize("protocol", [leave_one_out, d3])
def test_the_rule_that_leaves_nothing_is_named(protocol):
    few = (
        "nothing is left after the 1000-core: pass 1 left 0 users, 0 items, 0 interactions. Lower "
        "--k_core or widen --from"
    )
    many = (
        "2-core: pass 1 left 50 users, 49 items, 98 .*; pass 2 left 48 .*; "
        r"pass 3 [^;…]* … pass \d+ [^;]*; pass \d+ left 0 u"
    )
    interval = "1999-10-01 to 2000-11-01" if protocol is leave_one_out else "to 2000-11-01"
    window = (
        f"the window {interval} holds none of 100 interactions, which lie between 2014-01-01 and "
        "2014-02-19; change --from"
    )

    nothing = Interactions(*(np.zeros(0, dtype) for dtype in (np.int64, np.int32, np.int64)))
    for interactions, options, message in [
        (random_interactions(1), ProtocolOptions(10, 1000), few),
        (a_chain(), ProtocolOptions(10, 2), many),
        (
            a_chain(),
            ProtocolOptions(10, 2, window=(second(1999, 10, 1), second(2000, 11, 1))),
            window,
        ),
        (nothing, ProtocolOptions(10, 0), "the source has no interactions"),
    ]:
        with pytest.raises(UsageError, match=message):
            protocol(source(interactions, 51), options)


def test_user_sample_is_seeded_and_nested():
    interactions = random_interactions(0)
    ids = interactions.users
    samples = [set(ids[sample_users(ids, n, 3)].tolist()) for n in (5, 9, 1000)]
    assert [len(s) for s in samples] == [5, 9, len(set(ids.tolist()))]
    assert samples[0] < samples[1] < samples[2]
    assert samples[1] != set(ids[sample_users(ids, 9, 4)].tolist())
    events = [event for event in listed(interactions) if event[0] in samples[1]]
    for protocol, brute in [(leave_one_out, brute_leave_one_out), (d3, brute_d3)]:
        found = protocol(source(interactions, 12), ProtocolOptions(10, 0, num_users=9, seed=3))
        check(found, brute(events, 10))
        assert len(found.kept_items) == 12 and found.counts["user_sample"] == sizes(events)
        assert found.funnel[-2] == {"step": "sample of 9 users"} | sizes(events)


def given_splits(seed):
    rng = np.random.default_rng(seed)
    splits = {}
    for name, count in [("train", 40), ("valid", 15), ("test", 15)]:
        columns = [
            (rng.integers(0, 20, count) * 10**12).tolist(),
            [rng.integers(0, 12, rng.integers(1, 9)).tolist() for _ in range(count)],
            rng.integers(0, 12, count).tolist(),
            rng.integers(0, 99, count).tolist(),
        ]
        table = pa.table(
            [
                pa.array(column, kind)
                for column, kind in zip(columns, ROW_SCHEMA.types, strict=True)
            ],
            ROW_SCHEMA.names,
        )

        splits[name] = pa.concat_tables(
            [table[:4], table[4:]]
        )  # several chunks, one with an offset
    return splits


@pytest.mark.parametrize("seed", range(4))
def test_given_takes_the_rows_of_the_source(seed):
    splits = given_splits(seed)
    rows = {name: rows_of(table) for name, table in splits.items()}
    data = source(Interactions(np.zeros(0, np.int64), np.zeros(0, np.int32), None), 13, splits)
    found = PROTOCOLS["given"](data, ProtocolOptions(0, 0))
    check(found, rows)
    assert found.kept_items.tolist() == list(range(13))
    assert found.counts == {"rows": {"train": 40, "valid": 15, "test": 15}}

    users = sorted({row[0] for split in rows.values() for row in split})
    sample = {users[i] for i in np.random.default_rng(5).permutation(len(users))[:12]}
    expected = {
        name: [(row[0], row[1][-3:], *row[2:]) for row in split if row[0] in sample]
        for name, split in rows.items()
    }
    check(given(data, ProtocolOptions(3, 0, num_users=12, seed=5)), expected)
    found = given(
        data, ProtocolOptions(3, 0, num_users=12, seed=5, cold_items="drop", cold_users="drop")
    )
    check(found, brute_cold(expected, {"cold_items", "cold_users"}))
    steps = [step["step"].split(":")[0] for step in found.funnel]
    assert steps == ["rows of the source", "sample of 12 users", "rows", "cold items", "cold users"]


def test_given_and_the_others_refuse_each_others_sources():
    data = source(random_interactions(0), 12, given_splits(0))
    for rule, flag in [
        ({"k_core": 5}, "--k_core 5"),
        ({"window": (None, 5)}, "--from and --to"),
        ({"duplicates": "first"}, "--duplicates first"),
    ]:
        with pytest.raises(UsageError, match=f"as they are; leave out {flag}$"):
            given(data, ProtocolOptions(**{"max_history": 0, "k_core": 0} | rule))
    with pytest.raises(UsageError, match="this source makes none; use another --protocol"):
        given(source(random_interactions(0)), ProtocolOptions(0, 0))
    for protocol in (leave_one_out, d3):
        with pytest.raises(
            UsageError, match="brings its own rows of train, valid and test; use --protocol given"
        ):
            protocol(data, ProtocolOptions(10, 0))


def test_real_sequences(shared):
    folder = shared / "data" / "books-small"
    data = sequences.read(
        None, {name: [folder / f"{name}.jsonl"] for name in ("items", "sequences")}
    )
    found = leave_one_out(data, ProtocolOptions(20, 0))
    rows = {
        name: [row[:3] for row in rows_of(table, timed=False)]
        for name, table in found.splits.items()
    }
    expected = brute_leave_one_out(listed(data.interactions), 20)
    assert rows == {name: [row[:3] for row in split] for name, split in expected.items()}
    assert [len(split) for split in rows.values()] == [93_177, 14_585, 14_585]
