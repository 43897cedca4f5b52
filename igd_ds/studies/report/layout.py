"""Tables and the forms they are written in: plain text, Markdown, CSV with every digit, LaTeX with booktabs."""

import csv
import io
import re
from dataclasses import dataclass, field

MISSING = "–"
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "α": r"$\alpha$", "β": r"$\beta$", "γ": r"$\gamma$", "λ": r"$\lambda$", "τ": r"$\tau$", "±": r"$\pm$", "×": r"$\times$",
    "≤": r"$\leq$", "≥": r"$\geq$", "−": r"$-$", "→": r"$\to$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--",
    "…": r"\dots{}",
}  # fmt: skip
MARKDOWN = re.compile(r"([\\`*_|<>\[\]])")


@dataclass(frozen=True)
class Cell:
    """A value as it is shown and, for CSV, in full.

    `form` formats a number. `sd` is the standard deviation over seeds, None where there is one seed. `mark` is "best" (bold),
    "second" (underlined) or empty; `star` says that a test found a difference.
    """

    value: float | int | str | None
    sd: float | None = None
    form: str = ".4f"
    mark: str = ""
    star: bool = False

    @property
    def text(self) -> str:
        """What is shown, without marks of a language."""
        if self.value is None:
            return MISSING
        if isinstance(self.value, str):
            return self.value
        spread = "" if self.sd is None else f" ± {self.sd:{self.form}}"
        return f"{self.value:{self.form}}{spread}{' *' if self.star else ''}"


@dataclass(frozen=True)
class Table:
    """A table: `name` names its files; `columns` heads the cells of each row; `notes` stand below it."""

    name: str
    title: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        assert all(len(row) == len(self.columns) for row in self.rows), (
            f"{self.name}: a row of another length than the columns"
        )

    def markdown(self) -> str:
        """Return the table with title, caption and notes as Markdown."""
        wrap = {"": "{}", "best": "**{}**", "second": "<u>{}</u>"}
        lines = [[in_markdown(column) for column in self.columns], ["---"] * len(self.columns)]
        lines += [
            [wrap[cell.mark].format(in_markdown(cell.text)) for cell in row] for row in self.rows
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = "".join(f"\n* {in_markdown(note)}" for note in self.notes)
        return f"### {in_markdown(self.title)}\n\n{in_markdown(self.caption)}\n\n{table}\n" + (
            notes and f"{notes}\n"
        )

    def plain(self) -> str:
        """Return title and cells in aligned columns, for a terminal."""
        lines = [self.columns, *([cell.text for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = (
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        return "\n".join([self.title, *rows]) + "\n"

    def csv(self) -> str:
        """Return the values with every digit; a column with standard deviations is followed by one of them."""
        spread = [any(row[i].sd is not None for row in self.rows) for i in range(len(self.columns))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            [
                name
                for i, column in enumerate(self.columns)
                for name in [column, f"{column} sd"][: 1 + spread[i]]
            ]
        )
        for row in self.rows:
            values = [[cell.value, cell.sd][: 1 + spread[i]] for i, cell in enumerate(row)]
            writer.writerow(["" if value is None else value for pair in values for value in pair])
        return text.getvalue()

    def latex(self) -> str:
        """Return a table environment for the package booktabs; the first columns of text are left-aligned, numbers right."""
        wrap = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}
        text = [
            all(row[i].value is None or isinstance(row[i].value, str) for row in self.rows)
            for i in range(len(self.columns))
        ]
        lines = [" & ".join(map(in_latex, self.columns)) + r" \\", r"\midrule"]
        lines += [
            " & ".join(wrap[cell.mark].format(in_latex(cell.text)) for cell in row) + r" \\"
            for row in self.rows
        ]
        return "\n".join([
            r"\begin{table}", r"\centering", rf"\caption{{{in_latex(' '.join([self.title + '.', self.caption, *self.notes]))}}}",
            rf"\label{{tab:{self.name}}}", rf"\begin{{tabular}}{{{''.join('l' if t else 'r' for t in text)}}}", r"\toprule",
            *lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
        ])  # fmt: skip


def in_markdown(text: str) -> str:
    """Return a text whose characters mean nothing to Markdown."""
    return MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def in_latex(text: str) -> str:
    """Return a text whose characters mean nothing to LaTeX."""
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))
