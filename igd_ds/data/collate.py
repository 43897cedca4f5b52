"""From rows to batches: the order of rows, their deal over ranks, and the padded tensors of a micro-batch.

Letters: R rows of the split, G global batch, B micro-batch, T tokens of a row, N items of the catalogue.
"""

from dataclasses import dataclass

import numpy as np
import torch

from igd_ds.loss import IGNORED

MASKED_ROW = -1  # fills the last global batch: a row whose labels are all IGNORED
LENGTH_GROUP = 50  # global batches sorted together by length: HF's length grouping uses 50 too


def epoch_batches(lengths: np.ndarray, global_batch: int, seed: int, epoch: int, group: bool) -> np.ndarray:
    """Return an epoch's row ids, int64 (steps, G), each row once; the last batch is filled with MASKED_ROW.

    The order depends on seed and epoch alone, not on ranks or accumulation. With `group`, rows of similar length
    (`lengths`, int64 (R,)) share a batch: shuffled rows are sorted by length within blocks of LENGTH_GROUP batches, then the
    batches are shuffled.
    """
    generator = np.random.default_rng([seed, epoch])
    rows = generator.permutation(len(lengths))
    steps = -(-len(rows) // global_batch)
    if group:
        block = global_batch * LENGTH_GROUP
        blocks = [rows[i : i + block] for i in range(0, len(rows), block)]
        rows = np.concatenate([b[np.argsort(-lengths[b], kind="stable")] for b in blocks])
    filled = np.full(steps * global_batch, MASKED_ROW, dtype=np.int64)
    filled[: len(rows)] = rows
    batches = filled.reshape(steps, global_batch)
    return batches[generator.permutation(steps)] if group else batches


def sample_rows(num_rows: int, wanted: int, seed: int) -> np.ndarray:
    """Return row ids in ascending order: a seeded sample of `wanted` of them, or all if that is 0 or at least as many."""
    if not 0 < wanted < num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, wanted, replace=False))


def deal(global_rows: np.ndarray, rank: int, world_size: int, micro_batch: int) -> list[np.ndarray]:
    """Return this rank's micro-batches of a global batch: a list of accumulation steps, each int64 (B,).

    Ranks take turns row by row within an accumulation step, so that rows sorted by length load them equally.
    """
    per_step = micro_batch * world_size
    return [global_rows[i + rank : i + per_step : world_size] for i in range(0, len(global_rows), per_step)]


@dataclass(frozen=True)
class Batch:
    """A micro-batch, right-padded (training); see DESIGN's contract.

    `input_ids`, `attention_mask`, `labels` (B, T) int64, labels unshifted and IGNORED where nothing is predicted;
    `token_weights` (B, T) float32 aligned to `labels`, 0 where unlabelled; `zero_gain` (B, T) bool, whether the labelled token
    has zero information gain; `item_ids`, `row_ids` (B,) int64, MASKED_ROW where a row only fills the batch.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    token_weights: torch.Tensor
    zero_gain: torch.Tensor
    item_ids: torch.Tensor
    row_ids: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`."""
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Collator:
    """Turns row ids into a Batch by gathering: no trie walk, no loop over tokens.

    `token_ids`, `token_weights`, `zero_gain` are ragged per-catalogue arrays, item i's at `offsets[i] : offsets[i+1]`.
    """

    split: object
    prompts: object
    token_ids: np.ndarray
    offsets: np.ndarray
    token_weights: np.ndarray
    zero_gain: np.ndarray
    pad_token_id: int

    def __call__(self, rows: np.ndarray) -> Batch:
        """Collate rows (ids of the split, or MASKED_ROW)."""
        # A masked row borrows row 0's prompt: the forward pass needs some tokens, its labels stay IGNORED.
        real = np.maximum(rows, 0)
        prompts = [self.prompts.encode(self.split.history(row)) for row in real]
        items = self.split.targets[real].astype(np.int64)
        starts, ends = self.offsets[items], self.offsets[items + 1]
        total = max(len(p) + int(e - s) for p, s, e in zip(prompts, starts, ends, strict=True))
        shape = (len(rows), -(-total // 8) * 8)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        weights = np.zeros(shape, dtype=np.float32)
        zero_gain = np.zeros(shape, dtype=bool)
        for i, (prompt, start, end) in enumerate(zip(prompts, starts, ends, strict=True)):
            target = slice(len(prompt), len(prompt) + int(end - start))
            input_ids[i, : len(prompt)] = prompt
            input_ids[i, target] = self.token_ids[start:end]
            attention_mask[i, : target.stop] = 1
            if rows[i] != MASKED_ROW:
                labels[i, target] = self.token_ids[start:end]
                weights[i, target] = self.token_weights[start:end]
                zero_gain[i, target] = self.zero_gain[start:end]
        item_ids = np.where(rows == MASKED_ROW, MASKED_ROW, items)
        arrays = (input_ids, attention_mask, labels, weights, zero_gain, item_ids, np.asarray(rows, dtype=np.int64))
        return Batch(*(torch.from_numpy(a) for a in arrays))
