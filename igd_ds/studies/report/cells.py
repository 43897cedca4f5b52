"""What all tables of a report share.

These are the runs that a table shows, their means over seeds as cells, the marks of the best
values, headings, and the parts of captions that tell which rows were evaluated.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from igd_ds.evaluation.metrics import HEADLINE
from igd_ds.studies.report.layout import Cell, Row, formatted
from igd_ds.studies.report.study import METRIC, Run, Study
from igd_ds.studies.rounding import mean_sd

MEASURES = ("ndcg@5", "ndcg@10", "ndcg@20", "hr@5", "hr@10", "hr@20")

# Stand for the α that a run is reported at, for the one that was best on its validation rows, and
# for one that was not evaluated.
CURRENT, BEST, UNMEASURED = None, "best", "unmeasured"

Methods = dict[tuple[str, str], list[Run]]
"""(backbone, method) → the runs of its seeds."""
Accept = Callable[[Run], bool]


def datasets(study: Study) -> list[str]:
    """Return the datasets that have a complete run, in order."""
    return list(dict.fromkeys(run.dataset for run in study.runs if run.is_complete))


def methods(study: Study, dataset: str, split: str = "test", baselines: bool = False) -> Methods:
    """Return the methods of a dataset that have complete runs evaluated on `split`.

    With `baselines`, the sequential baselines are included and come first.
    """
    found: Methods = {}
    evaluated = [
        run
        for run in study.runs
        if run.dataset == dataset and run.is_complete and getattr(run, split)
    ]
    for is_baseline in (True, False) if baselines else (False,):
        for backbone in dict.fromkeys(run.backbone for run in study.runs):
            for run in evaluated:
                if (run.backbone, run.is_baseline) == (backbone, is_baseline):
                    found.setdefault((backbone, run.method), []).append(run)
    return found


def backbones_of(found: Methods) -> list[str]:
    """Return the backbones of some methods, in order."""
    return list(dict.fromkeys(backbone for backbone, _ in found))


def best_on_valid(found: Methods, backbone: str, accept: Accept) -> str | None:
    """Return the tested method of a backbone with the best NDCG@10 on validation.

    Only methods whose runs `accept` takes are considered. Of equal values the first method wins.
    """
    means = {
        method: average(runs, HEADLINE, METRIC, split="valid").number
        for (its, method), runs in found.items()
        if its == backbone and accept(runs[0])
    }
    known = {method: mean for method, mean in means.items() if mean is not None}
    return max(known, key=lambda method: known[method]) if known else next(iter(means), None)


def metric_of(run: Run, split: str, alpha: str | None, path: Sequence[str]) -> Any:
    """Return an entry of a run's metrics.json.

    Args:
        run: whose metrics.json.
        split: "valid", "test" or "exact".
        alpha: α as the file writes it, or CURRENT, BEST or UNMEASURED.
        path: keys below the α.

    Returns:
        The entry, or None where the file or the entry does not exist.
    """
    results = getattr(run, split)
    wanted = {CURRENT: run.alpha_of(split), BEST: run.best_alpha}.get(alpha, alpha)
    value = results["alpha"].get(wanted) if results else None
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def average(
    runs: Sequence[Run],
    *path: str,
    split: str = "test",
    alpha: str | None = CURRENT,
    form: str = ".4f",
) -> Cell:
    """Return mean ± sd over seeds of an entry of metrics.json; an empty cell if a run lacks it."""
    return over_seeds([metric_of(run, split, alpha, path) for run in runs], form)


def over_seeds(values: Sequence[float | None], form: str = ".4f") -> Cell:
    """Return mean ± sd of some values; an empty cell where one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Cell(None)
    mean, sd = mean_sd(known)
    return Cell(mean, sd, form)


def measured(
    runs: Sequence[Run],
    measures: Sequence[str],
    alpha: str | None = CURRENT,
    match: str = HEADLINE,
) -> Row:
    """Return the accuracy of a method on test, one cell per measure."""
    return [average(runs, match, measure, alpha=alpha) for measure in measures]


def measures_of(runs: Iterable[Run]) -> list[str]:
    """Return those of MEASURES that at least one complete run has on test.

    A measure is missing where the lists were too short for it.
    """
    tested = [
        next(iter(run.test["alpha"].values()))[HEADLINE]
        for run in runs
        if run.is_complete and run.test
    ]
    return [measure for measure in MEASURES if any(measure in values for values in tested)]


