"""Losses of the sequential recommenders, and the negative items that they draw.

Letters in shapes: N items, n targets, C candidate items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Negatives:
    """Draws negative items with torch's global random generator."""

    weights: torch.Tensor
    """float32 (N,): a shared negative is drawn with a probability proportional to its weight."""
    number: int
    """How many are drawn for a micro-batch (`shared`) or for each target (`other_than`)."""

    def shared(self) -> torch.Tensor:
        """Return `number` different items for a whole micro-batch, int64 (number,)."""
        return torch.multinomial(self.weights, self.number)

    def other_than(self, targets: torch.Tensor) -> torch.Tensor:
        """Return `number` uniformly drawn other items per target (n,), int64 (n, number)."""
        shape = (len(targets), self.number)
        drawn = torch.randint(len(self.weights) - 1, shape, device=targets.device)
        return drawn + (drawn >= targets[:, None])


Score = Callable[[torch.Tensor | None], torch.Tensor]
"""Takes candidates (C,), or None for all items, and returns their scores (n, C)."""


def cross_entropy(score: Score, targets: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """Return −log p(target) over the whole catalogue, in nats, float32 (n,)."""
    return F.cross_entropy(score(None).float(), targets, reduction="none")


def bce(score: Score, targets: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """Return −log σ(target) − mean over negatives of log(1 − σ(negative)), float32 (n,).

    This is SASRec, Eq. 7. The paper excludes all of a user's items from the negatives; here
    only the target is excluded.
    """
    items = torch.cat([targets[:, None], negatives.other_than(targets)], 1)
    candidates, column = torch.unique(items, return_inverse=True)
    scores = score(candidates).float().gather(1, column)
    return F.softplus(-scores[:, 0]) + F.softplus(scores[:, 1:]).mean(1)


def bpr_max(score: Score, targets: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """Return −log Σ_j s_j σ(target − j) + Σ_j s_j j², float32 (n,) (GRU4Rec, CIKM 2018, 3.3).

    s is the softmax over the negatives j. These are the other targets of the micro-batch and the
    shared negatives. Scores pass through ELU. The ELU, the weight 1 of the second term and the
    constant 1e-24 are those of the published code.
    """
    items = torch.cat([targets, negatives.shared()])
    candidates, column = torch.unique(items, return_inverse=True)
    scores = F.elu(score(candidates).float())
    column = column[: len(targets), None]
    share = scores.scatter(1, column, -torch.inf).softmax(1)
    ahead = torch.sigmoid(scores.gather(1, column) - scores)
    return (share * scores**2).sum(1) - torch.log((share * ahead).sum(1) + 1e-24)


@dataclass(frozen=True)
class Loss:
    """A loss over n targets, and its default number of negatives."""

    function: Callable[[Score, torch.Tensor, Negatives], torch.Tensor]
    """Takes scores, targets (n,) and negatives, and returns float32 (n,)."""
    num_negatives: int
    """Default number of negatives; 0 if the loss takes none."""


LOSSES = {
    "cross-entropy": Loss(cross_entropy, 0),
    "bce": Loss(bce, 1),
    "bpr-max": Loss(bpr_max, 2048),
}
"""A new loss is a function and a line here."""
