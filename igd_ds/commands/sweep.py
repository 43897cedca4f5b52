"""Run a table of trainings and evaluations, and choose among them by the papers' rule.

    igd sweep TABLE --output RUNS [--jobs N | --gpus N] [--launcher "torchrun --nproc_per_node 2"]
    igd sweep TABLE --output RUNS --list       # state of every row, and the error of failed rows
    igd sweep TABLE --output RUNS --retry      # run failed rows again

Stage 1 of a row trains it and ranks the validation rows over the table's grid of α. The rule: β on
validation, then α on validation, test once. Among the rows that the table lets validation choose
from (`select`), the group with the best mean NDCG@10 over its seeds at α = 0 is chosen, once all of
them have finished. A failed candidate delays the choice until it is run again (--retry) or the
table marks it `run: false`. Stage 2 ranks the test rows, only for the chosen rows, at α = 0 and at
the α that was best on validation.

A second start skips finished rows and resumes interrupted ones. TERM, INT and USR1 are forwarded to
the running rows, which save; the exit code is then 85. Otherwise it is 0 if every row is finished,
1 if not, and 2 for bad input. Any launcher works that ends with its ranks: python (the default, one
rank), torchrun, mpirun, srun. slurm/sweep.sbatch runs the rows as an array.

RUNS/NAME/ are the run folders, RUNS/logs/NAME.log the output of a row. How a table is written:
igd_ds/studies/sweep_table.py. Tables: tools/sweeps/.
"""

import argparse
import functools
import os
import shlex
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from igd_ds import distributed
from igd_ds.config.options import FlagParser
from igd_ds.errors import EXIT_REQUEUE, UsageError
from igd_ds.studies.report.study import METRIC
from igd_ds.studies.sweep import (
    Runner,
    check_folder,
    run_all,
    run_one,
    survey,
    write_snapshot,
)
from igd_ds.studies.sweep_table import Table, read_table


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = FlagParser(
        prog="igd sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "table", metavar="TABLE", help="YAML file; its format: igd_ds/studies/sweep_table.py"
    )
    parser.add_argument(
        "--output", type=Path, metavar="RUNS", help="folder of the sweep: one run folder per row"
    )
    parser.add_argument(
        "--launcher",
        default=sys.executable,
        help="command that starts train.py and eval.py (default: python, one rank)",
    )
    parser.add_argument("--retry", action="store_true", help="run failed rows again")

    parallel = parser.add_mutually_exclusive_group()
    parallel.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="rows that run at a time (default: 1)"
    )
    parallel.add_argument(
        "--gpus", type=int, metavar="N", help="rows that run at a time, each on its own GPU"
    )

    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--list", action="store_true", help="print the state of every row and run nothing"
    )
    part.add_argument(
        "--count",
        action="store_true",
        help="print the number of rows to run, which is the size of a SLURM array",
    )
    part.add_argument(
        "--row",
        type=int,
        metavar="I",
        help="run stage 1 of one row, counted from 0: train it and rank the validation rows",
    )
    part.add_argument(
        "--test_row",
        type=int,
        metavar="I",
        help="run stage 2 of one row: rank the test rows, if validation chose it",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep or a part of it; return the exit code.

    Raises:
        UsageError: bad input.
    """
    reader = parser()
    arguments = reader.parse_args(argv)
    if arguments.output is None and not arguments.count:
        reader.error("--output is required")

    table, runs = read_table(arguments.table), arguments.output
    if arguments.count:
        print(len(table.to_run))
        return 0
    check_folder(table, runs)
    if arguments.list:
        show(table, runs)
        return 0

    launcher = shlex.split(arguments.launcher)
    if not launcher or shutil.which(launcher[0]) is None:
        raise UsageError(f"--launcher '{arguments.launcher}': there is no such program")
    say = functools.partial(print, flush=True)
    runner = Runner(table, runs, launcher, devices(arguments.jobs, arguments.gpus), say)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, runner.handle)

    if arguments.row is not None:
        done = run_one(runner, arguments.retry, arguments.row, 1)
    elif arguments.test_row is not None:
        done = run_one(runner, arguments.retry, arguments.test_row, 2)
    else:
        done = run_all(runner, arguments.retry)
        show(table, runs)
    return EXIT_REQUEUE if runner.stopped else int(not done)


def devices(jobs: int, gpus: int | None) -> list[str | None]:
    """Return the GPU of each row that may run at a time; None: no GPU of its own.

    Args:
        jobs: number of rows that run at a time, if `gpus` is None.
        gpus: number of GPUs, each for one row.

    Raises:
        UsageError: fewer than one row, or more GPUs than CUDA_VISIBLE_DEVICES names.
    """
    if (jobs if gpus is None else gpus) < 1:
        raise UsageError("--jobs and --gpus must be at least 1")
    if gpus is None:
        return [None] * jobs
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible and gpus > len(visible):
        raise UsageError(f"--gpus {gpus}, but CUDA_VISIBLE_DEVICES names {len(visible)}")
    names = visible or [str(index) for index in range(gpus)]
    return list(names[:gpus])


def show(table: Table, runs: Path) -> None:
    """Print the state of every row and update the snapshot.

    Each line has the row's number for --row, its state, its validation score, a star if it was
    chosen, its name and its error.
    """
    statuses = survey(table, runs)
    if (runs / "logs").is_dir():
        write_snapshot(table, runs)
    numbers = {row.name: str(number) for number, row in enumerate(table.to_run)}

    print(f"row  state     valid   chosen  name   ({METRIC} on validation at α = 0)")
    for name, status in statuses.items():
        number, chosen = numbers.get(name, ""), "*" if status.chosen else " "
        score = "" if status.score is None else f"{status.score:.4f}"
        error = f": {status.error}" if status.error else ""
        print(f"{number:>4} {status.state:9} {score:7} {chosen:7} {name}{error}")
    counts = Counter(status.state for status in statuses.values())
    print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())))


if __name__ == "__main__":
    distributed.run(main)
