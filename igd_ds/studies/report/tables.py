"""The tables of both papers, and the further tables of a report, made from a `Study`.

Figures are means over the runs of the seeds, each at its `Run.alpha`, unless a caption says
otherwise. Only complete runs count. The blocks of a table are datasets and backbones; the best
(bold) and the second best value (underlined) are those of a block.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from igd_ds.evaluation.metrics import CALIBRATION_BINS, HEADLINE
from igd_ds.studies import significance
from igd_ds.studies.report.layout import Cell, Row, Table, formatted, unique_names
from igd_ds.studies.report.study import (
    AT_ALPHA,
    IGD,
    MATCHES,
    METRIC,
    NOT_BEGUN,
    REFERENCE,
    RowGroups,
    Run,
    Study,
    has_curriculum,
    lines_by,
)
from igd_ds.studies.rounding import mean_sd, significant
from igd_ds.studies.significance import ndcg, relative

MEASURES = ("ndcg@5", "ndcg@10", "ndcg@20", "hr@5", "hr@10", "hr@20")
BESIDE = (METRIC, "hr@10")
"""The measures that the main results also give as token match."""
SCHEDULED = {
    "fg-ce": "front-greater → CE",
    "fg-ce-fr": "front-greater → CE → frequency",
}
"""What the values of the setting `mixing` that follow a schedule are called."""
ABLATION = (
    REFERENCE,
    *SCHEDULED.values(),
    "multi-target",
    "multi-target + curriculum",
    "front-greater",
    "frequency",
    "multi-target on logits",
    "multi-target + curriculum on logits",
)
"""The lines of MTC Table 4 in the paper's order, then the lines that we add."""
INTERVAL = (
    "95 % interval: ± 1.96 standard errors over users, whose rows are not independent; it "
    "generalises to other users, not to other trainings."
)
"""What the intervals of the main results are."""
REPEATS = (("repeat_rate", "top10", "Seen"), ("repeat_rate", "first", "Seen, first place"))
"""Entries of metrics.json about items that users had met before, and their column headings."""
HISTORY = ((1, 5), (6, 10), (11, None))
"""History lengths that are reported separately; None: no upper limit."""

# Stand for the α that a run is reported at, for the one that was best on its validation rows, and
# for one that was not evaluated.
CURRENT, BEST, UNMEASURED = None, "best", "unmeasured"

Methods = dict[tuple[str, str], list[Run]]
"""(backbone, method) → the runs of its seeds."""
Accept = Callable[[Run], bool]


def all_tables(study: Study) -> list[Table]:
    """Return every table that the study has data for."""
    made = []
    for make in (
        dataset_statistics, filtering_ratio, main_results, significance_of, selection,
        beta_sensitivity, igd_ablation, linear_and_binary, alpha_grid, mtc_ablation, backbones,
        quantizers, relaxed_match, row_groups, diversity, beam_and_exact, calibration, examples,
        all_runs,
    ):  # fmt: skip
        made += make(study)
    tables = [table for table in made if table.rows]
    names = unique_names([table.name for table in tables])
    return [replace(table, name=name) for table, name in zip(tables, names, strict=True)]


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
    wanted = {CURRENT: run.alpha, BEST: run.best_alpha}.get(alpha, alpha)
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


def improvement(
    runs: Sequence[Run],
    reference: Sequence[Run],
    measures: Sequence[str],
    match: str = HEADLINE,
) -> Row:
    """Return the relative improvement of each measure's mean over the reference's.

    The cells are empty where there is no reference.
    """
    cells = []
    for measure in measures:
        mean, other = (mean_on_test(its, match, measure) for its in (runs, reference))
        known = mean is not None and other is not None
        cells.append(Cell(relative(mean or 0.0, other or 0.0) if known else None, form="+.2%"))
    return cells


def mean_on_test(runs: Sequence[Run], match: str, measure: str) -> float | None:
    """Return the mean of a measure on test with all digits; None if a run lacks it."""
    values = [metric_of(run, "test", CURRENT, (match, measure)) for run in runs]
    return mean_sd(values)[0] if values and None not in values else None


def reference_of(study: Study, found: Methods, backbone: str) -> list[Run]:
    """Return the reference's runs that a backbone's methods are compared with; [] without them."""
    return found.get((backbone, study.reference)) or found.get(("", study.reference), [])


def chosen_alphas(runs: Iterable[Run]) -> str:
    """Return the α that the runs of the seeds are reported at, each value once."""
    return as_list(run.alpha for run in runs if run.alpha is not None)


def as_list(alphas: Iterable[str]) -> str:
    """Return different α in ascending order as text: "0.1, 0.3"."""
    return ", ".join(sorted({f"{float(alpha):g}" for alpha in alphas}, key=float))


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


def other_than(method: str) -> Accept:
    """Return a test of whether a run is of another method."""
    return lambda run: run.method != method


def trained_with(objective: str) -> Accept:
    """Return a test of whether a run was trained with an objective."""
    return lambda run: run.objective == objective


def is_component(name: str) -> Accept:
    """Return a test of whether a run belongs to a line of MTC Table 4 (ABLATION)."""
    return lambda run: component(run) == name


