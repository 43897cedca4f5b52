"""Runs the rows of a sweep's table and keeps track of them.

Stage 1 of a row trains it and ranks the validation rows over the table's grid of α. Stage 2 ranks
the test rows, only for the rows that validation chose, at α = 0 and at the α that was best on
validation. `sweep_table` expands the table and makes the choice.

RUNS/NAME/ are the run folders. RUNS/logs/NAME.log holds everything that a row printed, and
RUNS/logs/NAME.json the result of its last attempt. RUNS/sweep.json is a snapshot of all rows for
the report. The state of a row is always read from its own files, so any number of nodes may work on
one table, each on rows of its own.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from igd_ds.backbones.saved import trained_likelihood
from igd_ds.config.yaml_files import read_yaml_settings
from igd_ds.contracts import Likelihood
from igd_ds.errors import EXIT_REQUEUE, UsageError
from igd_ds.evaluation.metrics import HEADLINE
from igd_ds.evaluation.parts import REQUEST_FILES
from igd_ds.folders import is_temporary, read_json_object, write_json
from igd_ds.process import descendants, have_ended, still_runs
from igd_ds.run_folder import BEFORE_RECORDED, FREE_ON_RESUME, with_defaults
from igd_ds.studies.report.study import METRIC, method_names
from igd_ds.studies.sweep_table import (
    EVALUATIONS_OWN,
    Row,
    Settings,
    Table,
    filled,
    resolved,
)

HEARTBEAT = 60
"""Seconds between two updates of a running row's file."""
SILENCE = 600
"""Seconds without an update after which a row on another node counts as dead."""
ENTRIES = Path(__file__).resolve().parents[1]
"""Folder of train.py, eval.py and baseline.py."""
STOPPED = (EXIT_REQUEUE, -signal.SIGUSR1, 128 + signal.SIGUSR1)
"""Exit codes of a stopped row: saved; ended by USR1 while loading; the same as srun reports it."""
ERROR_LINE = re.compile(r"(\[rank\d+\]: )?(error: |[\w.]*(Error|Exception): )")
ATTEMPTS = ("running", "failed", "idle")
"""The states of an attempt."""
LAUNCHER_ERROR = ("ChildFailedError", "CalledProcessError")


@dataclass(frozen=True)
class Status:
    """The state of a row, see `survey`.

    Attributes:
        state: finished, waiting, running, failed or not run.
        error: why it failed.
        score: METRIC on validation at α = 0; None without a validation.
        chosen: whether validation chose its group; None while that is undecided.
    """

    state: str
    error: str | None = None
    score: float | None = None
    chosen: bool | None = None


@dataclass(frozen=True)
class Attempt:
    """The last attempt to run a row.

    `state` is one of ATTEMPTS: running (with host, pid and start time of its process), failed (with
    its error), or idle.
    """

    state: str = "idle"
    host: str = ""
    pid: int = 0
    started: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Step:
    """One command of a row: `words` are an entry script and its flags.

    `done` is the file that exists once the command has finished.
    """

    done: Path
    words: list[str]


