"""From rows to batches: the order of rows, their deal over ranks, and the tensors of a micro-batch.

Letters in shapes: R rows of the split, G global batch, B micro-batch, n labelled tokens, N items of
the catalogue, C catalogue tokens, K targets of the loss.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from igd_ds.contracts import IGNORED, MASKED_ROW, Batch, PaddedRows, RowTree
from igd_ds.data.dataset import Split
from igd_ds.data.prompts import PromptBuilder
from igd_ds.data.row_trees import build_row_tree
from igd_ds.errors import UsageError
from igd_ds.items.ragged import ragged_arange
from igd_ds.items.store import StoredCatalogue

LENGTH_GROUP = 50
"""Global batches that are sorted together by length; HF's length grouping uses 50 too."""

WIDTH_MULTIPLE = 8
"""Padded widths are multiples of this: fewer shapes, and what tensor cores like."""


def steps_per_epoch(num_rows: int, global_batch: int) -> int:
    """Return the optimizer steps of one pass over the rows; the last step may be partly masked."""
    return -(-num_rows // global_batch)


def epoch_batches(
    lengths: np.ndarray, global_batch: int, seed: int, epoch: int, group: bool
) -> np.ndarray:
    """Return an epoch's row ids, int64 (steps, G), each row once.

    The last batch is filled with MASKED_ROW. The order depends on seed and epoch alone, and not on
    the number of ranks or the accumulation.

    Args:
        lengths: int64 (R,), tokens of each row.
        global_batch: G.
        seed: of the run.
        epoch: counted from 0.
        group: rows of similar length share a batch. Shuffled rows are sorted by length within
            blocks of LENGTH_GROUP batches, then the batches are shuffled.
    """
    generator = np.random.default_rng([seed, epoch])
    rows = generator.permutation(len(lengths))
    steps = steps_per_epoch(len(rows), global_batch)

    if group:
        block = global_batch * LENGTH_GROUP
        blocks = [rows[i : i + block] for i in range(0, len(rows), block)]
        rows = np.concatenate([b[np.argsort(-lengths[b], kind="stable")] for b in blocks])

    filled = np.full(steps * global_batch, MASKED_ROW, dtype=np.int64)
    filled[: len(rows)] = rows
    batches = filled.reshape(steps, global_batch)
    return batches[generator.permutation(steps)] if group else batches


def sample_rows(num_rows: int, wanted: int, seed: int) -> np.ndarray:
    """Return a seeded sample of `wanted` row ids in ascending order.

    All rows are returned if `wanted` is 0 or at least `num_rows`.
    """
    if not 0 < wanted < num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, wanted, replace=False))


