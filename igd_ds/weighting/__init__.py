"""Token weightings of the loss: one table, one function each.

A weighting maps (StoredCatalogue, TrainConfig) to one float32 weight per catalogue token. It runs once per catalogue; the
collator gathers from the result. To add one: a function in a file of its family, a line in WEIGHTINGS, a test row in
`tests/unit/test_weighting.py`, a row in the README.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from igd_ds.weighting.gain import igd, igd_linear
from igd_ds.weighting.position import position, uniform


@dataclass(frozen=True)
class Weighting:
    """A token weighting and the TrainConfig fields it uses; all of them must be set, and no other weighting's."""

    token_weights: Callable[..., np.ndarray]
    flags: tuple[str, ...] = ()


WEIGHTINGS = {
    "uniform": Weighting(uniform),
    "igd": Weighting(igd, ("igd_beta",)),
    "igd-linear": Weighting(igd_linear, ("igd_beta",)),
    "position": Weighting(position, ("position_floor",)),
}


def check_flags(config) -> None:
    """Raise ValueError for an unknown weighting, a flag it needs that is unset, or a set flag that it does not use."""
    if config.weighting not in WEIGHTINGS:
        raise ValueError(f"--weighting {config.weighting}: unknown; one of {', '.join(WEIGHTINGS)}")
    used = WEIGHTINGS[config.weighting].flags
    for name in sorted({flag for weighting in WEIGHTINGS.values() for flag in weighting.flags}):
        value = getattr(config, name)
        if name in used and value is None:
            raise ValueError(f"--weighting {config.weighting} needs --{name}")
        if name not in used and value is not None:
            users = ", ".join(key for key, weighting in WEIGHTINGS.items() if name in weighting.flags)
            raise ValueError(f"--{name} {value} has no effect with --weighting {config.weighting}: drop it, or use {users}")
