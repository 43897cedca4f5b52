"""Ranks that stall, lose their launcher or cannot meet end with a message, and soon."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks

from igd_ds import distributed
from igd_ds.config.options import parse
from igd_ds.eval_config import EvalConfig

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}
SECONDS = 3.0


def stall(folder: Path, stalled: int) -> None:
    """Let one of the ranks be stopped between collectives of a group as DeepSpeed makes it."""

    def main() -> int:
        import torch
        import torch.distributed as dist

        distributed.init(timeout=SECONDS / 60)
        distributed.set_timeout(SECONDS / 60)
        group = dist.new_group([0, 1])
        for step in range(100_000):
            dist.all_reduce(torch.ones(1), group=group)
            if step == 10 and distributed.rank() == stalled:
                (folder / "pid").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
        return 0

    distributed.run(main)


@pytest.mark.parametrize("stalled", [1, 0])
def test_a_stalled_rank_is_named(tmp_path, stalled):
    ranks.warm_up()
    processes = ranks.start(2, tmp_path / "log", stall, tmp_path, stalled)
    processes[1 - stalled].join(60)
    code, text = processes[1 - stalled].exitcode, (tmp_path / "log").read_text()
    ranks.wait(processes, 0)
    assert code == 1, text
    pid = (tmp_path / "pid").read_text()
    assert re.search(
        rf"error: rank {stalled} \(process {pid} on \S+\) has not answered for 3 seconds", text
    ), text
    assert "Traceback" not in text


GROUPS = """
import sys
from datetime import timedelta
import torch.distributed as dist
from igd_ds import distributed
from igd_ds.heartbeat import patience

distributed.init(timeout=7)

def timeouts():
    groups = [dist.group.WORLD, *distributed._groups]
    return {group._get_backend(distributed.device()).options._timeout for group in groups}

dist.new_group([0])
assert timeouts() == {timedelta(seconds=patience(60 * distributed.LOADING))}, timeouts()
distributed.set_timeout(7)
dist.new_group([0])
assert len(distributed._groups) == 2
print(timeouts())
"""

LAUNCHED = """
import os, signal, sys, time
from pathlib import Path
from igd_ds import distributed
from igd_ds.loop import StopRequest

def main():
    distributed.init()
    stop = StopRequest()
    rank = distributed.rank()
    Path(sys.argv[-1], f"pid-{rank}").write_text(f"{os.getpid()} {os.getppid()}")
    while not distributed.any_rank(stop.received):
        time.sleep(0.05)
    Path(sys.argv[-1], f"saved-{rank}").touch()
    return 85

distributed.run(main)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("launcher", "number"),
    [("torchrun", signal.SIGUSR1), ("torchrun", signal.SIGKILL), ("deepspeed", signal.SIGTERM)],
)
def test_ranks_save_and_end_when_their_launcher_ends(tmp_path, launcher, number):
    (tmp_path / "program.py").write_text(LAUNCHED)
    program = Path(sys.executable).parent / launcher
    many = "--num_accelerators" if launcher == "deepspeed" else "--nproc_per_node"
    words = [str(program), many, "2", "--master_port", str(free_port())]
    job = subprocess.Popen(
        [*words, str(tmp_path / "program.py"), str(tmp_path)],
        env=ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("pid-*"))) < 2:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    pids = [int(path.read_text().split()[0]) for path in tmp_path.glob("pid-*")]
    os.kill(job.pid, number)
    job.wait(60)

    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank has outlived its launcher"
        time.sleep(0.1)
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


