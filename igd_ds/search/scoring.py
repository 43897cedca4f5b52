"""How a path is scored: the table `DECODING_RULES`, weights of log-probabilities (IGD Eq. 8, 9), penalties and priors.

Letters in shapes: M trie nodes (edge e is its child node e, entry 0 of an array over edges means nothing), E candidate edges.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from igd_ds.errors import UsageError
from igd_ds.items.decisiveness import normalised_gain
from igd_ds.items.trie import TokenTrie

SOFTMAXES = ("full", "masked")
# Training targets that the popularity prior grants every item, so that cold ones keep a share. Assumed: Laplace's rule.
SMOOTHING = 1.0


def per_node(trie, gain: np.ndarray) -> np.ndarray:
    """Min-max over the siblings that training has seen; cold siblings get 0, as do siblings that all gain the same (Eq. 8)."""
    return normalised_gain(trie, gain, cold="zero")


def raw(trie, gain: np.ndarray) -> np.ndarray:
    """Min-max over all siblings. A cold child has the largest gain of all, so α favours cold branches: for comparison only."""
    return normalised_gain(trie, gain, cold="raw")


def reference(trie, gain: np.ndarray) -> np.ndarray:
    """As `per-node` with the published code's 1e-7 in the denominator, which shrinks ĨG where siblings differ by as little."""
    return normalised_gain(trie, gain, cold="zero", epsilon=1e-7)


def pooled(trie, gain: np.ndarray) -> np.ndarray:
    """Gains in nats, NaN on cold edges; the search takes min and max over all children of a step's live beams (Eq. 8)."""
    return np.where(trie.train_count > 0, gain, np.nan)


@dataclass(frozen=True)
class DecodingRule:
    """How ĨG comes about. edge_gain: function(trie, gain (M,) in nats) -> float (M,).

    It returns ĨG in [0, 1], or, where `per_step`, what each step of a search normalises over its own candidates.
    """

    edge_gain: Callable[[TokenTrie, np.ndarray], np.ndarray]
    per_step: bool = False


DECODING_RULES = {
    "per-node": DecodingRule(per_node),
    "raw": DecodingRule(raw),
    "reference": DecodingRule(reference),
    "pooled": DecodingRule(pooled, per_step=True),
}


def edge_weights(trie, gain: np.ndarray, rule: str, alpha: float) -> np.ndarray:
    """Return w_d = 1 − α·ĨG of every trie edge (Eq. 9).

    Args:
        trie: TokenTrie with M nodes; edge e is its child node e, entry 0 is unused.
        gain: information gain per edge in nats, (M,).
        rule: name in DECODING_RULES, of a rule that gives every edge one weight.
        alpha: α in [0, 1]; 0 gives plain beam search (all weights 1).

    Returns:
        float32 (M,), each in [0, 1].

    Raises:
        ValueError: unknown rule, `pooled`, or α outside [0, 1].
    """
    if _rule(rule).per_step:
        raise UsageError(
            f"decoding rule '{rule}' has no weight per edge, it depends on the beams of a step: use 'per-node'"
        )
    _check_alpha(alpha)
    if alpha == 0:
        return np.ones(len(gain), np.float32)
    return (1 - alpha * DECODING_RULES[rule].edge_gain(trie, gain)).astype(np.float32)


def popularity_logshare(trie: TokenTrie) -> np.ndarray:
    """Return log of each child's share of its parent's smoothed training targets, float64 (M,), ≤ 0; 0 at the root.

    ln (n_c + s·items_c) / (n_v + s·items_v), s = SMOOTHING targets per item. Shares of siblings add up to 1 and shares along a
    path multiply to the leaf's share of all targets: a popularity prior over items, split over their tokens.
    """
    mass = trie.train_count + SMOOTHING * trie.num_items
    share = np.zeros(trie.num_nodes)
    share[1:] = np.log(mass[1:] / mass[trie.parent[1:]])
    return share


@dataclass(frozen=True)
class ScoringOptions:
    """What a user chooses about scores; the evaluator's settings of the same names."""

    decoding_rule: str = "per-node"
    """How gains are normalised: a name in DECODING_RULES."""
    alpha: Sequence[float] = (0.0,)
    """Values of α in [0, 1], each once, all decoded from one prefill; 0 is plain beam search (Eq. 9)."""
    length_penalty: float = 0.0
    """p ≥ 0 in S / n^p, n tokens with EOS: 0 as D3, 1 as BIGRec."""
    softmax: str = "full"
    """What log p is normalised over: the "full" vocabulary, or the trie's children alone, "masked" (MSL)."""
    temperature: float = 1.0
    """T > 0 in log softmax(logits / T)."""
    popularity_prior: float = 0.0
    """γ ≥ 0, times `popularity_logshare`, is added to the scores; 0: no prior."""


