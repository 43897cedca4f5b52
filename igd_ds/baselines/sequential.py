"""Sequential recommenders that score item ids: GRU4Rec, SASRec, LRURec, and two that only count.

Letters: B sequences, T items of a sequence, D width, H recurrent width, N items, n positions to predict from, C candidate items.
Histories are right-padded with any item: all models here are causal, so no position sees what stands behind it.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from igd_ds.errors import UsageError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class SequentialModel(nn.Module, ABC):
    """An encoder of item sequences whose states score items: state · item embedding, and a bias where the paper has one."""

    def __init__(self, num_items: int, hidden_size: int, bias: bool):
        super().__init__()
        self.items = nn.Embedding(num_items, hidden_size)
        self.bias = nn.Parameter(torch.zeros(num_items)) if bias else None

    @abstractmethod
    def encode(self, histories: torch.Tensor) -> torch.Tensor:
        """Return the state after each item, (B, T, D), from histories (B, T) int64."""

    def forward(
        self, histories: torch.Tensor, places: torch.Tensor, candidates: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the scores (n, N), or (n, C) of the candidates (C,), at `places` (n,) of the flattened (B·T) histories."""
        states = self.encode(histories).flatten(0, 1)[places]
        if candidates is None:
            return F.linear(states, self.items.weight, self.bias)
        return F.linear(
            states, self.items(candidates), None if self.bias is None else self.bias[candidates]
        )

    @torch.no_grad()
    def log_probabilities(self, histories: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of all items, float32 (n, N): the softmax of the scores, in nats."""
        return self(histories, places).float().log_softmax(1)

    def save_pretrained(self, folder: Path, state_dict: dict | None = None) -> None:
        """Write the weights to a new folder; `state_dict` stands in where this process holds only parts (ZeRO-3)."""
        save_tensors(folder, self.state_dict() if state_dict is None else state_dict)


class GRU4Rec(SequentialModel):
    """Hidasi et al., ICLR 2016 and CIKM 2018: a GRU over item embeddings that are the output weights too (`constrained`)."""

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
            nn.init.xavier_uniform_(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)

    def encode(self, histories: torch.Tensor) -> torch.Tensor:
        """See SequentialModel."""
        return self.dropout(self.gru(self.dropout(self.items(histories)))[0])


class SASRec(SequentialModel):
    """Kang and McAuley, ICDM 2018: blocks of causal self-attention and a point-wise feed-forward net, each normalised before.

    Positions count from a history's oldest item on, so that a row's scores do not depend on the rows it is trained with.
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
        if hidden_size % num_heads:
            raise UsageError(
                f"--hidden_size {hidden_size} is not divisible by --num_heads {num_heads}"
            )
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
        """See SequentialModel."""
        places = torch.arange(histories.shape[1], device=histories.device)
        states = self.dropout(
            self.items(histories) * self.items.embedding_dim**0.5 + self.positions(places)
        )
        for block in self.blocks:
            states = block(states)
        return self.norm(states)


class AttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)) (SASRec, Section III-B); (B, T, D) → (B, T, D)."""

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


class LRURec(SequentialModel):
    """Yue et al., WSDM 2024: blocks of a linear recurrent unit and a feed-forward net, each normalised behind its residual."""

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
        """See SequentialModel."""
        states = self.norm(self.dropout(self.items(histories)))
        for block in self.blocks:
            states = block(states)
        return states


class RecurrentBlock(nn.Module):
    """h_t = λ ⊙ h_{t−1} + γ ⊙ (W_in x_t) in ℂ^H, H = 2D; x + Re(W_out h), then a feed-forward net; (B, T, D) → (B, T, D).

    λ = exp(−ν + iθ), initially in the ring 0.8 ≤ |λ| ≤ 0.99; γ = √(1 − |λ|²) at first. The complex matrices are kept as real
    ones: their input and output are real.
    """

    def __init__(self, size: int, dropout: float):
        super().__init__()
        low, high, (u1, u2) = 0.8, 0.99, torch.rand(2, 2 * size)
        nu = -0.5 * torch.log(u1 * (high**2 - low**2) + low**2)
        gamma = torch.sqrt(1 - torch.exp(-2 * nu))
        self.recurrence = nn.Parameter(
            torch.stack([nu, 2 * torch.pi * u2, gamma]).log()
        )  # ln ν, ln θ, ln γ: (3, H)
        self.input, self.output = (
            nn.Linear(size, 4 * size),
            nn.Linear(4 * size, size),
        )  # real and imaginary parts of H
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
        inputs = torch.view_as_complex(self.input(states).float().unflatten(-1, (-1, 2))) * gamma
        hidden = torch.view_as_real(
            linear_scan(torch.exp(torch.complex(-nu, theta)), inputs)
        ).flatten(-2)
        states = self.norms[0](states + self.dropout(self.output(hidden.to(states.dtype))))
        return self.norms[1](states + self.feed_forward(states))


class LinearScan(torch.autograd.Function):
    """h_t = decay ⊙ h_{t−1} + inputs_t, h_{−1} = 0; its gradient is the same recurrence backwards in time."""

    @staticmethod
    def forward(ctx, decay: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Return h; see linear_scan."""
        states = scan_in_place(decay, inputs.clone(memory_format=torch.contiguous_format))
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of decay and inputs."""
        decay, states = ctx.saved_tensors
        of_inputs = scan_in_place(decay.conj().resolve_conj(), gradient.flip(1)).flip(1)
        return (of_inputs[:, 1:] * states[:, :-1].conj()).sum((0, 1)), of_inputs


def linear_scan(decay: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return h with h_t = decay ⊙ h_{t−1} + inputs_t, h_{−1} = 0: `decay` (H,), `inputs` and h (B, T, H), real or complex."""
    return LinearScan.apply(decay, inputs)