def is_running(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def rank_0(code: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run Python code as rank 0 of two."""
    environment = ENVIRONMENT | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | variables
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


JOIN = """
from igd_ds import distributed
distributed.RESOLVING = 1
distributed.run(lambda: distributed.init(timeout=2 / 60) or 0)
"""


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = rank_0(JOIN, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: port {port} (MASTER_PORT) is in use on")
    assert "Traceback" not in done.stderr


def test_an_unknown_address_is_named():
    done = rank_0(JOIN, MASTER_ADDR="no-such-host.invalid", MASTER_PORT="29500")
    assert done.returncode == 2
    assert done.stderr.startswith("error: MASTER_ADDR no-such-host.invalid is not known on")
    assert "Traceback" not in done.stderr


def test_ranks_that_do_not_start_are_missed():
    port = str(free_port())
    done = rank_0(JOIN, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert (
        f"rank 0 of 2 has not met the others at 127.0.0.1:{port} within 0.0333333 minutes" in last
    )


def test_every_group_gets_the_timeout():
    done = rank_0(GROUPS, WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{datetime.timedelta(seconds=470)}"


# ---- what launchers say ----

SLURM = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "PATH": "",
}


@pytest.fixture
def environment(monkeypatch):
    """Let a test set variables without those of a launcher around it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored after what the test does
        monkeypatch.delenv(name)
    return monkeypatch


def test_scontrol_is_not_needed_where_the_address_is_given(environment):
    for name, value in SLURM.items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=r"nodes node\[1-2\]: scontrol .* Set MASTER_ADDR"):
        distributed._describe_group(0)
    environment.setenv("MASTER_ADDR", "node1")
    distributed._describe_group(0)
    assert os.environ["MASTER_PORT"] == "20123" and os.environ["RANK"] == "1"


def test_one_node_needs_no_scontrol(environment):
    for name, value in SLURM.items():
        environment.setenv(name, value)
    environment.setenv("SLURM_STEP_NODELIST", "node7")
    distributed._describe_group(29999)
    assert os.environ["MASTER_ADDR"] == "node7" and os.environ["MASTER_PORT"] == "29999"


def test_a_port_that_the_launcher_has_not_chosen_is_refused(environment):
    environment.setenv("RANK", "0")
    environment.setenv("MASTER_PORT", "29500")
    distributed._describe_group(29500)
    with pytest.raises(ValueError, match="the launcher has chosen port 29500"):
        distributed._describe_group(29501)


@pytest.mark.parametrize(
    "flags", ["--timeout 0", "--timeout inf", "--master_port 70000", "--master_port -1"]
)
def test_settings_that_no_job_can_use(flags):
    words = ["--model", "M", "--dataset", "D", "--output_dir", "O", *flags.split()]
    with pytest.raises(ValueError, match=flags.split()[0]):
        parse(EvalConfig, words)


def test_two_trainings_on_one_folder(world, tmp_path):
    run = tmp_path / "run"
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "RANK"}
    jobs = [
        subprocess.Popen(
            [sys.executable, "igd_ds/train.py", *world.train_flags(run, learning_rate=rate)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rate in (1e-3, 2e-3)
    ]
    errors = [job.communicate(timeout=240)[1] for job in jobs]
    codes = [job.returncode for job in jobs]
    assert sorted(codes) == [0, 2], errors
    winner = codes.index(0)
    last = errors[1 - winner].splitlines()[-1]
    assert f"error: --output_dir {run} is in use by process {jobs[winner].pid} on" in last or (
        f"error: --output_dir {run} holds a run already" in last  # the other was slow to start
    )
    assert f"learning_rate: {[0.001, 0.002][winner]}" in (run / "config.yaml").read_text()
    assert json.loads((run / "summary.json").read_text())["step"] == 6
    assert not (run / "lock.json").exists()


@pytest.mark.parametrize(("launcher", "said"), [({"TORCHELASTIC_RUN_ID": "x"}, True), ({}, False)])
def test_that_torchrun_turns_85_into_1_is_said_under_torchrun(launcher, said):
    code = "from igd_ds import distributed; distributed.run(lambda: 85)"
    done = rank_0(code, **launcher)
    assert done.returncode == 85
    assert ("exit code 85: saved, to be started again. torchrun reports 1" in done.stdout) == said
