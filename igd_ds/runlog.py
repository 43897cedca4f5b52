"""Rank 0's record of a run, TensorBoard and `metrics.jsonl`, and the unit of every tag."""

import hashlib
import json
import os
import resource
import string
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from igd_ds.folders import write_text

TAGS = {
    "train/loss": "nats: the optimised loss, Σ w·NLL / Ω with one target, mean over the logged "
    "steps; of a baseline its own loss, mean over the targets of those steps",
    "train/nll": "nats per token: unweighted mean over the step's target tokens",
    "train/nll_zero_gain": "nats per token: mean over target tokens with zero information gain "
    "(IGD Figures 2, 5)",
    "train/nll_nonzero_gain": "nats per token: mean over target tokens with information gain",
    "train/zero_gain_weight_share": "share of Ω that lies on zero-gain tokens, 0 to 1",
    "train/learning_rate": "AdamW's learning rate of the step",
    "train/grad_norm": "L2 norm of the gradient before clipping",
    "train/epoch": "epochs, fractional",
    "speed/target_tokens_per_second": "labelled tokens per second, all ranks",
    "speed/tokens_per_second": "tokens that the model reads per second, all ranks: padding is not "
    "counted, and what rows of a tree share is counted once",
    "speed/rows_per_second": "training rows per second, all ranks",
    "speed/memory_gib": "peak memory of rank 0 in GiB: of the GPU if there is one, else resident",
    "valid/nll": "nats per item: unweighted negative log-likelihood summed over the item's tokens",
    "valid/nll_per_token": "nats per token: the same, per target token",
    "valid/nll_gain_zero": "nats per token: mean over target tokens with zero information gain",
    **{
        f"valid/nll_gain_{i}": f"the same, decile {i} of the non-zero gains of training-target "
        "tokens (IGD Figure 4)"
        for i in range(10)
    },
    "valid/ndcg@10": "NDCG@10, item match, of a beam search with 10 beams, or of the exact list "
    "where scores are item probabilities (msl); of a baseline, of its full ranking",
    "quantizer/loss": "reconstruction + codebook loss + commitment, mean over the epoch; igd ids",
    "quantizer/reconstruction": "mean squared error over the embeddings' variance: 0 is exact, 1 "
    "is no better than their mean",
    "quantizer/commitment": "squared distance of a level's input to its code, mean over entries "
    "and levels, unweighted",
    "quantizer/collision_rate": "1 - different IDs / items, as assigned during the epoch",
    "quantizer/restarted": "dead codes that were restarted in the epoch, all levels",
    **{
        f"quantizer/use_{letter}": "share of the level's codes that any item has"
        for letter in string.ascii_lowercase
    },
    **{
        f"quantizer/perplexity_{letter}": "exp(entropy) of the level's code frequencies"
        for letter in string.ascii_lowercase
    },
    **{
        f"eval/{prefix}{metric}@{k}": f"{metric.upper()}@{k}, {match}; step = 1000·α"
        for prefix, match in (
            ("", "item match: a hit on a path of n items counts 1/n"),
            ("token_match_", "token match: the items of one path share a rank, as in the papers"),
        )
        for metric in ("hr", "ndcg")
        for k in (1, 3, 5, 10, 20)
    },
    "eval/alpha_grid": "figure: HR@10 and NDCG@10, item match, over α",
    "eval/popularity_deciles": "figure: share of the top 10 in each tenth of the catalogue by "
    "training count (MTC Figure 2)",
    "eval/prefix_entropy": "figure: entropy in nats of the prefixes of lists minus targets, "
    "after each token (IGD Figures 3, 6, 8)",
    "eval/calibration": "figure: share of listed items that are the target, by their p(item), "
    "where scores are log-probabilities",
    "eval/lists": "text: history, target and first 5 entries of a few rows; step = 1000·α",
}
"""Tag: meaning and unit."""