def survey(table: Table, runs: Path) -> dict[str, Status]:
    """Return the status of every row by name, read from the run folders and the rows' own files.

    A row is finished if it was validated and not chosen, or tested. It is waiting if it has not
    begun, was interrupted, or validation has not chosen yet. Rows that the table excludes have the
    state "not run".
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
    """Return the status of a row that is run."""
    if score is not None:
        is_tested = all(step.done.is_file() for step in steps(row, runs, 2))
        if chosen is False or (chosen and is_tested):
            return Status("finished", None, score, chosen)

    attempt = last_attempt(runs, row)
    if attempt.state == "running" and is_alive(attempt, attempt_file(runs, row)):
        return Status("running", None, score, chosen)
    if attempt.state == "failed":
        return Status("failed", attempt.error, score, chosen)

    path = runs / row.name / "eval" / "valid" / "metrics.json"
    if score is None and path.is_file():
        error = (
            f"{path} has no {METRIC} at α = 0 that is a number: remove {runs / row.name} to train "
            "it again, or mark the row `run: false`"
        )
        return Status("failed", error, score, chosen)
    return Status("waiting", None, score, chosen)


def validation_score(run: Path) -> float | None:
    """Return METRIC of a finished validation at α = 0; None where it is missing or not finite."""
    path = run / "eval" / "valid" / "metrics.json"
    if not (path.is_file() and (run / "summary.json").is_file()):
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        value: float = results["alpha"]["0.0"][HEADLINE][METRIC]
        return value if math.isfinite(value) else None
    except (ValueError, KeyError, TypeError):  # damaged, or written by an older version
        return None


def attempt_file(runs: Path, row: Row) -> Path:
    """Return the file that records a row's last attempt."""
    return runs / "logs" / f"{row.name}.json"


def last_attempt(runs: Path, row: Row) -> Attempt:
    """Return the last attempt of a row; idle if there was none, or its file is damaged."""
    path = attempt_file(runs, row)
    try:
        return read_attempt(path) if path.is_file() else Attempt()
    except UsageError:  # `check_folder` warns of it
        return Attempt()


def read_attempt(path: Path) -> Attempt:
    """Read the file of a row's last attempt.

    Raises:
        UsageError: it is damaged.
    """
    without = "the row counts as not tried yet"
    values = read_json_object(path, without)
    try:
        attempt = Attempt(**values)
    except TypeError:
        attempt = Attempt("unknown")
    has_process = type(attempt.pid) is int and attempt.pid >= 0
    has_start = isinstance(attempt.started, int | float)
    if attempt.state not in ATTEMPTS or not has_process or not has_start:
        raise UsageError(f"{path} is damaged (it holds no attempt): {without}")
    return attempt


def is_alive(attempt: Attempt, path: Path) -> bool:
    """Return whether the process of an attempt still runs.

    On another node, it counts as alive if its sweep has updated the file `path` lately.
    """
    if attempt.host != socket.gethostname():
        return time.time() - path.stat().st_mtime < SILENCE
    return still_runs(attempt.pid, attempt.started)


def runs_here(runs: Path, row: Row) -> int | None:
    """Return the process that runs a row on this machine; None where there is none."""
    attempt = last_attempt(runs, row)
    here = attempt.state == "running" and attempt.host == socket.gethostname()
    return attempt.pid if here and is_alive(attempt, attempt_file(runs, row)) else None


@contextlib.contextmanager
def claimed(runs: Path, row: Row) -> Iterator[bool]:
    """Hold a row's lock for a block; yield whether we have it.

    It keeps two sweeps that start at once from running one row twice. The kernel frees it when the
    process ends. Where the file system has no such locks, only what `last_attempt` says protects.
    """
    with open(attempt_file(runs, row).with_suffix(".lock"), "w") as file:
        is_ours = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_ours = False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        yield is_ours