def batches_of(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut `rows` into batches, in their order."""
    return [rows[begin : begin + batch_size] for begin in range(0, len(rows), batch_size)]


def length_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Return the places of `lengths` (R,) in batches of similar length, which saves padding.

    The longest come first, so that a batch that does not fit the memory is met at once.
    """
    return batches_of(np.argsort(-lengths, kind="stable"), batch_size)


def refuse_empty(split: Split, rows: np.ndarray) -> None:
    """Raise UsageError if one of `rows` has an empty history."""
    empty = rows[np.diff(split.history_offsets)[rows] == 0]
    if len(empty):
        raise UsageError(
            f"row {empty[0]} of {split.name} has an empty history: leave such rows out of the "
            "dataset"
        )


def deal(global_rows: np.ndarray, rank: int, world_size: int, micro_batch: int) -> list[np.ndarray]:
    """Return this rank's micro-batches of a global batch: one int64 (B,) per accumulation step.

    Ranks take turns row by row within an accumulation step, so that rows sorted by length load them
    equally.

    Example:
        >>> [part.tolist() for part in deal(np.arange(8), rank=0, world_size=2, micro_batch=2)]
        [[0, 2], [4, 6]]
    """
    per_step = micro_batch * world_size
    return [
        global_rows[i + rank : i + per_step : world_size]
        for i in range(0, len(global_rows), per_step)
    ]


@dataclass(frozen=True)
class ShuffledRows:
    """The order of rows one by one; `data.chains.RowChains` is the order of whole chains."""

    lengths: np.ndarray
    """int64 (R,), tokens of each row."""
    group: bool
    """Whether rows of similar length share a batch."""

    def epoch(self, global_batch: int, seed: int, epoch: int) -> np.ndarray:
        """Return an epoch's row ids, int64 (steps, G); see `epoch_batches`."""
        return epoch_batches(self.lengths, global_batch, seed, epoch, self.group)

    def deal(
        self, global_rows: np.ndarray, rank: int, world_size: int, micro_batch: int
    ) -> list[np.ndarray]:
        """Return this rank's micro-batches of a global batch; see `deal`."""
        return deal(global_rows, rank, world_size, micro_batch)


@dataclass(frozen=True)
class TokenColumns:
    """What a batch needs to know of each of the C catalogue tokens."""

    token_ids: np.ndarray
    """int32 (C,)."""
    offsets: np.ndarray
    """int64 (N+1,): item i's tokens are offsets[i] … offsets[i+1]-1."""
    weights: np.ndarray
    """float32 (C, K), the objective's."""
    zero_gain: np.ndarray
    """bool (C,)."""
    node: np.ndarray
    """int32 (C,), the trie node that the token leads to."""

    @classmethod
    def build(cls, stored: StoredCatalogue, weights: np.ndarray) -> "TokenColumns":
        """Put an objective's weights beside what the stored catalogue knows."""
        catalogue = stored.catalogue
        return cls(
            catalogue.token_ids, catalogue.offsets, weights, stored.zero_gain, stored.token_node
        )


@dataclass(frozen=True)
class Collator:
    """Turns row ids into a Batch by gathering: no trie walk, no tokenizer."""

    split: Split
    """The rows."""
    prompts: PromptBuilder
    """Writes a history as token ids."""
    columns: TokenColumns
    """What is gathered for the labelled tokens."""
    pad_token_id: int
    """Fills rows to the batch's width."""
    encoder_decoder: bool = False
    """Whether prompt and item go to different inputs."""
    as_tree: bool = False
    """Whether the rows become a RowTree, which only causal LMs read; else they are padded."""
    null_prompt: np.ndarray | None = None
    """Token ids of the prompt without history, where the objective needs the items behind it."""

    @functools.cached_property
    def max_length(self) -> int:
        """Most tokens of a row, prompt and item."""
        return self.prompts.budget + int(np.diff(self.columns.offsets).max())

    def __call__(self, rows: np.ndarray) -> Batch:
        """Return the batch of rows, int64 (B,): ids of the split, or MASKED_ROW."""
        # A masked row borrows row 0's prompt: the forward pass needs some tokens, its labels stay
        # IGNORED.
        real = np.maximum(rows, 0)
        prompts = [self.prompts.encode(self.split.history(row)) for row in real]
        items = self.split.targets[real].astype(np.int64)
        labelled = rows != MASKED_ROW

        null, null_index = None, None
        if self.null_prompt is not None:
            null, null_index = self._null(items, labelled)
        return self._batch(prompts, items, labelled, rows, null, null_index)

    def branches(self, rows: np.ndarray, items: np.ndarray) -> Batch:
        """Return a batch with several items behind the prompt of each row.

        In the batch, each item is a row of its own. In a row tree they are branches behind one
        prompt, which is read once.

        Args:
            rows: int64 (B,), ids of the split, or MASKED_ROW.
            items: int64 (B, W), the items behind each prompt. Those of masked rows are not read.
        """
        prompts = [self.prompts.encode(self.split.history(row)) for row in np.maximum(rows, 0)]
        width = items.shape[1]
        labelled = np.repeat(rows != MASKED_ROW, width)
        return self._batch(
            [prompt for prompt in prompts for _ in range(width)],
            np.where(labelled, items.ravel(), 0).astype(np.int64),
            labelled,
            np.repeat(rows, width),
        )

    def _batch(
        self,
        prompts: list[np.ndarray],
        items: np.ndarray,
        labelled: np.ndarray,
        rows: np.ndarray,
        null: Batch | None = None,
        null_index: torch.Tensor | None = None,
    ) -> Batch:
        """Return the batch of `items` (B,) behind `prompts`; only rows in `labelled` predict."""
        columns = self.columns
        paths = [
            columns.token_ids[columns.offsets[item] : columns.offsets[item + 1]] for item in items
        ]
        inputs = (self._tree if self.as_tree else self._padded)(prompts, paths, labelled)

        # The labelled tokens' places in the catalogue's arrays, row after row.
        begin = columns.offsets[items[labelled]]
        count = columns.offsets[items[labelled] + 1] - begin
        place = ragged_arange(begin, count)
        return Batch(
            inputs=inputs,
            targets=torch.from_numpy(columns.token_ids[place].astype(np.int64)),
            weights=torch.from_numpy(columns.weights[place]),
            zero_gain=torch.from_numpy(columns.zero_gain[place]),
            row=torch.from_numpy(np.repeat(np.flatnonzero(labelled), count)),
            node=torch.from_numpy(columns.node[place].astype(np.int64)),
            item_ids=torch.from_numpy(np.where(labelled, items, MASKED_ROW)),
            row_ids=torch.from_numpy(np.asarray(rows, dtype=np.int64)),
            null=null,
            null_index=null_index,
        )

    def _tree(
        self, prompts: list[np.ndarray], paths: list[np.ndarray], labelled: np.ndarray
    ) -> RowTree:
        """Return the tree of the labelled rows: items' paths (B,) behind their prompts."""
        real = np.flatnonzero(labelled)
        rows = [np.concatenate([prompts[row], paths[row][:-1]]) for row in real]
        num_labels = np.array([len(paths[row]) for row in real], np.int64)
        if not rows:
            # The forward pass needs a token; it predicts nothing.
            rows, num_labels = [prompts[0][:1]], np.zeros(1, np.int64)
        return build_row_tree(rows, num_labels)

    def _padded(
        self, prompts: list[np.ndarray], paths: list[np.ndarray], labelled: np.ndarray
    ) -> PaddedRows:
        """Return the padded rows: items' paths (B,) behind their prompts."""
        if self.encoder_decoder:
            sequences = prompts
            begins = [0] * len(prompts)
        else:
            sequences = [np.concatenate(pair) for pair in zip(prompts, paths, strict=True)]
            begins = [len(prompt) for prompt in prompts]

        longest = max(map(len, sequences))
        # Up to a multiple, but never beyond the model's context, which --max_length respects.
        multiple = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        width = max(longest, min(multiple, self.max_length))
        label_width = max(map(len, paths)) if self.encoder_decoder else width
        input_ids = np.full((len(paths), width), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        labels = np.full((len(paths), label_width), IGNORED, dtype=np.int64)

        for i, (sequence, path, begin) in enumerate(zip(sequences, paths, begins, strict=True)):
            input_ids[i, : len(sequence)] = sequence
            attention_mask[i, : len(sequence)] = 1
            if labelled[i]:
                labels[i, begin : begin + len(path)] = path
        return PaddedRows(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(attention_mask),
            labels=torch.from_numpy(labels),
        )

    def _null(self, items: np.ndarray, labelled: np.ndarray) -> tuple[Batch, torch.Tensor]:
        """Return the batch's different items behind the null prompt, and where each token is there.

        All rows share that prompt, so each different item is needed once.
        """
        assert self.null_prompt is not None, "asked for only where there is one"
        different, which = np.unique(items, return_inverse=True)
        everyone = np.ones(len(different), dtype=bool)
        prompts = [self.null_prompt] * len(different)
        null = self._batch(prompts, different, everyone, np.arange(len(different)))

        lengths = np.diff(self.columns.offsets)[different]
        first = np.cumsum(lengths) - lengths
        of_row = which[labelled]
        return null, torch.from_numpy(ragged_arange(first[of_row], lengths[of_row]))
