"""Run a table of trainings and evaluations, and choose among them by the papers' rule: β on validation, then α, test once.

    igd sweep TABLE --output RUNS [--jobs N | --gpus N] [--launcher "torchrun --standalone --nproc_per_node 2"]
    igd sweep TABLE --output RUNS --list       # every row's state; of failed rows the error
    igd sweep TABLE --output RUNS --retry      # failed rows again

Stage 1 of a row trains it and ranks the validation rows over the table's grid of α. Of the rows that the table lets validation
choose from (`select`), the group with the best mean NDCG@10 over its seeds at α = 0 is chosen, once all of them have finished: a
failed candidate holds up the choice until it is run again (--retry) or the table marks it `run: false`, which leaves it out and
on record. Stage 2 ranks the test rows, for chosen rows alone, at α = 0 and the α that was best on validation.

Started again, it skips what is finished and resumes what was interrupted. TERM, INT and USR1 reach the running rows, which save;
the exit code is then 85. Else it is 0 if every row is finished, 1 if not, 2 for bad input. Rows go under any launcher that stops
with its ranks: python (the default, one rank), torchrun, mpirun, srun; slurm/sweep.sbatch runs them as an array.

RUNS/NAME/ are the run folders, RUNS/logs/NAME.log all that a row printed, RUNS/logs/NAME.json what its last attempt came to.
RUNS/sweep.json, for the report, is a snapshot of these: any number of nodes may work on one table, each on rows of its own.
How a table is written: igd_ds/studies/sweep_table.py; tables: tools/sweeps/.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil
import yaml

from igd_ds.distributed import EXIT_REQUEUE
from igd_ds.errors import UsageError
from igd_ds.folders import write_json
from igd_ds.runlog import FREE_ON_RESUME
from igd_ds.studies.sweep_table import (
    EVALUATIONS_OWN,
    METRIC,
    Row,
    Table,
    filled,
    read_table,
    resolved,
)

HEARTBEAT, SILENCE = (
    60,
    600,
)  # seconds: how often a running row's file is touched; after how many without it counts as dead
ENTRIES = Path(__file__).resolve().parents[1] / "igd_ds"
# Stopped by a signal; or hit by USR1 while still loading, which just ends them (the last: as srun reports it).
STOPPED = (EXIT_REQUEUE, -signal.SIGUSR1, 128 + signal.SIGUSR1)
REQUEST_FILES = ("guidance", "item_filter")  # settings of eval.py that name files
ERROR_LINE = re.compile(r"(\[rank\d+\]: )?(error: |[\w.]*(Error|Exception): )")
LAUNCHER_ERROR = ("ChildFailedError", "CalledProcessError")


@dataclass(frozen=True)
class Status:
    """What became of a row: see `survey`."""

    state: str
    error: str | None = None
    score: float | None = None  # NDCG@10 on validation at α = 0
    chosen: bool | None = None


def survey(table: Table, runs: Path) -> dict[str, Status]:
    """Return the status of every row by name, as the run folders and the rows' own files tell it.

    finished: validated and not chosen, or tested. waiting: not begun, interrupted, or its family is undecided. not run: so the
    table says. running and failed: in either stage.
    """
    scores = {row.name: validation_score(runs / row.name) for row in table.to_run}
    chosen = table.choose(scores)
    return {
        row.name: _status(row, runs, scores[row.name], chosen[row.name])
        if row.run
        else Status("not run")
        for row in table.rows
    }


def _status(row: Row, runs: Path, score: float | None, chosen: bool | None) -> Status:
    attempt = last_attempt(runs, row)
    state, error = "waiting", None
    if score is not None and (
        chosen is False or (chosen and all(done.is_file() for done, _ in steps(row, runs, 2)))
    ):
        state = "finished"
    elif attempt["state"] == "running" and is_alive(attempt, attempt_file(runs, row)):
        state = "running"
    elif attempt["state"] == "failed":
        state, error = "failed", attempt["error"]
    elif score is None and (path := runs / row.name / "eval" / "valid" / "metrics.json").is_file():
        advice = f"remove {runs / row.name} to train it again, or mark the row `run: false`"
        state, error = "failed", f"{path} has no {METRIC} at α = 0 that is a number: {advice}"
    return Status(state, error, score, chosen)


def validation_score(run: Path) -> float | None:
    """Return the METRIC of a finished validation at α = 0; None if the run has none, or none that is a number."""
    path = run / "eval" / "valid" / "metrics.json"
    if not (path.is_file() and (run / "summary.json").is_file()):
        return None
    try:
        value = json.loads(path.read_text())["alpha"]["0.0"]["token_match"][METRIC]
    except (ValueError, KeyError, TypeError):  # torn, or an older version's
        return None
    return value if math.isfinite(value) else None


def attempt_file(runs: Path, row: Row) -> Path:
    """Return the file that tells what a row's last attempt came to."""
    return runs / "logs" / f"{row.name}.json"


