"""Chains: rows of a user whose histories extend one another, and batches that hold whole chains.

Letters in shapes: R rows of the split, N items, S chains, G global batch, B micro-batch, A
accumulation steps, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from igd_ds.contracts import MASKED_ROW
from igd_ds.data.batches import TokenColumns, steps_per_epoch
from igd_ds.data.dataset import Split
from igd_ds.data.prompts import PromptBuilder
from igd_ds.items.ragged import ragged_arange

OPEN_BINS = 32
"""Bins that are filled at the same time: chains of one user stay near each other in the order."""


def linked_rows(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Link the rows of each user whose histories extend one another.

    A row follows another one if its history is the other's, item by item, with the other's target
    appended. A history that was truncated extends no other one, so its row stays alone.

    Returns:
        The rows, int64 (R,), chain after chain, and the offsets, int64 (S+1,): chain s is
        rows[offsets[s] : offsets[s+1]]. Each row is in exactly one chain.
    """
    length = np.diff(split.history_offsets)

    # Candidates: neighbours of one user whose histories differ by one item in length.
    order = np.lexsort((length, split.user_ids))
    before, after = order[:-1], order[1:]
    same_user = split.user_ids[before] == split.user_ids[after]
    candidate = np.flatnonzero(same_user & (length[before] + 1 == length[after]))
    before, after = before[candidate], after[candidate]

    # They are linked if the longer history is the shorter one and its target, item by item.
    begins = split.history_offsets[after]
    old = ragged_arange(split.history_offsets[before], length[before])
    new = ragged_arange(begins, length[before])
    pair = np.repeat(np.arange(len(before)), length[before])
    differs = np.zeros(len(before), bool)
    differs[pair[split.history_items[old] != split.history_items[new]]] = True
    differs |= split.history_items[begins + length[before]] != split.targets[before]

    starts = np.ones(len(order), bool)
    starts[candidate[~differs] + 1] = False
    return order, np.append(np.flatnonzero(starts), len(order))


@dataclass(frozen=True)
class RowChains:
    """The order of rows that row trees gain from: chains stay together, and their cost is known."""

    rows: np.ndarray
    """int64 (R,), the rows, chain after chain."""
    offsets: np.ndarray
    """int64 (S+1,): chain s is rows[offsets[s] : offsets[s+1]]."""
    before: np.ndarray
    """int64 (R,), by row: the row before it in its chain; MASKED_ROW for a chain's first row."""
    tokens: np.ndarray
    """int64 (R,), by row: its tokens, prompt and item."""
    new_tokens: np.ndarray
    """int64 (R,), by row: the tokens that it does not share with the row before it."""

    @classmethod
    def build(cls, split: Split, prompts: PromptBuilder, columns: TokenColumns) -> RowChains:
        """Link the rows of a split whose rendered prompts go on from one another.

        Where a history is cut to the budget of the prompt, each row begins at another item, so its
        row stays alone.

        Args:
            split: the rows.
            prompts: writes their prompts.
            columns: the catalogue's tokens.
        """
        rows, offsets = linked_rows(split)
        is_cut = prompts.rows_kept(split) < np.diff(split.history_offsets)
        starts = is_cut[rows]
        starts[offsets[:-1]] = True
        offsets = np.append(np.flatnonzero(starts), len(rows))

        before = np.full(len(rows), MASKED_ROW, np.int64)
        follows = np.flatnonzero(~starts)
        before[rows[follows]] = rows[follows - 1]

        # A row shares the prompt of the row before it, without what stands behind the history, and
        # how its target begins.
        prompt_tokens = prompts.lengths(split)
        tokens = prompt_tokens + np.diff(columns.offsets)[split.targets]
        shared = prompt_tokens - len(prompts.end) + written_alike(prompts, columns)[split.targets]
        new_tokens = tokens - np.where(before == MASKED_ROW, 0, shared[before])
        return cls(rows, offsets, before, tokens, new_tokens)

    def epoch(self, global_batch: int, seed: int, epoch: int) -> np.ndarray:
        """Return an epoch's row ids, int64 (steps, G), each row once, in whole chains if possible.

        Shuffled chains are put into batches first fit; a chain is cut only to fill a batch to its
        last row. The last batch is filled with MASKED_ROW. The order depends on seed and epoch
        alone, and not on micro-batch, ranks or accumulation.
        """
        order = np.random.default_rng([seed, epoch]).permutation(len(self.offsets) - 1)
        chains = (self.rows[self.offsets[s] : self.offsets[s + 1]] for s in order)

        steps = steps_per_epoch(len(self.rows), global_batch)
        sizes = np.full(steps, global_batch)
        sizes[-1] = len(self.rows) - (steps - 1) * global_batch
        batches = np.full((steps, global_batch), MASKED_ROW, dtype=np.int64)
        for step, rows in enumerate(packed(chains, sizes)):
            batches[step, : len(rows)] = rows
        return batches

    def deal(
        self, global_rows: np.ndarray, rank: int, world_size: int, micro_batch: int
    ) -> list[np.ndarray]:
        """Return this rank's micro-batches of a global batch: one int64 (B,) per accumulation step.

        A chain that is longer than a micro-batch is cut. The micro-batches do not depend on the
        number of ranks. Those with similar numbers of tree nodes go to the ranks of one
        accumulation step, the larger ones to the ranks that have had less.
        """
        # Cut the batch into chains, and chains into pieces that fit a micro-batch.
        real = global_rows[global_rows != MASKED_ROW]
        goes_on = self.before[real[1:]] == real[:-1]
        runs = np.split(real, 1 + np.flatnonzero(~goes_on))
        pieces = [run[i : i + micro_batch] for run in runs for i in range(0, len(run), micro_batch)]

        # Masked rows fill the last micro-batches.
        num_parts = len(global_rows) // micro_batch
        begin = micro_batch * np.arange(num_parts)
        sizes = np.clip(len(real) - begin, 0, micro_batch)
        parts = np.full((num_parts, micro_batch), MASKED_ROW, dtype=np.int64)
        for part, rows in enumerate(self.spread(pieces, sizes)):
            parts[part, : len(rows)] = rows

        # Deal them, those with the most nodes first.
        nodes = np.array([self.num_nodes(part) for part in parts])
        own, had = [], np.zeros(world_size)
        for step in np.argsort(-nodes, kind="stable").reshape(-1, world_size):
            ranks = np.argsort(had, kind="stable")
            had[ranks] += nodes[step]
            own.append(parts[step[ranks == rank][0]])
        return own

    def spread(self, pieces: Sequence[np.ndarray], sizes: np.ndarray) -> list[np.ndarray]:
        """Fill bins with pieces of chains, so that the bins get similar numbers of nodes.

        The piece with the most nodes goes first, and each goes into the bin with the fewest nodes
        that has room for it. If none has, it is cut: its begin fills a bin, and the rest goes on.

        Args:
            pieces: rows, int64, as many together as `sizes` says.
            sizes: int64, the rows that each bin holds.

        Returns:
            The rows of each bin.
        """
        bins: list[list[np.ndarray]] = [[] for _ in sizes]
        room, nodes = sizes.copy(), np.zeros(len(sizes))
        for piece in sorted(pieces, key=self.num_nodes, reverse=True):
            rest = piece
            while len(rest):
                fits = room >= len(rest) if room.max() >= len(rest) else room > 0
                number = int(np.where(fits, nodes, np.inf).argmin())
                taken, rest = rest[: room[number]], rest[room[number] :]
                bins[number].append(taken)
                room[number] -= len(taken)
                nodes[number] += self.num_nodes(taken)
        return [_joined(content) for content in bins]

    def num_nodes(self, rows: np.ndarray) -> int:
        """Return about how many nodes the tree of a micro-batch has (int64 (B,), or MASKED_ROW).

        It is exact but for prefixes that rows of different chains share, and for items that begin
        alike.
        """
        real = rows[rows != MASKED_ROW]
        goes_on = np.append(False, self.before[real[1:]] == real[:-1])[: len(real)]
        return int(np.where(goes_on, self.new_tokens[real], self.tokens[real]).sum())


