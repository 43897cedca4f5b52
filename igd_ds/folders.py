"""Files and folders that are whole or not there, and output folders that belong to one request.

Text, JSON and tables are written to a temporary file beside the target and then renamed. Folders
are filled under a temporary name and then renamed. What a killed process leaves is recognisable by
its name: TARGET.tmp-PID is unfinished, and the next process that claims the folder removes it;
.TARGET.replaced-by-igd is the old content, which gets its name back if no new one is there.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from igd_ds.errors import UsageError
from igd_ds.locks import LOCK, acquire, holding

OLD = ".replaced-by-igd"
"""Ends the hidden name of a folder while `replaced_folder` puts the new one in its place. Nobody
gives a folder of his own such a name, so what has it may be removed."""


def temporary_name(path: Path) -> Path:
    """Return the name under which this process writes what shall become `path`."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def is_temporary(path: Path) -> bool:
    """Whether a file or folder is the unfinished work of some process (see `temporary_name`)."""
    return re.search(r"\.tmp-\d+$", path.name) is not None


def remove_temporaries(folder: Path, pattern: str = "*") -> None:
    """Remove the unfinished work of processes that have ended from a folder whose lock we hold.

    Args:
        folder: only what lies in it directly is removed.
        pattern: of the names before `.tmp-PID`.
    """
    own = temporary_name(folder / "x").suffix
    for path in folder.glob(f"{pattern}.tmp-*"):
        if not is_temporary(path) or path.suffix == own:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def reserve(path: Path) -> None:
    """Give a file the disk space of its size, before it is mapped into memory and written.

    Raises:
        OSError: the disk is full. Without this, the first write to a missing page would kill the
            process (SIGBUS).
    """
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # this file system cannot
                raise OSError(error.errno, error.strerror, str(path)) from error


def sha256_of(path: Path) -> str:
    """Return the sha256 (hex) of the bytes of a file."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
    return digest.hexdigest()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write; when the block ends, it is renamed to `path`.

    The content reaches the disk before the name does, so a crash of the machine leaves the old file
    or the new one. If the block raises, for example on a full disk, the unfinished file is removed.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json_object(path: Path, advice: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UsageError: the file cannot be read or holds something else; the message ends in `advice`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): {advice}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object: {advice}")
    return content


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with sorted keys so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    with new_file(path) as temporary:
        pq.write_table(table, temporary)


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file.

    `pq.read_table` does more: it takes the names of folders such as `day=1` for columns. And it
    imports pandas where that is installed, which takes half a second.
    """
    with pq.ParquetFile(path) as file:
        return file.read(columns)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents where they are missing.

    Raises:
        UsageError: a part of the path is a file, or the file system takes no folders (/proc).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"{folder}: no folder can be made there ({error.strerror}: {error.filename}); give "
            "another path"
        ) from error


def is_free(path: Path) -> bool:
    """Whether `new_folder` can make this folder: nothing is there, or an empty folder.

    Raises:
        UsageError: it is the current folder, which cannot be replaced.
    """
    if path.exists() and path.samefile("."):
        raise UsageError(f"{path} is the current folder: give the path of another one")
    if path.is_symlink() or path.is_mount():
        return False
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends, it is renamed to `folder`.

    `folder` is missing or empty before. If the block raises, it stays so. The parents
    of `folder` are made where they are missing. Until the block ends, FOLDER.lock keeps other
    processes off.

    Raises:
        UsageError: another process makes this folder now, or has just made it.

    Example:
        >>> with new_folder(Path("DATASET")) as unfinished:
        ...     write_text(unfinished / "dataset.json", "{}")
    """
    temporary = temporary_name(folder)
    make_folder(folder.parent)
    with locked(folder):
        if not is_free(folder):
            raise UsageError(f"{folder} exists already; delete it or choose another output")
        remove_temporaries(folder.parent, glob.escape(folder.name))
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that had our number
        temporary.mkdir()
        try:
            yield temporary
            flush_files(temporary)
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock FOLDER.lock beside a folder that is made in one go.

    Raises:
        UsageError: another process holds it.
    """
    with holding(folder.with_name(f"{folder.name}.lock"), str(folder)):
        yield


