"""Make the report of some runs: both papers' tables and figures with statistics, as one page, Markdown, CSV, LaTeX, PNG and SVG.

    igd report runs/demo -o runs/demo-report
    igd report runs/demo --baseline SASRec -o …   # held against SASRec in place of uniform
    igd report REPORT/data -o REPORT2    # the same report again, from the numbers that a report keeps

The main results are printed too. Runs that are not whole are listed with the reason and left out of every mean.
"""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from igd_ds.errors import UsageError
from igd_ds.studies.report.folders import read_runs
from igd_ds.studies.report.pages import check_folder, left_out, render
from igd_ds.studies.report.study import BASELINE, Study, load


def read(folders: list[Path], examples: int) -> tuple[Study, bool]:
    """Return the study of some folders, and whether it was stored; ValueError for a stored one among others."""
    stored = [folder for folder in folders if (folder / "study.json").is_file()]
    if stored and len(folders) > 1:
        raise UsageError(
            f"{stored[0]} is the stored study of a report: give it alone, or the runs that it is made of"
        )
    return (load(folders[0]), True) if stored else (read_runs(folders, examples), False)


def against(study: Study, baseline: str | None) -> Study:
    """Return the study with the baseline that it is to be held against; ValueError for a method that it has not."""
    known = list(dict.fromkeys(run.method for run in study.runs if run.method))
    if baseline is not None and baseline not in known:
        raise UsageError(
            f"--baseline: no run is a '{baseline}'; these methods are there: {', '.join(known)}"
        )
    return replace(study, baseline=baseline or study.baseline)


def main(argv: list[str] | None = None) -> int:
    """Read, write, say what is where and what was left out."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="sweeps, run folders, folders of those; or the folder data of a report",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        help="folder of the report: new, empty, or a report to replace",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=5,
        help="rows per dataset and backbone whose lists are shown; default: 5",
    )
    parser.add_argument(
        "--baseline",
        metavar="METHOD",
        help=f"what methods are held against, as the report calls it; default: {BASELINE}",
    )
    parser.add_argument(
        "--command",
        default="",
        help="line that makes runs and report, printed in it; default: this one",
    )
    arguments = parser.parse_args(argv)
    try:
        check_folder(arguments.output)
        study, is_stored = read(arguments.runs, arguments.examples)
        study = against(study, arguments.baseline)
        command = arguments.command or ("" if is_stored else shlex.join(["igd", "report", *argv]))
        tables, figures = render(study, arguments.output, command)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for table in tables:
        if table.name.startswith("main-"):
            print(table.plain())
    for run in left_out(study):
        print(f"not whole: {run.name} ({run.state}){': ' * bool(run.note)}{run.note}")
    print(f"{len(tables)} tables and {len(figures)} figures: {arguments.output / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
