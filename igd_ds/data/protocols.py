"""Protocols: from interactions to the rows of train, valid and test.

Letters: I interactions, U users, R rows. A row is (history, target): what a user met before, oldest
first, and what came next. The interactions of a user are ordered by time. Interactions of equal
time, and all interactions of data without timestamps, are ordered by position in the file.

The rules apply in this order: time window, duplicates, k-core, user sample, rows, cold items and
users. There is no Python loop over interactions; 50 million fit into 4 GiB (measured).
"""

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone

import numpy as np
import pyarrow as pa

from igd_ds.data.dataset import ROW_SCHEMA, SPLITS, FunnelStep, Interactions, SourceData
from igd_ds.errors import UsageError
from igd_ds.items.ragged import ragged_arange

LATEST_SECOND = 10**11  # the year 5138; larger timestamps are milliseconds
ITEMS_PER_CHUNK = 1 << 22  # history items gathered at a time; bounds the index arrays (assumed)
COLD = ("keep", "drop")
LARGE_LOSS = 0.2
"""Share of the users or items whose loss is worth a warning."""
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

Counts = dict[str, dict[str, int]]
"""Numbers by stage: what remained there."""


LEAST = {"max_history": 0, "k_core": 0, "min_items": 1, "num_users": 0, "seed": 0}
"""Options that are whole numbers, and their least value."""


@dataclass(frozen=True)
class ProtocolOptions:
    """The options of all protocols; each field is a flag of `igd prepare`.

    Example:
        >>> ProtocolOptions(max_history=20, k_core=5, cold_items="drop")
    """

    max_history: int
    """The newest items that a history keeps; 0 keeps all."""
    k_core: int
    """Least interactions of every user and item; 0 keeps all."""
    min_items: int = 10_000
    """Items that a `d3` window must hold; D3's published script has 10,000."""
    window: tuple[int | None, int | None] = (None, None)
    """First and last second, both included; None leaves the window open. `d3` moves the start."""
    duplicates: str = "keep"
    """A name in DUPLICATES."""
    cold_items: str = "keep"
    """"drop" leaves out valid and test rows whose target is the target of no training row."""
    cold_users: str = "keep"
    """"drop" leaves out valid and test rows of users without a training row."""
    num_users: int = 0
    """Size of a seeded sample of users, drawn after the core; 0 keeps all users."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in [("duplicates", DUPLICATES), ("cold_items", COLD), ("cold_users", COLD)]:
            if getattr(self, name) not in known:
                raise UsageError(
                    f"--{name} {getattr(self, name)}: must be one of {', '.join(known)}"
                )
        for name, least in LEAST.items():
            check_whole(name, getattr(self, name), least)
        start, end = self.window
        if not all(second is None or isinstance(second, int) for second in self.window):
            raise UsageError(f"window {self.window}: give seconds since 1970, or None for open")
        if start is not None and end is not None and start > end:
            raise UsageError(f"--from {date(start)} is after --to {date(end)}")


def check_whole(name: str, value: object, least: int) -> None:
    """Raise UsageError unless an option is a whole number from `least` to below 2^31."""
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or not least <= value < 2**31:  # type: ignore[operator]
        raise UsageError(
            f"--{name} {value}: must be a whole number of at least {least}, and below 2^31"
        )


@dataclass(frozen=True)
class Rows:
    """The rows of the three splits, and what remained at each stage."""

    splits: dict[str, pa.Table]
    """Tables of ROW_SCHEMA. The number of an item is its place in `kept_items`."""
    kept_items: np.ndarray
    """int64, ascending: the catalogue, all items or those of the k-core."""
    counts: Counts
    funnel: list[FunnelStep]
    """Every step in order, with what it left: users, items, interactions, or rows per split."""


@dataclass(frozen=True)
class _Sequences:
    """Interactions ordered by user, time and position in the file."""

    users: np.ndarray
    """int64 (U,): the source's numbers, ascending."""
    bounds: np.ndarray
    """(U + 1,): the interactions of the u-th user are those from bounds[u] to bounds[u + 1]."""
    owner: np.ndarray
    """(I,): the place in `users` of the user of each interaction."""
    items: np.ndarray
    """int32 (I,)."""
    times: np.ndarray | None
    """int64 (I,)."""


