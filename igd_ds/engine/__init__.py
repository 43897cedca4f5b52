"""The only importer of deepspeed: its JSON file checked and completed, the engine built, saved, loaded and resumed.

The DeepSpeed file owns ZeRO stage, offload, precision and micro-batch; TrainConfig owns global batch, optimizer, schedule and
clipping. Accumulation follows from global batch = micro-batch × accumulation × ranks, and a micro-batch larger than global batch
/ ranks is taken as that, so one file serves any number of ranks.
"""

import contextlib
import difflib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from igd_ds import distributed
from igd_ds.errors import UsageError
from igd_ds.folders import write_json

# DeepSpeed ignores misspelt top-level keys silently, so we know them: those of its configuration page that concern
# training with ZeRO, and those that belong to the run.
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
STATE_BYTES_PER_PARAMETER = (
    16  # AdamW's two moments and the master copy in fp32, plus weights in at most fp32
)
MANIFEST = "manifest.json"


def resolve_ds_config(config, world_size: int) -> dict:
    """Read, check and complete the DeepSpeed file of a TrainConfig.

    Returns the configuration to initialise with: micro-batch, accumulation, global batch and clipping filled in. Raises a
    ValueError that names file and key for unknown keys, "auto", settings the run owns, batch sizes that do not divide, and
    combinations known to fail.
    """
    path = Path(config.ds_config)
    if not path.is_file():
        raise UsageError(f"--ds_config: no file {path}")
    try:
        ds = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    _check_keys(ds, path)
    micro = ds.get("train_micro_batch_size_per_gpu")
    if type(micro) is not int or micro < 1:
        raise UsageError(
            f"{path}: train_micro_batch_size_per_gpu must be a positive whole number, found {micro!r}"
        )
    # A file for large batches serves small ones, and any number of ranks.
    micro = max(1, min(micro, config.global_batch_size // world_size))
    if config.global_batch_size % (micro * world_size):
        raise UsageError(
            f"--global_batch_size {config.global_batch_size} is not a multiple of micro-batch {micro} ({path}: "
            f"train_micro_batch_size_per_gpu) × {world_size} ranks = {micro * world_size}"
        )
    _check_combination(ds, config, path)
    ds["train_micro_batch_size_per_gpu"] = micro
    ds["gradient_accumulation_steps"] = config.global_batch_size // (micro * world_size)
    ds["train_batch_size"] = config.global_batch_size
    ds["gradient_clipping"] = config.max_grad_norm
    ds.setdefault("steps_per_print", 10**9)  # the run log reports the steps
    if (ds["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none":
        ds["zero_force_ds_cpu_optimizer"] = (
            False  # torch's AdamW steps on the CPU: no compiler needed on the machine
        )
    return ds


def _check_keys(ds: dict, path: Path) -> None:
    sections = ("zero_optimization", "bf16", "fp16", "data_types")
    if not isinstance(ds, dict) or not all(isinstance(ds.get(key, {}), dict) for key in sections):
        raise UsageError(
            f"{path}: the file and its zero_optimization, bf16, fp16 and data_types must be JSON objects"
        )
    for key in ds:
        if key in RUN_KEYS:
            raise UsageError(
                f"{path}: '{key}' belongs to the run; remove it there and use {RUN_KEYS[key]}"
            )
        if key not in DS_KEYS:
            near = difflib.get_close_matches(key, DS_KEYS, n=1)
            raise UsageError(
                f"{path}: unknown key '{key}'" + (f", did you mean '{near[0]}'?" if near else "")
            )
    todo = [("", ds)]
    while todo:
        prefix, node = todo.pop()
        for key, value in node.items():
            if value == "auto":
                raise UsageError(
                    f'{path}: "{prefix}{key}": "auto" would silently become DeepSpeed\'s default; write the value'
                )
            if isinstance(value, dict):
                todo.append((f"{prefix}{key}.", value))


def _check_combination(ds: dict, config, path: Path) -> None:
    stage = ds.setdefault("zero_optimization", {"stage": 0}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UsageError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, found {stage!r}")
    if stage == 0 and dtype_of(ds) != torch.float32:
        raise UsageError(
            f"{path}: stage 0 with {dtype_of(ds)} spends AdamW's first step on a dummy update; use stage 1, also on one rank"
        )
    if dtype_of(ds) == torch.float16 and not torch.cuda.is_available():
        raise UsageError(f"{path}: fp16 needs a GPU; use bf16 or fp32 here")
    offload_param = (ds["zero_optimization"].get("offload_param") or {}).get("device", "none")
    if config.load_in_4bit and offload_param != "none":
        raise UsageError(
            f"{path}: zero_optimization.offload_param does not work with --load_in_4bit; remove it"
        )


def dtype_of(ds: dict) -> torch.dtype:
    """Return the precision of the model's weights that a DeepSpeed configuration asks for."""
    if ds.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if ds.get("fp16", {}).get("enabled") else torch.float32


def zero_stage(ds: dict) -> int:
    """Return the ZeRO stage of a resolved DeepSpeed configuration."""
    return ds["zero_optimization"].get("stage", 0)


def _start_deepspeed():
    """Import deepspeed and let it adopt the process group of `distributed.init`."""
    import deepspeed

    # On CPUs DeepSpeed would compile this op at start (a minute, and a compiler); only its inference engine uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)
    return deepspeed


@contextlib.contextmanager
def loading_context(ds: dict, whole: bool):
    """Within it, transformers partitions the weights while it loads them, where the configuration says ZeRO-3.

    With `whole` it does not, and each rank holds all weights until `initialize`: quantised ones cannot be partitioned while
    loading, and PEFT reaches into the rows of added tokens.
    """
    if zero_stage(ds) == 3 and not whole:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        _start_deepspeed()
        keep_alive = HfDeepSpeedConfig(ds)  # transformers holds only a weak reference
        yield keep_alive
        unset_hf_deepspeed_config()
    else:
        yield None


def schedule_factor(config, num_steps: int) -> Callable[[int], float]:
    """Return the learning rate of update s (0, 1, …) as a share of the peak: linear warm-up, then cosine or linear to 0.

    The first update already has 1/w of the peak (w warm-up updates), the last one is above 0: no update is wasted.
    """
    warmup = math.ceil(config.warmup_ratio * num_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
        return {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }[config.schedule]

    return factor


def initialize(model, config, ds: dict, num_steps: int):
    """Wrap `model` in a DeepSpeed engine with torch AdamW (weight decay on matrices only) and the exact schedule."""
    deepspeed = _start_deepspeed()
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    chosen = {id(p) for p in matrices}
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if id(p) not in chosen], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,
    )
    factor = schedule_factor(config, num_steps)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda basic: torch.optim.lr_scheduler.LambdaLR(basic, factor),
        config=ds,
    )
    return engine


def check_disk_space(run: Path, trained_parameters: int, keep_checkpoints: int) -> None:
    """Raise ValueError if the disk of `run` cannot hold the checkpoints and the model this run will write."""
    needed = (
        STATE_BYTES_PER_PARAMETER * trained_parameters * (keep_checkpoints + 1)
        + 4 * trained_parameters * 2
    )
    there = sum(
        path.stat().st_size
        for name in ("checkpoints", "model")
        for path in (run / name).rglob("*")
        if path.is_file()
    )
    free = shutil.disk_usage(run).free
    if free < needed - there:
        raise UsageError(
            f"--output_dir {run}: {free / 2**30:.2f} GiB free, but {keep_checkpoints} checkpoints and the model need about "
            f"{(needed - there) / 2**30:.2f} GiB more; free space or lower --keep_checkpoints"
        )


def save_checkpoint(engine, folder: Path, state: dict, config) -> None:
    """Save a checkpoint that is either whole or not seen: `folder/step-N` with a manifest of file sizes, written last.

    Every rank must call it. `state` (with the `step`) is the loop's own; it lies in the manifest. DeepSpeed's `latest` file can
    name a torn checkpoint (no barrier comes before it), so it is not used: a checkpoint counts when its manifest is there and
    matches. Then all but the newest `config.keep_checkpoints` go.
    """
    tag = tag_of(state)
    distributed.on_main(
        lambda: shutil.rmtree(folder / tag, ignore_errors=True)
    )  # what an interrupted save left
    engine.save_checkpoint(
        str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=bool(config.lora_r)
    )
    distributed.barrier()

    def finish() -> None:
        files = {
            str(p.relative_to(folder / tag)): p.stat().st_size
            for p in sorted((folder / tag).rglob("*"))
            if p.is_file()
        }
        manifest = {
            "world_size": distributed.world_size(),
            "trained": trained_names(engine),
            "files": files,
            "state": state,
        }
        write_json(folder / tag / MANIFEST, manifest)
        for old in sorted(folder.glob("step-*"))[: -config.keep_checkpoints]:
            shutil.rmtree(old)

    distributed.on_main(finish)


def update_state(folder: Path, state: dict) -> None:
    """Replace the loop's state in the checkpoint of `state`'s step; what DeepSpeed saved stays. Every rank must call it."""
    path = folder / tag_of(state) / MANIFEST
    distributed.on_main(lambda: write_json(path, json.loads(path.read_text()) | {"state": state}))


def tag_of(state: dict) -> str:
    """Return the folder name of the checkpoint at a state's step."""
    return f"step-{state['step']:08d}"


def trained_names(engine) -> list[str]:
    """Return the names of the parameters that training changes, in order."""
    return [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def newest_checkpoint(folder: Path) -> str | None:
    """Return the tag of the newest whole checkpoint, or None. Those that are not whole are removed, and it says so. Rank 0 only.

    Raises ValueError if that checkpoint was saved by another number of ranks: ZeRO's states cannot be dealt anew as they are.
    """
    tags = sorted(folder.glob("step-*"), reverse=True)
    whole = [path for path in tags if _is_whole(path)]
    if whole:
        saved_by = json.loads((whole[0] / MANIFEST).read_text())["world_size"]
        if saved_by != distributed.world_size():
            raise UsageError(
                f"{whole[0]} was saved by {saved_by} ranks, this run has {distributed.world_size()}: resume on {saved_by} ranks, "
                "or train a new run from the model/ that this one left"
            )
    for path in (path for path in tags if path not in whole):
        print(
            f"warning: checkpoint {path.name} was not whole (cut off while it was written?) and is removed",
            flush=True,
        )
        shutil.rmtree(path)
    return whole[0].name if whole else None


def _is_whole(checkpoint: Path) -> bool:
    if not (checkpoint / MANIFEST).is_file():
        return False
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
        for name, size in files.items()
    )


def load_checkpoint(engine, folder: Path, tag: str, config) -> dict:
    """Load a whole checkpoint (weights, optimizer, schedule) into the engine and return the loop's state at that step.

    Raises ValueError if the checkpoint holds other trained parameters than the engine.
    """
    manifest = json.loads((folder / tag / MANIFEST).read_text())
    if manifest["trained"] != trained_names(engine):
        raise UsageError(
            f"{folder / tag} holds other trained parameters than this model has; start a new run"
        )
    # Frozen weights are not in it and quantised ones never load strictly, hence the check above.
    loaded, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not config.lora_r)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load {folder / tag}")
    return manifest["state"]


def save_model(engine, folder: Path, lora: bool, extras: Callable[[Path], None]) -> None:
    """Save weights or adapter so that `from_pretrained` or PEFT load them without DeepSpeed, from any ZeRO stage; atomic.

    Every rank must call it. `extras(folder)` adds tokenizer, catalogue and description on rank 0 before the folder is renamed.
    """
    module, weights = engine.module, None
    if engine.zero_optimization_stage() == 3:
        # A plain save_pretrained would silently write tensors of shape (0,).
        weights = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=lora)

    def save() -> None:
        temporary, old = (
            folder.with_name(f"{folder.name}.tmp"),
            folder.with_name(f"{folder.name}.old"),
        )
        shutil.rmtree(temporary, ignore_errors=True)
        # PEFT would add the whole embedding of a base that was resized; the rows of added tokens are in the adapter anyway.
        module.save_pretrained(
            temporary, state_dict=weights, **({"save_embedding_layers": False} if lora else {})
        )
        extras(temporary)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    distributed.on_main(save)
