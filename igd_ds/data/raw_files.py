"""Raw files before anything is read from them: plain or gzip, which form, which keys, what a source asks for."""

import ast
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from igd_ds.errors import UsageError

GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class FileKind:
    """How a source recognises one of its files: by its first line, or by a name.

    `keys`: the JSON object or Python dict on the first line has all of these; with `header` the first line is a delimited header
    that has them. `names`: or the file's name, ".gz" removed, matches one of these patterns; one with a slash is for the last
    folder and the name. `many`: several files are read one after the other.
    """

    keys: frozenset[str] = frozenset()
    header: bool = False
    names: tuple[str, ...] = ()
    optional: bool = False
    many: bool = False

    def matches(self, path: Path, form: str, keys: Iterable[str]) -> bool:
        """Whether a file with this path, and what `sniff` found in it, is of this kind."""
        name = path.name.removesuffix(".gz")
        named = any(
            fnmatch(f"{path.parent.name}/{name}" if "/" in pattern else name, pattern)
            for pattern in self.names
        )
        return (
            named or bool(self.keys) and self.header == (form == "text") and self.keys <= set(keys)
        )

    def described(self) -> str:
        """Say what is looked for."""
        first = (
            f"{'a header' if self.header else 'lines'} with {', '.join(sorted(self.keys))}"
            if self.keys
            else ""
        )
        return " or ".join(part for part in (first, " or ".join(self.names)) if part)


@dataclass(frozen=True)
class RawRequest:
    """What a source is asked for.

    `inputs` are the files it reads; `seed` shuffles the ids; `num_items`, `num_users` are the size of synthetic data;
    `max_bad_lines` is the share of lines that may be rejected.
    """

    inputs: tuple[Path, ...] = ()
    seed: int = 0
    num_items: int = 0
    num_users: int = 0
    max_bad_lines: float = 0.001


def parts_in_order(paths: Sequence[Path], suffix: str) -> list[Path]:
    """Return the files of one data set in the order to read them: one, or NAME.train, NAME.valid and NAME.test with `suffix`.

    ValueError for anything else: two files of the same interactions would double them.
    """
    if len(paths) == 1:
        return list(paths)
    parts = [path.name.removesuffix(".gz").removesuffix(suffix).rpartition(".") for path in paths]
    if len({name for name, _, _ in parts}) > 1 or sorted(part for *_, part in parts) != sorted(
        PARTS
    ):
        wanted = ", ".join(f"NAME.{part}{suffix}" for part in PARTS)
        raise UsageError(
            f"{', '.join(map(str, paths))}: need one {suffix} file, or {wanted} of one NAME"
        )
    return [
        path
        for _, path in sorted(
            zip(parts, paths, strict=True), key=lambda pair: PARTS.index(pair[0][2])
        )
    ]


def is_gzip(path: Path) -> bool:
    """Whether a file is gzip, by its first two bytes, whatever its name."""
    with open(path, "rb") as file:
        return file.read(2) == GZIP_MAGIC


@contextmanager
def open_raw(path: Path) -> Iterator[IO[bytes]]:
    """Open a plain or gzip file for reading bytes; ValueError where the gzip is broken or cut off."""
    try:
        with gzip.open(path, "rb") if is_gzip(path) else open(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: not a whole gzip file ({error}); download it again") from error


def has_byte_order_mark(path: Path) -> bool:
    """Whether a file's text starts with UTF-8's byte order mark, which strict JSON has not."""
    with open_raw(path) as file:
        return file.read(3) == BYTE_ORDER_MARK


def first_line(path: Path) -> bytes:
    """Return the first line that is not blank, without white space around it; ValueError when there is none."""
    with open_raw(path) as file:
        for line in file:
            if line.strip():
                return line.strip()
    raise UsageError(f"{path}: the file is empty")


def parse_python(line: bytes) -> dict | None:
    """Return the dict that a line of Python source spells (literals only, nothing is run), or None if it is not one."""
    try:
        value = ast.literal_eval(line.decode("utf-8"))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_json(line: bytes) -> dict | None:
    """Return the JSON object on a line, or None if it is not one."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sniff(path: Path) -> tuple[str, list[str]]:
    """Return (form, keys) of a file's first line: form is "json", "python" or "text"; keys of the object or of the header."""
    line = first_line(path)
    for form, parse in [("json", parse_json), ("python", parse_python)]:
        found = parse(line)
        if found is not None:
            return form, [str(key) for key in found]
    header = line.decode("utf-8", "replace").removeprefix("\ufeff")
    delimiter = next((mark for mark in ("\t", "::", "|", ",") if mark in header), ",")
    return "text", [name.strip().strip('"') for name in header.split(delimiter)]
