"""How a path is scored: weights of log-probabilities (IGD Eq. 8, 9), length penalty and prior.

Letters in shapes: M trie nodes, E candidate edges. An edge is numbered like its child node, so an
array over edges is (M,) and its entry 0 has no meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from igd_ds.config.search import ScoringOptions
from igd_ds.contracts import Likelihood
from igd_ds.errors import UsageError, did_you_mean
from igd_ds.items.decisiveness import normalised_gain
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.trie import TokenTrie

SOFTMAXES = ("auto", "full", "masked")

# Training targets that the popularity prior grants every item, so that cold items keep a share.
# Assumed: Laplace's rule.
SMOOTHING = 1.0


def per_node(trie: TokenTrie, gain: np.ndarray) -> np.ndarray:
    """Return ĨG: min-max over the siblings that have training targets (IGD Eq. 8).

    Cold siblings get 0. Siblings that all gain the same get 0 too.
    """
    return normalised_gain(trie, gain, cold="zero")


def raw(trie: TokenTrie, gain: np.ndarray) -> np.ndarray:
    """Return ĨG: min-max over all siblings.

    A cold child has the largest gain of all, so α favours cold branches. For comparison only.
    """
    return normalised_gain(trie, gain, cold="raw")


def reference(trie: TokenTrie, gain: np.ndarray) -> np.ndarray:
    """Return ĨG as `per_node`, with the published code's 1e-7 in the denominator.

    It shrinks ĨG where siblings differ by as little as 1e-7.
    """
    return normalised_gain(trie, gain, cold="zero", epsilon=1e-7)


def pooled(trie: TokenTrie, gain: np.ndarray) -> np.ndarray:
    """Return the gains themselves, NaN on cold edges.

    The search then takes min and max over all children of a step's live hypotheses (IGD Eq. 8).
    """
    return np.where(trie.train_count > 0, gain, np.nan)


@dataclass(frozen=True)
class DecodingRule:
    """How the normalised gain ĨG of an edge is computed."""

    edge_gain: Callable[[TokenTrie, np.ndarray], np.ndarray]
    """Function (trie, gain (M,)) → float (M,): ĨG in [0, 1], or, if `per_step`, gains that each
    step of a search normalises over its own candidates."""
    per_step: bool = False
    """Whether ĨG depends on the step's candidates."""


DECODING_RULES = {
    "per-node": DecodingRule(per_node),
    "raw": DecodingRule(raw),
    "reference": DecodingRule(reference),
    "pooled": DecodingRule(pooled, per_step=True),
}


def edge_weights(trie: TokenTrie, gain: np.ndarray, rule: str, alpha: float) -> np.ndarray:
    """Return w_d = 1 − α·ĨG of every trie edge, float32 (M,) in [0, 1] (IGD Eq. 9).

    Args:
        trie: the catalogue's trie, M nodes.
        gain: a measure of decisiveness per edge, (M,).
        rule: a name in DECODING_RULES, of a rule that gives every edge one weight.
        alpha: α in [0, 1]; 0 gives plain beam search (all weights are 1).

    Raises:
        UsageError: an unknown rule, `pooled`, or an α outside [0, 1].

    Example:
        >>> weights = edge_weights(stored.trie, stored.gain, "per-node", alpha=0.2)
    """
    if _rule(rule).per_step:
        raise UsageError(
            f"decoding rule '{rule}' has no weight per edge, it depends on the hypotheses of a "
            "step: use 'per-node'"
        )
    ScoringOptions(alpha=(alpha,)).check()
    if alpha == 0:
        return np.ones(len(gain), np.float32)
    return (1 - alpha * DECODING_RULES[rule].edge_gain(trie, gain)).astype(np.float32)


def popularity_logshare(trie: TokenTrie) -> np.ndarray:
    """Return the log of each child's share of its parent's smoothed training targets.

    ln (n_c + s·items_c) / (n_v + s·items_v), with s = SMOOTHING targets per item. The shares of
    siblings add up to 1. The shares along a path multiply to the leaf's share of all targets: this
    is a popularity prior over items, split over their tokens.

    Returns:
        float64 (M,), at most 0; 0 at the root.
    """
    mass = trie.train_count + SMOOTHING * trie.num_items
    share = np.zeros(trie.num_nodes)
    share[1:] = np.log(mass[1:] / mass[trie.parent[1:]])
    return share


