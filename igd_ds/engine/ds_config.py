"""The DeepSpeed configuration file: checked, and completed with what the run owns.

The file owns ZeRO stage, offload, precision and micro-batch. The run owns global batch, optimizer,
schedule and clipping. Accumulation follows from global batch = micro-batch × accumulation × ranks.
A micro-batch larger than global batch / ranks is taken as that, so one file serves any number of
ranks.
"""

import json
from pathlib import Path
from typing import Any

import torch

from igd_ds.config.training import LoopOptions
from igd_ds.errors import UsageError, did_you_mean

# DeepSpeed ignores misspelt top-level keys silently, so this list names those that are allowed: the
# keys of its configuration page that concern training with ZeRO.
DS_KEYS = frozenset(
    [
        "train_micro_batch_size_per_gpu",
        "zero_optimization",
        "bf16",
        "fp16",
        "data_types",
        "torch_autocast",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "flops_profiler",
        "comms_logger",
        "aio",
        "checkpoint",
        "activation_checkpointing",
        "disable_allgather",
        "use_node_local_storage",
        "compile",
        "seq_parallel_communication_data_type",
    ]
)
RUN_KEYS = {
    "train_batch_size": "--global_batch_size",
    "gradient_accumulation_steps": "--global_batch_size (accumulation follows from it)",
    "gradient_clipping": "--max_grad_norm",
    "optimizer": "--learning_rate and --weight_decay",
    "scheduler": "--schedule and --warmup_ratio",
    "tensorboard": "nothing: the run folder has TensorBoard and metrics.jsonl",
    "csv_monitor": "nothing: the run folder has TensorBoard and metrics.jsonl",
}
"""Keys that belong to the run, and what to use instead."""

SHIPPED = Path(__file__).parents[1] / "ds_configs"
"""The DeepSpeed files that come with igd_ds."""

SECTIONS = ("zero_optimization", "bf16", "fp16", "data_types", "checkpoint")

DsConfig = dict[str, Any]
"""A DeepSpeed configuration as its JSON file holds it."""


def resolve_ds_config(
    options: LoopOptions, world_size: int, load_in_4bit: bool, has_gpu: bool | None = None
) -> DsConfig:
    """Read, check and complete the DeepSpeed file that `options.ds_config` names.

    Args:
        options: the run's own settings.
        world_size: number of ranks.
        load_in_4bit: whether the base weights are quantised.
        has_gpu: whether the ranks have GPUs; None: whether this machine has one.

    Returns:
        The configuration to initialise with: micro-batch, accumulation, global batch and clipping
        are filled in.

    Raises:
        UsageError: names file and key for unknown keys, "auto", settings that the run owns, batch
            sizes that do not divide, and combinations known to fail.
    """
    path = find_ds_config(options.ds_config)
    ds = _read(path)
    _check_keys(ds, path)

    micro = ds.get("train_micro_batch_size_per_gpu")
    if type(micro) is not int or micro < 1:
        raise UsageError(
            f"{path}: train_micro_batch_size_per_gpu must be a positive whole number, found "
            f"{micro!r}"
        )
    # A file for large batches serves small ones too, on any number of ranks.
    micro = max(1, min(micro, options.global_batch_size // world_size))
    if options.global_batch_size % (micro * world_size):
        raise UsageError(
            f"--global_batch_size {options.global_batch_size} is not a multiple of micro-batch "
            f"{micro} ({path}: train_micro_batch_size_per_gpu) × {world_size} ranks = "
            f"{micro * world_size}"
        )
    _check_combination(ds, path, load_in_4bit)
    has_gpu = torch.cuda.is_available() if has_gpu is None else has_gpu
    if dtype_of(ds) == torch.float16 and not has_gpu:
        raise UsageError(f"{path}: fp16 needs a GPU; use bf16 or fp32 here")

    ds["train_micro_batch_size_per_gpu"] = micro
    ds["gradient_accumulation_steps"] = options.global_batch_size // (micro * world_size)
    ds["train_batch_size"] = options.global_batch_size
    ds["gradient_clipping"] = options.max_grad_norm
    ds.setdefault("steps_per_print", 10**9)  # the run log reports the steps
    if _offload_device(ds, "offload_optimizer") != "none":
        # torch's AdamW steps on the CPU, so no compiler is needed on the machine.
        ds["zero_force_ds_cpu_optimizer"] = False
    return ds


def find_ds_config(name: str) -> Path:
    """Return the path of a DeepSpeed file: a file of this name, or one that comes with igd_ds.

    Example:
        >>> find_ds_config("zero2").name
        'zero2.json'

    Raises:
        UsageError: there is no such file; the message lists the files that come with igd_ds.
    """
    if Path(name).is_file():
        return Path(name)

    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}
    if name not in shipped:
        raise UsageError(
            f"--ds_config: no file {name}{did_you_mean(name, shipped)} (give the path of a "
            f"DeepSpeed JSON file, or one of these names: {', '.join(shipped)})"
        )
    return shipped[name]


def _read(path: Path) -> DsConfig:
    """Return the file's JSON object."""
    try:
        ds = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not JSON ({error})") from error

    if not isinstance(ds, dict) or not all(isinstance(ds.get(key, {}), dict) for key in SECTIONS):
        raise UsageError(f"{path}: the file and its {', '.join(SECTIONS)} must be JSON objects")
    return ds


def _check_keys(ds: DsConfig, path: Path) -> None:
    """Raise UsageError for a key that is unknown or the run's, and for "auto" at any depth."""
    for key in ds:
        if key in RUN_KEYS:
            raise UsageError(
                f"{path}: '{key}' belongs to the run; remove it there and use {RUN_KEYS[key]}"
            )
        if key not in DS_KEYS:
            raise UsageError(f"{path}: unknown key '{key}'{did_you_mean(key, DS_KEYS)}")

    todo = [("", ds)]
    while todo:
        prefix, node = todo.pop()
        for key, value in node.items():
            if value == "auto":
                raise UsageError(
                    f'{path}: "{prefix}{key}": "auto" would silently become DeepSpeed\'s default; '
                    "write the value"
                )
            if isinstance(value, dict):
                todo.append((f"{prefix}{key}.", value))


def _check_combination(ds: DsConfig, path: Path, load_in_4bit: bool) -> None:
    """Raise UsageError for combinations known to fail."""
    stage = ds.setdefault("zero_optimization", {"stage": 0}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UsageError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, found {stage!r}")
    if stage == 0 and dtype_of(ds) != torch.float32:
        raise UsageError(
            f"{path}: stage 0 with {dtype_of(ds)} spends AdamW's first step on a dummy update; use "
            "stage 1, also on one rank"
        )
    if ds.get("checkpoint", {}).get("load_universal"):
        raise UsageError(
            f"{path}: checkpoint.load_universal belongs to the run; remove it: --resume auto "
            "converts checkpoints of another number of ranks itself"
        )
    if load_in_4bit and _offload_device(ds, "offload_param") != "none":
        raise UsageError(
            f"{path}: zero_optimization.offload_param does not work with --load_in_4bit; remove it"
        )


def _offload_device(ds: DsConfig, key: str) -> str:
    return (ds["zero_optimization"].get(key) or {}).get("device", "none")


def dtype_of(ds: DsConfig) -> torch.dtype:
    """Return the precision of the model's weights that a DeepSpeed configuration asks for."""
    if ds.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if ds.get("fp16", {}).get("enabled") else torch.float32


def zero_stage(ds: DsConfig) -> int:
    """Return the ZeRO stage of a resolved DeepSpeed configuration."""
    return ds["zero_optimization"].get("stage", 0)
