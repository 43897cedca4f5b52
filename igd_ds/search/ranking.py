"""Top-K selection within groups of different sizes."""

import torch


def best_per_group(
    group: torch.Tensor, score: torch.Tensor, num_groups: int, limit: int
) -> torch.Tensor:
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
        >>> group, score = torch.tensor([0, 0, 0, 2]), torch.tensor([0.1, 0.9, 0.5, 0.3])
        >>> best_per_group(group, score, num_groups=3, limit=2).tolist()
        [[1, 2], [-1, -1], [3, -1]]
    """
    device = group.device
    count = torch.bincount(group, minlength=num_groups)
    column = torch.arange(len(group), device=device) - (count.cumsum(0) - count)[group]

    # Each group's limit-th best score. Groups of up to 2^size scores share a table; size 0: the
    # whole group is kept.
    size = torch.where(count > limit, (count - 1).clamp(min=1).log2().floor().long() + 1, 0)
    threshold = score.new_full((num_groups,), -torch.inf)
    for power in size.unique().tolist():
        if not power:
            continue
        members = (size == power).nonzero()[:, 0]
        member = torch.full_like(count, -1)
        member[members] = torch.arange(len(members), device=device)
        inside = (member[group] >= 0).nonzero()[:, 0]
        table = score.new_full((len(members), int(count[members].max())), -torch.inf)
        table[member[group[inside]], column[inside]] = score[inside]
        threshold[members] = table.topk(limit, dim=1).values[:, -1]

    # What reaches the threshold, sorted by group and, within a group, by score.
    kept = (score >= threshold[group]).nonzero()[:, 0]
    kept = kept[score[kept].argsort(descending=True, stable=True)]
    kept = kept[group[kept].argsort(stable=True)]

    count = torch.bincount(group[kept], minlength=num_groups)
    rank = torch.arange(len(kept), device=device) - (count.cumsum(0) - count)[group[kept]]
    best = torch.full((num_groups, limit), -1, dtype=torch.int64, device=device)
    first = rank < limit
    best[group[kept[first]], rank[first]] = kept[first]
    return best


def merge_ranked(
    leaf: torch.Tensor, score: torch.Tensor, new_leaf: torch.Tensor, new_score: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best K of ranked items and new ones; an earlier item wins a tie.

    A score of −inf means that there is no item; its leaf becomes −1.

    Args:
        leaf, score: (A, K), the items so far.
        new_leaf, new_score: (A, any), items to merge into them.

    Returns:
        Leaves and scores, each (A, K), best first.
    """
    scores, order = torch.cat([score, new_score], dim=1).sort(dim=1, descending=True, stable=True)
    leaves = torch.cat([leaf, new_leaf], dim=1).gather(1, order)
    width = score.shape[1]
    return leaves.where(scores > -torch.inf, -1)[:, :width], scores[:, :width]
