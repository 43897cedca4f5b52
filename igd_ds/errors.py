"""What can go wrong because of the user's input, and the exit codes of every command."""

import difflib
import errno
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

EXIT_FAILURE = 1
"""A defect or a failing machine; a traceback is printed, unless the disk is full."""
EXIT_USAGE = 2
"""Bad input: one line on stderr says what was found and what to do."""
EXIT_REQUEUE = 85
"""A signal asked to stop and everything is saved; the job files in slurm/ requeue on this code."""
EXIT_INTERRUPTED = 130
"""Ctrl-C."""
EXIT_NO_READER = 141
"""Nobody reads the output any longer, as in `igd show … | head`."""


class UsageError(ValueError):
    """Bad input: a flag, a file, a line or a combination of settings that cannot work.

    The message names the file, line or flag, says what was found and what to do. Commands print it
    without a traceback and exit with EXIT_USAGE.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, or "".

    Example:
        >>> did_you_mean("objetive", ["objective", "seed"])
        ", did you mean 'objective'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean '{near[0]}'?" if near else ""


DELETED_FOLDER = "the working folder was deleted: change to another one"

FULL = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
}
REFUSED = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}
FULL_IN_WORDS = {
    "No space left on device": FULL[errno.ENOSPC],
    "StorageFull": FULL[errno.ENOSPC],
    # torch.save does not say why it failed.
    "PytorchStreamWriter failed writing": "writing failed, probably no space left on the device",
    "iostream error": "writing failed, probably no space left on the device",
}
"""Words of libraries that write files and raise no OSError: Arrow, safetensors, torch."""


def refused_by_system(error: BaseException, folders: Sequence[Path]) -> tuple[str, int] | None:
    """Say in one line that the operating system refuses to write or read, with the exit code.

    Args:
        error: what ended the command.
        folders: where the command writes, for an error that names no file.

    Returns:
        None if the error says something else. The exit code is EXIT_FAILURE for a full disk: the
        command may go on once there is space.
    """
    place = getattr(error, "filename", None)
    number = error.errno if isinstance(error, OSError) else None
    if place is not None and number in REFUSED:
        return (
            f"{os.fsdecode(place)}: {REFUSED[number]}; change that, or give another path",
            EXIT_USAGE,
        )
    if isinstance(error, FileNotFoundError) and not _has_working_folder():
        return DELETED_FOLDER, EXIT_USAGE

    # A full disk may be the reason of an error that was raised later, while a file was closed.
    cause: BaseException | None = error
    while cause is not None:
        if why := _full_disk(cause):
            place = getattr(cause, "filename", None)
            names = [os.fsdecode(place)] if place is not None else [str(path) for path in folders]
            where = ", ".join(names) or "output"
            return f"{where}: {why}; make room, then start again", EXIT_FAILURE
        cause = cause.__cause__ or cause.__context__
    return None


def _full_disk(error: BaseException) -> str | None:
    """Say what an error says of a full disk; None if it says something else."""
    if isinstance(error, OSError) and error.errno in FULL:
        return FULL[error.errno]
    return next((why for words, why in FULL_IN_WORDS.items() if words in str(error)), None)


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def end_without_working_folder() -> None:
    """End the process with one line and EXIT_USAGE if its working folder was deleted.

    Entry points call it before torch is imported: from such a folder torch cannot find its
    libraries, and ends the process with a message about oneMKL.
    """
    if not _has_working_folder():
        print(f"error: {DELETED_FOLDER}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
