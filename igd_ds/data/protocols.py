"""Protocols: from interactions to the rows of train, valid and test (METHOD 4). Vectorised; 10 million interactions are fine.

Letters: I interactions, R rows. A row is (history, target): what a user met before, oldest first, and what came next.
Within a user interactions are ordered by time, equal times and data without timestamps by position in the file.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from igd_ds.data.dataset import Interactions

YEAR = 31_557_600  # seconds: 365.25 days
LATEST_SECOND = 10**11  # the year 5138: larger timestamps are milliseconds
ROWS_PER_CHUNK = 1 << 20  # history items are gathered in chunks of rows: bounds the index arrays (assumed)


@dataclass(frozen=True)
class ProtocolOptions:
    """What a protocol may be told.

    `max_history`: items kept per history, the last ones; `k_core`: least interactions per user and item, 0 = off; `min_items`:
    items that a `d3` window must hold (METHOD 4: 10,000); `num_users`, `seed`: a seeded sample of users after the core, 0 = all.
    """

    max_history: int
    k_core: int
    min_items: int = 10_000
    num_users: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Rows:
    """The rows of the three splits (tables of ROW_SCHEMA), with item ids as in the input, and what remained at each stage.

    `kept_items` int64 ascending: the catalogue, namely every item when k_core is 0, else the items of the core. `counts` maps a
    stage to its numbers.
    """

    splits: dict[str, pa.Table]
    kept_items: np.ndarray
    counts: dict[str, dict[str, int]]


def k_core(interactions: Interactions, k: int) -> np.ndarray:
    """Return bool (I,): the largest set of interactions in which every user and every item has at least k.

    Found by dropping what falls short until nothing does. Repeats of a user with an item count each.
    """
    users = np.unique(interactions.users, return_inverse=True)[1]
    items = np.unique(interactions.items, return_inverse=True)[1]
    alive = np.arange(len(users))
    while len(alive):
        u, i = users[alive], items[alive]
        enough = (np.bincount(u)[u] >= k) & (np.bincount(i)[i] >= k)
        if enough.all():
            break
        alive = alive[enough]
    mask = np.zeros(len(users), dtype=bool)
    mask[alive] = True
    return mask


def sample_users(interactions: Interactions, num_users: int, seed: int) -> np.ndarray:
    """Return bool (I,): the interactions of `num_users` users drawn with `seed` (all, if there are fewer).

    With one seed, a smaller sample is a part of a larger one.
    """
    users, index = np.unique(interactions.users, return_inverse=True)
    chosen = np.zeros(len(users), dtype=bool)
    chosen[np.random.default_rng(seed).permutation(len(users))[:num_users]] = True
    return chosen[index]


def size(interactions: Interactions) -> dict[str, int]:
    """Count users, items and interactions."""
    users, items = len(np.unique(interactions.users)), len(np.unique(interactions.items))
    return {"users": users, "items": items, "interactions": len(interactions)}


def leave_one_out(interactions: Interactions, num_items: int, options: ProtocolOptions) -> Rows:
    """Per user the last item is test, the second-last validation; every prefix (of 2 or more) of the rest is a training row.

    A user with fewer than three interactions has no history for the validation row: left out and counted. Rows are ordered by
    user id, then time.
    """
    counts = {"source": size(interactions)}
    if options.k_core:
        interactions = interactions.take(k_core(interactions, options.k_core))
        counts["k_core"] = size(interactions)
    catalogue = np.unique(interactions.items) if options.k_core else np.arange(num_items)
    interactions = _sampled(interactions, options, counts)
    order, starts, from_end = _by_user(interactions)
    length = from_end + np.arange(len(order)) - starts + 1
    positions = np.flatnonzero(length >= 3)
    counts["rows"] = {"users_too_short": int(np.count_nonzero((length < 3) & (from_end == 0)))}
    kind = np.minimum(from_end[positions], 2)  # 0 test, 1 valid, 2 the rest
    has_history = positions > starts[positions]
    chosen = {"train": positions[(kind == 2) & has_history], "valid": positions[kind == 1], "test": positions[kind == 0]}
    return _rows(interactions.take(order), starts, chosen, options, catalogue, counts)


def d3(interactions: Interactions, num_items: int, options: ProtocolOptions) -> Rows:
    """Chronological split of D3 and IGD: one row per interaction from a user's second on, sorted by time, split 8:1:1.

    The window ends with the last interaction and starts a year before; the start moves back a year at a time until `min_items`
    items survive the k-core inside it, or the window holds all there is. Rows of equal time keep the order of the file.

    Raises ValueError for data without timestamps or with timestamps that are not seconds.
    """
    times = interactions.timestamps
    if times is None:
        raise ValueError("protocol d3 splits by time and this source has no timestamps; use --protocol leave-one-out")
    if len(times) and (times.min() < 0 or times.max() >= LATEST_SECOND):
        raise ValueError(f"timestamps span {times.min()} to {times.max()}: they must be seconds since 1970, not milliseconds")
    counts = {"source": size(interactions)}
    years, window = 0, interactions
    while len(times):
        years += 1
        start = times.max() - years * YEAR
        window = interactions.take(times >= start)
        if options.k_core:
            window = window.take(k_core(window, options.k_core))
        if len(np.unique(window.items)) >= options.min_items or start <= times.min():
            break
    counts["window"] = {"years": years} | size(window)
    catalogue = np.unique(window.items) if options.k_core else np.arange(num_items)
    window = _sampled(window, options, counts)
    order, starts, from_end = _by_user(window)
    alone = (from_end == 0) & (starts == np.arange(len(order)))
    counts["rows"] = {"users_too_short": int(np.count_nonzero(alone))}
    positions = np.flatnonzero(np.arange(len(order)) > starts)
    ordered = window.take(order)
    positions = positions[np.lexsort((order[positions], ordered.timestamps[positions]))]
    train, valid = len(positions) * 8 // 10, len(positions) * 9 // 10
    chosen = {"train": positions[:train], "valid": positions[train:valid], "test": positions[valid:]}
    return _rows(ordered, starts, chosen, options, catalogue, counts)


PROTOCOLS: dict[str, Callable[[Interactions, int, ProtocolOptions], Rows]] = {"leave-one-out": leave_one_out, "d3": d3}
DEFAULTS = {"leave-one-out": {"max_history": 20, "k_core": 0}, "d3": {"max_history": 10, "k_core": 5}}  # METHOD 4


def _sampled(interactions: Interactions, options: ProtocolOptions, counts: dict) -> Interactions:
    if options.num_users:
        interactions = interactions.take(sample_users(interactions, options.num_users, options.seed))
        counts["user_sample"] = size(interactions)
    return interactions


def _by_user(interactions: Interactions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort by user, time and file position.

    Return, each int64 (I,), the order, and per place in that order where its user starts and how many of that user follow.
    """
    keys = (interactions.users,) if interactions.timestamps is None else (interactions.timestamps, interactions.users)
    order = np.lexsort(keys)
    users = interactions.users[order]
    first = np.flatnonzero(np.diff(users, prepend=users[:1] - 1))
    lengths = np.diff(first, append=len(users))
    starts = np.repeat(first, lengths)
    return order, starts, np.repeat(first + lengths, lengths) - np.arange(len(users)) - 1


