"""What can go wrong because of the user's input, and the exit codes of every command."""

import difflib
from collections.abc import Iterable

EXIT_FAILURE = 1
"""A defect or a failing machine; a traceback is printed."""
EXIT_USAGE = 2
"""Bad input: one line on stderr says what was found and what to do."""
EXIT_REQUEUE = 85
"""A signal asked to stop and everything is saved; the job files in slurm/ requeue on this code."""
EXIT_INTERRUPTED = 130
"""Ctrl-C."""


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
