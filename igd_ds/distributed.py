"""Process-group set-up, collectives and shutdown; works with one process, gloo and NCCL.

Any launcher will do: `deepspeed`, `torchrun`, `srun` (one task per rank), `mpirun` (mpi4py), or
none."""

import contextlib
import functools
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from igd_ds import locks

# Ranks end through this module as they begin through it.
from igd_ds.ending import exit_process as exit_process
from igd_ds.ending import run as run
from igd_ds.errors import UsageError
from igd_ds.heartbeat import Heartbeat, patience
from igd_ds.memory import keep_freed_memory
from igd_ds.process import Process, end_with_parent, is_started_by_deepspeed

T = TypeVar("T")

TIMEOUT = 10.0
"""Minutes after which a silent rank is given up (--timeout)."""
LOADING = 120.0
"""Minutes that collectives wait while ranks load and evaluate, because their work differs: rank 0
tokenizes and sorts a catalogue of ten million items, which takes half an hour on one core."""
RESOLVING = 40.0
"""Seconds until an address must be known; a cluster may publish a new host's name late."""

_timeout = timedelta(minutes=LOADING)
_groups: list[dist.ProcessGroup] = []
_heartbeat: Heartbeat | None = None
_quiet = False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _slurm_environment() -> dict[str, str]:
    """Return torch's variables from those of srun.

    Without them each task would silently become a world of one rank. The batch script may set
    MASTER_*."""
    job, env = int(os.environ["SLURM_JOB_ID"]), os.environ
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_slurm_host(),
        "MASTER_PORT": env.get("MASTER_PORT", str(20000 + job % 20000)),
    }


