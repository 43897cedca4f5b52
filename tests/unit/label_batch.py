"""Batches for tests of backbones: only the columns that a forward pass reads matter."""

import torch

from igd_ds.contracts import IGNORED, MASKED_ROW, Batch, PaddedRows


def label_batch(input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> Batch:
    """Return a batch with one target of weight 1 per labelled token; every trie node is 0."""
    row, column = (labels != IGNORED).nonzero(as_tuple=True)
    targets = labels[row, column]
    rows = torch.full((len(labels),), MASKED_ROW)
    return Batch(
        inputs=PaddedRows(input_ids, mask, labels),
        targets=targets,
        weights=torch.ones((len(targets), 1)),
        zero_gain=torch.zeros(len(targets), dtype=torch.bool),
        row=row,
        node=torch.zeros_like(targets),
        item_ids=rows,
        row_ids=rows,
    )
