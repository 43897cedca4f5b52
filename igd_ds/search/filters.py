"""What a user may be shown and what a second scorer thinks of it, for any trie node: `ItemFilter` and `Guidance`.

The items under a node are neighbours in the trie's item order, so both are questions about a range of positions, answered for
the edges that a search looks at; no trie is rebuilt and no catalogue walked.

Letters in shapes: B users of a batch, N items, M trie nodes, E edges in question, n entries in all lists of a batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from igd_ds.errors import UsageError
from igd_ds.items.trie import TokenTrie

# Guidance counts mass in units of 2^-61 of a user's total: sums up to 2^62 fit an int64 with room for rounding up N items.
MASS_UNITS = 2.0**61


@dataclass(frozen=True)
class ItemRanges:
    """Where a trie's items lie in `item_order`: those under node n at first_item[n] … first_item[n] + num_items[n] − 1."""

    first_item: torch.Tensor
    """int32 (M,) on the search's device."""
    num_items: torch.Tensor
    """int32 (M,) on the search's device, items that share a leaf each counted."""
    position: torch.Tensor
    """int32 (N,) on the search's device: an item's place in `item_order`."""

    @classmethod
    def build(cls, trie: TokenTrie, device: torch.device | str = "cpu") -> "ItemRanges":
        """Copy what is needed of a TokenTrie of numpy arrays to `device`: 8 bytes per node and 4 per item, once per run."""
        position = np.empty(len(trie.item_order), np.int32)
        position[trie.item_order] = np.arange(len(position), dtype=np.int32)
        # np.array copies: a tensor over a read-only memory map would be undefined to write.
        arrays = (np.array(trie.first_item), np.array(trie.num_items), position)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


