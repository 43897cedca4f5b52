"""The recurrence h_t = decay ⊙ h_{t−1} + inputs_t, over all positions at once, with its gradient.

Letters in shapes: B sequences, T positions, H recurrent width.
"""

from __future__ import annotations

from typing import Any

import torch


class LinearScan(torch.autograd.Function):
    """h_t = decay ⊙ h_{t−1} + inputs_t with h_{−1} = 0.

    Its gradient is the same recurrence, backwards in time.
    """

    @staticmethod
    def forward(ctx: Any, decay: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Return h, see `linear_scan`."""
        states = scan_in_place(decay, inputs.clone(memory_format=torch.contiguous_format))
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of decay and inputs."""
        decay, states = ctx.saved_tensors
        of_inputs = scan_in_place(decay.conj().resolve_conj(), gradient.flip(1)).flip(1)
        return (of_inputs[:, 1:] * states[:, :-1].conj()).sum((0, 1)), of_inputs


def linear_scan(decay: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return h with h_t = decay ⊙ h_{t−1} + inputs_t and h_{−1} = 0, differentiable.

    Args:
        decay: (H,), real or complex.
        inputs: (B, T, H), of the same kind.

    Returns:
        (B, T, H).

    Example:
        >>> linear_scan(torch.tensor([0.5]), torch.ones(1, 3, 1)).flatten().tolist()
        [1.0, 1.5, 1.75]
    """
    hidden: torch.Tensor = LinearScan.apply(decay, inputs)
    return hidden


def scan_in_place(decay: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Turn inputs (B, T, H) into the states of the recurrence, in place.

    This is the prefix scan of Brent and Kung. It takes 2·log₂ T passes that change 2·T positions in
    all. On the way up, after the pass with step s, each position 2s, 4s, … (counted from 1) holds
    the state that its last 2s inputs alone would give. On the way down, each half-length block
    receives the state that precedes it, until every position is complete.
    """
    length = states.shape[1]
    powers: list[tuple[int, torch.Tensor]] = []
    step = 1
    while step < length:
        powers.append((step, decay))
        decay, step = decay * decay, 2 * step

    for step, power in powers:
        ends = states[:, 2 * step - 1 :: 2 * step]
        ends.addcmul_(states[:, step - 1 : length - step : 2 * step], power)
    for step, power in reversed(powers):
        ends = states[:, 3 * step - 1 :: 2 * step]
        ends.addcmul_(states[:, 2 * step - 1 : length - step : 2 * step], power)
    return states
