"""Item filters and guidance by a second scorer, for any node of the trie.

The items under a node are neighbours in the trie's item order, so filter and guidance look at a
range of positions in that order, and only for the edges that a search looks at. No trie is rebuilt
and the catalogue is not walked. All tensors lie on the CPU, as those of the search do.

Letters in shapes: B users of a batch, N items, M trie nodes, E edges, n entries in all lists of a
batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from igd_ds.errors import UsageError
from igd_ds.items.ragged import ragged_arange
from igd_ds.items.trie import TokenTrie

# Guidance counts mass in units of 2^-61 of a user's total. Sums up to 2^62 fit an int64, with room
# for rounding up the masses of N items.
MASS_UNITS = 2.0**61

ItemLists = Sequence[Iterable[int] | None]
"""One list of item ids per user, or None for a user without a list."""


@dataclass(frozen=True)
class ItemRanges:
    """Where a trie's items lie in `item_order`.

    The items under node n are those at first_item[n] … first_item[n] + num_items[n] − 1.
    """

    first_item: torch.Tensor
    """int32 (M,)."""
    num_items: torch.Tensor
    """int32 (M,); each item of a shared leaf is counted."""
    position: torch.Tensor
    """int32 (N,): an item's position in `item_order`."""

    @classmethod
    def build(cls, trie: TokenTrie) -> ItemRanges:
        """Copy the arrays from a TokenTrie: 8 bytes per node and 4 bytes per item."""
        position = np.empty(len(trie.item_order), np.int32)
        position[trie.item_order] = np.arange(len(position), dtype=np.int32)
        # np.array copies: writing to a tensor over a read-only memory map would be undefined.
        arrays = (np.array(trie.first_item), np.array(trie.num_items), position)
        return cls(*(torch.from_numpy(array) for array in arrays))


