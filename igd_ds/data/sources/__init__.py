"""Data sources, one file each: a docstring that tells users what to download, FILES, and a function read.

A new source is one file and one line of SOURCES.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from igd_ds.data.dataset import SourceData
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import FileKind, sniff
from igd_ds.data.sources import (
    amazon_2014,
    amazon_2018,
    amazon_2023,
    d3_csv,
    lcrec_json,
    movielens,
    recbole,
    sequences,
    steam,
    synthetic,
    yelp,
)
from igd_ds.errors import UsageError


@dataclass(frozen=True)
class Source:
    """`about`: which files, from which page, how large. `files`: role → how to recognise it. `read(raw, paths by role)`."""

    about: str
    files: dict[str, FileKind]
    read: Callable[[RawReader, dict[str, list[Path]]], SourceData]


def _source(module: ModuleType) -> Source:
    return Source(module.__doc__, module.FILES, module.read)


SOURCES = {
    "amazon-2014": _source(amazon_2014),
    "amazon-2018": _source(amazon_2018),
    "amazon-2023": _source(amazon_2023),
    "steam": _source(steam),
    "yelp": _source(yelp),
    "movielens": _source(movielens),
    "d3-csv": _source(d3_csv),
    "lcrec-json": _source(lcrec_json),
    "recbole": _source(recbole),
    "sequences": _source(sequences),
    "synthetic": _source(synthetic),
}


def find_files(name: str, inputs: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the source's files among `inputs` by role: files, and folders whose files (one level down too) are looked through.

    Raises ValueError when a file is of no kind that the source reads (it names the source whose file it looks like), when a
    role is missing or taken twice, or when a link leads out of a folder.
    """
    kinds = SOURCES[name].files
    if inputs and not kinds:
        raise UsageError(f"source {name} reads no files; leave out --input")
    found: dict[str, list[Path]] = {role: [] for role in kinds}
    strangers = []
    for given in inputs:
        if not (given.is_file() or given.is_dir()):
            raise UsageError(f"--input {given}: there is no such file or folder")
        for path in _inside(given) if given.is_dir() else [given]:
            role = _role(kinds, path)
            if role:
                found[role].append(path)
            elif path == given or not given.is_dir():
                raise UsageError(_stranger(name, path))
            else:
                strangers.append(path)
    every = [path.resolve() for paths in found.values() for path in paths]
    if twice := sorted({str(path) for path in every if every.count(path) > 1}):
        raise UsageError(f"--input names {twice[0]} twice")
    for role, kind in kinds.items():
        if not found[role] and not kind.optional:
            told = f"; {_stranger(name, strangers[0])}" if strangers else ""
            given = ", ".join(map(str, inputs)) or "nothing"
            raise UsageError(
                f"source {name} needs --input with {role} ({kind.described()}), got {given}{told}"
            )
        if len(found[role]) > 1 and not kind.many:
            raise UsageError(
                f"source {name} reads one file of {role}, found {', '.join(map(str, found[role]))}: name the one"
            )
    return {role: sorted(paths) for role, paths in found.items() if paths}


def _inside(folder: Path) -> list[Path]:
    """Return the files of a folder and of its folders, in order of names."""
    paths = [path for path in sorted([*folder.glob("*"), *folder.glob("*/*")]) if path.is_file()]
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"{path} is a link to {path.resolve()}, outside of --input {folder}: give that path itself"
            )
    return [path for path in paths if not path.name.startswith(".")]


def _role(kinds: dict[str, FileKind], path: Path) -> str | None:
    form, keys = _sniffed(path)
    return next((role for role, kind in kinds.items() if kind.matches(path, form, keys)), None)


def _sniffed(path: Path) -> tuple[str, list[str]]:
    """Return what `sniff` finds; nothing for a file that is empty or broken: its name may still tell its role."""
    try:
        return sniff(path)
    except ValueError:
        return "unreadable", []


def _stranger(name: str, path: Path) -> str:
    """Say why a file is none of this source's: whose it looks like, or what it lacks."""
    for other, source in SOURCES.items():
        if other != name and (role := _role(source.files, path)):
            return f"{path}: this looks like {other} ({role}), not {name}: use --source {other}"
    form, keys = _sniffed(path)
    if form == "unreadable":
        sniff(path)  # raises what is wrong with it
    role, kind = max(SOURCES[name].files.items(), key=lambda pair: len(pair[1].keys & set(keys)))
    missing = ", ".join(sorted(kind.keys - set(keys))) or f"the name {' or '.join(kind.names)}"
    shown = ", ".join(key[:30] for key in keys[:20])
    return f"{path}: no file of source {name}: as {role} it lacks {missing}; its first line has {shown}"
