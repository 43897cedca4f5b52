"""Locks of output folders: two processes never write one folder.

A lock is a small JSON file that names its holder: rank 0 of a job, and the job's other ranks. It is
created atomically and removed when the holder ends. After a kill it stays, and the next process on
the same host takes it over once no process of the job runs there any more.
"""

import atexit
import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import IO

from igd_ds.errors import UsageError
from igd_ds.process import Process

LOCK = "lock.json"
"""Name of the lock in a folder that is filled step by step."""
UNREADABLE = 5.0
"""Seconds after which an empty lock is no longer taken for one that is just being written."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    processes: tuple[Process, ...]
    """By rank; rank 0 is the one that holds the lock."""
    since: str
    """Local time of the holder's host."""
    command: str
    job: str
    """SLURM's number of the job; "" outside of SLURM."""
    restart: str
    """How often SLURM has restarted the job."""

    @classmethod
    def here(cls) -> "Holder":
        """Describe this process and the ranks that `note_ranks` was told."""
        ranks = [rank for rank in _ranks if rank.rank]
        return cls(
            (Process.here(), *ranks),
            datetime.now().isoformat(sep=" ", timespec="seconds"),
            shlex.join(sys.argv),
            os.environ.get("SLURM_JOB_ID", ""),
            os.environ.get("SLURM_RESTART_COUNT", "0"),
        )

    def to_json(self) -> str:
        """Return the content of the lock."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, file: IO[str]) -> "Holder | None":
        """Return the holder that a lock names; None if it is empty or damaged."""
        try:
            values = json.load(file)
            processes = tuple(Process(**process) for process in values.pop("processes"))
            return cls(processes, **values) if processes else None
        except (ValueError, TypeError, AttributeError, KeyError):
            return None

    def was_stopped_by_slurm(self) -> bool:
        """Return whether it is an earlier start of this very SLURM job, which has ended then."""
        now = Holder.here()
        return bool(self.job) and self.job == now.job and self.restart != now.restart


_ranks: tuple[Process, ...] = ()
_held: dict[Path, Process] = {}


def note_ranks(ranks: tuple[Process, ...]) -> None:
    """Remember the processes of this job, so that every lock names them."""
    global _ranks
    _ranks = ranks


def acquire(lock: Path, what: str) -> bool:
    """Take a lock for this process.

    Args:
        lock: the file; its folder must exist.
        what: what it protects, for the message, such as "--output_dir RUN".

    Returns:
        False if this process holds it already.

    Raises:
        UsageError: another process holds it.
    """
    lock, me = lock.absolute(), Process.here()
    if _held.get(lock) == me:
        return False
    while not (_created(lock) or _taken_over(lock, what)):
        time.sleep(0.1)
    _held[lock] = me
    return True


def _created(lock: Path) -> bool:
    """Create the lock; return False if it is there already."""
    try:
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(Holder.here().to_json())
    except OSError:
        lock.unlink()
        raise
    return True


def _taken_over(lock: Path, what: str) -> bool:
    """Take the lock from a holder that has ended; return False if it must be tried again.

    Raises:
        UsageError: the holder runs, or it cannot be told from here.
    """
    with (
        contextlib.suppress(FileNotFoundError),
        open(lock, encoding="utf-8", errors="replace") as f,
    ):
        # One process at a time looks at this file. Where the file system has no such locks, only
        # two takeovers within a millisecond could meet.
        with contextlib.suppress(OSError):
            fcntl.flock(f, fcntl.LOCK_EX)
        status = os.fstat(f.fileno())
        if not os.path.samestat(status, lock.stat()):
            return False  # another process was faster

        holder = Holder.read(f)
        if holder is None and abs(time.time() - status.st_mtime) < UNREADABLE:
            return False
        if holder is not None:
            _refuse_living(holder, lock, what)
        _replace(lock)
        return True
    return False


def _replace(lock: Path) -> None:
    """Write this process into a lock whose holder has ended."""
    own = lock.with_name(f"{lock.name}.tmp-{os.getpid()}")
    try:
        own.write_text(Holder.here().to_json(), encoding="utf-8")
        os.replace(own, lock)
    except OSError:
        own.unlink(missing_ok=True)
        raise


def _refuse_living(holder: Holder, lock: Path, what: str) -> None:
    """Raise UsageError unless all processes of the holder that can be seen have ended."""
    if holder.was_stopped_by_slurm():
        return
    first = holder.processes[0]
    since = f"since {holder.since} ({holder.command})"
    if first.runs() is None:
        raise UsageError(
            f"{what} is in use by process {first.pid} on {first.host}, {since}. If that process no "
            f"longer runs there, remove {lock}"
        )

    for process in holder.processes:
        if process.runs():
            rank = f" (rank {process.rank})" if len(holder.processes) > 1 else ""
            raise UsageError(
                f"{what} is in use by process {process.pid}{rank} on {process.host}, {since}: wait "
                "until it ends, or stop it"
            )


def release(lock: Path) -> None:
    """Give a lock back. Nothing happens unless this process holds it."""
    lock = lock.absolute()
    if _held.get(lock) != Process.here():
        return  # not ours: a forked child inherits the list
    del _held[lock]

    # Somebody may have removed the file by hand, and another process may hold the lock now.
    with contextlib.suppress(OSError):
        with open(lock, encoding="utf-8", errors="replace") as file:
            holder = Holder.read(file)
        if holder is not None and holder.processes[0] == Process.here():
            lock.unlink()


@atexit.register
def release_all() -> None:
    """Give all locks of this process back."""
    for lock in list(_held):
        release(lock)


def held() -> list[Path]:
    """Return the locks that this process holds."""
    me = Process.here()
    return [lock for lock, holder in _held.items() if holder == me]


@contextlib.contextmanager
def holding(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock for a block, see `acquire`."""
    is_new = acquire(lock, what)
    try:
        yield
    finally:
        if is_new:
            release(lock)


def end_at(number: signal.Signals, code: int) -> None:
    """Let a signal end this process at once with an exit code, after giving its locks back."""

    def end(received: int, frame: FrameType | None) -> None:
        release_all()
        os._exit(code)

    signal.signal(number, end)
