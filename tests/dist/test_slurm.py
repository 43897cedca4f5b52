"""The batch scripts on a SLURM of one node: stop by a signal, requeue, resume, evaluate, sweep."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

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


def end_all_jobs() -> None:
    """End every job of a SLURM that was started here, and wait until its node is free.

    A test run that is killed leaves jobs in SLURM's saved state. The next start takes them up
    again as running, and they hold the node although their processes are gone.
    """
    command("scancel", "--user", "root")
    queue = ["squeue", "--noheader"]
    nodes = ["sinfo", "--noheader", "--format", "%t"]
    wait_for(
        lambda: command(*queue) == "" and command(*nodes) == "idle",
        60,
        lambda: command("scontrol", "show", "node"),
    )


@pytest.fixture(scope="module")
def slurm(shared):
    """Provide a SLURM that runs: the machine's own, or one that is started here and stopped again.

    In CI there must be one.
    """
    script = shared / "slurm-one-node.sh"
    problem, started = None, False
    if not is_up():
        if os.geteuid() != 0 or not (shutil.which("slurmctld") or shutil.which("apt-get")):
            problem = "no SLURM runs here, and starting one takes root and slurmctld or apt-get"
        else:
            started = True
            # The script asks nproc for the node's CPUs, and nproc obeys OMP_NUM_THREADS.
            environment = {
                key: value for key, value in os.environ.items() if not key.startswith("OMP_")
            }
            start = ["bash", str(script), "start"]
            done = subprocess.run(
                start, capture_output=True, text=True, timeout=300, env=environment
            )
            if done.returncode or not is_up():
                problem = f"{script} could not start a SLURM: {(done.stdout + done.stderr)[-800:]}"
            else:
                end_all_jobs()
    try:
        if problem and os.environ.get("CI"):
            pytest.fail(problem)
        if problem:
            pytest.skip(problem)
        yield
    finally:
        if started:
            if is_up():
                end_all_jobs()
            subprocess.run(["bash", str(script), "stop"], capture_output=True, timeout=60)


@pytest.fixture
def submit(slurm, tmp_path):
    """Return a function that submits a batch script of the repository and returns the job's id.

    Jobs end with the test.
    """
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
        job = command(
            "sbatch",
            *output,
            *options,
            str(ROOT / "slurm" / script),
            *flags,
            cwd=ROOT,
            env=environment | variables,
        )
        jobs.append(job)
        return job

    yield submit
    for job in jobs:
        subprocess.run(["scancel", job], capture_output=True)


def wait_for(condition, seconds: float, explain) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds} s\n{explain()}\n{command('squeue')}")
        time.sleep(0.2)


def state(job: str) -> dict[str, str]:
    """Return SLURM's view of a job; of an array, that of the last task listed."""
    words = command("scontrol", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def entries(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.is_file()
        else []
    )


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

    # SLURM itself waits two minutes. Within the same second its node would still refuse the job
    # that it has just ended.
    time.sleep(3)
    command("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: state(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 120, text)
    assert state(job)["JobState"] == "COMPLETED", text()
    assert (
        f"resumed {run} from step-{stopped_at:08d}" in text()
    )  # --open-mode=append: both attempts in one file
    assert json.loads((run / "summary.json").read_text())["step"] == 120
    assert [entry["step"] for entry in entries(run) if "train/loss" in entry] == list(range(1, 121))

    evaluation = [
        "--model",
        str(run / "model"),
        "--dataset",
        world.dataset,
        "--num_rows",
        "8",
        "--num_beams",
        "3",
    ]
    evaluation += [
        "--batch_size",
        "4",
        "--alpha",
        "0",
        "0.2",
        "--output_dir",
        str(run / "eval/test"),
    ]
    submit([*TWO_TASKS, "--wait"], "eval.sbatch", evaluation)
    metrics = json.loads((run / "eval/test/metrics.json").read_text())
    assert metrics["rows"] == 8 and set(metrics["alpha"]) == {"0.0", "0.2"}
    assert json.loads((run / "eval/test/timing.json").read_text())["world_size"] == 2


def test_a_sweep_is_two_arrays(submit, world, tmp_path):
    """The first trains and validates every row.

    The second waits for it and tests the row that validation chose.
    """
    model = {"model_config": world.model_config, "tokenizer": world.tokenizer}
    defaults = {
        "ds_config": world.ds_config(2),
        "global_batch_size": 8,
        "max_length": 160,
        "max_steps": 6,
        "learning_rate": 3e-3,
    }
    runs = [
        {
            "dataset": "small",
            "backbone": "qwen2",
            "objective": "igd",
            "igd_beta": [0.1, 0.6],
            "seed": 1,
        }
    ]
    table = {
        "name": "small",
        "datasets": {"small": world.dataset},
        "backbones": {"qwen2": model},
        "defaults": defaults,
    }
    table |= {
        "evaluation": {"alpha": [0, 0.3, 0.6], "num_rows": 16},
        "select": ["igd_beta"],
        "runs": runs,
    }
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    folder = tmp_path / "runs"
    variables = {"TABLE": str(tmp_path / "table.yaml"), "RUNS": str(folder)}
    first = submit([*ONE_TASK, "--array=0-1"], "sweep.sbatch", [], **variables)
    after = [f"--dependency=afterany:{first}", "--array=0-1", "--wait"]
    submit([*ONE_TASK, *after], "sweep.sbatch", [], STAGE="test_row", **variables)

    sweep = json.loads((folder / "sweep.json").read_text())
    printed = "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.out")))
    assert [row["state"] for row in sweep["rows"]] == ["finished", "finished"], printed
    ndcg, alphas = {}, {}
    for row in sweep["rows"]:
        run = folder / row["name"]
        assert f"igd_beta: {row['settings']['igd_beta']}\n" in (run / "config.yaml").read_text()
        assert (
            "srun --kill-on-bad-exit=1 python"
            in (folder / "logs" / f"{row['name']}.log").read_text()
        )
        valid = json.loads((run / "eval/valid/metrics.json").read_text())["alpha"]
        by_alpha = {alpha: values["token_match"]["ndcg@10"] for alpha, values in valid.items()}
        assert set(by_alpha) == {"0.0", "0.3", "0.6"}
        ndcg[row["name"]], alphas[row["name"]] = (
            by_alpha["0.0"],
            {"0.0", max(sorted(by_alpha), key=by_alpha.get)},
        )
    chosen = max(ndcg, key=ndcg.get)
    assert [row["name"] for row in sweep["rows"] if row["chosen"]] == [chosen]
    [test] = folder.glob("*/eval/test/metrics.json")
    test = json.loads(test.read_text())
    assert (
        test["split"] == "test"
        and set(test["alpha"]) == alphas[chosen]
        and (folder / chosen / "eval/test").is_dir()
    )


