"""Protocols: from interactions to the rows of train, valid and test (METHOD 4). Vectorised; 50 million interactions are fine.

Letters: I interactions, U users, R rows. A row is (history, target): what a user met before, oldest first, and what came next.
Within a user interactions are ordered by time, equal times and data without timestamps by position in the file.

The rules apply in this order: time window, duplicates, k-core, user sample, rows, cold items and users.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone

import numpy as np
import pyarrow as pa

from igd_ds.data.dataset import ROW_SCHEMA, SPLITS, Interactions, SourceData
from igd_ds.errors import UsageError

LATEST_SECOND = 10**11  # the year 5138: larger timestamps are milliseconds
ITEMS_PER_CHUNK = (
    1 << 22
)  # history items are gathered in chunks of rows: bounds the index arrays (assumed)
COLD = ("keep", "drop")
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class ProtocolOptions:
    """What a protocol may be told.

    `max_history`: items kept per history, the last ones, 0 = all; `k_core`: least interactions per user and item, 0 = off;
    `min_items`: items that a `d3` window must hold (METHOD 4: 10,000); `window`: first and last second, both included, None =
    open (`d3` moves the start, see there); `duplicates`: a name of DUPLICATES; `cold_items` and `cold_users`, "keep" or "drop":
    valid and test rows whose target is no training row's target, or whose user has no training row; `num_users`, `seed`: a
    seeded sample of users after the core, 0 = all.
    """

    max_history: int
    k_core: int
    min_items: int = 10_000
    window: tuple[int | None, int | None] = (None, None)
    duplicates: str = "keep"
    cold_items: str = "keep"
    cold_users: str = "keep"
    num_users: int = 0
    seed: int = 0

    def __post_init__(self):
        for name, known in [("duplicates", DUPLICATES), ("cold_items", COLD), ("cold_users", COLD)]:
            if getattr(self, name) not in known:
                raise UsageError(
                    f"--{name} {getattr(self, name)}: must be one of {', '.join(known)}"
                )
        start, end = self.window
        if start is not None and end is not None and start > end:
            raise UsageError(f"--from {date(start)} is after --to {date(end)}")


@dataclass(frozen=True)
class Rows:
    """The rows of the three splits (tables of ROW_SCHEMA), and what remained at each stage.

    `kept_items` int64 ascending: the catalogue, namely every item when k_core is 0, else the items of the core. An item's number
    in `splits` is its place in `kept_items`. `counts` maps a stage to its numbers; `funnel` lists every step in order, each a
    dict of `step` (a text) and what it left: `users`, `items`, `interactions`, or rows per split.
    """

    splits: dict[str, pa.Table]
    kept_items: np.ndarray
    counts: dict[str, dict[str, int]]
    funnel: list[dict]


@dataclass(frozen=True)
class _Sequences:
    """Interactions ordered by user, time and position in the file.

    `users` int64 (U,): the source's numbers, ascending; user u's interactions are those from bounds[u] to bounds[u + 1];
    `owner` (I,): which user an interaction belongs to; `items` int32 (I,); `times` int64 (I,) or None.
    """

    users: np.ndarray
    bounds: np.ndarray
    owner: np.ndarray
    items: np.ndarray
    times: np.ndarray | None


def leave_one_out(data: SourceData, options: ProtocolOptions) -> Rows:
    """Per user the last item is test, the second-last validation; every prefix (of 2 or more) of the rest is a training row.

    A user with fewer than three interactions has no history for the validation row: left out and counted. Rows are ordered by
    user id, then time.

    Raises ValueError when a rule leaves nothing, and for a window or `exact` duplicates without timestamps in seconds.
    """
    interactions, user_ids, funnel = _opened(data)
    counts = {"source": size(interactions)}
    if options.window != (None, None):
        _need_seconds(
            interactions,
            "--from and --to choose by time and this source has no timestamps; leave them out",
        )
        interactions = _in_window(interactions, *options.window)
        funnel.append({"step": _window_text(*options.window)} | size(interactions))
    interactions, steps = _reduced(interactions, options)
    funnel += steps
    if options.k_core:
        counts["k_core"] = size(interactions)
    kept, interactions = _catalogue(interactions, len(data.titles), options, steps)
    interactions = _sampled(interactions, options, counts, funnel)
    sequences, _ = _sequences(interactions, user_ids)
    del interactions  # the rows need the memory
    lengths = np.diff(sequences.bounds)
    long = lengths >= 3
    counts["rows"] = {"users_too_short": int(np.count_nonzero(~long))}
    last = sequences.bounds[1:][long] - 1
    is_train = np.repeat(long, lengths)
    for held_out in (sequences.bounds[:-1], last, last - 1):
        is_train[held_out] = False
    targets = {
        "train": np.flatnonzero(is_train).astype(last.dtype),
        "valid": last - 1,
        "test": last,
    }
    return _finished(
        _tables(sequences, targets, options.max_history), kept, options, counts, funnel
    )


def d3(data: SourceData, options: ProtocolOptions) -> Rows:
    """Chronological split of D3 and IGD: one row per interaction from a user's second on, sorted by time, split 8:1:1.

    The window ends with `options.window`'s end or the last interaction. It starts with `options.window`'s start or a calendar
    year before the last interaction, and the start moves back a calendar year at a time until `min_items` items survive the
    k-core, or the window holds all there is. Rows of equal time keep the order of the file.

    Raises ValueError when a rule leaves nothing, and for data without timestamps or with timestamps that are not seconds.
    """
    interactions, user_ids, funnel = _opened(data)
    counts = {"source": size(interactions)}
    _need_seconds(
        interactions,
        "protocol d3 splits by time and this source has no timestamps; use --protocol leave-one-out",
    )
    interactions, steps, years = _d3_window(interactions, options)
    funnel += steps
    counts["window"] = {"years": years} | size(interactions)
    kept, interactions = _catalogue(interactions, len(data.titles), options, steps)
    interactions = _sampled(interactions, options, counts, funnel)
    sequences, order = _sequences(interactions, user_ids)
    counts["rows"] = {"users_too_short": int(np.count_nonzero(np.diff(sequences.bounds) == 1))}
    places = np.empty_like(order)  # in the sequences, of the interactions in file order
    places[order] = np.arange(len(order), dtype=order.dtype)
    places = _gather(places, order_by(interactions.timestamps))
    del interactions, order  # the rows need the memory
    has_history = np.ones(len(places), dtype=bool)
    has_history[sequences.bounds[:-1]] = False
    places = places[has_history[places]]
    train, valid = len(places) * 8 // 10, len(places) * 9 // 10
    targets = {"train": places[:train], "valid": places[train:valid], "test": places[valid:]}
    return _finished(
        _tables(sequences, targets, options.max_history), kept, options, counts, funnel
    )


def given(data: SourceData, options: ProtocolOptions) -> Rows:
    """Take the rows that the source itself made, in their order.

    Histories are cut to `max_history`, users sampled and cold rows left out where the options say so.

    Raises ValueError for a source without rows of its own, and for a window, k-core or duplicates policy: those are rules about
    interactions.
    """
    if data.splits is None:
        raise UsageError(
            "protocol given takes rows that the source made, and this source makes none; use another --protocol"
        )
    flags = {
        "--from and --to": options.window != (None, None),
        f"--k_core {options.k_core}": options.k_core,
        f"--duplicates {options.duplicates}": options.duplicates != "keep",
    }
    if wrong := [flag for flag, on in flags.items() if on]:
        raise UsageError(
            f"protocol given takes the source's rows as they are; leave out {', '.join(wrong)}"
        )
    splits = {name: data.splits.get(name, ROW_SCHEMA.empty_table()) for name in SPLITS}
    funnel = [{"step": "rows of the source"} | _lengths(splits)]
    if options.num_users:
        users, _ = number_users(
            np.concatenate([table["user_id"].to_numpy() for table in splits.values()])
        )
        chosen = sample_users(users, options.num_users, options.seed)
        masks = np.split(chosen, np.cumsum([table.num_rows for table in splits.values()])[:-1])
        splits = {
            name: table.filter(pa.array(mask))
            for (name, table), mask in zip(splits.items(), masks, strict=True)
        }
        funnel.append({"step": f"sample of {options.num_users:,} users"} | _lengths(splits))
    if options.max_history:
        splits = {name: _shortened(table, options.max_history) for name, table in splits.items()}
    return _finished(splits, np.arange(len(data.titles)), options, {"rows": {}}, funnel)


PROTOCOLS: dict[str, Callable[[SourceData, ProtocolOptions], Rows]] = {
    "leave-one-out": leave_one_out,
    "d3": d3,
    "given": given,
}
DEFAULTS = {  # METHOD 4; `given`: as they are
    "leave-one-out": {"max_history": 20, "k_core": 0},
    "d3": {"max_history": 10, "k_core": 5},
    "given": {"max_history": 0, "k_core": 0},
}


def keep_duplicates(interactions: Interactions) -> np.ndarray:
    """Return bool (I,): everything."""
    return np.ones(len(interactions), dtype=bool)


def drop_exact_duplicates(interactions: Interactions) -> np.ndarray:
    """Return bool (I,): of the interactions with equal user, item and time the first in the file.

    Raises ValueError for data without timestamps, where equal repeats cannot be told from real ones.
    """
    if interactions.timestamps is None:
        raise UsageError(
            "--duplicates exact compares times and this source has no timestamps; use keep or first"
        )
    return _first_of_equals((interactions.users, interactions.items, interactions.timestamps))


def drop_repeats(interactions: Interactions) -> np.ndarray:
    """Return bool (I,): of each user with each item the earliest interaction, of equal times the first in the file."""
    times = () if interactions.timestamps is None else (interactions.timestamps,)
    return _first_of_equals((interactions.users, interactions.items), times)


DUPLICATES: dict[str, Callable[[Interactions], np.ndarray]] = {
    "keep": keep_duplicates,
    "exact": drop_exact_duplicates,
    "first": drop_repeats,
}


def k_core(interactions: Interactions, k: int) -> tuple[np.ndarray, list[dict[str, int]]]:
    """Return the largest set of interactions in which every user and every item has at least k, and what each pass left.

    A pass drops the interactions of all users and items that fall short; the passes end when one would drop nothing. Repeats of
    a user with an item count each. The set is bool (I,), the list holds at least one pass. Users are those of `number_users`.
    """
    users, items = interactions.users, interactions.items
    per_user, per_item = np.bincount(users), np.bincount(items)
    alive = np.arange(len(users), dtype=_index_type(len(users)))
    passes = []
    while True:
        keep = (per_user >= k)[users[alive]] & (per_item >= k)[items[alive]]
        gone = alive[~keep]
        if passes and not len(gone):
            break
        alive = alive[keep]
        per_user -= np.bincount(users[gone], minlength=len(per_user))
        per_item -= np.bincount(items[gone], minlength=len(per_item))
        left = (np.count_nonzero(per_user), np.count_nonzero(per_item), len(alive))
        passes.append(dict(zip(("users", "items", "interactions"), map(int, left), strict=True)))
    mask = np.zeros(len(users), dtype=bool)
    mask[alive] = True
    return mask, passes


def sample_users(users: np.ndarray, num_users: int, seed: int) -> np.ndarray:
    """Return bool (I,): the interactions of `num_users` users drawn with `seed` (all, if there are fewer).

    With one seed, a smaller sample is a part of a larger one. `users` (I,) are those of `number_users`.
    """
    present = np.flatnonzero(_flags(users))
    chosen = np.zeros(len(users) and present[-1] + 1, dtype=bool)
    chosen[present[np.random.default_rng(seed).permutation(len(present))[:num_users]]] = True
    return chosen[users]


def size(interactions: Interactions) -> dict[str, int]:
    """Count users (those of `number_users`), items and interactions."""
    users, items = (
        int(np.count_nonzero(_flags(ids))) for ids in (interactions.users, interactions.items)
    )
    return {"users": users, "items": items, "interactions": len(interactions)}


def number_users(users: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return users (I,) as numbers small enough to count with, in the same order, and whom number u stands for.

    Numbers that are small already are returned as they are, with None.
    """
    if not len(users) or (users.min() >= 0 and users.max() < 4 * len(users)):
        return users, None
    order = order_by(users)
    ordered = _gather(users, order)
    new = _differs_from_previous(ordered)
    numbers = np.empty_like(order)
    numbers[order] = np.cumsum(new, dtype=order.dtype) - 1
    return numbers, ordered[new]


