"""Recommenders that count and are not trained: popularity and the nearest neighbours of an item.

Letters in shapes: R training rows, N items, n positions to predict from, E counted pairs of items.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from igd_ds.baselines.saved import save_tensors


class Popularity(nn.Module):
    """Ranks items by their shares of the training targets, whatever the history is.

    One more observation is spread over all items, in parts that differ slightly at random (seeded).
    So no item has probability 0, and ties are broken in random order. The order of the item ids
    would not do, because it may follow time or popularity.

    Attributes:
        probability: float64 (N,).
    """

    probability: torch.Tensor

    def __init__(self, probability: torch.Tensor):
        super().__init__()
        self.register_buffer("probability", probability)

    @classmethod
    def count(cls, last: np.ndarray, targets: np.ndarray, num_items: int, seed: int) -> Popularity:
        """Count the targets (R,) of the training rows.

        Args:
            last: the last item of each row's history, (R,); popularity ignores it.
            targets: the rows' targets, (R,).
            num_items: N.
            seed: seed of the random parts.
        """
        parts = np.random.default_rng(seed).uniform(0.9, 1.1, num_items)
        count = np.bincount(targets, minlength=num_items) + parts / parts.sum()
        return cls(torch.from_numpy(count / count.sum()))

    def log_probabilities(self, histories: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of all items, float64 (n, N), in nats.

        The arguments are those of `SequentialModel.log_probabilities`.
        """
        return self.probability.log().expand(len(positions), -1)

    def save_pretrained(self, folder: Path) -> None:
        """Write the counts to a new folder."""
        save_tensors(folder, self.state_dict())


class LastItemKNN(Popularity):
    """Ranks items by how often they came next after the last item of the user's history.

    The shares of `Popularity` are added as one more observation, which breaks ties.

    Attributes:
        begins, next_items, times: int64 (N+1,), (E,), (E,). Item i was followed by the items
            next_items[begins[i] : begins[i+1]]; `times` holds how often.
    """

    begins: torch.Tensor
    next_items: torch.Tensor
    times: torch.Tensor

    def __init__(
        self,
        probability: torch.Tensor,
        begins: torch.Tensor,
        next_items: torch.Tensor,
        times: torch.Tensor,
    ):
        super().__init__(probability)
        self.register_buffer("begins", begins)
        self.register_buffer("next_items", next_items)
        self.register_buffer("times", times)

    @classmethod
    def count(cls, last: np.ndarray, targets: np.ndarray, num_items: int, seed: int) -> LastItemKNN:
        """Count the targets (R,) that follow the last items (R,) of the training histories."""
        probability = Popularity.count(last, targets, num_items, seed).probability
        pairs, times = np.unique(last.astype(np.int64) * num_items + targets, return_counts=True)
        begins = np.searchsorted(pairs, np.arange(num_items + 1) * num_items)
        return cls(
            probability,
            torch.from_numpy(begins),
            torch.from_numpy(pairs % num_items),
            torch.from_numpy(times),
        )

    def log_probabilities(self, histories: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See `Popularity.log_probabilities`; only the last item of a history matters."""
        counts = self.probability.repeat(len(positions), 1)
        for row, item in zip(counts, histories.flatten()[positions], strict=True):
            followers = slice(int(self.begins[item]), int(self.begins[item + 1]))
            row[self.next_items[followers]] += self.times[followers]
        return (counts / counts.sum(1, keepdim=True)).log()


COUNTED: dict[str, type[Popularity]] = {"popularity": Popularity, "last-item-knn": LastItemKNN}
"""Recommenders that count and are not trained."""
