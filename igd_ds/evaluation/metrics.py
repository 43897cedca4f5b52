"""Ranked lists → HR, NDCG, diversity, popularity and entropy figures. Pure numpy; sums and counts, divided once at the very end.

Letters in shapes: R rows (one evaluated interaction each), K list length, M trie nodes, T steps. A list holds trie leaves, best
first, −1 where it ends early. Items with one token path share a leaf and therefore one rank.
"""

import warnings
from collections.abc import Sequence

import numpy as np

from igd_ds.errors import UsageError

CUTOFFS = (1, 3, 5, 10, 20)
TOP = 10  # entries of each list that the figures of diversity, coverage and popularity look at (IGD Table 7)


def usable_cutoffs(list_length: int, cutoffs: Sequence[int] = CUTOFFS) -> list[int]:
    """Return the cutoffs a list is long enough for; warn about those left out."""
    usable = [k for k in cutoffs if k <= list_length]
    if len(usable) < len(cutoffs):
        left_out = ", ".join(str(k) for k in cutoffs if k > list_length)
        warnings.warn(
            f"lists hold {list_length} items: HR and NDCG at {left_out} are omitted", stacklevel=2
        )
    return usable


def items_ahead(leaves: np.ndarray, target_leaf: np.ndarray) -> np.ndarray:
    """Return how many entries of each list (R, K) stand before the target's leaf (R,): float64 (R,), inf if it is not listed."""
    hit = leaves == np.asarray(target_leaf)[:, None]
    return np.where(hit.any(1), hit.argmax(1), np.inf)