def order_by(*keys: np.ndarray) -> np.ndarray:
    """Return np.lexsort(keys[::-1]) for integers: the first key weighs most, equals keep their order. int32 where it fits.

    As many keys as fit are packed with the position into one int64 and sorted in one go, because numpy sorts plain numbers faster
    than it argsorts them. 25 million interactions by user and day, which fit together, took 4.5 s and np.lexsort 22.5 s; by user
    and second, which take two sorts, 15.1 s and 19.8 s (measured on a busy machine).
    """
    length = len(keys[0])
    position_bits = length.bit_length()
    order, left = None, list(keys)
    while left:
        packed, used = np.arange(length), position_bits
        while left:
            part, bits = _from_zero(left[-1] if order is None else _gather(left[-1], order))
            if used + bits > 63:
                break
            part <<= used
            packed |= part
            used += bits
            left.pop()
        if used == position_bits and left:  # not even one key fits
            key = left.pop()
            packed = np.argsort(key if order is None else _gather(key, order), kind="stable")
        else:
            packed.sort()
            packed &= (1 << position_bits) - 1
        order = packed.astype(_index_type(length)) if order is None else _gather(order, packed)
    return order


def years_before(seconds: int, years: int) -> int:
    """Return the same date and time of day `years` calendar years earlier (UTC); 29 February becomes 28 where there is none."""
    moment = EPOCH + timedelta(seconds=seconds)
    try:
        earlier = moment.replace(year=moment.year - years)
    except ValueError:
        earlier = moment.replace(year=moment.year - years, day=28)
    return (earlier - EPOCH) // timedelta(seconds=1)


