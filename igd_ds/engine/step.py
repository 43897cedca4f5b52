"""One optimizer step with exact global normalisation, whatever the loss.

Letters in shapes: K targets of the loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from igd_ds import distributed
from igd_ds.contracts import LossTerms, StepTotals

EMPTY_WEIGHT = 1e-12
"""Used as Ω when a micro-batch has zero total weight; its loss is then exactly 0."""

ADVICE = (
    "A resumed run would come here again: start a new one with a lower --learning_rate, or look at "
    "the data of this step"
)

B = TypeVar("B", contravariant=True)


class StepLoss(Protocol[B]):
    """The loss of an optimizer step over micro-batches of type B.

    It is L = Σ_k coefficient_k · N_k / Ω_k, see LossTerms.
    """

    def normalisers(self, batch: B) -> torch.Tensor:
        """Return the batch's part of each Ω, float64 (K,), on the CPU, before any forward pass."""

    def coefficients(self, step: int) -> torch.Tensor:
        """Return the factor of each target at optimizer step `step`, float32 (K,)."""

    def terms(self, engine: Any, batch: B) -> LossTerms:
        """Run the forward pass and return what the micro-batch adds to the loss."""

    def update(self, totals: StepTotals) -> Mapping[str, float]:
        """Take note of a finished step; return scalars to log."""


@dataclass(frozen=True)
class StepSums:
    """Sums over some optimizer steps, all ranks and micro-batches; two of them can be added."""

    steps: int = 0
    """Steps that made an update."""
    objective: float = 0.0
    """Σ over steps of the optimised loss."""
    numerators: np.ndarray = field(default_factory=lambda: np.zeros(1))
    """float64 (K,): Σ of N_k."""
    normalisers: np.ndarray = field(default_factory=lambda: np.zeros(1))
    """float64 (K,): Σ of Ω_k."""
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Named sums of LossTerms.statistics, float64."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Σ over steps of what `StepLoss.update` returned."""
    gradient_norm: float = 0.0
    """L2 norm of the gradient of the last of these steps, before clipping. Not a sum."""

    def __add__(self, other: StepSums) -> StepSums:
        """Return the sums over the steps of both."""
        return StepSums(
            self.steps + other.steps,
            self.objective + other.objective,
            self.numerators + other.numerators,
            self.normalisers + other.normalisers,
            _added(self.statistics, other.statistics),
            _added(self.scalars, other.scalars),
            other.gradient_norm if other.steps else self.gradient_norm,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as JSON values."""
        state = dataclasses.asdict(self)
        state |= {name: state[name].tolist() for name in ("numerators", "normalisers")}
        return state | {"statistics": {k: v.tolist() for k, v in self.statistics.items()}}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> StepSums:
        """Return the sums that `state_dict` described; those of no step for {}."""
        if not state:
            return cls()
        arrays = {name: np.array(state[name]) for name in ("numerators", "normalisers")}
        statistics = {name: np.array(value) for name, value in state["statistics"].items()}
        return cls(**{**state, **arrays, "statistics": statistics})


def _added(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sums by name; a name that one of them lacks counts as 0 there."""
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in {**first, **second}}


