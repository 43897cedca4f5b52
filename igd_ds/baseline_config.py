"""The settings of `igd baseline`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from igd_ds.baselines.counted import COUNTED
from igd_ds.baselines.losses import LOSSES
from igd_ds.baselines.sequential import SEQUENTIAL
from igd_ds.config.items import ItemOptions, RankingOptions
from igd_ds.config.options import option, require, with_default
from igd_ds.config.training import LoopOptions
from igd_ds.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(ItemOptions, RankingOptions, LoopOptions):
    """One baseline: a recommender, its training and its evaluation.

    Fields left at None take the defaults of the recommender's paper. Popularity and kNN ignore
    training settings that have a default, so that the rows of a sweep can share them.
    """

    ds_config: str = with_default(LoopOptions, "ds_config", "")
    global_batch_size: int = with_default(LoopOptions, "global_batch_size", None)
    learning_rate: float = with_default(LoopOptions, "learning_rate", None)
    weight_decay: float = with_default(LoopOptions, "weight_decay", None)
    schedule: str = with_default(LoopOptions, "schedule", "constant")
    warmup_ratio: float = with_default(LoopOptions, "warmup_ratio", 0.0)
    max_grad_norm: float = with_default(LoopOptions, "max_grad_norm", 5.0)
    epochs: int = with_default(LoopOptions, "epochs", 200)
    patience: int = with_default(LoopOptions, "patience", 3)
    keep_checkpoints: int = with_default(LoopOptions, "keep_checkpoints", 1)
    log_every: int = with_default(LoopOptions, "log_every", 50)

    recommender: str = option(
        "which recommender, see igd_ds/baselines/sequential.py", choices=(*COUNTED, *SEQUENTIAL)
    )

    loss: str = option(
        "cross-entropy over the whole catalogue, or the loss of SASRec's or GRU4Rec's paper",
        "cross-entropy",
        tuple(LOSSES),
    )
    num_negatives: int | None = option(
        "negatives per target (bce) or micro-batch (bpr-max); the papers': 1 and 2048", None
    )
    hidden_size: int | None = option("width of embeddings and states", None)
    num_layers: int | None = option("layers or blocks", None)
    num_heads: int | None = option("attention heads (sasrec)", None)
    dropout: float | None = option("dropout of embeddings and states, in [0, 1)", None)

    splits: tuple[str, ...] = option(
        "splits to evaluate", ("valid", "test"), ("train", "valid", "test")
    )
    num_beams: int = with_default(RankingOptions, "num_beams", 20)
    batch_size: int = with_default(RankingOptions, "batch_size", 256)
    rows_seed: int = option("seeds that sample, as --seed does in igd eval", 0)
    save_scores: bool = option(
        "write eval/SPLIT/scores.npy, float32 (rows of the split, items), for igd eval --guidance, "
        "and scores.json, which says of which rows and items",
        False,
    )

    @property
    def is_trained(self) -> bool:
        """Whether the recommender is trained by gradient descent; the others only count."""
        return self.recommender in SEQUENTIAL

    def check(self) -> None:
        """Raise UsageError for values no run can use; checks that need the dataset come later."""
        self._check_used()
        if self.is_trained and not self.ds_config:
            raise UsageError(
                f"{self.recommender} is trained: give --ds_config, such as "
                "ds_configs/zero1-batch64-fp32.json"
            )
        if self.num_negatives is not None and not LOSSES[self.loss].num_negatives:
            raise UsageError(
                f"--num_negatives has no effect on --loss {self.loss}, which takes all items: "
                "leave it out"
            )
        # A single negative may be a micro-batch's only target.
        if self.loss == "bpr-max" and self.num_negatives == 1:
            raise UsageError("--num_negatives of --loss bpr-max must be at least 2, found 1")

        LoopOptions.check(self)
        at_least_1 = "num_negatives hidden_size num_layers num_heads num_beams batch_size"
        require(self, at_least_1, lambda value: value >= 1, "must be at least 1")
        require(
            self,
            "num_rows rows_seed",
            lambda value: 0 <= value < math.inf,
            "must not be negative, and finite",
        )
        require(self, "dropout", lambda value: 0 <= value < 1, "must lie in [0, 1)")
        if not self.splits or len(set(self.splits)) != len(self.splits):
            raise UsageError(
                f"--splits needs at least one and none twice, found {list(self.splits)}"
            )

    def _check_used(self) -> None:
        """Raise UsageError for a setting that the recommender does not use."""
        usable: set[str] = set()
        if self.is_trained:
            preset = SEQUENTIAL[self.recommender]
            usable = set(preset.form) | set(preset.training) | {"num_negatives"}
        for field in dataclasses.fields(self):
            is_given = field.default is None and getattr(self, field.name) is not None
            if is_given and field.name not in usable:
                raise UsageError(
                    f"--{field.name} has no effect on {self.recommender}: leave it out"
                )
        if not self.is_trained and self.loss != BaselineConfig.loss:
            raise UsageError(f"--loss has no effect on {self.recommender}: leave it out")

    def with_preset(self) -> "BaselineConfig":
        """Return the configuration with the settings of the recommender's paper filled in."""
        if not self.is_trained:
            return self
        preset = SEQUENTIAL[self.recommender]
        settings: dict[str, Any] = dict(preset.form) | dict(preset.training)
        settings["num_negatives"] = LOSSES[self.loss].num_negatives or None
        open_ = {name: v for name, v in settings.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **open_)
