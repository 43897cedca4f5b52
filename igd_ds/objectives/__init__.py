"""Token weightings of the loss: one table, one line each.

A weighting is K targets, functions from (StoredCatalogue, TrainConfig) to one float32 weight per catalogue token, which run
once per catalogue and from which the collator gathers; the loss of a token that the weights multiply; and, with K > 1, what
mixes the K losses. To add one: a function in a file of its family, a line in WEIGHTINGS, a test row in
`tests/unit/test_weighting.py`, a row in the README.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igd_ds.errors import UsageError
from igd_ds.objectives import mixing
from igd_ds.objectives.frequency import frequency
from igd_ds.objectives.front_greater import front_greater
from igd_ds.objectives.gain import igd, igd_linear
from igd_ds.objectives.losses import cft, plain, rank
from igd_ds.objectives.position import position, uniform


@dataclass(frozen=True)
class Weighting:
    """A row of the table."""

    targets: tuple[Callable[..., np.ndarray], ...]
    """K functions of (StoredCatalogue, TrainConfig) → float32 (T,), the weight of each catalogue token. All ranks call them."""
    flags: tuple[str, ...] = ()
    """TrainConfig fields that must be set."""
    optional: tuple[str, ...] = ()
    """TrainConfig fields that may be set; no other weighting's fields may be."""
    token_loss: Callable = plain
    """(logits (n, V), targets (n,), null logits (n, V) or None, config) → nats, float32 (n,)."""
    needs_null: bool = False
    """Whether token_loss needs the logits of the same tokens behind a prompt without history."""
    mixing: Callable | None = None
    """(config, total steps) → what mixes the K losses; None where K = 1."""


MIXING_OPTIONS = (
    "mixing",
    "mixing_form",
    "curriculum_c",
    "curriculum_cT",
    "lambda_lr",
    "mixing_regularizer",
)
WEIGHTINGS = {
    "uniform": Weighting((uniform,)),
    "igd": Weighting((igd,), ("igd_beta",)),
    "igd-linear": Weighting((igd_linear,), ("igd_beta",)),
    "position": Weighting((position,), ("position_floor",)),
    "cft": Weighting(
        (position,), ("position_floor", "cft_lambda"), token_loss=cft, needs_null=True
    ),
    "rank": Weighting((uniform,), ("rank_tau",), token_loss=rank),
    "front-greater": Weighting((front_greater,), ("item_embeddings",)),
    "frequency": Weighting((frequency,), ("frequency_beta",)),
    "multi-target": Weighting(
        (front_greater, frequency, uniform),
        ("item_embeddings", "frequency_beta"),
        MIXING_OPTIONS,
        mixing=mixing.build,
    ),
}

RANGES = {  # field: (is the value allowed?, what it must do)
    "igd_beta": (lambda value: 0 <= value <= 1, "lie in [0, 1]"),
    "position_floor": (lambda value: 0 <= value <= 1, "lie in [0, 1]"),
    "cft_lambda": (lambda value: 0 <= value < math.inf, "not be negative, and finite"),
    "rank_tau": (lambda value: 0 < value < math.inf, "be positive and finite"),
    "frequency_beta": (lambda value: 0 <= value < 1, "lie in [0, 1)"),
    "curriculum_c": (
        lambda value: 0 < value < math.inf,
        "be positive and finite (no curriculum: leave it out)",
    ),
    "curriculum_cT": (
        lambda value: 0 < value < math.inf,
        "be positive and finite (no curriculum: leave it out)",
    ),
    "lambda_lr": (lambda value: 0 < value < math.inf, "be positive and finite"),
    "item_embeddings": (
        lambda value: Path(value).exists(),
        "name an existing .npy with one row per item, or a folder that igd embed made",
    ),
}


def check_flags(config) -> None:
    """Raise ValueError for an unknown weighting, a field it needs that is unset or out of range, or one that it does not use."""
    if config.weighting not in WEIGHTINGS:
        raise UsageError(f"--weighting {config.weighting}: unknown; one of {', '.join(WEIGHTINGS)}")
    chosen = WEIGHTINGS[config.weighting]
    for name in sorted(
        {flag for weighting in WEIGHTINGS.values() for flag in weighting.flags + weighting.optional}
    ):
        value = getattr(config, name)
        if name in chosen.flags and value is None:
            raise UsageError(f"--weighting {config.weighting} needs --{name}")
        if name not in chosen.flags + chosen.optional and value is not None:
            users = ", ".join(
                key
                for key, weighting in WEIGHTINGS.items()
                if name in weighting.flags + weighting.optional
            )
            raise UsageError(
                f"--{name} {value} has no effect with --weighting {config.weighting}: drop it, or use {users}"
            )
        if name in RANGES and value is not None and not RANGES[name][0](value):
            raise UsageError(f"--{name} must {RANGES[name][1]}, found {value}")
    if chosen.mixing and config.normalization != "global":
        raise UsageError(
            f"--weighting {config.weighting} learns from losses over the whole step: use --normalization global"
        )
    if chosen.mixing:
        mixing.check_options(config)
