"""Make the report of some runs: tables, figures and significance tests of both papers.

    igd report runs/demo --output runs/demo-report
    igd report runs/demo --reference SASRec --output …  # compare with SASRec instead of uniform
    igd report REPORT/data --output REPORT2             # the same report from its stored numbers
    igd report runs/demo --published FILE --output …    # with a ledger: published numbers and ours

The report is one page, and the same in Markdown, CSV, LaTeX, PNG and SVG. The main results are also
printed. Incomplete runs are listed with the reason and are left out of every mean.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from igd_ds import distributed
from igd_ds.config.options import FlagParser
from igd_ds.errors import UsageError, did_you_mean
from igd_ds.studies.report.ledger import check_known, read_published
from igd_ds.studies.report.pages import check_folder, left_out, render
from igd_ds.studies.report.runs import read_runs
from igd_ds.studies.report.study import REFERENCE, Study, load


def read(folders: Sequence[Path], examples: int) -> tuple[Study, bool]:
    """Return the study of some folders, and whether it was read from a report.

    Raises:
        UsageError: the stored study of a report is given together with other folders.
    """
    stored = [folder for folder in folders if (folder / "study.json").is_file()]
    if stored and len(folders) > 1:
        raise UsageError(
            f"{stored[0]} is the stored study of a report: give it alone, or give the runs "
            "from which it was made"
        )
    return (load(folders[0]), True) if stored else (read_runs(folders, examples), False)


def compared_with(study: Study, method: str | None) -> Study:
    """Return the study with `method` as its reference; None keeps the one that it has.

    Raises:
        UsageError: the study has no run of this method.
    """
    if method is None:
        return study
    known = list(dict.fromkeys(run.method for run in study.runs if run.method))
    if method not in known:
        raise UsageError(
            f"--reference: no run is a '{method}'{did_you_mean(method, known)}; "
            f"the methods are: {', '.join(known)}"
        )
    return replace(study, reference=method)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = FlagParser(
        prog="igd report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="sweeps, run folders, folders of run folders, or the folder data of a report",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        help="folder of the report: new, empty, or a report that is replaced",
    )

    parser.add_argument(
        "--examples",
        type=int,
        default=5,
        help="rows per dataset and backbone whose lists are shown (default: 5)",
    )
    parser.add_argument(
        "--reference",
        "--baseline",  # its former name
        metavar="METHOD",
        help="method that the others are compared with, by its name in the report "
        f"(default: {REFERENCE})",
    )
    parser.add_argument(
        "--published",
        type=Path,
        metavar="FILE",
        help="YAML with the numbers of others, which a ledger shows beside those of the runs; "
        "igd_ds/studies/report/ledger.py describes it",
    )
    parser.add_argument(
        "--command",
        default="",
        help="command line that makes runs and report, shown in the report (default: this one)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Read the runs, write the report and print the main results; return the exit code.

    Raises:
        UsageError: bad input.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)

    check_folder(arguments.output)
    published = read_published(arguments.published) if arguments.published else []
    study, is_stored = read(arguments.runs, arguments.examples)
    study = compared_with(study, arguments.reference)
    if published:
        check_known(published, study, arguments.published)
        study = replace(study, published=published)
    command = arguments.command or ("" if is_stored else shlex.join(["igd", "report", *argv]))
    tables, figures = render(study, arguments.output, command)

    for table in tables:
        if table.name.startswith("main-"):
            print(table.text())
    for run in left_out(study):
        print(f"incomplete: {run.name} ({run.state}){f': {run.note}' if run.note else ''}")
    print(f"{len(tables)} tables and {len(figures)} figures: {arguments.output / 'index.html'}")
    return 0


if __name__ == "__main__":
    distributed.run(main)
