"""The weighted next-token loss, in fp32, over labelled positions only. Pure functions.

Letters: B rows, T tokens, n labelled positions, V vocabulary.
"""

import torch
import torch.nn.functional as F

IGNORED = -100  # label of a position that predicts nothing (torch's and transformers' convention)


def predicting_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return a bool mask (B, T) of the positions whose logits predict a label: those one before each labelled token.

    `labels` is int64 (B, T), unshifted. The mask is what transformers' `logits_to_keep` takes: logits come back as (n, V),
    row by row, in the order of `labels[labels != IGNORED]`.
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask


def at_labels(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return (n, …) the entries of a per-token tensor (B, T, …) at the labelled tokens, in the order of the logits.

    A causal row's first token is never labelled, as nothing comes before it.
    """
    return values[labels != IGNORED]


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return −log p(target) in nats, float32 (n,), from logits (n, V) of any dtype and targets int64 (n,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def weighted_sums(losses: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (Σ w·loss, Σ w) per target, fp32 (K,): numerators and this part's share of each Ω (IGD Eq. 6).

    `weights` is (n, K); `losses` (n,) where all targets share a token's loss, else (n, K). An empty micro-batch gives zeros that
    still have the graph, so that `backward` works on every rank.
    """
    losses = losses if losses.dim() == 2 else losses[:, None]
    return (weights * losses).sum(0), weights.sum(0)