@dataclass(frozen=True)
class Scoring:
    """The part of a path's score that is the same for all users of an evaluation.

    S(y_≤t) = S(y_<t) + w_d·log p(y_t) + prior. The final score is S / n^p for n tokens with EOS. No
    increment is positive, so S never rises along a path, whatever the options.
    """

    name: str
    """Name of the decoding rule."""
    gain: np.ndarray
    """float32 (M,): ĨG in [0, 1]. With `pooled` it is the gain itself, NaN on cold edges."""
    pooled: bool
    """Whether ĨG depends on the step's hypotheses: weights come from `pooled_weights`, not from
    `weights`."""
    alphas: tuple[float, ...]
    """Values of α, each in [0, 1] and given once."""
    length_penalty: float
    """p ≥ 0."""
    masked_softmax: bool
    """Whether log p is normalised over the children of the hypothesis' node instead of the
    vocabulary."""
    renormalise: bool
    """Whether the masked softmax leaves out children that an item filter leaves out. The
    probabilities of a user's allowed items then add up to 1; else those of all items do."""
    temperature: float
    """T > 0: log p = log softmax(logits / T)."""
    prior: np.ndarray | None
    """float32 (M,), at most 0, in nats: what the popularity prior adds on each edge, or None."""

    @classmethod
    def build(
        cls,
        trie: TokenTrie,
        gain: np.ndarray,
        options: ScoringOptions,
        likelihood: Likelihood = Likelihood(),  # noqa: B008
    ) -> Scoring:
        """Check the options and compute what they mean for every edge.

        Args:
            trie: the catalogue's trie, M nodes.
            gain: a measure of decisiveness per edge, (M,).
            options: what the user asks for.
            likelihood: how the model was trained; the softmax "auto" and the temperature None take
                their values from it.

        Raises:
            UsageError: an option that is unknown or out of its range.

        Example:
            >>> options = ScoringOptions(alpha=(0.0, 0.2))
            >>> scoring = Scoring.build(stored.trie, stored.gain, options)
        """
        options.check()
        rule = _rule(options.decoding_rule)
        if options.softmax not in SOFTMAXES:
            raise UsageError(
                f"unknown --softmax '{options.softmax}'{did_you_mean(options.softmax, SOFTMAXES)} "
                f"(known: {', '.join(SOFTMAXES)})"
            )
        asked = likelihood.with_asked(options.softmax, options.temperature)

        prior = None
        if options.popularity_prior:
            prior = (options.popularity_prior * popularity_logshare(trie)).astype(np.float32)

        return cls(
            name=options.decoding_rule,
            gain=rule.edge_gain(trie, gain).astype(np.float32),
            pooled=rule.per_step,
            alphas=tuple(float(alpha) for alpha in options.alpha),
            length_penalty=float(options.length_penalty),
            masked_softmax=asked.softmax == "masked",
            renormalise=options.renormalise,
            temperature=float(asked.temperature),
            prior=prior,
        )

    @property
    def is_probability(self) -> bool:
        """Whether a score is the log of an item's probability, so that those of all items sum to 1.

        That takes the masked softmax and nothing that weighs or adds: α = 0, no length penalty, no
        prior. (With guidance a score is no probability either.)
        """
        plain = self.alphas == (0.0,) and self.length_penalty == 0 and self.prior is None
        return self.masked_softmax and plain

    def method(self, asked: str, guided: bool = False) -> str:
        """Return the search that is asked for; "auto": exact where scores are probabilities.

        Args:
            asked: "auto", or a method of `igd_ds.search.engine`.
            guided: whether guidance adds to the scores.
        """
        if asked != "auto":
            return asked
        return "exact" if self.is_probability and not guided else "beam"

    def output_tokens(self, trie: SearchTrie) -> np.ndarray | None:
        """Return the tokens whose logits a search needs, int64 ascending; None: all tokens."""
        if not self.masked_softmax:
            return None
        return np.unique(trie.token.numpy()[1:]).astype(np.int64)

    def weights(self, alpha: np.ndarray, child: np.ndarray) -> np.ndarray:
        """Return w_d = 1 − α·ĨG in [0, 1], float32 (E,) (IGD Eq. 9).

        Args:
            alpha: float32 (E,).
            child: int64 (E,), the edges' child nodes.
        """
        assert not self.pooled, "pooled weights depend on the step's hypotheses: pooled_weights"
        weights: np.ndarray = 1 - alpha * self.gain[child]
        return weights

    def pooled_weights(
        self, alpha: np.ndarray, child: np.ndarray, pair: np.ndarray, num_pairs: int
    ) -> np.ndarray:
        """Return w_d = 1 − α·ĨG with ĨG min-max normalised over each pair's warm edges.

        A pair is one user at one α. Cold edges weigh 1. So do all edges of a pair whose gains are
        equal within fp32 rounding.

        Args:
            alpha: float32 (E,).
            child: int64 (E,), all children of all live hypotheses.
            pair: int64 (E,) in [0, num_pairs), the pair to which each edge belongs.
            num_pairs: how many pairs there are; a pair may have no edge.

        Returns:
            float32 (E,), each in [0, 1].
        """
        assert self.pooled, f"rule '{self.name}' gives every edge one weight: weights"
        gain = self.gain[child]
        warm = ~np.isnan(gain)

        low = np.full(num_pairs, np.inf, np.float32)
        np.minimum.at(low, pair[warm], gain[warm])
        high = np.full(num_pairs, -np.inf, np.float32)
        np.maximum.at(high, pair[warm], gain[warm])

        # Gains that differ by rounding alone count as equal, as in `normalised_gain`. Otherwise
        # min-max would scale rounding noise up to the full range.
        largest = np.maximum(abs(low), abs(high))
        tolerance = 2 * np.finfo(np.float32).eps * largest + np.float32(1e-13)
        width = high - low
        decisive = warm & (width > tolerance)[pair]

        weights = np.ones_like(gain)
        owner = pair[decisive]
        normalised = (gain[decisive] - low[owner]) / width[owner]
        weights[decisive] -= alpha[decisive] * normalised
        return weights

    def refuse_exact(self, remedy: str = "use --search beam, or a rule per node") -> None:
        """Raise UsageError if the decoding rule gives an unfinished path no bound of its own."""
        if self.pooled:
            raise UsageError(
                f"--decoding_rule {self.name} depends on which beams are alive, so an exact search "
                f"has no bounds with which to prove anything: {remedy}"
            )


def _rule(name: str) -> DecodingRule:
    if name not in DECODING_RULES:
        hint, known = did_you_mean(name, DECODING_RULES), ", ".join(DECODING_RULES)
        raise UsageError(f"unknown --decoding_rule '{name}'{hint} (known: {known})")
    return DECODING_RULES[name]