def date(seconds: int) -> str:
    """Return the date of a second since 1970 as YYYY-MM-DD (UTC)."""
    return str(np.datetime64(int(seconds), "s").astype("datetime64[D]"))


def _index_type(length: int) -> type:
    return np.int32 if length < 2**31 else np.int64


def _from_zero(key: np.ndarray) -> tuple[np.ndarray, int]:
    """Return int64 numbers from 0 in the order of the key, and the bits of the largest. Whole days in seconds count as days."""
    lowest = int(key.min()) if len(key) else 0
    span = int(key.max()) - lowest if len(key) else 0
    if span >= 2**62:  # no room for a position: the numbers do not matter
        return key, 63
    numbers = key.astype(np.int64)
    numbers -= lowest
    unit = int(np.gcd.reduce(numbers)) or 1
    if unit > 1:
        numbers //= unit
    return numbers, (span // unit).bit_length()


def _gather(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Return values[index] for an index in any order: numpy's own brackets take twice as long (measured)."""
    return values.take(index, mode="clip")


def _flags(ids: np.ndarray) -> np.ndarray:
    """Return bool (largest id + 1,): which ids occur."""
    flags = np.zeros(len(ids) and int(ids.max()) + 1, dtype=bool)
    flags[ids] = True
    return flags


def _differs_from_previous(values: np.ndarray) -> np.ndarray:
    new = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return new


def _take(interactions: Interactions, mask: np.ndarray) -> Interactions:
    return interactions if mask.all() else interactions.take(mask)


def _first_of_equals(
    keys: tuple[np.ndarray, ...], times: tuple[np.ndarray, ...] = ()
) -> np.ndarray:
    """Return bool (I,): of the interactions that agree in all keys the first, by time where given, then in the file."""
    order = order_by(*keys, *times)
    first = np.zeros(len(order), dtype=bool)
    for key in keys:
        first |= _differs_from_previous(_gather(key, order))
    mask = np.zeros(len(order), dtype=bool)
    mask[order[first]] = True
    return mask


def _opened(data: SourceData) -> tuple[Interactions, np.ndarray | None, list[dict]]:
    """Return the interactions with the users of `number_users`, whom these stand for, and the funnel's first step."""
    if data.splits is not None:
        raise UsageError(
            "this source brings its own rows of train, valid and test; use --protocol given"
        )
    if not len(data.interactions):
        raise UsageError(
            "nothing to make rows of: the source has no interactions, or no titles for their items"
        )
    users, user_ids = number_users(data.interactions.users)
    interactions = replace(data.interactions, users=users)
    return interactions, user_ids, [{"step": "interactions of the source"} | size(interactions)]


def _need_seconds(interactions: Interactions, why: str) -> None:
    times = interactions.timestamps
    if times is None:
        raise UsageError(why)
    if times.min() < 0 or times.max() >= LATEST_SECOND:
        raise UsageError(
            f"timestamps span {times.min()} to {times.max()}: they must be seconds since 1970, not milliseconds"
        )


def _window_text(start: int | None, end: int | None) -> str:
    if start is None or end is None:
        return f"window to {date(end)}" if start is None else f"window from {date(start)}"
    return f"window {date(start)} to {date(end)}"


def _in_window(interactions: Interactions, start: int | None, end: int | None) -> Interactions:
    times = interactions.timestamps
    mask = np.ones(len(times), dtype=bool)
    if start is not None:
        mask &= times >= start
    if end is not None:
        mask &= times <= end
    if not mask.any():
        raise UsageError(
            f"the {_window_text(start, end)} holds none of {len(times):,} interactions, which lie between "
            f"{date(times.min())} and {date(times.max())}; change --from and --to"
        )
    return _take(interactions, mask)


def _reduced(
    interactions: Interactions, options: ProtocolOptions
) -> tuple[Interactions, list[dict]]:
    """Apply the duplicates policy and the k-core; return what is left, perhaps nothing, and the steps."""
    steps = []
    if options.duplicates != "keep":
        interactions = _take(interactions, DUPLICATES[options.duplicates](interactions))
        steps.append({"step": f"duplicates: {options.duplicates}"} | size(interactions))
    if options.k_core:
        mask, passes = k_core(interactions, options.k_core)
        interactions = _take(interactions, mask)
        steps += [
            {"step": f"{options.k_core}-core, pass {i}"} | left
            for i, left in enumerate(passes, start=1)
        ]
    return interactions, steps


def _d3_window(
    interactions: Interactions, options: ProtocolOptions
) -> tuple[Interactions, list[dict], int]:
    """Return what d3's window and core leave, the steps, and by how many years the start was moved back."""
    start, end = options.window
    interactions = _in_window(interactions, None, end)
    earliest, latest = int(interactions.timestamps.min()), int(interactions.timestamps.max())
    end = latest if end is None else end
    anchor = latest if start is None else start
    steps = []
    for years in itertools.count(1 if start is None else 0):
        begin = years_before(anchor, years)
        text = _window_text(begin, end)
        window = _take(interactions, interactions.timestamps >= begin)
        window_size = size(window)
        window, core_steps = _reduced(window, options)
        left = size(window)
        if left["items"] >= options.min_items or begin <= earliest:
            break
        where = f" in the {options.k_core}-core" if options.k_core else ""
        steps.append(
            {"step": f"{text}: {left['items']:,} items{where}, fewer than {options.min_items:,}"}
            | left
        )
    all_there_is = ", all there is" if left["items"] < options.min_items else ""
    return window, [*steps, {"step": text + all_there_is} | window_size, *core_steps], years


def _catalogue(
    interactions: Interactions, num_items: int, options: ProtocolOptions, steps: list[dict]
) -> tuple[np.ndarray, Interactions]:
    """Return the items kept (Rows.kept_items) and the interactions with items numbered by their place among these.

    Raises ValueError, with the `steps`, when the k-core has left nothing.
    """
    if not options.k_core:
        return np.arange(num_items), interactions
    if not len(interactions):
        passes = [step for step in steps if "-core, pass" in step["step"]]
        shown = [passes[:3], passes[-2:]] if len(passes) > 5 else [passes]
        detail = " … ".join("; ".join(_left(step) for step in part) for part in shown)
        raise UsageError(
            f"nothing is left after the {options.k_core}-core: {detail}. Lower --k_core or widen --from and --to"
        )
    kept = _flags(interactions.items)
    numbers = np.cumsum(kept, dtype=np.int32) - 1
    return np.flatnonzero(kept), replace(interactions, items=numbers[interactions.items])


def _left(step: dict) -> str:
    name = step["step"].split(", ")[-1]
    return f"{name} left {step['users']:,} users, {step['items']:,} items, {step['interactions']:,} interactions"


def _sampled(
    interactions: Interactions, options: ProtocolOptions, counts: dict, funnel: list[dict]
) -> Interactions:
    if options.num_users:
        interactions = _take(
            interactions, sample_users(interactions.users, options.num_users, options.seed)
        )
        counts["user_sample"] = size(interactions)
        funnel.append({"step": f"sample of {options.num_users:,} users"} | counts["user_sample"])
    return interactions


def _sequences(
    interactions: Interactions, user_ids: np.ndarray | None
) -> tuple[_Sequences, np.ndarray]:
    """Sort by user, time and file position; return also the order: where in the file each of them stood."""
    times = interactions.timestamps
    order = order_by(interactions.users) if times is None else order_by(interactions.users, times)
    users = _gather(interactions.users, order)
    bounds = np.append(np.flatnonzero(_differs_from_previous(users)), len(users)).astype(
        order.dtype
    )
    ids = users[bounds[:-1]].astype(np.int64)
    ids = ids if user_ids is None else user_ids[ids]
    owner = np.repeat(np.arange(len(ids), dtype=order.dtype), np.diff(bounds))
    del users
    times = None if times is None else _gather(times, order)
    return _Sequences(ids, bounds, owner, _gather(interactions.items, order), times), order


def _tables(
    sequences: _Sequences, targets: dict[str, np.ndarray], max_history: int
) -> dict[str, pa.Table]:
    """Make the tables of the rows whose targets stand at these places of the sequences."""
    tables = {}
    for name, places in targets.items():
        users = _gather(sequences.users, _gather(sequences.owner, places))
        times = (
            pa.nulls(len(places), pa.int64())
            if sequences.times is None
            else pa.array(_gather(sequences.times, places))
        )
        histories = _histories(sequences, places, max_history)
        items = pa.array(_gather(sequences.items, places))
        tables[name] = pa.table([pa.array(users), histories, items, times], schema=ROW_SCHEMA)
    return tables


def _histories(sequences: _Sequences, places: np.ndarray, max_history: int) -> pa.ChunkedArray:
    lengths = places - _gather(sequences.bounds, _gather(sequences.owner, places))
    if max_history:
        np.minimum(lengths, max_history, out=lengths)
    ends = np.cumsum(lengths, dtype=np.int64)
    cuts = np.searchsorted(
        ends, np.arange(ITEMS_PER_CHUNK, ends[-1] if len(ends) else 0, ITEMS_PER_CHUNK)
    )
    chunks = [
        slice(begin, end) for begin, end in itertools.pairwise([0, *cuts.tolist(), len(places)])
    ]
    lists = [
        _lists(sequences.items, places[chunk] - lengths[chunk], lengths[chunk]) for chunk in chunks
    ]
    return pa.chunked_array(lists, ROW_SCHEMA.field("history").type)


def _lists(items: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Return list r = items[starts[r] : starts[r] + lengths[r]]."""
    offsets = np.zeros(len(starts) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    index = np.arange(offsets[-1], dtype=np.int64)
    index += np.repeat(starts - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(_gather(items, index)))


def _shortened(table: pa.Table, max_history: int) -> pa.Table:
    """Keep the last `max_history` items of every history."""
    chunks = []
    for chunk in table["history"].chunks:
        offsets = chunk.offsets.to_numpy()
        lengths = np.minimum(np.diff(offsets), max_history)
        chunks.append(_lists(chunk.values.to_numpy(), offsets[1:] - lengths, lengths))
    histories = pa.chunked_array(chunks, ROW_SCHEMA.field("history").type)
    return table.set_column(
        table.schema.get_field_index("history"), ROW_SCHEMA.field("history"), histories
    )


def _lengths(splits: dict[str, pa.Table]) -> dict[str, int]:
    return {name: table.num_rows for name, table in splits.items()}


def _finished(
    splits: dict[str, pa.Table],
    kept_items: np.ndarray,
    options: ProtocolOptions,
    counts: dict,
    funnel: list[dict],
) -> Rows:
    """Apply the cold rules and count the rows."""
    funnel.append({"step": "rows"} | counts["rows"] | _lengths(splits))
    train = splits["train"]
    seen = np.zeros(len(kept_items), dtype=bool)
    seen[train["target"].to_numpy()] = True
    rules = {
        "cold_items": lambda table: seen[table["target"].to_numpy()],
        "cold_users": lambda table: np.isin(
            table["user_id"].to_numpy(), train["user_id"].to_numpy()
        ),
    }
    for rule, known in rules.items():
        if getattr(options, rule) == "keep":
            continue
        before = _lengths(splits)
        splits = splits | {
            name: splits[name].filter(pa.array(known(splits[name]))) for name in ("valid", "test")
        }
        gone = {name: before[name] - splits[name].num_rows for name in ("valid", "test")}
        for name, number in gone.items():
            if number and number == before[name]:
                raise UsageError(
                    f"--{rule} drop leaves none of {number:,} {name} rows; use --{rule} keep"
                )
        text = f"{rule.replace('_', ' ')}: {gone['valid']:,} valid and {gone['test']:,} test rows left out"
        funnel.append({"step": text} | _lengths(splits))
    counts["rows"] |= _lengths(splits)
    return Rows(splits, kept_items, counts, funnel)
