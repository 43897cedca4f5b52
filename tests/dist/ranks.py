"""Forked ranks. A job of two ranks takes 3 s, because the parent has imported everything already.

With a launcher it takes 15 s.
"""

import multiprocessing
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

FORK = multiprocessing.get_context("fork")


def warm_up() -> None:
    """Import in the parent what every rank needs.

    No tensor work is done, so that no thread pool crosses the fork.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import igd_ds.baseline
    import igd_ds.eval
    import igd_ds.prefer
    import igd_ds.train  # noqa: F401

    transformers.AutoModelForCausalLM  # noqa: B018  lazy: touching it imports it


def _child(
    rank: int, world: int, port: int, log: Path, function: Callable, arguments: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(world),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    # Forked processes share tqdm's lock. A rank that is killed while it holds the lock would stop
    # all later ranks, and this test run, at their next progress bar.
    tqdm.set_lock(threading.RLock())

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    code = 1
    try:
        code = function(*arguments) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(world: int, log: Path, function: Callable, *arguments) -> list:
    """Fork `world` ranks that run function(*arguments); return the processes.

    Their output goes to `log`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        FORK.Process(target=_child, args=(r, world, port, log, function, arguments))
        for r in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def wait(processes: list, timeout: float = 240) -> list[int]:
    """Return the exit codes. When a rank fails, all are stopped, as a launcher does it."""
    waiting = list(processes)
    while waiting and timeout > 0:
        for process in list(waiting):
            process.join(0.05)
            timeout -= 0.05
            if process.exitcode is not None:
                waiting.remove(process)
                if process.exitcode not in (0, 85):
                    timeout = min(timeout, 8)
    for process in waiting:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def run(world: int, log: Path, function: Callable, *arguments) -> str:
    """Run to the end, assert that all ranks succeeded, and return their output."""
    codes = wait(start(world, log, function, *arguments))
    text = log.read_text()
    assert codes == [0] * world, f"exit codes {codes}\n{text[-6000:]}"
    return text


def entry(main: Callable, flags: list[str]) -> None:
    """Run an entry point as the command line would, with its own exit."""
    from igd_ds import distributed

    sys.argv = ["igd_ds", *flags]
    distributed.run(main)
