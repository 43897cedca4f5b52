"""How decisive a token is: entropies, information gain and the other measures of a trie's edges (IGD 3.1, MTC 1).

Letters in shapes: M nodes; edges are indexed by their child node, entry 0 is 0. Notation in the docstrings: an edge
leads from prefix v to its child c; n_v, n_c are their training counts, P = n_c / n_v, and p(i|v) = n_i / n_v is the
share of leaf i under v (0 on a prefix of zero mass). Logarithms are natural, so entropies and gains are in nats.

Everything is fp64 and summed bottom-up, level by level, over non-negative terms: nothing cancels, and siblings with the
same counts in another order agree to about 1e-15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from igd_ds.errors import UsageError
from igd_ds.items.trie import TokenTrie

ENTROPIES = ("prior", "conditional")
COLD_EDGES = ("zero", "raw")


def entropy(trie: TokenTrie, name: str = "prior") -> np.ndarray:
    """Entropy of the item given a prefix, float64 (M,), in nats (IGD Eq. 4).

    `prior`: H(v) = -sum over leaves i under v of p(i) ln p(i), p(i) = n_i / n_root, NOT renormalised under v: Eq. 4 read
    literally, and what the authors' code computes. `conditional`: the Shannon entropy of p(i|v); 0 on zero mass.
    Items that share a leaf count as one: no token can tell them apart.

    Raises:
        ValueError: unknown `name`.
    """
    values = np.empty(trie.num_nodes)
    for begin, end, level in _entropy_levels(trie, name):
        values[begin:end] = level
    return values


def information_gain(trie: TokenTrie, name: str = "prior", dtype=np.float64) -> np.ndarray:
    """IG(c; v) = H(v) - H(c) per edge, (M,), in nats (IGD Eq. 5); exactly 0.0 on the edges of `zero_gain`.

    With `prior` no gain is negative; with `conditional` a token can raise the entropy, and its negative gain is kept.
    A cold edge has all of H(v). `dtype=np.float32` computes the same in fp64 and stores the result in half the memory.

    Raises:
        ValueError: unknown `name`.
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
    """Bool (M,): the token drops no training mass, n_c = n_v (entry 0 False).

    Decided on integers, never on a difference of floats. `forced` (an only child) is a narrower thing: a token may drop
    cold siblings alone, and then is zero-IG too.
    """
    zero = np.zeros(trie.num_nodes, bool)
    for edges, _, parent in _edge_levels(trie):
        zero[edges] = trie.train_count[edges] == trie.train_count[parent]
    return zero


def gain_deciles(trie: TokenTrie, gain: np.ndarray) -> np.ndarray:
    """Borders of the deciles of the non-zero gains of all training-target tokens: (9,) of `gain`'s type, in nats, ascending.

    Border j is the smallest gain that at least j + 1 tenths of these tokens do not exceed; it belongs to decile j, and what
    exceeds the last one to decile 9. An edge counts once per training target under it. Empty where no token gains anything.
    """
    edges = np.flatnonzero(~zero_gain(trie) & (trie.train_count > 0))[1:]  # without the root
    edges = edges[np.argsort(gain[edges], kind="stable")]
    reached = np.cumsum(trie.train_count[edges], dtype=np.int64)
    tenths = np.outer(
        np.arange(1, 10), reached[-1:]
    ).ravel()  # in integers, so that a border never depends on rounding
    return gain[edges[np.searchsorted(10 * reached, tenths)]]


