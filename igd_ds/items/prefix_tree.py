"""Sequences of tokens whose equal prefixes are one node each.

Letters in shapes: R rows, T tokens of the longest row, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PrefixTree:
    """A node for each different prefix of some rows, in depth-first order."""

    token: np.ndarray
    """int64 (N,), the last token of the prefix."""
    position: np.ndarray
    """int64 (N,), the number of tokens before it."""
    end: np.ndarray
    """int64 (N,): the subtree of node k is k, …, end[k] − 1."""
    node: np.ndarray
    """int64 (R, T), the node of each token of a row; anything behind the row's end."""
    filled: np.ndarray
    """bool (R, T), False behind the row's end."""

    @classmethod
    def build(cls, rows: Sequence[np.ndarray]) -> PrefixTree:
        """Merge the equal prefixes of R integer arrays, none of them empty.

        Rows are sorted and compared with their neighbours; there is no Python loop over tokens.
        """
        length = np.array([len(row) for row in rows])

        # The rows as a sorted matrix. Padding is 0 and tokens are 1 larger, so that a prefix comes
        # first.
        columns = np.arange(length.max())
        filled = columns < length[:, None]
        padded = np.zeros(filled.shape, np.int64)
        padded[filled] = np.concatenate(rows)
        padded[filled] += 1
        order = lexicographic_order(padded)
        padded, filled, length = padded[order], filled[order], length[order]

        # A row shares with its predecessor what comes before the first difference. The rest is new.
        shared = np.zeros_like(length)
        differs = padded[1:] != padded[:-1]
        shared[1:] = np.where(differs.any(1), differs.argmax(1), length[1:])
        is_new = filled & (columns >= shared[:, None])
        first = np.concatenate([[0], np.cumsum(length - shared)])

        # The node of each place of the matrix: the row's own, or that of the last row which had a
        # new one there.
        owner = np.maximum.accumulate(
            np.where(columns >= shared[:, None], np.arange(len(rows))[:, None], 0), axis=0
        )
        node = first[owner] + columns - shared[owner]

        # A subtree ends where the last row through its root ends. Of several assignments to one
        # node, NumPy keeps the last.
        end = np.empty(first[-1], np.int64)
        row, column = np.nonzero(filled)
        end[node[row, column]] = first[row + 1]

        unsorted = np.argsort(order)
        return cls(
            token=padded[is_new] - 1,
            position=np.nonzero(is_new)[1],
            end=end,
            node=node[unsorted],
            filled=filled[unsorted],
        )


def lexicographic_order(rows: np.ndarray) -> np.ndarray:
    """Return the order, int64 (R,), that sorts the rows of a matrix (R, T) of integers from 0.

    Equal rows stay in their order. Compared as big-endian bytes, rows sort like their numbers.
    """
    as_bytes = np.ascontiguousarray(rows.astype(">u4")).view(f"V{4 * rows.shape[1]}")
    return np.argsort(as_bytes[:, 0], kind="stable")
