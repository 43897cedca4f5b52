"""The loss of one token, before its weight. Pure functions, in fp32 and nats.

Letters: n labelled positions, V vocabulary, K targets of a mixture. Those of the table take (logits (n, V) of any dtype,
targets int64 (n,), null logits (n, V) or None, config) and return float32 (n,); the gradient flows through all logits.
"""

import torch

from igd_ds.loss import token_nll


def plain(logits, targets, null_logits, config) -> torch.Tensor:
    """−log p(target)."""
    return token_nll(logits, targets)


def rank(logits, targets, null_logits, config) -> torch.Tensor:
    """−log softmax(f/τ)[target]: τ = `config.rank_tau` < 1 puts more of the gradient on hard negatives (LETTER)."""
    return token_nll(logits.float() / config.rank_tau, targets)


def cft(logits, targets, null_logits, config) -> torch.Tensor:
    """CE(f) + λ·CE(f − f₀), f₀ the logits behind a prompt without history, λ = `config.cft_lambda` (CFT).

    The second term asks what the history adds. As published, its gradient flows through f₀ too.
    """
    return token_nll(logits, targets) + config.cft_lambda * token_nll(
        logits.float() - null_logits.float(), targets
    )


def scaled_nll(
    logits: torch.Tensor, targets: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return −log softmax(α_j f)[target] and its derivative by α_j, both float32 (n, K) (MTC 4.2.1, before its approximation).

    The derivative, Σ_v softmax(α_j f)_v f_v − f_target, comes without a graph: summed over all ranks it is exact, whatever
    loss scale or partitioning the engine's backward pass has. `alpha` is float32 (K,), without a gradient.
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