def optimizer_step(
    engine: Any,
    micro_batches: Sequence[B],
    loss: StepLoss[B],
    step: int,
    normalization: str = "global",
    stop: bool = False,
) -> tuple[StepSums, bool]:
    """Make one optimizer step over this rank's micro-batches.

    The normalisers Ω are summed over all ranks and micro-batches before the first backward pass, so
    the gradient does not depend on how rows are dealt (IGD Eq. 6).

    Args:
        engine: DeepSpeed engine.
        micro_batches: this rank's, one per accumulation step, on the CPU.
        loss: what is minimised.
        step: the optimizer step, counted from 0.
        normalization: "global", or "per_batch" for the published code's mean of micro-batch means.
        stop: whether this rank was asked to stop.

    Returns:
        The step's sums, the same on every rank, and whether any rank was asked to stop.

    Raises:
        FloatingPointError: on every rank: before the update if the loss is not finite anywhere; if
            the gradient is not, after the update (at stage 0 in float32 before it).
    """
    device, world = distributed.device(), distributed.world_size()

    # Agree on Ω and on whether to stop, in one collective.
    own = torch.stack([loss.normalisers(batch) for batch in micro_batches]).sum(0)
    agreed = torch.cat([own, own.new_tensor([float(stop)])]).to(device)
    *omega, stopped = distributed.all_reduce_sum(agreed).tolist()
    if not any(omega):
        distributed.say(
            f"warning: step {step + 1}: all target tokens have weight 0 (Ω = 0); no update",
            always=True,
        )
        nothing = np.zeros(len(omega))
        return StepSums(0, 0.0, nothing, nothing), stopped > 0

    # Where a target has no weight its numerator is 0 too.
    divisor = torch.tensor([o or 1.0 for o in omega], device=device)
    coefficients = loss.coefficients(step).to(device)
    total, minimised = None, torch.zeros(1, dtype=torch.float64, device=device)
    for index, batch in enumerate(micro_batches):
        terms = loss.terms(engine, batch)
        if normalization == "global":
            losses = terms.numerators * (world / divisor)  # the engine averages over ranks
        else:
            per_batch = terms.normalisers.clamp_min(EMPTY_WEIGHT) * len(micro_batches)
            losses = terms.numerators / per_batch
        own_loss = (coefficients * losses).sum()
        engine.backward(own_loss, scale_wrt_gas=False)

        flat = _flat(terms)
        total = flat if total is None else total + flat
        minimised += own_loss.detach().double()
        if index == len(micro_batches) - 1:
            everything = distributed.all_reduce_sum(torch.cat([total, minimised]))
            _check_loss(everything, step)
            gradient_norm = _norm_before_update(engine, step)
        engine.step()

    assert total is not None, "a step has at least one micro-batch"
    if gradient_norm is None:
        gradient_norm = _norm_after_update(engine, step)
    objective = float(everything[-1]) / world
    sums = _finished(everything[:-1], terms, divisor, loss, step)
    sums = dataclasses.replace(sums, objective=objective, gradient_norm=gradient_norm)
    return sums, stopped > 0


def _flat(terms: LossTerms) -> torch.Tensor:
    """Return numerators, normalisers and statistics as one float64 vector, for one collective."""
    parts = [terms.numerators.detach(), terms.normalisers]
    parts += [terms.statistics[name] for name in sorted(terms.statistics)]
    return torch.cat([part.double().reshape(-1) for part in parts])


def _unflat(
    flat: torch.Tensor, like: LossTerms
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Undo `_flat`."""
    names = sorted(like.statistics)
    shapes = [like.numerators.shape, like.normalisers.shape]
    shapes += [like.statistics[name].shape for name in names]
    parts = flat.split([shape.numel() for shape in shapes])
    numerators, normalisers, *rest = (
        part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)
    )
    return numerators, normalisers, dict(zip(names, rest, strict=True))


def _check_loss(total: torch.Tensor, step: int) -> None:
    if not torch.isfinite(total).all():
        raise FloatingPointError(
            f"step {step + 1}: the loss is not finite; no weight was updated. {ADVICE}"
        )


def _norm_before_update(engine: Any, step: int) -> float | None:
    """Return the gradient's norm where DeepSpeed does not measure it, at stage 0; elsewhere None.

    There the optimizer is torch's own, and the gradient is that of all ranks already. In float16 a
    scaler has multiplied it, and skips the update where the product overflows: the norm is then 0.
    """
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))

    scaler = engine.torch_autocast_z0_gradscaler
    if scaler:
        return norm / scaler.get_scale() if math.isfinite(norm) else 0.0
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"step {step + 1}: the gradient is not finite; no weight was updated. {ADVICE}"
        )
    return norm


def _norm_after_update(engine: Any, step: int) -> float:
    """Return the gradient's norm as DeepSpeed measured it in its update."""
    norm = float(engine.get_global_grad_norm() or 0.0)
    # With fp16 the engine skips such a step itself.
    if not engine.fp16_enabled() and not math.isfinite(norm):
        raise FloatingPointError(
            f"step {step + 1}: the gradient is not finite, and so the weights are not since this "
            f"step. {ADVICE}"
        )
    return norm


def _finished(
    total: torch.Tensor,
    like: LossTerms,
    divisor: torch.Tensor,
    loss: StepLoss[Any],
    step: int,
) -> StepSums:
    """Tell the loss about the step's totals and return the step's sums that follow from them."""
    numerators, normalisers, statistics = _unflat(total, like)
    totals = StepTotals(step, numerators / divisor, divisor.double(), statistics)
    scalars = loss.update(totals)
    return StepSums(
        steps=1,
        numerators=numerators.cpu().numpy(),
        normalisers=normalisers.cpu().numpy(),
        statistics={name: value.cpu().numpy() for name, value in statistics.items()},
        scalars=scalars,
    )