def normalised_gain(
    trie: TokenTrie, gain: np.ndarray, cold: str = "zero", epsilon: float = 0.0
) -> np.ndarray:
    """Min-max normalised gain among siblings, float64 (M,) in [0, 1]: (gain - min) / (max - min + epsilon) (IGD Eq. 9).

    cold="zero": min and max are over the siblings with training mass, and cold edges get 0. A cold edge's raw gain is
    all of H(v), the largest there is, so it would be taken for the most decisive. cold="raw" lets it.
    `epsilon`: 1e-7 in the published code.

    Siblings whose gains are all equal get 0. Equal means within rounding: equal counts summed in another order differ in
    the last bits, and min-max would blow that noise up to a full 0 … 1. The tolerance is relative (1e-12, or two units
    in the last place of an fp32 `gain`), with an absolute floor of 1e-13 for measures that cancel to about 0.

    Raises:
        ValueError: unknown `cold`.
    """
    if cold not in COLD_EDGES:
        raise UsageError(
            f"unknown treatment of cold edges {cold!r}; known: {', '.join(COLD_EDGES)}"
        )
    tolerance = max(1e-12, 2 * float(np.finfo(gain.dtype).eps))
    normalised = np.zeros(trie.num_nodes)
    for edges, first, parent in _edge_levels(trie):
        siblings = np.repeat(np.arange(len(first)), np.diff(first, append=len(parent)))
        value = gain[edges].astype(np.float64)
        takes_part = trie.train_count[edges] > 0 if cold == "zero" else np.ones(len(value), bool)
        low = np.minimum.reduceat(np.where(takes_part, value, np.inf), first)
        high = np.maximum.reduceat(np.where(takes_part, value, -np.inf), first)
        scale = np.maximum(np.abs(low), np.abs(high))
        with np.errstate(
            invalid="ignore"
        ):  # inf - inf where every sibling is cold; nobody takes part there
            spread = high - low
            differ = spread > tolerance * scale + 1e-13
        chosen = takes_part & differ[siblings]
        group = siblings[chosen]
        normalised[edges][chosen] = (value[chosen] - low[group]) / (spread[group] + epsilon)
    return normalised


def gini_decrease(trie: TokenTrie) -> np.ndarray:
    """Decrease of the Gini impurity, float64 (M,): G(v) - G(c), G(v) = 1 - sum_i p(i|v)^2, over leaves.

    Gini's counterpart of the conditional gain: the chance that two targets drawn under the prefix differ, before and
    after the token. Like that gain it can be negative. G is 0 on zero mass, so a cold edge has all of G(v). Computed as
    the difference of the sums of squares, which keeps the precision that 1 - (nearly nothing) would lose.
    """

    def leaf(nodes):
        return np.ones(len(nodes))

    def merge(share, below):
        return share**2 * below

    squares = np.empty(trie.num_nodes)
    for begin, end, level in _bottom_up(trie, leaf, merge):
        squares[begin:end] = level
    squares[trie.train_count == 0] = 1.0
    return _child_minus_parent(trie, squares)


def gain_ratio(trie: TokenTrie) -> np.ndarray:
    """Conditional gain over the parent's split information, float64 (M,): IG(c; v) / -sum over siblings of P ln P.

    Quinlan's ratio belongs to a whole split, and a trie's split is trivially perfect: the mean of IG over the next token
    IS the split information, the ratio is 1 at every branching prefix. Per edge it says how many times the average the
    token decides, and no longer favours prefixes with many children. 0 where the token drops no training mass.
    """
    split = np.zeros(trie.num_nodes)
    ratio = information_gain(trie, "conditional")
    for edges, first, parent in _edge_levels(trie):
        share = _share(trie, edges, parent)
        split[parent[first]] = np.add.reduceat(_minus_x_log_x(share), first)
        # A parent whose mass sits in one child has split information 0: its warm child gains 0, its cold ones get 0.
        np.divide(ratio[edges], split[parent], out=ratio[edges], where=split[parent] > 0)
        ratio[edges][split[parent] == 0] = 0.0
    return ratio


def chi_squared(trie: TokenTrie) -> np.ndarray:
    """Pearson's statistic of the child's item counts against the parent's distribution, float64 (M,).

    X^2(c; v) = sum over leaves i under v of (O_i - E_i)^2 / E_i, O_i = n_i under c and 0 elsewhere, E_i = n_c p(i|v): how
    far the items that remain are from a random draw of the items before. Every item goes with one child, so the sum is
    n_v - n_c, an integer (also the limit n_c -> 0 of a cold edge). Goodness of fit, because the test of independence
    between next token and item is degenerate here: the item fixes the token, and the statistic is n_v at every edge.
    """
    dropped = np.zeros(trie.num_nodes)
    for edges, _, parent in _edge_levels(trie):
        dropped[edges] = trie.train_count[parent].astype(np.int64) - trie.train_count[edges]
    return dropped


