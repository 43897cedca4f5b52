"""What a training minimises: one table of objectives, one line each.

`igd_ds.contracts.Objective` says what an objective is. Its flags are the fields of its `Options`.

To add one: a class in a file of this folder, a line in OBJECTIVES, a test in `tests/unit/`, a row
in docs/reference/training.md. Most classes derive from `TokenWeighting` and define `weights` alone.
"""

import dataclasses
import types
from typing import TYPE_CHECKING, Any

from igd_ds.contracts import Objective
from igd_ds.errors import UsageError, did_you_mean
from igd_ds.objectives.cft import CFT
from igd_ds.objectives.frequency import Frequency
from igd_ds.objectives.front_greater import FrontGreater
from igd_ds.objectives.gain import IGD, IGDLinear
from igd_ds.objectives.msl import MSL
from igd_ds.objectives.multi_target import MultiTarget
from igd_ds.objectives.position import Position, Uniform
from igd_ds.objectives.rank import Rank

OBJECTIVES: dict[str, type[Objective]] = {
    "uniform": Uniform,
    "igd": IGD,
    "igd-linear": IGDLinear,
    "position": Position,
    "cft": CFT,
    "rank": Rank,
    "front-greater": FrontGreater,
    "frequency": Frequency,
    "multi-target": MultiTarget,
    "msl": MSL,
}


def options_of(name: str) -> tuple[dataclasses.Field[Any], ...]:
    """Return the fields of an objective's `Options`."""
    return dataclasses.fields(OBJECTIVES[name].Options)


def users_of(flag: str) -> list[str]:
    """Return the names of the objectives that have this flag."""
    return [name for name in OBJECTIVES if flag in {field.name for field in options_of(name)}]


def _all_options() -> type:
    """Make a dataclass with the flags of all objectives, each optional; None: not given."""
    entries: dict[str, tuple[str, Any, Any]] = {}
    for field in (field for name in OBJECTIVES for field in options_of(name)):
        help = f"{field.metadata['help']} ({', '.join(users_of(field.name))})"
        metadata = field.metadata | {"help": help}
        kind: Any = field.type
        if not isinstance(kind, types.UnionType):
            kind = kind | None
        entry = dataclasses.field(default=None, metadata=metadata)
        known = entries.setdefault(field.name, (field.name, kind, entry))
        assert known[2].metadata == metadata, f"two objectives declare --{field.name} differently"
    return dataclasses.make_dataclass(
        "ObjectiveOptions", entries.values(), frozen=True, kw_only=True
    )


if TYPE_CHECKING:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ObjectiveOptions:
        """The flags of all objectives."""

else:
    ObjectiveOptions = _all_options()


def check_objective(name: str, settings: Any) -> Any:
    """Return the objective's `Options` with the values in `settings`, which has all objectives'
    flags.

    Raises:
        UsageError: an unknown objective, a flag that it needs and lacks, a flag that it does not
            use, or a value out of its range.
    """
    if name not in OBJECTIVES:
        hint, known = did_you_mean(name, OBJECTIVES), ", ".join(OBJECTIVES)
        raise UsageError(f"--objective {name}: unknown{hint} (known: {known})")

    own = {field.name: field for field in options_of(name)}
    for flag in dataclasses.fields(ObjectiveOptions):
        value = getattr(settings, flag.name)
        if value is not None and flag.name not in own:
            raise UsageError(
                f"--{flag.name} {value} has no effect with --objective {name}: drop it, or use "
                f"{', '.join(users_of(flag.name))}"
            )
        is_required = flag.name in own and own[flag.name].default is dataclasses.MISSING
        if value is None and is_required:
            raise UsageError(f"--objective {name} needs --{flag.name}")

    options = OBJECTIVES[name].Options(**{flag: getattr(settings, flag) for flag in own})
    options.check()
    return options