def component(run: Run) -> str | None:
    """Return the line of MTC Table 4 (ABLATION) of a run; for other methods the objective."""
    settings = run.settings
    if run.objective != "multi-target":
        return run.objective
    if settings.get("mixing") in SCHEDULED:
        return SCHEDULED[settings["mixing"]]
    curriculum = " + curriculum" if has_curriculum(settings) else ""
    on_logits = " on logits" if settings.get("mixing_form") == "logits" else ""
    return f"multi-target{curriculum}{on_logits}"


def slug(*names: str) -> str:
    """Return names as a file name: lower-case words joined by "-"."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(filter(None, names)).lower()).strip("-")


def title_of(*names: str) -> str:
    """Return the non-empty names, separated by commas."""
    return ", ".join(filter(None, names))


def dataset_statistics(study: Study) -> list[Table]:
    """Return IGD Table 1, with the columns of MTC Table 2 where the datasets record them."""
    keys = ("items", "train_rows", "valid_rows", "test_rows", "target_tokens", "zero_ig_tokens")
    columns = ["Dataset", "Items are", "Items", "Train", "Valid", "Test"]
    columns += ["Target tokens", "Zero-IG tokens", "Share"]
    caption = (
        "Rows of each split, tokens of all training targets, and how many of these tokens have "
        "zero information gain (IGD Table 1)."
    )
    rows = [
        [
            *words(dataset, found["kind"]),
            *(Cell(found.get(key), form=",d") for key in keys),
            Cell(found.get("zero_ig_share"), form=".2%"),
        ]
        for dataset, found in study.catalogues.items()
    ]

    if any("users" in found for found in study.catalogues.values()):
        columns += ["Users", "Interactions", "Per user"]
        caption += (
            " Users, interactions and interactions per user (MTC Table 2) are counted before rows "
            "are made of them."
        )
        for row, found in zip(rows, study.catalogues.values(), strict=True):
            users, interactions = found.get("users"), found.get("interactions")
            row += [Cell(number, form=",d") for number in (users, interactions)]
            row.append(Cell(interactions / users if users and interactions else None, form=".2f"))
    return [Table("statistics", "Datasets", caption, columns, rows)]


def filtering_ratio(study: Study) -> list[Table]:
    """Return MTC Table 1, for the datasets whose items are semantic IDs."""
    found = {
        name: c["filtering_ratio"]
        for name, c in study.catalogues.items()
        if c["kind"] == "semantic-id" and "filtering_ratio" in c
    }
    levels = max(map(len, found.values()), default=0)
    rows = [
        [
            *words(name),
            *(Cell(ratio, form=".2%") for ratio in ratios),
            *(Cell(None) for _ in range(levels - len(ratios))),
        ]
        for name, ratios in found.items()
    ]
    caption = "Mean share of the remaining items that each further token rules out (MTC Table 1)."
    columns = ["Dataset", *(f"Layer {i + 1}" for i in range(levels))]
    return [Table("filtering-ratio", "Filtering by level", caption, columns, rows)]


def main_results(study: Study) -> list[Table]:
    """Return IGD Table 2 or MTC Table 3 of each dataset, with the baselines on top."""
    return [main_table(study, dataset) for dataset in datasets(study)]


def main_table(study: Study, dataset: str) -> Table:
    """Return the main results of one dataset."""
    found = methods(study, dataset, baselines=True)
    measures = measures_of(run for run in study.runs if run.dataset == dataset)
    stars = {(c.backbone, c.method) for c in significance.compare(study, dataset) if c.significant}

    # A row per method; the last column is added after the best values of the others are marked.
    rows, last = [], []
    if found and not any(method == "popularity" for _, method in found):
        rows.append(expected_popularity(next(iter(found.values()))[0], measures))
        last.append(Cell(None))
    for (backbone, method), runs in found.items():
        is_baseline = runs[0].is_baseline
        cells, index = measured(runs, measures), measures.index(METRIC)
        cells[index] = replace(cells[index], star=(backbone, method) in stars)
        cells += measured(runs, BESIDE, match="token_match")
        cells.append(interval_over_users(study, runs))
        names = ("baseline", method, "") if is_baseline else (backbone, method, chosen_alphas(runs))
        rows.append([*words(*names, len(runs)), *cells])
        compared = not is_baseline and method != study.reference
        reference = reference_of(study, found, backbone) if compared else []
        last += improvement(runs, reference, [METRIC])
    rows = [[*row, cell] for row, cell in zip(marked(rows, 4), last, strict=True)]

    # The improvement of each backbone's best method, in all measures.
    generative = {key: runs for key, runs in found.items() if not runs[0].is_baseline}
    for backbone in backbones_of(generative):
        best = best_on_valid(found, backbone, other_than(study.reference))
        reference = reference_of(study, found, backbone)
        if best and reference:
            cells = improvement(found[backbone, best], reference, measures)
            cells += improvement(found[backbone, best], reference, BESIDE, "token_match")
            cells += [Cell(""), Cell(None)]  # no interval, no further improvement
            rows.append([*words(backbone, f"improvement of {best}", "", None), *cells])

    caption = (
        f"{rows_of(study, dataset, 'test')}; {ranked_items(study, dataset)}; mean ± standard "
        f"deviation over seeds. {INTERVAL} Bold: best; underlined: second. * marks a difference "
        f"from {study.reference} in NDCG@10 (paired bootstrap over users, Holm-corrected p < "
        f"{significance.LEVEL}). Last "
        f"column: improvement over {study.reference} in NDCG@10. Last row: improvement in every "
        f"measure, for the method with the best validation NDCG@10. {MATCHES} {AT_ALPHA}"
    )
    columns = ["Model", "Method", "α", "Seeds", *headings(measures)]
    columns += [f"{name}, token match" for name in headings(BESIDE)]
    columns += ["NDCG@10, 95 % interval", f"vs {study.reference}"]
    title = f"Main results: {dataset}"
    return Table(slug("main", dataset), title, caption, columns, rows, gaps(study, dataset, found))


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


def ranked_items(study: Study, dataset: str) -> str:
    """Return which items were ranked for the test rows of a dataset, as text."""
    tests = [run.test for run in study.runs if run.dataset == dataset and run.test]
    if any(results.get("exclude_seen") == "yes" for results in tests):
        return "the whole catalogue but the items that the user had met before is ranked"
    return "the whole catalogue is ranked"


def expected_popularity(run: Run, measures: Sequence[str]) -> Row:
    """Return the row of a ranking by popularity, which every evaluation computes.

    It ranks items, not token paths, so that it has no token match.
    """
    expected = run.test["popularity_baseline"] if run.test else {}
    cells = [Cell(expected.get(measure)) for measure in measures]
    cells += [*(Cell(None) for _ in BESIDE), Cell("")]
    return [*words("baseline", "popularity (expected)", "", None), *cells]


def interval_over_users(study: Study, runs: Sequence[Run]) -> Cell:
    """Return the 95 % interval over users of a method's NDCG@10 on test; "" where it is unknown.

    The method's figure is the mean over its runs, so one seed has an interval too.
    """
    users = study.rows.get(runs[0].dataset, {}).get("test", {}).get("user")
    if users is None or not all("test" in run.ranks for run in runs):
        return Cell("")
    gained = significance.mean_by_row(runs)
    error = significance.standard_error(gained, users)
    if error is None:
        return Cell("")
    mean, margin = math.fsum(gained) / len(gained), significance.NORMAL_95 * error
    return Cell(interval(max(mean - margin, 0.0), mean + margin, ".4f"))


def interval(low: float, high: float, form: str) -> str:
    """Return an interval as text: "[0.0100, 0.0200]"."""
    return f"[{formatted(significant(low), form)}, {formatted(significant(high), form)}]"


def gaps(study: Study, dataset: str, found: Methods) -> list[str]:
    """Return notes on incomplete means: seeds without a complete test, methods with one seed."""
    notes = []
    for (backbone, method), runs in found.items():
        lost = [
            run
            for run in study.runs
            if (run.dataset, run.backbone, run.method) == (dataset, backbone, method)
            and not (run.is_complete and run.test)
            and run.state not in NOT_BEGUN
        ]
        if lost:
            states = ", ".join(f"seed {run.seed} {run.state}" for run in lost)
            number = f"{len(runs)} of {len(runs) + len(lost)} runs"
            notes.append(f"{title_of(backbone, method)}: mean of {number} ({states}).")

    single = [
        method for (_, method), runs in found.items() if len(runs) == 1 and not runs[0].is_baseline
    ]
    if single:
        notes.append(f"One seed, and so no standard deviation over seeds: {', '.join(single)}.")
    return notes


def significance_of(study: Study) -> list[Table]:
    """Return a table of both significance tests for each dataset."""
    return [significance_table(study, dataset) for dataset in datasets(study)]


def significance_table(study: Study, dataset: str) -> Table:
    """Return the comparisons of a dataset's methods with the reference, with both tests."""
    compared, rows = significance.compare(study, dataset), []
    for c in compared:
        difference = ""
        if c.low is not None and c.high is not None:
            difference = interval(c.low, c.high, "+.4f")
        rows.append(
            [
                *words(c.backbone, c.method, len(c.seeds)),
                Cell(c.reference_mean, c.reference_sd),
                Cell(c.mean, c.sd),
                Cell(c.relative, form="+.2%"),
                Cell(difference),
                *map(Cell, (c.users_p, c.users_holm, c.seeds_p, c.seeds_holm)),
            ]
        )
    columns = ["Model", "Method", "Seeds", study.reference, "NDCG@10", "Improvement"]
    columns += ["95 % interval", "p users", "p users, Holm", "p seeds", "p seeds, Holm"]
    caption = (
        f"{rows_of(study, dataset, 'test')}. "
        f"Test NDCG@10 of each method compared with {study.reference} on the same rows and seeds. "
        "Users: paired bootstrap of the difference of the means over seeds, with "
        f"{significance.RESAMPLES} resamples of the users; it generalises to other users, not to "
        "other trainings. Seeds: two-sided Mann–Whitney U test; it generalises to other trainings. "
        f"Holm: corrected over the methods of the dataset. {AT_ALPHA}"
    )

    smallest = {
        (len(c.seeds), round(c.seeds_smallest_p, 4))
        for c in compared
        if c.seeds_smallest_p is not None
    }
    notes = [
        f"With {n} seeds per method, the p of the Mann–Whitney U test is at least {p:g} before "
        "correction."
        for n, p in sorted(smallest)
    ]
    tested = {(c.backbone, c.method) for c in compared}
    untested = [
        method
        for backbone, method in methods(study, dataset)
        if (backbone, method) not in tested and method != study.reference
    ]
    if untested:
        notes.append(
            f"Not tested, because no seed is shared with {study.reference}: {', '.join(untested)}."
        )
    name, title = slug("significance", dataset), f"Tests: {dataset}"
    return Table(name, title, caption, columns, rows, notes)


