"""Top-K selection within groups of different sizes."""

import numpy as np


def best_per_group(group: np.ndarray, score: np.ndarray, num_groups: int, limit: int) -> np.ndarray:
    """Return the indices of each group's best scores, best first; equal scores in order of index.

    Work and memory are O(E) and one sort of about `limit` scores per group. Groups of similar size
    share a table in which their limit-th best scores are found, so one large group does not widen
    the table of the others.

    Args:
        group: (E,) int64 in [0, num_groups), ascending.
        score: (E,) floats.
        num_groups: how many groups there are; a group may be empty.
        limit: how many indices to return per group.

    Returns:
        (num_groups, limit) int64; −1 where a group has no more scores.

    Example:
        >>> group, score = np.array([0, 0, 0, 2]), np.array([0.1, 0.9, 0.5, 0.3])
        >>> best_per_group(group, score, num_groups=3, limit=2).tolist()
        [[1, 2], [-1, -1], [3, -1]]
    """
    count = np.bincount(group, minlength=num_groups)
    threshold = np.full(num_groups, -np.inf, score.dtype)

    # The limit-th best score of each group that has more. Groups of up to 2^power scores share a
    # table.
    large = np.flatnonzero(count > limit)
    if len(large):
        column = np.arange(len(group)) - (count.cumsum() - count)[group]
        powers = np.frexp(count[large] - 1)[1]
        for power in np.unique(powers):
            members = large[powers == power]
            row = np.full(num_groups, -1)
            row[members] = np.arange(len(members))
            inside = np.flatnonzero(row[group] >= 0)
            table = np.full((len(members), count[members].max()), np.inf, score.dtype)
            table[row[group[inside]], column[inside]] = -score[inside]
            threshold[members] = -np.partition(table, limit - 1, axis=1)[:, limit - 1]

    # What reaches the threshold, sorted by group and, within a group, by score.
    kept = np.flatnonzero(score >= threshold[group])
    kept = kept[np.lexsort((-score[kept], group[kept]))]

    count = np.bincount(group[kept], minlength=num_groups)
    rank = np.arange(len(kept)) - (count.cumsum() - count)[group[kept]]
    first = rank < limit
    best = np.full((num_groups, limit), -1)
    best[group[kept[first]], rank[first]] = kept[first]
    return best


def merge_ranked(
    leaf: np.ndarray, score: np.ndarray, new_leaf: np.ndarray, new_score: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best K of ranked items and new ones; an earlier item wins a tie.

    A score of −inf means that there is no item; its leaf becomes −1.

    Args:
        leaf, score: (A, K), the items so far.
        new_leaf, new_score: (A, any), items to merge into them.

    Returns:
        Leaves and scores, each (A, K), best first.
    """
    scores = np.concatenate([score, new_score], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, : score.shape[1]]
    scores = np.take_along_axis(scores, order, axis=1)
    leaves = np.take_along_axis(np.concatenate([leaf, new_leaf], axis=1), order, axis=1)
    return np.where(scores > -np.inf, leaves, -1), scores