def scan_in_place(decay: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Turn inputs into states in 2·log₂ T passes over 2·T places in all (Brent and Kung's prefix scan).

    Up: behind the pass with step s each place 2s, 4s, … (from 1) holds what its last 2s inputs come to. Down: blocks half as long
    get what lies before them, until every place has all of it.
    """
    length, powers, step = states.shape[1], [], 1
    while step < length:
        powers.append((step, decay))
        decay, step = decay * decay, 2 * step
    for step, power in powers:
        states[:, 2 * step - 1 :: 2 * step].addcmul_(
            states[:, step - 1 : length - step : 2 * step], power
        )
    for step, power in reversed(powers):
        states[:, 3 * step - 1 :: 2 * step].addcmul_(
            states[:, 2 * step - 1 : length - step : 2 * step], power
        )
    return states


class Popularity(nn.Module):
    """The items' shares of the training targets, float64 `probability` (N,).

    One more observation is spread over all items, in parts made a little unequal at random (seeded): no item has probability 0,
    and ties are in random order. Item ids may follow time or popularity.
    """

    def __init__(self, probability: torch.Tensor):
        super().__init__()
        self.register_buffer("probability", probability)

    @classmethod
    def count(
        cls, last: np.ndarray, targets: np.ndarray, num_items: int, seed: int
    ) -> "Popularity":
        """Count the training rows' `targets` (R,)."""
        parts = np.random.default_rng(seed).uniform(0.9, 1.1, num_items)
        count = np.bincount(targets, minlength=num_items) + parts / parts.sum()
        return cls(torch.from_numpy(count / count.sum()))

    def log_probabilities(self, histories: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of all items, float64 (n, N), in nats; see SequentialModel."""
        return self.probability.log().expand(len(places), -1)

    def save_pretrained(self, folder: Path) -> None:
        """Write the counts to a new folder."""
        save_tensors(folder, self.state_dict())


class LastItemKNN(Popularity):
    """How often each item came next after the user's last one; popularity counts as one more observation, and decides ties.

    Item i was followed by next_items[begins[i] : begins[i+1]], times[…] each: int64 (N+1,), (E,), (E,).
    """

    def __init__(
        self,
        probability: torch.Tensor,
        begins: torch.Tensor,
        next_items: torch.Tensor,
        times: torch.Tensor,
    ):
        super().__init__(probability)
        for name, buffer in (("begins", begins), ("next_items", next_items), ("times", times)):
            self.register_buffer(name, buffer)

    @classmethod
    def count(
        cls, last: np.ndarray, targets: np.ndarray, num_items: int, seed: int
    ) -> "LastItemKNN":
        """Count the training rows' `targets` (R,) behind the `last` items (R,) of their histories."""
        probability = Popularity.count(last, targets, num_items, seed).probability
        pairs, times = np.unique(last.astype(np.int64) * num_items + targets, return_counts=True)
        begins = np.searchsorted(pairs, np.arange(num_items + 1) * num_items)
        return cls(probability, *map(torch.from_numpy, (begins, pairs % num_items, times)))

    def log_probabilities(self, histories: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """See Popularity; only the last item of a history matters."""
        counts = self.probability.repeat(len(places), 1)
        for row, item in zip(counts, histories.flatten()[places], strict=True):
            followers = slice(self.begins[item], self.begins[item + 1])
            row[self.next_items[followers]] += self.times[followers]
        return (counts / counts.sum(1, keepdim=True)).log()


COUNTED = {"popularity": Popularity, "last-item-knn": LastItemKNN}


@dataclass(frozen=True)
class Preset:
    """A model and its paper's settings, by their names in BaselineConfig."""

    model: Callable[..., SequentialModel]
    form: dict
    training: dict


# GRU4Rec: the published code's defaults, hidasib/GRU4Rec; its learning rate is Adagrad's, 1e-3 is assumed for AdamW. SASRec:
# Section IV; dropout 0.5 is for its sparse datasets, 0.2 for ML-1M. LRURec: the published code, yueqirex/LRURec.
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
}


@dataclass(frozen=True)
class Negatives:
    """Draws items that were not the next one, from torch's global random numbers.

    `weights` float32 (N,): a `shared` negative is drawn with probability ∝ its weight; 0: never.
    """

    weights: torch.Tensor
    number: int

    def shared(self) -> torch.Tensor:
        """Return `number` different items for a whole micro-batch, int64."""
        return torch.multinomial(self.weights, self.number)

    def other_than(self, targets: torch.Tensor) -> torch.Tensor:
        """Return for each target (n,) items that it is not, uniformly drawn: int64 (n, number)."""
        shape = (len(targets), self.number)
        drawn = torch.randint(len(self.weights) - 1, shape, device=targets.device)
        return drawn + (drawn >= targets[:, None])


Score = Callable[
    [torch.Tensor | None], torch.Tensor
]  # candidates (C,), None: all items → their scores (n, C)


def cross_entropy(score: Score, targets: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """Return −log p(target) in nats over the whole catalogue, float32 (n,)."""
    return F.cross_entropy(score(None).float(), targets, reduction="none")


def bce(score: Score, targets: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """Return −log σ(target) − mean over its negatives of log(1 − σ(negative)), float32 (n,) (SASRec, Eq. 7).

    There no item of the user is a negative; here only the target is none.
    """
    items = torch.cat([targets[:, None], negatives.other_than(targets)], 1)
    candidates, place = torch.unique(items, return_inverse=True)
    scores = score(candidates).float().gather(1, place)
    return F.softplus(-scores[:, 0]) + F.softplus(scores[:, 1:]).mean(1)


def bpr_max(score: Score, targets: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """Return −log Σ_j s_j σ(target − j) + Σ_j s_j j², s the softmax over negatives j, float32 (n,) (GRU4Rec, CIKM 2018, 3.3).

    Negatives are the micro-batch's other targets and the shared ones; the scores pass through ELU. Weight 1 of the second term,
    ELU and 1e-24 are the published code's.
    """
    candidates, place = torch.unique(torch.cat([targets, negatives.shared()]), return_inverse=True)
    scores = F.elu(score(candidates).float())
    place = place[: len(targets), None]
    share = scores.scatter(1, place, -torch.inf).softmax(1)
    ahead = torch.sigmoid(scores.gather(1, place) - scores)
    return (share * scores**2).sum(1) - torch.log((share * ahead).sum(1) + 1e-24)


@dataclass(frozen=True)
class Loss:
    """A loss of n targets, and how many negatives it takes unless told; 0: none."""

    function: Callable[[Score, torch.Tensor, Negatives], torch.Tensor]
    num_negatives: int


LOSSES = {
    "cross-entropy": Loss(cross_entropy, 0),
    "bce": Loss(bce, 1),
    "bpr-max": Loss(bpr_max, 2048),
}


def save_tensors(folder: Path, tensors: dict) -> None:
    """Write tensors to a folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
        folder / WEIGHTS_FILE,
    )


def load_model(folder: str | Path) -> nn.Module:
    """Load what baseline.py saved, for inference: a model with `log_probabilities`.

    Raises:
        ValueError: no such model in the folder.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise UsageError(f"no sequential recommender in {folder}: {CONFIG_FILE} is missing")
    description, tensors = (
        json.loads((folder / CONFIG_FILE).read_text()),
        load_file(folder / WEIGHTS_FILE),
    )
    if description["recommender"] in COUNTED:
        return COUNTED[description["recommender"]](**tensors)
    model = SEQUENTIAL[description["recommender"]].model(**description["form"])
    model.load_state_dict(tensors)
    return model.eval()