def last_attempt(runs: Path, row: Row) -> dict:
    """Return what the row's last attempt came to: state running (with its process), failed (with its error) or idle."""
    path = attempt_file(runs, row)
    return json.loads(path.read_text()) if path.is_file() else {"state": "idle"}


def is_alive(attempt: dict, path: Path) -> bool:
    """Return whether the process of an attempt still runs: on another node, whether its sweep has touched the file lately."""
    if attempt["host"] != socket.gethostname():
        return time.time() - path.stat().st_mtime < SILENCE
    try:
        process = psutil.Process(attempt["pid"])
        return (
            process.create_time() == attempt["started"] and process.status() != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return False


def runs_here(runs: Path, row: Row) -> int | None:
    """Return the process of a row's attempt that is running on this machine, None where there is none."""
    attempt = last_attempt(runs, row)
    here = attempt["state"] == "running" and attempt["host"] == socket.gethostname()
    return attempt["pid"] if here and is_alive(attempt, attempt_file(runs, row)) else None


def steps(row: Row, runs: Path, stage: int) -> list[tuple[Path, list[str]]]:
    """Return a stage's commands, each with the file that exists once it is done.

    Stage 1: train, rank the validation rows. Stage 2: rank the test rows, and by exact search where the table asks for it.
    """
    run = runs / row.name
    valid, test, exact = (run / "eval" / name for name in ("valid", "test", "test-exact"))
    own = {"resume": "auto", "output_dir": run}
    ranking = {"model": run / "model", "dataset": row.settings["dataset"]}
    if row.is_baseline:
        folder, splits = [(valid, ["valid"]), (test, ["test"])][stage - 1]
        return [
            (
                folder / "metrics.json",
                ["baseline.py", *flags(row.settings | own | {"splits": splits})],
            )
        ]
    if stage == 1:
        evaluation = (
            filled(row.evaluation, "split", "valid")
            | ranking
            | {"split": "valid", "output_dir": valid}
        )
        return [
            (run / "summary.json", ["train.py", *flags(row.settings | own)]),
            (valid / "metrics.json", ["eval.py", *flags(evaluation)]),
        ]
    ranking |= {"split": "test", "alpha": None, "alpha_from": valid}
    evaluations = [(test, row.evaluation), *([(exact, row.exact)] if row.exact is not None else [])]
    return [
        (
            folder / "metrics.json",
            [
                "eval.py",
                *flags(filled(settings, "split", "test") | ranking | {"output_dir": folder}),
            ],
        )
        for folder, settings in evaluations
    ]


def flags(settings: dict) -> list[str]:
    """Write settings as command-line flags; None: left out."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def last_error(text: str, code: int) -> str:
    """Return the line of an attempt's output that says best why it ended with `code`: the last error, else the last line.

    The error that a launcher adds to that of its ranks does not count.
    """
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    if code < 0:
        return "; ".join([f"killed by {signal.Signals(-code).name}", *lines[-1:]])
    errors = [
        line
        for line in lines
        if ERROR_LINE.match(line) and not any(name in line for name in LAUNCHER_ERROR)
    ]
    return (errors or lines or [f"exit code {code}, without a word"])[-1]


def check_folder(table: Table, runs: Path) -> None:
    """Raise ValueError if RUNS holds another sweep, rows with other settings, or a test that validation would not choose now."""
    # Listed before the snapshot is looked for: another task of an array may be writing it now, before any row's folder.
    present = [path.name for path in runs.iterdir()] if runs.exists() else []
    snapshot = runs / "sweep.json"
    if snapshot.is_file():
        if (name := json.loads(snapshot.read_text())["name"]) != table.name:
            raise UsageError(
                f"--output {runs} holds the sweep '{name}', {table.path} is '{table.name}': give another folder"
            )
    elif any(name != "logs" and ".tmp-" not in name for name in present):
        raise UsageError(f"--output {runs} is not empty and holds no sweep; give a new folder")
    for row in table.to_run:
        if changed := changed_settings(row, runs / row.name):
            raise UsageError(
                f"{row.name} was run with other settings, these differ: {', '.join(changed)}; "
                f"undo it, or remove {runs / row.name}"
            )
    statuses = survey(table, runs)
    for name in sorted(path.parents[1].name for path in runs.glob("*/eval/test")):
        if name not in statuses or statuses[name].state == "not run":
            why = f"{table.path} has now no such row to run"
        elif not statuses[name].chosen:
            why = f"with the candidates that {table.path} has now validation has not chosen it"
        else:
            continue
        raise UsageError(
            f"{name} was tested already, but {why}: test is touched once; undo it, or give a new folder"
        )


def changed_settings(row: Row, run: Path) -> list[str]:
    """Return the names of settings that a run folder was made with and that are others in the table now."""
    changed = set()
    if (path := run / "config.yaml").is_file():
        saved, defaults = (
            yaml.safe_load(path.read_text()),
            type(row.config),
        )  # settings newer than the run had their defaults
        now = {
            name: value for name, value in asdict(row.config).items() if name not in FREE_ON_RESUME
        }
        changed |= {
            name
            for name, value in now.items()
            if saved.get(name, getattr(defaults, name, None)) != value
        }
    for folder, block in (("valid", "evaluation"), ("test", "evaluation"), ("test-exact", "exact")):
        path, evaluation = run / "eval" / folder / "request.json", getattr(row, block)
        if (
            not row.is_baseline and evaluation is not None and path.is_file()
        ):  # a baseline's are in its config.yaml
            changed |= {
                f"{block}.{name}"
                for name in changed_request(row, evaluation, json.loads(path.read_text()))
            }
    return sorted(changed)


def changed_request(row: Row, evaluation: dict, request: dict) -> set[str]:
    """Return the names of settings that the request.json of an evaluation has and the table has otherwise.

    Of files it has the hashes: what counts is whether there is one. α of a test is what validation chose.
    """
    now = resolved(evaluation)
    now |= {"max_length": now["max_length"] or row.config.max_length}  # 0: as trained
    ignored = (
        EVALUATIONS_OWN | {"base_model"} | ({"alpha"} if request["split"] == "test" else set())
    )
    before, now = (
        {k: bool(v) if k in REQUEST_FILES else v for k, v in values.items()}
        for values in (request, now)
    )
    return {name for name in before.keys() & now.keys() - ignored if before[name] != now[name]}


def write_snapshot(table: Table, runs: Path) -> None:
    """Write RUNS/sweep.json: every row with its state, for the report."""
    from igd_ds.studies.report.study import labels

    statuses, methods, rows = survey(table, runs), {}, []
    for block in {
        (row.dataset, row.backbone) for row in table.rows
    }:  # labels tell rows of one block apart
        members = [row for row in table.rows if (row.dataset, row.backbone) == block]
        methods |= zip(
            [row.name for row in members],
            labels([asdict(row.config) for row in members]),
            strict=True,
        )
    for row in table.rows:
        status = statuses[row.name]
        described = {
            key: getattr(row, key)
            for key in ("name", "group", "dataset", "backbone", "seed", "settings")
        }
        described["family"] = hashlib.sha256(repr(row.family).encode()).hexdigest()[
            :8
        ]  # the same however the table grows
        described |= {
            "method": methods[row.name],
            "state": status.state,
            "error": status.error,
            "chosen": status.chosen,
        }
        rows.append(described)
    select = {"metric": METRIC, "over": table.select}
    sweep = {
        "version": 1,
        "name": table.name,
        "table": table.path,
        "budget": table.budget,
        "select": select,
        "rows": rows,
    }
    write_json(runs / "sweep.json", sweep)


class Runner:
    """Runs rows of a table, some at a time, and passes the signals that it gets on to them.

    Args:
        launcher: words before the script's name.
        devices: one entry for each row that may run at a time: the GPU it sees, None: all there are.
    """

    def __init__(
        self, table: Table, runs: Path, launcher: list[str], devices: Sequence[str | None] = (None,)
    ):
        self.table, self.runs, self.launcher = table, runs, launcher
        self.devices = queue.SimpleQueue()
        for device in devices:
            self.devices.put(device)
        self.jobs = len(devices)
        self.lock = threading.Lock()  # one snapshot at a time
        self.children = set()
        self.signal = None
        self.stopped = False  # whether some row was stopped by a signal, ours or the scheduler's

    def handle(self, number: int, _) -> None:
        """Pass a signal on; INT as TERM, for which a training saves."""
        self.signal, self.stopped = signal.SIGTERM if number == signal.SIGINT else number, True
        for child in list(self.children):
            self.forward(child)

    def forward(self, child: subprocess.Popen) -> None:
        """Send the signal to all processes of a row."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.killpg(child.pid, self.signal)

    def run(self, rows: list[Row], stage: int) -> None:
        """Run a stage of `rows`, as many at a time as there are devices; a failed one does not stop the others."""
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda row: self.run_row(row, stage), rows))

    def run_row(self, row: Row, stage: int) -> None:
        """Run those of a row's commands that are not done, until one fails or a signal stops it.

        Not if another sweep on this machine has begun the row in the meantime.
        """
        device = self.devices.get()
        try:
            if process := runs_here(self.runs, row):
                print(f"{row.name}: running already, as process {process}", flush=True)
                return
            for done, command in steps(row, self.runs, stage):
                if self.signal is not None or not (
                    done.is_file() or self.execute(row, done, command, device)
                ):
                    break
        finally:
            self.devices.put(device)

    def execute(self, row: Row, done: Path, command: list[str], device: str | None) -> bool:
        """Run one command, its output in the row's log; record what it came to and return whether it is done."""
        words = [*self.launcher, str(ENTRIES / command[0]), *command[1:]]
        environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        path = attempt_file(self.runs, row).with_suffix(".log")
        with open(path, "a+", encoding="utf-8", errors="replace") as log:
            log.write(
                f"\n# {datetime.now().isoformat(timespec='seconds')}, {socket.gethostname()}\n$ {shlex.join(words)}\n"
            )
            log.flush()
            begin = log.tell()
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
            self.children.add(child)
            if self.signal is not None:  # it came while the child was being made
                self.forward(child)
            started = psutil.Process(child.pid).create_time()
            self.record(row, "running", host=socket.gethostname(), pid=child.pid, started=started)
            print(f"{row.name}: {command[0]} …", flush=True)
            code = None
            while code is None:
                try:
                    code = child.wait(HEARTBEAT)
                except subprocess.TimeoutExpired:
                    os.utime(attempt_file(self.runs, row))
            self.children.remove(child)
            log.seek(begin)
            text = log.read()
        if code == 0 and done.is_file():
            self.record(row, "idle")
        elif code in STOPPED or (code and self.signal is not None):
            self.stopped = True
            self.record(row, "idle")
            print(f"{row.name}: stopped; goes on when the sweep is started again", flush=True)
        else:
            error = (
                last_error(text, code) if code else f"{command[0]} ended well but left no {done}"
            )
            self.record(row, "failed", error=error)
            print(f"{row.name}: failed: {error} (all of it: {path})", flush=True)
        return code == 0 and done.is_file()

    def record(self, row: Row, state: str, **more) -> None:
        """Write what the row's attempt has come to, then the snapshot of all rows."""
        write_json(attempt_file(self.runs, row), {"state": state, **more})
        with self.lock:
            write_snapshot(self.table, self.runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep, or a part of it; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "table", metavar="TABLE", help="YAML file; how it is written: igd_ds/studies/sweep_table.py"
    )
    parser.add_argument(
        "--output", type=Path, metavar="RUNS", help="folder of the sweep: one run folder per row"
    )
    parser.add_argument(
        "--launcher",
        default=sys.executable,
        help="what starts train.py and eval.py (default: python, one rank)",
    )
    parser.add_argument("--retry", action="store_true", help="run failed rows again")
    parallel = parser.add_mutually_exclusive_group()
    parallel.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="rows to run at a time (default: 1)"
    )
    parallel.add_argument(
        "--gpus", type=int, metavar="N", help="the same, each row on a GPU of its own"
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--list", action="store_true", help="print every row's state, run nothing")
    part.add_argument(
        "--count",
        action="store_true",
        help="print how many rows are to run, for the size of a SLURM array",
    )
    part.add_argument(
        "--row",
        type=int,
        metavar="I",
        help="stage 1 of one row: train, rank the validation rows; counts from 0",
    )
    part.add_argument(
        "--test_row",
        type=int,
        metavar="I",
        help="stage 2 of one row: rank the test rows, if validation chose it",
    )
    args = parser.parse_args(argv)
    if args.output is None and not args.count:
        parser.error("--output is required")
    try:
        table = read_table(args.table)
        if args.count:
            print(len(table.to_run))
            return 0
        check_folder(table, args.output)
        if args.list:
            show(table, args.output)
            return 0
        launcher = shlex.split(args.launcher)
        if not launcher or shutil.which(launcher[0]) is None:
            raise UsageError(f"--launcher '{args.launcher}': there is no such program")
        runner = Runner(table, args.output, launcher, devices(args))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, runner.handle)
        (args.output / "logs").mkdir(parents=True, exist_ok=True)
        if args.row is None and args.test_row is None:
            done = run_all(runner, args.retry)
        else:
            done = run_one(
                runner,
                args.retry,
                *((args.row, 1) if args.test_row is None else (args.test_row, 2)),
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return EXIT_REQUEUE if runner.stopped else int(not done)


def devices(args: argparse.Namespace) -> list[str | None]:
    """Return, for each row that may run at a time, the GPU that it gets; None: no GPU of its own."""
    if (args.jobs if args.gpus is None else args.gpus) < 1:
        raise UsageError("--jobs and --gpus must be at least 1")
    if args.gpus is None:
        return [None] * args.jobs
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible and args.gpus > len(visible):
        raise UsageError(f"--gpus {args.gpus}, but CUDA_VISIBLE_DEVICES names {len(visible)}")
    return (visible or [str(index) for index in range(args.gpus)])[: args.gpus]


def run_all(runner: Runner, retry: bool) -> bool:
    """Run stage 1 of all rows, then stage 2 of those that validation chose; returns whether every row is finished."""
    table, runs = runner.table, runner.runs
    wanted = ("waiting", "failed") if retry else ("waiting",)
    statuses = survey(table, runs)
    due = [row for row in table.to_run if statuses[row.name].state in wanted]
    for row in due:
        row.check_inputs()
    write_snapshot(table, runs)
    runner.run([row for row in due if statuses[row.name].score is None], 1)
    statuses = survey(table, runs)
    runner.run(
        [row for row in due if statuses[row.name].chosen and statuses[row.name].state in wanted], 2
    )
    show(table, runs)
    return all(status.state in ("finished", "not run") for status in survey(table, runs).values())


def run_one(runner: Runner, retry: bool, index: int, stage: int) -> bool:
    """Run a stage of one row; returns whether it is done, or, in stage 2, nothing is to do."""
    table, runs = runner.table, runner.runs
    if not 0 <= index < len(table.to_run):
        raise UsageError(
            f"{table.path} has no row {index}: {len(table.to_run)} are to run, counted from 0"
        )
    row = table.to_run[index]
    row.check_inputs()
    write_snapshot(
        table, runs
    )  # before the row has a folder: other tasks of the array may be looking for it
    if process := runs_here(runs, row):
        raise UsageError(f"{row.name} is running already, as process {process}")
    status = survey(table, runs)[row.name]
    if status.state == "failed" and not retry:
        raise UsageError(f"{row.name} failed before ({status.error}); --retry runs it again")
    if stage == 2 and status.chosen is None:
        names = [other.name for other in table.to_run if other.family == row.family]
        left = [
            name
            for name, other in survey(table, runs).items()
            if name in names and other.score is None
        ]
        raise UsageError(
            f"{row.name}: validation cannot choose before all candidates have finished; missing: {', '.join(left)}"
        )
    if stage == 2 and not status.chosen:
        print(f"{row.name}: validation did not choose it; nothing to do")
        return True
    runner.run([row], stage)
    status = survey(table, runs)[row.name]
    return status.score is not None if stage == 1 else status.state == "finished"


def show(table: Table, runs: Path) -> None:
    """Print every row: its number for --row, state, validation score, whether it was chosen, name, error. Renews the snapshot."""
    statuses = survey(table, runs)
    if (runs / "logs").is_dir():
        write_snapshot(table, runs)
    numbers = {row.name: str(number) for number, row in enumerate(table.to_run)}
    print(f"row  state     valid   chosen  name   ({METRIC} on validation at α = 0)")
    for name, status in statuses.items():
        score = "" if status.score is None else f"{status.score:.4f}"
        error = f": {status.error}" if status.error else ""
        print(
            f"{numbers.get(name, ''):>4} {status.state:9} {score:7} {'*' if status.chosen else ' ':7} {name}{error}"
        )
    counts = Counter(status.state for status in statuses.values())
    print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))


if __name__ == "__main__":
    raise SystemExit(main())
