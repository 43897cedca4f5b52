"""Masked softmax loss (MSL): the softmax runs over the trie's next tokens instead of the
vocabulary.

With the softmax masked to the children of the current trie node, a model's token probabilities
multiply to a probability distribution over the catalogue, and a forced token has probability 1. At
τ = 1 the loss is the negative log-likelihood of that distribution.

Letters in shapes: n labelled tokens, V vocabulary, E edges below the n tokens' parent nodes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from igd_ds.config.options import option, require
from igd_ds.contracts import Batch, Likelihood, Logits, LossTerms, ObjectiveContext, StepTotals
from igd_ds.errors import UsageError
from igd_ds.items.search_trie import SearchTrie
from igd_ds.objectives.gain import BETA_HELP
from igd_ds.objectives.weighted import TokenWeighting, weighted_terms

ADAPTIVE = "adaptive"
ETA = 0.25
"""η of the adaptive temperature: the share of first tokens that compete with the target (MSL)."""
TAU_START = TAU_LEAST = 1.5
TAU_MOST = 5.0
TAU_MOMENTUM = 0.95
"""τ ← 0.95·τ + 0.05·τ* after each step, τ* clamped to [1.5, 5] (MSL)."""


@dataclass(frozen=True, kw_only=True)
class MSLOptions:
    """Flags of `msl`."""

    msl_tau: str = option(f"τ of the masked softmax: a number such as 4.5, or {ADAPTIVE}")
    igd_beta: float | None = option(BETA_HELP, None)

    def check(self) -> None:
        """Raise UsageError unless τ is a positive number or `adaptive`, and β lies in [0, 1]."""
        if self.msl_tau != ADAPTIVE:
            try:
                fixed = float(self.msl_tau)
            except ValueError:
                fixed = math.nan
            if not 0 < fixed < math.inf:
                raise UsageError(
                    f"--msl_tau must be a positive, finite number or '{ADAPTIVE}', "
                    f"found {self.msl_tau}"
                )
        require(self, "igd_beta", lambda value: 0 <= value <= 1, "must lie in [0, 1]")


class MSL(TokenWeighting):
    """τ·(log Σ_{c ∈ C} exp(f_c/τ) − f_y/τ), C the children of the trie node before the target
    (MSL).

    Tokens whose node has one child have loss 0 and leave the mean. With `igd_beta`, tokens that
    branch without information gain (all their siblings are cold) weigh β.

    The adaptive τ follows the gap between target and other logits at the items' first tokens.
    """

    Options = MSLOptions
    tags: ClassVar[Mapping[str, str]] = {"train/msl_tau": "temperature τ of the masked softmax"}

    def __init__(self, options: MSLOptions, total_steps: int):
        super().__init__(options, total_steps)
        self.tau = TAU_START if options.msl_tau == ADAPTIVE else float(options.msl_tau)

    def weights(self, context: ObjectiveContext) -> np.ndarray:
        """Return 0 for forced tokens and 1 (or β) for the others, float32 (tokens, 1)."""
        trie = context.stored.trie
        num_children = np.diff(trie.child_begin)
        branches = num_children[trie.parent[context.stored.token_node]] > 1

        beta = 1.0 if self.options.igd_beta is None else self.options.igd_beta
        weights = np.where(context.stored.zero_gain, beta, 1.0) * branches
        return weights.astype(np.float32)[:, None]

    def loss(self, batch: Batch, logits: Logits, context: ObjectiveContext) -> LossTerms:
        """Return the weighted sum of the masked loss, and what the adaptive τ needs."""
        nll = masked_nll(batch, logits.tokens, context.trie, self.tau)
        statistics = {}
        if self.options.msl_tau == ADAPTIVE:
            statistics = first_token_statistics(batch, logits.tokens, context)
        return weighted_terms(batch, self.tau * nll, nll, statistics)

    def nll(self, batch: Batch, logits: torch.Tensor, context: ObjectiveContext) -> torch.Tensor:
        """Return −log p(target) under the masked softmax at the present τ, float32 (n,)."""
        return masked_nll(batch, logits, context.trie, self.tau)

    def likelihood(self) -> Likelihood:
        """Return the masked softmax at the present τ."""
        return Likelihood("masked", self.tau)

    def update(self, totals: StepTotals) -> dict[str, float]:
        """Move the adaptive τ; return the τ that the step used."""
        used = self.tau
        if self.options.msl_tau == ADAPTIVE:
            best = best_temperature({name: v.item() for name, v in totals.statistics.items()})
            if best is not None:
                self.tau = TAU_MOMENTUM * self.tau + (1 - TAU_MOMENTUM) * best
        return {"train/msl_tau": used}

    def state_dict(self) -> dict[str, Any]:
        """Return τ."""
        return {"tau": self.tau}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore τ."""
        self.tau = state["tau"]


