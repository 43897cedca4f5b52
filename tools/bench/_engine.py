"""A DeepSpeed engine as igd_ds makes it, for benchmarks: one process, CPU, fp32, ZeRO stage 0."""

import logging
from typing import Any

import torch

from igd_ds import distributed
from igd_ds.config.training import LoopOptions
from igd_ds.engine.build import initialize


def loop_options(learning_rate: float, max_grad_norm: float) -> LoopOptions:
    """Return the settings of a training with a constant learning rate and no weight decay."""
    return LoopOptions(
        ds_config="",
        dataset="",
        output_dir="",
        learning_rate=learning_rate,
        schedule="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=max_grad_norm,
    )


def make_engine(
    model: torch.nn.Module, options: LoopOptions, micro_batch: int, accumulation: int = 1
) -> Any:
    """Wrap a model in an engine that makes one update per `accumulation` micro-batches."""
    if not torch.distributed.is_initialized():
        distributed.init()
    logging.disable(logging.WARNING)  # DeepSpeed's lines at start would hide the tables
    ds = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": options.max_grad_norm,
        "zero_optimization": {"stage": 0},
        "steps_per_print": 10**9,
    }
    return initialize(model, options, ds, num_steps=1000)
