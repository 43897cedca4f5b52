"""Codes of items: making equal IDs unique, and measures of how much the codes decide.

Letters in shapes: N items, L levels. Codes are integers from 0. Code c of level l is written as the
token `<a_c>` for l = 0, `<b_c>` for l = 1, and so on.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from igd_ds.errors import UsageError, did_you_mean
from igd_ds.items.decisiveness import filtering_ratio, mean_by_token, purity_gain
from igd_ds.items.trie import TokenTrie

LEVEL_LETTERS = string.ascii_lowercase
COLLISIONS = ("reassign", "extra", "keep")
LEAST_USE, LEAST_PERPLEXITY = 0.10, 0.05  # of the codebook's size; a level below has collapsed


def resolve_collisions(codes: np.ndarray, sizes: Sequence[int], how: str, seed: int) -> np.ndarray:
    """Return codes that are unique per item: int32 (N, L), or (N, L+1) for `extra`.

    `reassign` (MTC, footnote 5): in each group of items with equal IDs one item keeps its codes,
    and the others get a random last code that is unused under their prefix. If a prefix holds more
    items than there are last codes, the surplus items first move to other prefixes: each gets
    another random code one level up, among the codes with room, and so on upwards. Levels are
    decided from the first one down. As few items change as possible: N minus the number of
    different IDs. The random choices are seeded.

    `extra`: a further level numbers the items of a group 0, 1, 2 … in the order of their ids. It is
    0 for an item without a collision.

    `keep`: nothing changes.

    Args:
        codes: integers (N, L), 0 <= codes[:, l] < sizes[l].
        sizes: L codebook sizes.
        how: a name in COLLISIONS.
        seed: seed of the random choices.

    Raises:
        UsageError: `how` is unknown; `reassign` has more items than there are IDs; `extra` would
            need a level beyond the last letter.

    Example:
        >>> resolve_collisions(np.array([[0, 1], [0, 1], [2, 0]]), [3, 3], "extra", seed=0).tolist()
        [[0, 1, 0], [0, 1, 1], [2, 0, 0]]
    """
    check_collisions(len(codes), sizes, how)
    codes = codes.astype(np.int32)
    if how == "keep":
        return codes

    group = _groups(codes)
    if how == "extra":
        return np.concatenate([codes, _rank_within(group).astype(np.int32)[:, None]], axis=1)

    # Which item of a group keeps its codes is random too.
    random = np.random.default_rng(seed)
    order = random.permutation(len(codes))
    keeps = np.empty(len(codes), bool)
    keeps[order] = _rank_within(group[order]) == 0

    # Levels are settled from the top. Once every prefix of length l holds at most as many items as
    # there are IDs under it, its next codes have room for all its items, so the next level can be
    # settled. An item that keeps its codes never has to move, because different IDs always fit.
    for level in range(len(sizes)):
        _settle_level(codes, keeps, level, sizes, random)
    return codes


def check_collisions(num_items: int, sizes: Sequence[int], how: str) -> None:
    """Check that `how` can make the IDs of N items unique (see `resolve_collisions`).

    Raises:
        UsageError: it cannot.
    """
    if how not in COLLISIONS:
        hint, known = did_you_mean(how, COLLISIONS), ", ".join(COLLISIONS)
        raise UsageError(f"unknown --collisions '{how}'{hint} (known: {known})")

    room = int(np.prod([float(size) for size in sizes])) if how == "reassign" else num_items
    if num_items > room:
        raise UsageError(
            f"--collisions reassign: {num_items} items, but only {room} different IDs; raise "
            "--codes or --levels, or take extra"
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
    """Change codes of `level`, in place, until no prefix holds more items than it has IDs.

    Args:
        codes: int32 (N, L), settled above `level`.
        keeps: bool (N,), items whose codes stay.
        level: the level to settle.
        sizes: L codebook sizes.
        random: source of the random choices.
    """
    capacity = float(np.prod([float(size) for size in sizes[level + 1 :]]))
    parent = _groups(codes[:, :level])
    prefix = parent.astype(np.int64) * sizes[level] + codes[:, level]

    # Under each prefix the items that keep their codes come first, the others in random order. The
    # items beyond the capacity move.
    order = np.lexsort((random.random(len(codes)), ~keeps, prefix))
    movers = order[_rank_within(prefix[order]) >= capacity]
    if not len(movers):
        return

    movers = movers[np.argsort(parent[movers], kind="stable")]
    by_parent = np.argsort(parent, kind="stable")
    for moving in np.split(movers, np.flatnonzero(np.diff(parent[movers])) + 1):
        begin = np.searchsorted(parent, parent[moving[0]], side="left", sorter=by_parent)
        end = np.searchsorted(parent, parent[moving[0]], side="right", sorter=by_parent)
        held = np.bincount(codes[by_parent[begin:end], level], minlength=sizes[level])
        room = np.maximum(capacity - held, 0)

        if capacity == 1:
            free = np.flatnonzero(room)
            codes[moving, level] = random.choice(free, size=len(moving), replace=False)
            continue
        for item in moving:
            code = random.choice(np.flatnonzero(room))
            codes[item, level] = code
            room[code] -= 1


def _groups(codes: np.ndarray) -> np.ndarray:
    """Return the number of each row's group of equal rows, int64 (N,).

    The numbers are dense and ordered like the rows.

    Args:
        codes: integers (N, any).
    """
    group = np.zeros(len(codes), np.int64)
    for level in range(codes.shape[1]):
        key = group * (int(codes[:, level].max()) + 1) + codes[:, level]
        group = np.unique(key, return_inverse=True)[1].astype(np.int64)
    return group


def _rank_within(group: np.ndarray) -> np.ndarray:
    """Return how many earlier rows are in the same group, int64 (N,)."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    begin = np.maximum.accumulate(np.where(first, np.arange(len(group)), 0))

    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - begin
    return rank


