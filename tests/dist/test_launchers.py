"""One training, three launchers: `deepspeed`, `torchrun` and `mpirun`.

They give the same numbers and end a broken job alike.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Two processes on the CPU, also where there is one GPU.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}
LAUNCHERS = ("deepspeed", "torchrun", "mpirun")

# A program whose rank 1 breaks between collectives; it is run as the entries are.
BREAKS = """
import os, signal, sys
from pathlib import Path
import torch
from igd_ds import distributed

def main():
    distributed.init()
    Path(sys.argv[-1], f"pid-{distributed.rank()}").write_text(str(os.getpid()))
    for step in range(100_000):
        distributed.all_reduce_sum(torch.ones(1))
        if step == 100 and distributed.rank() == 1:
            if sys.argv[-2] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("this rank breaks on purpose")
    return 0

distributed.run(main)
"""


def launch(launcher: str, *words: str) -> subprocess.CompletedProcess:
    """Run a Python script with its arguments on two ranks."""
    program = shutil.which(
        launcher, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if program is None:
        message = f"{launcher} is not installed (mpirun comes with the extra 'mpi')"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    start = {
        "deepspeed": [program, "--num_accelerators", "2", "--master_port", port],
        "torchrun": [program, "--nproc_per_node", "2", "--master_port", port],
        "mpirun": [program, "-n", "2", sys.executable],
    }[launcher]
    return subprocess.run(
        [*start, *words], capture_output=True, text=True, timeout=180, cwd=ROOT, env=ENVIRONMENT
    )


def test_every_launcher_trains_the_same_model(world, tmp_path):
    results = {}
    for launcher in LAUNCHERS:
        run = tmp_path / launcher
        done = launch(launcher, "igd_ds/train.py", *world.train_flags(run, max_steps=3))
        assert done.returncode == 0, (
            f"{launcher}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        assert json.loads((run / "env.json").read_text())["world_size"] == 2
        assert done.stdout.count("done: best nll") == 1  # one rank prints
        check_console(done.stdout, run)
        entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        results[launcher] = [entry.get("train/loss", entry.get("valid/nll")) for entry in entries]
        assert len(results[launcher]) == 4  # three steps, one validation
    assert results["torchrun"] == results["deepspeed"]
    assert results["mpirun"] == results["deepspeed"]


def check_console(text: str, run: Path) -> None:
    """Check the header, and that DeepSpeed's own messages are in the run folder."""
    lines = [line for line in text.splitlines() if "[INFO] [launch" not in line]
    lines = [line for line in lines if "[runner.py" not in line]
    names = ["dataset", "catalogue", "prompts", "model", "objective", "parameters", "steps"]
    begin = next(number for number, line in enumerate(lines) if line.startswith("dataset "))
    header = {line.split()[0]: line for line in lines[begin : begin + 9]}
    assert list(header) == [*names, "device", "run"], text
    assert "2 × CPU, float32, ZeRO stage 2" in header["device"]
    assert header["steps"].endswith("micro-batch 2 × 2 accumulation steps × 2 ranks")
    assert not [line for line in lines if line.startswith("[20")]  # of DeepSpeed's engine
    assert "DeepSpeed info: version" in (run / "deepspeed.log").read_text()


def test_a_stop_is_no_error_on_the_console(tmp_path):
    """With its log level `critical`, deepspeed prints nothing of its own."""
    script = tmp_path / "stops.py"
    script.write_text("from igd_ds import distributed\ndistributed.run(lambda: 85)\n")
    done = launch("deepspeed", "--log_level", "critical", str(script))
    assert done.returncode == 85
    (line,) = set(done.stdout.splitlines())
    assert line.startswith("exit code 85: saved, to be started again. This is no failure")
    assert "ERROR" not in done.stdout + done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_broken_rank_ends_the_whole_job(tmp_path, launcher, how):
    script = tmp_path / "breaks.py"
    script.write_text(BREAKS)
    began = time.monotonic()
    done = launch(launcher, str(script), how, str(tmp_path))
    output = done.stdout + done.stderr
    assert done.returncode != 0, output
    assert time.monotonic() - began < 60
    for rank in (0, 1):
        assert (tmp_path / f"pid-{rank}").is_file(), f"rank {rank} did not start\n{output}"
        pid = (tmp_path / f"pid-{rank}").read_text()
        assert not Path("/proc", pid).exists(), f"rank {rank} has survived its job"
    if how == "raise":
        # The last words of a rank say why the job failed; torchrun adds a traceback of its own.
        words = output.split("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")[0]
        errors = [line for line in words.splitlines() if "Error: " in line]
        assert errors[-1].endswith("RuntimeError: this rank breaks on purpose"), output
