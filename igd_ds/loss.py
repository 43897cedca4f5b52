"""The weighted next-token loss, in fp32, over labelled positions only. Pure functions.

Letters: B rows, T tokens, n labelled positions, V vocabulary.
"""

import torch
import torch.nn.functional as F

IGNORED = -100  # label of a position that predicts nothing (torch's and transformers' convention)


def predicting_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return a bool mask (B, T) of the positions whose logits predict a label: those one before each labelled token.

    `labels` is int64 (B, T), unshifted. The mask is what transformers' `logits_to_keep` takes: logits come back as (n, V),
    row by row, in the order of `labels[:, 1:][labels[:, 1:] != IGNORED]`.
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask


def at_labels(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return (n,) the entries of a per-token tensor (B, T) at the labelled tokens, in the order of the logits."""
    return values[:, 1:][labels[:, 1:] != IGNORED]


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return −log p(target) in nats, float32 (n,), from logits (n, V) of any dtype and targets int64 (n,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def weighted_sums(nll: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (Σ w·NLL, Σ w), fp32 scalars: numerator and this part's share of Ω in IGD Eq. 6.

    An empty micro-batch gives a zero that still has the graph, so that `backward` works on every rank.
    """
    return (weights * nll).sum(), weights.sum()