def steps(row: Row, runs: Path, stage: int) -> list[Step]:
    """Return the commands of a stage.

    Stage 1 trains and ranks the validation rows. Stage 2 ranks the test rows, also by exact search
    where the table asks for it.
    """
    run = runs / row.name
    valid, test, exact = (run / "eval" / name for name in ("valid", "test", "test-exact"))
    training = row.settings | {"resume": "auto", "output_dir": run}
    if row.is_baseline:
        folder, split = (valid, "valid") if stage == 1 else (test, "test")
        words = ["baseline.py", *flags(training | {"splits": [split]})]
        return [Step(folder / "metrics.json", words)]

    ranking: Settings = {"model": run / "model", "dataset": row.settings["dataset"]}
    if stage == 1:
        ranking |= {"split": "valid", "output_dir": valid}
        evaluation = filled(row.evaluation, "split", "valid") | ranking
        return [
            Step(run / "summary.json", ["train.py", *flags(training)]),
            Step(valid / "metrics.json", ["eval.py", *flags(evaluation)]),
        ]

    ranking |= {"split": "test", "alpha": None, "alpha_from": valid}
    evaluations = [(test, row.evaluation)]
    if row.exact is not None:
        evaluations.append((exact, row.exact))
    found = []
    for folder, settings in evaluations:
        settings = filled(settings, "split", "test") | ranking | {"output_dir": folder}
        found.append(Step(folder / "metrics.json", ["eval.py", *flags(settings)]))
    return found


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as command-line flags, without those that are None.

    Example:
        >>> flags({"epochs": 2, "alpha": [0, 0.1], "resume": None, "length_grouping": False})
        ['--epochs', '2', '--alpha', '0', '0.1', '--no-length_grouping']
    """
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


def last_error(text: str, code: int) -> str:
    """Return the line of an attempt's output that best explains why it ended with `code`.

    This is the last error, or the last line where there is no error. Errors that a launcher adds to
    those of its ranks are ignored.
    """
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    if code < 0:
        return "; ".join([f"killed by {signal.Signals(-code).name}", *lines[-1:]])
    errors = [
        line
        for line in lines
        if ERROR_LINE.match(line) and not any(name in line for name in LAUNCHER_ERROR)
    ]
    return (errors or lines or [f"exit code {code}, no output"])[-1]


def check_folder(table: Table, runs: Path) -> None:
    """Check that RUNS belongs to the table.

    Raises:
        UsageError: RUNS holds another sweep or other files, a row was run with other settings, or a
            row was tested that validation would not choose now.
    """
    # List the folder before looking for the snapshot: another task of an array may be writing the
    # snapshot now, before any row has a folder.
    if runs.exists() and not runs.is_dir():
        raise UsageError(f"--output {runs} is a file: give a folder")
    present = [path for path in runs.iterdir()] if runs.exists() else []
    snapshot = runs / "sweep.json"
    if snapshot.is_file():
        name = read_json_object(snapshot, "give another folder").get("name")
        if name != table.name:
            raise UsageError(
                f"--output {runs} holds the sweep '{name}', {table.path} is '{table.name}': give "
                "another folder"
            )
    elif any(path.name != "logs" and not is_temporary(path) for path in present):
        raise UsageError(f"--output {runs} is not empty and holds no sweep; give a new folder")

    for row in table.to_run:
        _warn_of_damage(attempt_file(runs, row))
        if changed := changed_settings(row, runs / row.name):
            raise UsageError(
                f"{row.name} was run with other settings, these differ: {', '.join(changed)}; "
                f"undo it, or remove {runs / row.name}"
            )
    _check_tested(table, runs)


def _warn_of_damage(path: Path) -> None:
    """Print a warning if the file of a row's last attempt is damaged."""
    try:
        if path.is_file():
            read_attempt(path)
    except UsageError as error:
        print(f"warning: {error}", flush=True)


def _check_tested(table: Table, runs: Path) -> None:
    """Raise UsageError if a row was tested that validation would not choose now."""
    statuses = survey(table, runs)
    for name in sorted(path.parents[1].name for path in runs.glob("*/eval/test")):
        if name not in statuses or statuses[name].state == "not run":
            why = f"{table.path} now has no such row to run"
        elif not statuses[name].chosen:
            why = f"validation does not choose it among the candidates of {table.path} now"
        else:
            continue
        raise UsageError(
            f"{name} was tested already, but {why}; test rows may be used only once: undo the "
            "change, or give a new folder"
        )


