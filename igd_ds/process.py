"""Processes: how one is recognised later, whether it still runs, how it ends with its parent."""

import contextlib
import ctypes
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

PR_SET_PDEATHSIG = 1
"""Number of an option of prctl(2): the signal that a process gets when its parent ends."""
SAME_START = 2.0
"""Seconds between two readings of one process's start time at most; clocks are adjusted."""


@dataclass(frozen=True)
class Process:
    """A process of a job, described so that no later process is mistaken for it."""

    host: str
    namespace: str
    """Which process ids it is counted with: containers of one host count on their own."""
    pid: int
    started: float
    """Seconds since 1970."""
    rank: int = 0

    @classmethod
    def here(cls, rank: int = 0) -> "Process":
        """Describe this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), _namespace(), pid, _start_of(pid), rank)

    def runs(self) -> bool | None:
        """Return whether the process still runs; None if it ran where we cannot see it."""
        if (self.host, self.namespace) != (socket.gethostname(), _namespace()):
            return None
        return still_runs(self.pid, self.started)


def still_runs(pid: int, started: float) -> bool:
    """Return whether the process of this host that had an id and a start time still runs."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < SAME_START and _runs(process)
    except psutil.NoSuchProcess:
        return False


@functools.cache  # later readings may differ a little
def _start_of(pid: int) -> float:
    return psutil.Process(pid).create_time()


def _namespace() -> str:
    """Return the name of this process's table of process ids; "" where the system has but one."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def end_with_parent(grace: float) -> None:
    """Let this process end when its launcher ends, by whatever signal.

    It then gets SIGTERM, on which a training saves. `grace` seconds later it is killed. Call this
    only in a rank that a launcher started: a process of a shell must survive its shell.

    The program `deepspeed` starts its ranks through a second process, which survives the first. The
    first one is watched too.

    Args:
        grace: seconds from SIGTERM to SIGKILL.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    first = None
    if is_started_by_deepspeed():
        with contextlib.suppress(psutil.Error):
            above = psutil.Process(parent).parent()
            first = above if above and _is_deepspeed(above) else None

    arguments = (parent, first, grace)
    threading.Thread(target=_end_with, args=arguments, name="parent", daemon=True).start()


def is_started_by_deepspeed() -> bool:
    """Return whether the parent is the second process of the program `deepspeed`."""
    try:
        return "deepspeed.launcher.launch" in psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return False


def _is_deepspeed(process: psutil.Process) -> bool:
    """Return whether a process is the program `deepspeed`."""
    return any(os.path.basename(word) == "deepspeed" for word in process.cmdline()[:2])


def _end_with(parent: int, first: psutil.Process | None, grace: float) -> None:
    """Wait until a launcher has ended, then end this process.

    Args:
        parent: the process that started this one.
        first: a process that started the parent and must run too, or None.
        grace: seconds from SIGTERM to SIGKILL.
    """
    while os.getppid() == parent and (first is None or first.is_running()):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os.kill(os.getpid(), signal.SIGKILL)


def descendants(pid: int) -> list[psutil.Process]:
    """Return the children of a process, their children, and so on.

    Launchers start their ranks in process groups of their own, so signalling a group misses them.
    """
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def have_ended(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """Wait for processes that need not be children; return whether all have ended in time.

    A zombie has ended: in a container, often nobody collects the children of a killed launcher.
    """
    end = time.monotonic() + seconds
    for process in processes:
        while _runs(process):
            if time.monotonic() > end:
                return False
            time.sleep(0.2)
    return True


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
