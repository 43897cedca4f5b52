"""How decisive a token is: entropies, information gain and other measures of a trie's edges.

Papers: IGD 3.1 (entropy and information gain), MTC 1 (purity gain, filtering ratio).

Letters in shapes: M nodes. An array over edges is indexed by the edge's child node, and its entry 0
is 0. Notation in the docstrings: an edge leads from prefix v to its child c; n_v and n_c are their
training counts, P = n_c / n_v, and p(i|v) = n_i / n_v is the share of leaf i under v (0 if v has no
training target). An edge is cold if n_c = 0. Logarithms are natural, so entropies and gains are in
nats.

All measures are computed in fp64 and summed from the leaves upwards, level by level, over terms
that are not negative. So nothing cancels, and siblings with the same counts in another order agree
to about 1e-15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import DTypeLike

from igd_ds.errors import UsageError, did_you_mean
from igd_ds.items.trie import TokenTrie

ENTROPIES = ("prior", "conditional")
COLD_EDGES = ("zero", "raw")
INFORMATION_GAIN = "information-gain"


def entropy(trie: TokenTrie, name: str = "prior") -> np.ndarray:
    """Return the entropy of the item given each prefix, float64 (M,), in nats (IGD Eq. 4).

    Items that share a leaf count as one item: no token can tell them apart.

    Args:
        trie: the catalogue's trie.
        name: "prior" is H(v) = −Σ p(i) ln p(i) over the leaves i under v with p(i) = n_i / n_root,
            which is NOT renormalised under v. This is Eq. 4 read literally and what the authors'
            code computes. "conditional" is the Shannon entropy of p(i|v), and 0 if v has no
            training target.

    Raises:
        UsageError: unknown `name`.
    """
    values = np.empty(trie.num_nodes)
    for begin, end, level in _entropy_levels(trie, name):
        values[begin:end] = level
    return values


def information_gain(
    trie: TokenTrie, name: str = "prior", dtype: DTypeLike = np.float64
) -> np.ndarray:
    """Return IG(c; v) = H(v) − H(c) per edge, (M,), in nats (IGD Eq. 5).

    The gain is exactly 0.0 on the edges of `zero_gain`. With the entropy "prior" no gain is
    negative. With "conditional" a token can raise the entropy; its negative gain is kept. A cold
    edge gains all of H(v).

    Args:
        trie: the catalogue's trie.
        name: the entropy, a name in ENTROPIES.
        dtype: the type in which the result is stored; it is computed in fp64 in any case.

    Raises:
        UsageError: unknown `name`.
    """
    gain = np.zeros(trie.num_nodes, dtype)
    below = np.empty(0)
    for begin, end, level in _entropy_levels(trie, name):
        edges = slice(end, end + len(below))
        parent = trie.parent[edges]
        zero = trie.train_count[edges] == trie.train_count[parent]
        gain[edges] = np.where(zero, 0.0, level[parent - begin] - below)
        below = level
    return gain


def zero_gain(trie: TokenTrie) -> np.ndarray:
    """Return bool (M,): whether the token rules out no training target, n_c = n_v (entry 0 False).

    The flag is decided on integers, never on a difference of floats. An only child always has zero
    gain. So has a token whose siblings are all cold.
    """
    zero = np.zeros(trie.num_nodes, bool)
    for edges, _, parent in _edge_levels(trie):
        zero[edges] = trie.train_count[edges] == trie.train_count[parent]
    return zero


def gain_deciles(trie: TokenTrie, gain: np.ndarray) -> np.ndarray:
    """Return the borders of the deciles of the gains of training-target tokens without zero gain.

    Border j is the smallest gain that at least j + 1 tenths of these tokens do not exceed. A gain
    equal to border j belongs to decile j; gains above the last border belong to decile 9. An edge
    counts once per training target under it.

    Args:
        trie: the catalogue's trie.
        gain: a measure per edge, (M,).

    Returns:
        (9,) of `gain`'s type and unit, ascending. Empty if every token has zero gain.
    """
    edges = np.flatnonzero(~zero_gain(trie) & (trie.train_count > 0))[1:]  # without the root
    edges = edges[np.argsort(gain[edges], kind="stable")]
    reached = np.cumsum(trie.train_count[edges], dtype=np.int64)

    # In integers, so that a border never depends on rounding.
    tenths = np.outer(np.arange(1, 10), reached[-1:]).ravel()
    return gain[edges[np.searchsorted(10 * reached, tenths)]]


def normalised_gain(
    trie: TokenTrie, gain: np.ndarray, cold: str = "zero", epsilon: float = 0.0
) -> np.ndarray:
    """Return gains min-max normalised among siblings, float64 (M,) in [0, 1] (IGD Eq. 9).

    This is (gain − min) / (max − min + epsilon). Siblings whose gains are all equal get 0. Equal
    means equal within rounding: the same counts summed in another order differ in the last bits,
    and min-max would scale this noise up to the full range. The tolerance is relative (1e-12, or
    two units in the last place of an fp32 `gain`), with an absolute floor of 1e-13 for measures
    that cancel to about 0.

    Args:
        trie: the catalogue's trie.
        gain: a measure per edge, (M,). Only differences between siblings matter, so it may be
            negative.
        cold: "zero" takes min and max over the siblings with training targets and gives cold edges
            0. A cold edge's own gain is the largest there is, so it would be taken for the most
            decisive token; "raw" allows that.
        epsilon: added to the denominator; the published code has 1e-7.

    Raises:
        UsageError: unknown `cold`.
    """
    if cold not in COLD_EDGES:
        raise UsageError(
            f"unknown treatment of cold edges {cold!r}{did_you_mean(cold, COLD_EDGES)} "
            f"(known: {', '.join(COLD_EDGES)})"
        )
    tolerance = max(1e-12, 2 * float(np.finfo(gain.dtype).eps))

    normalised = np.zeros(trie.num_nodes)
    for edges, first, parent in _edge_levels(trie):
        siblings = np.repeat(np.arange(len(first)), np.diff(first, append=len(parent)))
        value = gain[edges].astype(np.float64)
        takes_part = trie.train_count[edges] > 0 if cold == "zero" else np.ones(len(value), bool)

        # Minimum and maximum of each group of siblings, and whether they differ by more than
        # rounding.
        low = np.minimum.reduceat(np.where(takes_part, value, np.inf), first)
        high = np.maximum.reduceat(np.where(takes_part, value, -np.inf), first)
        scale = np.maximum(np.abs(low), np.abs(high))
        # Where every sibling is cold, this is inf − inf; no sibling takes part there.
        with np.errstate(invalid="ignore"):
            spread = high - low
            differ = spread > tolerance * scale + 1e-13

        chosen = takes_part & differ[siblings]
        group = siblings[chosen]
        normalised[edges][chosen] = (value[chosen] - low[group]) / (spread[group] + epsilon)
    return normalised


def gini_decrease(trie: TokenTrie) -> np.ndarray:
    """Return the decrease of the Gini impurity, float64 (M,): G(v) − G(c), G(v) = 1 − Σ_i p(i|v)².

    It is Gini's counterpart of the conditional gain. G is the chance that two targets drawn under
    the prefix differ, and the decrease compares that chance before and after the token. Like the
    conditional gain it can be negative. G is 0 without training targets, so a cold edge has all of
    G(v). It is computed as a difference of the sums of squares, because 1 − (almost nothing) would
    lose precision.
    """

    def leaf(nodes: np.ndarray) -> np.ndarray:
        return np.ones(len(nodes))

    def merge(share: np.ndarray, below: np.ndarray) -> np.ndarray:
        return share**2 * below

    squares = np.empty(trie.num_nodes)
    for begin, end, level in _bottom_up(trie, leaf, merge):
        squares[begin:end] = level
    squares[trie.train_count == 0] = 1.0
    return _child_minus_parent(trie, squares)


def gain_ratio(trie: TokenTrie) -> np.ndarray:
    """Return conditional gain over the parent's split information, float64 (M,).

    IG(c; v) / −Σ P ln P, with the sum over c and its siblings. Quinlan's ratio belongs to a
    complete split. In a trie the mean of IG over the next token IS the split information, so that
    ratio is 1 at every branching prefix. The ratio of one edge says how many times the average the
    token decides, and it does not favour prefixes with many children. It is 0 on the edges of
    `zero_gain`, can be negative, and has a long upper tail.
    """
    split = np.zeros(trie.num_nodes)
    ratio = information_gain(trie, "conditional")
    for edges, first, parent in _edge_levels(trie):
        share = _share(trie, edges, parent)
        split[parent[first]] = np.add.reduceat(_minus_x_log_x(share), first)

        # A parent whose targets all go with one child has split information 0. Its warm child has
        # gain 0 already, and its cold children get 0 here.
        np.divide(ratio[edges], split[parent], out=ratio[edges], where=split[parent] > 0)
        ratio[edges][split[parent] == 0] = 0.0
    return ratio


def chi_squared(trie: TokenTrie) -> np.ndarray:
    """Return Pearson's statistic of the child's item counts against the parent's, float64 (M,).

    X²(c; v) = Σ (O_i − E_i)² / E_i over the leaves i under v, where O_i = n_i under c and 0
    elsewhere, and E_i = n_c p(i|v). It measures how far the items that remain are from a random
    draw among the items before. Every item belongs to one child, so the sum is n_v − n_c, an
    integer. This is also the limit n_c → 0 of a cold edge. It is a test of the goodness of fit. A
    test of independence between next token and item would be degenerate: the item fixes the token,
    and its statistic is n_v at every edge.
    """
    dropped = np.zeros(trie.num_nodes)
    for edges, _, parent in _edge_levels(trie):
        dropped[edges] = trie.train_count[parent].astype(np.int64) - trie.train_count[edges]
    return dropped


def purity_gain(trie: TokenTrie) -> np.ndarray:
    """Return MTC's purity gain, float64 (M,): purity(c) − purity(v) (MTC Figure 1).

    purity = 1 − H / ln n, and 1 at n = 1. Here n is the number of ITEMS under the prefix, including
    cold items and all items of a shared leaf. H is the entropy of their training frequencies,
    renormalised under the prefix ("the entropy of item frequencies under the prefix"), and 0
    without training targets. The gain can be negative, on the edges of `zero_gain` too: a token
    that rules out only cold items leaves H as it is and lowers ln n.
    """
    of_item = trie.item_count / np.maximum(trie.train_count[trie.leaf_of_item], 1)
    of_leaf = np.bincount(
        trie.leaf_of_item, weights=_minus_x_log_x(of_item), minlength=trie.num_nodes
    )

    purity = np.empty(trie.num_nodes)
    for begin, end, level in _bottom_up(trie, lambda nodes: of_leaf[nodes], _merge_conditional):
        items = trie.num_items[begin:end]
        purity[begin:end] = 1.0 - level / np.log(np.maximum(items, 2))
        purity[begin:end][items == 1] = 1.0
    return _child_minus_parent(trie, purity)


MEASURES: dict[str, Callable[[TokenTrie, str], np.ndarray]] = {
    INFORMATION_GAIN: information_gain,
    "gini": lambda trie, _: gini_decrease(trie),
    "gain-ratio": lambda trie, _: gain_ratio(trie),
    "chi-squared": lambda trie, _: chi_squared(trie),
    "purity": lambda trie, _: purity_gain(trie),
}
"""The choices of `--decisiveness`: functions (trie, entropy) → float64 (M,) per edge."""


def edge_gain(
    trie: TokenTrie, decisiveness: str = INFORMATION_GAIN, entropy: str = "prior"
) -> np.ndarray:
    """Return the chosen measure of decisiveness per edge, float64 (M,).

    This is the `gain` that a stored catalogue holds. Both of its uses take any of the measures:

    * The search calibrates with min-max among siblings (`normalised_gain`). Only differences
      between siblings count, so negative values and other units are fine. Every measure is largest
      on cold edges, which the decoding rules leave out (all but "raw").
    * The objective `igd-linear` divides by the largest value on a training target and floors
      weights at 0. Negative values (gini, gain-ratio, purity, and information gain with the
      conditional entropy) so weigh less than β, and at least 0. The upper tails of chi-squared
      (which grows with the number of targets under the prefix) and of gain-ratio are long: most
      tokens weigh about β.

    Which tokens have zero gain does not depend on the measure: see `zero_gain`.

    Args:
        trie: the catalogue's trie.
        decisiveness: a name in MEASURES.
        entropy: a name in ENTROPIES; only information gain depends on it.

    Raises:
        UsageError: unknown `decisiveness` or `entropy`.

    Example:
        >>> gain = edge_gain(trie, "gini")
    """
    check_names(decisiveness, entropy)
    return MEASURES[decisiveness](trie, entropy)


def _check_entropy(name: str) -> None:
    """Raise UsageError for a name that is not in ENTROPIES."""
    if name not in ENTROPIES:
        hint, known = did_you_mean(name, ENTROPIES), ", ".join(ENTROPIES)
        raise UsageError(f"unknown --entropy '{name}'{hint} (known: {known})")


def check_names(decisiveness: str, entropy: str) -> None:
    """Raise UsageError for a name that is not in MEASURES or ENTROPIES."""
    if decisiveness not in MEASURES:
        hint, known = did_you_mean(decisiveness, MEASURES), ", ".join(MEASURES)
        raise UsageError(f"unknown --decisiveness '{decisiveness}'{hint} (known: {known})")
    _check_entropy(entropy)


def filtering_ratio(trie: TokenTrie) -> np.ndarray:
    """Return the share of the remaining items that a token rules out, per level (MTC Table 1).

    It is the unweighted mean of 1 − items(c) / items(v) over the level's edges, EOS edges included.

    Returns:
        float64 (levels,); entry t − 1 belongs to token t.
    """
    ratio = [
        np.mean(1.0 - trie.num_items[edges] / trie.num_items[parent])
        for edges, _, parent in _edge_levels(trie)
    ]
    return np.array(ratio)


def mean_by_token(trie: TokenTrie, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of a measure over all edges that carry a token (MTC Figure 1).

    Returns:
        The tokens, int32 (V',) ascending, and their means, float64 (V',).
    """
    tokens, index = np.unique(trie.token[1:], return_inverse=True)
    return tokens, np.bincount(index, weights=values[1:]) / np.bincount(index)