LAYOUT = {
    "loss by token group": {
        "training: zero and non-zero gain": ["Multiline", ["train/nll_(non)?zero_gain"]],
        "validation: zero gain and deciles of non-zero gain": ["Multiline", ["valid/nll_gain_"]],
    },
    "objectives": {
        "weights α'": ["Multiline", ["train/alpha_"]],
        "losses": ["Multiline", ["train/loss"]],
    },
    "validation": {
        "nats per item": ["Multiline", ["valid/nll$"]],
        "nats per token": ["Multiline", ["valid/nll_per_token"]],
        "NDCG@10": ["Multiline", ["valid/ndcg@10"]],
    },
    "speed": {
        "per second": ["Multiline", ["speed/.*_per_second"]],
        "peak memory, GiB": ["Multiline", ["speed/memory_gib"]],
    },
}
"""TensorBoard's tab Custom Scalars: category → chart → patterns of the tags it shows."""


class RunLog:
    """Writes scalars, figures and texts of a run; does nothing unless `enabled` (rank 0).

    Args:
        folder: run folder; `metrics.jsonl` and `tensorboard/` lie in it.
        enabled: whether this process writes.
        resume_step: drop entries after this step first, so that a resumed run's record has each
            step once; None keeps all.
        validated: the last validation that the resumed run knows of; a later one is dropped too,
            because the run was killed before it took note of it, and makes it again.
        mark: what `mark` returned when the resumed checkpoint was saved. A log that has changed
            since is told.
        tags: tags that may be used beside TAGS, with their units.
        report_to: "wandb" sends scalars to Weights & Biases too, see `start_wandb`.
        settings: the run's configuration, for Weights & Biases.
    """

    def __init__(
        self,
        folder: Path,
        enabled: bool,
        resume_step: int | None = None,
        validated: int | None = None,
        tags: Mapping[str, str] | None = None,
        mark: Mapping[str, Any] | None = None,
        report_to: str = "tensorboard",
        settings: Mapping[str, Any] | None = None,
    ):
        self.enabled = enabled
        self.tags = TAGS | dict(tags or {})
        if not enabled:
            return

        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(folder) / "metrics.jsonl"
        last: list[dict[str, Any]] = []
        if mark and mark != mark_of(self.path, mark["bytes"]):
            print(
                f"warning: {self.path} has lost or changed lines since the checkpoint was saved: "
                "its curves have gaps; the training itself does not read it",
                flush=True,
            )
        if resume_step is not None:
            kept = drop_entries_after(self.path, resume_step, validated)
            last = [entry for entry in kept if entry["step"] == resume_step]

        # TensorBoard forgets the resumed step too, and gets back what was kept of it.
        self.writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=resume_step)
        self.wandb = start_wandb(Path(folder), settings or {}) if report_to == "wandb" else None
        for entry in last:
            self._show_scalars(entry)
        if not resume_step:
            self.writer.add_custom_scalars(LAYOUT)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  open until close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` (tag → number) at an optimizer step.

        Raises:
            KeyError: a tag has no meaning and unit in TAGS.
        """
        self._check_tags(values)
        if not self.enabled:
            return

        entry = {"step": step, **values}
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        self._show_scalars(entry)

    def show(self, step: int, views: Mapping[str, Any]) -> None:
        """Show `views` in TensorBoard alone: tag → matplotlib figure, or text in Markdown.

        Raises:
            KeyError: as `log`.
        """
        self._check_tags(views)
        if not self.enabled:
            return

        for tag, view in views.items():
            add = self.writer.add_text if isinstance(view, str) else self.writer.add_figure
            add(tag, view, step)

    def hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Record final metrics in TensorBoard's HParams table, in the row of the settings' run.

        They lie in a folder of their own, because every scalar beside the settings becomes a
        column. A training and its evaluations each write theirs: TensorBoard joins what has the
        same trial, which here is the run's --output_dir.

        Args:
            settings: the run's configuration, as in its config.yaml.
            metrics: name → value.
        """
        if not self.enabled:
            return
        if self.wandb:
            self.wandb.summary.update(dict(metrics))

        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from torch.utils.tensorboard import SummaryWriter

        known = {
            key: value if isinstance(value, (int, float, str)) else str(value)
            for key, value in settings.items()
            if value is not None
        }
        with SummaryWriter(f"{self.writer.log_dir}/hparams") as writer:
            summary = hparams_pb(known, trial_id=settings.get("output_dir"))
            writer.file_writer.add_summary(summary)
            for name, value in metrics.items():
                writer.add_scalar(name, value)

    def mark(self) -> dict[str, Any]:
        """Return the size of metrics.jsonl in bytes and its SHA-256; {} if this is not rank 0."""
        return mark_of(self.path, self.path.stat().st_size) if self.enabled else {}

    def close(self) -> None:
        """Flush and close all records."""
        if self.enabled:
            self.writer.close()
            self.file.close()
            if self.wandb:
                self.wandb.finish()

    def _show_scalars(self, entry: Mapping[str, Any]) -> None:
        """Give the numbers of an entry of metrics.jsonl to TensorBoard and Weights & Biases."""
        values = {tag: value for tag, value in entry.items() if tag != "step"}
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, entry["step"])
        if self.wandb:
            self.wandb.log(values, step=entry["step"])

    def _check_tags(self, tags: Iterable[str]) -> None:
        for tag in tags:
            if tag not in self.tags:
                raise KeyError(f"tag '{tag}' is not in runlog.TAGS: add it there with its unit")


def start_wandb(folder: Path, settings: Mapping[str, Any]) -> Any:
    """Begin the run of a run folder at Weights & Biases, or go on with it; return wandb's run.

    wandb's own variables choose project (WANDB_PROJECT), account and mode: WANDB_MODE=offline keeps
    everything in the folder, for `wandb sync`. Of a step that a resumed run makes again, wandb
    keeps the first numbers; metrics.jsonl and TensorBoard keep the last.

    Args:
        folder: run folder; the file wandb_id in it names the run at Weights & Biases.
        settings: the run's configuration.
    """
    import wandb

    path = folder / "wandb_id"
    if not path.is_file():
        write_text(path, uuid.uuid4().hex)
    return wandb.init(
        dir=str(folder),
        project=os.environ.get("WANDB_PROJECT", "igd_ds"),
        name=folder.resolve().name,
        id=path.read_text(encoding="utf-8"),
        resume="allow",
        config=dict(settings),
    )


def mark_of(path: Path, size: int) -> dict[str, Any]:
    """Return the SHA-256 of the first `size` bytes of a file, and how many of them there are."""
    content = path.read_bytes()[:size] if path.is_file() else b""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def drop_entries_after(path: Path, step: int, validated: int | None = None) -> list[dict[str, Any]]:
    """Rewrite a `metrics.jsonl` without the entries after `step`, atomically.

    A last line that was cut off when a process was killed is dropped too. Other damaged lines are
    dropped with a warning.

    Args:
        path: the file; it may be missing.
        step: the last step to keep.
        validated: the last step whose validation is kept; None keeps all.

    Returns:
        The entries that are kept.
    """
    if not path.exists():
        return []

    kept, text = [], b""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        entry = _entry(line)
        if entry is None:
            if line.endswith(b"\n"):
                print(f"warning: {path}, line {number} is damaged and is dropped", flush=True)
            continue
        is_validation = any(tag.startswith("valid/") for tag in entry)
        bound = step if validated is None or not is_validation else min(step, validated)
        if entry["step"] <= bound:
            kept.append(entry)
            text += line.rstrip(b"\n") + b"\n"

    write_text(path, text.decode())
    return kept


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl as {"step": …, tag: number, …}, or None if it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    is_entry = isinstance(entry, dict) and isinstance(entry.get("step"), int)
    numbers = is_entry and all(isinstance(value, (int, float)) for value in entry.values())
    return entry if numbers else None


def peak_memory_gib() -> float:
    """Return this process's peak memory in GiB: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
