"""Checkpoints that are whole or not seen, and how a run resumes from them.

DeepSpeed writes its own files; a manifest written last makes the checkpoint count. DeepSpeed's
`latest` file is not used, because it can name a torn checkpoint: no barrier comes before it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from igd_ds import distributed
from igd_ds.errors import UsageError
from igd_ds.folders import write_json

MANIFEST = "manifest.json"

STATE_BYTES_PER_PARAMETER = 16
"""AdamW's two moments and the master copy in fp32, plus weights in at most fp32."""


def check_disk_space(run: Path, trained_parameters: int, keep_checkpoints: int) -> None:
    """Raise UsageError if the disk of `run` cannot hold the checkpoints and the model."""
    needed = STATE_BYTES_PER_PARAMETER * trained_parameters * (keep_checkpoints + 1)
    needed += 4 * trained_parameters * 2

    folders = [run / "checkpoints", run / "model"]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    there = sum(path.stat().st_size for path in files)

    free = shutil.disk_usage(run).free
    if free < needed - there:
        raise UsageError(
            f"--output_dir {run}: {free / 2**30:.2f} GiB free, but {keep_checkpoints} checkpoints "
            "and "
            f"the model need about {(needed - there) / 2**30:.2f} GiB more; free space or lower "
            "--keep_checkpoints"
        )


def save_checkpoint(
    engine: Any,
    folder: Path,
    state: dict[str, Any],
    keep_checkpoints: int,
    without_frozen: bool,
) -> None:
    """Save `folder/step-N` and remove all but the newest checkpoints. Every rank must call it.

    Args:
        engine: DeepSpeed engine.
        folder: RUN/checkpoints.
        state: the loop's own state as JSON values, with its `step`; it goes into the manifest.
        keep_checkpoints: how many to keep.
        without_frozen: leave out parameters that are not trained (the base of an adapter).
    """
    checkpoint = folder / tag_of(state["step"])
    # An interrupted save may have left something there.
    distributed.on_main(lambda: shutil.rmtree(checkpoint, ignore_errors=True))
    engine.save_checkpoint(
        str(folder),
        tag=checkpoint.name,
        save_latest=False,
        exclude_frozen_parameters=without_frozen,
    )
    distributed.barrier()

    def finish() -> None:
        files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
        manifest = {
            "world_size": distributed.world_size(),
            "trained": trained_names(engine),
            "files": {str(path.relative_to(checkpoint)): path.stat().st_size for path in files},
            "state": state,
        }
        write_json(checkpoint / MANIFEST, manifest)
        for old in sorted(folder.glob("step-*"))[:-keep_checkpoints]:
            shutil.rmtree(old)

    distributed.on_main(finish)


def update_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace the loop's state in the checkpoint of that step; DeepSpeed's files stay.

    Every rank must call it.
    """
    path = folder / tag_of(state["step"]) / MANIFEST
    distributed.on_main(lambda: write_json(path, json.loads(path.read_text()) | {"state": state}))


def tag_of(step: int) -> str:
    """Return the folder name of the checkpoint at a step."""
    return f"step-{step:08d}"


def trained_names(engine: Any) -> list[str]:
    """Return the names of the parameters that training changes, in order."""
    named = engine.module.named_parameters()
    return [name for name, parameter in named if parameter.requires_grad]


def newest_checkpoint(folder: Path) -> str | None:
    """Return the tag of the newest whole checkpoint, or None. Rank 0 only.

    Checkpoints that are not whole are removed with a warning.

    Raises:
        UsageError: that checkpoint was saved by another number of ranks; ZeRO's states cannot be
            dealt anew as they are.
    """
    checkpoints = sorted(folder.glob("step-*"), reverse=True)
    whole = [path for path in checkpoints if _is_whole(path)]
    if whole:
        saved_by = json.loads((whole[0] / MANIFEST).read_text())["world_size"]
        if saved_by != distributed.world_size():
            raise UsageError(
                f"{whole[0]} was saved by {saved_by} ranks, this run has "
                f"{distributed.world_size()}: "
                f"resume on {saved_by} ranks, or train a new run from the model/ that this one left"
            )

    for path in checkpoints:
        if path not in whole:
            print(
                f"warning: checkpoint {path.name} is not complete (the process was probably "
                "stopped "
                "while writing it) and is removed",
                flush=True,
            )
            shutil.rmtree(path)
    return whole[0].name if whole else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether the manifest is there and all files have the sizes that it names."""
    if not (checkpoint / MANIFEST).is_file():
        return False
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
        for name, size in files.items()
    )


def load_checkpoint(engine: Any, folder: Path, tag: str, without_frozen: bool) -> dict[str, Any]:
    """Load a whole checkpoint (weights, optimizer, schedule) into the engine.

    Returns:
        The loop's state at that step.

    Raises:
        UsageError: the checkpoint holds other trained parameters than the engine.
    """
    manifest = json.loads((folder / tag / MANIFEST).read_text())
    if manifest["trained"] != trained_names(engine):
        raise UsageError(
            f"{folder / tag} holds other trained parameters than this model has; start a new run"
        )
    # Frozen weights are not in it and quantised ones never load strictly, hence the check above.
    loaded, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not without_frozen)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load {folder / tag}")
    return manifest["state"]