def popularity_ranking(
    train_count: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (ahead, tied), each (R,), of the targets when the catalogue is ranked by training count.

    `ahead` items have a larger count; `tied` items, the target among them, share its count. Ties are not broken by item id,
    which may follow popularity or time: `ranking_sums` takes the expectation over their random order.
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
    """Return the sums over rows of HR@K and NDCG@K (one relevant item: 1 / log2(rank + 1)) under keys `hr@K`, `ndcg@K`.

    Args:
        ahead: items ranked before the target, (R,); inf: not in the list.
        cutoffs: the K.
        tied: items that share the target's place in random order, itself included, (R,) or one number; the values are then
            expectations over that order.
        credit: share of a hit that counts, (R,) or one number. Token match: 1. Item match: 1 / (items of the target's leaf), the
            expected value when one of the leaf's items is drawn.
    """
    sums = {}
    for k in cutoffs:
        # gain_up_to[i]: what the first i places are worth in all, when only the first k count.
        discount = 1 / np.log2(np.arange(2, k + 2))
        first, last = (np.minimum(edge, k).astype(np.int64) for edge in (ahead, ahead + tied))
        for name, worth in (("hr", np.ones(k)), ("ndcg", discount)):
            gain_up_to = np.concatenate([[0.0], np.cumsum(worth)])
            sums[f"{name}@{k}"] = float(
                np.sum(credit * (gain_up_to[last] - gain_up_to[first]) / tied)
            )
    return sums


def means(sums: dict[str, float], count: float) -> dict[str, float | None]:
    """Divide sums by the number of rows (or credits) behind them; None where there is none."""
    return {name: total / count if count else None for name, total in sums.items()}


def share_in_first(places: float, ahead: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Return the probability that an item stands on one of a ranking's first `places` places: float64 (n,).

    Args:
        places: how many; a fraction of a place counts by that fraction.
        ahead, tied: of the items, (n,), as `popularity_ranking` returns them: what is tied stands in random order.
    """
    return np.clip((places - ahead) / tied, 0, 1)


def head_share(frequency: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return how far each row's target belongs to the head (MTC 5.2.5): float64 (R,), 1 head, 0 tail.

    The items that occur in the test split are ranked by how often they do; the first half of them is the head. Those tied across
    the border count in both halves, each by the probability that a random order of the ties puts them there. Over a whole split
    HR and NDCG weighted with it are exactly the expectation over that order, as both halves' numbers of rows do not depend on it.

    Args:
        frequency: how often each item is the target of a row of the whole split, (n,); 0: it does not occur.
        target: index of each row's target in `frequency`, (R,).
    """
    occurring = np.flatnonzero(frequency)
    ahead, tied = popularity_ranking(
        np.asarray(frequency)[occurring], np.searchsorted(occurring, target)
    )
    return share_in_first(len(occurring) / 2, ahead, tied)


def popularity_deciles(
    train_count: np.ndarray, items: np.ndarray, times: np.ndarray
) -> list[float]:
    """Return the share of `items` in each decile of the catalogue by training count, the most popular one first (MTC Figure 2).

    Each decile holds a tenth of the catalogue's items; items of equal count share their places as in `popularity_ranking`.

    Args:
        train_count: of every item of the catalogue, (N,).
        items: different items, (n,), indices into `train_count`.
        times: how often each of them occurs, (n,).
    """
    ahead, tied = popularity_ranking(train_count, items)
    up_to = [
        np.sum(times * share_in_first(len(train_count) * decile / 10, ahead, tied))
        for decile in range(11)
    ]
    return (np.diff(up_to) / np.sum(times)).tolist()


def gini_index(times: np.ndarray, num_items: int) -> float:
    """Return the Gini index of how often the catalogue's items are listed: 0 all equally often, 1 − 1/N one item alone.

    G = Σ_i (2i − N − 1) x_i / (N Σ_i x_i), x ascending, i = 1 … N. The sums are over integers, so exact.

    Args:
        times: how often each listed item is listed, integers (n,); the other N − n items are never.
        num_items: N.
    """
    place = np.arange(
        num_items - len(times) + 1, num_items + 1
    )  # the items that are never listed come first and add 0
    return int(np.sum((2 * place - num_items - 1) * np.sort(times))) / (
        num_items * int(np.sum(times))
    )


def first_token_repetition(tokens: np.ndarray, top: int = TOP) -> tuple[float, int]:
    """FWR (IGD Table 7): share of the most frequent first token among each list's first `top` entries; (sum over rows, rows).

    Args:
        tokens: first token of each listed item, (R, K); −1 where the list ends early.
        top: entries looked at; lists without any entry are left out of sum and count.
    """
    listed = tokens[:, :top]
    same = (listed[:, :, None] == listed[:, None, :]) & (listed >= 0)[:, :, None]
    length = (listed >= 0).sum(1)
    share = same.sum(2).max(1)[length > 0] / length[length > 0]
    return float(share.sum()), len(share)


def score_entropy(scores: np.ndarray, top: int = TOP) -> tuple[float, int]:
    """ISE (IGD Table 7): entropy in bits of the softmax of each list's first `top` scores; (sum over rows, rows).

    Args:
        scores: (R, K) final scores in nats, −inf where a list ends early; empty lists are left out.
        top: scores looked at.
    """
    listed = np.asarray(scores, dtype=np.float64)[:, :top]
    listed = listed[np.isfinite(listed).any(1)]
    probability = np.exp(listed - listed.max(1, keepdims=True, initial=-np.inf))
    probability /= probability.sum(1, keepdims=True)
    bits = -np.sum(probability * np.log2(np.where(probability > 0, probability, 1)), axis=1)
    return float(bits.sum()), len(listed)


def path_nodes(leaves: np.ndarray, parent: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return the nodes on the way to each leaf (n,): (n, T) int64 with column t−1 the node after t tokens, −1 behind the leaf."""
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
    """Entropy of the prefix after each step (IGD Figures 3, 6): (sums in nats, counts), each (T,).

    Only items that still have a token at a step count there, EOS included, so later steps describe the longer items.

    Args:
        nodes: (n, T) paths as `path_nodes` returns them.
        times: how often each path occurs, (n,).
        entropy: entropy of the items under each node in nats, (M,).
    """
    inside = nodes >= 0
    return times @ np.where(inside, entropy[nodes], 0.0), times @ inside


def entropy_by_step(
    trie, entropy: np.ndarray, leaves: np.ndarray, times: np.ndarray
) -> dict[str, list]:
    """Return the mean entropy of the prefix after each step, in nats, and how many items reach it (IGD Figures 3, 6)."""
    sums, counts = prefix_entropy(path_nodes(leaves, trie.parent, trie.depth), times, entropy)
    return {"nats": (sums / counts).tolist(), "items": counts.tolist()}


def relaxed_match(
    trie, target: np.ndarray, leaves: np.ndarray, cutoffs: Sequence[int]
) -> dict[str, dict[str, float | None]]:
    """Return HR@K and NDCG@K by k: a list's first entry whose first k codes are the target's is the hit (MTC Table 6).

    k runs from 1 to one code less than the longest item has (with all its codes it is token match). An item of fewer than k codes
    matches itself alone.

    Args:
        trie, target, cutoffs: see `describe_targets`; all tokens but EOS are codes.
        leaves: the lists, (R, K), −1 behind the end of a list.
    """
    parent, depth = np.asarray(trie.parent), np.asarray(trie.depth)
    num_codes, found = int(depth.max()) - 1, {}
    for k in range(num_codes, 0, -1):  # from the leaves up; EOS goes first
        target, leaves = (
            np.where((nodes >= 0) & (depth[nodes] > k), parent[nodes], nodes)
            for nodes in (target, leaves)
        )
        if k < num_codes:
            found[str(k)] = means(ranking_sums(items_ahead(leaves, target), cutoffs), len(target))
    return found


def describe_targets(
    trie, entropy: np.ndarray, frequency: np.ndarray, target: np.ndarray, cutoffs: Sequence[int]
) -> dict:
    """Return what the targets are like, whatever the model: cold and frequent ones, prefix entropy, the popularity baseline.

    A target is cold if training had no target with its token path; a trie of training targets alone could never list it.

    Args:
        trie: TokenTrie of M nodes.
        entropy: of the items under each node in nats, (M,).
        frequency: how often each leaf is the target of a row of the whole split, (M,).
        target: the leaf of each row's target, (R,).
        cutoffs: the K of HR and NDCG.
    """
    leaves = np.flatnonzero(trie.is_leaf)
    train_count = trie.train_count[leaves]
    ahead, tied = popularity_ranking(train_count, np.searchsorted(leaves, target))
    different, times = np.unique(target, return_counts=True)
    return {
        "leaves": len(leaves),
        "cold_targets": int((trie.train_count[target] == 0).sum()),
        "head_targets": float(head_share(frequency, target).sum()),
        "target_popularity_deciles": popularity_deciles(
            train_count, np.searchsorted(leaves, different), times
        ),
        "target_prefix_entropy": entropy_by_step(trie, entropy, different, times),
        "popularity_baseline": means(ranking_sums(ahead, cutoffs, tied), len(target)),
    }


def describe_lists(
    trie,
    entropy: np.ndarray,
    frequency: np.ndarray,
    target: np.ndarray,
    leaves: np.ndarray,
    scores: np.ndarray,
    credit: np.ndarray,
    cutoffs: Sequence[int],
) -> dict:
    """Return all figures of ranked lists. Token match lets a leaf's items share a rank; item match draws one of them.

    Args:
        trie, entropy, frequency, target, cutoffs: see `describe_targets`.
        leaves, scores: the lists, (R, K), and their scores in nats; −1 and −inf behind the end of a list.
        credit: share of a hit that counts in item match, (R,).
    """
    ahead, cold = items_ahead(leaves, target), trie.train_count[target] == 0
    top = leaves[:, :TOP]
    listed, index, times = np.unique(top[top >= 0], return_inverse=True, return_counts=True)
    first_tokens = np.full(top.shape, -1)
    first_tokens[top >= 0] = trie.token[path_nodes(listed, trie.parent, trie.depth)[:, 0]][index]
    repetition, num_lists = first_token_repetition(first_tokens)
    bits, _ = score_entropy(scores)
    head, catalogue = head_share(frequency, target), np.flatnonzero(trie.is_leaf)
    train_count = trie.train_count[catalogue]
    return {
        "token_match": means(ranking_sums(ahead, cutoffs), len(target)),
        "item_match": means(ranking_sums(ahead, cutoffs, credit=credit), len(target)),
        "token_match_warm_targets": means(ranking_sums(ahead[~cold], cutoffs), int((~cold).sum())),
        "token_match_cold_targets": means(ranking_sums(ahead[cold], cutoffs), int(cold.sum())),
        "token_match_head_targets": means(
            ranking_sums(ahead, cutoffs, credit=head), float(head.sum())
        ),
        "token_match_tail_targets": means(
            ranking_sums(ahead, cutoffs, credit=1 - head), float((1 - head).sum())
        ),
        "first_token_repetition": repetition / num_lists,
        "score_entropy_bits": bits / num_lists,
        "cold_share_of_listed": float((trie.train_count[leaves[leaves >= 0]] == 0).mean()),
        "popularity_deciles": popularity_deciles(
            train_count, np.searchsorted(catalogue, listed), times
        ),
        "coverage": len(listed) / len(catalogue),
        "gini_index": gini_index(times, len(catalogue)),
        "prefix_entropy": entropy_by_step(trie, entropy, listed, times),
    }


def compare_with_beam(
    leaves: np.ndarray,
    certified: np.ndarray,
    beam: np.ndarray,
    target: np.ndarray,
    cutoffs: Sequence[int],
) -> dict:
    """Return how many exact lists are proven, and what the beam's lists are worth beside them.

    Args:
        leaves: what the exact search found, (R, K); −1 behind the end of a list.
        certified: whether each place is proven, bool (R, K).
        beam: what the beam search found, (R, K).
        target: the leaf of each row's target, (R,).
        cutoffs: the K of HR and NDCG.

    Returns:
        `proof_share`: share of rows whose whole list is proven. `beam`: `token_match` of the beam's lists, and
        `missed_of_true_top`, by k of 1 and K: how many of the k truly best items the beam's list lacks, a mean over the rows
        whose first k places are proven; None where there is no such row.
    """
    missed = (leaves >= 0) & ~(leaves[:, :, None] == beam[:, None, :]).any(2)
    proven = np.logical_and.accumulate(certified | (leaves < 0), axis=1)
    missed_of_true_top = {}
    for k in sorted({1, leaves.shape[1]}):
        lacking = missed[proven[:, k - 1], :k].sum(1)
        missed_of_true_top[str(k)] = float(lacking.mean()) if len(lacking) else None
    token_match = means(ranking_sums(items_ahead(beam, target), cutoffs), len(target))
    return {
        "proof_share": float(proven[:, -1].mean()),
        "beam": {"token_match": token_match, "missed_of_true_top": missed_of_true_top},
    }


def best_alpha(results: dict, metric: str = "ndcg@10") -> str:
    """Return the α (as written in a metrics.json) with the highest token-match `metric`; the smallest one on a tie.

    Raises:
        ValueError: the lists were too short for the metric.
    """
    values = {alpha: entry["token_match"].get(metric) for alpha, entry in results["alpha"].items()}
    if None in values.values():
        raise UsageError(
            f"cannot choose α by {metric}: that evaluation's lists hold {results['num_beams']} items"
        )
    return max(sorted(values, key=float), key=values.get)
