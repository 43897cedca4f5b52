"""Causality-aware fine-tuning (CFT): what the history adds has a loss of its own."""

import math
from dataclasses import dataclass

from igd_ds.config.options import option, require
from igd_ds.contracts import Batch, Logits, LossTerms, ObjectiveContext
from igd_ds.objectives.position import Position, PositionOptions
from igd_ds.objectives.weighted import token_nll, weighted_terms


@dataclass(frozen=True, kw_only=True)
class CFTOptions(PositionOptions):
    """Flags of `cft`."""

    cft_lambda: float = option("λ: weight of the loss of what the history adds, at least 0")

    def check(self) -> None:
        """Raise UsageError for values out of their range."""
        super().check()
        require(self, "cft_lambda", lambda v: 0 <= v < math.inf, "must not be negative, and finite")


class CFT(Position):
    """Position weights on CE(f) + λ·CE(f − f₀), f₀ the logits behind a prompt without history
    (CFT).

    As published, the gradient of the second term flows through f₀ too.
    """

    Options = CFTOptions
    needs_null = True

    def loss(self, batch: Batch, logits: Logits, context: ObjectiveContext) -> LossTerms:
        """Return the weighted sum of both cross-entropies."""
        assert logits.null is not None, "the step computes them where needs_null is set"
        effect = logits.tokens.float() - logits.null.float()
        plain = token_nll(logits.tokens, batch.targets)
        losses = plain + self.options.cft_lambda * token_nll(effect, batch.targets)
        return weighted_terms(batch, losses, plain)
