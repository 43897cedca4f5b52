"""How settings are declared, parsed and checked: defaults < YAML file < command-line flags.

A setting is a field of a frozen dataclass, declared once with its type, default and help text. Its
flag, its YAML key and its entry in the run's config.yaml follow from the field. An unknown key is
an error that names the nearest known one.
"""

import argparse
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field
from pathlib import Path
from typing import Any, TypeVar

from igd_ds.config.yaml_files import read_yaml_file
from igd_ds.errors import UsageError, did_you_mean

C = TypeVar("C")

TUNED = Path(__file__).parent / "tuned"
"""Settings that come with igd_ds, as YAML files; each names the command that found them."""


def option(help: str, default: Any = MISSING, choices: Sequence[str] = (), former: str = "") -> Any:
    """Declare one setting.

    Args:
        help: what the setting does; becomes the flag's help text.
        default: None if the setting may be left open; a setting without a default is required.
        choices: the values that are allowed; empty: all values of the field's type.
        former: an earlier name of the setting, which flags and YAML files may still use.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Options:
        ...     epochs: int = option("passes over the training rows at most", 3)
    """
    metadata = {"help": help, "choices": tuple(choices), "former": former}
    return field(default=default, metadata=metadata)


def with_default(cls: type, name: str, default: Any) -> Any:
    """Declare an inherited setting again with another default; help text and choices stay."""
    inherited = {entry.name: entry for entry in dataclasses.fields(cls)}[name]
    return field(default=default, metadata=dict(inherited.metadata))


def require(config: Any, names: str, holds: Callable[[float], bool], says: str) -> None:
    """Check several settings alike; settings that are None pass.

    Args:
        config: object with the settings as attributes.
        names: names of the settings, separated by spaces.
        holds: whether a value is allowed.
        says: what an allowed value must do, such as "must be at least 1".

    Raises:
        UsageError: names the flag and its value.
    """
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise UsageError(f"--{name} {says}, found {value}")


def _type_of(annotation: Any) -> tuple[type, bool]:
    """Return (element type, whether it is a sequence) of a field's annotation.

    `float`, `float | None` and `tuple[float, ...]` all have the element type float.
    """
    if typing.get_origin(annotation) in (list, tuple):
        return typing.get_args(annotation)[0], True
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation, False


class FlagParser(argparse.ArgumentParser):
    """A parser that answers an unknown flag with the nearest known one.

    It looks at the flags first, so that a typo is named and not the flag that is missing for it.
    """

    def parse_known_args(  # type: ignore[override]  # argparse declares overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse the command line; end the process with a message if a flag is unknown."""
        words = sys.argv[1:] if args is None else list(args)
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in words:
            name = word.partition("=")[0]
            is_flag = name.startswith("--") and len(name) > 2
            may_abbreviate = self.allow_abbrev and any(flag.startswith(name) for flag in known)
            if is_flag and name not in known and not may_abbreviate:
                self.error(f"unrecognized arguments: {name}{did_you_mean(name, known)}")
        return super().parse_known_args(words, namespace)


def _parser(cls: type, description: str | None) -> FlagParser:
    parser = FlagParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        help="YAML file with any of the settings below, which flags win over; or the name of one "
        "that comes with igd_ds, see igd_ds/config/tuned",
    )
    # The deepspeed launcher passes it; rank and device come from the environment (distributed.py).
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

    for entry in dataclasses.fields(cls):
        kind, many = _type_of(entry.type)
        default = entry.default
        shown = " (required)" if default is MISSING else f" (default: {_shown(default)})"
        flags = [f"--{name}" for name in (entry.name, entry.metadata["former"]) if name]
        settings: dict[str, Any] = {"dest": entry.name, "default": argparse.SUPPRESS}
        settings["help"] = (entry.metadata["help"] + shown).replace("%", "%%")
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": kind, "choices": entry.metadata["choices"] or None}
            if many:
                settings["nargs"] = "+"
        parser.add_argument(*flags, **settings)
    return parser