def _entropy_levels(trie: TokenTrie, name: str) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (begin, end, entropies) of each level, the lowest first.

    A caller needs no more than two levels at a time, so M entropies are never held.
    """
    _check_entropy(name)
    if name == "conditional":
        return _bottom_up(trie, lambda nodes: np.zeros(len(nodes)), _merge_conditional)
    total = max(int(trie.train_count[0]), 1)
    return _bottom_up(trie, lambda nodes: _minus_x_log_x(trie.train_count[nodes] / total), None)


def _merge_conditional(share: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return each child's term of H(v) = Σ P (H(c) − ln P), the chain rule.

    It is exact for a child that has all of the parent's targets.
    """
    return share * below + _minus_x_log_x(share)


def _bottom_up(
    trie: TokenTrie,
    leaf: Callable[[np.ndarray], np.ndarray],
    merge: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (begin, end, float64 values) of each level, the lowest first.

    Args:
        trie: the catalogue's trie.
        leaf: function of the leaves (n,) to their values (n,).
        merge: function (share, values), where share is n_c / n_v, to the children's terms; an inner
            node's value is the sum of its children's terms. None sums the values themselves.
    """
    levels = trie.level_begin()
    below = np.empty(0)
    for depth in range(len(levels) - 2, -1, -1):
        begin, end = int(levels[depth]), int(levels[depth + 1])
        first = trie.child_begin[begin : end + 1]
        inner = first[1:] > first[:-1]

        level = np.empty(end - begin)
        leaves = np.flatnonzero(~inner)
        level[leaves] = leaf(leaves + begin)
        if len(below):
            terms = below
            if merge is not None:
                edges = slice(end, end + len(below))
                terms = merge(_share(trie, edges, trie.parent[edges]), below)
            level[inner] = np.add.reduceat(terms, first[:-1][inner] - end)

        yield begin, end, level
        below = level


def _edge_levels(trie: TokenTrie) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield (child nodes, first child of each parent, parents) of each level of edges.

    The root's edges come first. The children are a slice of nodes. The first children are indices
    within the slice, as `reduceat` takes them.
    """
    levels = trie.level_begin()
    for begin, end in zip(levels[1:-1], levels[2:], strict=True):
        parent = trie.parent[begin:end]
        yield slice(int(begin), int(end)), np.flatnonzero(np.diff(parent, prepend=-1)), parent


def _share(trie: TokenTrie, edges: slice, parent: np.ndarray) -> np.ndarray:
    """Return P = n_c / n_v per edge, 0 under a parent without training targets."""
    return trie.train_count[edges] / np.maximum(trie.train_count[parent], 1)


def _minus_x_log_x(x: np.ndarray) -> np.ndarray:
    """Return −x ln x, with 0 ln 0 = 0 (and 0.0 instead of −0.0 at 1)."""
    return -x * np.log(np.where(x > 0, x, 1.0)) + 0.0


def _child_minus_parent(trie: TokenTrie, values: np.ndarray) -> np.ndarray:
    """Return values[c] − values[v] per edge, float64 (M,)."""
    difference = np.zeros(trie.num_nodes)
    for edges, _, parent in _edge_levels(trie):
        difference[edges] = values[edges] - values[parent]
    return difference
