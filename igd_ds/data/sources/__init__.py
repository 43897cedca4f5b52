"""Data sources, one file each, and how `--input` is matched to their files.

A new source is one file and one line of SOURCES. The file has a docstring that tells users what to
download (it is the text of `igd prepare --source NAME --help`), the table FILES and a function
`read`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
    table,
    yelp,
)
from igd_ds.errors import UsageError


class SourceModule(Protocol):
    """The contract of a source's file.

    Example:
        A source of CSV files with the columns user, item and time (in seconds), without titles:

        >>> FILES = {"events": FileKind(frozenset({"user", "item", "time"}), header=True)}
        >>> def read(raw, files):
        ...     columns = {"user": "VARCHAR", "item": "VARCHAR", "time": "BIGINT"}
        ...     raw.read_csv("event", files["events"], columns, delimiter=",")
        ...     return raw.source_data('SELECT "user", item, "time", rowid AS position FROM event')
    """

    FILES: dict[str, FileKind]
    """Role of a file → how to recognise it."""

    def read(self, raw: RawReader, files: Mapping[str, list[Path]]) -> SourceData:
        """Read the files, given by role, and return catalogue and interactions.

        Args:
            raw: reads lines and numbers users and items; `raw.request` holds seed and sizes.
            files: role → paths. An optional role that was not given is missing.

        Raises:
            UsageError: a file is not as the docstring of the source says. The message names the
                file and the line or row.
        """


@dataclass(frozen=True)
class Source:
    """A row of SOURCES: what a source's file says and does."""

    about: str
    """Which files, from which page, how large."""
    files: Mapping[str, FileKind]
    """Role of a file → how to recognise it."""
    read: Callable[[RawReader, Mapping[str, list[Path]]], SourceData]
    """Reads the files, given by role (see SourceModule)."""


def _source(module: SourceModule) -> Source:
    return Source(module.__doc__ or "", module.FILES, module.read)


SOURCES: dict[str, Source] = {
    "amazon-2014": _source(amazon_2014),
    "amazon-2018": _source(amazon_2018),
    "amazon-2023": _source(amazon_2023),
    "steam": _source(steam),
    "yelp": _source(yelp),
    "movielens": _source(movielens),
    "d3-csv": _source(d3_csv),
    "lcrec-json": _source(lcrec_json),
    "recbole": _source(recbole),
    "csv": _source(table),
    "sequences": _source(sequences),
    "synthetic": _source(synthetic),
}


def find_files(name: str, inputs: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files of a source among `inputs`, by role.

    An input is a file, or a folder whose files (one level down too) are looked through. The files
    of a role are sorted by name. Only the user's own tables come in the order of `inputs`.

    Raises:
        UsageError: an input does not exist or is no file of the source (the message names the
            source whose file it looks like), a role is missing or taken twice, or a link leads out
            of a folder.
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
            if role := _role(kinds, path):
                found[role].append(path)
            elif given.is_dir():
                strangers.append(path)
            else:
                raise UsageError(_stranger(name, path))

    _check_roles(name, inputs, found, strangers)
    return {
        role: paths if kinds[role].any_file else sorted(paths)
        for role, paths in found.items()
        if paths
    }


def _check_roles(
    name: str,
    inputs: Sequence[Path],
    found: Mapping[str, list[Path]],
    strangers: Sequence[Path],
) -> None:
    """Raise UsageError if a file is given twice, or a role has too few files or too many."""
    every = [path.resolve() for paths in found.values() for path in paths]
    if twice := sorted({str(path) for path in every if every.count(path) > 1}):
        raise UsageError(f"--input names {twice[0]} twice")

    for role, kind in SOURCES[name].files.items():
        if not found[role] and not kind.optional:
            hint = f"; {_stranger(name, strangers[0])}" if strangers else ""
            given = ", ".join(map(str, inputs)) or "nothing"
            raise UsageError(
                f"source {name} needs --input with {role} ({kind.described()}), got {given}{hint}"
            )
        if len(found[role]) > 1 and not kind.many:
            raise UsageError(
                f"source {name} reads one file of {role}, found "
                f"{', '.join(map(str, found[role]))}: name the one"
            )


def _inside(folder: Path) -> list[Path]:
    """Return the files of a folder and of its folders, sorted by name, without hidden files."""
    paths = [path for path in sorted([*folder.glob("*"), *folder.glob("*/*")]) if path.is_file()]
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"{path} is a link to {path.resolve()}, outside of --input {folder}: give that "
                "path itself"
            )
    return [path for path in paths if not path.name.startswith(".")]


def _role(kinds: Mapping[str, FileKind], path: Path, generic: bool = True) -> str | None:
    """Return the role of a file; kinds that take every file count only if `generic`."""
    form, keys = _sniffed(path)
    asked = {role: kind for role, kind in kinds.items() if generic or not kind.any_file}
    return next((role for role, kind in asked.items() if kind.matches(path, form, keys)), None)


def _sniffed(path: Path) -> tuple[str, list[str]]:
    """Return what `sniff` finds, and nothing for a file that is empty or broken.

    The name of such a file may still tell its role.
    """
    try:
        return sniff(path)
    except UsageError:
        return "unreadable", []


def _is_whole(name: str, folder: Path) -> bool:
    """Return whether a folder has every file that a source needs."""
    kinds = {role: kind for role, kind in SOURCES[name].files.items() if not kind.optional}
    roles = {_role(kinds, path) for path in folder.iterdir() if path.is_file()}
    return kinds.keys() <= roles


def _stranger(name: str, path: Path) -> str:
    """Return why a file is none of this source: whose file it looks like, or what it lacks."""
    others = {
        other: role
        for other, source in SOURCES.items()
        if other != name and (role := _role(source.files, path, generic=False))
    }
    if others:
        # Several sources may have such a file: the one that finds all it needs beside it.
        other = max(others, key=lambda other: _is_whole(other, path.parent))
        return (
            f"{path}: this looks like {other} ({others[other]}), not {name}: use --source {other}"
        )
    form, keys = _sniffed(path)
    if form == "unreadable":
        sniff(path)  # raises what is wrong with it

    kinds = SOURCES[name].files
    role, kind = max(kinds.items(), key=lambda pair: len(pair[1].keys & set(keys)))
    missing = ", ".join(sorted(kind.keys - set(keys))) or f"the name {' or '.join(kind.names)}"
    shown = ", ".join(key[:30] for key in keys[:20])
    return (
        f"{path}: no file of source {name}: as {role} it lacks {missing}; its first line has "
        f"{shown}"
    )
