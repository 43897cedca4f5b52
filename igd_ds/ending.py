"""How a command ends: the message about what went wrong, and the exit code.

It needs no torch, so that commands which need none start at once.
"""

import contextlib
import logging
import os
import select
import sys
import time
import traceback
from collections.abc import Callable

from igd_ds import locks
from igd_ds.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_NO_READER,
    EXIT_REQUEUE,
    EXIT_USAGE,
    UsageError,
    refused_by_system,
)
from igd_ds.process import is_started_by_deepspeed

# Words of the errors that a rank sees when another rank has ended.
LOST_PEER = ("Connection closed", "Connection reset", "rank 0 failed", "NCCL")


def _is_main() -> bool:
    """Return whether this process is rank 0; launchers and `distributed.init` set RANK."""
    return os.environ.get("RANK", "0") == "0"


def _reader_has_gone() -> bool:
    """Return whether stdout is a pipe that nobody reads any longer."""
    stdout = select.poll()
    stdout.register(1, select.POLLOUT)
    return any(event & select.POLLERR for _, event in stdout.poll(0))


def _explain_requeue() -> None:
    """Say that exit code 85 is no failure, where the launcher will report it as one."""
    saved = f"exit code {EXIT_REQUEUE}: saved, to be started again"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        print(f"{saved}. torchrun reports 1", flush=True)
    elif is_started_by_deepspeed():
        print(f"{saved}. This is no failure, whatever deepspeed says now", flush=True)


def exit_process(code: int) -> None:
    """End this process now, after flushing what was printed and logged.

    `os._exit` is used on purpose. With ZeRO-3 on gloo an orderly shutdown of the interpreter can
    abort (-6) after a good run, because the collective's worker thread drops its last tensor while
    Python is finalising."""
    locks.release_all()
    if code == EXIT_REQUEUE and _is_main():
        _explain_requeue()
    elif code == EXIT_REQUEUE:
        time.sleep(2)  # a launcher ends all ranks when the first has ended, and rank 0 has to speak
    logging.shutdown()
    with contextlib.suppress(OSError):  # nobody reads on, or the disk is full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run(main: Callable[[], int]) -> None:
    """Run an entry point and end the process with its exit code.

    Bad input (UsageError) is printed in one line, by rank 0 if it sees the error too, with code 2.
    So is what the operating system refuses to write (`refused_by_system`). A command whose output
    nobody reads any longer ends without a word, as `cat` does. Any other exception ends with code 1
    and its traceback as last words. A rank whose collective broke because another rank
    ended waits for the launcher to stop it before it prints, so that the traceback of the rank that
    failed first stays last.
    """
    try:
        code = main()
    except SystemExit as error:  # argparse: --help, or a flag it does not know
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except UsageError as error:
        sys.stdout.flush()
        time.sleep(0 if _is_main() else 2)
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USAGE
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            exit_process(EXIT_NO_READER)
        if any(words in str(error) for words in LOST_PEER):
            time.sleep(5)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAILURE
        if refused := refused_by_system(error, [lock.parent for lock in locks.held()]):
            message, code = refused
            print(f"error: {message}", file=sys.stderr)
        else:
            traceback.print_exc()
    exit_process(code)
