"""The run folder: who may write to it, and what it records about where the run happens."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

import igd_ds
from igd_ds.config.options import current_names
from igd_ds.config.training import LoopOptions
from igd_ds.errors import UsageError
from igd_ds.folders import claim, differing, write_json, write_text

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
"""Settings that may change when a run resumes: paths, whose content is checked, and settings
without effect on the model."""

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "numpy")


def claim_run_folder(run: Path, options: LoopOptions, ds: dict[str, Any], world_size: int) -> None:
    """Create a run folder with its settings, or check that it is this very run being resumed.

    A folder whose run never came to its first step (no metrics.jsonl) is free to be claimed again.
    Rank 0 only.

    Args:
        run: RUN.
        options: the configuration that config.yaml records.
        ds: the resolved DeepSpeed configuration; {} for a run without DeepSpeed.
        world_size: number of ranks.

    Raises:
        UsageError: the folder holds another run, a run that shall not be resumed, or other files.
    """
    is_claimed = claim(run, "config.yaml", "--output_dir", "run")
    settings = json.loads(json.dumps(dataclasses.asdict(options)))
    if is_claimed and (run / "metrics.jsonl").is_file():
        _check_same_run(run, options, settings, ds)
        return

    # config.yaml comes first: from here on the folder is claimed.
    write_text(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    shutil.rmtree(run / "catalogue", ignore_errors=True)
    (run / "checkpoints").mkdir(exist_ok=True)
    write_json(run / "ds_config.json", ds)
    write_json(run / "env.json", environment(world_size))


def _check_same_run(
    run: Path, options: LoopOptions, settings: dict[str, Any], ds: dict[str, Any]
) -> None:
    if options.resume != "auto":
        raise UsageError(
            f"--output_dir {run} holds a run already; give another folder, or --resume auto to go "
            "on "
            "with it"
        )
    # Accumulation follows from the number of ranks, and the checkpoint checks that.
    free = {"gradient_accumulation_steps": None}
    old = current_names(type(options), yaml.safe_load((run / "config.yaml").read_text()))
    old["ds_config"] = json.loads((run / "ds_config.json").read_text()) | free
    new = settings | {"ds_config": ds | free}

    if changed := differing(old, new, but=FREE_ON_RESUME):
        raise UsageError(
            f"--output_dir {run} belongs to another run; these settings differ: "
            f"{', '.join(changed)}"
        )


def environment(world_size: int) -> dict[str, Any]:
    """Describe where a run happens: versions, git commit, processes, hardware."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions | {"python": platform.python_version()},
        "igd_ds": {"version": igd_ds.__version__, "commit": _commit()},
        "world_size": world_size,
        "hardware": {"cpus": os.cpu_count(), "gpu": gpu},
        "command": sys.argv,
    }


def _commit() -> str:
    """Return the checkout's commit; "" for an installed package, or where there is no git."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
