"""Processes: who am I, how do we start, how do we agree, how do we end. Right with one process and on gloo or NCCL.

Any launcher will do: `deepspeed`, `torchrun`, `srun` (one task a rank), `mpirun` (mpi4py), or none at all.
"""

import logging
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from igd_ds.errors import UsageError

EXIT_REQUEUE = 85  # a signal asked to stop and everything is saved: the job files in slurm/ requeue on this code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _slurm_environment() -> dict[str, str]:
    """Map srun's variables: without this each task would silently be a world of one (the batch script may set MASTER_*)."""
    job, env = int(os.environ["SLURM_JOB_ID"]), os.environ
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    first = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "MASTER_ADDR": env.get("MASTER_ADDR", first),
        "MASTER_PORT": env.get("MASTER_PORT", str(20000 + job % 20000)),
    }


def _mpi_environment() -> dict[str, str]:
    """Let MPI say who we are; rank 0 picks a free port, so that two jobs on one node do not collide."""
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


def init(timeout_minutes: float = 120) -> None:
    """Join the process group the launcher describes (a group of one without a launcher). Call once, before any collective.

    The timeout leaves rank 0 time to tokenize and sort a catalogue of ten million items (about half an hour on one core).
    """
    if "RANK" not in os.environ:
        if (
            "SLURM_STEP_ID" in os.environ
            and "SLURM_PROCID" in os.environ
            and "SLURM_LOCALID" in os.environ
        ):
            environment = _slurm_environment()
        elif "PMI_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ:
            environment = _mpi_environment()
        else:
            environment = {
                "RANK": "0",
                "WORLD_SIZE": "1",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(_free_port()),
            }
        os.environ.update(environment)
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        if torch.cuda.device_count() == 1:  # a launcher that shows each task its own GPU only
            os.environ["LOCAL_RANK"] = "0"
        if local_rank() >= torch.cuda.device_count():
            raise UsageError(
                f"local rank {local_rank()} has no GPU: {torch.cuda.device_count()} are visible; start fewer ranks"
            )
        torch.cuda.set_device(local_rank())
    dist.init_process_group(
        "nccl" if use_cuda else "gloo", timeout=timedelta(minutes=timeout_minutes)
    )


def rank() -> int:
    """This process's global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's index on its node, which is its GPU's index too."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this is rank 0, the one that prints and writes."""
    return rank() == 0


def device() -> torch.device:
    """The device this rank computes on."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank; every rank must call it."""
    return bool(all_reduce_sum(torch.tensor(int(flag), device=device())).item())


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def on_main(work: Callable):
    """Run `work` on rank 0 alone and return its result on every rank, so that all of them decide alike.

    The others wait, and end with rank 0 if it fails there. Results are small plain values.
    """
    error, message = None, [True, None]
    if is_main():
        try:
            message = [True, work()]
        except Exception as caught:
            error, message = caught, [False, None]
    if dist.is_initialized():
        dist.broadcast_object_list(message, src=0, device=device())
    if error is not None:
        raise error
    if not message[0]:
        raise RuntimeError("rank 0 failed; its message says why")
    return message[1]


def say(message: str) -> None:
    """Print on rank 0."""
    if is_main():
        print(message, flush=True)


def exit_process(code: int) -> None:
    """End this process now, after flushing what was printed and logged.

    `os._exit` on purpose: with ZeRO-3 on gloo an orderly interpreter shutdown can abort (-6) after a good run, when the
    collective's worker thread drops its last tensor while Python is finalising.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_bad_input(error: BaseException) -> bool:
    """Whether an exception is a ValueError that this package raised on purpose; one from a library's depths is a bug."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        isinstance(error, ValueError)
        and os.path.dirname(__file__) in place.filename
        and str(place.line).startswith("raise")
    )


def run(main: Callable[[], int]) -> None:
    """Run an entry point and end the process with its exit code; on an exception, with 1 and the traceback as last words.

    Bad input is told in one line, by rank 0 if it sees it too, with code 2. A rank whose collective broke because another rank
    ended waits for the launcher to stop it before it prints, so that the traceback of the rank that failed first stays last.
    """
    try:
        code = main()
    except SystemExit as error:  # argparse: --help, or a flag it does not know
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        if any(
            word in str(error)
            for word in ("Connection closed", "Connection reset", "rank 0 failed", "NCCL")
        ):
            time.sleep(5)
        sys.stdout.flush()
        if _is_bad_input(error):
            time.sleep(0 if is_main() else 2)
            print(f"error: {error}", file=sys.stderr)
            code = 2
        else:
            traceback.print_exc()
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
    exit_process(code)