def changed_settings(row: Row, run: Path) -> list[str]:
    """Return the names of settings that differ between a run folder and the table."""
    changed: set[str] = set()
    if (path := run / "config.yaml").is_file():
        saved = with_defaults(type(row.config), read_yaml_settings(path))
        for name, value in asdict(row.config).items():
            if name not in FREE_ON_RESUME and saved.get(name) != as_stored(value):
                changed.add(name)

    if row.is_baseline:  # the settings of its evaluations are in its config.yaml
        return sorted(changed)
    for folder, block, evaluation in (
        ("valid", "evaluation", row.evaluation),
        ("test", "evaluation", row.evaluation),
        ("test-exact", "exact", row.exact),
    ):
        path = run / "eval" / folder / "request.json"
        if evaluation is not None and path.is_file():
            request = read_request(path)
            now = in_request(row, evaluation, trained_likelihood(run / "model") or Likelihood())
            changed |= {f"{block}.{name}" for name in changed_request(now, request)}
    return sorted(changed)


def read_request(path: Path) -> dict[str, Any]:
    """Return the request.json of an evaluation.

    Raises:
        UsageError: it is damaged.
    """
    remedy = f"remove {path.parent}, and the next start evaluates again"
    request = read_json_object(path, remedy)
    if "split" not in request:
        raise UsageError(f"{path} is damaged (it names no split): {remedy}")
    return request


def in_request(row: Row, evaluation: Settings, likelihood: Likelihood) -> Settings:
    """Return an evaluation's settings as its request.json has them: with what is "as trained"."""
    settings = resolved(evaluation)
    if not settings["max_length"]:
        settings["max_length"] = getattr(row.config, "max_length", 0)
    asked = likelihood.with_asked(settings["softmax"], settings["temperature"])
    return settings | asdict(asked)


def changed_request(now: Settings, request: Mapping[str, Any]) -> set[str]:
    """Return the names of settings that differ between an evaluation's request.json and the table.

    The request holds hashes of files; here it only matters whether there is a file. The α of a test
    is what validation chose, and the recorded `exclude_seen` and `search` are what `auto` came to,
    so these are not compared.
    """
    ignored = EVALUATIONS_OWN | {"base_model"}
    for name in ("exclude_seen", "search"):
        if now[name] == "auto" and name in request:
            ignored = ignored | {name}
    request = {**BEFORE_RECORDED, **request}
    if request["split"] == "test":
        ignored = ignored | {"alpha"}

    changed = set()
    for name in request.keys() & now.keys() - ignored:
        before, after = request[name], now[name]
        if name in REQUEST_FILES:
            before, after = bool(before), bool(after)
        if as_stored(before) != as_stored(after):
            changed.add(name)
    return changed


def as_stored(value: Any) -> Any:
    """Return a setting as files store it: a tuple as a list."""
    return list(value) if isinstance(value, tuple) else value


def write_snapshot(table: Table, runs: Path) -> None:
    """Write RUNS/sweep.json: every row with its state, for the report; make RUNS/logs."""
    (runs / "logs").mkdir(parents=True, exist_ok=True)
    statuses = survey(table, runs)
    methods: dict[str, str] = {}
    for block in {(row.dataset, row.backbone) for row in table.rows}:
        # Method names tell the rows of one block apart.
        members = [row for row in table.rows if (row.dataset, row.backbone) == block]
        named = method_names([asdict(row.config) for row in members])
        methods |= {row.name: method for row, method in zip(members, named, strict=True)}

    rows = []
    for row in table.rows:
        status = statuses[row.name]
        rows.append(
            {
                "name": row.name,
                "group": row.group,
                "dataset": row.dataset,
                "backbone": row.backbone,
                "seed": row.seed,
                "settings": row.settings,
                # The hash stays the same when the table grows.
                "family": hashlib.sha256(repr(row.family).encode()).hexdigest()[:8],
                "method": methods[row.name],
                "state": status.state,
                "error": status.error,
                "chosen": status.chosen,
            }
        )
    sweep = {
        "version": 1,
        "name": table.name,
        "table": table.path,
        "budget": table.budget,
        "select": {"metric": METRIC, "over": table.select},
        "rows": rows,
    }
    write_json(runs / "sweep.json", sweep)


