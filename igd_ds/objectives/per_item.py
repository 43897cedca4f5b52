"""Normalisation that every weighting of the MTC paper shares."""

import numpy as np


def sum_to_length(raw: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Scale weights so that those of an item's own tokens sum to their number; EOS gets 1 (MTC 4.1). Returns float32 (T,).

    The scale of the loss then stays that of plain cross-entropy. An item whose own weights are all 0 gets 1 everywhere:
    nothing sets its tokens apart.

    Args:
        raw: float64 (T,), >= 0; what stands at an item's last token, EOS, is ignored.
        offsets: int64 (N+1,), item i's tokens are offsets[i] … offsets[i+1]-1.
    """
    lengths = np.diff(offsets)
    eos = offsets[1:] - 1
    own = raw.astype(np.float64)
    own[eos] = 0.0
    total = np.add.reduceat(own, offsets[:-1])
    flat = total == 0
    scale = (lengths - 1) / np.where(flat, 1.0, total)
    weights = np.where(np.repeat(flat, lengths), 1.0, own * np.repeat(scale, lengths))
    weights[eos] = 1.0
    return weights.astype(np.float32)
