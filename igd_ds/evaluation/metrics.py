"""Ranked lists → HR, NDCG, and measures of diversity, popularity and entropy. Pure numpy.

Values are summed over rows with their counts, and divided once, at the very end.

Letters in shapes: R rows (one evaluated interaction each), K list length, M trie nodes, T steps. A
list holds trie leaves, best first, and −1 behind its end. Items with equal token paths share a leaf
and therefore one rank.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from igd_ds.errors import UsageError
from igd_ds.items.trie import TokenTrie

CUTOFFS = (1, 3, 5, 10, 20)
"""The K of HR@K and NDCG@K."""

HEADLINE = "item_match"
"""The entry of metrics.json that α, β and the best checkpoint are chosen by, and that is tested.

A hit counts 1 / n if n items share its token path, so that a model cannot gain by titles that
cannot be told apart. Token match, the papers' measure, counts it in full."""

TOP = 10
"""Entries of each list that diversity, coverage and popularity are measured on (IGD Table 7)."""

CALIBRATION_BINS = 10
"""Bins of the reliability of p(item)."""

Means = dict[str, float | None]
"""Metric → mean over rows; None where there is no row."""


@dataclass(frozen=True)
class Targets:
    """The targets of R rows, and the catalogue that they come from."""

    trie: TokenTrie
    """The catalogue's trie, M nodes."""
    entropy: np.ndarray
    """(M,): entropy of the item given each prefix, nats (see `decisiveness.entropy`)."""
    frequency: np.ndarray
    """(M,): how often each leaf is the target of a row of the whole split."""
    leaf: np.ndarray
    """(R,): the leaf of each row's target."""
    cutoffs: Sequence[int]
    """The K of HR@K and NDCG@K."""

    @property
    def is_cold(self) -> np.ndarray:
        """Bool (R,): whether no training target has the token path of the row's target."""
        return np.asarray(self.trie.train_count[self.leaf] == 0)


def usable_cutoffs(list_length: int, cutoffs: Sequence[int] = CUTOFFS) -> list[int]:
    """Return the cutoffs that lists of this length reach; warn about the others."""
    usable = [k for k in cutoffs if k <= list_length]
    if len(usable) < len(cutoffs):
        left_out = ", ".join(str(k) for k in cutoffs if k > list_length)
        warnings.warn(
            f"lists hold {list_length} items: HR and NDCG at {left_out} are omitted", stacklevel=2
        )
    return usable


def items_ahead(leaves: np.ndarray, target_leaf: np.ndarray) -> np.ndarray:
    """Return how many entries of each list (R, K) stand before the target's leaf (R,).

    Returns:
        float64 (R,); inf where the target is not in the list.

    Example:
        >>> items_ahead(np.array([[7, 3, 5], [6, 2, 8]]), np.array([3, 1])).tolist()
        [1.0, inf]
    """
    hit = leaves == np.asarray(target_leaf)[:, None]
    return np.where(hit.any(1), hit.argmax(1), np.inf)


