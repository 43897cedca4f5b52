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


def entropy_by_step(trie, entropy: np.ndarray, leaves: np.ndarray, times: np.ndarray) -> dict[str, list]:
    """Return the mean entropy of the prefix after each step, in nats, and how many items reach it (IGD Figures 3, 6)."""
    sums, counts = prefix_entropy(path_nodes(leaves, trie.parent, trie.depth), times, entropy)
    return {"nats": (sums / counts).tolist(), "items": counts.tolist()}


def describe_targets(trie, entropy: np.ndarray, target: np.ndarray, cutoffs: Sequence[int]) -> dict:
    """Return what the targets are like, whatever the model: cold ones, prefix entropy, the popularity baseline.

    A target is cold if training had no target with its token path; a trie of training targets alone could never list it.

    Args:
        trie: TokenTrie of M nodes.
        entropy: of the items under each node in nats, (M,).
        target: the leaf of each row's target, (R,).
        cutoffs: the K of HR and NDCG.
    """
    leaves = np.flatnonzero(trie.is_leaf)
    ahead, tied = popularity_ranking(trie.train_count[leaves], np.searchsorted(leaves, target))
    return {
        "leaves": len(leaves),
        "cold_targets": int((trie.train_count[target] == 0).sum()),
        "target_prefix_entropy": entropy_by_step(trie, entropy, *np.unique(target, return_counts=True)),
        "popularity_baseline": means(ranking_sums(ahead, cutoffs, tied), len(target)),
    }


def describe_lists(
    trie,
    entropy: np.ndarray,
    target: np.ndarray,
    leaves: np.ndarray,
    scores: np.ndarray,
    credit: np.ndarray,
    cutoffs: Sequence[int],
) -> dict:
    """Return all figures of ranked lists. Token match lets a leaf's items share a rank; item match draws one of them.

    Args:
        trie, entropy, target, cutoffs: see `describe_targets`.
        leaves, scores: the lists, (R, K), and their scores in nats; −1 and −inf behind the end of a list.
        credit: share of a hit that counts in item match, (R,).
    """
    ahead, cold = items_ahead(leaves, target), trie.train_count[target] == 0
    top = leaves[:, :10]
    listed, index, times = np.unique(top[top >= 0], return_inverse=True, return_counts=True)
    first_tokens = np.full(top.shape, -1)
    first_tokens[top >= 0] = trie.token[path_nodes(listed, trie.parent, trie.depth)[:, 0]][index]
    repetition, num_lists = first_token_repetition(first_tokens)
    bits, _ = score_entropy(scores)
    return {
        "token_match": means(ranking_sums(ahead, cutoffs), len(target)),
        "item_match": means(ranking_sums(ahead, cutoffs, credit=credit), len(target)),
        "token_match_warm_targets": means(ranking_sums(ahead[~cold], cutoffs), int((~cold).sum())),
        "token_match_cold_targets": means(ranking_sums(ahead[cold], cutoffs), int(cold.sum())),
        "first_token_repetition": repetition / num_lists,
        "score_entropy_bits": bits / num_lists,
        "cold_share_of_listed": float((trie.train_count[leaves[leaves >= 0]] == 0).mean()),
        "prefix_entropy": entropy_by_step(trie, entropy, listed, times),
    }


def compare_with_beam(
    leaves: np.ndarray, certified: np.ndarray, beam: np.ndarray, target: np.ndarray, cutoffs: Sequence[int]
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
        raise ValueError(f"cannot choose α by {metric}: that evaluation's lists hold {results['num_beams']} items")
    return max(sorted(values, key=float), key=values.get)
