"""LETTER's two regularisers of RQ-VAE: collaborative alignment and diversity of the codes.

LETTER is by Wang et al. 2024 (arXiv:2405.07314); its loss is L_RQ-VAE + α·L_CF + β·L_div. The
public code is HonghuiBao2000/LETTER.

Letters in shapes: N items, B items of a batch, L levels, K codes per level, d width of a codeword.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional

from igd_ds.backbones.saved import reading_weights
from igd_ds.errors import UsageError
from igd_ds.folders import read_json_object
from igd_ds.semantic_ids.balanced import balanced_kmeans
from igd_ds.semantic_ids.kmeans import kmeans

GROUPS = 10
"""Groups of codes per level (LETTER's public code)."""


def collaborative_loss(
    quantized: torch.Tensor, collaborative: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return L_CF (), in nats: how poorly quantised items find their own collaborative embedding.

    L_CF = −mean over i of log [ exp(cos(z_i, h_i)/τ) / Σ_j exp(cos(z_i, h_j)/τ) ], j over the
    batch. The public code has the inner product in the place of cos/τ, which depends on the scale
    of both tables.

    Args:
        quantized: z, (B, d), the sums of codewords.
        collaborative: h, (B, d), the embeddings of the same items.
        temperature: τ.
    """
    cosine = functional.normalize(quantized, dim=1) @ functional.normalize(collaborative, dim=1).T
    own = torch.arange(len(cosine), device=cosine.device)
    return functional.cross_entropy(cosine / temperature, own)


def diversity_loss(
    codes: torch.Tensor, codebooks: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """Return L_div (), in nats: how far the codes in use are from the codes of their groups.

    For an item with code c at a level,
    L_div = −mean over j of log [ exp(e_c·e_j) / Σ_{k≠c} exp(e_c·e_k) ], j over the other codes of
    c's group; then the mean over items and levels. The public code draws one j at random: this is
    the expectation of its loss. A code that is alone in its group adds 0.

    Args:
        codes: int64 (B, L).
        codebooks: e, (L, K, d).
        groups: int64 (L, K), the group of each code.
    """
    similarity = codebooks @ codebooks.transpose(1, 2)
    itself = torch.eye(codebooks.shape[1], dtype=torch.bool, device=codebooks.device)
    log_share = similarity.masked_fill(itself, -math.inf).log_softmax(2)

    is_positive = (groups[:, :, None] == groups[:, None, :]) & ~itself
    sums = log_share.masked_fill(~is_positive, 0.0).sum(2)
    loss_of_code = -sums / is_positive.sum(2).clamp_min(1)
    return loss_of_code.gather(1, codes.T).mean()


@torch.no_grad()
def group_codes(codebooks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the group int64 (L, K) of each codeword of (L, K, d), by a balanced k-means.

    A level has GROUPS groups of at most ⌈K/GROUPS⌉ codes.
    """
    groups = [
        balanced_kmeans(book, kmeans(book, GROUPS, generator))[1] for book in codebooks.detach()
    ]
    return torch.stack(groups)


def load_collaborative(run: Path, dataset: str, latent: int) -> torch.Tensor:
    """Return the item embeddings (N, d) float32 of a sequential recommender.

    Args:
        run: RUN of `igd baseline`, finished.
        dataset: fingerprint of the dataset whose items get IDs.
        latent: d, width of the quantizer's codewords.

    Raises:
        UsageError: the run has no trained item embeddings, is of another dataset, or its embeddings
            have another width.
    """
    description, weights = run / "model" / "config.json", run / "model" / "model.safetensors"
    if not (description.is_file() and weights.is_file()):
        raise UsageError(
            f"--cf_run {run}: {description} or {weights.name} beside it is missing; give a "
            "finished run of igd baseline --recommender sasrec or lrurec"
        )
    trained = read_json_object(description, "train the recommender again")
    if trained.get("dataset") != dataset:
        raise UsageError(
            f"--cf_run {run}: the recommender was trained on another dataset than --dataset, so "
            "its embeddings may be of other items; run igd baseline on this dataset"
        )

    with reading_weights(f"--cf_run {run}"):
        tensors = load_file(weights)
    if "items.weight" not in tensors:
        raise UsageError(
            f"--cf_run {run}: {trained.get('recommender')} has no item embeddings; give a run of "
            "igd baseline --recommender sasrec or lrurec"
        )
    table = tensors["items.weight"].float()
    if table.shape[1] != latent:
        raise UsageError(
            f"--cf_run {run}: item embeddings of width {table.shape[1]} cannot be compared with "
            f"codewords of width {latent}; give --latent {table.shape[1]}, or train the "
            f"recommender with --hidden_size {latent}"
        )
    return table
