"""Process-group set-up, collectives and shutdown; works with one process, gloo and NCCL.

Any launcher will do: `deepspeed`, `torchrun`, `srun` (one task per rank), `mpirun` (mpi4py), or
none."""

import logging
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from igd_ds.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, UsageError
from igd_ds.memory import keep_freed_memory

T = TypeVar("T")

# Words of the errors that a rank sees when another rank has ended.
LOST_PEER = ("Connection closed", "Connection reset", "rank 0 failed", "NCCL")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _slurm_environment() -> dict[str, str]:
    """Return torch's variables from those of srun.

    Without them each task would silently become a world of one rank. The batch script may set
    MASTER_*."""
    job, env = int(os.environ["SLURM_JOB_ID"]), os.environ
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    command = ["scontrol", "show", "hostnames", nodes]
    hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "MASTER_ADDR": env.get("MASTER_ADDR", hosts[0]),
        "MASTER_PORT": env.get("MASTER_PORT", str(20000 + job % 20000)),
    }


def _mpi_environment() -> dict[str, str]:
    """Return torch's variables from MPI.

    Rank 0 picks a free port, so that two jobs on one node do not collide.
    """
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    single_node = local.Get_size() == world.Get_size()
    address = ("127.0.0.1" if single_node else socket.gethostname(), _free_port())
    host, port = world.bcast(address, root=0)
    return {
        "RANK": str(world.Get_rank()),
        "WORLD_SIZE": str(world.Get_size()),
        "LOCAL_RANK": str(local.Get_rank()),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }


def _single_environment() -> dict[str, str]:
    """Return torch's variables of a world of one rank."""
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }


def init(timeout_minutes: float = 120) -> None:
    """Join the process group that the launcher describes; a group of one rank without a launcher.

    Call it once, before any collective.

    Args:
        timeout_minutes: how long a collective waits. The default leaves rank 0 time to tokenize and
            sort a catalogue of ten million items, which takes about half an hour on one core.

    Raises:
        UsageError: more ranks than GPUs on this node.
    """
    keep_freed_memory()
    if "RANK" not in os.environ:
        slurm = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID")
        if all(name in os.environ for name in slurm):
            os.environ.update(_slurm_environment())
        elif "PMI_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ:
            os.environ.update(_mpi_environment())
        else:
            os.environ.update(_single_environment())

    use_cuda = torch.cuda.is_available()
    if use_cuda:
        if torch.cuda.device_count() == 1:  # a launcher that shows each task only its own GPU
            os.environ["LOCAL_RANK"] = "0"
        if local_rank() >= torch.cuda.device_count():
            raise UsageError(
                f"local rank {local_rank()} has no GPU: {torch.cuda.device_count()} are visible; "
                "start "
                "fewer ranks"
            )
        torch.cuda.set_device(local_rank())
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timeout)


def rank() -> int:
    """Return this process's global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Return this process's index on its node, which is its GPU's index too."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Return whether this is rank 0, the rank that prints and writes."""
    return rank() == 0


def device() -> torch.device:
    """Return the device that this rank computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is true on at least one rank; every rank must call it."""
    return bool(all_reduce_sum(torch.tensor(int(flag), device=device())).item())


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result on every rank, so that all ranks decide alike.

    The other ranks wait, and fail with rank 0 if `work` fails there. Results must be small plain
    values.

    Example:
        >>> finished = on_main(lambda: (run / "summary.json").is_file())
    """
    error: Exception | None = None
    succeeded, result = True, None
    if is_main():
        try:
            result = work()
        except Exception as caught:
            error, succeeded = caught, False

    message = [succeeded, result]
    if dist.is_initialized():
        dist.broadcast_object_list(message, src=0, device=device())
    if error is not None:
        raise error
    if not message[0]:
        raise RuntimeError("rank 0 failed; its message says why")
    return message[1]  # type: ignore[return-value]  # what rank 0 returned


def say(message: str) -> None:
    """Print on rank 0."""
    if is_main():
        print(message, flush=True)


def exit_process(code: int) -> None:
    """End this process now, after flushing what was printed and logged.

    `os._exit` is used on purpose. With ZeRO-3 on gloo an orderly shutdown of the interpreter can
    abort (-6) after a good run, because the collective's worker thread drops its last tensor while
    Python is finalising."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(main: Callable[[], int]) -> None:
    """Run an entry point and end the process with its exit code.

    Bad input (UsageError) is printed in one line, by rank 0 if it sees the error too, with code 2.
    Any other exception ends with code 1 and its traceback as last words. A rank whose collective
    broke because another rank ended waits for the launcher to stop it before it prints, so that the
    traceback of the rank that failed first stays last."""
    try:
        code = main()
    except SystemExit as error:  # argparse: --help, or a flag it does not know
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except UsageError as error:
        sys.stdout.flush()
        time.sleep(0 if is_main() else 2)
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USAGE
    except BaseException as error:
        if any(words in str(error) for words in LOST_PEER):
            time.sleep(5)
        sys.stdout.flush()
        traceback.print_exc()
        code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAILURE
    exit_process(code)