def headings(measures: Iterable[str]) -> list[str]:
    """Return the column headings of some measures: ndcg@10 → NDCG@10."""
    return [measure.upper() for measure in measures]


def words(*values: str | int | None) -> Row:
    """Return cells of text and of whole numbers."""
    return [Cell(value, form="d" if isinstance(value, int) else ".4f") for value in values]


def marked(rows: Sequence[Row], first: int, smallest: Sequence[int] = ()) -> list[Row]:
    """Return the rows of a block with the best and the second best value of each column marked.

    Columns before `first` are not marked. The best value is the largest one, except in the columns
    of `smallest`. Values that are equal after rounding are marked alike. What is shown as 0 is
    marked only where small is good.
    """
    rows = [list(row) for row in rows]
    for column in range(first, len(rows[0]) if rows else 0):
        values = sorted(
            {number for row in rows if (number := row[column].number) is not None},
            reverse=column not in smallest,
        )
        if len(values) < 2:
            continue
        marks = {values[0]: "best", values[1]: "second"}
        for row in rows:
            number = row[column].number
            if number in marks and (column in smallest or not shows_zero(number, row[column].form)):
                row[column] = replace(row[column], mark=marks[number])
    return rows


def shows_zero(number: float, form: str) -> bool:
    """Return whether a number is 0, or so small that all of its digits that are shown are 0."""
    return not any(digit in "123456789" for digit in formatted(number, form))


def chosen_alphas(runs: Iterable[Run]) -> str:
    """Return the α that the runs of the seeds are reported at, each value once."""
    return as_list(run.alpha for run in runs if run.alpha is not None)


def as_list(alphas: Iterable[str]) -> str:
    """Return different α in ascending order as text: "0.1, 0.3"."""
    return ", ".join(sorted({f"{float(alpha):g}" for alpha in alphas}, key=float))


def searches_of(study: Study, dataset: str) -> list[str]:
    """Return a note if the test lists of a dataset's methods come from different searches.

    They do where `msl` stands beside other objectives: `igd eval` ranks each as it was trained.
    """
    by_search: dict[str, dict[str, None]] = {}
    for (backbone, method), runs in methods(study, dataset).items():
        for test in (run.test for run in runs if run.test):
            search, softmax = test.get("search", "beam"), test.get("softmax", "full")
            lists = by_search.setdefault(f"{search} search under the {softmax} softmax", {})
            lists[title_of(backbone, method)] = None
    if len(by_search) < 2:
        return []
    ways = "; ".join(f"{search} for {', '.join(lists)}" for search, lists in by_search.items())
    return [
        f"Lists come from different searches: {ways}. A difference between these methods is one of "
        "training and search together."
    ]


def rows_of(study: Study, dataset: str, split: str) -> str:
    """Return how many rows of a split were evaluated, out of how many, as text."""
    evaluated = {
        results["rows"]
        for run in study.runs
        if run.dataset == dataset and (results := getattr(run, split)) and "rows" in results
    }
    count = " and ".join(f"{rows:,}" for rows in sorted(evaluated)) or "no"
    name = "test" if split == "exact" else split
    total = study.catalogues.get(dataset, {}).get(f"{name}_rows")
    of_all = f" of {total:,}" if total else ""
    return f"{count}{of_all} {name} rows of {dataset}"


def rows_behind(study: Study, rows: Sequence[Row], split: str) -> str:
    """Return the evaluated rows of each dataset in the first column of `rows`, as a sentence.

    A cell of this column names a dataset, or a dataset and a backbone (`title_of`).
    """
    named = {
        title_of(run.dataset, *backbone): run.dataset
        for run in study.runs
        for backbone in ((), (run.backbone,))
    }
    shown = dict.fromkeys(named[str(row[0].value)] for row in rows)
    return f"{'; '.join(rows_of(study, dataset, split) for dataset in shown)}."


def title_of(*names: str) -> str:
    """Return the non-empty names, separated by commas."""
    return ", ".join(filter(None, names))


def slug(*names: str) -> str:
    """Return names as a file name: lower-case words joined by "-"."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(filter(None, names)).lower()).strip("-")
