"""Rows of a micro-batch as one tree of tokens: equal prefixes are read once (row trees).

Letters in shapes: R rows, T tokens of the longest row, N nodes, n labelled tokens, m predicting
nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from igd_ds.contracts import RowTree
from igd_ds.items.prefix_tree import PrefixTree


def build_row_tree(rows: Sequence[np.ndarray], num_labels: np.ndarray) -> RowTree:
    """Merge the equal prefixes of rows into a tree, in depth-first order.

    The last token of a row predicts nothing and needs no node, so the rows come without it.

    Args:
        rows: R integer arrays, each the tokens of a row without its last one; none is empty.
        num_labels: int64 (R,), labelled tokens of each row. They are predicted by the last nodes of
            the row: `num_labels[r]` is at most `len(rows[r])`.

    Returns:
        The tree. Its labelled tokens are counted row by row, in the order of `rows`.
    """
    length = np.array([len(row) for row in rows])
    assert length.min() > 0 and (num_labels <= length).all(), "a label needs a token before it"

    tree = PrefixTree.build(rows)
    columns = np.arange(length.max())
    predicts = tree.filled & (columns >= (length - num_labels)[:, None])
    predicting, label_place = np.unique(tree.node[predicts], return_inverse=True)
    return RowTree(
        token=torch.from_numpy(tree.token),
        position=torch.from_numpy(tree.position),
        end=torch.from_numpy(tree.end),
        predicting=torch.from_numpy(predicting),
        label_place=torch.from_numpy(label_place),
    )
