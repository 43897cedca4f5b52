"""Rank 0's record of a run: its folder, TensorBoard and `metrics.jsonl`. All tags and their units are named here."""

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import string
import subprocess
import sys
from pathlib import Path

import torch
import yaml

import igd_ds
from igd_ds.errors import UsageError
from igd_ds.folders import write_json, write_text

# Settings that may change when a run is resumed: where things lie (their content is checked) and what is only recorded.
FREE_ON_RESUME = {
    "resume",
    "output_dir",
    "dataset",
    "log_every",
    "keep_checkpoints",
    "save_every",
    "splits",
    "save_scores",
}
TAGS = {
    "train/loss": "nats: the step's objective, Σ w·NLL / Ω where there is one target, mean over the logged steps; of a baseline "
    "its own loss, mean over those steps' targets",
    **{
        f"train/loss_{name}": f"nats per unit of weight: target {name} of multi-target"
        for name in ("fg", "fr", "or")
    },
    **{
        f"train/alpha_{name}": f"share of target {name} in the loss, 0 to 1 (MTC Figure 5)"
        for name in ("fg", "fr", "or")
    },
    "train/nll": "nats per token: unweighted mean over the step's target tokens",
    "train/nll_zero_gain": "nats per token: mean over target tokens with zero information gain (IGD Figures 2, 5)",
    "train/nll_nonzero_gain": "nats per token: mean over target tokens with non-zero information gain",
    "train/zero_gain_weight_share": "share of Ω that lies on zero-gain tokens, 0 to 1",
    "train/learning_rate": "AdamW's learning rate of the step",
    "train/grad_norm": "L2 norm of the gradient before clipping",
    "train/epoch": "epochs, fractional",
    "speed/target_tokens_per_second": "labelled tokens per second, all ranks",
    "speed/tokens_per_second": "prompt and target tokens per second, padding excluded, all ranks",
    "speed/rows_per_second": "training rows per second, all ranks",
    "speed/memory_gib": "peak memory of rank 0 in GiB: GPU memory where there is one, else resident memory",
    "valid/nll": "nats per item: unweighted negative log-likelihood summed over the item's tokens",
    "valid/nll_per_token": "nats per token: the same, per target token",
    "valid/nll_gain_zero": "nats per token: mean over validation target tokens with zero information gain",
    **{
        f"valid/nll_gain_{i}": f"the same, decile {i} of the non-zero gains of training-target tokens (IGD Figure 4)"
        for i in range(10)
    },
    "valid/ndcg@10": "NDCG@10 of a beam search with 10 beams, α = 0; of a baseline, of its full ranking",
    "quantizer/loss": "reconstruction + codebook loss + commitment, mean over the epoch; igd ids",
    "quantizer/reconstruction": "mean squared error over the embeddings' variance: 0 is exact, 1 no better than their mean",
    "quantizer/commitment": "squared distance of a level's input to its code, mean over entries and levels, unweighted",
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
        f"eval/{metric}@{k}": f"{metric.upper()}@{k}, token match; step = 1000·α"
        for metric in ("hr", "ndcg")
        for k in (1, 3, 5, 10, 20)
    },
    "eval/alpha_grid": "figure: HR@10 and NDCG@10, token match, over α",
    "eval/popularity_deciles": "figure: share of the top 10 in each tenth of the catalogue by training count (MTC Figure 2)",
    "eval/prefix_entropy": "figure: entropy in nats of lists' prefixes minus targets', after each token (IGD Figures 3, 6, 8)",
    "eval/lists": "text: history, target and first 5 entries of a few rows; step = 1000·α",
}
# TensorBoard's tab Custom Scalars: category → chart → the tags that begin with, or are, one of these regular expressions.
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


