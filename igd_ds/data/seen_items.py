"""The items that a user has met before a row: what `--exclude_seen` leaves out of the lists.

Letters in shapes: R rows of the split, E events of their users, n rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from igd_ds.items.ragged import ragged_arange

if TYPE_CHECKING:
    from igd_ds.data.dataset import Split

IN_ORDER = ("d3", "leave-one-out")
"""Protocols whose rows of a user stand in the order of time, over all splits."""

MOST_REPEATS = 0.01
"""`auto` leaves seen items out if at most this share of the training targets are seen items.

A list without them misses these targets, so it loses at most this much HR. Assumed: it lies between
the data that were measured, 0.0 % (Beauty and Sports 2014, Instruments) and 1.5 to 6.4 % (books,
games, industrial)."""


@dataclass(frozen=True)
class SeenItems:
    """The items that the user of each row of a split has met before it.

    These are the items of the row's history. A history may have been cut to its last items
    (`--max_history`). Where the rows of a user stand in the order of time (IN_ORDER), what was cut
    off is known from the user's earlier rows in all splits and counts too. The rows of the protocol
    `given` may stand in any order, so only their own histories count.

    Example:
        >>> seen = SeenItems.build(dataset.splits, "test", dataset.info["protocol"])
        >>> seen.of(np.array([0, 1]))  # may hold an item twice
        [array([4, 9, 4], dtype=int32), array([7], dtype=int32)]
    """

    split: Split
    events: np.ndarray
    """int32 (E,): the items that the users met, user after user, each oldest first."""
    begins: np.ndarray
    """int64 (R,): where the events of the row's user begin."""
    targets: np.ndarray
    """int64 (R,): which event is the row's target; those from `begins` up to it came before."""
    repeats: np.ndarray
    """bool (E,): whether the user met the item of the event before."""

    @classmethod
    def build(cls, splits: Mapping[str, Split], name: str, protocol: str) -> SeenItems:
        """Collect the events of the users of a split.

        Args:
            splits: the dataset's splits, in the order of time.
            name: of the split.
            protocol: the dataset's.
        """
        split = splits[name]
        if protocol not in IN_ORDER:
            nowhere = np.zeros(len(split), np.int64)
            return cls(split, np.empty(0, np.int32), nowhere, nowhere, np.empty(0, bool))

        # The rows up to this split, user after user. Each adds its target as an event, and a user's
        # first row its history before that.
        names = list(splits)[: list(splits).index(name) + 1]
        earlier = [splits[other] for other in names]
        users = np.concatenate([rows.user_ids for rows in earlier])
        order = np.argsort(users, kind="stable")
        is_first = np.append(True, np.diff(users[order]) != 0)
        lengths = np.concatenate([np.diff(rows.history_offsets) for rows in earlier])[order]
        ends = np.cumsum(np.where(is_first, lengths, 0) + 1)
        place = np.empty_like(order)  # of each row's target among the events
        place[order] = ends - 1

        events = np.empty(int(ends[-1]), np.int32)
        bounds = np.cumsum([0, *map(len, earlier)])
        first_rows = order[is_first]
        for rows, begin, end in zip(earlier, bounds[:-1], bounds[1:], strict=True):
            events[place[begin:end]] = rows.targets
            own = first_rows[(first_rows >= begin) & (first_rows < end)]
            starts = rows.history_offsets[own - begin]
            counts = rows.history_offsets[own - begin + 1] - starts
            into = ragged_arange(place[own] - counts, counts)
            events[into] = rows.history_items[ragged_arange(starts, counts)]

        user_begins = (ends - 1 - lengths)[is_first]
        begins = np.empty_like(order)
        begins[order] = user_begins[np.cumsum(is_first) - 1]
        repeats = _repeats(events, user_begins)
        return cls(split, events, begins[bounds[-2] :], place[bounds[-2] :], repeats)

    def of(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return the items seen before each of the rows (n,), int32; an item may occur twice."""
        return [
            np.concatenate(
                [self.split.history(row), self.events[self.begins[row] : self.targets[row]]]
            )
            for row in rows
        ]

    def is_repeat(self) -> np.ndarray:
        """Return whether the target of each row of the split is a seen item, bool (R,)."""
        split = self.split
        row = np.repeat(np.arange(len(split)), np.diff(split.history_offsets))
        in_history = row[split.history_items == split.targets[row]]
        repeats = np.zeros(len(split), bool)
        repeats[in_history] = True
        if len(self.events):
            repeats |= self.repeats[self.targets]
        return repeats


def with_seen(
    deny: Sequence[np.ndarray | None] | None, seen: Sequence[np.ndarray]
) -> list[np.ndarray | None]:
    """Return deny lists with the seen items of each user added.

    Args:
        deny: item ids per user, or None for a user without a list; None: no user has one.
        seen: item ids per user.
    """
    if deny is None:
        return list(seen)
    return [
        items if denied is None else np.concatenate([denied, items])
        for denied, items in zip(deny, seen, strict=True)
    ]


def _repeats(events: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Return whether the user met the item of each event before, bool (E,).

    Args:
        events: (E,), items, user after user, in the order of time.
        begins: int64, where the events of each user begin.
    """
    user = np.zeros(len(events), np.int64)
    user[begins] = 1
    user = np.cumsum(user)

    # The sort keeps the order of a user's events with one item: all but the first are repeats.
    order = np.lexsort((events, user))
    same = (np.diff(events[order]) == 0) & (np.diff(user[order]) == 0)
    repeats = np.zeros(len(events), bool)
    repeats[order[1:][same]] = True
    return repeats