def selection(study: Study) -> list[Table]:
    """Return the candidates that validation chose among, where there are several."""
    rows, notes = [], []
    for dataset in datasets(study):
        choices: dict[tuple[str, str], dict[str, list[Run]]] = {}
        for (backbone, method), runs in methods(study, dataset, "valid", baselines=True).items():
            choices.setdefault((backbone, runs[0].family), {})[method] = runs

        for (backbone, _), candidates in choices.items():
            if len(candidates) < 2:
                continue
            data = title_of(dataset, backbone)
            block = [candidate(data, method, runs) for method, runs in candidates.items()]
            rows += marked(block, 4)
            ordered = sorted(
                (line for line in block if line[4].number is not None),
                key=lambda line: -(line[4].number or 0),
            )
            if wrong := [str(line[1].value) for line in ordered[1:] if line[3].value]:
                notes.append(
                    f"{data}: {', '.join(wrong)} was tested, but validation prefers "
                    f"{ordered[0][1].value}."
                )
    columns = ["Data", "Candidate", "Seeds", "Tested", "NDCG@10"]
    caption = (
        f"{rows_behind(study, rows, 'valid')} "
        "Validation NDCG@10 at α = 0. Candidates of one method differ only in the settings that "
        "validation chooses, and the best candidate is tested. IGD's α is chosen afterwards."
    )
    return [Table("selection", "Selection on validation", caption, columns, rows, notes)]


