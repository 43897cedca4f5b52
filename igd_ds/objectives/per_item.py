"""The normalisation that the weights of the MTC paper share."""

import numpy as np


def sum_to_length(raw: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Scale weights so that those of an item's own tokens sum to their number; EOS gets 1 (MTC
    4.1).

    The loss then keeps the scale of plain cross-entropy. An item whose own weights are all 0 gets 1
    everywhere, because nothing sets its tokens apart.

    Args:
        raw: float64 (T,), at least 0; the value at an item's last token, EOS, is ignored.
        offsets: int64 (N+1,), item i's tokens are offsets[i] … offsets[i+1]-1.

    Returns:
        float32 (T,).

    Example:
        >>> sum_to_length(np.array([3.0, 1.0, 0.0]), np.array([0, 3])).tolist()
        [1.5, 0.5, 1.0]
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
