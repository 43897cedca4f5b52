"""A process that dies, or whose disk is full, at its n-th operation that changes a file.

An audit hook of Python sees every file that is opened for writing, every rename, deletion and new
folder, also those of libraries written in Python. `os.fsync`, `torch.save`, safetensors and Parquet
are wrapped, because they write without Python or tell nobody. Only what lies in one folder counts.

Half of the deaths leave torn content: an opened file stays empty or gets half a line, and a file
that a library writes is cut in the middle.
"""

import errno
import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ranks

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate")


@dataclass
class Fault:
    """What goes wrong, and when.

    Example:
        >>> Fault(Path("OUT"), Path("journal"), at=12, torn=True)
    """

    folder: Path
    """Operations in this folder count."""
    journal: Path
    """Gets one line per operation, so that a test can count and name them."""
    at: int = 0
    """Number of the operation, from 1; 0 lets all of them succeed."""
    kind: str = "kill"
    """"kill": SIGKILL before the operation; "full": this and all later operations that need room
    fail with ENOSPC; "TERM" and "USR1": the signal arrives before it."""
    torn: bool = False
    """A killed operation leaves half of its content."""


class Hook:
    """Counts the operations of this process and lets one of them go wrong."""

    def __init__(self, fault: Fault):
        self.fault = fault
        # Threads count too, TensorBoard's for example, so each operation takes its number at once.
        self.numbers = itertools.count(1)
        self.busy = False
        self.folder = str(fault.folder.resolve())
        self.journal = os.open(fault.journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take note of an audit event."""
        if self.busy:
            return
        if event == "open":
            path, mode, flags = arguments
            if flags & WRITES:
                self.happens("open", path, tear=functools.partial(_half_line, path))
        elif event in CHANGES:
            folder = next((a for a in arguments[-2:] if type(a) is int and a >= 0), None)
            has_descriptor = event in ("os.remove", "os.rmdir") and folder is not None
            base = os.readlink(f"/proc/self/fd/{folder}") if has_descriptor else ""
            self.happens(event, os.path.join(base, os.fsdecode(arguments[0])))

    def happens(self, what: str, path: Any, tear: Callable[[], None] | None = None) -> None:
        """Count an operation; let it go wrong when it is its turn."""
        if isinstance(path, int) or not isinstance(path, (str, bytes, os.PathLike)):
            return
        name = os.path.realpath(os.fsdecode(path))
        if name != self.folder and not name.startswith(self.folder + os.sep):
            return
        number = next(self.numbers)
        os.write(self.journal, f"{what} {os.path.relpath(name, self.folder)}\n".encode())
        if not self.fault.at or number < self.fault.at:
            return

        if self.fault.kind == "full":
            if what not in ("os.remove", "os.rmdir", "os.rename", "os.truncate"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        elif number == self.fault.at:
            self.go_wrong(tear)

    def go_wrong(self, tear: Callable[[], None] | None) -> None:
        """Send this process the signal of the fault."""
        if self.fault.kind != "kill":
            os.kill(os.getpid(), getattr(signal, f"SIG{self.fault.kind}"))
            return
        try:
            if self.fault.torn and tear:
                self.busy = True
                tear()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(self, module: Any, name: str, place: int) -> None:
        """Count the calls of a function that writes the file at this place of its arguments."""
        function = getattr(module, name)

        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            path = arguments[place] if len(arguments) > place else None

            def tear() -> None:
                function(*arguments, **options)
                os.truncate(path, os.path.getsize(path) // 2)

            self.happens(name, path, tear)
            return function(*arguments, **options)

        setattr(module, name, counted)


def _half_line(path: Any) -> None:
    """Leave what a killed write leaves: half a line behind a JSON log, else an empty file."""
    is_log = os.fsdecode(path).endswith(".jsonl")
    with open(path, "ab" if is_log else "wb") as file:
        if is_log:
            file.write(b'{"step": 3, "train/lo')


def install(fault: Fault) -> None:
    """Let the fault happen in this process."""
    import pyarrow.parquet
    import safetensors.torch
    import torch

    hook = Hook(fault)
    hook.wrap(torch, "save", 1)
    hook.wrap(safetensors.torch, "save_file", 1)
    hook.wrap(pyarrow.parquet, "write_table", 1)

    fsync = os.fsync

    def counted(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        hook.happens("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = counted
    sys.addaudithook(hook)


def faulty(fault: Fault, main: Callable[[], int], flags: list[str]) -> None:
    """Run a command as the command line would; on rank 0 the fault happens."""
    if os.environ["RANK"] == "0":
        install(fault)
    ranks.entry(main, flags)