def candidate(data: str, method: str, runs: Sequence[Run]) -> Row:
    """Return the row of one candidate of `selection`."""
    tested = "yes" if any(run.test for run in runs) else ""
    value = average(runs, HEADLINE, METRIC, split="valid", alpha="0.0")
    return [*words(data, method, len(runs), tested), value]


def beta_sensitivity(study: Study) -> list[Table]:
    """Return IGD Appendix H: β on validation at α = 0, and which β beat the unweighted loss."""
    rows, notes = [], []
    for dataset in datasets(study):
        found = methods(study, dataset, "valid")
        for backbone in backbones_of(found):
            unweighted = found.get((backbone, REFERENCE))
            runs = [run for (its, _), runs in found.items() if its == backbone for run in runs]
            data = title_of(dataset, backbone)
            for name, by_beta in lines_by(runs, "igd_beta").items() if unweighted else ():
                block = [beta_row(data, REFERENCE, None, unweighted or [])]
                block += [beta_row(data, name, beta, runs) for beta, runs in by_beta.items()]
                effective = [
                    f"{row[2].value:g}"
                    for row in block[1:]
                    if all(
                        (cell.number or 0) > (first.number or 0)
                        for cell, first in zip(row[4:], block[0][4:], strict=True)
                    )
                ]
                rows += marked(block, 4)
                notes.append(f"{data}, {name}: effective β: {', '.join(effective) or 'none'}.")

    caption = (
        f"{rows_behind(study, rows, 'valid')} "
        "Validation at α = 0. A β is effective if its means of NDCG@10 and HR@10 both exceed those "
        f"of {REFERENCE}."
    )
    columns = ["Data", "Objective", "β", "Seeds", "NDCG@10", "HR@10"]
    return [Table("beta", "β sensitivity (IGD Appendix H)", caption, columns, rows, notes)]


def beta_row(data: str, objective: str, beta: float | None, runs: Sequence[Run]) -> Row:
    """Return the row of one β of `beta_sensitivity`; None: the unweighted loss."""
    cells = [
        average(runs, HEADLINE, measure, split="valid", alpha="0.0")
        for measure in (METRIC, "hr@10")
    ]
    return [*words(data, objective), Cell(beta, form="g"), *words(len(runs)), *cells]


def igd_ablation(study: Study) -> list[Table]:
    """Return IGD Table 3."""
    rows, measures = [], measures_of(study.runs)
    for dataset in datasets(study):
        found = methods(study, dataset)
        for backbone in backbones_of(found):
            best = best_on_valid(found, backbone, trained_with("igd"))
            if not best or (backbone, REFERENCE) not in found:
                continue
            weighted, unweighted = found[backbone, best], found[backbone, REFERENCE]
            has_grid = all(run.valid and len(run.valid["alpha"]) > 1 for run in unweighted)
            parts = (
                (best, weighted, CURRENT),
                ("w/o w_d (α = 0)", weighted, "0.0"),
                (f"w/o w_t ({REFERENCE})", unweighted, BEST if has_grid else UNMEASURED),
                ("w/o both", unweighted, "0.0"),
            )
            block = [
                [*words(title_of(dataset, backbone), name), *measured(runs, measures, alpha)]
                for name, runs, alpha in parts
            ]
            rows += marked(block, 2)

    caption = (
        f"{rows_behind(study, rows, 'test')} "
        "Test. w_t: the weights of the training loss. w_d: the calibration of the decoding by α, "
        "with and without w_t at the α that was best on each run's validation rows."
    )
    columns = ["Data", "Method", *headings(measures)]
    return [Table("ablation-igd", "Ablation of IGD (IGD Table 3)", caption, columns, rows)]


