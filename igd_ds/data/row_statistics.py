"""What the training rows of a dataset cost in a template: tokens as rows, padded, and as trees."""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from igd_ds.contracts import MASKED_ROW
from igd_ds.data.batches import WIDTH_MULTIPLE, Collator, ShuffledRows, TokenColumns, epoch_batches
from igd_ds.data.chains import RowChains
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.items.catalogue import Catalogue

ROW_KEYS = {
    "template": "prompt template of the training rows",
    "micro_batch": "rows of a micro-batch",
    "rows_counted": "training rows counted: some batches of a first epoch",
    "row_tokens": "mean tokens of a row, prompt and target",
    "padded_tokens": "the same with padding, rows grouped by length (--packing rows)",
    "tree_tokens": "mean nodes per row of a tree (--packing tree): what the model reads",
    "label_tokens": "mean labelled tokens of a row: its target",
    "most_padded_tokens": "tokens of the largest micro-batch of padded rows",
    "most_tree_tokens": "nodes of the largest tree",
    "most_label_tokens": "labelled tokens of the micro-batch that has most",
    "row_saving": "row_tokens / tree_tokens",
    "padded_saving": "padded_tokens / tree_tokens: the most that row trees can gain in speed",
    "chain_length": "mean rows of a chain",
}
"""Every statistic with its meaning."""

GLOBAL_BATCH = 8
"""Micro-batches of a global batch."""

NUM_BATCHES = 32
"""Global batches that are counted, evenly spread over the epoch."""


def row_statistics(
    dataset: InteractionDataset,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    prompt: str,
    max_length: int,
    micro_batch: int,
    batching: str = "chains",
    group: bool = True,
) -> dict[str, Any]:
    """Return all of `ROW_KEYS` as JSON values.

    Args:
        dataset: its training rows are counted.
        tokenizer: a Hugging Face tokenizer.
        catalogue: the items as token paths.
        prompt: name of the template, or the path of its file.
        max_length: tokens of prompt and target at most.
        micro_batch: rows of a micro-batch.
        batching: "chains", or "rows" for trees of shuffled rows.
        group: whether shuffled rows of similar length share a batch.

    Raises:
        UsageError: there is no such template, or no prompt fits `max_length`.
    """
    template, budget = Template.load(prompt, tokenizer), max_length - catalogue.max_length
    prompts = PromptBuilder.build(template, tokenizer, dataset, catalogue.kind, budget)
    nothing = np.zeros(len(catalogue.token_ids), np.int32)
    columns = TokenColumns(
        catalogue.token_ids,
        catalogue.offsets,
        weights=nothing[:, None].astype(np.float32),
        zero_gain=nothing.astype(bool),
        node=nothing,
    )

    # Some batches.
    train = dataset.splits["train"]
    chains = RowChains.build(train, prompts, columns)
    order = chains if batching == "chains" else ShuffledRows(chains.tokens, group)
    batches = order.epoch(GLOBAL_BATCH * micro_batch, seed=0, epoch=0)
    chosen = np.unique(np.linspace(0, len(batches) - 1, NUM_BATCHES).astype(int))
    parts = [part for step in chosen for part in order.deal(batches[step], 0, 1, micro_batch)]
    parts = [part[part != MASKED_ROW] for part in parts if (part != MASKED_ROW).any()]
    num_rows = sum(map(len, parts))

    # Tokens of each micro-batch.
    tree_tokens, row_tokens = (
        [int(collate(part).inputs.num_tokens()) for part in parts]
        for collate in (
            Collator(train, prompts, columns, pad_token_id=0, as_tree=True),
            Collator(train, prompts, columns, pad_token_id=0),
        )
    )
    lengths = np.diff(catalogue.offsets)
    label_tokens = [int(lengths[train.targets[part]].sum()) for part in parts]
    padded_tokens = padded_sizes(chains.tokens, micro_batch)

    # Means per row.
    tree, rows = sum(tree_tokens) / num_rows, sum(row_tokens) / num_rows
    padded = rows * float(padded_tokens.sum() / chains.tokens.sum())
    return {
        "template": prompt,
        "micro_batch": micro_batch,
        "rows_counted": num_rows,
        "row_tokens": rows,
        "padded_tokens": padded,
        "tree_tokens": tree,
        "label_tokens": sum(label_tokens) / num_rows,
        "most_padded_tokens": int(padded_tokens.max()),
        "most_tree_tokens": max(tree_tokens),
        "most_label_tokens": max(label_tokens),
        "row_saving": rows / tree,
        "padded_saving": padded / tree,
        "chain_length": len(train) / (len(chains.offsets) - 1),
    }


def padded_sizes(lengths: np.ndarray, micro_batch: int) -> np.ndarray:
    """Return the tokens of padded micro-batches, int64 (M,), with rows grouped by length.

    Args:
        lengths: int64 (R,), tokens of each row.
        micro_batch: rows of a micro-batch.
    """
    batches = epoch_batches(lengths, GLOBAL_BATCH * micro_batch, seed=0, epoch=0, group=True)
    parts = batches.reshape(-1, micro_batch)
    longest = np.where(parts == MASKED_ROW, 0, lengths[parts]).max(1)
    width = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    return width * micro_batch
