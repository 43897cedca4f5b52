"""Recommenders that score item ids: GRU4Rec, SASRec, LRURec and HSTU are trained, two others count.

Letters in shapes: B sequences, T items of a sequence, D width, H recurrent width, N items, n
positions to predict from, C candidate items.

Histories are right-padded with any item. All models here are causal, so no position sees a later
one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from igd_ds.errors import UsageError
from igd_ds.folders import read_json_object

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


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

    The input of each sub-layer is normalised. Positions count from the oldest item of a history on,
    so that a row's scores do not depend on the rows that it is trained with.
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
    """x + attention(norm(x)), then x + feed-forward(norm(x)) (SASRec, Section III-B).

    Shape: (B, T, D) → (B, T, D).
    """

    def __init__(self, size: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.rate = num_heads, dropout
        self.norms = nn.ModuleList(nn.LayerNorm(size, eps=1e-8) for _ in range(2))
        self.inputs, self.output = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.feed_forward = nn.Sequential(
            nn.Linear(size, size),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(size, size),
            nn.Dropout(dropout),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        heads = self.inputs(self.norms[0](states)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)

        states = states + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        return states + self.feed_forward(self.norms[1](states))


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


class Popularity(nn.Module):
    """Ranks items by their shares of the training targets, whatever the history is.

    One more observation is spread over all items, in parts that differ slightly at random (seeded).
    So no item has probability 0, and ties are broken in random order. The order of the item ids
    would not do, because it may follow time or popularity.

    Attributes:
        probability: float64 (N,).
    """

    probability: torch.Tensor

    def __init__(self, probability: torch.Tensor):
        super().__init__()
        self.register_buffer("probability", probability)

    @classmethod
    def count(cls, last: np.ndarray, targets: np.ndarray, num_items: int, seed: int) -> Popularity:
        """Count the targets (R,) of the training rows.

        Args:
            last: the last item of each row's history, (R,); popularity ignores it.
            targets: the rows' targets, (R,).
            num_items: N.
            seed: seed of the random parts.
        """
        parts = np.random.default_rng(seed).uniform(0.9, 1.1, num_items)
        count = np.bincount(targets, minlength=num_items) + parts / parts.sum()
        return cls(torch.from_numpy(count / count.sum()))

    def log_probabilities(self, histories: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of all items, float64 (n, N), in nats.

        The arguments are those of `SequentialModel.log_probabilities`.
        """
        return self.probability.log().expand(len(positions), -1)

    def save_pretrained(self, folder: Path) -> None:
        """Write the counts to a new folder."""
        save_tensors(folder, self.state_dict())