def _first_slurm_host() -> str:
    """Return the name of the node where rank 0 runs."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    if "[" not in nodes:
        return nodes.partition(",")[0]
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(
            f"cannot find the first of the nodes {nodes}: {shlex.join(command)} fails ({error}). "
            "Set MASTER_ADDR to its name"
        ) from error


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


def init(timeout: float = TIMEOUT, master_port: int = 0, quiet: bool = False) -> None:
    """Join the process group that the launcher describes; a group of one rank without a launcher.

    Call it before any collective. Collectives wait LOADING minutes, until `set_timeout`. A second
    call in a process sets `quiet` alone.

    Args:
        timeout: minutes that this rank waits for the others to start, and later for an answer of
            the next rank.
        master_port: port at which rank 0 listens; 0 takes the launcher's.
        quiet: `say` only warnings.

    Raises:
        UsageError: more ranks than GPUs on this node, an address that is not known, a port in use,
            or ranks that do not start.
    """
    global _quiet
    _quiet = quiet
    keep_freed_memory()
    launched = ("TORCHELASTIC_RUN_ID", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
    if any(name in os.environ for name in launched) or is_started_by_deepspeed():
        end_with_parent(grace=60 * timeout)
    _describe_group(master_port)
    if dist.is_initialized():
        return

    use_cuda = torch.cuda.is_available()
    if use_cuda:
        if torch.cuda.device_count() == 1:  # a launcher that shows each task only its own GPU
            os.environ["LOCAL_RANK"] = "0"
        if local_rank() >= torch.cuda.device_count():
            raise UsageError(
                f"local rank {local_rank()} has no GPU: {torch.cuda.device_count()} are visible; "
                "start fewer ranks"
            )
        torch.cuda.set_device(local_rank())
    _join("nccl" if use_cuda else "gloo", timeout)
    _watch_ranks(timeout)


@contextlib.contextmanager
def called_from_python(quiet: bool) -> Iterator[None]:
    """Make this process a world of one rank for a block, and leave it as it was.

    A notebook or a script calls trainings and evaluations as often as it likes. The process group
    stays, because DeepSpeed keeps hold of it. The variables that describe it go, because commands
    that the notebook starts would take this process for their launcher. So do the locks of the
    folders that the block wrote.

    Args:
        quiet: as in `init`.

    Raises:
        UsageError: as `init`.
    """
    global _quiet
    variables = {name: os.environ.get(name) for name in _single_environment()}
    locks_before = locks.held()
    try:
        init(quiet=quiet)
        yield
    finally:
        _quiet = False
        for lock in locks.held():
            if lock not in locks_before:
                locks.release(lock)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _describe_group(master_port: int) -> None:
    """Set torch's variables, from the launcher's.

    Raises:
        UsageError: the launcher has decided on another port than `master_port`.
    """
    if "RANK" in os.environ:
        port = os.environ.get("MASTER_PORT", "")
        if master_port and port != str(master_port):
            raise UsageError(
                f"--master_port {master_port}, but the launcher has chosen port {port}: give "
                "--master_port to torchrun or deepspeed, before the script"
            )
        return
    slurm = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in os.environ for name in slurm):
        os.environ.update(_slurm_environment())
    elif "PMI_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ:
        os.environ.update(_mpi_environment())
    else:
        os.environ.update(_single_environment())
    if master_port:
        os.environ["MASTER_PORT"] = str(master_port)


def _join(backend: str, timeout: float) -> None:
    """Make the process group.

    Raises:
        UsageError: the address of rank 0 is not known, its port is in use, or ranks are missing.
    """
    env = os.environ
    address, port = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")
    _check_address(address)
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            raise UsageError(
                f"port {port} (MASTER_PORT) is in use on {socket.gethostname()}: choose "
                "another with --master_port"
            ) from error
        raise UsageError(
            f"rank {env['RANK']} of {env['WORLD_SIZE']} has not met the others at "
            f"{address}:{port} within {timeout:g} minutes (--timeout): {error}"
        ) from error
    set_timeout(LOADING)


def _check_address(address: str) -> None:
    """Raise UsageError if the address of rank 0 stays unknown."""
    began = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if time.monotonic() - began > RESOLVING:
                raise UsageError(
                    f"MASTER_ADDR {address} is not known on {socket.gethostname()} ({error}): set "
                    "it to a name or address of the machine of rank 0"
                ) from error
        time.sleep(2)


def _watch_ranks(timeout: float) -> None:
    """Tell the ranks' processes to each other, and notice when one of them no longer answers."""
    global _heartbeat
    store = dist.distributed_c10d._get_default_store()
    me, world = rank(), world_size()
    store.set(f"process/{me}", json.dumps(vars(Process.here(me))))

    known = range(world) if me == 0 else sorted({0, (me + 1) % world})
    found = store.multi_get([f"process/{other}" for other in known])
    processes = {r: Process(**json.loads(text)) for r, text in zip(known, found, strict=True)}
    if me == 0:
        locks.note_ranks(tuple(processes.values()))
    if world > 1:
        in_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        _heartbeat = Heartbeat(store, me, world, processes, 60 * timeout, in_launcher)


def set_timeout(minutes: float) -> None:
    """Let all collectives wait that long, also those of groups that DeepSpeed has made or will.

    They wait a little longer, so that the message of the heartbeat comes first: it names the rank.
    """
    global _timeout
    _timeout = timedelta(seconds=patience(60 * minutes))
    if not dist.is_initialized():
        return
    _give_new_groups_our_timeout()
    dist.distributed_c10d._get_default_store().set_timeout(_timeout)
    for group in [dist.group.WORLD, *_groups]:
        dist.distributed_c10d._set_pg_timeout(_timeout, group)


@functools.cache  # once
def _give_new_groups_our_timeout() -> None:
    """Wrap `new_group`, which DeepSpeed calls without a timeout: it would then be 30 minutes."""
    make = dist.new_group

    @functools.wraps(make)
    def new_group(*args: Any, **settings: Any) -> Any:
        if len(args) < 2 and settings.get("timeout") is None:
            settings["timeout"] = _timeout
        group = make(*args, **settings)
        if isinstance(group, dist.ProcessGroup):  # this rank is a member
            _groups.append(group)
        return group

    setattr(dist, "new_group", new_group)  # noqa: B010  mypy


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


def is_quiet() -> bool:
    """Return whether only warnings, errors and results are printed (--quiet)."""
    return _quiet


def say(message: str, always: bool = False) -> None:
    """Print on rank 0, above a progress bar if there is one.

    Args:
        message: one or more lines.
        always: print it in a quiet run too: warnings and results.
    """
    if is_main() and (always or not _quiet):
        tqdm.write(message)
        sys.stdout.flush()
