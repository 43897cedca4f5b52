"""The loss that all token weightings share: Σ w·NLL / Ω, and the pure functions it is made of.

Letters in shapes: n labelled tokens, V vocabulary, K targets of the loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from igd_ds.contracts import Batch, Likelihood, Logits, LossTerms, ObjectiveContext, StepTotals


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return −log p(target) in nats, float32 (n,), over the full vocabulary.

    Args:
        logits: (n, V) of any floating dtype; the softmax is computed in float32.
        targets: int64 (n,).
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")


def weighted_terms(
    batch: Batch,
    losses: torch.Tensor,
    nll: torch.Tensor,
    statistics: Mapping[str, torch.Tensor] | None = None,
) -> LossTerms:
    """Return Σ w·loss and Σ w of a batch for each target (IGD Eq. 6).

    Args:
        batch: the micro-batch; its weights are (n, K).
        losses: float32 (n,) if all targets share a token's loss, else (n, K).
        nll: float32 (n,), the unweighted negative log-likelihood, for the log.
        statistics: further named sums.
    """
    per_target = losses if losses.dim() == 2 else losses[:, None]
    return LossTerms(
        numerators=(batch.weights * per_target).sum(0),
        normalisers=batch.weights.sum(0),
        nll=nll.detach(),
        statistics=statistics or {},
    )


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """An objective without flags of its own."""

    def check(self) -> None:
        """Accept: there is nothing to check."""


class TokenWeighting(ABC):
    """An objective with one weight per catalogue token: base of all rows of the table.

    A subclass says what the weights are. It may override `loss` where the weights multiply
    something else than the plain NLL, and the other methods where it has several targets or a
    state.

    Args:
        options: an instance of the class's `Options`.
        total_steps: optimizer steps the run has at most.
    """

    Options: ClassVar[type[Any]] = NoOptions
    targets: tuple[str, ...] = ("loss",)
    needs_null: bool = False
    needs_global: ClassVar[bool] = False
    """Whether it learns from losses over the whole step, so that Ω has to be global."""
    tags: ClassVar[Mapping[str, str]] = {}
    """Scalars that `update` returns: tag → meaning and unit."""

    def __init__(self, options: Any, total_steps: int):
        self.options = options
        self.total_steps = total_steps

    @abstractmethod
    def weights(self, context: ObjectiveContext) -> np.ndarray:
        """Return one weight per catalogue token and target, float32 (tokens, K)."""

    def normalisers(self, batch: Batch) -> torch.Tensor:
        """Return Σ w per target, float64 (K,)."""
        return batch.weights.sum(0, dtype=torch.float64)

    def coefficients(self, step: int) -> torch.Tensor:
        """Return 1 for each target, float32 (K,)."""
        return torch.ones(len(self.targets))

    def loss(self, batch: Batch, logits: Logits, context: ObjectiveContext) -> LossTerms:
        """Return the weighted sum of the plain NLL."""
        nll = token_nll(logits.tokens, batch.targets)
        return weighted_terms(batch, nll, nll)

    def nll(self, batch: Batch, logits: torch.Tensor, context: ObjectiveContext) -> torch.Tensor:
        """Return −log p(target) over the full vocabulary, float32 (n,)."""
        return token_nll(logits, batch.targets)

    def likelihood(self) -> Likelihood:
        """Return the plain softmax over the full vocabulary."""
        return Likelihood()

    def update(self, totals: StepTotals) -> dict[str, float]:
        """Do nothing: the objective has no state."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return {}: the objective has no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  the usual case
        """Do nothing: the objective has no state."""