class Runner:
    """Runs rows of a table, several at a time, and forwards the signals that it receives.

    Args:
        table: the table.
        runs: folder of the sweep.
        launcher: the words before the script's name.
        devices: one entry for each row that may run at a time: the GPU that the row sees, or None
            for all GPUs.
        say: called with one line for every event.
    """

    def __init__(
        self,
        table: Table,
        runs: Path,
        launcher: Sequence[str],
        devices: Sequence[str | None] = (None,),
        say: Callable[[str], None] = print,
    ) -> None:
        self.table, self.runs, self.launcher, self.say = table, runs, launcher, say
        self.devices: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for device in devices:
            self.devices.put(device)
        self.jobs = len(devices)
        self.lock = threading.Lock()  # one snapshot at a time
        self.children: set[subprocess.Popen[bytes]] = set()
        self.signalled: dict[int, set[psutil.Process]] = {}  # by child: what it had started
        self.signal: signal.Signals | None = None  # the last signal received
        self.stopped = False  # whether a signal stopped a row, ours or the scheduler's

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Forward a signal to all running rows; INT as TERM, on which a training saves."""
        received = signal.Signals(number)
        self.signal = signal.SIGTERM if received == signal.SIGINT else received
        self.stopped = True
        for child in list(self.children):
            self.forward(child, self.signal)

    def forward(self, child: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
        """Send a signal to all processes of a row, whatever process group a launcher gave them."""
        ranks = descendants(child.pid)
        self.signalled.setdefault(child.pid, set()).update(ranks)
        for send in [*(rank.send_signal for rank in ranks), child.send_signal]:
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):  # just ended
                send(number)

    def run(self, rows: Iterable[Row], stage: int) -> None:
        """Run a stage of `rows`, as many at a time as there are devices.

        A row that fails does not stop the others.
        """
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda row: self.run_row(row, stage), rows))

    def run_row(self, row: Row, stage: int) -> None:
        """Run a stage of a row, unless another sweep runs the row already."""
        device = self.devices.get()
        try:
            with claimed(self.runs, row) as is_ours:
                if not is_ours:
                    self.say(f"{row.name}: another sweep runs it now")
                elif process := runs_here(self.runs, row):
                    self.say(f"{row.name}: running already, as process {process}")
                else:
                    self._run_steps(row, stage, device)
        finally:
            self.devices.put(device)

    def _run_steps(self, row: Row, stage: int, device: str | None) -> None:
        """Run the commands of a row that are not done, until one fails or a signal stops it."""
        for step in steps(row, self.runs, stage):
            if self.signal is not None:
                break
            if not step.done.is_file() and not self.execute(row, step, device):
                break

    def execute(self, row: Row, step: Step, device: str | None) -> bool:
        """Run one command with its output in the row's log; return whether it is done.

        The result is recorded in the row's file.
        """
        script = step.words[0]
        code, text = self._run_logged(row, step, device)
        is_done = code == 0 and step.done.is_file()
        if is_done:
            self.record(row, Attempt("idle"))
        elif code in STOPPED or (code and self.signal is not None):
            self.stopped = True
            self.record(row, Attempt("idle"))
            self.say(f"{row.name}: stopped; the next start of the sweep resumes it")
        else:
            error = f"{script} returned 0 but did not write {step.done}"
            if code:
                error = last_error(text, code)
            self.record(row, Attempt("failed", error=error))
            self.say(f"{row.name}: failed: {error} (complete output: {self.log_file(row)})")
        return is_done

    def _run_logged(self, row: Row, step: Step, device: str | None) -> tuple[int, str]:
        """Run one command; return its exit code and its output."""
        words = [*self.launcher, str(ENTRIES / step.words[0]), *step.words[1:]]
        environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        with open(self.log_file(row), "a+", encoding="utf-8", errors="replace") as log:
            now = datetime.now().isoformat(timespec="seconds")
            log.write(f"\n# {now}, {socket.gethostname()}\n$ {shlex.join(words)}\n")
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

            # A signal may have arrived while the child was being started.
            self.children.add(child)
            if self.signal is not None:
                self.forward(child, self.signal)
            started = psutil.Process(child.pid).create_time()
            self.record(row, Attempt("running", socket.gethostname(), child.pid, started))
            self.say(f"{row.name}: {step.words[0]} …")

            code = self._wait(row, child)
            self.children.remove(child)
            log.seek(begin)
            return code, log.read()

    def _wait(self, row: Row, child: "subprocess.Popen[bytes]") -> int:
        """Wait for a row's process and update the row's file meanwhile; return the exit code.

        After a signal, a launcher may end before its ranks, which still save: they are waited for.
        """
        while True:
            try:
                code = child.wait(HEARTBEAT)
                break
            except subprocess.TimeoutExpired:
                os.utime(attempt_file(self.runs, row))
        while not have_ended(self.signalled.get(child.pid, ()), HEARTBEAT):
            os.utime(attempt_file(self.runs, row))
        return code

    def log_file(self, row: Row) -> Path:
        """Return the file that holds everything a row printed."""
        return attempt_file(self.runs, row).with_suffix(".log")

    def record(self, row: Row, attempt: Attempt) -> None:
        """Write the row's attempt, then the snapshot of all rows."""
        write_json(attempt_file(self.runs, row), asdict(attempt))
        with self.lock:
            write_snapshot(self.table, self.runs)