def written_alike(prompts: PromptBuilder, columns: TokenColumns) -> np.ndarray:
    """Return how many tokens an item has in common as next in the history and as the target.

    int64 (N,), with what stands before it in either place. With the template `list` these are all
    tokens of the item.
    """
    forms = []
    for before, tokens, offsets in (
        (prompts.separator, prompts.item_tokens, prompts.item_offsets),
        (prompts.end, columns.token_ids, columns.offsets),
    ):
        places = np.repeat(offsets[:-1], len(before))
        before_each = np.tile(before, len(offsets) - 1)
        joined = np.insert(tokens, places, before_each)
        forms.append((joined, offsets + len(before) * np.arange(len(offsets))))

    (first, first_offsets), (second, second_offsets) = forms
    length = np.minimum(np.diff(first_offsets), np.diff(second_offsets))
    begin = np.cumsum(length) - length
    first = first[ragged_arange(first_offsets[:-1], length)]
    second = second[ragged_arange(second_offsets[:-1], length)]
    differs = np.append(np.flatnonzero(first != second), begin[-1] + length[-1])
    next_difference = differs[np.searchsorted(differs, begin)]
    return np.minimum(next_difference - begin, length)


def packed(chains: Iterable[np.ndarray], sizes: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Fill bins with chains, each into the first bin that has room for the whole of it.

    If none of the OPEN_BINS first bins that are not full has room, the chain is cut: its begin
    fills the first of them.

    Args:
        chains: integer arrays, as long together as `sizes`.
        sizes: what each bin holds.

    Returns:
        The content of each bin.
    """
    room = [int(size) for size in sizes]
    bins: list[list[np.ndarray]] = [[] for _ in room]
    first = 0
    for chain in chains:
        rest = chain
        while len(rest):
            while not room[first]:
                first += 1
            opened = range(first, min(first + OPEN_BINS, len(room)))
            chosen = next((b for b in opened if room[b] >= len(rest)), first)
            taken = rest[: room[chosen]]
            bins[chosen].append(taken)
            room[chosen] -= len(taken)
            rest = rest[len(taken) :]
    return [_joined(content) for content in bins]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the rows of all parts, int64; there may be none."""
    return np.concatenate([np.empty(0, np.int64), *parts])