def linear_and_binary(study: Study) -> list[Table]:
    """Return IGD Table 8, for the datasets where both forms were tested."""
    rows = []
    for dataset in datasets(study):
        found = methods(study, dataset)
        for backbone in backbones_of(found):
            best = [
                best_on_valid(found, backbone, trained_with(objective))
                for objective in (REFERENCE, "igd-linear", "igd")
            ]
            forms = [form for form in best if form is not None]
            if len(forms) < len(best):
                continue
            betas = [form.split("=")[1] for form in forms[1:]]
            for measure in ("hr@10", METRIC):
                cells = [
                    average(found[backbone, form], HEADLINE, measure, alpha="0.0") for form in forms
                ]
                largest = max((c.number for c in cells if c.number is not None), default=None)
                cells = [
                    replace(c, mark="best" if c.number is not None and c.number == largest else "")
                    for c in cells
                ]
                rows.append([*words(title_of(dataset, backbone), measure.upper(), *betas), *cells])

    columns = ["Data", "Measure", "β linear", "β binary"]
    columns += [REFERENCE, "IGD-T linear", "IGD-T binary"]
    caption = (
        f"{rows_behind(study, rows, 'test')} "
        "Test at α = 0. Each form uses the β that validation chose."
    )
    title = "Linear and binary weights (IGD Table 8)"
    return [Table("linear-binary", title, caption, columns, rows)]


def alpha_grid(study: Study) -> list[Table]:
    """Return IGD Table 7, for the tested methods with more than one α on validation."""
    paths = {
        ("first_token_repetition",): ".3f",
        ("score_entropy_bits",): ".2f",
        (HEADLINE, METRIC): ".4f",
        (HEADLINE, "hr@10"): ".4f",
    }

    rows, notes = [], []
    for dataset in datasets(study):
        for (backbone, method), runs in methods(study, dataset).items():
            grids = [set(run.valid["alpha"]) for run in runs if run.valid]
            grid = sorted(set.intersection(*grids), key=float) if len(grids) == len(runs) else []
            block = []
            for alpha in grid if len(grid) > 1 else ():
                cells = [
                    average(runs, *path, split="valid", alpha=alpha, form=form)
                    for path, form in paths.items()
                ]
                names = words(title_of(dataset, backbone), method)
                block.append([*names, Cell(float(alpha), form="g"), *cells])
            rows += marked(block, 3, smallest=(3,))
            if block and runs[0].objective in IGD:
                notes += certainty(study, dataset, title_of(dataset, backbone), runs, grid)

    columns = ["Data", "Method", "α", "FWR ↓", "ISE ↑ (bits)", "NDCG@10", "HR@10"]
    caption = (
        f"{rows_behind(study, rows, 'valid')} "
        "Validation. α > 0 is IGD's decoding, for every training. FWR: share of the most common "
        "first token among the ten items of a list. ISE: entropy of the scores of a list."
    )
    title = "Diversity and accuracy along α (IGD Table 7)"
    return [Table("alpha", title, caption, columns, rows, notes)]


def certainty(
    study: Study, dataset: str, data: str, runs: Sequence[Run], grid: Sequence[str]
) -> list[str]:
    """Return a note on how sure the choice of α on validation is; [] where the ranks are unknown.

    The standard error is that of one seed's NDCG@10, over the users of the validation rows. An α
    whose mean over seeds is less than this below the best mean may be as good as the best one.
    """
    users = study.rows.get(dataset, {}).get("valid", {}).get("user")
    if users is None or "valid" not in runs[0].ranks:
        return []
    error = significance.standard_error(ndcg(runs[0].ranks["valid"]), users)
    if error is None:
        return []

    means = {
        alpha: average(runs, HEADLINE, METRIC, split="valid", alpha=alpha).number or 0.0
        for alpha in grid
    }
    near = as_list(alpha for alpha in grid if means[alpha] >= max(means.values()) - error)
    which = "is alone" if "," not in near else "lie"
    return [
        f"{data}, {runs[0].method}: on {rows_of(study, dataset, 'valid')}, validation chose α = "
        f"{chosen_alphas(runs)}. The standard error of NDCG@10 is {formatted(error, '.4f')}; "
        f"α = {near} {which} within one standard error of the best mean."
    ]


def mtc_ablation(study: Study) -> list[Table]:
    """Return MTC Table 4, where at least two of its components were tested."""
    rows, measures = [], measures_of(study.runs)
    for dataset in datasets(study):
        found = methods(study, dataset)
        for backbone in backbones_of(found):
            best = {name: best_on_valid(found, backbone, is_component(name)) for name in ABLATION}
            parts = {name: method for name, method in best.items() if method}
            if len(parts) > 2:
                data = title_of(dataset, backbone)
                block = [
                    [*words(data, name, method), *measured(found[backbone, method], measures)]
                    for name, method in parts.items()
                ]
                rows += marked(block, 3)

    caption = (
        f"{rows_behind(study, rows, 'test')} "
        "Test at α = 0. The first lines are cumulative, as in the paper: front-greater on a "
        "schedule to cross-entropy; the schedule extended to frequency; learned shares; the "
        "curriculum. The further lines are front-greater and frequency alone, without a schedule, "
        "and the form that scales the logits. Each line is a separate training. Where several "
        "settings were tried, the line shows the one with the best validation NDCG@10."
    )
    columns = ["Data", "Components", "Method", *headings(measures)]
    title = "Components of multi-target (MTC Table 4)"
    return [Table("ablation-mtc", title, caption, columns, rows)]


