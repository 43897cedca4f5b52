"""The run folder: who may write to it, and what it records about where the run happens."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
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
    "trust_checkpoint",
    "output_dir",
    "dataset",
    "log_every",
    "report_to",
    "keep_checkpoints",
    "save_every",
    "splits",
    "save_scores",
    "timeout",
    "master_port",
    "quiet",
}
"""Settings that may change when a run resumes: paths, whose content is checked, and settings
without effect on the model."""

BEFORE_RECORDED = {"exclude_seen": "no", "renormalise": False, "coverage": 1.0}
"""What runs and evaluations did before they recorded it."""

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "numpy")


def claim_run_folder(
    run: Path,
    options: LoopOptions,
    ds: dict[str, Any],
    world_size: int,
    content: Mapping[str, Any] | None = None,
) -> None:
    """Create a run folder with its settings, or check that it is this very run being resumed.

    A folder whose run never came to its first step is free to be claimed again. Rank 0 only.

    Args:
        run: RUN.
        options: the configuration that config.yaml records.
        ds: the resolved DeepSpeed configuration; {} for a run without DeepSpeed.
        world_size: number of ranks.
        content: setting → what its file holds, or a hash of it, as JSON values; for settings whose
            file's path alone does not say what the run reads.

    Raises:
        UsageError: the folder holds another run, a run that shall not be resumed, or other files.
    """
    is_claimed = claim(run, "config.yaml", "--output_dir", "run")
    settings = json.loads(json.dumps(dataclasses.asdict(options)))
    if is_claimed and _is_begun(run):
        _check_same_run(run, options, settings, ds, world_size)
        _check_same_content(run, content or {})
        return
    if is_claimed:
        _refuse_foreign_config(run, settings)

    # config.yaml comes first: from here on the folder is claimed.
    write_text(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    shutil.rmtree(run / "catalogue", ignore_errors=True)
    (run / "checkpoints").mkdir(exist_ok=True)
    if content is not None:
        write_json(run / "inputs.json", dict(content))
    write_json(run / "ds_config.json", ds)
    write_json(run / "env.json", environment(world_size))


def with_defaults(cls: type, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a config.yaml, with those that are newer than its run.

    An earlier version behaved as most defaults do; BEFORE_RECORDED has the exceptions. Lists stand
    for tuples, as in files.

    Args:
        cls: the configuration that the settings belong to.
        recorded: the content of the config.yaml; it may use former names.
    """
    entries = [e for e in dataclasses.fields(cls) if e.default is not dataclasses.MISSING]
    defaults = json.loads(json.dumps({entry.name: entry.default for entry in entries}))
    before = {name: value for name, value in BEFORE_RECORDED.items() if name in defaults}
    return defaults | before | current_names(cls, recorded)


def _is_begun(run: Path) -> bool:
    """Whether a run came to its first step: each of these files alone says so, should one be lost.

    The log is opened before the first step.
    """
    traces = [run / "metrics.jsonl", run / "summary.json", *run.glob("checkpoints/step-*")]
    return any(path.exists() for path in traces)


def _refuse_foreign_config(run: Path, settings: dict[str, Any]) -> None:
    """Raise UsageError if config.yaml is not a run's: those have every setting, others' do not."""
    there = _read_record(run / "config.yaml", yaml.safe_load)
    if missing := [name for name in settings if name not in there]:
        raise UsageError(
            f"--output_dir {run} is not empty, and its config.yaml is not that of such a run (it "
            f"lacks {missing[0]}): give a new folder"
        )


def _check_same_run(
    run: Path,
    options: LoopOptions,
    settings: dict[str, Any],
    ds: dict[str, Any],
    world_size: int,
) -> None:
    """Raise UsageError unless the run in the folder has these settings and may be resumed."""
    if options.resume != "auto":
        raise UsageError(
            f"--output_dir {run} holds a run already; give another folder, or --resume auto to go "
            "on with it"
        )
    old = with_defaults(type(options), _read_record(run / "config.yaml", yaml.safe_load))
    old_ds = _read_record(run / "ds_config.json", json.loads)
    begun_by = _read_record(run / "env.json", json.loads).get("world_size")

    # The message of the stage says why; the others are listed.
    stages = [config.get("zero_optimization", {}).get("stage", 0) for config in (old_ds, ds)]
    if stages[0] != stages[1]:
        raise UsageError(
            f"--output_dir {run} was begun at ZeRO stage {stages[0]}, and --ds_config now says "
            f"stage {stages[1]}: a checkpoint can go to other numbers of ranks, but not to another "
            f"stage; use stage {stages[0]}"
        )

    # Accumulation follows from the number of ranks, and so may the micro-batch.
    free = {"gradient_accumulation_steps"}
    if world_size != begun_by and settings.get("normalization") != "per_batch":
        free.add("train_micro_batch_size_per_gpu")
    changed = differing(old, settings, but={*FREE_ON_RESUME, "ds_config"})
    changed += _differing_ds(old_ds, ds, free)
    if changed:
        raise UsageError(
            f"--output_dir {run} belongs to another run; these settings differ: "
            f"{', '.join(changed)}"
        )

    if not (run / "metrics.jsonl").is_file():
        print(f"warning: {run / 'metrics.jsonl'} is missing; the log begins anew", flush=True)


def _check_same_content(run: Path, content: Mapping[str, Any]) -> None:
    """Raise UsageError if a file that a setting names holds something else than in the beginning.

    Runs of earlier versions did not record it.
    """
    path = run / "inputs.json"
    if not path.is_file():
        return
    there, now = _read_record(path, json.loads), json.loads(json.dumps(content))
    if changed := differing(there, {name: now[name] for name in there if name in now}):
        raise UsageError(
            f"--output_dir {run}: the content of {', '.join(f'--{name}' for name in changed)} has "
            "changed since the run was begun: restore it, or give a new --output_dir"
        )


def _read_record(path: Path, load: Callable[[str], Any]) -> dict[str, Any]:
    """Read a record of a run.

    Raises:
        UsageError: it is missing or damaged.
    """
    try:
        record = load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, yaml.YAMLError) as error:
        problem = str(error).partition("\n")[0]
    else:
        if isinstance(record, dict):
            return record
        problem = "it holds no settings"
    raise UsageError(
        f"{path} is missing or damaged ({problem}), so nothing says which run this is: restore "
        "it, or give a new --output_dir"
    )


def _differing_ds(old: dict[str, Any], new: dict[str, Any], free: set[str]) -> list[str]:
    """Describe the keys of two DeepSpeed configurations whose values differ."""
    before, now = dict(_flat(old)), dict(_flat(new))
    keys = sorted((before.keys() | now.keys()) - free)
    return [
        f"ds_config: {key} ({before.get(key)} then, {now.get(key)} now)"
        for key in keys
        if before.get(key) != now.get(key)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested objects under dotted keys."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_summary(run: Path) -> dict[str, Any] | None:
    """Return summary.json of a finished run, or None. Rank 0 only.

    A damaged one is ignored with a warning: the last checkpoint knows what it said, so the run is
    resumed from there and writes it again.
    """
    path = run / "summary.json"
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(summary, dict) and {"dataset", "best", "step"} <= summary.keys():
            return summary
        problem = "it is not a summary"
    except ValueError as error:
        problem = str(error)
    print(f"warning: {path} is damaged ({problem}); it is written again", flush=True)
    return None


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
