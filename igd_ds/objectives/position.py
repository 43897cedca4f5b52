"""Weights that look at a token's place in its item only: uniform (BIGRec, D3) and position (Pos)."""

import numpy as np


def uniform(stored, config) -> np.ndarray:
    """Return 1 for every catalogue token, float32 (T,): plain cross-entropy."""
    return np.ones(len(stored.catalogue.token_ids), dtype=np.float32)


def position(stored, config) -> np.ndarray:
    """Return weights that fall linearly from 1 at an item's first token to b at its last, float32 (T,).

    w_t = 1 − (1−b)(t−1)/(m−1), t = 1 … m, m = tokens of the item with EOS; 1 if m = 1 (CFT paper; IGD App. A). b is
    `config.position_floor`.
    """
    offsets = stored.catalogue.offsets
    m = np.repeat(np.diff(offsets), np.diff(offsets))
    t_minus_1 = np.arange(len(m)) - np.repeat(offsets[:-1], np.diff(offsets))
    return (1 - (1 - config.position_floor) * t_minus_1 / np.maximum(m - 1, 1)).astype(np.float32)
