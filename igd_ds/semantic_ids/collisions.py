"""Codes of items: how collisions are resolved, and measures of what the codes tell apart.

Letters in shapes: N items, L levels. Codes are integers from 0; level l's code c is `<a_c>` for l = 0, `<b_c>` for l = 1 …
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from igd_ds.errors import UsageError
from igd_ds.items.decisiveness import filtering_ratio, mean_by_token, purity_gain
from igd_ds.items.trie import TokenTrie

LEVEL_LETTERS = string.ascii_lowercase
COLLISIONS = ("reassign", "extra", "keep")
LEAST_USE, LEAST_PERPLEXITY = 0.10, 0.05  # of the codebook's size; below, it has collapsed


def resolve_collisions(codes: np.ndarray, sizes: Sequence[int], how: str, seed: int) -> np.ndarray:
    """Make the codes (N, L) unique; return int32 (N, L), or (N, L+1) for `extra`.

    `reassign` (MTC, footnote 5): one item of each group keeps its codes, the others get a random last code that is unused
    under their prefix. A prefix that holds more items than there are last codes first gives items away: each gets another
    random code one level up, among those with room, and so on upwards (decided from the first level down). As few items
    change as possible: N - number of different IDs. Seeded.
    `extra`: a further level numbers the items of a group 0, 1, 2 … in the order of their ids; 0 where there is no collision.
    `keep`: nothing changes.

    Args:
        codes: integers (N, L), 0 <= codes[:, l] < sizes[l].
        sizes: L codebook sizes.
        how: a name in COLLISIONS.
        seed: of the random choices.

    Raises:
        ValueError: unknown `how`; `reassign` with more items than there are IDs; `extra` beyond the last level letter.
    """
    check_collisions(len(codes), sizes, how)
    codes = codes.astype(np.int32)
    if how == "keep":
        return codes
    group = _groups(codes)
    if how == "extra":
        return np.concatenate([codes, _rank_within(group).astype(np.int32)[:, None]], axis=1)
    random = np.random.default_rng(seed)
    order = random.permutation(len(codes))
    keeps = np.empty(len(codes), bool)
    keeps[order] = _rank_within(group[order]) == 0  # which item of a group stays is random too
    # From the top: once every prefix of length l holds at most as many items as there are IDs under it, the children of
    # each have room for all its items, so the next level can be settled. An item that keeps its codes never has to move,
    # because different IDs always fit.
    for level in range(len(sizes)):
        _settle_level(codes, keeps, level, sizes, random)
    return codes


def check_collisions(num_items: int, sizes: Sequence[int], how: str) -> None:
    """Raise ValueError when `how` cannot make the IDs of N items unique (see `resolve_collisions`)."""
    if how not in COLLISIONS:
        raise UsageError(f"--collisions {how}: unknown; known: {', '.join(COLLISIONS)}")
    room = int(np.prod([float(size) for size in sizes])) if how == "reassign" else num_items
    if num_items > room:
        raise UsageError(
            f"--collisions reassign: {num_items} items, but only {room} different IDs; raise --codes or --levels, or take extra"
        )
    if how == "extra" and len(sizes) == len(LEVEL_LETTERS):
        raise UsageError(
            f"--collisions extra: no letter is left for a level beyond {len(sizes)}; lower --levels"
        )


def _settle_level(
    codes: np.ndarray,
    keeps: np.ndarray,
    level: int,
    sizes: Sequence[int],
    random: np.random.Generator,
) -> None:
    """Give another random code at `level`, in place, to items of prefixes that hold more items than IDs."""
    capacity = float(np.prod([float(size) for size in sizes[level + 1 :]]))
    parent = _groups(codes[:, :level])
    prefix = parent.astype(np.int64) * sizes[level] + codes[:, level]
    # Those that keep their codes come first, the others in random order: what goes beyond the capacity moves.
    order = np.lexsort((random.random(len(codes)), ~keeps, prefix))
    movers = order[_rank_within(prefix[order]) >= capacity]
    if not len(movers):
        return
    movers = movers[np.argsort(parent[movers], kind="stable")]
    by_parent = np.argsort(parent, kind="stable")
    for moving in np.split(movers, np.flatnonzero(np.diff(parent[movers])) + 1):
        begin, end = (
            np.searchsorted(parent, parent[moving[0]], side=side, sorter=by_parent)
            for side in ("left", "right")
        )
        held = np.bincount(codes[by_parent[begin:end], level], minlength=sizes[level])
        room = np.maximum(capacity - held, 0)
        if capacity == 1:
            codes[moving, level] = random.choice(
                np.flatnonzero(room), size=len(moving), replace=False
            )
            continue
        for item in moving:
            code = random.choice(np.flatnonzero(room))
            codes[item, level] = code
            room[code] -= 1


def _groups(codes: np.ndarray) -> np.ndarray:
    """Number int64 (N,) of each row's group of equal rows of codes (N, any), dense and ordered like the rows."""
    group = np.zeros(len(codes), np.int64)
    for level in range(codes.shape[1]):
        key = group * (int(codes[:, level].max()) + 1) + codes[:, level]
        group = np.unique(key, return_inverse=True)[1].astype(np.int64)
    return group


