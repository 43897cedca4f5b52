"""Loading a checkpoint on another number of ranks than saved it.

ZeRO deals the optimizer's states to the ranks, so a checkpoint fits its own number of ranks only.
DeepSpeed can rewrite it as a *universal checkpoint*, one file per parameter and state, which any
number of ranks of the same ZeRO stage can read.
"""

import argparse
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from igd_ds import distributed
from igd_ds.errors import UsageError
from igd_ds.folders import temporary_name

NAME = "universal"
"""Name of the temporary folder beside the checkpoints, before `.tmp-PID`."""

PATTERN_CHARACTERS = frozenset("*?[]{}()+|^$\\")
"""Characters of a path that DeepSpeed takes for a glob pattern or a regular expression."""


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """Yield a path to `folder` that DeepSpeed cannot take for a pattern: a link where it must be.

    DeepSpeed looks for its files with glob, so it finds nothing below a folder called `run[1]`.
    """
    if not PATTERN_CHARACTERS & set(str(folder)):
        yield folder
        return

    with tempfile.TemporaryDirectory(prefix="igd-ds-") as place:
        link = Path(place) / "checkpoints"
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


def load_on_other_ranks(engine: Any, checkpoint: Path) -> None:
    """Load a checkpoint that another number of ranks saved at the same ZeRO stage (1, 2 or 3).

    Weights, optimizer and schedule continue. The checkpoint itself is only read. Every rank must
    call it.

    Raises:
        UsageError: this engine cannot load a universal checkpoint, or the disk is too small.
    """
    _check_engine(engine)
    optimizer = engine.optimizer.optimizer  # AdamW itself, within ZeRO's
    decays = [group["weight_decay"] for group in optimizer.param_groups]

    with _converted(checkpoint, engine.zero_optimization_stage()) as converted:
        # The setting `checkpoint.load_universal` of the DeepSpeed file, for this one call.
        engine._config.load_universal_checkpoint = True
        try:
            with plain_path(converted.parent) as folder:
                loaded, _ = engine.load_checkpoint(str(folder), tag=converted.name)
        finally:
            engine._config.load_universal_checkpoint = False
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load the universal checkpoint of {checkpoint}")

    # At stage 3 DeepSpeed gives all groups the settings of the first one, and one tensor with the
    # number of the step, which AdamW would then count up once for each group. At all stages that
    # tensor is left on the CPU.
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for parameter, state in optimizer.state.items():
        state["step"] = state["step"].to(parameter.device, copy=True)


def _check_engine(engine: Any) -> None:
    """Raise UsageError, on every rank, if the engine cannot load a universal checkpoint."""
    if engine.zero_nvme_offload_optimizer():
        raise UsageError(
            "the optimizer's states lie on NVMe, where each rank keeps its own: resume on as many "
            "ranks as saved the checkpoint"
        )
    if engine.zero_optimization_stage() == 3:
        return

    # DeepSpeed's loader fails on a rank that holds only the padding of a small parameter group.
    zero = engine.optimizer  # with bf16 and gradients in fp32, stage 1 has an optimizer of its own
    groups = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
    empty = any(all(param._hp_mapping is None for param in group) for group in groups)
    if distributed.any_rank(empty):
        raise UsageError(
            f"{distributed.world_size()} ranks are too many for this small model: one of them "
            "would hold no parameter of a group, which DeepSpeed cannot load; resume on fewer ranks"
        )


@contextlib.contextmanager
def _converted(checkpoint: Path, stage: int) -> Iterator[Path]:
    """Yield a universal checkpoint, made by rank 0 in a temporary folder that is removed after."""
    distributed.say(
        f"{checkpoint.name} was saved by another number of ranks; converting it for "
        f"{distributed.world_size()}"
    )
    # Only rank 0's process id is in the name.
    place = Path(distributed.on_main(lambda: str(temporary_name(checkpoint.parent / NAME))))
    converted = place / checkpoint.name
    try:
        distributed.on_main(lambda: _convert(checkpoint, converted, stage))
        yield converted
        distributed.barrier()  # every rank has read it
    finally:
        if distributed.is_main():
            shutil.rmtree(place, ignore_errors=True)


def _convert(checkpoint: Path, converted: Path, stage: int) -> None:
    """Write the universal checkpoint of `checkpoint` to `converted`. Rank 0 only."""
    from deepspeed.checkpoint import ds_to_universal

    place = converted.parent
    shutil.rmtree(place, ignore_errors=True)  # of a killed process that had our number
    place.mkdir()
    # Both the fragments and the merged states are there at the same time.
    needed = 2 * sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UsageError(
            f"{checkpoint.parent}: {free / 2**30:.2f} GiB free, but converting {checkpoint.name} "
            f"for another number of ranks needs about {needed / 2**30:.2f} GiB; free space"
        )

    with plain_path(checkpoint.parent) as source, open(os.devnull, "w") as nowhere:
        arguments = argparse.Namespace(
            input_folder=str(source / checkpoint.name),
            output_folder=str(source / place.name / converted.name),
            num_extract_workers=1,  # more would fork this process, which has threads
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=stage < 3,
        )
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            ds_to_universal.main(arguments)
