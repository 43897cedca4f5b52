"""The batch scripts on a real one-node SLURM: stop by a signal, requeue, resume, evaluate, sweep."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
TWO_TASKS = ["--gres", "none", "--ntasks-per-node", "2", "--cpus-per-task", "1"]
ONE_TASK = ["--gres", "none", "--ntasks-per-node", "1", "--cpus-per-task", "1"]


def command(*words, **settings) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, **settings)
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def is_up() -> bool:
    return (
        shutil.which("scontrol") is not None
        and "is UP" in subprocess.run(["scontrol", "ping"], capture_output=True, text=True).stdout
    )


@pytest.fixture(scope="module")
def slurm(shared):
    """A SLURM that runs: the machine's own, or one started here and stopped afterwards. In CI there must be one."""
    script = shared / "slurm-one-node.sh"
    problem, started = None, False
    if not is_up():
        if os.geteuid() != 0 or not (shutil.which("slurmctld") or shutil.which("apt-get")):
            problem = "no SLURM runs here, and starting one takes root and slurmctld or apt-get"
        else:
            started = True
            # The script asks nproc for the node's CPUs, and nproc obeys OMP_NUM_THREADS.
            environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
            start = ["bash", str(script), "start"]
            done = subprocess.run(start, capture_output=True, text=True, timeout=300, env=environment)
            if done.returncode or not is_up():
                problem = f"{script} could not start a SLURM: {(done.stdout + done.stderr)[-800:]}"
    try:
        if problem and os.environ.get("CI"):
            pytest.fail(problem)
        if problem:
            pytest.skip(problem)
        yield
    finally:
        if started:
            subprocess.run(["bash", str(script), "stop"], capture_output=True, timeout=60)


@pytest.fixture
def submit(slurm, tmp_path):
    """A function that submits a batch script from the repository and returns the job's id; jobs end with the test."""
    jobs = []

    def submit(options: list[str], script: str, flags: list[str], **variables) -> str:
        environment = {
            **os.environ,
            "VENV": sys.prefix,
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        output = ["--output", str(tmp_path / "%j.out"), "--parsable"]
        job = command("sbatch", *output, *options, str(ROOT / "slurm" / script), *flags, cwd=ROOT, env=environment | variables)
        jobs.append(job)
        return job

    yield submit
    for job in jobs:
        subprocess.run(["scancel", job], capture_output=True)


def wait_for(condition, seconds: float, explain) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s\n{explain()}"
        time.sleep(0.2)


def state(job: str) -> dict[str, str]:
    """SLURM's view of a job; of an array, that of the last task listed."""
    words = command("scontrol", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def entries(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []


def test_a_job_saves_requeues_resumes_and_is_evaluated(submit, world, tmp_path):
    run = tmp_path / "run"
    flags = world.train_flags(run, max_steps=120, validate_every=60, epochs=100)
    job = submit(TWO_TASKS, "train.sbatch", flags)
    output = tmp_path / f"{job}.out"

    def text() -> str:
        return output.read_text() if output.is_file() else ""

    wait_for(lambda: len(entries(run)) > 3, 120, text)
    command("scancel", "--signal", "USR1", job)  # what --signal=USR1@120 does before the time limit
    wait_for(lambda: state(job)["JobState"] == "PENDING", 60, text)
    assert state(job)["Restarts"] == "1"
    assert "stopped by a signal after step" in text()
    assert json.loads((run / "env.json").read_text())["world_size"] == 2
    [checkpoint] = (run / "checkpoints").glob("step-*")
    stopped_at = int(checkpoint.name.removeprefix("step-"))
    assert stopped_at < 120 and not (run / "summary.json").exists()

    # SLURM itself waits two minutes; within the same second its node would still refuse the job it has just ended.
    time.sleep(3)
    command("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: state(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 120, text)
    assert state(job)["JobState"] == "COMPLETED", text()
    assert f"resumed {run} from step-{stopped_at:08d}" in text()  # --open-mode=append: both attempts in one file
    assert json.loads((run / "summary.json").read_text())["step"] == 120
    assert [entry["step"] for entry in entries(run) if "train/loss" in entry] == list(range(1, 121))

    evaluation = ["--model", str(run / "model"), "--dataset", world.dataset, "--num_rows", "8", "--num_beams", "3"]
    evaluation += ["--batch_size", "4", "--alpha", "0", "0.2", "--output_dir", str(run / "eval/test")]
    submit([*TWO_TASKS, "--wait"], "eval.sbatch", evaluation)
    metrics = json.loads((run / "eval/test/metrics.json").read_text())
    assert metrics["rows"] == 8 and set(metrics["alpha"]) == {"0.0", "0.2"}
    assert json.loads((run / "eval/test/timing.json").read_text())["world_size"] == 2


def test_a_sweep_trains_chooses_alpha_and_tests_every_row(submit, world, tmp_path):
    table = tmp_path / "sweep.tsv"
    rows = [(world.dataset, "igd", "0.1", "0"), (world.dataset, "uniform", "-", "1")]
    table.write_text("\n".join("\t".join(row) for row in [("dataset", "weighting", "igd_beta", "seed"), *rows]) + "\n")
    flags = world.train_flags("unused", dataset=None, output_dir=None, igd_beta=None)
    job = submit(
        [*ONE_TASK, "--array=0-1", "--wait"],
        "sweep.sbatch",
        flags,
        TABLE=str(table),
        RUNS=str(tmp_path / "runs"),
        ALPHAS="0 0.3 0.6",
        EVAL_FLAGS="--num_rows 8 --num_beams 10",
    )
    for dataset, weighting, beta, seed in rows:
        run = tmp_path / "runs" / f"{Path(dataset).name}-{weighting}-{beta}-{seed}"
        config = (run / "config.yaml").read_text()
        assert f"weighting: {weighting}\n" in config and f"seed: {seed}\n" in config, job
        valid, test = (json.loads((run / "eval" / split / "metrics.json").read_text()) for split in ("valid", "test"))
        ndcg = {alpha: values["token_match"]["ndcg@10"] for alpha, values in valid["alpha"].items()}
        assert set(ndcg) == {"0.0", "0.3", "0.6"}
        best = max(sorted(ndcg), key=ndcg.get)
        assert test["split"] == "test" and set(test["alpha"]) == {"0.0", best}


def test_the_checked_in_table_is_what_the_script_reads():
    header, *rows = [line.split("\t") for line in (ROOT / "slurm" / "sweep.tsv").read_text().splitlines()]
    assert header == ["dataset", "weighting", "igd_beta", "seed"]
    assert len({tuple(row) for row in rows}) == len(rows) and all(len(row) == 4 for row in rows)
    [array] = [line for line in (ROOT / "slurm/sweep.sbatch").read_text().splitlines() if line.startswith("#SBATCH --array")]
    assert array == f"#SBATCH --array=0-{len(rows) - 1}"
