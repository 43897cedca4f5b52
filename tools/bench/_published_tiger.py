"""What tools/bench/tiger.py compares with: a Trainer with weights from a dict, and a scanned gain.

Both are written plainly after the published codes, so that they cost less than those do.

* `PublishedTrainer` looks weights up row by row and token by token in a dict. Rows are tokenized
  beforehand (the originals tokenize strings in the collator). The loss that Hugging Face computes
  whenever `labels` are passed is left out.
* `scanned_gain` scans all items once for each prefix (the originals scan for the parent again at
  each child).
"""

import math

import torch
import torch.nn.functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments

from igd_ds.config.training import LoopOptions
from igd_ds.contracts import IGNORED


def weight_table(paths: list[tuple], counts: list[int], beta: float) -> dict[tuple, float]:
    """Return the weight of each prefix' last token: `beta` where its gain is 0, else 1 (IGD Eq. 7).

    One pass over the items; the entropy is `prior`.
    """
    total = sum(counts)
    entropy = {}
    for path, count in zip(paths, counts, strict=True):
        term = -count / total * math.log(count / total) if count else 0.0
        for end in range(len(path) + 1):
            entropy[path[:end]] = entropy.get(path[:end], 0.0) + term
    return {prefix: beta if entropy[prefix[:-1]] == entropy[prefix] else 1.0 for prefix in entropy}


def scanned_gain(
    paths: list[tuple], counts: list[int], prefixes: list[tuple]
) -> dict[tuple, float]:
    """Return the gain of each prefix' last token by a nested scan.

    The parents of a prefix must be in `prefixes`, () among them. There are about as many prefixes
    as tokens of all items, so the time is quadratic.
    """
    total = sum(counts)
    entropy = {}
    for prefix in prefixes:
        depth, value = len(prefix), 0.0
        for path, count in zip(paths, counts, strict=True):
            if path[:depth] == prefix and count:
                value -= count / total * math.log(count / total)
        entropy[prefix] = value
    return {prefix: entropy[prefix[:-1]] - entropy[prefix] for prefix in prefixes if prefix}


def collate(rows: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad to the longest row of the batch. Labels are padded with IGNORED."""
    width, label_width = (max(len(row[name]) for row in rows) for name in ("input_ids", "labels"))
    lengths = [len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor(
            [row["input_ids"] + [pad_token_id] * (width - len(row["input_ids"])) for row in rows]
        ),
        "attention_mask": torch.tensor(
            [[1] * length + [0] * (width - length) for length in lengths]
        ),
        "labels": torch.tensor(
            [row["labels"] + [IGNORED] * (label_width - len(row["labels"])) for row in rows]
        ),
    }


class PublishedTrainer(Trainer):
    """A Trainer that takes `rows` in order; its loss is the weighted mean of a batch.

    `losses` keeps the loss of every step. All settings that are not given here are transformers'
    defaults, such as AdamW's fused kernel.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: list[dict],
        batch_size: int,
        table: dict[tuple, float],
        pad_token_id: int,
        options: LoopOptions,
        folder: str,
    ):
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            lr_scheduler_type=options.schedule,
            max_grad_norm=options.max_grad_norm,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )

        super().__init__(
            model,
            arguments,
            train_dataset=rows,
            data_collator=lambda batch: collate(batch, pad_token_id),
        )
        self.remove_callback(PrinterCallback)
        self.table, self.losses = table, []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Look the weights up token by token; return the weighted mean of the batch's losses."""
        labels = inputs["labels"]
        weights = []
        for row in labels.tolist():
            prefix, row_weights = (), []
            for token in row:
                prefix += (token,)
                row_weights.append(0.0 if token == IGNORED else self.table[prefix])
            weights.append(row_weights)

        weights = torch.tensor(weights)
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        ).logits
        nll = F.cross_entropy(
            logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="none"
        ).view(labels.shape)
        loss = (nll * weights).sum() / weights.sum()
        self.losses.append(loss.item())
        return loss
