"""LETTER's ranking-guided loss: cross-entropy on logits divided by a temperature."""

import math
from dataclasses import dataclass

import torch

from igd_ds.config.options import option, require
from igd_ds.contracts import Batch, Logits, LossTerms, ObjectiveContext
from igd_ds.objectives.position import Uniform
from igd_ds.objectives.weighted import token_nll, weighted_terms


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Flags of `rank`."""

    rank_tau: float = option("τ: the logits are divided by it, e.g. 0.8")

    def check(self) -> None:
        """Raise UsageError unless τ is positive."""
        require(self, "rank_tau", lambda v: 0 < v < math.inf, "must be positive and finite")


class Rank(Uniform):
    """−log softmax(f/τ)[target]: τ < 1 puts more of the gradient on hard negatives (LETTER)."""

    Options = RankOptions

    def loss(self, batch: Batch, logits: Logits, context: ObjectiveContext) -> LossTerms:
        """Return the sum of the NLL of the tempered logits."""
        losses = token_nll(logits.tokens.float() / self.options.rank_tau, batch.targets)
        with torch.no_grad():
            nll = token_nll(logits.tokens, batch.targets)
        return weighted_terms(batch, losses, nll)