# ---- the protocols


def leave_one_out(data: SourceData, options: ProtocolOptions) -> Rows:
    """Per user, make the last item the test target and the second-last the validation target.

    Every prefix (of 2 items or more) of the remaining items is a training row. A user with fewer
    than three interactions has no history for the validation row; such users are left out and
    counted. Rows are ordered by user id, then time.

    Raises:
        UsageError: a rule leaves nothing, or a window or `exact` duplicates are asked for without
            timestamps in seconds.
    """
    interactions, user_ids, funnel = _opened(data)
    counts: Counts = {"source": size(interactions)}

    # Rules that choose interactions.
    if options.window != (None, None):
        _need_seconds(
            interactions,
            "--from and --to choose by time and this source has no timestamps; leave them out",
        )
        interactions = _in_window(interactions, *options.window)
        funnel.append({"step": _window_text(*options.window)} | size(interactions))
        warn_of_losses(counts["source"], size(interactions), "--from and --to")
    before = size(interactions)
    interactions, steps = _reduced(interactions, options)
    warn_of_losses(before, size(interactions), _rules(options))
    funnel += steps
    if options.k_core:
        counts["k_core"] = size(interactions)
    kept, interactions = _catalogue(interactions, len(data.titles), options, steps)
    interactions = _sampled(interactions, options, counts, funnel)

    # Where the targets stand in the sequences.
    sequences, _ = _sequences(interactions, user_ids)
    del interactions  # the rows need the memory
    lengths = np.diff(sequences.bounds)
    long = lengths >= 3
    counts["rows"] = {"users_too_short": int(np.count_nonzero(~long))}
    short = counts["rows"]["users_too_short"]
    warn_of_losses(
        {"users": len(long)}, {"users": len(long) - short}, "leave-one-out (3 interactions needed)"
    )
    last = sequences.bounds[1:][long] - 1
    is_train = np.repeat(long, lengths)
    for held_out in (sequences.bounds[:-1], last, last - 1):
        is_train[held_out] = False
    train = np.flatnonzero(is_train).astype(last.dtype)

    targets = {"train": train, "valid": last - 1, "test": last}
    tables = _tables(sequences, targets, options.max_history)
    return _finished(tables, kept, options, counts, funnel)


def d3(data: SourceData, options: ProtocolOptions) -> Rows:
    """Make one row per interaction from a user's second on, sort by time, split 8:1:1 (D3, IGD).

    The window ends with the end in `options.window`, or with the last interaction. It starts with
    the start in `options.window`, or a calendar year before the last interaction. The start moves
    back a calendar year at a time until `min_items` items survive the k-core, or until the window
    holds everything. Rows of equal time keep the order of the file.

    Raises:
        UsageError: a rule leaves nothing, or the data have no timestamps in seconds.
    """
    interactions, user_ids, funnel = _opened(data)
    counts: Counts = {"source": size(interactions)}

    # Rules that choose interactions.
    _need_seconds(
        interactions,
        "protocol d3 splits by time and this source has no timestamps; use --protocol "
        "leave-one-out",
    )
    interactions, steps, years = _d3_window(interactions, options)
    funnel += steps
    counts["window"] = {"years": years} | size(interactions)
    kept, interactions = _catalogue(interactions, len(data.titles), options, steps)
    interactions = _sampled(interactions, options, counts, funnel)

    # The places in the sequences of all interactions, in the order of time.
    sequences, order = _sequences(interactions, user_ids)
    counts["rows"] = {"users_too_short": int(np.count_nonzero(np.diff(sequences.bounds) == 1))}
    places = np.empty_like(order)  # of the interactions in file order
    places[order] = np.arange(len(order), dtype=order.dtype)
    places = _gather(places, order_by(_times(interactions)))
    del interactions, order  # the rows need the memory

    # The first interaction of a user has no history; the others are split.
    has_history = np.ones(len(places), dtype=bool)
    has_history[sequences.bounds[:-1]] = False
    places = places[has_history[places]]
    train, valid = len(places) * 8 // 10, len(places) * 9 // 10

    targets = {"train": places[:train], "valid": places[train:valid], "test": places[valid:]}
    tables = _tables(sequences, targets, options.max_history)
    return _finished(tables, kept, options, counts, funnel)