def collision_rate(codes: np.ndarray) -> float:
    """Return 1 − (number of different IDs / number of items) of codes (N, L)."""
    return 1.0 - (int(_groups(codes).max()) + 1) / len(codes)


def use_and_perplexity(codes: np.ndarray, num_codes: int) -> tuple[float, float]:
    """Return the share of a level's codes that any item has, and the perplexity of the codes.

    Args:
        codes: integers (N,), the items' codes of one level.
        num_codes: size of the level's codebook.

    Returns:
        The share, in [0, 1], and exp(entropy of the code frequencies), in codes.
    """
    share = np.bincount(codes, minlength=num_codes) / len(codes)
    used = share[share > 0]
    return len(used) / num_codes, float(np.exp(-np.sum(used * np.log(used))))


def collapse_warnings(codes: np.ndarray, sizes: Sequence[int]) -> list[str]:
    """Return one sentence for each level of codes (N, L) whose codebook has collapsed.

    A codebook has collapsed if less than 10 % of its codes are used, or if their perplexity is
    below 5 % of its size.
    """
    warnings = []
    for level, size in enumerate(sizes):
        share, perplexity = use_and_perplexity(codes[:, level], size)
        if share < LEAST_USE or perplexity < LEAST_PERPLEXITY * size:
            warnings.append(
                f"the codebook of level {LEVEL_LETTERS[level]} has collapsed: {share:.1%} of "
                f"{size} codes used, perplexity {perplexity:.1f}; check the embeddings, or try "
                "fewer --codes, --sinkhorn 0.003 or another --quantizer"
            )
    return warnings


@dataclass(frozen=True)
class TrieMeasures:
    """How much the token of each level decides, over the trie of some codes (N, L)."""

    filtering_ratio: list[float]
    """L numbers, see `decisiveness.filtering_ratio` (MTC Table 1)."""
    purity_gain: list[float]
    """L numbers, the mean over the level's edges."""
    purity_gain_by_token: list[list[float | None]]
    """L lists of sizes[l] numbers (MTC Figure 1); None for a code that no item has."""


def trie_measures(
    codes: np.ndarray, sizes: Sequence[int], train_counts: np.ndarray
) -> TrieMeasures:
    """Measure how much each level's token decides. EOS, which decides nothing here, is left out.

    Args:
        codes: integers (N, L).
        sizes: L codebook sizes.
        train_counts: int64 (N,), how often each item is a training target.
    """
    # Write the codes as token paths: EOS is token 0, code c of level l is token begin[l] + c.
    num_items, num_levels = codes.shape
    begin = 1 + np.concatenate([[0], np.cumsum(sizes)])
    eos = np.zeros((num_items, 1), np.int64)
    paths = np.concatenate([codes + begin[:-1], eos], axis=1).astype(np.int32)
    offsets = np.arange(num_items + 1, dtype=np.int64) * (num_levels + 1)
    trie = TokenTrie.build(paths.ravel(), offsets, train_counts)

    gain = purity_gain(trie)
    by_token: list[float | None] = [None] * int(begin[-1])
    for token, value in zip(*mean_by_token(trie, gain), strict=True):
        by_token[token] = round(float(value), 6)

    levels = trie.level_begin()
    return TrieMeasures(
        filtering_ratio=filtering_ratio(trie)[:num_levels].tolist(),
        purity_gain=[
            float(gain[levels[i] : levels[i + 1]].mean()) for i in range(1, num_levels + 1)
        ],
        purity_gain_by_token=[by_token[begin[i] : begin[i + 1]] for i in range(num_levels)],
    )


def code_names(level: int, num_codes: int) -> list[str]:
    """Return the tokens of a level's codes.

    Example:
        >>> code_names(1, 3)
        ['<b_0>', '<b_1>', '<b_2>']
    """
    return [f"<{LEVEL_LETTERS[level]}_{code}>" for code in range(num_codes)]