def _rank_within(group: np.ndarray) -> np.ndarray:
    """How many earlier rows are in the same group: int64 (N,)."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    begin = np.maximum.accumulate(np.where(first, np.arange(len(group)), 0))
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - begin
    return rank


def collision_rate(codes: np.ndarray) -> float:
    """1 - different IDs / items of codes (N, L)."""
    return 1.0 - (int(_groups(codes).max()) + 1) / len(codes)


def use_and_perplexity(codes: np.ndarray, num_codes: int) -> tuple[float, float]:
    """Share of a level's codes that any of the items (N,) has, and exp(entropy of the code frequencies), in codes."""
    share = np.bincount(codes, minlength=num_codes) / len(codes)
    used = share[share > 0]
    return len(used) / num_codes, float(np.exp(-np.sum(used * np.log(used))))


def collapse_warnings(codes: np.ndarray, sizes: Sequence[int]) -> list[str]:
    """A sentence for each level of codes (N, L) whose codebook has collapsed: use below 10 % or perplexity below 5 % of it."""
    warnings = []
    for level, size in enumerate(sizes):
        share, perplexity = use_and_perplexity(codes[:, level], size)
        if share < LEAST_USE or perplexity < LEAST_PERPLEXITY * size:
            warnings.append(
                f"the codebook of level {LEVEL_LETTERS[level]} has collapsed: {share:.1%} of {size} codes used, perplexity "
                f"{perplexity:.1f}; check the embeddings, or try fewer --codes, --sinkhorn 0.003 or another --quantizer"
            )
    return warnings


def trie_measures(
    codes: np.ndarray, sizes: Sequence[int], train_counts: np.ndarray
) -> dict[str, list]:
    """How much each level's token decides, over the trie of the codes (N, L); EOS, which decides nothing, is left out.

    Args:
        train_counts: int64 (N,), how often each item is a training target.

    Returns:
        filtering_ratio: L numbers, MTC Table 1. purity_gain: L numbers, the mean over the level's edges.
        purity_gain_by_token: L lists of sizes[l] numbers, MTC Figure 1; None for a code that no item has.
    """
    num_items, num_levels = codes.shape
    begin = 1 + np.concatenate([[0], np.cumsum(sizes)])  # token of code 0 per level; EOS is token 0
    paths = np.concatenate([codes + begin[:-1], np.zeros((num_items, 1), np.int64)], axis=1).astype(
        np.int32
    )
    offsets = np.arange(num_items + 1, dtype=np.int64) * (num_levels + 1)
    trie = TokenTrie.build(paths.ravel(), offsets, train_counts)
    gain = purity_gain(trie)
    by_token: list[float | None] = [None] * int(begin[-1])
    for token, value in zip(*mean_by_token(trie, gain), strict=True):
        by_token[token] = round(float(value), 6)
    levels = trie.level_begin()
    return {
        "filtering_ratio": filtering_ratio(trie)[:num_levels].tolist(),
        "purity_gain": [
            float(gain[levels[i] : levels[i + 1]].mean()) for i in range(1, num_levels + 1)
        ],
        "purity_gain_by_token": [by_token[begin[i] : begin[i + 1]] for i in range(num_levels)],
    }


def code_names(level: int, num_codes: int) -> list[str]:
    """The tokens of a level's codes: `<a_0>`, `<a_1>` …"""
    return [f"<{LEVEL_LETTERS[level]}_{code}>" for code in range(num_codes)]
