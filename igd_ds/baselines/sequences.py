"""Merge rows of a user whose histories extend one another, for training of sequential models.

One forward pass over the longest history then predicts the targets of all merged rows.

Letters in shapes: R rows of the split, S sequences, B sequences of a batch, T items of a sequence,
n rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from igd_ds.contracts import MASKED_ROW
from igd_ds.data.batches import refuse_empty
from igd_ds.data.chains import linked_rows
from igd_ds.data.dataset import Split
from igd_ds.items.ragged import ragged_arange


@dataclass(frozen=True)
class SequenceBatch:
    """Right-padded histories, and which targets are predicted from which of their positions."""

    histories: torch.Tensor
    """int64 (B, T), oldest item first. The padding behind a history is item 0; a causal model never
    sees it."""
    positions: torch.Tensor
    """int64 (n,), the position in the flattened (B·T) histories that predicts each row."""
    targets: torch.Tensor
    """int64 (n,), the rows' target items."""

    def to(self, device: torch.device) -> SequenceBatch:
        """Return the batch on `device`."""
        return SequenceBatch(
            self.histories.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Chains:
    """The rows of a split as S sequences; each row is in exactly one of them.

    Within a sequence, each row's history is the history of the row before, item by item, with that
    row's target appended. So the last row's history contains all others, and a causal model sees
    exactly a row's history at the row's position.

    Example:
        The rows ([5], 6) and ([5, 6], 7) of one user are one sequence with the history 5, 6. Its
        first position predicts 6 and its second predicts 7.

        >>> chains = Chains.build(dataset.splits["train"])
        >>> batch = chains.collate(np.arange(32))
    """

    split: Split
    rows: np.ndarray
    """int64 (R,), the rows, sequence after sequence."""
    offsets: np.ndarray
    """int64 (S+1,): sequence s is rows[offsets[s] : offsets[s+1]]."""

    def __len__(self) -> int:
        """Return S."""
        return len(self.offsets) - 1

    @classmethod
    def build(cls, split: Split) -> Chains:
        """Link the rows of each user whose histories extend one another.

        A history that was truncated extends no other one, so its row stays alone.

        Raises:
            UsageError: a row has an empty history.
        """
        refuse_empty(split, np.arange(len(split)))
        return cls(split, *linked_rows(split))

    @classmethod
    def of_rows(cls, split: Split, rows: np.ndarray) -> Chains:
        """Make a sequence of each of the rows (S,).

        Raises:
            UsageError: a row has an empty history.
        """
        refuse_empty(split, rows)
        return cls(split, rows, np.arange(len(rows) + 1))

    @property
    def lengths(self) -> np.ndarray:
        """The number of items of each sequence, int64 (S,)."""
        last = self.rows[self.offsets[1:] - 1]
        return np.diff(self.split.history_offsets)[last]

    def collate(self, sequences: np.ndarray) -> SequenceBatch:
        """Return a batch of sequences (B,).

        MASKED_ROW instead of a sequence only fills the batch: nothing is predicted there.
        """
        # Each sequence is the history of its last row.
        real = np.maximum(sequences, 0)
        last = self.rows[self.offsets[real + 1] - 1]
        begins = self.split.history_offsets[last]
        length = self.split.history_offsets[last + 1] - begins
        width = int(length.max())
        histories = np.zeros((len(real), width), np.int64)
        items = self.split.history_items[ragged_arange(begins, length)]
        histories[np.arange(width) < length[:, None]] = items

        # The rows of a sequence are predicted from its last positions, one each.
        count = np.where(sequences != MASKED_ROW, np.diff(self.offsets)[real], 0)
        rows = self.rows[ragged_arange(self.offsets[real], count)]
        positions = ragged_arange(np.arange(len(real)) * width + length - count, count)
        targets = self.split.targets[rows].astype(np.int64)
        return SequenceBatch(
            torch.from_numpy(histories), torch.from_numpy(positions), torch.from_numpy(targets)
        )
