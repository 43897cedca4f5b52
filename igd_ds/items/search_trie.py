"""The device view of the trie: a few flat arrays for searches and objectives."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from igd_ds.items.ragged import ragged_rows
from igd_ds.items.trie import TokenTrie


@dataclass(frozen=True)
class SearchTrie:
    """Arrays of a TokenTrie of M nodes on one device, each in the smallest dtype that holds it.

    An array is indexed by node, and edge e leads into node e. All arrays take 14 to 22 bytes per
    node, depending on the dtypes. Cast values to int64 before you index with them (`.long()`):
    torch would take a uint8 index for a mask.

    Example:
        >>> trie = SearchTrie.build(token_trie, "cuda")
        >>> row, child = trie.children(torch.tensor([0, 7], device="cuda"))
    """

    token: torch.Tensor
    """(M,): the token on the edge into the node; 0 at the root."""
    parent: torch.Tensor
    """(M,): the node above; 0 at the root."""
    child_begin: torch.Tensor
    """(M + 1,): the children of node n are child_begin[n] … child_begin[n + 1] − 1."""
    depth: torch.Tensor
    """(M,): number of tokens on the path from the root."""
    longest: torch.Tensor
    """(M,): number of tokens of the longest item under the node. A search needs it to bound the
    score of an unfinished path."""
    forced: torch.Tensor
    """(M,): how many nodes below this one follow without a choice and have a child themselves. This
    is the radix view of the trie: a model that reads the node's token can read the tokens of the
    next `forced` nodes in the same pass."""
    only_leaf: torch.Tensor
    """(M,): the leaf below the node, or the node itself if it is a leaf; 0 where there are several
    leaves."""

    @classmethod
    def build(cls, trie: TokenTrie, device: torch.device | str = "cpu") -> SearchTrie:
        """Copy the arrays of a TokenTrie to `device`."""
        arrays = {
            "token": np.maximum(trie.token, 0),
            "parent": np.maximum(trie.parent, 0),
            "child_begin": trie.child_begin,
            "depth": trie.depth,
            "longest": longest_item(trie),
            "forced": forced_tokens(trie),
            "only_leaf": only_leaves(trie),
        }
        return cls(**{name: _smallest(array).to(device) for name, array in arrays.items()})

    def to(self, device: torch.device | str) -> SearchTrie:
        """Return a copy on another device."""
        return SearchTrie(
            **{field.name: getattr(self, field.name).to(device) for field in fields(self)}
        )

    @property
    def num_nodes(self) -> int:
        """M, the root included."""
        return len(self.token)

    def is_leaf(self, nodes: torch.Tensor) -> torch.Tensor:
        """Return whether each of `nodes` (E,) ends an item, bool (E,)."""
        return self.child_begin[nodes + 1] == self.child_begin[nodes]

    def children(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the children of `nodes` (R,), in the order of `nodes` and of their tokens.

        Returns:
            The index in `nodes` of each child's parent, and the child, each int64 (E,).

        Example:
            Node 0 has the children 1 and 2, node 2 has the child 5.

            >>> row, child = trie.children(torch.tensor([0, 2]))
            >>> row.tolist(), child.tolist()
            ([0, 0, 1], [1, 2, 5])
        """
        begin = self.child_begin[nodes].long()
        return ragged_rows(begin, self.child_begin[nodes + 1] - begin)


def longest_item(trie: TokenTrie) -> np.ndarray:
    """Return the number of tokens of the longest item under each node, int32 (M,)."""
    longest = np.array(trie.depth, dtype=np.int32)
    levels = trie.level_begin()

    # From the lowest level but one up to the root: the maximum over the children.
    for begin, end in zip(levels[-3::-1], levels[-2:0:-1], strict=True):
        first = np.asarray(trie.child_begin[begin : end + 1], dtype=np.int64)
        inner = np.flatnonzero(np.diff(first))
        if len(inner):
            longest[begin + inner] = np.maximum.reduceat(
                longest[first[0] : first[-1]], first[inner] - first[0]
            )
    return longest


def forced_tokens(trie: TokenTrie) -> np.ndarray:
    """Return how many only children follow each node, leaves not counted, int32 (M,)."""
    forced = np.zeros(trie.num_nodes, np.int32)
    levels = trie.level_begin()

    # From the lowest level but one up to the root: 1 plus the number at the only child.
    for begin, end in zip(levels[-3::-1], levels[-2:0:-1], strict=True):
        first = np.asarray(trie.child_begin[begin : end + 1])
        only = np.flatnonzero(np.diff(first) == 1)
        child = first[only]
        inner = trie.child_begin[child + 1] > trie.child_begin[child]
        forced[begin + only[inner]] = 1 + forced[child[inner]]
    return forced


def only_leaves(trie: TokenTrie) -> np.ndarray:
    """Return the only leaf at or below each node, int32 (M,); 0 where there are several."""
    num_children = np.diff(trie.child_begin)
    leaf = np.where(num_children == 0, np.arange(trie.num_nodes, dtype=np.int32), 0)
    levels = trie.level_begin()

    # From the lowest level but one up to the root: that of the only child.
    for begin, end in zip(levels[-3::-1], levels[-2:0:-1], strict=True):
        only = begin + np.flatnonzero(num_children[begin:end] == 1)
        leaf[only] = leaf[trie.child_begin[only]]
    return leaf


def _smallest(array: np.ndarray) -> torch.Tensor:
    """Copy to the smallest integer type that torch can index with and that holds all values ≥ 0."""
    for dtype in (np.uint8, np.int16, np.int32):
        if len(array) and array.max() <= np.iinfo(dtype).max:
            return torch.from_numpy(array.astype(dtype))
    raise AssertionError("node ids and tokens fit int32")