Cases = dict[tuple[str, str], list[str]]
"""(dataset, backbone) → the first two cells of its rows."""


def backbones(study: Study) -> list[Table]:
    """Return IGD Tables 4 and 5, for the datasets that were tried with several backbones."""
    cases: Cases = {}
    for dataset in datasets(study):
        its = backbones_of(methods(study, dataset))
        if len(its) > 1:
            cases |= {(dataset, backbone): [dataset, backbone] for backbone in its}
    caption = (
        f"Test. For each backbone, {study.reference} and the method with the best validation "
        f"NDCG@10. {AT_ALPHA}"
    )
    columns = ["Dataset", "Backbone"]
    title = "Backbones (IGD Tables 4, 5)"
    return [gains(study, "backbones", title, caption, columns, cases)]


def quantizers(study: Study) -> list[Table]:
    """Return MTC Table 5, where the semantic IDs of the datasets were made in different ways."""
    made_by = {
        dataset: study.catalogues.get(dataset, {}).get("quantizer") for dataset in datasets(study)
    }
    cases: Cases = {}
    for dataset, quantizer in made_by.items() if len(set(made_by.values()) - {None}) > 1 else ():
        if quantizer:
            its = backbones_of(methods(study, dataset))
            cases |= {(dataset, backbone): [dataset, quantizer] for backbone in its}
    caption = (
        f"Test. For each quantizer of the semantic IDs, {study.reference} and the method with the "
        f"best validation NDCG@10. {AT_ALPHA}"
    )
    columns = ["Dataset", "Quantizer"]
    return [gains(study, "quantizers", "Semantic IDs (MTC Table 5)", caption, columns, cases)]


def gains(
    study: Study, name: str, title: str, caption: str, columns: list[str], cases: Cases
) -> Table:
    """Return a table of the reference, the best method and its improvement for each of `cases`."""
    rows, measures = [], measures_of(study.runs)
    for (dataset, backbone), case in cases.items():
        found = methods(study, dataset, baselines=True)
        best = best_on_valid(found, backbone, other_than(study.reference))
        reference = reference_of(study, found, backbone)
        if best and reference:
            pair = {study.reference: reference, best: found[backbone, best]}
            block = [
                [*words(*case, method), *measured(runs, measures)] for method, runs in pair.items()
            ]
            cells = improvement(found[backbone, best], reference, measures)
            rows += [*marked(block, 3), [*words(*case, "improvement"), *cells]]
    caption = f"{rows_behind(study, rows, 'test')} {caption}"
    return Table(name, title, caption, [*columns, "Method", *headings(measures)], rows)


def relaxed_match(study: Study) -> list[Table]:
    """Return MTC Table 6 of each dataset with semantic IDs."""
    tables = []
    for dataset in datasets(study):
        found = methods(study, dataset)
        known = [
            metric_of(run, "test", CURRENT, ("relaxed_match",)) or {}
            for runs in found.values()
            for run in runs
        ]
        levels = sorted({level for by_level in known for level in by_level}, key=int)
        rows = []
        for (backbone, method), runs in found.items() if levels else ():
            cells = [average(runs, "relaxed_match", level, "ndcg@5") for level in levels]
            rows.append([*words(backbone, method), *cells, average(runs, "token_match", "ndcg@5")])

        columns = ["Model", "Method", *(f"top-{level}" for level in levels), "whole ID"]
        caption = (
            f"{rows_of(study, dataset, 'test')}. "
            "Test NDCG@5 if a hit needs only the first k codes of an item; "
            f"token match. {AT_ALPHA}"
        )
        title = f"Relaxed match (MTC Table 6): {dataset}"
        tables.append(Table(slug("relaxed", dataset), title, caption, columns, marked(rows, 2)))
    return tables


def row_groups(study: Study) -> list[Table]:
    """Return the accuracy by head and tail, warm and cold targets, and history length."""
    tables = []
    for dataset in datasets(study):
        groups = groups_of(study.rows.get(dataset, {}).get("test", {}))
        values = []
        for (backbone, method), runs in methods(study, dataset, baselines=True).items():
            if groups and all("test" in run.ranks for run in runs):
                gained = [ndcg(run.ranks["test"]) for run in runs]
                cells = [
                    over_seeds([weighted_mean(gain, weight) for gain in gained])
                    for weight in groups.values()
                ]
                model = "baseline" if runs[0].is_baseline else backbone
                values.append([*words(model, method), *cells])

        sizes = [Cell(float(weight.sum()), form=",.0f") for weight in groups.values()]
        rows = [[*words("", "rows"), *sizes], *marked(values, 2)] if values else []
        caption = (
            f"{rows_of(study, dataset, 'test')}. "
            "Test NDCG@10 by group of rows. Head and tail: the target belongs to the more or the "
            "less frequent half of the test targets (MTC Figure 3). Warm and cold: the target is "
            f"or is not a training target. History: number of items in it. {AT_ALPHA}"
        )
        columns = ["Model", "Method", *groups]
        title = f"Groups of rows: {dataset}"
        tables.append(Table(slug("groups", dataset), title, caption, columns, rows))
    return tables


