"""The DeepSpeed engine around a model: loading under ZeRO-3, optimizer and schedule."""

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from igd_ds import distributed
from igd_ds.config.training import LoopOptions
from igd_ds.engine.ds_config import DsConfig, zero_stage

LOG = "deepspeed.log"
"""In RUN: what DeepSpeed reports of itself on rank 0."""


def _start_deepspeed() -> Any:
    """Import deepspeed and let it adopt the process group of `distributed.init`."""
    import deepspeed

    # On CPUs DeepSpeed would compile this op at start (a minute, and a compiler); only its
    # inference engine uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)
    return deepspeed


def keep_log(run: Path) -> None:
    """Let DeepSpeed report to RUN/deepspeed.log; the console gets only the warnings of rank 0.

    Every rank must call it before anything else of DeepSpeed begins.
    """
    _start_deepspeed()
    log = logging.getLogger("DeepSpeed")
    # DeepSpeed calls functions of torch that are deprecated; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not distributed.is_main():
        log.setLevel(logging.ERROR)
        return

    for handler in list(log.handlers):
        if isinstance(handler, logging.FileHandler):  # of an earlier run of this process
            log.removeHandler(handler)
            handler.close()
        else:
            handler.setLevel(logging.WARNING)
    file = logging.FileHandler(run / LOG, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(filename)s: %(message)s"))
    log.addHandler(file)
    log.setLevel(logging.INFO)


def num_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return the number of parameters and of those that are trained.

    Parameters that ZeRO-3 has partitioned, or that are packed into 4 bits, count in full.
    """
    total = trained = 0
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None)
        whole = packed.shape if packed is not None else getattr(parameter, "ds_shape", None)
        size = math.prod(parameter.shape if whole is None else whole)
        total += size
        trained += size if parameter.requires_grad else 0
    return total, trained


@contextlib.contextmanager
def loading_context(ds: DsConfig, whole: bool) -> Iterator[None]:
    """Within it, transformers partitions the weights while it loads them, if the file says ZeRO-3.

    Args:
        ds: the resolved configuration.
        whole: each rank holds all weights until `initialize` instead. Quantised weights cannot be
            partitioned while they load, and PEFT reaches into the rows of added tokens.
    """
    if zero_stage(ds) != 3 or whole:
        yield
        return

    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    _start_deepspeed()
    keep_alive = HfDeepSpeedConfig(ds)  # transformers holds only a weak reference
    yield
    unset_hf_deepspeed_config()
    del keep_alive


def schedule_factor(options: LoopOptions, num_steps: int) -> Callable[[int], float]:
    """Return the learning rate of update s (0, 1, …) as a share of the peak.

    The rate warms up linearly and then stays, or falls to 0 linearly or by a cosine. The first
    update already has 1/w of the peak (w warm-up updates) and the last one is above 0: no update is
    wasted.
    """
    warmup = math.ceil(options.warmup_ratio * num_steps)
    decay: dict[str, Callable[[float], float]] = {
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1 - progress,
        "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    }

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return decay[options.schedule](min((step - warmup) / max(num_steps - warmup, 1), 1.0))

    return factor


def initialize(model: torch.nn.Module, options: LoopOptions, ds: DsConfig, num_steps: int) -> Any:
    """Wrap `model` in a DeepSpeed engine with torch's AdamW and the exact schedule.

    Weight decay applies to matrices only.
    """
    deepspeed = _start_deepspeed()

    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    chosen = {id(p) for p in matrices}
    others = [p for p in trainable if id(p) not in chosen]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,
    )

    factor = schedule_factor(options, num_steps)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda basic: torch.optim.lr_scheduler.LambdaLR(basic, factor),
        config=ds,
    )
    return engine
