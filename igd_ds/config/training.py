"""Settings that every training has, of a generative model or of a sequential baseline."""

import importlib.util
import math
from dataclasses import dataclass

from igd_ds.config.options import option, require
from igd_ds.config.processes import ProcessOptions
from igd_ds.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class LoopOptions(ProcessOptions):
    """What a run owns: data, folder, global batch, optimizer, schedule, validation, checkpoints.

    ZeRO stage, offload, precision and micro-batch belong to the DeepSpeed file.
    """

    ds_config: str = option("DeepSpeed JSON: ZeRO stage, offload, precision, micro-batch")
    dataset: str = option("canonical dataset folder (igd prepare makes one)")
    output_dir: str = option("run folder; one run each")

    global_batch_size: int = option(
        "rows (of a baseline: sequences) per optimizer step, over all ranks and accumulation steps",
        64,
    )
    learning_rate: float = option("peak learning rate of AdamW", 1e-4)
    weight_decay: float = option("AdamW's decoupled weight decay", 0.0)
    schedule: str = option(
        "learning rate after the warm-up", "cosine", ("cosine", "linear", "constant")
    )
    warmup_ratio: float = option("share of the steps that warm up linearly, in [0, 1)", 0.03)
    max_grad_norm: float = option("clip gradients to this global L2 norm", 1.0)
    epochs: int = option("passes over the training rows at most", 3)
    max_steps: int = option("optimizer steps at most; 0: as many as the epochs have", 0)
    seed: int = option("seeds initial weights, row order, dropout and negatives", 0)

    validate_every: int = option("optimizer steps between validations; 0: once an epoch", 0)
    validation_rows: int = option(
        "rows of the validation split to use (a seeded sample); 0: all", 0
    )
    patience: int = option(
        "validations without improvement before training stops; 0: never stop early", 1
    )
    stop_margin: float = option(
        "training stops when a validation is this far behind the best one; 0: never", 0.0
    )
    save_every: int = option("optimizer steps between checkpoints; 0: after each validation", 0)
    keep_checkpoints: int = option("newest checkpoints to keep", 2)
    resume: str = option(
        "auto: go on from the run folder's newest whole checkpoint, on any number of ranks",
        "never",
        ("never", "auto"),
    )
    trust_checkpoint: bool = option(
        "resume from a checkpoint of another user too; loading it runs code that it contains", False
    )
    log_every: int = option("optimizer steps between log lines", 10)
    report_to: str = option(
        "wandb: send the run's scalars to Weights & Biases too, beside TensorBoard",
        "tensorboard",
        ("tensorboard", "wandb"),
    )

    def check(self) -> None:
        """Raise UsageError for values that no training can use."""
        ProcessOptions.check(self)
        at_least_1 = "global_batch_size epochs log_every keep_checkpoints"
        require(self, at_least_1, lambda value: value >= 1, "must be at least 1")
        require(
            self,
            "weight_decay max_steps seed validate_every validation_rows patience stop_margin "
            "save_every",
            lambda value: 0 <= value < math.inf,
            "must not be negative, and finite",
        )
        require(self, "warmup_ratio", lambda value: 0 <= value < 1, "must lie in [0, 1)")
        require(
            self,
            "learning_rate max_grad_norm",
            lambda value: 0 < value < math.inf,
            "must be positive and finite",
        )
        if self.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
            raise UsageError("--report_to wandb: wandb is not installed; pip install wandb")