def popularity_ranking(
    train_count: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the targets when the catalogue is ranked by training count.

    Ties are not broken by item id, because ids may follow popularity or time. `ranking_sums` takes
    the expectation over the random order of tied items.

    Args:
        train_count: (N,), training targets of each item.
        target: (R,), indices into `train_count`.

    Returns:
        `ahead` and `tied`, int64 (R,) each: the number of items with a larger count, and the number
        of items with the target's count, the target included.
    """
    ascending = np.sort(train_count)
    count = np.asarray(train_count)[target]
    not_ahead = np.searchsorted(ascending, count, side="right")
    return len(ascending) - not_ahead, not_ahead - np.searchsorted(ascending, count, side="left")


def ranking_sums(
    ahead: np.ndarray,
    cutoffs: Sequence[int],
    tied: np.ndarray | int = 1,
    credit: np.ndarray | float = 1.0,
) -> dict[str, float]:
    """Return the sums over rows of HR@K and NDCG@K, under the keys `hr@K` and `ndcg@K`.

    Each row has one relevant item, so its NDCG is 1 / log2(rank + 1).

    Args:
        ahead: (R,), number of items before the target; inf where it is not in the list.
        cutoffs: the K.
        tied: (R,) or one number: how many items share the target's place in random order, the
            target included. The values are then expectations over that order.
        credit: (R,) or one number: the share of a hit that counts. It is 1 for token match. For
            item match it is 1 / (items of the target's leaf): the expectation when one of them is
            drawn.

    Example:
        >>> ranking_sums(np.array([0, 1, np.inf]), [1, 3])
        {'hr@1': 1.0, 'ndcg@1': 1.0, 'hr@3': 2.0, 'ndcg@3': 1.6309297535714575}
    """
    sums = {}
    for k in cutoffs:
        first = np.minimum(ahead, k).astype(np.int64)
        last = np.minimum(ahead + tied, k).astype(np.int64)
        discount = 1 / np.log2(np.arange(2, k + 2))

        for name, worth in (("hr", np.ones(k)), ("ndcg", discount)):
            # gain_up_to[i] is the sum of what the first i places are worth.
            gain_up_to = np.concatenate([[0.0], np.cumsum(worth)])
            gain = credit * (gain_up_to[last] - gain_up_to[first]) / tied
            sums[f"{name}@{k}"] = float(np.sum(gain))
    return sums


def means(sums: Mapping[str, float], count: float) -> Means:
    """Divide sums by the number of rows (or credits) that they are over; None if that is 0."""
    return {name: total / count if count else None for name, total in sums.items()}


def share_in_first(places: float, ahead: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Return the probability that an item has one of a ranking's first `places` places.

    Args:
        places: how many; a fraction of a place counts by that fraction.
        ahead, tied: (n,) each, of the items, as `popularity_ranking` returns them. Tied items are
            in random order.

    Returns:
        float64 (n,).
    """
    return np.clip((places - ahead) / tied, 0, 1)


def head_share(frequency: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return how far each row's target belongs to the head, 1, or to the tail, 0 (MTC 5.2.5).

    The items that occur in the test split are ranked by how often they occur. The first half of
    them is the head. Items that are tied across the border belong to both halves, each by the
    probability that a random order of the ties puts them there.

    Over a whole split, HR and NDCG weighted with these shares are exactly the expectation over that
    order, because the number of rows of both halves does not depend on it.

    Args:
        frequency: (n,), how often each item is the target of a row of the whole split; 0 where it
            does not occur.
        target: (R,), index of each row's target in `frequency`.

    Returns:
        float64 (R,) in [0, 1].
    """
    occurring = np.flatnonzero(frequency)
    counts = np.asarray(frequency)[occurring]
    ahead, tied = popularity_ranking(counts, np.searchsorted(occurring, target))
    return share_in_first(len(occurring) / 2, ahead, tied)


def popularity_deciles(
    train_count: np.ndarray, items: np.ndarray, times: np.ndarray
) -> list[float]:
    """Return the share of `items` in each decile of the catalogue by training count (MTC Figure 2).

    The first decile is the most popular one. Each holds a tenth of the catalogue's items. Items of
    equal count share their places, as in `popularity_ranking`.

    Args:
        train_count: (N,), of every item of the catalogue.
        items: (n,), different indices into `train_count`.
        times: (n,), how often each of them occurs.

    Returns:
        Ten shares, which add up to 1.
    """
    ahead, tied = popularity_ranking(train_count, items)
    up_to = [
        np.sum(times * share_in_first(len(train_count) * decile / 10, ahead, tied))
        for decile in range(11)
    ]
    shares: list[float] = (np.diff(up_to) / np.sum(times)).tolist()
    return shares


def gini_index(times: np.ndarray, num_items: int) -> float:
    """Return the Gini index of how often the catalogue's items are listed.

    It is 0 if all items are listed equally often, and 1 − 1/N if only one item is listed.
    G = Σ_i (2i − N − 1) x_i / (N Σ_i x_i), x ascending, i = 1 … N. The sums are exact, because they
    are over integers.

    Args:
        times: integers (n,), how often each listed item is listed. The other N − n items never are.
        num_items: N.
    """
    # The items that are never listed come first and add 0.
    place = np.arange(num_items - len(times) + 1, num_items + 1)
    numerator = int(np.sum((2 * place - num_items - 1) * np.sort(times)))
    return numerator / (num_items * int(np.sum(times)))


def first_token_repetition(tokens: np.ndarray, top: int = TOP) -> tuple[float, int]:
    """Return the sum of FWR over lists, and the number of lists (IGD Table 7).

    FWR is the share of a list's first `top` entries that have its most frequent first token.

    Args:
        tokens: (R, K), first token of each listed item; −1 behind a list's end.
        top: how many entries are looked at. Empty lists are left out of sum and number.
    """
    listed = tokens[:, :top]
    same = (listed[:, :, None] == listed[:, None, :]) & (listed >= 0)[:, :, None]
    length = (listed >= 0).sum(1)
    share = same.sum(2).max(1)[length > 0] / length[length > 0]
    return float(share.sum()), len(share)


def score_entropy(scores: np.ndarray, top: int = TOP) -> tuple[float, int]:
    """Return the sum of ISE over lists, and the number of lists (IGD Table 7).

    ISE is the entropy, in bits, of the softmax of a list's first `top` scores.

    Args:
        scores: (R, K), final scores in nats; −inf behind a list's end. Empty lists are left out.
        top: how many scores are looked at.
    """
    listed = np.asarray(scores, dtype=np.float64)[:, :top]
    listed = listed[np.isfinite(listed).any(1)]
    probability = np.exp(listed - listed.max(1, keepdims=True, initial=-np.inf))
    probability /= probability.sum(1, keepdims=True)
    bits = -np.sum(probability * np.log2(np.where(probability > 0, probability, 1)), axis=1)
    return float(bits.sum()), len(listed)


def path_nodes(leaves: np.ndarray, parent: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return the nodes on the path to each leaf (n,).

    Args:
        leaves: trie leaves, integers (n,).
        parent, depth: of every trie node, (M,).

    Returns:
        int64 (n, T): column t − 1 is the node after t tokens; −1 behind the leaf.
    """
    leaves = np.asarray(leaves, dtype=np.int64)
    length = np.asarray(depth, dtype=np.int64)[leaves]
    nodes = np.full((len(leaves), int(length.max(initial=0))), -1, dtype=np.int64)

    current = leaves
    for step in range(nodes.shape[1], 0, -1):
        here = length >= step
        nodes[here, step - 1] = current[here]
        current = np.where(here, np.asarray(parent)[current], current)
    return nodes


def prefix_entropy(
    nodes: np.ndarray, times: np.ndarray, entropy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the summed entropy of the prefix after each step, and counts (IGD Figures 3, 6).

    A step counts only items that have a token there, EOS included. So later steps describe the
    longer items.

    Args:
        nodes: (n, T), paths as `path_nodes` returns them.
        times: (n,), how often each path occurs.
        entropy: (M,), entropy of the item given each prefix, nats.

    Returns:
        Sums in nats, and counts, (T,) each.
    """
    inside = nodes >= 0
    return times @ np.where(inside, entropy[nodes], 0.0), times @ inside


def entropy_by_step(
    trie: TokenTrie, entropy: np.ndarray, leaves: np.ndarray, times: np.ndarray
) -> dict[str, list[float]]:
    """Return the mean of `prefix_entropy` after each step, `nats`, and the number of `items`.

    Args:
        trie, entropy: see `Targets`.
        leaves: (n,).
        times: (n,), how often each leaf occurs.
    """
    sums, counts = prefix_entropy(path_nodes(leaves, trie.parent, trie.depth), times, entropy)
    return {"nats": (sums / counts).tolist(), "items": counts.tolist()}


def relaxed_match(
    trie: TokenTrie, target: np.ndarray, leaves: np.ndarray, cutoffs: Sequence[int]
) -> dict[str, Means]:
    """Return HR@K and NDCG@K, for each k, of lists whose hits match in the first k codes.

    The hit of a list is its first entry whose first k codes are the target's (MTC Table 6). k runs
    from 1 to one code less than the longest item has; with all its codes it would be token match.
    An item of fewer than k codes matches itself alone. All tokens but EOS are codes.

    Args:
        trie, cutoffs: see `Targets`.
        target: (R,), the leaf of each row's target.
        leaves: the lists, (R, K), −1 behind a list's end.

    Returns:
        The means, by k as a string.
    """
    parent, depth = np.asarray(trie.parent), np.asarray(trie.depth)
    num_codes = int(depth.max()) - 1
    found = {}

    # From the leaves up, one level at a time. EOS is dropped first.
    for k in range(num_codes, 0, -1):
        target, leaves = (
            np.where((nodes >= 0) & (depth[nodes] > k), parent[nodes], nodes)
            for nodes in (target, leaves)
        )
        if k < num_codes:
            sums = ranking_sums(items_ahead(leaves, target), cutoffs)
            found[str(k)] = means(sums, len(target))
    return found


def describe_targets(targets: Targets) -> dict[str, Any]:
    """Return the part of metrics.json that does not depend on the model.

    It holds the number of cold targets and of targets in the head, the entropy of their prefixes,
    their popularity, and the metrics of a ranking by popularity. A target is cold if no training
    target has its token path. A trie of training targets alone could never list it.
    """
    trie = targets.trie
    leaves = np.flatnonzero(trie.is_leaf)
    train_count = trie.train_count[leaves]
    different, times = np.unique(targets.leaf, return_counts=True)

    ahead, tied = popularity_ranking(train_count, np.searchsorted(leaves, targets.leaf))
    return {
        "leaves": len(leaves),
        "cold_targets": int(targets.is_cold.sum()),
        "head_targets": float(head_share(targets.frequency, targets.leaf).sum()),
        "target_popularity_deciles": popularity_deciles(
            train_count, np.searchsorted(leaves, different), times
        ),
        "target_prefix_entropy": entropy_by_step(trie, targets.entropy, different, times),
        "popularity_baseline": means(ranking_sums(ahead, targets.cutoffs, tied), len(targets.leaf)),
    }


def describe_lists(
    targets: Targets, leaves: np.ndarray, scores: np.ndarray, credit: np.ndarray
) -> dict[str, Any]:
    """Return what metrics.json holds of the lists at one α.

    In token match, the items of a leaf share a rank. In item match, one of them is drawn.

    Args:
        targets: the targets.
        leaves: the lists, (R, K), −1 behind a list's end.
        scores: their scores in nats, (R, K), −inf behind a list's end.
        credit: (R,), the share of a hit that counts in item match.
    """
    return describe_hits(targets, leaves, credit) | describe_diversity(targets, leaves, scores)


def describe_hits(targets: Targets, leaves: np.ndarray, credit: np.ndarray) -> dict[str, Means]:
    """Return HR and NDCG of lists: over all rows, and over groups of rows by target.

    Args:
        targets, leaves, credit: see `describe_lists`.
    """
    cutoffs, cold = targets.cutoffs, targets.is_cold
    ahead = items_ahead(leaves, targets.leaf)
    head = head_share(targets.frequency, targets.leaf)
    in_head = ranking_sums(ahead, cutoffs, credit=head)
    in_tail = ranking_sums(ahead, cutoffs, credit=1 - head)

    return {
        "token_match": means(ranking_sums(ahead, cutoffs), len(ahead)),
        "item_match": means(ranking_sums(ahead, cutoffs, credit=credit), len(ahead)),
        "token_match_warm_targets": means(ranking_sums(ahead[~cold], cutoffs), int((~cold).sum())),
        "token_match_cold_targets": means(ranking_sums(ahead[cold], cutoffs), int(cold.sum())),
        "token_match_head_targets": means(in_head, float(head.sum())),
        "token_match_tail_targets": means(in_tail, float((1 - head).sum())),
    }


def describe_diversity(targets: Targets, leaves: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Return repetition, entropy, popularity and coverage of lists.

    Args:
        targets, leaves, scores: see `describe_lists`.
    """
    trie = targets.trie
    catalogue = np.flatnonzero(trie.is_leaf)
    train_count = trie.train_count[catalogue]

    # The different leaves among the first entries of all lists, and how often each is listed.
    top = leaves[:, :TOP]
    listed, index, times = np.unique(top[top >= 0], return_inverse=True, return_counts=True)

    first_tokens = np.full(top.shape, -1)
    first_tokens[top >= 0] = trie.token[path_nodes(listed, trie.parent, trie.depth)[:, 0]][index]
    repetition, num_lists = first_token_repetition(first_tokens)
    bits, _ = score_entropy(scores)

    return {
        "first_token_repetition": repetition / num_lists,
        "score_entropy_bits": bits / num_lists,
        "cold_share_of_listed": float((trie.train_count[leaves[leaves >= 0]] == 0).mean()),
        "popularity_deciles": popularity_deciles(
            train_count, np.searchsorted(catalogue, listed), times
        ),
        "coverage": len(listed) / len(catalogue),
        "gini_index": gini_index(times, len(catalogue)),
        "prefix_entropy": entropy_by_step(trie, targets.entropy, listed, times),
    }


def calibration(
    probability: np.ndarray, hit: np.ndarray, num_bins: int = CALIBRATION_BINS
) -> dict[str, Any]:
    """Return how the probabilities of listed items compare with how often they are the target.

    The items are sorted by probability and cut into bins of equally many items (a bin more or less
    by one). The expected calibration error is Σ_bins share of the items · |mean p − share of hits|.

    Args:
        probability: (n,), p(item | history) of each entry of each list.
        hit: bool (n,), whether it is the row's target.
        num_bins: how many bins; fewer if there are fewer items.

    Returns:
        `expected_calibration_error`, and `bins`, each with its number of `items`, their mean
        `probability` and their `hit_rate`.

    Example:
        >>> calibration(np.array([0.75, 0.1, 0.1]), np.array([1, 0, 0]), num_bins=2)["bins"][0]
        {'items': 2, 'probability': 0.1, 'hit_rate': 0.0}
    """
    order = np.argsort(probability, kind="stable")
    bins = [
        {
            "items": len(members),
            "probability": float(probability[members].mean()),
            "hit_rate": float(hit[members].mean()),
        }
        for members in np.array_split(order, min(num_bins, len(order)))
    ]
    error = sum(one["items"] * abs(one["probability"] - one["hit_rate"]) for one in bins)
    return {"expected_calibration_error": error / len(order), "bins": bins}


def proven_places(leaves: np.ndarray, certified: np.ndarray) -> np.ndarray:
    """Return whether a list is proven up to and including each place, bool (R, K).

    Args:
        leaves: lists of an exact search, (R, K); −1 behind a list's end.
        certified: bool (R, K), whether each place is proven.
    """
    proven: np.ndarray = np.logical_and.accumulate(certified | (leaves < 0), axis=1)
    return proven


def compare_with_beam(
    leaves: np.ndarray,
    proven: np.ndarray,
    beam: np.ndarray,
    target: np.ndarray,
    cutoffs: Sequence[int],
) -> dict[str, Any]:
    """Return how the beam search's lists compare with proven ones.

    Args:
        leaves: lists of the exact search, (R, K); −1 behind a list's end.
        proven: bool (R, K), see `proven_places`.
        beam: lists of the beam search, (R, K).
        target: (R,), the leaf of each row's target.
        cutoffs: the K of HR and NDCG.

    Returns:
        The `token_match` of the beam's lists, and `missed_of_true_top` for k = 1 and k = K: how
        many of the k truly best items the beam's list lacks, a mean over the rows whose first k
        places are proven; None where there is no such row.
    """
    missed = (leaves >= 0) & ~(leaves[:, :, None] == beam[:, None, :]).any(2)

    missed_of_true_top = {}
    for k in sorted({1, leaves.shape[1]}):
        lacking = missed[proven[:, k - 1], :k].sum(1)
        missed_of_true_top[str(k)] = float(lacking.mean()) if len(lacking) else None

    token_match = means(ranking_sums(items_ahead(beam, target), cutoffs), len(target))
    return {"token_match": token_match, "missed_of_true_top": missed_of_true_top}


def table_lines(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return HR and NDCG of a metrics.json, one line per α and kind of match.

    Args:
        results: a metrics.json.

    Example:
        >>> table_lines(results)[0]
        {'alpha': 0.0, 'match': 'item_match', 'hr@1': 0.031, 'ndcg@1': 0.031, …}
    """
    return [
        {"alpha": float(alpha), "match": kind, **entry[kind]}
        for alpha, entry in results["alpha"].items()
        for kind in sorted(entry)
        if kind.startswith(("item_match", "token_match"))
    ]


def best_alpha(results: Mapping[str, Any], metric: str = "ndcg@10") -> str:
    """Return the α with the highest `metric` in HEADLINE, and the smallest such α on a tie.

    Args:
        results: a metrics.json; the α is returned as it is written there.
        metric: a key of HEADLINE's entry, `ndcg@10` say.

    Raises:
        UsageError: the lists are too short for the metric.
    """
    values: dict[str, float] = {}
    for alpha, entry in results["alpha"].items():
        value = entry[HEADLINE].get(metric)
        if value is None:
            raise UsageError(
                f"cannot choose α by {metric}: that evaluation does not have it, because its lists "
                "are shorter"
            )
        values[alpha] = value
    return max(sorted(values, key=float), key=lambda alpha: values[alpha])
