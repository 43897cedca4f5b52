"""What tools/bench/tiger.py compares with: `transformers.Trainer` with a loss that looks its weights up in Python, and a gain
that scans all items for every prefix. Written plainly after the published codes, and so that it costs less than they do.

* `PublishedTrainer`: weights row by row and token by token from a dict. Rows are tokenized beforehand (the originals tokenize
  strings in the collator), and HF's own loss, which it computes whenever `labels` are passed, is left out.
* `scanned_gain`: each prefix is scanned for once (the originals scan for its parent anew at each child).
"""

import math

import torch
import torch.nn.functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments

from igd_ds.loss import IGNORED


def weight_table(paths: list[tuple], counts: list[int], beta: float) -> dict[tuple, float]:
    """The weight of every prefix' last token: `beta` where its gain is 0, else 1 (IGD Eq. 7). One pass, prior entropy."""
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
    """The gain of each prefix' last token; with a prefix its parents have to be in `prefixes`, and () too.

    The nested scan: quadratic, as there are about as many prefixes as tokens of all items.
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
    """Dynamic padding: to the longest of the batch, not to what suits all batches. Labels are padded with IGNORED."""
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
    """A Trainer, sequential over `rows`, with the weighted mean of each batch as loss; `losses` keeps them.

    Everything that is not set here is transformers' default, AdamW's fused kernel among it.
    """

    def __init__(
        self,
        model,
        rows: list[dict],
        batch_size: int,
        table: dict,
        pad_token_id: int,
        settings,
        folder: str,
    ):
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            lr_scheduler_type=settings.schedule,
            max_grad_norm=settings.max_grad_norm,
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
        """Look the weights up token by token; the weighted mean of the batch's losses."""
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