@dataclass(frozen=True)
class ItemFilter:
    """Which items each user of a batch may get: a search passes only nodes with an allowed item below them.

    Costs O(E log n) a question and 8 bytes per list entry, however large the catalogue is.
    """

    ranges: ItemRanges
    """Of the searched trie."""
    keys: torch.Tensor
    """int64 (n + 1,), ascending, each once: user·N + position of the listed items, and a last one larger than any."""
    allow: torch.Tensor
    """bool (B,): the user's listed items are the allowed ones; otherwise they are the denied ones."""

    @classmethod
    def build(
        cls,
        ranges: ItemRanges,
        num_users: int,
        allow: Sequence[Iterable[int] | None] | None = None,
        deny: Sequence[Iterable[int] | None] | None = None,
        labels: Sequence | None = None,
    ) -> "ItemFilter":
        """Take in one allow list and one deny list per user.

        Args:
            ranges: of the searched trie.
            num_users: B.
            allow: per user the only item ids to choose from, or None for all items; None: all items for everybody.
            deny: per user the item ids to leave out, or None for none; it wins where both lists have an item.
            labels: what the caller calls the users, for error messages.

        Lists may be in any order and repeat themselves.

        Raises:
            ValueError: not one entry per user, something that is no item id, or a user who is left without any item.
        """
        num_items, device = len(ranges.position), ranges.position.device
        allowed, denied = (
            _lists(*named, num_users, num_items, labels)
            for named in (("allow", allow), ("deny", deny))
        )
        listed, is_allow = [], []
        for user, (only, without) in enumerate(zip(allowed, denied, strict=True)):
            items = without if only is None else np.setdiff1d(only, without, assume_unique=True)
            listed.append(items)
            is_allow.append(only is not None)
            if len(items) == (num_items if only is None else 0):
                raise UsageError(
                    f"{_who(user, labels)}: the item filter leaves nothing of the {num_items} items; loosen it"
                )
        owner = torch.from_numpy(
            np.repeat(np.arange(num_users), [len(items) for items in listed])
        ).to(device)
        item = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *listed])).to(device)
        keys = (owner * num_items + ranges.position[item]).sort().values
        end = keys.new_full((1,), torch.iinfo(torch.int64).max)
        return cls(
            ranges, torch.cat([keys, end]), torch.tensor(is_allow, dtype=torch.bool, device=device)
        )

    def allows(self, user: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """Return whether an item that the user may get lies under the node (a shared leaf: any of its items), bool (E,).

        Args:
            user: int64 (E,), places in the batch.
            node: int64 (E,).
        """
        return self._any_allowed(user, self.ranges.first_item[node], self.ranges.num_items[node])

    def allows_items(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        """Return whether the user may get the item, bool (E,): `user` int64 (E,), `item` (E,). It cuts a leaf's items."""
        position = self.ranges.position[item]
        return self._any_allowed(user, position, torch.ones_like(position))

    def _any_allowed(
        self, user: torch.Tensor, first: torch.Tensor, count: torch.Tensor
    ) -> torch.Tensor:
        """Whether one of the user's positions first … first + count − 1 is allowed; all (E,), count ≥ 1."""
        begin = user * len(self.ranges.position) + first
        allow = self.allow[user]
        # Keys are different integers, so from the first key ≥ begin on, the key `count − 1` further lies inside the range only if
        # every position is listed: all denied. And the first key itself lies inside if any position is listed: one allowed.
        entry = torch.searchsorted(self.keys, begin) + (count - 1).where(~allow, 0)
        inside = self.keys[entry.clamp(max=len(self.keys) - 1)] < begin + count
        return inside == allow


@dataclass(frozen=True)
class Guidance:
    """A second scorer's say, after D3: each edge adds weight · ln (q-mass under the child / q-mass under its parent).

    q is any sequential recommender's item probabilities, or non-negative scores; only their proportions count. Along a path the
    increments add up to weight · ln of the leaf's share (the items of a shared leaf together). A child never has more mass than
    its parent, so no increment is positive and the exact search's bound holds. A token that leaves only items with q = 0 gets
    −inf, unless the weight is 0: the guide forbids those items.
    """

    ranges: ItemRanges
    """Of the searched trie."""
    mass: torch.Tensor
    """int64 (B, N + 1): units of mass before each position of `item_order`, and all of them last."""
    weight: float
    """Mixing weight ≥ 0; 0: no guidance."""

    @classmethod
    def build(
        cls, ranges: ItemRanges, q, weight: float, labels: Sequence | None = None
    ) -> "Guidance":
        """Sum up each user's masses in the trie's item order, as integers: 8·B·N bytes.

        Differences of float sums would forbid items below 1e-16 of the total, and could exceed the parent's where a GPU sums in
        blocks. Integers add up exactly, in any order; an item with q > 0 has at least one unit, 4e-19 of the total.

        Args:
            ranges: of the searched trie.
            q: tensor or array of floats (B, N), column i for item i; ≥ 0.
            weight: mixing weight ≥ 0.
            labels: what the caller calls the users, for error messages.

        Raises:
            ValueError: a negative or infinite weight, a wrong shape, a user with negative, NaN or infinite values or zeros alone.
        """
        num_items, device = len(ranges.position), ranges.position.device
        if not 0 <= weight < np.inf:
            raise UsageError(f"--guidance_weight must not be negative, and finite, found {weight}")
        if len(q.shape) != 2 or q.shape[1] != num_items:
            raise UsageError(
                f"--guidance takes one row per user of {num_items} item scores, found shape {tuple(q.shape)}"
            )
        place = ranges.position.long() + 1
        mass = torch.zeros((len(q), num_items + 1), dtype=torch.int64, device=device)
        for user in range(len(q)):  # row by row: fp64 copies of one row at a time
            row = (
                q[user]
                if isinstance(q, torch.Tensor)
                else torch.from_numpy(np.array(q[user], dtype=np.float64))
            )
            row = row.to(device, torch.float64)
            total = row.sum()
            if not (row >= 0).all() or not total.isfinite():
                raise UsageError(
                    f"{_who(user, labels)}: --guidance has negative, NaN or infinite scores"
                )
            if total == 0:
                raise UsageError(f"{_who(user, labels)}: --guidance gives every item a score of 0")
            mass[user, place] = (row / total * MASS_UNITS).ceil().long()
            mass[user] = mass[user].cumsum(0)
        return cls(ranges, mass, weight)

    def increments(
        self, user: torch.Tensor, parent: torch.Tensor, child: torch.Tensor
    ) -> torch.Tensor:
        """Return what the guide adds to the scores of edges, in nats, float32 (E,), ≤ 0.

        Args:
            user: int64 (E,), places in the batch.
            parent: int64 (E,), nodes.
            child: int64 (E,), a child of each.
        """
        # A parent without mass has children without: 0 / 1 makes them −inf rather than NaN.
        share = self._mass_under(user, child) / self._mass_under(user, parent).clamp(min=1)
        return torch.xlogy(self.weight, share).float()  # 0 · ln 0 = 0

    def _mass_under(self, user: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """Units of the user's mass under the node, float64 (E,)."""
        first = self.ranges.first_item[node].long()
        return (
            self.mass[user, first + self.ranges.num_items[node]] - self.mass[user, first]
        ).double()


def _lists(name: str, lists, num_users: int, num_items: int, labels) -> list[np.ndarray | None]:
    """Return each user's item ids, int64, ascending, each once; an absent allow list is None, an absent deny list empty."""
    if lists is None:
        lists = [None] * num_users
    if len(lists) != num_users:
        raise UsageError(
            f"one {name} list (or None) per user is needed: found {len(lists)} for {num_users} users"
        )
    checked = []
    for user, ids in enumerate(lists):
        if ids is None:
            checked.append(None if name == "allow" else np.empty(0, np.int64))
            continue
        found = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
            raise UsageError(
                f"{_who(user, labels)}: the {name} list must be a flat list of item ids, whole numbers"
            )
        items = np.unique(found).astype(np.int64)
        unknown = items[(items < 0) | (items >= num_items)]
        if unknown.size:
            known = f"ids are 0 to {num_items - 1}"
            raise UsageError(
                f"{_who(user, labels)}: item {unknown[0]} of the {name} list is not in the catalogue; {known}"
            )
        checked.append(items)
    return checked


def _who(user: int, labels: Sequence | None) -> str:
    return f"user {user} of the batch" + ("" if labels is None else f" ({labels[user]})")
