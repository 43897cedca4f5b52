"""Encoders of item sequences that are trained: GRU4Rec, SASRec, HSTU and LRURec.

Letters in shapes: B sequences, T items of a sequence, D width, H recurrent width, N items, n
positions to predict from, C candidate items.

Histories are right-padded with any item. All models here are causal, so no position sees a later
one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from igd_ds.baselines.linear_scan import linear_scan
from igd_ds.baselines.saved import save_tensors
from igd_ds.errors import UsageError


class SequentialModel(nn.Module, ABC):
    """An encoder of item sequences whose states score items.

    A score is the product of state and item embedding, plus a bias if the paper has one.
    """

    def __init__(self, num_items: int, hidden_size: int, bias: bool):
        super().__init__()
        self.items = nn.Embedding(num_items, hidden_size)
        self.bias = nn.Parameter(torch.zeros(num_items)) if bias else None

    @abstractmethod
    def encode(self, histories: torch.Tensor) -> torch.Tensor:
        """Return the state after each item, (B, T, D), from histories (B, T) int64."""

    def forward(
        self,
        histories: torch.Tensor,
        positions: torch.Tensor,
        candidates: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the scores of all items, or of the candidates alone.

        Args:
            histories: int64 (B, T).
            positions: int64 (n,), positions in the flattened (B·T) histories to predict from.
            candidates: int64 (C,), items; None for all items.

        Returns:
            (n, N), or (n, C) for candidates.
        """
        states = self.encode(histories).flatten(0, 1)[positions]
        if candidates is None:
            return F.linear(states, self.items.weight, self.bias)
        bias = None if self.bias is None else self.bias[candidates]
        return F.linear(states, self.items(candidates), bias)

    @torch.no_grad()
    def log_probabilities(self, histories: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the log-softmax of the scores of all items, float32 (n, N), in nats."""
        scores: torch.Tensor = self(histories, positions)
        return scores.float().log_softmax(1)

    def save_pretrained(
        self, folder: Path, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write the weights to a new folder.

        Args:
            folder: the folder to make.
            state_dict: the weights, if this process holds only parts of them (ZeRO-3).
        """
        save_tensors(folder, self.state_dict() if state_dict is None else state_dict)


class GRU4Rec(SequentialModel):
    """GRU4Rec: a GRU over item embeddings, which are the output weights too.

    The published code calls these shared weights `constrained`.
    """

    def __init__(
        self, num_items: int, max_history: int, hidden_size: int, num_layers: int, dropout: float
    ):
        super().__init__(num_items, hidden_size, bias=True)
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(
            hidden_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)

    def encode(self, histories: torch.Tensor) -> torch.Tensor:
        """See `SequentialModel.encode`."""
        states: torch.Tensor = self.gru(self.dropout(self.items(histories)))[0]
        return self.dropout(states)


class SASRec(SequentialModel):
    """SASRec: blocks of causal self-attention and a point-wise feed-forward net.

    Positions count from the oldest item of a history on, so that a row's scores do not depend on
    the rows that it is trained with.
    """

    def __init__(
        self,
        num_items: int,
        max_history: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
    ):
        super().__init__(num_items, hidden_size, bias=False)
        refuse_heads(hidden_size, num_heads)
        self.positions = nn.Embedding(max_history, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            AttentionBlock(hidden_size, num_heads, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=1e-8)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)

    def encode(self, histories: torch.Tensor) -> torch.Tensor:
        """See `SequentialModel.encode`."""
        positions = torch.arange(histories.shape[1], device=histories.device)
        items = self.items(histories) * self.items.embedding_dim**0.5
        states: torch.Tensor = self.dropout(items + self.positions(positions))
        for block in self.blocks:
            states = block(states)
        normalised: torch.Tensor = self.norm(states)
        return normalised


class AttentionBlock(nn.Module):
    """Self-attention, then a point-wise feed-forward net, each with a residual connection.

    With q = norm(x): y = q + attention(query q, keys and values x); n = norm(y); the result is
    n + feed-forward(n). So a residual connection adds the *normalised* input, as in the published
    code, kang205/SASRec. The paper adds the input itself (Section III-C). While embeddings are
    small, that input is far smaller than the output, and the model learned more slowly. Unlike in
    both, the heads pass through a linear layer.

    Shape: (B, T, D) → (B, T, D).
    """

    def __init__(self, size: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.rate = num_heads, dropout
        self.norms = nn.ModuleList(nn.LayerNorm(size, eps=1e-8) for _ in range(2))
        self.query, self.key_value = nn.Linear(size, size), nn.Linear(size, 2 * size)
        self.output = nn.Linear(size, size)
        self.feed_forward = nn.Sequential(
            nn.Linear(size, size),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(size, size),
            nn.Dropout(dropout),
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        queries = self.norms[0](states)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.query(queries), *self.key_value(states).chunk(2, -1))
        )
        rate = self.rate if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)

        normalised = self.norms[1](queries + self.output(attended.transpose(1, 2).flatten(2)))
        return normalised + self.feed_forward(normalised)


