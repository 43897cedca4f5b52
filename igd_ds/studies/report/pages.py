"""Writes a report: one self-contained page, the same in Markdown, and all tables and figures.

    index.html  README.md  tables/NAME.{csv,md,tex}  figures/NAME.{png,svg}
    data/{study.json,ranks.parquet}

Equal studies give equal bytes, on every day and every CPU. The exception is the compression of the
PNG files, see `drawing`.
"""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from igd_ds.data.card import escape
from igd_ds.errors import UsageError
from igd_ds.folders import locked, replaced_folder, write_text
from igd_ds.studies.report.drawing import Figure
from igd_ds.studies.report.figures import all_figures
from igd_ds.studies.report.layout import Table
from igd_ds.studies.report.ledger import ledger
from igd_ds.studies.report.overview_tables import cost
from igd_ds.studies.report.study import MATCHES, NOT_BEGUN, Run, Study, load, save
from igd_ds.studies.report.tables import all_tables

ENTRIES = {"index.html", "README.md", "tables", "figures", "data"}
WRITERS = {"csv": Table.csv, "md": Table.markdown, "tex": Table.latex}
LONG, LONG_WORD = 60, 20
"""A column with a text or a word of more characters than this may be broken inside of words."""
BREAKS = re.compile(r"\s|-(?!\d)")
"""Where a browser breaks a line by itself: at white space, and after a hyphen before no digit."""
STATES = {"no test": "validated only"}
"""State of a run → its name in the summary, where the two differ."""


def render(study: Study, folder: Path, command: str = "") -> tuple[list[Table], list[Figure]]:
    """Write the report and the study that it is made of; return its tables and figures.

    The report is made in a temporary folder. Then the old content of `folder` is renamed, the new
    report takes its place, and the old content is deleted. If the process is killed between the two
    renames, the old report is left as .FOLDER.replaced-by-igd until the next start.

    Args:
        study: what to report.
        folder: a new or empty folder, or a report, which is replaced.
        command: the command line that makes the report, stored with the study; if it is empty, the
            stored one stays.

    Raises:
        UsageError: the folder holds something else, or another process writes it now.
    """
    folder = folder.resolve()
    check_folder(folder)
    if command:
        study = replace(study, environment=study.environment | {"command": command})

    with locked(folder), replaced_folder(folder) as unfinished:
        # The study is read back, so that a report from stored data has the same bytes.
        save(study, unfinished / "data")
        study = load(unfinished / "data")
        tables, figures = [*ledger(study), *all_tables(study)], all_figures(study)
        drawings = write_files(unfinished, tables, figures)
        write_text(unfinished / "index.html", page(study, tables, figures, drawings))
        write_text(unfinished / "README.md", markdown(study, tables, figures))
    return tables, figures


def check_folder(folder: Path) -> None:
    """Check that a report may be written to `folder`.

    Raises:
        UsageError: the folder holds something that is not a report and that would be lost.
    """
    if folder.is_file():
        raise UsageError(f"--output {folder} is a file; give a folder")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if there and (there - ENTRIES or not (folder / "data" / "study.json").is_file()):
        shown = ", ".join(sorted(there - ENTRIES or there)[:5])
        raise UsageError(
            f"--output {folder} is not empty and holds no report, but {shown}; give a new folder"
        )


def write_files(folder: Path, tables: list[Table], figures: list[Figure]) -> dict[str, str]:
    """Write tables/ and figures/; return the SVG of each figure by its name."""
    for name in ("tables", "figures"):
        (folder / name).mkdir(parents=True)
    for table in tables:
        for kind, write in WRITERS.items():
            write_text(folder / "tables" / f"{table.name}.{kind}", write(table))

    drawings = {}
    for figure in figures:
        for kind in ("png", "svg"):
            drawn = figure.render(kind)
            (folder / "figures" / f"{figure.name}.{kind}").write_bytes(drawn)
        drawings[figure.name] = drawn.decode()
    return drawings


def left_out(study: Study) -> list[Run]:
    """Return the runs of which something is missing, without those that were not meant to run."""
    return [
        run
        for run in study.runs
        if run.state not in NOT_BEGUN and (not run.is_complete or run.note)
    ]


def summary(study: Study) -> dict[str, str]:
    """Return the head of the report: term → text."""
    states = [
        f"{count} {STATES.get(state, state)}"
        for state, count in Counter(run.state for run in study.runs).items()
    ]
    environment = ", ".join(
        f"{key} {value}" for key, value in study.environment.items() if value and key != "command"
    )
    return {
        "Runs": f"{len(study.runs)}: {', '.join(states)}",
        "Hits": f"{MATCHES} Figures are item match where nothing else is said.",
        "Budget": study.budget or "not stated",
        "Cost": cost(study.runs),
        "Environment": environment or "not recorded",
    }


def page(study: Study, tables: list[Table], figures: list[Figure], drawings: dict[str, str]) -> str:
    """Return index.html."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
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
    """Return the CSS class of each column: `number`, `wide` (long text) or nothing (short text)."""
    classes = []
    for i in range(len(table.columns)):
        cells = [row[i] for row in table.rows]
        if not any(isinstance(cell.value, str) for cell in cells):
            classes.append("number")
        else:
            classes.append("wide" if any(is_long(cell.text) for cell in cells) else "")
    return classes


def is_long(text: str) -> bool:
    """Return whether a text, or a word of it, is too long for a narrow column of a table."""
    return len(text) > LONG or any(len(word) > LONG_WORD for word in BREAKS.split(text))


def inline(figure: Figure, drawing: str) -> str:
    """Return the element of an SVG file with a title and with ids that are unique on the page."""
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
        lines += [
            "## Left out",
            "The means and tests below leave these runs out, completely or in part.",
        ]
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