def given(data: SourceData, options: ProtocolOptions) -> Rows:
    """Take the rows that the source itself made, in their order.

    Histories are cut to `max_history`, users are sampled and cold rows are left out if the options
    say so.

    Raises:
        UsageError: the source has no rows of its own, or a window, a k-core or a duplicates policy
            is asked for: these are rules about interactions.
    """
    if data.splits is None:
        raise UsageError(
            "protocol given takes rows that the source made, and this source makes none; use "
            "another --protocol"
        )
    flags = {
        "--from and --to": options.window != (None, None),
        f"--k_core {options.k_core}": options.k_core > 0,
        f"--duplicates {options.duplicates}": options.duplicates != "keep",
    }
    if wrong := [flag for flag, is_set in flags.items() if is_set]:
        raise UsageError(
            f"protocol given takes the source's rows as they are; leave out {', '.join(wrong)}"
        )

    splits = {name: data.splits.get(name, ROW_SCHEMA.empty_table()) for name in SPLITS}
    funnel: list[FunnelStep] = [{"step": "rows of the source"} | _num_rows(splits)]
    if options.num_users:
        splits = _sampled_rows(splits, options)
        funnel.append({"step": f"sample of {options.num_users:,} users"} | _num_rows(splits))
    if options.max_history:
        splits = {name: _shortened(table, options.max_history) for name, table in splits.items()}
    return _finished(splits, np.arange(len(data.titles)), options, {"rows": {}}, funnel)


PROTOCOLS: dict[str, Callable[[SourceData, ProtocolOptions], Rows]] = {
    "leave-one-out": leave_one_out,
    "d3": d3,
    "given": given,
}
# The defaults of the papers' protocols; `given` changes nothing.
DEFAULTS: dict[str, dict[str, int]] = {
    "leave-one-out": {"max_history": 20, "k_core": 0},
    "d3": {"max_history": 10, "k_core": 5},
    "given": {"max_history": 0, "k_core": 0},
}


# ---- duplicates, k-core and sample


def keep_duplicates(interactions: Interactions) -> np.ndarray:
    """Return bool (I,): keep everything."""
    return np.ones(len(interactions), dtype=bool)


def drop_exact_duplicates(interactions: Interactions) -> np.ndarray:
    """Return bool (I,): of the interactions with equal user, item and time, keep the file's first.

    Raises:
        UsageError: the data have no timestamps, so repeats cannot be told from real interactions.
    """
    if interactions.timestamps is None:
        raise UsageError(
            "--duplicates exact compares times and this source has no timestamps; use keep or first"
        )
    return _first_of_equals((interactions.users, interactions.items, interactions.timestamps))


def drop_repeats(interactions: Interactions) -> np.ndarray:
    """Return bool (I,): keep the earliest interaction of each user with each item.

    Of interactions with equal times, the first in the file is the earliest.
    """
    times = () if interactions.timestamps is None else (interactions.timestamps,)
    return _first_of_equals((interactions.users, interactions.items), times)


DUPLICATES: dict[str, Callable[[Interactions], np.ndarray]] = {
    "keep": keep_duplicates,
    "exact": drop_exact_duplicates,
    "first": drop_repeats,
}


def k_core(interactions: Interactions, k: int) -> tuple[np.ndarray, list[dict[str, int]]]:
    """Return the largest set of interactions in which every user and every item has at least k.

    A pass drops the interactions of all users and items that have fewer. The passes end when one
    would drop nothing. Repeats of a user with an item count each.

    Args:
        interactions: with users as `number_users` returns them.
        k: at least 1.

    Returns:
        The set, bool (I,), and what each pass left (at least one pass).
    """
    users, items = interactions.users, interactions.items
    per_user, per_item = np.bincount(users), np.bincount(items)
    alive: np.ndarray = np.arange(len(users), dtype=_index_type(len(users)))
    passes: list[dict[str, int]] = []

    while True:
        keep = (per_user >= k)[users[alive]] & (per_item >= k)[items[alive]]
        gone = alive[~keep]
        if passes and not len(gone):
            break
        alive = alive[keep]
        per_user -= np.bincount(users[gone], minlength=len(per_user))
        per_item -= np.bincount(items[gone], minlength=len(per_item))
        passes.append(
            {
                "users": int(np.count_nonzero(per_user)),
                "items": int(np.count_nonzero(per_item)),
                "interactions": len(alive),
            }
        )

    mask = np.zeros(len(users), dtype=bool)
    mask[alive] = True
    return mask, passes