def weighted_mean(values: np.ndarray, weight: np.ndarray) -> float:
    """Return the mean of `values` (R,) with weights (R,); both sums are exact."""
    return math.fsum(values * weight) / math.fsum(weight)


def groups_of(known: RowGroups) -> RowGroups:
    """Return for each group the weight of each row (R,) in it, from 0 to 1.

    Groups without rows are left out.
    """
    if not known:
        return {}
    head, cold, history = known["head"], known["cold"].astype(float), known["history"]
    groups = {"head": head, "tail": 1 - head, "warm": 1 - cold, "cold": cold}
    for low, high in HISTORY:
        inside = (history >= low) & (history <= (high or history.max()))
        groups[f"history {low}–{high}" if high else f"history {low}+"] = inside.astype(float)
    return {name: weight for name, weight in groups.items() if weight.sum()}


def diversity(study: Study) -> list[Table]:
    """Return coverage, Gini index and popularity deciles of the lists (MTC Figure 2).

    Runs that record how many of the listed items their users had met before show that too.
    """
    tables = []
    for dataset in datasets(study):
        found = methods(study, dataset, baselines=True)
        shown = [run for runs in found.values() for run in runs]
        repeats = [
            [*name, heading]
            for *name, heading in REPEATS
            if any(metric_of(run, "test", CURRENT, name) is not None for run in shown)
        ]
        rows = []
        for (backbone, method), runs in found.items():
            deciles = [
                metric_of(run, "test", CURRENT, ("popularity_deciles",)) or [None] * 10
                for run in runs
            ]
            means = [over_seeds(list(shares)).value for shares in zip(*deciles, strict=True)]
            shares = [
                average(runs, name) for name in ("coverage", "gini_index", "cold_share_of_listed")
            ]
            shares += [average(runs, *name) for *name, _ in repeats]
            model = "baseline" if runs[0].is_baseline else backbone
            rows.append([*words(model, method), *shares, *(Cell(m, form=".3f") for m in means)])
        if shown and (results := shown[-1].test):
            targets = results.get("target_popularity_deciles", [None] * 10)
            cells = [Cell(share, form=".3f") for share in targets]
            known = [Cell(results.get("target_repeat_rate"))] * len(repeats)
            rows.insert(0, [*words("", "targets", None, None, None), *known, *cells])

        caption = (
            f"{rows_of(study, dataset, 'test')}. "
            "The first ten items of the lists on test, means over seeds. Coverage: share of the "
            "catalogue that is listed. Gini: 0 if all items are listed equally often. Cold: share "
            "of the listed items that are not a training target. D1 to D10: share of each decile "
            f"of the catalogue by popularity, the most popular first. {AT_ALPHA}"
        )
        if repeats:
            caption += (
                " Seen: share of the items, and of the first places, that the user had met before."
            )
        columns = ["Model", "Method", "Coverage", "Gini", "Cold"]
        columns += [heading for *_, heading in repeats] + [f"D{i + 1}" for i in range(10)]
        title = f"What is recommended: {dataset}"
        tables.append(Table(slug("diversity", dataset), title, caption, columns, rows))
    return tables


def beam_and_exact(study: Study) -> list[Table]:
    """Return beam search next to exact search, where a run was evaluated with both."""
    rows = []
    for dataset in datasets(study):
        for (backbone, method), runs in methods(study, dataset, "exact").items():
            if both := [run for run in runs if has_beam_lists(run)]:
                rows.append(beam_and_exact_row(title_of(dataset, backbone), method, both))
    columns = ["Data", "Method", "α", "Seeds", "Rows", "NDCG@10 beam", "NDCG@10 exact"]
    columns += ["HR@10 beam", "HR@10 exact", "Proven", "Missed of top 1", "Missed of the list"]
    caption = (
        f"{rows_behind(study, rows, 'exact')} "
        "The same test rows, searched in both ways; hits are token match. Proven: share of the "
        "rows whose complete exact list is proven to be the best one. Missed: number of truly best "
        "items that the beam's list lacks, where these items are proven."
    )
    return [Table("beam-exact", "Beam and exact search", caption, columns, rows)]


def calibration(study: Study) -> list[Table]:
    """Return how item probabilities compare with hits, for runs whose scores are probabilities."""
    rows = []
    for dataset in datasets(study):
        for (backbone, method), runs in methods(study, dataset).items():
            found = [metric_of(run, "test", CURRENT, ("calibration",)) for run in runs]
            if not all(found):
                continue
            names = words(title_of(dataset, backbone), method)
            likelihood = [
                over_seeds([run.test.get(key) if run.test else None for run in runs], form)
                for key, form in (("target_nll", ".3f"), ("target_perplexity_per_token", ".3f"))
            ]
            whole = [average(runs, "mean_coverage")]
            whole.append(average(runs, "calibration", "expected_calibration_error"))
            for label, key in (("p", "probability"), ("hits", "hit_rate")):
                tenths = zip(*(one["bins"] for one in found), strict=False)
                cells = [over_seeds([one[key] for one in seeds]).value for seeds in tenths]
                shares = [Cell(cell) for cell in cells]
                rows.append([*names, *likelihood, *whole, *words(label), *shares])
    columns = ["Data", "Method", "NLL per item", "Perplexity per token", "Coverage", "ECE", ""]
    columns += [f"{tenth}/10" for tenth in range(1, CALIBRATION_BINS + 1)]
    caption = (
        f"{rows_behind(study, rows, 'test')} "
        "Runs whose scores are log-probabilities of items, test rows, means over seeds. NLL of the "
        "target in nats. Coverage: probability of a whole list. The listed items are sorted by p "
        "and cut into tenths: the mean p of each, and the share of its items that is the target. "
        "ECE: expected calibration error, the mean distance of the two."
    )
    return [Table("calibration", "Item probabilities", caption, columns, rows)]


