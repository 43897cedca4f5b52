"""Mixtures of weighted losses: multi-target with its curriculum (MTC 4.2), and the fixed schedules of MTC Table 4.

The loss is L = Σ_j α'_j L_j, each L_j normalised by its own Ω. The coefficients depend on the optimizer step t (0 at the
first) and on three numbers s_j of their own. Their gradient needs no more than the global L_j, so it is exact on any number of
ranks, with any ZeRO stage and accumulation: every rank holds the same s_j and makes the same update, on the CPU.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from igd_ds.errors import UsageError

TARGETS = ("fg", "fr", "or")  # front-greater, frequency, and uniform: the original cross-entropy
LAMBDA_LR = 1e-3  # assumed: in MTC Figure 5 a target dominates within 2,500 steps, and Adam moves s_j by about its rate a step
# (share of the run, α' of TARGETS), linear in between. Which targets follow each other is MTC Table 4's (5.2.2), the break points
# are our choice.
SCHEDULES = {
    "fg-ce": ((0.0, (1, 0, 0)), (0.5, (0, 0, 1)), (1.0, (0, 0, 1))),
    "fg-ce-fr": ((0.0, (1, 0, 0)), (0.5, (0, 0, 1)), (1.0, (0, 1, 0))),
}
LEARNED_ONLY = ("mixing_form", "curriculum_c", "curriculum_cT", "lambda_lr", "mixing_regularizer")


def check_options(config) -> None:
    """Raise ValueError for options of a mixture that exclude each other."""
    if config.curriculum_c is not None and config.curriculum_cT is not None:
        raise UsageError(
            "give --curriculum_c (per step) or --curriculum_cT (over the whole run), not both"
        )
    for name in LEARNED_ONLY:
        if config.mixing in SCHEDULES and getattr(config, name) is not None:
            raise UsageError(
                f"--{name} {getattr(config, name)} has no effect with --mixing {config.mixing}: drop one of them"
            )


def build(config, total_steps: int) -> "LearnedMixing | ScheduledMixing":
    """Return the mixture that `config` asks for, of a run of `total_steps` optimizer steps.

    c is `curriculum_c`, or `curriculum_cT` / total_steps; without either there is no curriculum.
    """
    if config.mixing in SCHEDULES:
        return ScheduledMixing(config.mixing, total_steps)
    c = config.curriculum_c if config.curriculum_cT is None else config.curriculum_cT / total_steps
    return LearnedMixing(
        form=config.mixing_form or "loss",
        c=c or 0.0,
        learning_rate=LAMBDA_LR if config.lambda_lr is None else config.lambda_lr,
        kendall=config.mixing_regularizer == "kendall",
    )


class ScheduledMixing:
    """Coefficients that change linearly over the run and learn nothing."""

    names = TARGETS
    form = "loss"

    def __init__(self, schedule: str, total_steps: int):
        self.knots, self.total_steps = SCHEDULES[schedule], total_steps

    def coefficients(self, step: int) -> torch.Tensor:
        """Return α' float32 (K,) of optimizer step `step`, counted from 0."""
        shares, values = zip(*self.knots, strict=True)
        return torch.tensor(
            [
                np.interp(step / self.total_steps, shares, value)
                for value in zip(*values, strict=True)
            ]
        ).float()

    def update(self, grad_alpha: Sequence[float], step: int) -> None:
        """Do nothing: a schedule has no parameters."""

    def state_dict(self) -> dict:
        """Return {}: a schedule follows from the step."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take up a state of `state_dict`."""


class LearnedMixing:
    """Coefficients from three learned positive scalars λ_j = exp(s_j), equal at the start, and a curriculum (MTC 4.2.2).

    λ'_fg = e^{−ct} λ_fg, λ'_or = e^{−ct} λ_or, λ'_fr = (1 − e^{−ct}) λ_fr, α'_j = λ'_j / Σ λ'. With c = 0 there is no curriculum:
    λ' = λ. s float32 (K,) has an Adam of its own: constant `learning_rate`, no weight decay.

    `form` says what α' does: "loss", L = Σ α'_j L_j; or "logits", L = Σ L_j(α'_j · logits), MTC's objective before it is
    approximated (4.2.1, `token_loss.scaled_nll`).

    In the "loss" form ∂L/∂s_j = α'_j (L_j − L): whichever target has the smallest loss gains weight, for that alone, and nothing
    in the published objective opposes it. Losses of different weightings are not on one scale, so the drift says little about
    which target is useful: watch α' in TensorBoard. `kendall` opposes it with Kendall et al.'s log σ_j. With the coefficient
    1/(2σ_j²) = α_j that term is −½ Σ_j log α_j up to a constant, α_j = λ_j / Σ λ. It is taken of α, not of λ: −½ Σ log λ_j
    raises all s_j alike, which no α_j feels. And it is taken before the curriculum, which sets α'_fr = 0 on purpose.
    """

    names = TARGETS

    def __init__(self, form: str, c: float, learning_rate: float, kendall: bool):
        self.form, self.c, self.kendall = form, c, kendall
        self.s = torch.zeros(len(TARGETS), dtype=torch.float32, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.s], lr=learning_rate)

    def _alpha(self, step: int) -> torch.Tensor:
        """α' float64 (K,) with the graph to s. A softmax of log λ': no c·t is so large or small that it gives 0/0."""
        log_lambda = self.s.double()
        if self.c:
            ct = self.c * step
            rising = math.log(-math.expm1(-ct)) if ct else -math.inf
            log_lambda = log_lambda + torch.tensor([-ct, rising, -ct], dtype=torch.float64)
        return log_lambda.softmax(0)

    def coefficients(self, step: int) -> torch.Tensor:
        """Return α' float32 (K,) of optimizer step `step`, counted from 0; α'_fr is exactly 0 at step 0 of a curriculum."""
        return self._alpha(step).detach().float()

    def update(self, grad_alpha: Sequence[float], step: int) -> None:
        """Step s along ∂L/∂s, from ∂L/∂α'_j (K numbers) at `step`, the step whose coefficients made them.

        In the "loss" form ∂L/∂α'_j = L_j. The numbers must be the global ones, the same on every rank.
        """
        # Linear in α' with the given slope, so its gradient is the chain rule's.
        objective = self._alpha(step) @ torch.as_tensor(
            grad_alpha, dtype=torch.float64, device="cpu"
        )
        if self.kendall:
            objective = objective - 0.5 * self.s.double().log_softmax(0).sum()
        self.optimizer.zero_grad()
        objective.backward()
        self.optimizer.step()

    def state_dict(self) -> dict:
        """Return s and Adam's moments as lists of floats, which JSON keeps to the bit."""
        return {
            "s": self.s.tolist(),
            "adam": {name: value.tolist() for name, value in self.optimizer.state[self.s].items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up a state of `state_dict`: the run then goes on to the bit as if it had not stopped."""
        with torch.no_grad():
            self.s.copy_(torch.tensor(state["s"], dtype=torch.float32))
        self.optimizer.state[self.s] = {
            name: torch.tensor(value, dtype=torch.float32) for name, value in state["adam"].items()
        }
