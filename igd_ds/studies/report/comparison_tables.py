"""The tables that compare methods with each other and with the study's reference.

Main results and significance tests of each dataset, and the gains over backbones and quantizers.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from igd_ds.evaluation.metrics import HEADLINE
from igd_ds.studies import significance
from igd_ds.studies.report.cells import (
    CURRENT,
    Accept,
    Methods,
    backbones_of,
    best_on_valid,
    chosen_alphas,
    datasets,
    headings,
    marked,
    measured,
    measures_of,
    methods,
    metric_of,
    rows_behind,
    rows_of,
    searches_of,
    slug,
    title_of,
    words,
)
from igd_ds.studies.report.layout import Cell, Row, Table, formatted
from igd_ds.studies.report.study import AT_ALPHA, MATCHES, METRIC, NOT_BEGUN, Run, Study
from igd_ds.studies.rounding import mean_sd, significant
from igd_ds.studies.significance import relative

BESIDE = (METRIC, "hr@10")
"""The measures that the main results also give as token match."""
INTERVAL = (
    "95 % interval: ± 1.96 standard errors over users, whose rows are not independent; it "
    "generalises to other users, not to other trainings."
)
"""What the intervals of the main results are."""

Cases = dict[tuple[str, str], list[str]]
"""(dataset, backbone) → the first two cells of its rows."""


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
    notes = searches_of(study, dataset) + gaps(study, dataset, found)
    return Table(slug("main", dataset), title, caption, columns, rows, notes)


def expected_popularity(run: Run, measures: Sequence[str]) -> Row:
    """Return the row of a ranking by popularity, which every evaluation computes.

    It ranks items, not token paths, so that it has no token match, and it keeps seen items.
    """
    test = run.test or {}
    expected = test.get("popularity_baseline") or {}
    kept = ", seen items kept" if test.get("exclude_seen") == "yes" else ""
    cells = [Cell(expected.get(measure)) for measure in measures]
    cells += [*(Cell(None) for _ in BESIDE), Cell("")]
    return [*words("baseline", f"popularity (expected{kept})", "", None), *cells]


def ranked_items(study: Study, dataset: str) -> str:
    """Return which items were ranked for the test rows of a dataset, as text."""
    tests = [run.test for run in study.runs if run.dataset == dataset and run.test]
    if any(results.get("exclude_seen") == "yes" for results in tests):
        return "the whole catalogue but the items that the user had met before is ranked"
    return "the whole catalogue is ranked"


def interval_over_users(study: Study, runs: Sequence[Run]) -> Cell:
    """Return the 95 % interval over users of a method's NDCG@10 on test; "" where it is unknown.

    The method's figure is the mean over its runs, so one seed has an interval too.
    """
    users = study.rows.get(runs[0].dataset, {}).get("test", {}).get("user")
    if users is None or not all("test" in run.ranks for run in runs):
        return Cell("")
    gained = significance.mean_by_row(runs, "test")
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
    """Return tables of both significance tests: of the lists of each dataset, and of exact ones."""
    return [
        significance_table(study, dataset, lists)
        for dataset in datasets(study)
        for lists in ("test", "exact")
    ]


def significance_table(study: Study, dataset: str, lists: str) -> Table:
    """Return the comparisons of a dataset's methods with the reference, with both tests.

    Args:
        study: the runs.
        dataset: its name.
        lists: "test", or "exact" for the exact lists of test.
    """
    compared, rows = significance.compare(study, dataset, lists), []
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
        f"{rows_of(study, dataset, lists)}. "
        f"Test NDCG@10 of each method compared with {study.reference} on the same rows and seeds. "
        "Users: paired bootstrap of the difference of the means over seeds, with "
        f"{significance.RESAMPLES} resamples of the users; it generalises to other users, not to "
        "other trainings. Seeds: two-sided Mann–Whitney U test; it generalises to other trainings. "
        f"Holm: corrected over the methods of the dataset. {AT_ALPHA}"
    )
    if lists == "exact":
        caption += (
            f" Lists are those of the exact search {softmax_of_exact(study, dataset)} "
            "(eval/test-exact). Where a run has none at its α, they are those of the smallest α "
            "that it has them at."
        )

    smallest = {
        (len(c.seeds), round(c.seeds_smallest_p, 4))
        for c in compared
        if c.seeds_smallest_p is not None
    }
    notes = searches_of(study, dataset) if lists == "test" else []
    notes += [
        f"With {n} seeds per method, the p of the Mann–Whitney U test is at least {p:g} before "
        "correction."
        for n, p in sorted(smallest)
    ]
    if any(c.users_p is None for c in compared):
        notes.append(
            "Where there is no test over users, the ranks of single rows are not known, or all "
            "rows belong to one user."
        )
    tested = {(c.backbone, c.method) for c in compared}
    untested = [
        method
        for backbone, method in methods(study, dataset, lists)
        if (backbone, method) not in tested and method != study.reference
    ]
    if untested:
        notes.append(
            f"Not tested, because no seed is shared with {study.reference}: {', '.join(untested)}."
        )
    names = {
        "test": (slug("significance", dataset), f"Tests: {dataset}"),
        "exact": (slug("significance-exact", dataset), f"Tests of exact lists: {dataset}"),
    }
    return Table(*names[lists], caption, columns, rows, notes)


def softmax_of_exact(study: Study, dataset: str) -> str:
    """Return the softmax that the exact lists of a dataset were ranked under, as text."""
    used = {
        run.exact.get("softmax", "full")
        for runs in methods(study, dataset, "exact").values()
        for run in runs
        if run.exact
    }
    return f"under the {' or the '.join(sorted(used))} softmax"


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
    notes: dict[str, None] = {}
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
            notes |= dict.fromkeys(f"{dataset}: {note}" for note in searches_of(study, dataset))
    caption = f"{rows_behind(study, rows, 'test')} {caption}"
    columns = [*columns, "Method", *headings(measures)]
    return Table(name, title, caption, columns, rows, list(notes))


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


def other_than(method: str) -> Accept:
    """Return a test of whether a run is of another method."""
    return lambda run: run.method != method
