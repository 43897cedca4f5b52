"""Mixtures of three weighted losses: `multi-target` with its curriculum (MTC 4.2), and the fixed
schedules of MTC Table 4.

The loss is L = Σ_j α'_j L_j, each L_j normalised by its own Ω. The coefficients depend on the
optimizer step t (0 at the first) and on three learned numbers s_j. The gradient of s needs only the
global L_j, so it is exact on any number of ranks, with any ZeRO stage and accumulation: every rank
holds the same s and makes the same update, on the CPU.

Letters in shapes: n labelled tokens, V vocabulary, K = 3 targets.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from igd_ds.config.options import option, require
from igd_ds.contracts import Batch, Logits, LossTerms, ObjectiveContext, StepTotals
from igd_ds.errors import UsageError
from igd_ds.objectives.frequency import FrequencyOptions, frequency_weights
from igd_ds.objectives.front_greater import FrontGreaterOptions, front_greater_weights
from igd_ds.objectives.weighted import TokenWeighting, token_nll, weighted_terms

TARGETS = ("fg", "fr", "or")
"""Front-greater, frequency, and the original cross-entropy with weight 1."""

LAMBDA_LR = 1e-3
"""Assumed: in MTC Figure 5 a target dominates within 2,500 steps, and Adam moves s_j by about its
learning rate per step."""

SCHEDULES: dict[str, tuple[tuple[float, tuple[int, int, int]], ...]] = {
    "fg-ce": ((0.0, (1, 0, 0)), (0.5, (0, 0, 1)), (1.0, (0, 0, 1))),
    "fg-ce-fr": ((0.0, (1, 0, 0)), (0.5, (0, 0, 1)), (1.0, (0, 1, 0))),
}
"""Name: (share of the run, α' of TARGETS), linear in between. The order of the targets is that of
MTC Table 4 (5.2.2); the break points are our choice."""

LEARNED_ONLY = ("mixing_form", "curriculum_c", "curriculum_cT", "lambda_lr", "mixing_regularizer")


@dataclass(frozen=True, kw_only=True)
class MultiTargetOptions(FrontGreaterOptions, FrequencyOptions):
    """Flags of `multi-target`."""

    mixing: str | None = option(
        "α' learned, or a schedule of MTC Table 4", None, ("learned", *SCHEDULES)
    )
    mixing_form: str | None = option(
        "α' multiplies the losses, or the logits", None, ("loss", "logits")
    )
    curriculum_c: float | None = option("c of the curriculum e^(−ct), per optimizer step", None)
    curriculum_cT: float | None = option("the same times the steps of the whole run", None)
    lambda_lr: float | None = option("learning rate of log λ, default 1e-3", None)
    mixing_regularizer: str | None = option(
        "kendall: a term against the drift of λ", None, ("kendall",)
    )

    def check(self) -> None:
        """Raise UsageError for values out of their range and options that exclude each other."""
        FrontGreaterOptions.check(self)
        FrequencyOptions.check(self)
        require(
            self,
            "curriculum_c curriculum_cT",
            lambda value: 0 < value < math.inf,
            "must be positive and finite (no curriculum: leave it out)",
        )
        require(self, "lambda_lr", lambda v: 0 < v < math.inf, "must be positive and finite")

        if self.curriculum_c is not None and self.curriculum_cT is not None:
            raise UsageError(
                "give --curriculum_c (per step) or --curriculum_cT (over the whole run), not both"
            )
        for name in LEARNED_ONLY:
            value = getattr(self, name)
            if self.mixing in SCHEDULES and value is not None:
                raise UsageError(
                    f"--{name} {value} has no effect with --mixing {self.mixing}: drop one of them"
                )


class MultiTarget(TokenWeighting):
    """L = Σ_j α'_j L_j over front-greater, frequency and plain cross-entropy (MTC 4.2).

    The table's row: it chooses among the three mixtures below by its options.
    """

    Options = MultiTargetOptions
    targets: tuple[str, ...] = TARGETS
    needs_global = True
    tags: ClassVar[Mapping[str, str]] = {
        f"train/alpha_{name}": f"share of target {name} in the loss, 0 to 1 (MTC Figure 5)"
        for name in TARGETS
    }

    def __new__(cls, options: Any, total_steps: int) -> "MultiTarget":
        """Return an object of the class that the options ask for."""
        if options.mixing in SCHEDULES:
            return super().__new__(ScheduledMixture)
        return super().__new__(LogitMixture if options.mixing_form == "logits" else LearnedMixture)

    def weights(self, context: ObjectiveContext) -> np.ndarray:
        """Return the three targets' weights, float32 (tokens, 3)."""
        front = front_greater_weights(context, self.options.item_embeddings)
        frequency = frequency_weights(context.stored, self.options.frequency_beta)
        return np.stack([front, frequency, np.ones_like(front)], axis=1)

    def _logged(self, alpha: torch.Tensor) -> dict[str, float]:
        return {
            f"train/alpha_{name}": value
            for name, value in zip(TARGETS, alpha.tolist(), strict=True)
        }


class ScheduledMixture(MultiTarget):
    """Coefficients that change linearly over the run and learn nothing (MTC Table 4)."""

    def coefficients(self, step: int) -> torch.Tensor:
        """Return α' float32 (3,) of optimizer step `step`."""
        shares, values = zip(*SCHEDULES[self.options.mixing], strict=True)
        progress = step / self.total_steps
        alpha = [np.interp(progress, shares, value) for value in zip(*values, strict=True)]
        return torch.tensor(alpha).float()

    def update(self, totals: StepTotals) -> dict[str, float]:
        """Report α': a schedule has no parameters."""
        return self._logged(self.coefficients(totals.step))


class LearnedMixture(MultiTarget):
    """Coefficients from three learned scalars λ_j = exp(s_j) and a curriculum (MTC 4.2.2).

    λ'_fg = e^{−ct} λ_fg, λ'_or = e^{−ct} λ_or, λ'_fr = (1 − e^{−ct}) λ_fr, α'_j = λ'_j / Σ λ'. With
    c = 0 there is no curriculum: λ' = λ. s float32 (3,) starts at 0 and has an Adam of its own,
    with a constant learning rate and no weight decay. c is `curriculum_c`, or `curriculum_cT` /
    total_steps.

    ∂L/∂s_j = α'_j (L_j − L): the target with the smallest loss gains weight for that reason alone,
    and nothing in the published objective opposes it. Losses of different weightings are not on one
    scale, so the drift says little about which target is useful: watch α' in TensorBoard. `kendall`
    opposes the drift with Kendall et al.'s log σ_j. With the coefficient 1/(2σ_j²) = α_j that term
    is −½ Σ_j log α_j up to a constant, α_j = λ_j / Σ λ. The term is taken of α, because
    −½ Σ log λ_j would raise every s_j by the same amount and so leave every α_j as it is. It is
    taken before the curriculum, which sets α'_fr = 0 on purpose.
    """

    def __init__(self, options: MultiTargetOptions, total_steps: int):
        super().__init__(options, total_steps)
        c = options.curriculum_c
        if options.curriculum_cT is not None:
            c = options.curriculum_cT / total_steps
        self.c = c or 0.0

        learning_rate = LAMBDA_LR if options.lambda_lr is None else options.lambda_lr
        self.s = torch.zeros(len(TARGETS), dtype=torch.float32, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.s], lr=learning_rate)

    def _alpha(self, step: int) -> torch.Tensor:
        """Return α' float64 (3,) with its graph to s.

        It is a softmax of log λ', because then no c·t is so large or small that it gives 0/0.
        """
        log_lambda = self.s.double()
        if self.c:
            ct = self.c * step
            rising = math.log(-math.expm1(-ct)) if ct else -math.inf
            log_lambda = log_lambda + torch.tensor([-ct, rising, -ct], dtype=torch.float64)
        return log_lambda.softmax(0)

    def coefficients(self, step: int) -> torch.Tensor:
        """Return α' float32 (3,) of optimizer step `step`; α'_fr is 0 at step 0 of a curriculum."""
        return self._alpha(step).detach().float()

    def update(self, totals: StepTotals) -> dict[str, float]:
        """Move s along ∂L/∂s, where ∂L/∂α'_j = L_j, the global loss of target j."""
        return self._descend(totals.losses, totals.step)

    def _descend(self, grad_alpha: torch.Tensor, step: int) -> dict[str, float]:
        """Update s from ∂L/∂α'_j, float64 (3,), the same on every rank; return α' of that step."""
        alpha = self._alpha(step)

        # This is linear in α' with the given slope, so its gradient is the chain rule's.
        objective = alpha @ grad_alpha.detach().to("cpu", torch.float64)
        if self.options.mixing_regularizer == "kendall":
            objective = objective - 0.5 * self.s.double().log_softmax(0).sum()

        self.optimizer.zero_grad()
        objective.backward()
        self.optimizer.step()
        return self._logged(alpha.detach().float())

    def state_dict(self) -> dict[str, Any]:
        """Return s and Adam's moments as lists of floats, which JSON keeps to the bit."""
        moments = self.optimizer.state[self.s]
        return {"s": self.s.tolist(), "adam": {name: v.tolist() for name, v in moments.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned, to the bit."""
        with torch.no_grad():
            self.s.copy_(torch.tensor(state["s"], dtype=torch.float32))
        moments = {n: torch.tensor(v, dtype=torch.float32) for n, v in state["adam"].items()}
        self.optimizer.state[self.s] = moments


class LogitMixture(LearnedMixture):
    """L = Σ_j L_j(α'_j · logits): MTC's objective before its approximation (MTC 4.2.1)."""

    def coefficients(self, step: int) -> torch.Tensor:
        """Return ones, float32 (3,): α' scales the logits instead of the losses."""
        self.alpha = super().coefficients(step)
        return torch.ones(len(TARGETS))

    def loss(self, batch: Batch, logits: Logits, context: ObjectiveContext) -> LossTerms:
        """Return the weighted sums of the scaled losses, and Σ w·∂loss/∂α' as a statistic."""
        alpha = self.alpha.to(logits.tokens.device)
        losses, slopes = scaled_nll(logits.tokens, batch.targets, alpha)
        with torch.no_grad():
            nll = token_nll(logits.tokens, batch.targets)
        return weighted_terms(batch, losses, nll, {"slope": (batch.weights * slopes).sum(0)})

    def update(self, totals: StepTotals) -> dict[str, float]:
        """Move s along ∂L/∂s, where ∂L/∂α'_j is the global Σ w·∂loss/∂α' over Ω_j."""
        return self._descend(totals.statistics["slope"] / totals.normalisers, totals.step)


def scaled_nll(
    logits: torch.Tensor, targets: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return −log softmax(α_j f)[target] and its derivative by α_j, both float32 (n, K) (MTC
    4.2.1).

    The derivative, Σ_v softmax(α_j f)_v f_v − f_target, comes without a graph: summed over all
    ranks it is exact, whatever loss scale or partitioning the engine's backward pass has.

    Args:
        logits: (n, V) of any floating dtype.
        targets: int64 (n,).
        alpha: float32 (K,), without a gradient.
    """
    logits = logits.float()
    target = logits.gather(1, targets[:, None])

    losses, slopes = [], []
    for a in alpha:
        log_p = (a * logits).log_softmax(-1)
        losses.append(-log_p.gather(1, targets[:, None]))
        with torch.no_grad():
            slopes.append((log_p.exp() * logits).sum(-1, keepdim=True) - target)
    return torch.cat(losses, 1), torch.cat(slopes, 1).detach()