def masked_nll(
    batch: Batch, logits: torch.Tensor, trie: SearchTrie, temperature: float
) -> torch.Tensor:
    """Return −log softmax of the targets over their siblings in the trie, nats, float32 (n,).

    A forced token, whose node has one child, gets exactly 0.

    Args:
        batch: tells each labelled token's trie node.
        logits: (n, V) of any floating dtype; only the siblings' entries are read.
        trie: on the logits' device.
        temperature: τ; the logits are divided by it.
    """
    # Gather the siblings' logits: no (n, V) softmax is computed.
    parent = trie.parent[batch.node].long()
    row, child = trie.children(parent)
    scaled = logits[row, trie.token[child].long()].float() / temperature

    # A log-sum-exp per labelled token; its maximum is taken off first and needs no gradient.
    num_tokens = len(batch.targets)
    highest = scaled.new_full((num_tokens,), -torch.inf)
    highest = highest.scatter_reduce(0, row, scaled.detach(), "amax")
    shifted = scaled - highest[row]
    mass = scaled.new_zeros(num_tokens).scatter_add(0, row, shifted.exp())

    # The target's place among all siblings, found without a look at them: a mask would make an
    # accelerator wait.
    begin = trie.child_begin[parent].long()
    count = trie.child_begin[parent + 1] - begin
    target = shifted[count.cumsum(0) - count + batch.node - begin]
    return mass.log() - target


def first_token_statistics(
    batch: Batch, logits: torch.Tensor, context: ObjectiveContext
) -> dict[str, torch.Tensor]:
    """Return sums over the items' first tokens that the adaptive temperature needs, float64
    scalars.

    `targets` and `target_sum`: number and Σ of the targets' logits. `legal`, `legal_sum`,
    `legal_squares`: number, Σ and Σ of squares of all legal logits. `first_tokens`: targets × first
    tokens in the catalogue, so that the sum over ranks divided by `targets` is that number again.
    """
    # The first labelled token of each row; rows that only fill the batch have none and count as 0.
    # Their number stays on the device: to index by a mask would make the host wait for it.
    num_rows = len(batch.item_ids) if len(logits) else 0
    is_first = context.trie.parent[batch.node] == 0
    place = torch.where(is_first, batch.row, num_rows)
    first = place.new_zeros(num_rows + 1)
    first = first.scatter(0, place, torch.arange(len(place), device=place.device))[:num_rows]
    has_one = is_first.new_zeros(num_rows + 1).scatter(0, place, True)[:num_rows, None]

    root_children = int(context.stored.trie.child_begin[1]) - 1
    tokens = context.trie.token[1 : 1 + root_children].long()
    logits = logits.detach()[first]
    legal = logits[:, tokens].double() * has_one
    target = logits.gather(1, batch.targets[first, None]).double() * has_one
    count = has_one.sum().double()
    return {
        "targets": count,
        "target_sum": target.sum(),
        "legal": count * len(tokens),
        "legal_sum": legal.sum(),
        "legal_squares": (legal * legal).sum(),
        "first_tokens": count * len(tokens),
    }


def best_temperature(sums: Mapping[str, float]) -> float | None:
    """Return τ* = (Δμ + √max(Δμ² − 2Cσ², 0)) / (2C), clamped to [1.5, 5] (MSL).

    Δμ is the mean target logit minus the mean legal logit, σ² the variance of the legal logits,
    C = log(η·n₁), n₁ the number of first tokens in the catalogue.

    Args:
        sums: the sums of `first_token_statistics` over all ranks.

    Returns:
        None where there is nothing to adapt to: no first token in the step, or η·n₁ ≤ 1.
    """
    if not sums["targets"]:
        return None
    competitors = ETA * sums["first_tokens"] / sums["targets"]
    if competitors <= 1:
        return None

    mean = sums["legal_sum"] / sums["legal"]
    variance = max(sums["legal_squares"] / sums["legal"] - mean * mean, 0.0)
    gap = sums["target_sum"] / sums["targets"] - mean

    c = math.log(competitors)
    best = (gap + math.sqrt(max(gap * gap - 2 * c * variance, 0.0))) / (2 * c)
    return min(max(best, TAU_LEAST), TAU_MOST)