def run_all(runner: Runner, retry: bool) -> bool:
    """Run stage 1 of all rows, then stage 2 of the rows that validation chose.

    Args:
        runner: runs the rows.
        retry: whether failed rows are run again.

    Returns:
        Whether every row is finished.
    """
    table, runs = runner.table, runner.runs
    wanted = ("waiting", "failed") if retry else ("waiting",)
    statuses = survey(table, runs)
    due = [row for row in table.to_run if statuses[row.name].state in wanted]
    for row in due:
        row.check_inputs()

    write_snapshot(table, runs)
    runner.run([row for row in due if statuses[row.name].score is None], 1)
    statuses = survey(table, runs)
    chosen = [row for row in due if statuses[row.name].chosen]
    runner.run([row for row in chosen if statuses[row.name].state in wanted], 2)
    return all(status.state in ("finished", "not run") for status in survey(table, runs).values())


def run_one(runner: Runner, retry: bool, index: int, stage: int) -> bool:
    """Run a stage of one row.

    Args:
        runner: runs the row.
        retry: whether it is run again if it failed before.
        index: number of the row among those to run, from 0.
        stage: 1 or 2.

    Returns:
        Whether the stage is done; also True if stage 2 has nothing to do.

    Raises:
        UsageError: no such row, it is running or failed before, or validation cannot choose yet.
    """
    table, runs = runner.table, runner.runs
    if not 0 <= index < len(table.to_run):
        raise UsageError(
            f"{table.path} has no row {index}: {len(table.to_run)} are to run, counted from 0"
        )
    row = table.to_run[index]
    row.check_inputs()

    # The snapshot must exist before the row's folder: other tasks of the array may look for it.
    write_snapshot(table, runs)
    if process := runs_here(runs, row):
        raise UsageError(f"{row.name} is running already, as process {process}")
    statuses = survey(table, runs)
    status = statuses[row.name]
    if status.state == "failed" and not retry:
        raise UsageError(f"{row.name} failed before ({status.error}); --retry runs it again")

    if stage == 2 and status.chosen is None:
        candidates = [other.name for other in table.to_run if other.family == row.family]
        missing = [name for name in candidates if statuses[name].score is None]
        raise UsageError(
            f"{row.name}: validation cannot choose before all candidates have finished; missing: "
            f"{', '.join(missing)}"
        )
    if stage == 2 and not status.chosen:
        runner.say(f"{row.name}: validation did not choose it; nothing to do")
        return True

    runner.run([row], stage)
    status = survey(table, runs)[row.name]
    return status.score is not None if stage == 1 else status.state == "finished"