def purity_gain(trie: TokenTrie) -> np.ndarray:
    """MTC's purity gain, float64 (M,): purity(c) - purity(v), purity = 1 - H / ln n, 1 at n = 1 (MTC Figure 1).

    n is the number of ITEMS under the prefix, cold ones and those that share a leaf included, and H the entropy of their
    training frequencies renormalised under it ("the entropy of item frequencies under the prefix"); H = 0 on zero mass.
    It can be negative: dropping only cold items leaves H and lowers ln n.
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


MEASURES: dict[str, Callable[[TokenTrie], np.ndarray]] = {
    "gini": gini_decrease,
    "gain-ratio": gain_ratio,
    "chi-squared": chi_squared,
    "purity": purity_gain,
}
"""Measures besides `information_gain`, each (trie) -> float64 (M,) per edge; computed when asked for, never stored."""


def filtering_ratio(trie: TokenTrie) -> np.ndarray:
    """Share of the remaining items a token rules out, per level (MTC Table 1): float64 (levels,), entry t-1 = token t.

    The unweighted mean over the level's edges of 1 - items(c) / items(v). EOS edges are edges like the others.
    """
    ratio = [
        np.mean(1.0 - trie.num_items[edges] / trie.num_items[parent])
        for edges, _, parent in _edge_levels(trie)
    ]
    return np.array(ratio)


def mean_by_token(trie: TokenTrie, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of a measure over all edges that carry a token (MTC Figure 1): tokens int32 (V',) ascending, means float64."""
    tokens, index = np.unique(trie.token[1:], return_inverse=True)
    return tokens, np.bincount(index, weights=values[1:]) / np.bincount(index)


def _entropy_levels(trie: TokenTrie, name: str) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (begin, end, entropies) per level, the deepest first: no more than two levels are needed at a time."""
    if name not in ENTROPIES:
        raise UsageError(f"unknown entropy {name!r}; known: {', '.join(ENTROPIES)}")
    if name == "conditional":
        return _bottom_up(trie, lambda nodes: np.zeros(len(nodes)), _merge_conditional)
    total = max(int(trie.train_count[0]), 1)
    return _bottom_up(trie, lambda nodes: _minus_x_log_x(trie.train_count[nodes] / total), None)


def _merge_conditional(share: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Chain rule, H(v) = sum over children of P (H(c) - ln P): exact for a child with all the mass."""
    return share * below + _minus_x_log_x(share)


def _bottom_up(trie: TokenTrie, leaf, merge) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (begin, end, float64 values) per level from the deepest: leaf(nodes) at leaves, else the children's sum.

    `merge(share, values)` makes the children's terms, share = n_c / n_v; None adds the values as they are.
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
            edges = slice(end, end + len(below))
            terms = (
                below if merge is None else merge(_share(trie, edges, trie.parent[edges]), below)
            )
            level[inner] = np.add.reduceat(terms, first[:-1][inner] - end)
        yield begin, end, level
        below = level


def _edge_levels(trie: TokenTrie) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield per level of edges, the root's first: (slice of child nodes, first child of each family, parents).

    The first children are positions inside the slice, as `reduceat` takes them.
    """
    levels = trie.level_begin()
    for begin, end in zip(levels[1:-1], levels[2:], strict=True):
        parent = trie.parent[begin:end]
        yield slice(int(begin), int(end)), np.flatnonzero(np.diff(parent, prepend=-1)), parent


def _share(trie: TokenTrie, edges: slice, parent: np.ndarray) -> np.ndarray:
    """P = n_c / n_v per edge, 0 under a parent of zero mass."""
    return trie.train_count[edges] / np.maximum(trie.train_count[parent], 1)


def _minus_x_log_x(x: np.ndarray) -> np.ndarray:
    """-x ln x, with 0 ln 0 = 0 (and a plain 0.0, not -0.0, at 1)."""
    return -x * np.log(np.where(x > 0, x, 1.0)) + 0.0


def _child_minus_parent(trie: TokenTrie, values: np.ndarray) -> np.ndarray:
    difference = np.zeros(trie.num_nodes)
    for edges, _, parent in _edge_levels(trie):
        difference[edges] = values[edges] - values[parent]
    return difference
