"""Rejected items for preference training, drawn from the catalogue's trie.

Items that share a token path are one item for a model, so whatever is drawn are different *leaves*
of the trie, and never the target's. `beam` negatives need a model and are made in
`igd_ds/preference/pairs.py`.

Letters in shapes: B rows, J negatives of a row, L leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from igd_ds.errors import UsageError
from igd_ds.items.trie import TokenTrie

BEAM = "beam"


@dataclass(frozen=True)
class LeafTable:
    """The leaves of a trie in the lexicographic order of their paths.

    The leaves below any trie node follow one another in this order.
    """

    trie: TokenTrie
    leaf: np.ndarray
    """int64 (L,): trie nodes."""
    first: np.ndarray
    """int64 (L,), ascending: the leaf's first place in `trie.item_order`."""
    item: np.ndarray
    """int64 (L,): the first item of each leaf."""

    @classmethod
    def build(cls, trie: TokenTrie) -> LeafTable:
        """Sort the leaves of a trie."""
        leaf = np.flatnonzero(trie.is_leaf)
        leaf = leaf[np.argsort(trie.first_item[leaf])]
        first = trie.first_item[leaf].astype(np.int64)
        return cls(trie, leaf, first, trie.item_order[first].astype(np.int64))

    def places(self, items: np.ndarray) -> np.ndarray:
        """Return the place of the leaf of each of `items` (B,), int64 (B,)."""
        return np.searchsorted(self.first, self.trie.first_item[self.trie.leaf_of_item[items]])

    def below(self, node: int) -> tuple[int, int]:
        """Return the first place below a trie node, and one past the last."""
        begin = int(self.trie.first_item[node])
        end = begin + int(self.trie.num_items[node])
        return int(np.searchsorted(self.first, begin)), int(np.searchsorted(self.first, end))


def random(
    leaves: LeafTable, targets: np.ndarray, number: int, generator: np.random.Generator
) -> np.ndarray:
    """Return different leaves for each target, all equally likely; see NEGATIVES."""
    return _drawn(np.zeros(len(leaves.leaf)), leaves.places(targets), number, generator)


def popularity(
    leaves: LeafTable, targets: np.ndarray, number: int, generator: np.random.Generator
) -> np.ndarray:
    """Return different leaves for each target, each as likely as it is a training target."""
    count = leaves.trie.train_count[leaves.leaf]
    with np.errstate(divide="ignore"):
        return _drawn(np.log(count), leaves.places(targets), number, generator)


def sibling(
    leaves: LeafTable, targets: np.ndarray, number: int, generator: np.random.Generator
) -> np.ndarray:
    """Return the leaves that share the longest prefix with each target.

    If more leaves share a prefix than are still needed, they are drawn among those.
    """
    parent = leaves.trie.parent
    chosen = np.empty((len(targets), number), np.int64)
    for row, target in enumerate(targets):
        node = int(leaves.trie.leaf_of_item[target])
        begin, end = leaves.below(node)
        filled = 0
        while filled < number:
            # One prefix shorter: the leaves to the left and to the right of those seen so far.
            node = int(parent[node])
            left, right = leaves.below(node)
            further = np.concatenate([np.arange(left, begin), np.arange(end, right)])
            taken = generator.permutation(further)[: number - filled]
            chosen[row, filled : filled + len(taken)] = taken
            filled += len(taken)
            begin, end = left, right
    return chosen


NegativeDraw = Callable[[LeafTable, np.ndarray, int, np.random.Generator], np.ndarray]
NEGATIVES: dict[str, NegativeDraw] = {
    "random": random,
    "popularity": popularity,
    "sibling": sibling,
}
"""Name: function (leaves, targets (B,), J, generator) → places in the table, int64 (B, J), all
different and none the target's."""


def _drawn(
    log_weight: np.ndarray, excluded: np.ndarray, number: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw places without replacement, each with a probability that follows its weight.

    The largest sums of log weight and Gumbel noise are such a draw (Kool et al.).

    Args:
        log_weight: float64 (L,); −∞ is never drawn.
        excluded: int64 (B,), the place that each row may not get.
        number: J, less than the places with a weight.
        generator: draws the noise.
    """
    keys = log_weight + generator.gumbel(size=(len(excluded), len(log_weight)))
    keys[np.arange(len(excluded)), excluded] = -np.inf
    best = np.argpartition(-keys, number - 1, axis=1)[:, :number]
    return np.take_along_axis(best, np.argsort(-np.take_along_axis(keys, best, 1), 1), 1)


def check_negatives(leaves: LeafTable, name: str, number: int) -> None:
    """Check that every row can get its negatives.

    Raises:
        UsageError: the catalogue, or with `popularity` the training rows, have too few items.
    """
    num_leaves, where = len(leaves.leaf), "the catalogue has"
    if name == "popularity":
        num_leaves = int(np.count_nonzero(leaves.trie.train_count[leaves.leaf]))
        where = "the training rows have"
    most = num_leaves - 1
    if number > most:
        raise UsageError(
            f"--num_negatives {number} of --negatives {name}: beside a target {where} {most} items "
            "with a token path of their own; lower it"
        )


def check_group(leaves: LeafTable, size: int) -> None:
    """Raise UsageError if a group would have more items than the catalogue has."""
    if size > len(leaves.leaf):
        raise UsageError(
            f"--group_size {size}: the catalogue has {len(leaves.leaf)} items with a token path of "
            "their own; lower it"
        )
