"""A table and the forms that it is written in: plain text, Markdown, CSV and LaTeX."""

import csv
import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal, localcontext

from igd_ds.studies.rounding import significant

Value = float | int | str | None

MISSING = "–"
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "α": r"$\alpha$", "β": r"$\beta$", "γ": r"$\gamma$", "λ": r"$\lambda$", "τ": r"$\tau$",
    "±": r"$\pm$", "×": r"$\times$", "≤": r"$\leq$", "≥": r"$\geq$", "−": r"$-$",
    "→": r"$\to$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--", "…": r"\dots{}",
}  # fmt: skip
FORMULA = re.compile(r"[=+\-@\t\r]")
"""How a cell begins that a spreadsheet computes."""
MARKDOWN = re.compile(r"([\\`*_|<>\[\]])")


def harmless(value: Value) -> float | int | str:
    """Return a value as a CSV file holds it: text that looks like a formula gets a quotation mark.

    Example:
        >>> harmless("=HYPERLINK(1)"), harmless(-0.5), harmless(None)
        ("'=HYPERLINK(1)", -0.5, '')
    """
    if isinstance(value, str) and FORMULA.match(value):
        return f"'{value}"
    return "" if value is None else value


@dataclass(frozen=True)
class Cell:
    """A value of a table and how it is shown.

    Floats are rounded to six significant digits (`significant`) when the cell is made. Everything
    that is shown, compared or written is the rounded number, so that a table comes out the same on
    every CPU.

    Attributes:
        value: number or text; None where there is no value.
        sd: standard deviation over seeds; None where there is one seed.
        form: format of a number.
        mark: "best" (bold), "second" (underlined) or empty.
        star: whether a significance test found a difference.
    """

    value: Value
    sd: float | None = None
    form: str = ".4f"
    mark: str = ""
    star: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.value, float):
            object.__setattr__(self, "value", significant(self.value))
        if self.sd is not None:
            object.__setattr__(self, "sd", significant(self.sd))

    @property
    def text(self) -> str:
        """The value as it is shown, without the markup of a language."""
        if self.value is None:
            return MISSING
        if isinstance(self.value, str):
            return self.value
        spread = "" if self.sd is None else f" ± {formatted(self.sd, self.form)}"
        return f"{formatted(self.value, self.form)}{spread}{' *' if self.star else ''}"

    @property
    def number(self) -> float | None:
        """The value where it is a float, such as a metric; None for counts, text and gaps."""
        return self.value if isinstance(self.value, float) else None


Row = list[Cell]


@dataclass(frozen=True)
class Source:
    """Where numbers of a table come from: what they are, the source, its address, and a remark.

    `url` and `remark` may be empty.
    """

    label: str
    name: str
    url: str = ""
    remark: str = ""

    @property
    def text(self) -> str:
        """The source without its address."""
        return f"{self.label}: {self.name}." + (f" {self.remark}." if self.remark else "")


@dataclass(frozen=True)
class Table:
    """A table of a report.

    `name` names its files and `columns` are the headings of the cells of each row. Below the table
    stand `notes`, `sources`, and `commands`: what a command line made → the command line.
    """

    name: str
    title: str
    caption: str
    columns: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), (
            f"{self.name}: the length of a row differs from the number of columns"
        )

    def markdown(self) -> str:
        """Return the table with title, caption and everything below it as Markdown."""
        wrap = {"": "{}", "best": "**{}**", "second": "<u>{}</u>"}
        lines = [[in_markdown(column) for column in self.columns], ["---"] * len(self.columns)]
        lines += [
            [wrap[cell.mark].format(in_markdown(cell.text)) for cell in row] for row in self.rows
        ]

        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        text = f"### {in_markdown(self.title)}\n\n{in_markdown(self.caption)}\n\n{table}\n"
        below = [in_markdown(note) for note in self.notes]
        below += [source_in_markdown(source) for source in self.sources]
        below += [
            f"{in_markdown(label)}: {code_in_markdown(command)}"
            for label, command in self.commands.items()
        ]
        if below:
            text += "".join(f"\n* {line}" for line in below) + "\n"
        return text

    def text(self) -> str:
        """Return title and cells in aligned columns, for a terminal."""
        lines = [self.columns, *([cell.text for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = (
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        return "\n".join([self.title, *rows]) + "\n"

    def csv(self) -> str:
        """Return the values with six significant digits.

        A column with standard deviations is followed by a column of these, named `COLUMN sd`. A
        spreadsheet shows texts and never computes them (`harmless`).
        """
        spread = [any(row[i].sd is not None for row in self.rows) for i in range(len(self.columns))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            [
                harmless(name)
                for i, column in enumerate(self.columns)
                for name in [column, f"{column} sd"][: 1 + spread[i]]
            ]
        )

        for row in self.rows:
            values = [[cell.value, cell.sd][: 1 + spread[i]] for i, cell in enumerate(row)]
            writer.writerow([harmless(value) for pair in values for value in pair])
        return text.getvalue()

    def latex(self) -> str:
        """Return a table environment for the package booktabs.

        Columns of text are left-aligned, columns of numbers right-aligned. The caption holds the
        notes and the sources, but no addresses and no commands, which are too long for it.
        """
        wrap = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}
        is_text = [
            all(row[i].value is None or isinstance(row[i].value, str) for row in self.rows)
            for i in range(len(self.columns))
        ]
        lines = [" & ".join(map(in_latex, self.columns)) + r" \\", r"\midrule"]
        lines += [
            " & ".join(wrap[cell.mark].format(in_latex(cell.text)) for cell in row) + r" \\"
            for row in self.rows
        ]

        below = [*self.notes, *(source.text for source in self.sources)]
        caption = in_latex(" ".join([self.title + ".", self.caption, *below]))
        alignment = "".join("l" if text else "r" for text in is_text)
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{caption}}}",
                rf"\label{{tab:{self.name}}}",
                rf"\begin{{tabular}}{{{alignment}}}",
                r"\toprule",
                *lines,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )


def unique_names(names: Sequence[str]) -> list[str]:
    """Return the names with a number behind a name that stands before already.

    Names of datasets may differ only in characters that a file name leaves out.

    Example:
        >>> unique_names(["main", "main"])
        ['main', 'main-2']
    """
    unique: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        unique[next(new for new in itertools.chain([name], numbered) if new not in unique)] = None
    return list(unique)


def formatted(number: float, form: str) -> str:
    """Return a number as text; in a form with decimals, halves are rounded away from 0.

    Example:
        >>> formatted(0.0375, ".3f")  # the float is slightly below 0.0375
        '0.038'
    """
    if isinstance(number, int) or form[-1] not in "f%":
        return f"{number:{form}}"
    with localcontext() as context:
        context.rounding = ROUND_HALF_UP
        return f"{Decimal(repr(number)):{form}}"


def in_markdown(text: str) -> str:
    """Return a text with Markdown's special characters escaped, on one line."""
    return MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def source_in_markdown(source: Source) -> str:
    """Return a source as Markdown, with a link where its address is known."""
    name = in_markdown(source.name)
    linked = f"[{name}](<{source.url}>)" if source.url else name
    remark = f" {in_markdown(source.remark)}." if source.remark else ""
    return f"{in_markdown(source.label)}: {linked}.{remark}"


def code_in_markdown(text: str) -> str:
    """Return a text as code, between more backticks than stand in it, on one line.

    Example:
        >>> code_in_markdown("echo `date`")
        '`` echo `date` ``'
    """
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " * bool(longest)
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"


def in_latex(text: str) -> str:
    """Return a text with LaTeX's special characters escaped, on one line."""
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))