def test_a_row_of_a_sweep_saves_requeues_and_resumes(submit, world, tmp_path):
    model = {"model_config": world.model_config, "tokenizer": world.tokenizer}
    defaults = {
        "ds_config": world.ds_config(2),
        "global_batch_size": 8,
        "max_length": 160,
        "max_steps": 60,
        "log_every": 1,
        "epochs": 9,
    }
    runs = [{"dataset": "small", "backbone": "qwen2", "objective": "uniform", "seed": 0}]
    table = {
        "name": "small",
        "datasets": {"small": world.dataset},
        "backbones": {"qwen2": model},
        "defaults": defaults,
    }
    (tmp_path / "table.yaml").write_text(
        yaml.safe_dump(table | {"evaluation": {"num_rows": 8}, "runs": runs})
    )
    run = tmp_path / "runs" / "small-qwen2-uniform-seed0"
    variables = {"TABLE": str(tmp_path / "table.yaml"), "RUNS": str(run.parent)}
    job = submit([*TWO_TASKS, "--array=0"], "sweep.sbatch", [], **variables)

    def log() -> str:
        path = run.parent / "logs" / f"{run.name}.log"
        return path.read_text() if path.is_file() else ""

    wait_for(lambda: len(entries(run)) > 3, 300, log)
    command("scancel", "--signal", "USR1", job)  # what --signal=USR1@120 does before the time limit
    wait_for(lambda: state(job)["JobState"] == "PENDING", 60, log)
    assert "stopped by a signal after step" in log() and not (run / "summary.json").exists()
    [row] = json.loads((run.parent / "sweep.json").read_text())["rows"]
    assert (row["state"], row["error"]) == ("waiting", None)

    time.sleep(3)  # as above: the node would still refuse the job
    command("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: state(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 300, log)
    assert state(job)["JobState"] == "COMPLETED", log()
    assert (
        f"resumed {run} from step-" in log()
        and json.loads((run / "summary.json").read_text())["step"] == 60
    )
    assert (run / "eval/valid/metrics.json").is_file()