def _rows(
    ordered: Interactions,
    starts: np.ndarray,
    chosen: dict[str, np.ndarray],
    options: ProtocolOptions,
    catalogue: np.ndarray,
    counts: dict[str, dict[str, int]],
) -> Rows:
    """Make the tables of the rows whose targets stand at positions `chosen` of `ordered`."""
    splits = {}
    for name, targets in chosen.items():
        chunks = np.array_split(targets, max(-(-len(targets) // ROWS_PER_CHUNK), 1))
        histories = [_histories(ordered.items, starts, chunk, options.max_history) for chunk in chunks]
        times = pa.nulls(len(targets), pa.int64()) if ordered.timestamps is None else pa.array(ordered.timestamps[targets])
        columns = [pa.array(ordered.users[targets]), pa.chunked_array(histories), pa.array(ordered.items[targets]), times]
        splits[name] = pa.table(columns, names=["user_id", "history", "target", "timestamp"])
        counts["rows"][name] = len(targets)
    return Rows(splits, catalogue, counts)


def _histories(items: np.ndarray, starts: np.ndarray, targets: np.ndarray, max_history: int) -> pa.ListArray:
    lengths = np.minimum(targets - starts[targets], max_history)
    offsets = np.zeros(len(targets) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    index = np.arange(offsets[-1]) + np.repeat(targets - lengths - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(items[index]))