def sample_users(users: np.ndarray, num_users: int, seed: int) -> np.ndarray:
    """Return bool (I,): the interactions of `num_users` users drawn with `seed`, or all users.

    With one seed, a smaller sample is a part of a larger one. `users` (I,) are numbers as
    `number_users` returns them.
    """
    present = np.flatnonzero(_flags(users))
    chosen = np.zeros(len(users) and present[-1] + 1, dtype=bool)
    chosen[present[np.random.default_rng(seed).permutation(len(present))[:num_users]]] = True
    return chosen[users]


def size(interactions: Interactions) -> dict[str, int]:
    """Count users (numbered as `number_users` does), items and interactions."""
    return {
        "users": int(np.count_nonzero(_flags(interactions.users))),
        "items": int(np.count_nonzero(_flags(interactions.items))),
        "interactions": len(interactions),
    }


# ---- numbers, order, dates


def number_users(users: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return users (I,) as small numbers in the same order, and the user that each number means.

    Numbers that are small already are returned unchanged, with None.

    Example:
        >>> number_users(np.array([900, 5_000, 900]))
        (array([0, 1, 0]), array([ 900, 5000]))
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
    """Return np.lexsort(keys[::-1]) for integers: the first key weighs most, equals keep order.

    The result is int32 if that is large enough. As many keys as fit are packed with the position
    into one int64 and sorted together, because numpy sorts plain numbers faster than it argsorts
    them. 25 million interactions by user and day, which fit together, took 4.5 s, and np.lexsort
    22.5 s. By user and second, which take two sorts, they took 15.1 s, and np.lexsort 19.8 s
    (measured on a busy machine).
    """
    length = len(keys[0])
    position_bits = length.bit_length()
    order: np.ndarray | None = None
    left = list(keys)

    while left:
        # Pack the last keys that are left above the position, in the order found so far.
        packed, used = np.arange(length), position_bits
        while left:
            part, bits = _from_zero(_in_order(left[-1], order))
            if used + bits > 63:
                break
            part <<= used
            packed |= part
            used += bits
            left.pop()

        if used == position_bits and left:  # not even one key fits
            packed = np.argsort(_in_order(left.pop(), order), kind="stable")
        else:
            packed.sort()
            packed &= (1 << position_bits) - 1
        order = packed.astype(_index_type(length)) if order is None else _gather(order, packed)

    assert order is not None, "at least one key"
    return order


def _in_order(key: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    return key if order is None else _gather(key, order)


def years_before(seconds: int, years: int) -> int:
    """Return the same date and time of day `years` calendar years earlier (UTC).

    29 February becomes 28 February in years without it.
    """
    moment = EPOCH + timedelta(seconds=seconds)
    try:
        earlier = moment.replace(year=moment.year - years)
    except ValueError:
        earlier = moment.replace(year=moment.year - years, day=28)
    return (earlier - EPOCH) // timedelta(seconds=1)


def date(seconds: int) -> str:
    """Return the date of a second since 1970 as YYYY-MM-DD (UTC)."""
    return str(np.datetime64(int(seconds), "s").astype("datetime64[D]"))


def _index_type(length: int) -> type[np.integer]:
    return np.int32 if length < 2**31 else np.int64


def _from_zero(key: np.ndarray) -> tuple[np.ndarray, int]:
    """Return int64 numbers from 0 in the order of the key, and the bits of the largest.

    Seconds that are all whole days are counted in days.
    """
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
    """Return values[index] for an index in any order; brackets take twice as long (measured)."""
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
    """Return bool (I,): the first of the interactions that agree in all keys.

    The first is the earliest if times are given, and of equal times the first in the file.
    """
    order = order_by(*keys, *times)
    first = np.zeros(len(order), dtype=bool)
    for key in keys:
        first |= _differs_from_previous(_gather(key, order))
    mask = np.zeros(len(order), dtype=bool)
    mask[order[first]] = True
    return mask


# ---- the steps of a protocol


def _opened(data: SourceData) -> tuple[Interactions, np.ndarray | None, list[FunnelStep]]:
    """Return the interactions with users of `number_users`, what these mean, and the first step."""
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
    """Raise UsageError with the text `why` if there are no times, or if they are no seconds."""
    times = interactions.timestamps
    if times is None:
        raise UsageError(why)
    if times.min() < 0 or times.max() >= LATEST_SECOND:
        raise UsageError(
            f"timestamps span {times.min()} to {times.max()}: they must be seconds since 1970, not "
            "milliseconds"
        )


def _times(interactions: Interactions) -> np.ndarray:
    assert interactions.timestamps is not None, "_need_seconds comes first"
    return interactions.timestamps


def _window_text(start: int | None, end: int | None) -> str:
    if start is not None and end is not None:
        return f"window {date(start)} to {date(end)}"
    if start is not None:
        return f"window from {date(start)}"
    return "window" if end is None else f"window to {date(end)}"


def _in_window(interactions: Interactions, start: int | None, end: int | None) -> Interactions:
    times = _times(interactions)
    mask = np.ones(len(times), dtype=bool)
    if start is not None:
        mask &= times >= start
    if end is not None:
        mask &= times <= end
    if not mask.any():
        raise UsageError(
            f"the {_window_text(start, end)} holds none of {len(times):,} interactions, which lie "
            f"between {date(times.min())} and {date(times.max())}; change --from and --to"
        )
    return _take(interactions, mask)


def _reduced(
    interactions: Interactions, options: ProtocolOptions
) -> tuple[Interactions, list[FunnelStep]]:
    """Apply the duplicates policy and the k-core; return what is left, perhaps nothing."""
    steps: list[FunnelStep] = []
    if options.duplicates != "keep":
        interactions = _take(interactions, DUPLICATES[options.duplicates](interactions))
        steps.append({"step": f"duplicates: {options.duplicates}"} | size(interactions))
    if options.k_core:
        mask, passes = k_core(interactions, options.k_core)
        interactions = _take(interactions, mask)
        for number, left in enumerate(passes, start=1):
            steps.append({"step": f"{options.k_core}-core, pass {number}"} | left)
    return interactions, steps


def _rules(options: ProtocolOptions) -> str:
    """Return the names of the rules of `_reduced`, for a message."""
    rules = [f"the {options.k_core}-core"] if options.k_core else []
    rules += [f"duplicates: {options.duplicates}"] if options.duplicates != "keep" else []
    return " and ".join(rules)


def warn_of_losses(before: Mapping[str, int], left: Mapping[str, int], rule: str) -> None:
    """Warn when a rule drops more than a fifth of the users, items or rows.

    Interaction data have more users than items as a rule; else the columns may be swapped.

    Args:
        before: what there was: "users", "items" or others, and their number.
        left: what the rule left, under the same names.
        rule: what dropped the others.
    """
    names = [name for name in ("users", "items", "rows") if name in before]
    lost = {name: 1 - left[name] / max(before[name], 1) for name in names}
    if max(lost.values()) <= LARGE_LOSS or not left[names[0]]:
        return
    reason = ""
    if before.get("items", 0) > before.get("users", before.get("items", 0)):
        reason = (
            f"; there are more items ({before['items']:,}) than users ({before['users']:,}): "
            "are the columns swapped?"
        )
    shares = " and ".join(f"{share:.0%} of the {name}" for name, share in lost.items())
    print(f"warning: {rule} dropped {shares}{reason}", file=sys.stderr)


def _d3_window(
    interactions: Interactions, options: ProtocolOptions
) -> tuple[Interactions, list[FunnelStep], int]:
    """Return what d3's window and core leave, the steps, and the years the start moved back."""
    start, end = options.window
    interactions = _in_window(interactions, None, end)
    times = _times(interactions)
    earliest, latest = int(times.min()), int(times.max())
    end = latest if end is None else end
    anchor = latest if start is None else start
    steps: list[FunnelStep] = []

    for years in itertools.count(1 if start is None else 0):
        begin = years_before(anchor, years)
        text = _window_text(begin, end)
        window = _take(interactions, times >= begin)
        window_size = size(window)
        window, core_steps = _reduced(window, options)
        left = size(window)
        if left["items"] >= options.min_items or begin <= earliest:
            break
        where = f" in the {options.k_core}-core" if options.k_core else ""
        found = f"{left['items']:,} items{where}, fewer than {options.min_items:,}"
        steps.append({"step": f"{text}: {found}"} | left)

    all_there_is = ", all there is" if left["items"] < options.min_items else ""
    steps.append({"step": text + all_there_is} | window_size)
    warn_of_losses(window_size, left, _rules(options))
    return window, [*steps, *core_steps], years


def _catalogue(
    interactions: Interactions,
    num_items: int,
    options: ProtocolOptions,
    steps: Sequence[FunnelStep],
) -> tuple[np.ndarray, Interactions]:
    """Return `Rows.kept_items` and the interactions with items numbered by their place in them.

    Raises:
        UsageError: the k-core has left nothing; the message quotes the `steps`.
    """
    if not options.k_core:
        return np.arange(num_items), interactions
    if not len(interactions):
        passes = [_left(step) for step in steps if "-core, pass" in str(step["step"])]
        shown = [passes[:3], passes[-2:]] if len(passes) > 5 else [passes]
        detail = " … ".join("; ".join(part) for part in shown)
        raise UsageError(
            f"nothing is left after the {options.k_core}-core: {detail}. Lower --k_core or widen "
            "--from and --to"
        )
    kept = _flags(interactions.items)
    numbers = np.cumsum(kept, dtype=np.int32) - 1
    return np.flatnonzero(kept), replace(interactions, items=numbers[interactions.items])


def _left(step: FunnelStep) -> str:
    name = str(step["step"]).split(", ")[-1]
    return (
        f"{name} left {step['users']:,} users, {step['items']:,} items, "
        f"{step['interactions']:,} interactions"
    )


def _sampled(
    interactions: Interactions, options: ProtocolOptions, counts: Counts, funnel: list[FunnelStep]
) -> Interactions:
    """Draw the sample of users, and add it to `counts` and `funnel`."""
    if not options.num_users:
        return interactions
    mask = sample_users(interactions.users, options.num_users, options.seed)
    interactions = _take(interactions, mask)
    counts["user_sample"] = size(interactions)
    funnel.append({"step": f"sample of {options.num_users:,} users"} | counts["user_sample"])
    return interactions


def _sampled_rows(splits: Mapping[str, pa.Table], options: ProtocolOptions) -> dict[str, pa.Table]:
    """Draw the sample of users from rows."""
    columns = [table["user_id"].to_numpy() for table in splits.values()]
    users, _ = number_users(np.concatenate(columns))
    chosen = sample_users(users, options.num_users, options.seed)
    masks = np.split(chosen, np.cumsum([len(column) for column in columns])[:-1])
    return {
        name: table.filter(pa.array(mask))
        for (name, table), mask in zip(splits.items(), masks, strict=True)
    }


def _sequences(
    interactions: Interactions, user_ids: np.ndarray | None
) -> tuple[_Sequences, np.ndarray]:
    """Sort by user, time and file position; return also the file position of each interaction."""
    times = interactions.timestamps
    order = order_by(interactions.users) if times is None else order_by(interactions.users, times)

    users = _gather(interactions.users, order)
    starts = np.flatnonzero(_differs_from_previous(users))
    bounds = np.append(starts, len(users)).astype(order.dtype)
    ids = users[bounds[:-1]].astype(np.int64)
    del users  # memory
    ids = ids if user_ids is None else user_ids[ids]
    owner = np.repeat(np.arange(len(ids), dtype=order.dtype), np.diff(bounds))

    times = None if times is None else _gather(times, order)
    return _Sequences(ids, bounds, owner, _gather(interactions.items, order), times), order


def _tables(
    sequences: _Sequences, targets: Mapping[str, np.ndarray], max_history: int
) -> dict[str, pa.Table]:
    """Make the tables of the rows whose targets stand at these places of the sequences."""
    tables = {}
    for name, places in targets.items():
        users = _gather(sequences.users, _gather(sequences.owner, places))
        if sequences.times is None:
            times = pa.nulls(len(places), pa.int64())
        else:
            times = pa.array(_gather(sequences.times, places))
        histories = _histories(sequences, places, max_history)
        items = pa.array(_gather(sequences.items, places))
        tables[name] = pa.table([pa.array(users), histories, items, times], schema=ROW_SCHEMA)
    return tables


def _histories(sequences: _Sequences, places: np.ndarray, max_history: int) -> pa.ChunkedArray:
    lengths = places - _gather(sequences.bounds, _gather(sequences.owner, places))
    if max_history:
        np.minimum(lengths, max_history, out=lengths)

    # Cut the rows into chunks of about ITEMS_PER_CHUNK history items.
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(ITEMS_PER_CHUNK, total, ITEMS_PER_CHUNK))
    lists = []
    for begin, end in itertools.pairwise([0, *cuts.tolist(), len(places)]):
        count = lengths[begin:end]
        lists.append(_lists(sequences.items, places[begin:end] - count, count))
    return pa.chunked_array(lists, ROW_SCHEMA.field("history").type)


def _lists(items: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Return list r = items[starts[r] : starts[r] + lengths[r]]."""
    offsets = np.zeros(len(starts) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    values = _gather(items, ragged_arange(starts, lengths))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _shortened(table: pa.Table, max_history: int) -> pa.Table:
    """Keep the last `max_history` items of every history."""
    chunks = []
    for chunk in table["history"].chunks:
        offsets = chunk.offsets.to_numpy()
        lengths = np.minimum(np.diff(offsets), max_history)
        chunks.append(_lists(chunk.values.to_numpy(), offsets[1:] - lengths, lengths))

    field = ROW_SCHEMA.field("history")
    histories = pa.chunked_array(chunks, field.type)
    return table.set_column(table.schema.get_field_index("history"), field, histories)


def _num_rows(splits: Mapping[str, pa.Table]) -> dict[str, int]:
    return {name: table.num_rows for name, table in splits.items()}


def _finished(
    splits: dict[str, pa.Table],
    kept_items: np.ndarray,
    options: ProtocolOptions,
    counts: Counts,
    funnel: list[FunnelStep],
) -> Rows:
    """Apply the rules for cold items and users, and count the rows."""
    step: FunnelStep = {"step": "rows", **counts["rows"], **_num_rows(splits)}
    funnel.append(step)
    train = splits["train"]
    seen = np.zeros(len(kept_items), dtype=bool)
    seen[train["target"].to_numpy()] = True
    train_users = train["user_id"].to_numpy()

    if options.cold_items == "drop":
        known = {name: seen[splits[name]["target"].to_numpy()] for name in ("valid", "test")}
        splits = _without_cold(splits, "cold_items", known, funnel)
    if options.cold_users == "drop":
        known = {
            name: np.isin(splits[name]["user_id"].to_numpy(), train_users)
            for name in ("valid", "test")
        }
        splits = _without_cold(splits, "cold_users", known, funnel)

    counts["rows"] |= _num_rows(splits)
    return Rows(splits, kept_items, counts, funnel)


def _without_cold(
    splits: dict[str, pa.Table],
    rule: str,
    known: Mapping[str, np.ndarray],
    funnel: list[FunnelStep],
) -> dict[str, pa.Table]:
    """Keep the rows of valid and test that are `known`, bool (R,), and add a step to the funnel.

    Raises:
        UsageError: a split that had rows has none any more.
    """
    there, stay = (sum(map(count, known.values())) for count in (len, np.count_nonzero))
    warn_of_losses({"rows": there}, {"rows": int(stay)}, f"--{rule} drop")
    gone = {}
    for name, mask in known.items():
        gone[name] = int(np.count_nonzero(~mask))
        if gone[name] and gone[name] == len(mask):
            raise UsageError(
                f"--{rule} drop leaves none of {len(mask):,} {name} rows; use --{rule} keep"
            )
    splits = splits | {name: splits[name].filter(pa.array(mask)) for name, mask in known.items()}
    words = rule.replace("_", " ")
    text = f"{words}: {gone['valid']:,} valid and {gone['test']:,} test rows left out"
    funnel.append({"step": text} | _num_rows(splits))
    return splits
