"""Ragged ranges without a Python loop: begin[0], begin[0] + 1, …, then begin[1], …"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def ragged_arange(begin: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return begin[r], begin[r] + 1, … begin[r] + count[r] − 1 of each row r, int64 (Σ count,).

    Example:
        >>> ragged_arange(np.array([5, 20]), np.array([2, 3])).tolist()
        [5, 6, 20, 21, 22]
    """
    begin, count = np.asarray(begin, np.int64), np.asarray(count, np.int64)
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(begin - ends + count, count)


def ragged_rows(begin: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (row, value), each int64 (Σ count,): the ranges of `ragged_arange` and their rows.

    Example:
        >>> row, value = ragged_rows(torch.tensor([5, 20]), torch.tensor([2, 3]))
        >>> row.tolist(), value.tolist()
        ([0, 0, 1, 1, 1], [5, 6, 20, 21, 22])
    """
    import torch  # here, so that what reads data needs numpy alone

    row = torch.repeat_interleave(count)
    first = begin - count.cumsum(0) + count
    return row, first[row] + torch.arange(len(row), device=count.device)