def has_beam_lists(run: Run) -> bool:
    """Return whether the run's exact search began with a beam search."""
    return run.exact is not None and any("beam" in one for one in run.exact["alpha"].values())


def beam_and_exact_row(data: str, method: str, runs: Sequence[Run]) -> Row:
    """Return the row of one method of `beam_and_exact`.

    It is at `Run.alpha` or, where the exact search was not run at this α, at the smallest one.
    """
    exact = [run.exact for run in runs if run.exact]
    alphas: list[str] = [
        run.alpha
        if run.alpha and run.alpha in results["alpha"]
        else min(results["alpha"], key=float)
        for run, results in zip(runs, exact, strict=True)
    ]
    entries = [results["alpha"][alpha] for results, alpha in zip(exact, alphas, strict=True)]
    accuracy = [
        over_seeds([entry["token_match"][measure] for entry in searched])
        for measure in (METRIC, "hr@10")
        for searched in ([entry["beam"] for entry in entries], entries)
    ]

    proven = over_seeds([entry["proof_share"] for entry in entries], ".1%")
    by_length = [
        sorted(entry["beam"]["missed_of_true_top"].items(), key=lambda pair: int(pair[0]))
        for entry in entries
    ]
    missed = [over_seeds([pairs[index][1] for pairs in by_length], ".3f") for index in (0, -1)]
    names = words(data, method, as_list(alphas), len(runs), exact[0]["rows"])
    return [*names, *accuracy, proven, *missed]


def examples(study: Study) -> list[Table]:
    """Return MTC Table 7: the lists of several methods for the same row."""
    tables = []
    for e in study.examples:
        length = max(map(len, e["lists"].values()))
        rows = []
        for method, titles in e["lists"].items():
            filled = titles + [""] * (length - len(titles))
            cells = [Cell(title, mark="best" if title == e["target"] else "") for title in filled]
            rows.append([Cell(method), *cells])

        caption = (
            f"Test row {e['row']}, drawn at random among those of the "
            f"{rows_of(study, e['dataset'], 'test')} that the methods rank "
            f"differently. History, oldest first: {'; '.join(e['history'])}. "
            f"Next item: {e['target']} (bold where listed). {AT_ALPHA}"
        )
        columns = ["Method", *(f"Rank {i + 1}" for i in range(length))]
        name = slug("example", e["dataset"], e["backbone"], str(e["row"]))
        title = f"Example (MTC Table 7): {title_of(e['dataset'], e['backbone'])}"
        tables.append(Table(name, title, caption, columns, rows))
    return tables


def all_runs(study: Study) -> list[Table]:
    """Return every run, complete or not, with its cost."""
    rows = []
    for run in study.runs:
        is_reported = run.is_complete and not run.is_baseline and run.alpha is not None
        alpha = f"{float(run.alpha or 0):g}" if is_reported else ""
        named = words(run.name, run.dataset, run.backbone, run.method, run.seed, run.state)
        seconds = [Cell(seconds, form=",.0f") for seconds in (run.seconds, run.eval_seconds)]
        rows.append([*named, *words(run.note, alpha, run.world_size), *seconds])
    columns = ["Run", "Dataset", "Model", "Method", "Seed", "State", "Note", "α", "Ranks"]
    columns += ["Training (s)", "Evaluation (s)"]

    states = {
        state: sum(run.state == state for run in study.runs)
        for state in dict.fromkeys(run.state for run in study.runs)
    }
    notes = [
        f"Total cost: {cost(study.runs)}.",
        f"Runs: {', '.join(f'{count} {state}' for state, count in states.items())}.",
    ]
    caption = "All runs and their cost."
    if study.budget:
        caption = f"Budget: {study.budget}"
    return [Table("runs", "Runs and cost", caption, columns, rows, notes)]


def cost(runs: Sequence[Run]) -> str:
    """Return how long the runs took, as text.

    Unfinished runs count as far as their time is known. The time over all ranks is added where the
    number of ranks is known.
    """
    training = sum(run.seconds or 0 for run in runs)
    searching = sum(run.eval_seconds or 0 for run in runs)
    text = (
        f"{hours(training + searching)} of wall time "
        f"({hours(training)} training, {hours(searching)} evaluation)"
    )

    of_ranks = [run.rank_seconds for run in runs if run.seconds or run.eval_seconds]
    known = [seconds for seconds in of_ranks if seconds is not None]
    if known and len(known) == len(of_ranks):
        text += f", {hours(sum(known))} over all ranks"

    missing = sum(run.seconds is None for run in runs if run.state not in NOT_BEGUN)
    if missing:
        text += f"; training time is missing for {missing} run{'s' if missing > 1 else ''}"
    return text


def hours(seconds: float) -> str:
    """Return a time in hours, or in minutes where it is less than one hour."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