@dataclass(frozen=True)
class Scoring:
    """All about scores that is the same for every user of a run: S(y_≤t) = S(y_<t) + w_d·log p(y_t) + prior; final S / n^p.

    No increment is positive, so S never rises along a path, whatever the options.
    """

    name: str
    """Name of the decoding rule."""
    gain: torch.Tensor
    """float32 (M,) on the search's device: ĨG in [0, 1]; with `pooled` the gain in nats, NaN on cold edges."""
    pooled: bool
    """ĨG depends on the step's beams: weights come from `pooled_weights`, not from `weights`."""
    alphas: tuple[float, ...]
    """Values of α, each in [0, 1], none twice."""
    length_penalty: float
    """p ≥ 0."""
    masked_softmax: bool
    """log p is over the children of the beam's node in place of the vocabulary."""
    temperature: float
    """T > 0: log p = log softmax(logits / T)."""
    prior: torch.Tensor | None
    """float32 (M,), ≤ 0, in nats: what the popularity prior adds on each edge; None without one."""

    @classmethod
    def build(
        cls, trie: TokenTrie, gain: np.ndarray, options, device: torch.device | str = "cpu"
    ) -> "Scoring":
        """Check the options and lay out what they mean for every edge.

        Args:
            trie: TokenTrie of M nodes (numpy arrays).
            gain: information gain per edge in nats, (M,).
            options: ScoringOptions, or anything with its attributes, such as EvalConfig.
            device: where the search runs.

        Raises:
            ValueError: an option that is unknown or out of its range, by the name of its flag.
        """
        _check_options(options)
        rule = _rule(options.decoding_rule)
        prior = (
            options.popularity_prior * popularity_logshare(trie)
            if options.popularity_prior
            else None
        )
        return cls(
            name=options.decoding_rule,
            gain=_on_device(rule.edge_gain(trie, gain), device),
            pooled=rule.per_step,
            alphas=tuple(float(alpha) for alpha in options.alpha),
            length_penalty=float(options.length_penalty),
            masked_softmax=options.softmax == "masked",
            temperature=options.temperature,
            prior=None if prior is None else _on_device(prior, device),
        )

    def weights(self, alpha: torch.Tensor, child: torch.Tensor) -> torch.Tensor:
        """Return w_d = 1 − α·ĨG in [0, 1] (Eq. 9), float32 (E,), of edges `child` (E,) under `alpha`, float32 (E,)."""
        assert not self.pooled, "pooled weights need the step's beams: pooled_weights"
        return 1 - alpha * self.gain[child]

    def pooled_weights(
        self, alpha: torch.Tensor, child: torch.Tensor, lane: torch.Tensor, num_lanes: int
    ) -> torch.Tensor:
        """Return w_d = 1 − α·ĨG, ĨG min-max normalised over the warm edges of the same lane: rule `pooled`.

        Cold edges weigh 1, and so do all edges of a lane whose gains are equal within fp32 rounding.

        Args:
            alpha: float32 (E,).
            child: int64 (E,), all children of all live beams.
            lane: int64 (E,) in [0, num_lanes): edges of one search, that is of one user and one α, share a lane.
            num_lanes: lanes there are; one may have no edge.

        Returns:
            float32 (E,), each in [0, 1].
        """
        assert self.pooled, f"rule '{self.name}' gives every edge one weight: weights"
        gain = self.gain[child]
        warm = ~gain.isnan()
        low = gain.new_full((num_lanes,), torch.inf).scatter_reduce(
            0, lane, gain.where(warm, torch.inf), "amin"
        )
        high = gain.new_full((num_lanes,), -torch.inf).scatter_reduce(
            0, lane, gain.where(warm, -torch.inf), "amax"
        )
        # As in `normalised_gain`: gains that rounding alone tells apart are equal, or min-max would blow the noise up.
        tolerance = (
            2 * torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs()) + 1e-13
        )
        differ = high - low > tolerance
        normalised = (gain - low[lane]) / (high - low)[lane]
        return 1 - alpha * normalised.where(warm & differ[lane], 0.0)

    def refuse_exact(self) -> None:
        """Raise ValueError, by name, for a rule under which no prefix can be bounded on its own."""
        if self.pooled:
            raise UsageError(
                f"--decoding_rule {self.name} depends on which beams are alive, so an exact search has nothing to prove: "
                f"use --search beam, or a rule per node"
            )


def _on_device(values: np.ndarray, device) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)


def _rule(name: str) -> DecodingRule:
    if name not in DECODING_RULES:
        near = difflib.get_close_matches(name, DECODING_RULES, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise UsageError(
            f"unknown --decoding_rule '{name}': known are {', '.join(DECODING_RULES)}.{hint}"
        )
    return DECODING_RULES[name]


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise UsageError(f"--alpha must lie in [0, 1], found {alpha}")


def _check_options(options) -> None:
    for alpha in options.alpha:
        _check_alpha(alpha)
    if not options.alpha or len(set(options.alpha)) != len(options.alpha):
        raise UsageError(
            f"--alpha needs at least one value and none twice, found {list(options.alpha)}"
        )
    if options.softmax not in SOFTMAXES:
        raise UsageError(f"unknown --softmax '{options.softmax}': known are {', '.join(SOFTMAXES)}")
    if not 0 < options.temperature < np.inf:
        raise UsageError(f"--temperature must be positive and finite, found {options.temperature}")
    for name in ("length_penalty", "popularity_prior"):
        if not 0 <= getattr(options, name) < np.inf:
            raise UsageError(
                f"--{name} must not be negative, and finite, found {getattr(options, name)}"
            )