@dataclass(frozen=True)
class ItemFilter:
    """The items that each user of a batch may get.

    A search visits only nodes with an allowed item below them. A look-up of E edges costs
    O(E log n), and a list entry takes 8 bytes, however large the catalogue is.

    Example:
        >>> ranges = ItemRanges.build(stored.trie)
        >>> item_filter = ItemFilter.build(ranges, 2, allow=[None, [3, 8]], deny=[[5], []])
        >>> item_filter.allows_items(torch.tensor([0, 1]), torch.tensor([5, 8])).tolist()
        [False, True]
    """

    ranges: ItemRanges
    """Of the searched trie."""
    keys: torch.Tensor
    """int64 (n + 1,): user·N + position of each listed item, ascending and without duplicates, and
    a last key that is larger than all of them."""
    allow: torch.Tensor
    """bool (B,): whether the user's listed items are the allowed items; else they are denied."""

    @classmethod
    def build(
        cls,
        ranges: ItemRanges,
        num_users: int,
        allow: ItemLists | None = None,
        deny: ItemLists | None = None,
        names: Sequence[str] | None = None,
    ) -> ItemFilter:
        """Make the filter of one allow list and one deny list per user.

        Lists may be in any order and hold an item twice.

        Args:
            ranges: of the searched trie.
            num_users: B.
            allow: the only item ids that each user may get; None for a user without an allow list.
                None instead of a sequence: no user has one.
            deny: the item ids that each user may not get, or None. An item in both lists is denied.
            names: what error messages call the users.

        Raises:
            UsageError: there is not one entry per user, an entry is no item id, or a user is left
                without any item.
        """
        num_items = len(ranges.position)
        allowed = _checked_lists("allow", allow, num_users, num_items, names)
        denied = _checked_lists("deny", deny, num_users, num_items, names)

        # One list per user: the allowed items without the denied ones, or the denied items.
        listed: list[np.ndarray] = []
        is_allow: list[bool] = []
        for user, (only, without) in enumerate(zip(allowed, denied, strict=True)):
            items = np.empty(0, np.int64) if without is None else without
            if only is not None:
                items = np.setdiff1d(only, items, assume_unique=True)
            listed.append(items)
            is_allow.append(only is not None)
            if len(items) == (num_items if only is None else 0):
                raise UsageError(
                    f"{_name(user, names)}: nothing is left of the {num_items} items, because the "
                    "item filter, or what the user has met before, leaves all of them out: loosen "
                    "the filter"
                )

        counts = [len(items) for items in listed]
        owner = torch.from_numpy(np.repeat(np.arange(num_users), counts))
        item = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *listed]))
        keys = (owner * num_items + ranges.position[item]).sort().values
        end = keys.new_full((1,), torch.iinfo(torch.int64).max)
        return cls(ranges, torch.cat([keys, end]), torch.tensor(is_allow, dtype=torch.bool))

    def allows(self, user: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """Return whether an item that the user may get lies under the node, bool (E,).

        A shared leaf is allowed if any of its items is.

        Args:
            user: int64 (E,), indices into the batch.
            node: int64 (E,).
        """
        return self._any_allowed(user, self.ranges.first_item[node], self.ranges.num_items[node])

    def allows_items(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        """Return whether the user may get the item, bool (E,).

        Items of a shared leaf are told apart.

        Args:
            user: int64 (E,), indices into the batch.
            item: integers (E,).
        """
        position = self.ranges.position[item]
        return self._any_allowed(user, position, torch.ones_like(position))

    def mask(self) -> torch.Tensor:
        """Return whether each user may get each item, bool (B, N); column i is item i."""
        num_users, num_items = len(self.allow), len(self.ranges.position)
        is_listed = torch.zeros(num_users * num_items, dtype=torch.bool)
        is_listed[self.keys[:-1]] = True
        by_item = is_listed.view(num_users, num_items)[:, self.ranges.position]
        return by_item == self.allow[:, None]

    def _any_allowed(
        self, user: torch.Tensor, first: torch.Tensor, count: torch.Tensor
    ) -> torch.Tensor:
        """Return whether one of the user's positions first … first + count − 1 is allowed, (E,)."""
        begin = user * len(self.ranges.position) + first
        allow = self.allow[user]

        # The keys are different integers. Consider the first key ≥ begin. If the user's list
        # denies, the key `count − 1` entries further lies inside the range only if every position
        # is listed, which means that all are denied. If the list allows, the first key itself lies
        # inside the range if any position is listed.
        entry = torch.searchsorted(self.keys, begin) + (count - 1).where(~allow, 0)
        inside = self.keys[entry.clamp(max=len(self.keys) - 1)] < begin + count
        return inside == allow


def items_under(
    trie: TokenTrie, leaves: np.ndarray, users: np.ndarray, item_filter: ItemFilter | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the items of leaves (n,) that the users (n,) of a batch may get.

    Returns:
        Item ids, leaf after leaf, and their number per leaf (n,).
    """
    count = trie.num_items[leaves].astype(np.int64)
    owner = np.repeat(np.arange(len(leaves)), count)
    items = trie.item_order[ragged_arange(trie.first_item[leaves], count)]

    if item_filter is not None:
        user = torch.from_numpy(users[owner].astype(np.int64))
        item = torch.from_numpy(items.astype(np.int64))
        allowed = item_filter.allows_items(user, item).numpy()
        owner, items = owner[allowed], items[allowed]
    return items, np.bincount(owner, minlength=len(leaves))


@dataclass(frozen=True)
class Guidance:
    """Item probabilities of a second scorer, added to the scores with a weight (after D3).

    Each edge adds weight · ln (q-mass under the child / q-mass under its parent). q holds any
    sequential recommender's item probabilities, or non-negative scores; only their proportions
    count. Along a path the increments add up to weight · ln of the leaf's share (the items of a
    shared leaf together).

    A child never has more mass than its parent, so no increment is positive and the bound of the
    exact search holds. A token that leaves only items with q = 0 gets −inf, unless the weight is 0:
    such items cannot be listed.
    """

    ranges: ItemRanges
    """Of the searched trie."""
    mass: torch.Tensor
    """int64 (B, N + 1): units of mass before each position of `item_order`; the last column is all
    mass."""
    weight: float
    """Guidance weight ≥ 0; 0: no guidance."""

    @classmethod
    def build(
        cls,
        ranges: ItemRanges,
        q: np.ndarray | torch.Tensor,
        weight: float,
        names: Sequence[str] | None = None,
    ) -> Guidance:
        """Sum up each user's masses in the trie's item order, as integers: 8·B·N bytes.

        Differences of float sums would lose items below 1e-16 of the total, and could exceed the
        parent's difference on a GPU, which sums in blocks. Integers add up exactly, in any order.
        An item with q > 0 has at least one unit, which is 4e-19 of the total.

        Args:
            ranges: of the searched trie.
            q: floats (B, N), at least 0; column i belongs to item i.
            weight: guidance weight ≥ 0.
            names: what error messages call the users.

        Raises:
            UsageError: a negative or infinite weight, a wrong shape, or a user whose values are
                negative, NaN, infinite or all zero.
        """
        num_items = len(ranges.position)
        if not 0 <= weight < np.inf:
            raise UsageError(
                f"--guidance_weight must not be negative, NaN or infinite, found {weight}"
            )
        if len(q.shape) != 2 or q.shape[1] != num_items:
            raise UsageError(
                f"--guidance takes one row per user of {num_items} item scores, found shape "
                f"{tuple(q.shape)}"
            )

        # One user at a time, because each row is copied to fp64.
        column = ranges.position.long() + 1
        mass = torch.zeros((len(q), num_items + 1), dtype=torch.int64)
        for user in range(len(q)):
            row = _row(q, user)
            total = row.sum()
            if not (row >= 0).all() or not total.isfinite():
                raise UsageError(
                    f"{_name(user, names)}: --guidance has negative, NaN or infinite scores"
                )
            if total == 0:
                raise UsageError(f"{_name(user, names)}: --guidance gives every item a score of 0")
            mass[user, column] = (row / total * MASS_UNITS).ceil().long()
            mass[user] = mass[user].cumsum(0)
        return cls(ranges, mass, weight)

    def increments(
        self, user: torch.Tensor, parent: torch.Tensor, child: torch.Tensor
    ) -> torch.Tensor:
        """Return what the guidance adds to the scores of edges, in nats, float32 (E,), at most 0.

        Args:
            user: int64 (E,), indices into the batch.
            parent: int64 (E,), nodes.
            child: int64 (E,), a child of each.
        """
        # The children of a parent without mass have none either: 0 / 1 gives them −inf, not NaN.
        share = self._mass_under(user, child) / self._mass_under(user, parent).clamp(min=1)
        return torch.xlogy(self.weight, share).float()  # 0 · ln 0 = 0

    def _mass_under(self, user: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """Return the units of the user's mass under the node, float64 (E,)."""
        first = self.ranges.first_item[node].long()
        end = first + self.ranges.num_items[node]
        return (self.mass[user, end] - self.mass[user, first]).double()


def _row(q: np.ndarray | torch.Tensor, user: int) -> torch.Tensor:
    """Return one row of q as a tensor, float64 on the CPU."""
    if isinstance(q, torch.Tensor):
        return q[user].to("cpu", torch.float64)
    return torch.from_numpy(np.array(q[user], dtype=np.float64))


def _checked_lists(
    name: str,
    lists: ItemLists | None,
    num_users: int,
    num_items: int,
    names: Sequence[str] | None,
) -> list[np.ndarray | None]:
    """Return each user's item ids, int64, ascending and without duplicates; None without a list."""
    if lists is None:
        return [None] * num_users
    if len(lists) != num_users:
        raise UsageError(
            f"one {name} list (or None) per user is needed: found {len(lists)} for {num_users} "
            "users"
        )
    return [
        None if ids is None else _checked_ids(name, ids, num_items, _name(user, names))
        for user, ids in enumerate(lists)
    ]


def _checked_ids(name: str, ids: Iterable[int], num_items: int, user: str) -> np.ndarray:
    """Return item ids, int64, ascending and without duplicates; raise UsageError naming `user`."""
    found = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise UsageError(
            f"{user}: the {name} list must be a flat list of item ids, which are whole numbers"
        )

    items = np.unique(found).astype(np.int64)
    unknown = items[(items < 0) | (items >= num_items)]
    if unknown.size:
        raise UsageError(
            f"{user}: item {unknown[0]} of the {name} list is not in the catalogue; ids are 0 to "
            f"{num_items - 1}"
        )
    return items


def _name(user: int, names: Sequence[str] | None) -> str:
    """Return how error messages call a user."""
    return f"user {user} of the batch" + ("" if names is None else f" ({names[user]})")
