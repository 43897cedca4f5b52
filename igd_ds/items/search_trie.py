"""The trie as a search reads it: a few flat arrays on the search's device, in the smallest dtype that is exact."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class SearchTrie:
    """Arrays of a TokenTrie of M nodes; indexed by node, which is also its edge. 8 to 14 bytes a node, depending on the dtypes.

    token (M,): on the edge into the node (0 at the root). child_begin (M + 1,): children of n are child_begin[n] …
    child_begin[n + 1] − 1. depth (M,): tokens on the path. longest (M,): tokens of the longest item under the node, which bounds
    what an open prefix can still become. forced (M,): how many nodes below this one follow without a choice and have a
    successor themselves: the radix view of the trie. A model that is given the node's token can be given those of the next
    `forced` nodes in the same pass.
    """

    token: torch.Tensor
    child_begin: torch.Tensor
    depth: torch.Tensor
    longest: torch.Tensor
    forced: torch.Tensor

    @classmethod
    def build(cls, trie, device: torch.device | str = "cpu") -> "SearchTrie":
        """Copy what the search needs of a TokenTrie of numpy arrays to `device`."""
        arrays = (
            np.maximum(trie.token, 0),
            trie.child_begin,
            trie.depth,
            longest_item(trie),
            forced_run(trie),
        )
        return cls(*(_smallest(array).to(device) for array in arrays))

    def to(self, device: torch.device | str) -> "SearchTrie":
        """Copy to another device."""
        return SearchTrie(
            *(
                array.to(device)
                for array in (self.token, self.child_begin, self.depth, self.longest, self.forced)
            )
        )

    @property
    def num_nodes(self) -> int:
        """M, the root included."""
        return len(self.token)

    def is_leaf(self, nodes: torch.Tensor) -> torch.Tensor:
        """Whether each of `nodes` (E,) ends an item, bool (E,)."""
        return self.child_begin[nodes + 1] == self.child_begin[nodes]

    def children(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the child edges of `nodes` (R,): (row in `nodes`, child node), each (E,) int64, in order of row and token."""
        begin = self.child_begin[nodes].long()
        return ragged(begin, self.child_begin[nodes + 1] - begin)


def ragged(begin: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (row, value), each (sum of counts,) int64: begin[r], begin[r] + 1, … begin[r] + count[r] − 1 of each row r."""
    row = torch.repeat_interleave(count)
    return row, (begin - count.cumsum(0) + count)[row] + torch.arange(len(row), device=count.device)


def longest_item(trie) -> np.ndarray:
    """Return the length in tokens (EOS included) of the longest item under each node, int32 (M,); one pass per level."""
    longest = np.array(trie.depth, dtype=np.int32)
    levels = trie.level_begin()
    for begin, end in zip(levels[-3::-1], levels[-2:0:-1], strict=True):
        first = np.asarray(trie.child_begin[begin : end + 1], dtype=np.int64)
        inner = np.flatnonzero(np.diff(first))
        if len(inner):
            longest[begin + inner] = np.maximum.reduceat(
                longest[first[0] : first[-1]], first[inner] - first[0]
            )
    return longest


def forced_run(trie) -> np.ndarray:
    """Return how many nodes follow each node as only children, leaves not counted, int32 (M,); one pass per level."""
    forced = np.zeros(trie.num_nodes, np.int32)
    levels = trie.level_begin()
    for begin, end in zip(levels[-3::-1], levels[-2:0:-1], strict=True):
        first = np.asarray(trie.child_begin[begin : end + 1])
        only = np.flatnonzero(np.diff(first) == 1)
        child = first[only]
        inner = trie.child_begin[child + 1] > trie.child_begin[child]
        forced[begin + only[inner]] = 1 + forced[child[inner]]
    return forced


def _smallest(array: np.ndarray) -> torch.Tensor:
    """Copy to the smallest integer type that torch indexes with ease and that holds every value (all ≥ 0)."""
    for dtype in (np.uint8, np.int16, np.int32):
        if len(array) and array.max() <= np.iinfo(dtype).max:
            return torch.from_numpy(array.astype(dtype))
    raise AssertionError("node ids and tokens fit int32")
