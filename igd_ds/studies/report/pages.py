"""A `Study` → a report: one page that needs nothing beside it, the same as Markdown, and every table and figure as files.

    index.html README.md tables/NAME.{csv,md,tex} figures/NAME.{png,svg} data/{study.json,ranks.parquet}

Equal studies give equal bytes: nothing of the day or the machine that writes enters.
"""

import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

from igd_ds.data.card import escape
from igd_ds.errors import UsageError
from igd_ds.studies.report.figures import Figure, all_figures
from igd_ds.studies.report.layout import Table
from igd_ds.studies.report.study import NOT_BEGUN, Run, Study, load, save
from igd_ds.studies.report.tables import all_tables, cost

ENTRIES = {"index.html", "README.md", "tables", "figures", "data"}
WRITERS = {"csv": Table.csv, "md": Table.markdown, "tex": Table.latex}
LONG = 60  # characters from which a column of text is broken into lines
STATES = {
    "no test": "validated only"
}  # a run's state, where the word alone would not be understood


def render(study: Study, folder: Path, command: str = "") -> tuple[list[Table], list[Figure]]:
    """Write the report and the study it is made of; returns its tables and figures.

    It is made in a folder beside; then what `folder` held is renamed aside, the new one put in its place and the old one deleted.
    A kill between the two renames leaves the old one as FOLDER.old-PROCESS.

    Args:
        study: what to report.
        folder: new, empty, or a report, which is replaced.
        command: the line that makes the report, which the study keeps; empty: the one it has kept.

    Raises:
        ValueError: the folder holds something else.
    """
    folder = Path(folder).resolve()
    check_folder(folder)
    if command:
        study = replace(study, environment=study.environment | {"command": command})
    temporary, old = (
        folder.with_name(f"{folder.name}.{name}-{os.getpid()}") for name in ("tmp", "old")
    )
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save(study, temporary / "data")
        study = load(temporary / "data")  # so that a report from stored data has the same bytes
        tables, figures = all_tables(study), all_figures(study)
        drawings = write_files(temporary, tables, figures)
        (temporary / "index.html").write_text(
            page(study, tables, figures, drawings), encoding="utf-8"
        )
        (temporary / "README.md").write_text(markdown(study, tables, figures), encoding="utf-8")
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tables, figures


def check_folder(folder: Path) -> None:
    """Raise ValueError if a report must not be written to `folder`: what is there would be lost."""
    if folder.is_file():
        raise UsageError(f"-o {folder} is a file; give a folder")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if there and (there - ENTRIES or not (folder / "data" / "study.json").is_file()):
        shown = ", ".join(sorted(there - ENTRIES or there)[:5])
        raise UsageError(
            f"-o {folder} is not empty and holds no report, but {shown}; give a new folder"
        )


def write_files(folder: Path, tables: list[Table], figures: list[Figure]) -> dict[str, str]:
    """Write tables/ and figures/; returns the figures' SVG by name."""
    drawings = {}
    for name in ("tables", "figures"):
        (folder / name).mkdir(parents=True)
    for table in tables:
        for kind, write in WRITERS.items():
            (folder / "tables" / f"{table.name}.{kind}").write_text(write(table), encoding="utf-8")
    for figure in figures:
        for kind in ("png", "svg"):
            drawn = figure.render(kind)
            (folder / "figures" / f"{figure.name}.{kind}").write_bytes(drawn)
        drawings[figure.name] = drawn.decode()
    return drawings


def left_out(study: Study) -> list[Run]:
    """Return the runs of which something is missing, those apart that were not meant to run."""
    return [run for run in study.runs if run.state not in NOT_BEGUN and (not run.whole or run.note)]


def summary(study: Study) -> dict[str, str]:
    """Return what the report begins with: term → text."""
    states = [
        f"{count} {STATES.get(state, state)}"
        for state, count in Counter(run.state for run in study.runs).items()
    ]
    environment = ", ".join(
        f"{key} {value}" for key, value in study.environment.items() if value and key != "command"
    )
    return {
        "Runs": f"{len(study.runs)}: {', '.join(states)}",
        "Budget": study.budget or "none stated",
        "Cost": cost(study.runs),
        "Environment": environment or "not recorded",
    }


def page(study: Study, tables: list[Table], figures: list[Figure], drawings: dict[str, str]) -> str:
    """Return index.html."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    settings = {
        "trim_blocks": True,
        "lstrip_blocks": True,
        "keep_trailing_newline": True,
        "undefined": StrictUndefined,
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, **settings
    )
    return environment.get_template("page.html.j2").render(
        name=study.name,
        summary=summary(study),
        command=study.environment.get("command"),
        left_out=left_out(study),
        tables=[(table, column_classes(table)) for table in tables],
        kinds=WRITERS,
        figures=[(figure, Markup(inline(figure, drawings[figure.name]))) for figure in figures],
    )


def column_classes(table: Table) -> list[str]:
    """Return the class of each of a table's columns: `number`, `wide` (long text) or nothing."""
    classes = []
    for i in range(len(table.columns)):
        cells = [row[i] for row in table.rows]
        is_text = any(isinstance(cell.value, str) for cell in cells)
        is_long = any(len(cell.text) > LONG for cell in cells)
        classes.append("" if is_text and not is_long else "wide" if is_text else "number")
    return classes


def inline(figure: Figure, drawing: str) -> str:
    """Return an SVG file's element as it can stand in a page beside others: with a label, and ids of its own."""
    from markupsafe import escape as escape_html

    element = drawing[drawing.index("<svg") :]
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{figure.name}-", element)
    return element.replace("<svg ", f'<svg role="img" aria-label="{escape_html(figure.title)}" ', 1)


def markdown(study: Study, tables: list[Table], figures: list[Figure]) -> str:
    """Return README.md."""
    lines = [f"# {escape(study.name)}"]
    lines += [f"**{term}.** {escape(text)}" for term, text in summary(study).items()]
    lines.append("Everything on one page: [index.html](index.html). The numbers: [data](data).")
    if command := study.environment.get("command"):
        lines.append(f"```\n{command}\n```")
    if runs := left_out(study):
        lines += ["## Left out", "These runs are in no mean and no test below, or only in part."]
        lines.append(
            "\n".join(f"* {escape(run.name)} ({run.state}): {escape(run.note)}" for run in runs)
        )
    lines.append("## Tables")
    lines += [table.markdown() for table in tables]
    lines.append("## Figures")
    for figure in figures:
        lines += [
            f"### {escape(figure.title)}",
            f"![{escape(figure.title)}](figures/{figure.name}.png)",
            escape(figure.caption),
        ]
    return "\n\n".join(line.strip("\n") for line in lines) + "\n"