def forget_lock(folder: Path) -> None:
    """Remove FOLDER.lock of a process that was killed when it had made the folder already.

    A lock whose holder still runs stays.
    """
    if folder.with_name(f"{folder.name}.lock").exists():
        with contextlib.suppress(UsageError), locked(folder):
            pass


def flush_files(folder: Path) -> None:
    """Wait until the content of all files of a folder is on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            _flush(path)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends, it takes the place of `folder`.

    The old content stays until the new one is complete. If the block raises, the old one stays.
    Only for folders inside a claimed one, whose lock keeps other processes off.
    """
    old = folder.with_name(f".{folder.name}{OLD}")
    temporary = temporary_name(folder)
    put_back(old)
    remove_temporaries(folder.parent, glob.escape(folder.name))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        flush_files(temporary)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def put_back(old: Path) -> None:
    """Give a folder its name back if `replaced_folder` was killed between its two renames."""
    folder = old.with_name(old.name.removeprefix(".").removesuffix(OLD))
    if old.is_dir() and not folder.exists():
        old.rename(folder)


def differing(
    old: Mapping[str, Any], new: Mapping[str, Any], but: Collection[str] = ()
) -> list[str]:
    """Return the keys of `new`, without those in `but`, whose value in `old` is another."""
    return [key for key in new if key not in but and old.get(key) != new[key]]


def is_made(folder: Path, record: str, request: Mapping[str, Any], flag: str = "--output") -> bool:
    """Whether a complete folder is there that was made from this very request.

    Args:
        folder: a folder that `new_folder` wrote: it is complete if it exists.
        record: name of the JSON file in it that holds the request and nothing else.
        request: what the folder shall be made from; compared after a round trip through JSON.
        flag: the option that names the folder, for the error message.

    Raises:
        UsageError: the folder exists and was made from another request, or holds something else.
    """
    if is_free(folder):
        return False
    forget_lock(folder)

    asked = json.loads(json.dumps(request))
    path = folder / record
    if not path.is_file():
        raise UsageError(
            f"{flag} {folder} exists and holds no {record}: delete it or choose another"
        )
    there = read_json_object(path, f"delete {folder} or choose another")
    refuse_other_request(folder, there, asked, flag)
    return True


def refuse_other_request(
    folder: Path, there: Mapping[str, Any], asked: Mapping[str, Any], flag: str
) -> None:
    """Check that a folder was made from the request that is asked for now.

    Either may have a setting that the other lacks, such as that of an option that was left out.

    Args:
        folder: for the error message.
        there: the request that the folder was made from, as JSON values.
        asked: the request now, as JSON values.
        flag: the option that names the folder, for the error message.

    Raises:
        UsageError: they differ.
    """
    if changed := sorted({*differing(there, asked), *differing(asked, there)}):
        raise UsageError(
            f"{flag} {folder} exists and was made from another request (these differ: "
            f"{', '.join(changed)}): delete it or choose another"
        )


def claim(folder: Path, record: str, flag: str, what: str) -> bool:
    """Make an output folder that a long task fills step by step; return whether it is claimed.

    A folder is claimed from the moment its `record` lies in it, so the caller writes that first and
    compares it where it is there already. This process holds the folder's lock until it ends, so
    nobody else writes there meanwhile. What killed processes left unfinished is removed.

    Args:
        folder: made with its parents if it is missing.
        record: name of the file that marks the claim.
        flag: the option that names the folder, for the error message.
        what: what the folder would hold, such as "run" or "evaluation".

    Raises:
        UsageError: the folder holds other files and no record, or another process uses it.
    """
    _refuse_foreign(folder, record, flag, what)
    make_folder(folder)
    acquire(folder / LOCK, f"{flag} {folder}")
    remove_temporaries(folder)
    for old in folder.glob(f".*{OLD}"):
        put_back(old)
    return (folder / record).is_file()


def _refuse_foreign(folder: Path, record: str, flag: str, what: str) -> None:
    """Raise UsageError if a folder holds other files and no record."""
    if folder.is_file():
        raise UsageError(f"{flag} {folder} is a file: give a folder")
    if not folder.is_dir() or (folder / record).is_file():
        return
    if any(path.name != LOCK and not is_temporary(path) for path in folder.iterdir()):
        raise UsageError(f"{flag} {folder} is not empty and holds no {what}: give a new folder")
