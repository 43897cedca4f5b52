"""From rows to batches: the order of rows, their deal over ranks, and the padded tensors of a micro-batch.

Letters: R rows of the split, G global batch, B micro-batch, T tokens of a row, N items of the catalogue.
"""

from dataclasses import dataclass

import numpy as np
import torch

from igd_ds.loss import IGNORED

MASKED_ROW = -1  # fills the last global batch: a row whose labels are all IGNORED
LENGTH_GROUP = 50  # global batches sorted together by length: HF's length grouping uses 50 too


def steps_per_epoch(num_rows: int, global_batch: int) -> int:
    """Return the optimizer steps of one pass over the rows; the last one may be partly masked."""
    return -(-num_rows // global_batch)


def epoch_batches(
    lengths: np.ndarray, global_batch: int, seed: int, epoch: int, group: bool
) -> np.ndarray:
    """Return an epoch's row ids, int64 (steps, G), each row once; the last batch is filled with MASKED_ROW.

    The order depends on seed and epoch alone, not on ranks or accumulation. With `group`, rows of similar length
    (`lengths`, int64 (R,)) share a batch: shuffled rows are sorted by length within blocks of LENGTH_GROUP batches, then the
    batches are shuffled.
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
    """Return row ids in ascending order: a seeded sample of `wanted` of them, or all if that is 0 or at least as many."""
    if not 0 < wanted < num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, wanted, replace=False))


def deal(global_rows: np.ndarray, rank: int, world_size: int, micro_batch: int) -> list[np.ndarray]:
    """Return this rank's micro-batches of a global batch: a list of accumulation steps, each int64 (B,).

    Ranks take turns row by row within an accumulation step, so that rows sorted by length load them equally.
    """
    per_step = micro_batch * world_size
    return [
        global_rows[i + rank : i + per_step : world_size]
        for i in range(0, len(global_rows), per_step)
    ]


@dataclass(frozen=True)
class Batch:
    """A micro-batch, right-padded (training); see DESIGN's contract.

    Causal LM: `input_ids`, `attention_mask`, `labels` (B, T) int64 hold prompt and item, labels unshifted. Encoder–decoder:
    `input_ids`, `attention_mask` (B, S) the prompt, `labels` (B, T) the item. Labels are IGNORED where nothing is predicted; the
    n labelled tokens are counted row by row.

    `token_weights` (B, T, K) float32, one column a target of the loss, and `zero_gain` (B, T) bool, whether the token has zero
    information gain, are aligned to `labels` and 0 where unlabelled. `item_ids`, `row_ids` (B,) int64, MASKED_ROW where a row
    only fills the batch.

    With a null prompt (CFT), the batch's U different items once more, behind a prompt without history: `null_input_ids`,
    `null_attention_mask`, `null_labels` as above, and `null_index` (n,) int64, which of the null batch's labelled tokens is the
    batch's; else None.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    token_weights: torch.Tensor
    zero_gain: torch.Tensor
    item_ids: torch.Tensor
    row_ids: torch.Tensor
    null_input_ids: torch.Tensor | None = None
    null_attention_mask: torch.Tensor | None = None
    null_labels: torch.Tensor | None = None
    null_index: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`."""
        moved = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name, value in vars(self).items()
        }
        return Batch(**moved)


@dataclass(frozen=True)
class Collator:
    """Turns row ids into a Batch by gathering: no trie walk, no loop over tokens.

    `token_ids` (T,), `token_weights` (T, K) float32, `zero_gain` (T,) are ragged per-catalogue arrays, item i's at
    `offsets[i] : offsets[i+1]`. `encoder_decoder`: prompt and item go to different inputs. `null_prompt`: token ids
    of the prompt without history, where a weighting needs the batch's items behind it, else None.
    """

    split: object
    prompts: object
    token_ids: np.ndarray
    offsets: np.ndarray
    token_weights: np.ndarray
    zero_gain: np.ndarray
    pad_token_id: int
    encoder_decoder: bool = False
    null_prompt: np.ndarray | None = None

    def __call__(self, rows: np.ndarray) -> Batch:
        """Collate rows (ids of the split, or MASKED_ROW)."""
        # A masked row borrows row 0's prompt: the forward pass needs some tokens, its labels stay IGNORED.
        real = np.maximum(rows, 0)
        prompts = [self.prompts.encode(self.split.history(row)) for row in real]
        items = self.split.targets[real].astype(np.int64)
        labelled = rows != MASKED_ROW
        inputs, attention, labels, places = self._padded(prompts, items, labelled)
        weights = np.zeros((*labels.shape, self.token_weights.shape[1]), dtype=np.float32)
        zero_gain = np.zeros(labels.shape, dtype=bool)
        for i, (item, place) in enumerate(zip(items, places, strict=True)):
            if labelled[i]:
                path = slice(self.offsets[item], self.offsets[item + 1])
                weights[i, place], zero_gain[i, place] = (
                    self.token_weights[path],
                    self.zero_gain[path],
                )
        item_ids = np.where(labelled, items, MASKED_ROW)
        arrays = [
            inputs,
            attention,
            labels,
            weights,
            zero_gain,
            item_ids,
            np.asarray(rows, dtype=np.int64),
        ]
        if self.null_prompt is not None:
            arrays += self._null(items, labelled)
        return Batch(*(torch.from_numpy(a) for a in arrays))

    def _padded(
        self, prompts: list[np.ndarray], items: np.ndarray, labelled: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[slice]]:
        """Return input_ids, attention_mask, labels of items (B,) behind prompts, and each item's place in its row of labels."""
        paths = [self.token_ids[self.offsets[item] : self.offsets[item + 1]] for item in items]
        begins = [0 if self.encoder_decoder else len(prompt) for prompt in prompts]
        sequences = (
            prompts
            if self.encoder_decoder
            else [np.concatenate(pair) for pair in zip(prompts, paths, strict=True)]
        )
        places = [
            slice(begin, begin + len(path)) for begin, path in zip(begins, paths, strict=True)
        ]
        width = (
            -(-max(map(len, sequences)) // 8) * 8
        )  # multiples of 8: fewer shapes, and what tensor cores like
        inputs = np.full((len(items), width), self.pad_token_id, dtype=np.int64)
        attention = np.zeros_like(inputs)
        label_width = max(place.stop for place in places) if self.encoder_decoder else width
        labels = np.full((len(items), label_width), IGNORED, dtype=np.int64)
        for i, (sequence, path, place) in enumerate(zip(sequences, paths, places, strict=True)):
            inputs[i, : len(sequence)] = sequence
            attention[i, : len(sequence)] = 1
            if labelled[i]:
                labels[i, place] = path
        return inputs, attention, labels, places

    def _null(self, items: np.ndarray, labelled: np.ndarray) -> list[np.ndarray]:
        """Return null_input_ids, null_attention_mask, null_labels, null_index: a prompt that all share needs each item once."""
        different, which = np.unique(items, return_inverse=True)
        inputs, attention, labels, _ = self._padded(
            [self.null_prompt] * len(different), different, np.ones(len(different), dtype=bool)
        )
        lengths = np.diff(self.offsets)[different]
        first = np.cumsum(lengths) - lengths
        index = [first[u] + np.arange(lengths[u]) for u in which[labelled]]
        return [inputs, attention, labels, np.concatenate([np.empty(0, dtype=np.int64), *index])]