class RunLog:
    """Write scalars, figures and texts of a run; does nothing unless `enabled` (rank 0).

    Args:
        folder: run folder; `metrics.jsonl` and `tensorboard/` lie in it.
        enabled: whether this process writes.
        resume_step: drop entries after this step first, so that a resumed run's record has each step once; None: keep all.
    """

    def __init__(self, folder: Path, enabled: bool, resume_step: int | None = None):
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(folder) / "metrics.jsonl"
        if resume_step is not None:
            drop_entries_after(self.path, resume_step)
        self.writer = SummaryWriter(
            str(Path(folder) / "tensorboard"),
            purge_step=None if resume_step is None else resume_step + 1,
        )
        if not resume_step:
            self.writer.add_custom_scalars(LAYOUT)
        self.file = open(self.path, "a")  # noqa: SIM115  open for the run's length, closed by close()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` (tag → number) at an optimizer step. Raises KeyError for a tag that TAGS does not name."""
        check_tags(values)
        if not self.enabled:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def show(self, step: int, views: dict) -> None:
        """Show `views` (tag → matplotlib figure, or text in Markdown) in TensorBoard alone. Raises KeyError as `log` does."""
        check_tags(views)
        if not self.enabled:
            return
        for tag, view in views.items():
            (self.writer.add_text if isinstance(view, str) else self.writer.add_figure)(
                tag, view, step
            )

    def hparams(self, settings: dict, metrics: dict[str, float]) -> None:
        """Record final metrics for TensorBoard's hparams table, in the row of the run that has these settings (its config.yaml).

        They lie in a folder of their own, because every scalar beside the settings becomes a column. A training and its
        evaluations each write theirs: TensorBoard joins what has the same trial, here the run's --output_dir.
        """
        if not self.enabled:
            return
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from torch.utils.tensorboard import SummaryWriter

        known = {key: value for key, value in settings.items() if value is not None}
        known = {
            key: value if isinstance(value, (int, float, str)) else str(value)
            for key, value in known.items()
        }
        with SummaryWriter(f"{self.writer.log_dir}/hparams") as writer:
            writer.file_writer.add_summary(hparams_pb(known, trial_id=settings.get("output_dir")))
            for name, value in metrics.items():
                writer.add_scalar(name, value)

    def close(self) -> None:
        """Flush and close both records."""
        if self.enabled:
            self.writer.close()
            self.file.close()


def check_tags(tags) -> None:
    """Raise KeyError for a tag that TAGS does not name."""
    for tag in tags:
        if tag not in TAGS:
            raise KeyError(f"tag '{tag}' is not in runlog.TAGS: add it there with its unit")


def drop_entries_after(path: Path, step: int) -> None:
    """Rewrite a `metrics.jsonl` without the entries after `step` and without a last line that was cut off; atomic."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break  # a kill cut the last line off
        if entry["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def claim_run_folder(run: Path, settings: dict, ds: dict, world_size: int) -> None:
    """Create a run folder with its settings, or check that it is this very run being resumed; ValueError otherwise.

    A folder whose run never came to its first step (no metrics.jsonl) is free to be claimed again.
    """
    saved = run / "config.yaml"
    if saved.is_file() and (run / "metrics.jsonl").is_file():
        if settings["resume"] != "auto":
            raise UsageError(
                f"--output_dir {run} holds a run already; give another folder, or --resume auto to go on with it"
            )
        # Accumulation follows from the number of ranks, and that is the checkpoint's to check.
        old_ds = json.loads((run / "ds_config.json").read_text()) | {
            "gradient_accumulation_steps": None
        }
        old = yaml.safe_load(saved.read_text()) | {"ds_config": old_ds}
        new = settings | {"ds_config": ds | {"gradient_accumulation_steps": None}}
        changed = [key for key in new if key not in FREE_ON_RESUME and old.get(key) != new[key]]
        if changed:
            raise UsageError(
                f"--output_dir {run} belongs to another run; these settings differ: {', '.join(changed)}"
            )
        return
    if run.exists() and any(run.iterdir()) and not saved.is_file():
        raise UsageError(f"--output_dir {run} is not empty and not a run folder; give a new folder")
    run.mkdir(parents=True, exist_ok=True)
    write_text(
        saved, yaml.safe_dump(settings, sort_keys=False)
    )  # first: from here on the folder is a claim
    shutil.rmtree(run / "catalogue", ignore_errors=True)
    (run / "checkpoints").mkdir(exist_ok=True)
    write_json(run / "ds_config.json", ds)
    write_json(run / "env.json", environment(world_size))


def peak_memory_gib() -> float:
    """Return this process' peak memory in GiB: the GPU's where there is one, else what was resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def environment(world_size: int) -> dict:
    """Describe where a run happens: versions, git commit, processes, hardware."""
    packages = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "numpy")
    try:
        describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        commit = ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
        "igd_ds": {"version": igd_ds.__version__, "commit": commit},
        "world_size": world_size,
        "hardware": {"cpus": os.cpu_count(), "gpu": gpu},
        "command": sys.argv,
    }
