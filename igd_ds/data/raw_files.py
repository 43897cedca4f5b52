"""Raw files before they are read: compression, form and keys, and how a source recognises them."""

import ast
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any, cast

from igd_ds.errors import UsageError

GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class FileKind:
    """How a source recognises one of its files: by the keys on the first line, or by the file name.

    Example:
        JSON lines with two keys, or any file that is called meta_….json:

        >>> FileKind(frozenset({"asin", "title"}), names=("meta_*.json",), optional=True)
    """

    keys: frozenset[str] = frozenset()
    """The JSON object or Python dict on the first line has all of these keys."""
    header: bool = False
    """The first line is a delimited header instead, and `keys` are columns of it."""
    names: tuple[str, ...] = ()
    """Patterns for the file name without ".gz"; one with a slash also matches the folder's name."""
    optional: bool = False
    """The source works without this file."""
    many: bool = False
    """There may be several such files; the source reads them one after the other."""
    any_file: bool = False
    """Every file is taken that the user gives; the source itself tells what it is."""

    def matches(self, path: Path, form: str, keys: Iterable[str]) -> bool:
        """Return whether a file is of this kind, given what `sniff` found in it."""
        if self.any_file:
            return True
        name = path.name.removesuffix(".gz")
        for pattern in self.names:
            if fnmatch(f"{path.parent.name}/{name}" if "/" in pattern else name, pattern):
                return True
        return bool(self.keys) and self.header == (form == "text") and self.keys <= set(keys)

    def described(self) -> str:
        """Return a description of the file for an error message."""
        parts = ["any table"] if self.any_file else []
        if self.keys:
            what = "a header" if self.header else "lines"
            parts.append(f"{what} with {', '.join(sorted(self.keys))}")
        return " or ".join([*parts, *self.names])


@dataclass(frozen=True)
class RawRequest:
    """What a source is asked to read or to make."""

    inputs: tuple[Path, ...] = ()
    """The files that the source reads."""
    seed: int = 0
    """Seed of the permutation of the ids, and of synthetic data."""
    num_items: int = 0
    """Items of synthetic data; 0 takes the source's default."""
    num_users: int = 0
    """Users of synthetic data; 0 takes the source's default."""
    max_bad_lines: float = 0.001
    """Share of the lines that may be rejected."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field → column, for tables of the user's own."""
    time_format: str = ""
    """How times are written there, as strptime spells it; "" recognises numbers and ISO dates."""


def parts_in_order(paths: Sequence[Path], suffix: str) -> list[Path]:
    """Return the files of one data set in reading order: one file, or its train, valid, test parts.

    The parts are called NAME.train, NAME.valid and NAME.test, followed by `suffix`.

    Raises:
        UsageError: the files are something else; two files with the same interactions would count
            each interaction twice.
    """
    if len(paths) == 1:
        return list(paths)

    by_part: dict[str, Path] = {}
    names = set()
    for path in paths:
        name, _, part = path.name.removesuffix(".gz").removesuffix(suffix).rpartition(".")
        names.add(name)
        by_part[part] = path
    if len(names) > 1 or len(by_part) < len(paths) or set(by_part) != set(PARTS):
        wanted = ", ".join(f"NAME.{part}{suffix}" for part in PARTS)
        raise UsageError(
            f"{', '.join(map(str, paths))}: need one {suffix} file, or {wanted} of one NAME"
        )
    return [by_part[part] for part in PARTS]


def is_gzip(path: Path) -> bool:
    """Return whether a file is gzip, by its first two bytes; its name does not matter."""
    with open(path, "rb") as file:
        return file.read(2) == GZIP_MAGIC


@contextmanager
def open_raw(path: Path) -> Iterator[IO[bytes]]:
    """Open a plain or gzip file for reading bytes.

    Raises:
        UsageError: the gzip file is broken or cut off.
    """
    try:
        with gzip.open(path, "rb") if is_gzip(path) else open(path, "rb") as file:
            yield cast(IO[bytes], file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: not a whole gzip file ({error}); download it again") from error


def has_byte_order_mark(path: Path) -> bool:
    """Return whether a file starts with the UTF-8 byte order mark, which strict JSON forbids."""
    with open_raw(path) as file:
        return file.read(3) == BYTE_ORDER_MARK


def first_line(path: Path) -> bytes:
    """Return the first line that is not blank, without the white space around it.

    Raises:
        UsageError: the file holds no such line.
    """
    with open_raw(path) as file:
        for line in file:
            if line.strip():
                return line.strip()
    raise UsageError(f"{path}: the file is empty")


def sql_name(column: str) -> str:
    """Return the name of a column as SQL spells it."""
    return '"' + column.replace('"', '""') + '"'


def sql_text(text: str) -> str:
    """Return a text as SQL spells it."""
    return "'" + text.replace("'", "''") + "'"


def shown(line: bytes) -> str:
    """Return the beginning of a line for a message, in quotes."""
    return repr(line.decode("utf-8", "replace").strip()[:60])


def not_utf8(line: bytes) -> str:
    """Return the part of a message that says a line is not UTF-8, with advice and its beginning."""
    return f"not UTF-8 (iconv -f LATIN1 -t UTF-8 FILE converts Latin-1): {shown(line)}"


def refuse_array(path: Path, line: bytes) -> None:
    """Raise UsageError if the first line of a file begins one JSON array of objects."""
    if line.startswith(b"[") and line[1:].lstrip()[:1] in (b"", b"{"):
        raise UsageError(
            f"{path}: one JSON array, where one object per line is needed: "
            f"jq -c '.[]' {path.name} > LINES.json"
        )


def parse_python(line: bytes) -> dict[Any, Any] | None:
    """Return the dict that a line of Python source spells, or None if it spells none.

    Only literals are read; nothing is executed.
    """
    try:
        value = ast.literal_eval(line.decode("utf-8"))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def no_value(_: str) -> None:
    """Return None for JSON's NaN and Infinity, which pandas writes for missing values."""


def parse_json(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object on a line, or None if the line holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sniff(path: Path) -> tuple[str, list[str]]:
    """Return the form and the keys of the first line of a file.

    The form is "json", "python" or "text". The keys are those of the object or of the header.

    Raises:
        UsageError: the file is empty or a broken gzip file, or it holds one JSON array.
    """
    line = first_line(path)
    refuse_array(path, line)
    for form, parse in [("json", parse_json), ("python", parse_python)]:
        found = parse(line)
        if found is not None:
            return form, [str(key) for key in found]

    header = line.decode("utf-8", "replace").removeprefix("\ufeff")
    delimiter = next((mark for mark in ("\t", "::", "|", ",") if mark in header), ",")
    return "text", [name.strip().strip('"') for name in header.split(delimiter)]
