"""Rows of which one's history goes on with another's target, put together: one sequence predicts the targets of them all.

Letters: R rows of the split, S sequences, B sequences of a batch, T items of a sequence, n rows of a batch.
"""

from dataclasses import dataclass

import numpy as np
import torch

from igd_ds.baselines.leaves import ranges
from igd_ds.data.batches import MASKED_ROW
from igd_ds.data.dataset import Split
from igd_ds.errors import UsageError


@dataclass(frozen=True)
class SequenceBatch:
    """Histories, right-padded, and what to predict where.

    `histories` (B, T) int64, oldest first; behind a history's end stands item 0, which a causal model never looks at. `places`
    (n,) int64, the position in the flattened (B·T) histories from which each row's target is predicted; `targets` (n,) int64 item
    ids.
    """

    histories: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> "SequenceBatch":
        """Return the batch on `device`."""
        return SequenceBatch(
            *(tensor.to(device, non_blocking=True) for tensor in vars(self).values())
        )


@dataclass(frozen=True)
class Chains:
    """The rows of a split as S sequences, each row in exactly one of them.

    `rows` int64 (R,): sequence s is rows[offsets[s] : offsets[s+1]], int64 (S+1,). Within it each row's history is the history of
    the row before with that row's target behind it, item by item, so the last row's history holds all others and a causal model
    sees, at the place of a row, exactly that row's history.
    """

    split: Split
    rows: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """S."""
        return len(self.offsets) - 1

    @classmethod
    def build(cls, split: Split) -> "Chains":
        """Link the rows of a user whose histories extend each other; a truncated history extends none and stays alone.

        Raises:
            ValueError: a row has an empty history.
        """
        length = np.diff(split.history_offsets)
        refuse_empty(split, np.arange(len(split)))
        order = np.lexsort((length, split.user_ids))
        before, after = order[:-1], order[1:]
        candidate = np.flatnonzero(
            (split.user_ids[before] == split.user_ids[after])
            & (length[before] + 1 == length[after])
        )
        before, after = before[candidate], after[candidate]
        begins = split.history_offsets[after]
        old, new = (
            ranges(split.history_offsets[before], length[before]),
            ranges(begins, length[before]),
        )
        differs = np.zeros(len(before), bool)
        differs[
            np.repeat(np.arange(len(before)), length[before])[
                split.history_items[old] != split.history_items[new]
            ]
        ] = True
        differs |= split.history_items[begins + length[before]] != split.targets[before]
        starts = np.ones(len(order), bool)
        starts[candidate[~differs] + 1] = False
        return cls(split, order, np.append(np.flatnonzero(starts), len(order)))

    @classmethod
    def of_rows(cls, split: Split, rows: np.ndarray) -> "Chains":
        """Take each of `rows` (S,) as a sequence of its own."""
        refuse_empty(split, rows)
        return cls(split, rows, np.arange(len(rows) + 1))

    @property
    def lengths(self) -> np.ndarray:
        """Items of each sequence, int64 (S,)."""
        return np.diff(self.split.history_offsets)[self.rows[self.offsets[1:] - 1]]

    def collate(self, sequences: np.ndarray) -> SequenceBatch:
        """Return a batch of sequences (B,); MASKED_ROW only fills the batch: it predicts nothing."""
        real = np.maximum(sequences, 0)
        last = self.rows[self.offsets[real + 1] - 1]
        begins = self.split.history_offsets[last]
        length = self.split.history_offsets[last + 1] - begins
        width = int(length.max())
        histories = np.zeros((len(real), width), np.int64)
        histories[np.arange(width) < length[:, None]] = self.split.history_items[
            ranges(begins, length)
        ]
        count = np.where(sequences != MASKED_ROW, np.diff(self.offsets)[real], 0)
        rows = self.rows[ranges(self.offsets[real], count)]
        # A sequence's rows predict from its last positions on, one each.
        places = ranges(np.arange(len(real)) * width + length - count, count)
        return SequenceBatch(
            *map(torch.from_numpy, (histories, places, self.split.targets[rows].astype(np.int64)))
        )


def refuse_empty(split: Split, rows: np.ndarray) -> None:
    """Raise ValueError if one of `rows` has an empty history."""
    if len(empty := rows[np.diff(split.history_offsets)[rows] == 0]):
        raise UsageError(
            f"row {empty[0]} of {split.name} has an empty history: leave such rows out of the dataset"
        )