class HSTU(SequentialModel):
    """HSTU: blocks of pointwise attention, whose output is gated and takes no feed-forward net.

    The actions of a user are one sequence, and here each action is an item. Embeddings and
    positions are those of SASRec, as in the published code. The attention's bias depends on the
    distance of two actions. The paper adds one for the time between them, but histories have no
    times. As with all models here, a score is an inner product; the published code divides a
    cosine by 0.05.
    """

    def __init__(
        self,
        num_items: int,
        max_history: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
    ):
        super().__init__(num_items, hidden_size, bias=False)
        refuse_heads(hidden_size, num_heads)
        self.positions = nn.Embedding(max_history, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            PointwiseAttentionBlock(hidden_size, num_heads, max_history, dropout)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def encode(self, histories: torch.Tensor) -> torch.Tensor:
        """See `SequentialModel.encode`."""
        positions = torch.arange(histories.shape[1], device=histories.device)
        items = self.items(histories) * self.items.embedding_dim**0.5
        states: torch.Tensor = self.dropout(items + self.positions(positions))
        for block in self.blocks:
            states = block(states)
        normalised: torch.Tensor = self.norm(states)
        return normalised


class PointwiseAttentionBlock(nn.Module):
    """x + f₂(norm(A V) ⊙ U) with A = SiLU(Q Kᵀ + b) / n (HSTU, Eq. 1 to 3).

    U, V, Q and K are parts of SiLU(f₁(norm(x))). The weights A are not normalised over the history,
    so that they keep how strong an interest is. n is the longest history, as in the published code.
    b is learned, a number per distance of two positions.

    Shape: (B, T, D) → (B, T, D).
    """

    def __init__(self, size: int, num_heads: int, max_history: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(
            nn.LayerNorm(size, eps=1e-6, elementwise_affine=False) for _ in range(2)
        )
        self.inputs, self.output = nn.Linear(size, 4 * size, bias=False), nn.Linear(size, size)
        self.distance_bias = nn.Parameter(0.02 * torch.randn(max_history))
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        gate, *heads = F.silu(self.inputs(self.norms[0](states))).chunk(4, -1)
        value, query, key = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in heads
        )

        # Each position attends to itself and to the positions before it.
        position = torch.arange(states.shape[1], device=states.device)
        distance = position[:, None] - position
        bias = self.distance_bias[distance.clamp(min=0)]
        weights = F.silu(query @ key.transpose(2, 3) + bias) / len(self.distance_bias)
        attended = (weights.masked_fill(distance < 0, 0) @ value).transpose(1, 2).flatten(2)

        output: torch.Tensor = self.output(self.dropout(self.norms[1](attended) * gate))
        return states + output


def refuse_heads(hidden_size: int, num_heads: int) -> None:
    """Raise UsageError unless the heads divide the width."""
    if hidden_size % num_heads:
        raise UsageError(f"--hidden_size {hidden_size} is not divisible by --num_heads {num_heads}")


class LRURec(SequentialModel):
    """LRURec: blocks of a linear recurrent unit and a feed-forward net.

    The sum of each sub-layer and its residual connection is normalised.
    """

    def __init__(
        self, num_items: int, max_history: int, hidden_size: int, num_layers: int, dropout: float
    ):
        super().__init__(num_items, hidden_size, bias=True)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(hidden_size)
        self.blocks = nn.ModuleList(RecurrentBlock(hidden_size, dropout) for _ in range(num_layers))
        for name, parameter in self.named_parameters():
            if "norm" not in name and "recurrence" not in name:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def encode(self, histories: torch.Tensor) -> torch.Tensor:
        """See `SequentialModel.encode`."""
        states: torch.Tensor = self.norm(self.dropout(self.items(histories)))
        for block in self.blocks:
            states = block(states)
        return states


class RecurrentBlock(nn.Module):
    """A linear recurrence and a feed-forward net, both with residual connections.

    The recurrence is h_t = λ ⊙ h_{t−1} + γ ⊙ (W_in x_t) in ℂ^H with H = 2D, and its output is
    x + Re(W_out h). Here λ = exp(−ν + iθ), which starts in the ring 0.8 ≤ |λ| ≤ 0.99, and γ starts
    as √(1 − |λ|²). The complex matrices are kept as real ones, because the input of W_in and the
    output of W_out are real.

    Shape: (B, T, D) → (B, T, D).
    """

    def __init__(self, size: int, dropout: float):
        super().__init__()
        # ln ν, ln θ and ln γ in one parameter, (3, H).
        low, high, (u1, u2) = 0.8, 0.99, torch.rand(2, 2 * size)
        nu = -0.5 * torch.log(u1 * (high**2 - low**2) + low**2)
        gamma = torch.sqrt(1 - torch.exp(-2 * nu))
        self.recurrence = nn.Parameter(torch.stack([nu, 2 * torch.pi * u2, gamma]).log())

        # The real and the imaginary part of each of the H states are neighbours.
        self.input, self.output = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.feed_forward = nn.Sequential(
            nn.Linear(size, 4 * size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * size, size),
            nn.Dropout(dropout),
        )
        self.dropout = nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(2))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        nu, theta, gamma = self.recurrence.float().exp()
        decay = torch.exp(torch.complex(-nu, theta))
        inputs = torch.view_as_complex(self.input(states).float().unflatten(-1, (-1, 2))) * gamma
        hidden = torch.view_as_real(linear_scan(decay, inputs)).flatten(-2)

        states = self.norms[0](states + self.dropout(self.output(hidden.to(states.dtype))))
        output: torch.Tensor = self.norms[1](states + self.feed_forward(states))
        return output
