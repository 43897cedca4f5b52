"""Rows of a micro-batch as one tree of tokens: equal prefixes are read once (row trees).

Letters in shapes: R rows, T tokens of the longest row, N nodes, n labelled tokens, m predicting
nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from igd_ds.contracts import RowTree


def build_row_tree(rows: Sequence[np.ndarray], num_labels: np.ndarray) -> RowTree:
    """Merge the equal prefixes of rows into a tree, in depth-first order.

    The last token of a row predicts nothing and needs no node, so the rows come without it. Rows
    are sorted and compared with their neighbours; there is no Python loop over tokens.

    Args:
        rows: R integer arrays, each the tokens of a row without its last one; none is empty.
        num_labels: int64 (R,), labelled tokens of each row. They are predicted by the last nodes of
            the row: `num_labels[r]` is at most `len(rows[r])`.

    Returns:
        The tree. Its labelled tokens are counted row by row, in the order of `rows`.
    """
    length = np.array([len(row) for row in rows])
    assert length.min() > 0 and (num_labels <= length).all(), "a label needs a token before it"

    # The rows as a sorted matrix. Padding is 0 and tokens are 1 larger, so that a prefix comes
    # first.
    columns = np.arange(length.max())
    filled = columns < length[:, None]
    padded = np.zeros(filled.shape, np.int64)
    padded[filled] = np.concatenate(rows) + 1
    order = lexicographic_order(padded)
    padded, filled, length = padded[order], filled[order], length[order]

    # A row shares with its predecessor what comes before the first difference. The rest is new.
    shared = np.zeros_like(length)
    differs = padded[1:] != padded[:-1]
    shared[1:] = np.where(differs.any(1), differs.argmax(1), length[1:])
    is_new = filled & (columns >= shared[:, None])
    first = np.concatenate([[0], np.cumsum(length - shared)])

    # The node of each place of the matrix: the row's own, or that of the last row which had a new
    # one there.
    owner = np.maximum.accumulate(
        np.where(columns >= shared[:, None], np.arange(len(rows))[:, None], 0), axis=0
    )
    node = first[owner] + columns - shared[owner]

    # A subtree ends where the last row through its root ends. Of several assignments to one node,
    # NumPy keeps the last.
    end = np.empty(first[-1], np.int64)
    row, column = np.nonzero(filled)
    end[node[row, column]] = first[row + 1]

    # The labels of a row are predicted from its last nodes; back to the order of `rows`.
    predicts = filled & (columns >= (length - num_labels[order])[:, None])
    unsorted = np.argsort(order)
    predicting, label_place = np.unique(node[unsorted][predicts[unsorted]], return_inverse=True)
    return RowTree(
        token=torch.from_numpy(padded[is_new] - 1),
        position=torch.from_numpy(np.nonzero(is_new)[1]),
        end=torch.from_numpy(end),
        predicting=torch.from_numpy(predicting),
        label_place=torch.from_numpy(label_place),
    )


def lexicographic_order(rows: np.ndarray) -> np.ndarray:
    """Return the order, int64 (R,), that sorts the rows of a matrix (R, T) of integers from 0.

    Equal rows stay in their order. Compared as big-endian bytes, rows sort like their numbers.
    """
    as_bytes = np.ascontiguousarray(rows.astype(">u4")).view(f"V{4 * rows.shape[1]}")
    return np.argsort(as_bytes[:, 0], kind="stable")
