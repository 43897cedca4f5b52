"""Policy optimisation with groups of items from the constrained search: GRPO (ReRe, MiniOneRec).

Letters in shapes: B prompts, G items of a group, n labelled tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

EPSILON = 1e-4
"""Added to the standard deviation of a group's rewards (as TRL's GRPO)."""


def rule(is_target: np.ndarray) -> np.ndarray:
    """Return 1 for the target and 0 for other items, float64 (B, G).

    Args:
        is_target: bool (B, G), by the item's place in the beam search.
    """
    return is_target.astype(np.float64)


def rank(is_target: np.ndarray) -> np.ndarray:
    """Return the rule's reward, and a penalty of wrong items in groups that hold the target.

    The wrong item at place i, from 0, gets −(1 / log2(i + 2)) / Σ_j 1 / log2(j + 2), where j runs
    over all places (MiniOneRec).
    """
    discount = 1 / np.log2(np.arange(is_target.shape[1]) + 2)
    holds_target = is_target.any(1, keepdims=True)
    penalty = np.where(holds_target & ~is_target, discount / discount.sum(), 0.0)
    return rule(is_target) - penalty


REWARDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"rule": rule, "rank": rank}


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Return A = (r − mean) / (std + 1e-4) within each group, float64 (B, G), G ≥ 2.

    std has the divisor G − 1, as in TRL. A group without spread has A = 0.
    """
    centred = rewards - rewards.mean(1, keepdims=True)
    return centred / (rewards.std(1, ddof=1, keepdims=True) + EPSILON)


def has_spread(rewards: np.ndarray) -> np.ndarray:
    """Return whether the rewards of a group differ, bool (B,)."""
    return rewards.max(1) > rewards.min(1)


def policy_loss(logprob: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Return −exp(l − stop(l))·A of each token, (n,): its gradient is −A ∇l.

    Args:
        logprob: l, log p of the tokens, nats, with a graph.
        advantage: A of each token's item, and credit.
    """
    return -(logprob - logprob.detach()).exp() * advantage


def k3(logprob: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the estimate exp(l_ref − l) − (l_ref − l) − 1 ≥ 0 of KL(π ‖ π_ref) by token, (n,)."""
    difference = reference - logprob
    return difference.exp() - difference - 1
