"""Ranked lists → HR, NDCG, diversity and entropy figures. Pure numpy; sums and counts over rows, divided once at the very end.

Letters in shapes: R rows (one evaluated interaction each), K list length, M trie nodes, T steps. A list holds trie leaves, best
first, −1 where it ends early. Items with one token path share a leaf and therefore one rank.
"""

import warnings
from collections.abc import Sequence

import numpy as np

CUTOFFS = (1, 3, 5, 10, 20)


def usable_cutoffs(list_length: int, cutoffs: Sequence[int] = CUTOFFS) -> list[int]:
    """Return the cutoffs a list is long enough for; warn about those left out."""
    usable = [k for k in cutoffs if k <= list_length]
    if len(usable) < len(cutoffs):
        left_out = ", ".join(str(k) for k in cutoffs if k > list_length)
        warnings.warn(f"lists hold {list_length} items: HR and NDCG at {left_out} are omitted", stacklevel=2)
    return usable


def items_ahead(leaves: np.ndarray, target_leaf: np.ndarray) -> np.ndarray:
    """Return how many entries of each list (R, K) stand before the target's leaf (R,): float64 (R,), inf if it is not listed."""
    hit = leaves == np.asarray(target_leaf)[:, None]
    return np.where(hit.any(1), hit.argmax(1), np.inf)


def popularity_ranking(train_count: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (ahead, tied), each (R,), of the targets when the catalogue is ranked by training count.

    `ahead` items have a larger count; `tied` items, the target among them, share its count. Ties are not broken by item id,
    which may follow popularity or time: `ranking_sums` takes the expectation over their random order.
    """
    ascending = np.sort(train_count)
    count = np.asarray(train_count)[target]
    not_ahead = np.searchsorted(ascending, count, side="right")
    return len(ascending) - not_ahead, not_ahead - np.searchsorted(ascending, count, side="left")


def ranking_sums(
    ahead: np.ndarray, cutoffs: Sequence[int], tied: np.ndarray | int = 1, credit: np.ndarray | float = 1.0
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
            sums[f"{name}@{k}"] = float(np.sum(credit * (gain_up_to[last] - gain_up_to[first]) / tied))
    return sums


def means(sums: dict[str, float], count: int) -> dict[str, float | None]:
    """Divide sums by the number of rows behind them; None where there is no row."""
    return {name: total / count if count else None for name, total in sums.items()}


def first_token_repetition(tokens: np.ndarray, top: int = 10) -> tuple[float, int]:
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


def score_entropy(scores: np.ndarray, top: int = 10) -> tuple[float, int]:
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


def prefix_entropy(nodes: np.ndarray, times: np.ndarray, entropy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entropy of the prefix after each step (IGD Figures 3, 6): (sums in nats, counts), each (T,).

    Only items that still have a token at a step count there, EOS included, so later steps describe the longer items.

    Args:
        nodes: (n, T) paths as `path_nodes` returns them.
        times: how often each path occurs, (n,).
        entropy: entropy of the items under each node in nats, (M,).
    """
    inside = nodes >= 0
    return times @ np.where(inside, entropy[nodes], 0.0), times @ inside


def best_alpha(results: dict, metric: str = "ndcg@10") -> str:
    """Return the α (as written in a metrics.json) with the highest token-match `metric`; the smallest one on a tie.

    Raises:
        ValueError: the lists were too short for the metric.
    """
    values = {alpha: entry["token_match"].get(metric) for alpha, entry in results["alpha"].items()}
    if None in values.values():
        raise ValueError(f"cannot choose α by {metric}: that evaluation's lists hold {results['num_beams']} items")
    return max(sorted(values, key=float), key=values.get)
