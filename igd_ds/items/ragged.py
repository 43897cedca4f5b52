"""Ranges of different lengths one after the other, without a Python loop."""

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


def index_within(offsets: np.ndarray) -> np.ndarray:
    """Return the index of each element within its row, int64 (offsets[-1],).

    Args:
        offsets: int64 (R+1,), from 0: row r holds the elements offsets[r] … offsets[r+1] − 1.

    Example:
        >>> index_within(np.array([0, 2, 5])).tolist()
        [0, 1, 0, 1, 2]
    """
    return ragged_arange(np.zeros(len(offsets) - 1, np.int64), np.diff(offsets))


def ragged_rows(begin: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (row, value), each int64 (Σ count,): the ranges of `ragged_arange` and their rows.

    Example:
        >>> row, value = ragged_rows(torch.tensor([5, 20]), torch.tensor([2, 3]))
        >>> row.tolist(), value.tolist()
        ([0, 0, 1, 1, 1], [5, 6, 20, 21, 22])
    """
    import torch  # imported here, so that modules that only read data need numpy alone

    row = torch.repeat_interleave(count)
    first = begin - count.cumsum(0) + count
    return row, first[row] + torch.arange(len(row), device=count.device)