def _shown(default: Any) -> str:
    """Return a default as a user would type it."""
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def checked(cls: type, key: str, value: Any, source: str) -> Any:
    """Return `value` as the type of the field `key` of `cls`.

    Raises:
        UsageError: names `source`, the key, what it takes and what was found.
    """
    entries = {entry.name: entry for entry in dataclasses.fields(cls)}
    if key not in entries:
        raise UsageError(f"{source}: unknown setting '{key}'{did_you_mean(key, entries)}")

    entry = entries[key]
    kind, many = _type_of(entry.type)
    if type(value) is bool and {"yes", "no"} <= set(entry.metadata["choices"]):
        value = "yes" if value else "no"  # YAML reads both words as booleans
    if value is None and (entry.default is None or "None" in str(entry.type)):
        return None
    values = [
        _checked_one(v, kind, f"{source}: '{key}'")
        for v in (value if isinstance(value, list) and many else [value])
    ]
    for v in values:
        if entry.metadata["choices"] and v not in entry.metadata["choices"]:
            raise UsageError(
                f"{source}: '{key}' is one of {', '.join(entry.metadata['choices'])}; found {v!r}"
            )
    return tuple(values) if many else values[0]


def _checked_one(value: Any, kind: type, where: str) -> Any:
    """Return `value` as a `kind`; numbers are taken where text is asked for, and int for float."""
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and type(value) in (int, float):
        return str(value)
    if type(value) is not kind:
        is_number_text = kind is float and type(value) is str
        hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if is_number_text else ""
        raise UsageError(f"{where} takes {kind.__name__}, found {value!r}{hint}")
    return value


def current_names(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with settings that are called by a former name under their present one."""
    former = {e.metadata["former"]: e.name for e in dataclasses.fields(cls) if e.metadata["former"]}
    return {former.get(key, key): value for key, value in values.items()}


def read_yaml(cls: type, path: str) -> dict[str, Any]:
    """Return the settings in a YAML file, each checked against the field of its name.

    Args:
        cls: the configuration that the settings belong to.
        path: the file, or the name of one that comes with igd_ds, such as `sasrec-beauty-2014`.

    Raises:
        UsageError: there is no such file, or it holds something else than settings of `cls`.
    """
    file = Path(path) if Path(path).is_file() else TUNED / f"{path}.yaml"
    if not file.is_file():
        known = sorted(file.stem for file in TUNED.glob("*.yaml"))
        hint = did_you_mean(path, known)
        raise UsageError(f"--config: no file {path}{hint}; with igd_ds come {', '.join(known)}")
    loaded = read_yaml_file(file) or {}
    if not isinstance(loaded, dict):
        raise UsageError(
            f"{path}: expected 'setting: value' lines, found a {type(loaded).__name__}"
        )
    return {key: checked(cls, key, v, path) for key, v in current_names(cls, loaded).items()}


def parse(cls: type[C], argv: Sequence[str] | None = None, description: str | None = None) -> C:
    """Build a configuration from the command line and check it.

    Args:
        cls: a frozen dataclass whose fields are declared with `option`. If it has a method `check`,
            that is called.
        argv: the arguments; None takes those of this process.
        description: text of `--help`.

    Raises:
        UsageError: a bad YAML file, a missing required setting, or a value that `check` refuses.
    """
    flags = vars(_parser(cls, description).parse_args(sys.argv[1:] if argv is None else argv))
    flags.pop("local_rank")
    path = flags.pop("config")
    values = read_yaml(cls, path) if path else {}
    values |= {key: tuple(v) if isinstance(v, list) else v for key, v in flags.items()}

    entries = dataclasses.fields(cls)  # type: ignore[arg-type]  # C is a dataclass
    missing = [
        entry.name for entry in entries if entry.default is MISSING and entry.name not in values
    ]
    if missing:
        raise UsageError(
            "required settings are missing: " + ", ".join(f"--{name}" for name in missing)
        )
    config = cls(**values)
    config.check()  # type: ignore[attr-defined]  # every configuration has it
    return config


def from_arguments(
    cls: type[C], named: Mapping[str, Any], settings: Mapping[str, Any], source: str
) -> C:
    """Build a configuration from the arguments of a Python call and check it.

    Args:
        cls: as in `parse`.
        named: the settings that the call has parameters for, all required ones among them.
        settings: its keyword arguments: further settings by name. A path may be a Path, and
            several values a list or a tuple.
        source: what error messages call the call, such as "igd_ds.train".

    Raises:
        UsageError: names the argument that is unknown, given twice or of another type, or the
            setting whose value `check` refuses.
    """
    settings = current_names(cls, settings)
    for key in named:
        if key in settings:
            raise UsageError(f"{source}: another argument sets '{key}' already: leave it out")
    plain = {
        key: os.fspath(v) if isinstance(v, os.PathLike) else list(v) if type(v) is tuple else v
        for key, v in {**named, **settings}.items()
    }
    config = cls(**{key: checked(cls, key, v, source) for key, v in plain.items()})
    config.check()  # type: ignore[attr-defined]  # every configuration has it
    return config
