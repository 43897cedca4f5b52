"""Losses over one chosen and several rejected items behind one prompt: DPO and S-DPO.

log π(item) is the sum of the log-probabilities of the item's tokens, Δ = log π − log π_ref of an
item its *log-ratio*, and β(Δ₊ − Δ_j) the *margin* of the chosen item over rejected item j.

Letters in shapes: B prompts, J rejected items of a prompt, n labelled tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from igd_ds.contracts import Batch, Likelihood, ObjectiveContext
from igd_ds.objectives.msl import masked_nll
from igd_ds.objectives.weighted import token_nll


def dpo(margins: torch.Tensor) -> torch.Tensor:
    """Return the mean of −log σ(margin) over the pairs of each prompt, (B, J) → (B,) (DPO)."""
    return -F.logsigmoid(margins).mean(1)


def softmax_dpo(margins: torch.Tensor) -> torch.Tensor:
    """Return −log σ(−log Σ_j exp(−margin_j)) of each prompt, (B, J) → (B,) (S-DPO).

    With one rejected item it is DPO.
    """
    return -F.logsigmoid(-torch.logsumexp(-margins, dim=1))


PREFERENCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dpo": dpo,
    "s-dpo": softmax_dpo,
}
"""Name: loss of each prompt, nats, given the margins of its pairs."""


@dataclass(frozen=True)
class ItemLikelihood:
    """The probability of items under one softmax, whatever the model was trained by."""

    softmax: Likelihood
    """The softmax and its temperature."""

    def likelihood(self) -> Likelihood:
        """Return the softmax, for validation and search."""
        return self.softmax

    def nll(self, batch: Batch, logits: torch.Tensor, context: ObjectiveContext) -> torch.Tensor:
        """Return −log p of the labelled tokens in nats, float32 (n,); `logits` is (n, V)."""
        temperature = self.softmax.temperature
        if self.softmax.softmax == "masked":
            return masked_nll(batch, logits, context.trie, temperature)
        return token_nll(logits.float() / temperature, batch.targets)


def per_item(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the sum of `values` (n,) over the tokens of each of the batch's rows, float32 (rows,).

    A row that only fills the batch has no tokens and gets 0, with a graph.
    """
    return values.new_zeros(len(batch.item_ids)).index_add(0, batch.row, values)


def choice_kl(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return KL(π ‖ π_ref) over the listed items of each prompt, nats, (B, 1+J) → (B,).

    Both distributions are renormalised over these items.

    Args:
        policy: log π of the items.
        reference: log π_ref of the items.
    """
    own, other = policy.log_softmax(1), reference.log_softmax(1)
    return (own.exp() * (own - other)).sum(1)