class LastItemKNN(Popularity):
    """Ranks items by how often they came next after the last item of the user's history.

    The shares of `Popularity` are added as one more observation, which breaks ties.

    Attributes:
        begins, next_items, times: int64 (N+1,), (E,), (E,). Item i was followed by the items
            next_items[begins[i] : begins[i+1]]; `times` holds how often.
    """

    begins: torch.Tensor
    next_items: torch.Tensor
    times: torch.Tensor

    def __init__(
        self,
        probability: torch.Tensor,
        begins: torch.Tensor,
        next_items: torch.Tensor,
        times: torch.Tensor,
    ):
        super().__init__(probability)
        self.register_buffer("begins", begins)
        self.register_buffer("next_items", next_items)
        self.register_buffer("times", times)

    @classmethod
    def count(cls, last: np.ndarray, targets: np.ndarray, num_items: int, seed: int) -> LastItemKNN:
        """Count the targets (R,) that follow the last items (R,) of the training histories."""
        probability = Popularity.count(last, targets, num_items, seed).probability
        pairs, times = np.unique(last.astype(np.int64) * num_items + targets, return_counts=True)
        begins = np.searchsorted(pairs, np.arange(num_items + 1) * num_items)
        return cls(
            probability,
            torch.from_numpy(begins),
            torch.from_numpy(pairs % num_items),
            torch.from_numpy(times),
        )

    def log_probabilities(self, histories: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See `Popularity.log_probabilities`; only the last item of a history matters."""
        counts = self.probability.repeat(len(positions), 1)
        for row, item in zip(counts, histories.flatten()[positions], strict=True):
            followers = slice(int(self.begins[item]), int(self.begins[item + 1]))
            row[self.next_items[followers]] += self.times[followers]
        return (counts / counts.sum(1, keepdim=True)).log()


COUNTED: dict[str, type[Popularity]] = {"popularity": Popularity, "last-item-knn": LastItemKNN}
"""Recommenders that count and are not trained."""


@dataclass(frozen=True)
class Preset:
    """A model and the settings of its paper, by their names in BaselineConfig."""

    model: Callable[..., SequentialModel]
    form: Mapping[str, Any]
    """Arguments of the model besides `num_items` and `max_history`."""
    training: Mapping[str, Any]


# GRU4Rec: the defaults of the published code, hidasib/GRU4Rec; its learning rate is that of
# Adagrad, and 1e-3 is assumed for AdamW. SASRec: Section IV; dropout 0.5 is for its sparse
# datasets, and 0.2 for ML-1M. LRURec: the published code, yueqirex/LRURec. HSTU: the published code
# for ML-1M, facebookresearch/generative-recommenders, with 2 blocks as SASRec.
SEQUENTIAL = {
    "gru4rec": Preset(
        GRU4Rec,
        {"hidden_size": 100, "num_layers": 1, "dropout": 0.0},
        {"global_batch_size": 32, "learning_rate": 1e-3, "weight_decay": 0.0},
    ),
    "sasrec": Preset(
        SASRec,
        {"hidden_size": 50, "num_layers": 2, "num_heads": 1, "dropout": 0.5},
        {"global_batch_size": 128, "learning_rate": 1e-3, "weight_decay": 0.0},
    ),
    "lrurec": Preset(
        LRURec,
        {"hidden_size": 64, "num_layers": 2, "dropout": 0.2},
        {"global_batch_size": 128, "learning_rate": 1e-3, "weight_decay": 0.01},
    ),
    "hstu": Preset(
        HSTU,
        {"hidden_size": 50, "num_layers": 2, "num_heads": 1, "dropout": 0.2},
        {"global_batch_size": 128, "learning_rate": 1e-3, "weight_decay": 0.0},
    ),
}
"""Recommenders that are trained. A new one is a class and an entry here."""


@dataclass(frozen=True)
class Negatives:
    """Draws negative items with torch's global random generator."""

    weights: torch.Tensor
    """float32 (N,): a shared negative is drawn with a probability proportional to its weight."""
    number: int
    """How many are drawn for a micro-batch (`shared`) or for each target (`other_than`)."""

    def shared(self) -> torch.Tensor:
        """Return `number` different items for a whole micro-batch, int64 (number,)."""
        return torch.multinomial(self.weights, self.number)

    def other_than(self, targets: torch.Tensor) -> torch.Tensor:
        """Return `number` uniformly drawn other items per target (n,), int64 (n, number)."""
        shape = (len(targets), self.number)
        drawn = torch.randint(len(self.weights) - 1, shape, device=targets.device)
        return drawn + (drawn >= targets[:, None])


Score = Callable[[torch.Tensor | None], torch.Tensor]
"""Takes candidates (C,), or None for all items, and returns their scores (n, C)."""


def cross_entropy(score: Score, targets: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """Return −log p(target) over the whole catalogue, in nats, float32 (n,)."""
    return F.cross_entropy(score(None).float(), targets, reduction="none")


def bce(score: Score, targets: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """Return −log σ(target) − mean over negatives of log(1 − σ(negative)), float32 (n,).

    This is SASRec, Eq. 7. The paper excludes all of a user's items from the negatives; here
    only the target is excluded.
    """
    items = torch.cat([targets[:, None], negatives.other_than(targets)], 1)
    candidates, column = torch.unique(items, return_inverse=True)
    scores = score(candidates).float().gather(1, column)
    return F.softplus(-scores[:, 0]) + F.softplus(scores[:, 1:]).mean(1)


def bpr_max(score: Score, targets: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """Return −log Σ_j s_j σ(target − j) + Σ_j s_j j², float32 (n,) (GRU4Rec, CIKM 2018, 3.3).

    s is the softmax over the negatives j. These are the other targets of the micro-batch and the
    shared negatives. Scores pass through ELU. The ELU, the weight 1 of the second term and the
    constant 1e-24 are those of the published code.
    """
    items = torch.cat([targets, negatives.shared()])
    candidates, column = torch.unique(items, return_inverse=True)
    scores = F.elu(score(candidates).float())
    column = column[: len(targets), None]
    share = scores.scatter(1, column, -torch.inf).softmax(1)
    ahead = torch.sigmoid(scores.gather(1, column) - scores)
    return (share * scores**2).sum(1) - torch.log((share * ahead).sum(1) + 1e-24)


@dataclass(frozen=True)
class Loss:
    """A loss over n targets, and its default number of negatives."""

    function: Callable[[Score, torch.Tensor, Negatives], torch.Tensor]
    """Takes scores, targets (n,) and negatives, and returns float32 (n,)."""
    num_negatives: int
    """Default number of negatives; 0 if the loss takes none."""


LOSSES = {
    "cross-entropy": Loss(cross_entropy, 0),
    "bce": Loss(bce, 1),
    "bpr-max": Loss(bpr_max, 2048),
}
"""A new loss is a function and a line here."""


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(on_cpu, folder / WEIGHTS_FILE)


def is_baseline(folder: str | Path) -> bool:
    """Whether a folder holds a model that `igd baseline` saved."""
    path = Path(folder) / CONFIG_FILE
    return path.is_file() and "recommender" in read_json_object(path, "restore it, or train again")


def read_description(folder: str | Path) -> dict[str, Any]:
    """Return what `igd baseline` wrote beside a model's weights.

    Raises:
        UsageError: there is no such model in the folder.
    """
    if not is_baseline(folder):
        raise UsageError(f"no sequential recommender in {folder}: {CONFIG_FILE} does not name one")
    return read_json_object(Path(folder) / CONFIG_FILE, "restore it, or train again")


def load_model(folder: str | Path) -> SequentialModel | Popularity:
    """Load a model that `igd baseline` saved, for inference with `log_probabilities`.

    Raises:
        UsageError: there is no such model in the folder.
    """
    description = read_description(folder)
    tensors = load_file(Path(folder) / WEIGHTS_FILE)

    if description["recommender"] in COUNTED:
        return COUNTED[description["recommender"]](**tensors)
    model = SEQUENTIAL[description["recommender"]].model(**description["form"])
    model.load_state_dict(tensors)
    return model.eval()
