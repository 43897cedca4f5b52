"""The tables of both papers, and what a reader needs beside them, from a `Study`.

Figures are means over the seeds' runs, each at its `Run.alpha`, unless a caption says otherwise. Only whole runs count. A table's
blocks are datasets and backbones; best (bold) and second (underlined) are of a block.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from igd_ds.studies import significance
from igd_ds.studies.report.layout import Cell, Table
from igd_ds.studies.report.study import (
    AT_ALPHA,
    BASELINE,
    METRIC,
    NOT_BEGUN,
    Run,
    Study,
    has_curriculum,
    lines_by,
)
from igd_ds.studies.significance import mean_sd, ndcg, relative

MEASURES = ("ndcg@5", "ndcg@10", "ndcg@20", "hr@5", "hr@10", "hr@20")
SCHEDULED = {
    "fg-ce": "front-greater → CE",
    "fg-ce-fr": "front-greater → CE → frequency",
}  # by `mixing`
ABLATION = (  # MTC Table 4 in its order, then what stands beside it
    BASELINE, *SCHEDULED.values(), "multi-target", "multi-target + curriculum", "front-greater", "frequency",
    "multi-target on logits", "multi-target + curriculum on logits",
)  # fmt: skip
HISTORY = ((1, 5), (6, 10), (11, None))  # lengths that are reported apart
# Stand for the α that a run is reported at, for the one that was best on its validation, and for one that nobody measured.
CURRENT, BEST, UNMEASURED = None, "best", "unmeasured"
Methods = dict[tuple[str, str], list[Run]]  # (backbone, method) → the runs of its seeds


def all_tables(study: Study) -> list[Table]:
    """Return every table that the study has something for."""
    made = []
    for make in (
        dataset_statistics, filtering_ratio, main_results, significance_of, selection, beta_sensitivity, igd_ablation,
        linear_and_binary, alpha_grid, mtc_ablation, backbones, quantizers, relaxed_match, row_groups, diversity, beam_and_exact,
        examples, all_runs,
    ):  # fmt: skip
        made += make(study)
    return [table for table in made if table.rows]


def datasets(study: Study) -> list[str]:
    """Return the datasets that have a whole run, in order."""
    return list(dict.fromkeys(run.dataset for run in study.runs if run.whole))


def methods(study: Study, dataset: str, split: str = "test", baselines: bool = False) -> Methods:
    """Return the methods of a dataset with whole runs evaluated on `split`; the baselines, where wanted, come first."""
    found = {}
    for is_baseline in (True, False) if baselines else (False,):
        for backbone in dict.fromkeys(run.backbone for run in study.runs):
            for run in study.runs:
                if (run.dataset, run.backbone, run.is_baseline, run.whole) == (
                    dataset,
                    backbone,
                    is_baseline,
                    True,
                ) and getattr(run, split):
                    found.setdefault((backbone, run.method), []).append(run)
    return found


def figure(run: Run, split: str, alpha: str | None, path: tuple[str, ...]):
    """Return a figure of a run's metrics.json at an α, CURRENT, BEST or UNMEASURED, None where it is not there."""
    results = getattr(run, split)
    alpha = {CURRENT: run.alpha, BEST: run.best_alpha}.get(alpha, alpha)
    value = results["alpha"].get(alpha) if results else None
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def average(
    runs: list[Run], *path: str, split: str = "test", alpha: str | None = CURRENT, form: str = ".4f"
) -> Cell:
    """Return mean ± sd of a figure over seeds; nothing where a run lacks it."""
    return over_seeds([figure(run, split, alpha, path) for run in runs], form)


def over_seeds(values: list, form: str = ".4f") -> Cell:
    """Return mean ± sd of some values; nothing where one is missing."""
    if not values or None in values:
        return Cell(None)
    mean, sd = mean_sd(values)
    return Cell(mean, sd, form)


def measured(runs: list[Run], columns: list[str], alpha: str | None = CURRENT) -> list[Cell]:
    """Return the accuracy on test of a method, a cell per measure of `columns`."""
    return [average(runs, "token_match", measure, alpha=alpha) for measure in columns]


def measures_of(runs: list[Run]) -> list[str]:
    """Return those of MEASURES that the lists on test of any whole run were long enough for."""
    tested = [
        next(iter(run.test["alpha"].values()))["token_match"]
        for run in runs
        if run.whole and run.test
    ]
    return [measure for measure in MEASURES if any(measure in values for values in tested)]


def headings(measures: list[str]) -> list[str]:
    """Return measures as columns are headed: ndcg@10 → NDCG@10."""
    return [measure.upper() for measure in measures]


def words(*values) -> list[Cell]:
    """Return cells of text, and of whole numbers."""
    return [Cell(value, form="d" if isinstance(value, int) else ".4f") for value in values]


def marked(rows: list[list[Cell]], first: int, smallest: tuple[int, ...] = ()) -> list[list[Cell]]:
    """Return a block's rows with best and second best marked in each column from `first` on; `smallest` is best in some."""
    rows = [list(row) for row in rows]
    for column in range(first, len(rows[0]) if rows else 0):
        values = sorted(
            {row[column].value for row in rows if isinstance(row[column].value, float)},
            reverse=column not in smallest,
        )
        for row in rows if len(values) > 1 else ():
            if row[column].value in values[:2]:
                row[column] = replace(
                    row[column], mark="best" if row[column].value == values[0] else "second"
                )
    return rows


def improvement(runs: list[Run], baseline: list[Run], columns: list[str]) -> list[Cell]:
    """Return by how much the mean of each measure exceeds the baseline's, in percent of it; nothing without a baseline."""
    pairs = zip(measured(runs, columns), measured(baseline, columns), strict=True)
    return [
        Cell(None if None in (a.value, b.value) else relative(a.value, b.value), form="+.2%")
        for a, b in pairs
    ]


def held_against(study: Study, found: Methods, backbone: str) -> list[Run]:
    """Return the runs of the study's baseline that a backbone's methods are held against; none where there are none."""
    return found.get((backbone, study.baseline)) or found.get(("", study.baseline), [])


def chosen_alphas(runs: list[Run]) -> str:
    """Return the α that the seeds' runs are reported at, each value once."""
    return ", ".join(sorted({f"{float(run.alpha):g}" for run in runs}, key=float))


def best_on_valid(found: Methods, backbone: str, accept: Callable[[Run], bool]) -> str | None:
    """Return the tested method of a backbone with the best NDCG@10 on validation among those whose runs `accept` takes."""
    means = {
        method: average(runs, "token_match", METRIC, split="valid").value
        for (its, method), runs in found.items()
        if its == backbone and accept(runs[0])
    }
    return max(means, key=means.get) if means else None


def component(run: Run) -> str:
    """Return which line of MTC Table 4 (ABLATION) a run belongs to; of another method its weighting."""
    settings = run.settings
    if settings["weighting"] != "multi-target":
        return settings["weighting"]
    if settings.get("mixing") in SCHEDULED:
        return SCHEDULED[settings["mixing"]]
    curriculum = " + curriculum" if has_curriculum(settings) else ""
    return (
        f"multi-target{curriculum}{' on logits' if settings.get('mixing_form') == 'logits' else ''}"
    )


def slug(*names: str) -> str:
    """Return names as a file is called."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(filter(None, names)).lower()).strip("-")


def title_of(*names: str) -> str:
    """Return the names that there are, separated by commas."""
    return ", ".join(filter(None, names))


def dataset_statistics(study: Study) -> list[Table]:
    """IGD Table 1, and MTC Table 2 as far as the datasets know the interactions that their rows were made of."""
    keys = ("items", "train_rows", "valid_rows", "test_rows", "target_tokens", "zero_ig_tokens")
    columns = [
        "Dataset",
        "Items are",
        "Items",
        "Train",
        "Valid",
        "Test",
        "Target tokens",
        "Zero-IG tokens",
        "Share",
    ]
    caption = "Rows of each split, tokens of all training targets, and how many of them have no information gain (IGD Table 1)."
    rows = [
        [
            *words(dataset, found["kind"]),
            *(Cell(found[key], form=",d") for key in keys),
            Cell(found["zero_ig_share"], form=".2%"),
        ]
        for dataset, found in study.catalogues.items()
    ]
    if any("users" in found for found in study.catalogues.values()):
        columns += ["Users", "Interactions", "Per user"]
        caption += " Users, their interactions and how many a user has on average (MTC Table 2), before rows are made of them."
        for row, found in zip(rows, study.catalogues.values(), strict=True):
            users, interactions = found.get("users"), found.get("interactions")
            row += [Cell(number, form=",d") for number in (users, interactions)]
            row.append(Cell(interactions / users if users else None, form=".2f"))
    return [Table("statistics", "Datasets", caption, columns, rows)]


def filtering_ratio(study: Study) -> list[Table]:
    """MTC Table 1: of the datasets whose items are semantic IDs."""
    found = {
        name: c["filtering_ratio"]
        for name, c in study.catalogues.items()
        if c["kind"] == "semantic-id"
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
    caption = "Mean share of the items left that each further token rules out (MTC Table 1)."
    return [
        Table(
            "filtering-ratio",
            "Filtering by level",
            caption,
            ["Dataset", *(f"Layer {i + 1}" for i in range(levels))],
            rows,
        )
    ]


def main_results(study: Study) -> list[Table]:
    """IGD Table 2, MTC Table 3: a table per dataset, baselines on top."""
    tables = []
    for dataset in datasets(study):
        found = methods(study, dataset, baselines=True)
        measures = measures_of([run for run in study.runs if run.dataset == dataset])
        stars = {
            (c.backbone, c.method) for c in significance.compare(study, dataset) if c.significant
        }
        rows, against = [], []
        if found and not any(method == "popularity" for _, method in found):
            expected = next(iter(found.values()))[0].test["popularity_baseline"]
            rows.append(
                [
                    *words("baseline", "popularity (expected)", "", None),
                    *(Cell(expected.get(m)) for m in measures),
                ]
            )
            against.append(Cell(None))
        for (backbone, method), runs in found.items():
            cells, is_baseline = measured(runs, measures), runs[0].is_baseline
            cells[measures.index(METRIC)] = replace(
                cells[measures.index(METRIC)], star=(backbone, method) in stars
            )
            kind, alphas = ("baseline", "") if is_baseline else (backbone, chosen_alphas(runs))
            rows.append([*words(kind, method, alphas, len(runs)), *cells])
            others = (
                []
                if is_baseline or method == study.baseline
                else held_against(study, found, backbone)
            )
            against += improvement(runs, others, [METRIC])
        rows = [[*row, cell] for row, cell in zip(marked(rows, 4), against, strict=True)]
        for backbone in dict.fromkeys(
            backbone for (backbone, _), runs in found.items() if not runs[0].is_baseline
        ):
            best = best_on_valid(found, backbone, lambda run: run.method != study.baseline)
            if best and (others := held_against(study, found, backbone)):
                cells = improvement(found[backbone, best], others, measures)
                rows.append(
                    [*words(backbone, f"improvement of {best}", "", None), *cells, Cell(None)]
                )
        caption = (
            f"Test rows of {dataset}, all items ranked, mean ± sd over seeds. Bold: best; underlined: second. * differs from "
            f"{study.baseline} in NDCG@10 (paired bootstrap over users, Holm, p < {significance.LEVEL}). Last column: its "
            f"improvement over {study.baseline}; last row: of every measure, for the method with the best validation NDCG@10. "
            f"{AT_ALPHA}"
        )
        columns = ["Model", "Method", "α", "Seeds", *headings(measures), f"vs {study.baseline}"]
        tables.append(
            Table(
                slug("main", dataset),
                f"Main results: {dataset}",
                caption,
                columns,
                rows,
                gaps(study, dataset, found),
            )
        )
    return tables


def gaps(study: Study, dataset: str, found: Methods) -> list[str]:
    """Return notes on what the means of a dataset lack: seeds without a whole test, and methods with a single one."""
    notes = []
    for (backbone, method), runs in found.items():
        lost = [
            r
            for r in study.runs
            if (r.dataset, r.backbone, r.method) == (dataset, backbone, method)
        ]
        lost = [run for run in lost if not (run.whole and run.test) and run.state not in NOT_BEGUN]
        if lost:
            states = ", ".join(f"seed {run.seed} {run.state}" for run in lost)
            notes.append(
                f"{title_of(backbone, method)}: mean of {len(runs)} of {len(runs) + len(lost)} runs ({states})."
            )
    single = [
        method for (_, method), runs in found.items() if len(runs) == 1 and not runs[0].is_baseline
    ]
    if single:
        notes.append(f"One seed: no deviation and no test for {', '.join(single)}.")
    return notes


def significance_of(study: Study) -> list[Table]:
    """Each method against the baseline, with both tests: a table per dataset."""
    tables = []
    for dataset in datasets(study):
        compared, rows = significance.compare(study, dataset), []
        for c in compared:
            interval = "" if c.low is None else f"[{c.low:+.4f}, {c.high:+.4f}]"
            p = (c.users_p, c.users_holm, c.seeds_p, c.seeds_holm)
            rows.append([
                *words(c.backbone, c.method, len(c.seeds)), Cell(c.baseline_mean, c.baseline_sd), Cell(c.mean, c.sd),
                Cell(c.relative, form="+.2%"), Cell(interval), *map(Cell, p),
            ])  # fmt: skip
        columns = [
            "Model",
            "Method",
            "Seeds",
            study.baseline,
            "NDCG@10",
            "Improvement",
            "95 % interval",
        ]
        columns += ["p users", "p users, Holm", "p seeds", "p seeds, Holm"]
        caption = (
            f"Test NDCG@10 of each method against {study.baseline} on the same rows and seeds. Users: paired bootstrap of the "
            f"difference of means over seeds, {significance.RESAMPLES} resamples of users; it speaks of other users and these "
            "trainings. Seeds: Mann–Whitney U, two-sided; it speaks of other trainings. Holm: corrected over its methods. "
            f"{AT_ALPHA}"
        )
        smallest = {(len(c.seeds), round(c.seeds_smallest_p, 4)) for c in compared}
        notes = [
            f"With {n} seeds per method Mann–Whitney's p is at least {p:g} before correction."
            for n, p in sorted(smallest)
        ]
        tested = {(c.backbone, c.method) for c in compared}
        untested = [
            m for b, m in methods(study, dataset) if (b, m) not in tested and m != study.baseline
        ]
        if untested:
            notes.append(
                f"No test, for want of two seeds in common with {study.baseline}: {', '.join(untested)}."
            )
        tables.append(
            Table(slug("significance", dataset), f"Tests: {dataset}", caption, columns, rows, notes)
        )
    return tables


def selection(study: Study) -> list[Table]:
    """What validation chose among: the families with several candidates."""
    rows, notes = [], []
    for dataset in datasets(study):
        families = {}
        for (backbone, method), runs in methods(study, dataset, "valid", baselines=True).items():
            families.setdefault((backbone, runs[0].family), {})[method] = runs
        for (backbone, _), candidates in families.items():
            if len(candidates) < 2:
                continue
            block, data = [], title_of(dataset, backbone)
            for method, runs in candidates.items():
                tested = "yes" if any(run.test for run in runs) else ""
                value = average(runs, "token_match", METRIC, split="valid", alpha="0.0")
                block.append([*words(data, method, len(runs), tested), value])
            rows += marked(block, 4)
            ordered = sorted(
                (line for line in block if line[4].value is not None),
                key=lambda line: -line[4].value,
            )
            if wrong := [line[1].value for line in ordered[1:] if line[3].value]:
                notes.append(
                    f"{data}: tested {', '.join(wrong)}, validation prefers {ordered[0][1].value}."
                )
    columns = ["Data", "Candidate", "Seeds", "Tested", "NDCG@10"]
    caption = (
        "Validation NDCG@10 at α = 0. Candidates of a family differ in what validation chooses alone; the best one is to be "
        "tested. For IGD α is chosen after it."
    )
    return [Table("selection", "Selection on validation", caption, columns, rows, notes)]


def beta_sensitivity(study: Study) -> list[Table]:
    """IGD Appendix H: β on validation at α = 0, and the β that are better than no weighting."""
    rows, notes = [], []
    for dataset in datasets(study):
        found = methods(study, dataset, "valid")
        for backbone in dict.fromkeys(backbone for backbone, _ in found):
            baseline = found.get((backbone, BASELINE))
            lines = lines_by(
                [run for (b, _), runs in found.items() if b == backbone for run in runs], "igd_beta"
            )
            for name, by_beta in lines.items() if baseline else ():
                block, effective = [], []
                for beta, runs in [(None, baseline), *by_beta.items()]:
                    cells = [
                        average(runs, "token_match", m, split="valid", alpha="0.0")
                        for m in (METRIC, "hr@10")
                    ]
                    beaten = beta is not None and all(
                        c.value > b.value for c, b in zip(cells, block[0][4:], strict=True)
                    )
                    effective += [f"{beta:g}"] if beaten else []
                    weighting = BASELINE if beta is None else name
                    block.append(
                        [
                            *words(title_of(dataset, backbone), weighting),
                            Cell(beta, form="g"),
                            *words(len(runs)),
                            *cells,
                        ]
                    )
                rows += marked(block, 4)
                notes.append(
                    f"{title_of(dataset, backbone)}, {name}: effective β: {', '.join(effective) or 'none'}."
                )
    caption = f"Validation at α = 0. Effective are the β whose means of NDCG@10 and HR@10 both exceed those of {BASELINE}."
    columns = ["Data", "Weighting", "β", "Seeds", "NDCG@10", "HR@10"]
    return [Table("beta", "β sensitivity (IGD Appendix H)", caption, columns, rows, notes)]


def igd_ablation(study: Study) -> list[Table]:
    """IGD Table 3."""
    rows, measures = [], measures_of(study.runs)
    for dataset in datasets(study):
        found = methods(study, dataset)
        for backbone in dict.fromkeys(backbone for backbone, _ in found):
            best = best_on_valid(found, backbone, lambda run: run.settings["weighting"] == "igd")
            if not best or (backbone, BASELINE) not in found:
                continue
            with_weights, without = found[backbone, best], found[backbone, BASELINE]
            calibrated = BEST if all(len(run.valid["alpha"]) > 1 for run in without) else UNMEASURED
            parts = ((best, with_weights, CURRENT), ("w/o w_d (α = 0)", with_weights, "0.0"))
            parts += ((f"w/o w_t ({BASELINE})", without, calibrated), ("w/o both", without, "0.0"))
            block = [
                [*words(title_of(dataset, backbone), name), *measured(runs, measures, alpha)]
                for name, runs, alpha in parts
            ]
            rows += marked(block, 2)
    caption = (
        "Test. w_d: the calibration of decoding by α, with and without w_t at the α that was best on each run's validation; w_t: "
        "the weights of training."
    )
    return [
        Table(
            "ablation-igd",
            "Ablation of IGD (IGD Table 3)",
            caption,
            ["Data", "Method", *headings(measures)],
            rows,
        )
    ]


def linear_and_binary(study: Study) -> list[Table]:
    """IGD Table 8: of the datasets where both forms were tested."""
    rows = []
    for dataset in datasets(study):
        found = methods(study, dataset)
        for backbone in dict.fromkeys(backbone for backbone, _ in found):
            forms = [
                best_on_valid(
                    found, backbone, lambda run, name=name: run.settings["weighting"] == name
                )
                for name in (BASELINE, "igd-linear", "igd")
            ]
            if None in forms:
                continue
            for measure in ("hr@10", METRIC):
                cells = [
                    average(found[backbone, form], "token_match", measure, alpha="0.0")
                    for form in forms
                ]
                names = words(
                    title_of(dataset, backbone),
                    measure.upper(),
                    *(form.split("=")[1] for form in forms[1:]),
                )
                values = sorted((c.value for c in cells if c.value is not None), reverse=True)
                cells = [
                    replace(c, mark="best") if values and c.value == values[0] else c for c in cells
                ]
                rows.append([*names, *cells])
    columns = ["Data", "Measure", "β linear", "β binary", BASELINE, "IGD-T linear", "IGD-T binary"]
    caption = "Test at α = 0, each form with the β that validation chose."
    return [
        Table("linear-binary", "Linear and binary weights (IGD Table 8)", caption, columns, rows)
    ]


def alpha_grid(study: Study) -> list[Table]:
    """IGD Table 7: of the tested methods with more than one α on validation."""
    rows = []
    for dataset in datasets(study):
        for (backbone, method), runs in methods(study, dataset).items():
            grid = sorted(set.intersection(*(set(run.valid["alpha"]) for run in runs)), key=float)
            block = []
            for alpha in grid if len(grid) > 1 else ():
                paths = (
                    ("first_token_repetition",),
                    ("score_entropy_bits",),
                    ("token_match", METRIC),
                    ("token_match", "hr@10"),
                )
                forms = (".3f", ".2f", ".4f", ".4f")
                cells = [
                    average(runs, *path, split="valid", alpha=alpha, form=form)
                    for path, form in zip(paths, forms, strict=True)
                ]
                block.append(
                    [
                        *words(title_of(dataset, backbone), method),
                        Cell(float(alpha), form="g"),
                        *cells,
                    ]
                )
            rows += marked(block, 3, smallest=(3,))
    columns = ["Data", "Method", "α", "FWR ↓", "ISE ↑ (bits)", "NDCG@10", "HR@10"]
    caption = (
        "Validation; α > 0 is IGD's decoding, whatever the training. FWR: share of the commonest first token among a list's ten "
        "items; ISE: entropy of the list's scores."
    )
    return [Table("alpha", "Diversity and accuracy along α (IGD Table 7)", caption, columns, rows)]


def mtc_ablation(study: Study) -> list[Table]:
    """MTC Table 4: where at least two of its components were tested."""
    rows, measures = [], measures_of(study.runs)
    for dataset in datasets(study):
        found = methods(study, dataset)
        for backbone in dict.fromkeys(backbone for backbone, _ in found):
            parts = {
                name: best_on_valid(found, backbone, lambda run, name=name: component(run) == name)
                for name in ABLATION
            }
            parts = {name: method for name, method in parts.items() if method}
            if len(parts) > 2:
                data = title_of(dataset, backbone)
                block = [
                    [*words(data, *part), *measured(found[backbone, part[1]], measures)]
                    for part in parts.items()
                ]
                rows += marked(block, 3)
    caption = (
        "Test at α = 0. Cumulative as in the paper: front-greater on a schedule to cross-entropy, then on to frequency, learned "
        "weights, the curriculum. Beside them front-greater and frequency alone, without schedule, and the form that scales the "
        "logits. Each line is a training of its own; of several settings the one with the best validation NDCG@10."
    )
    columns = ["Data", "Components", "Method", *headings(measures)]
    return [
        Table("ablation-mtc", "Components of multi-target (MTC Table 4)", caption, columns, rows)
    ]


def backbones(study: Study) -> list[Table]:
    """IGD Tables 4 and 5: of the datasets that were tried with several backbones."""
    cases = [
        (d, b) for d in datasets(study) for b in dict.fromkeys(b for b, _ in methods(study, d))
    ]
    cases = {
        (dataset, b): [dataset, b]
        for dataset, b in cases
        if sum(other == dataset for other, _ in cases) > 1
    }
    caption = f"Test. The method with the best validation NDCG@10 against {study.baseline}, by backbone. {AT_ALPHA}"
    return [
        gains(
            study,
            "backbones",
            "Backbones (IGD Tables 4, 5)",
            caption,
            ["Dataset", "Backbone"],
            cases,
        )
    ]


def quantizers(study: Study) -> list[Table]:
    """MTC Table 5: where datasets differ in how their semantic IDs were made."""
    made_by = {
        dataset: study.catalogues.get(dataset, {}).get("quantizer") for dataset in datasets(study)
    }
    cases = {}
    for dataset, quantizer in made_by.items() if len(set(made_by.values()) - {None}) > 1 else ():
        for backbone in dict.fromkeys(b for b, _ in methods(study, dataset)) if quantizer else ():
            cases[dataset, backbone] = [dataset, quantizer]
    caption = (
        f"Test. The method with the best validation NDCG@10 against {study.baseline}, by quantizer of the semantic IDs. "
        f"{AT_ALPHA}"
    )
    return [
        gains(
            study,
            "quantizers",
            "Semantic IDs (MTC Table 5)",
            caption,
            ["Dataset", "Quantizer"],
            cases,
        )
    ]


def gains(
    study: Study, name: str, title: str, caption: str, columns: list[str], cases: dict
) -> Table:
    """Return baseline, best method and improvement for each (dataset, backbone) of `cases`, labelled by its value."""
    rows, measures = [], measures_of(study.runs)
    for (dataset, backbone), label in cases.items():
        found = methods(study, dataset, baselines=True)
        best = best_on_valid(found, backbone, lambda run: run.method != study.baseline)
        if best and (others := held_against(study, found, backbone)):
            pair = {study.baseline: others, best: found[backbone, best]}
            rows += marked(
                [
                    [*words(*label, method), *measured(runs, measures)]
                    for method, runs in pair.items()
                ],
                3,
            )
            rows.append(
                [
                    *words(*label, "improvement"),
                    *improvement(found[backbone, best], others, measures),
                ]
            )
    return Table(name, title, caption, [*columns, "Method", *headings(measures)], rows)


def relaxed_match(study: Study) -> list[Table]:
    """MTC Table 6: a table per dataset with semantic IDs."""
    tables = []
    for dataset in datasets(study):
        found = methods(study, dataset)
        levels = sorted(
            {
                k
                for runs in found.values()
                for r in runs
                for k in figure(r, "test", CURRENT, ("relaxed_match",)) or ()
            },
            key=int,
        )
        rows = []
        for (backbone, method), runs in found.items() if levels else ():
            cells = [average(runs, "relaxed_match", level, "ndcg@5") for level in levels]
            rows.append([*words(backbone, method), *cells, average(runs, "token_match", "ndcg@5")])
        columns = ["Model", "Method", *(f"top-{level}" for level in levels), "whole ID"]
        caption = f"Test NDCG@5 on {dataset} when the first k codes of an item are enough for a hit. {AT_ALPHA}"
        tables.append(
            Table(
                slug("relaxed", dataset),
                f"Relaxed match (MTC Table 6): {dataset}",
                caption,
                columns,
                marked(rows, 2),
            )
        )
    return tables


def row_groups(study: Study) -> list[Table]:
    """Accuracy by head and tail, warm and cold targets, and history length: a table per dataset."""
    tables = []
    for dataset in datasets(study):
        groups = groups_of(study.rows.get(dataset, {}).get("test", {}))
        rows = [
            [
                *words("", "rows"),
                *(Cell(float(weight.sum()), form=",.0f") for weight in groups.values()),
            ]
        ]
        values = []
        for (backbone, method), runs in methods(study, dataset, baselines=True).items():
            if groups and all("test" in run.ranks for run in runs):
                gained = [ndcg(run.ranks["test"][1]) for run in runs]
                cells = [
                    over_seeds([float(gain @ weight / weight.sum()) for gain in gained])
                    for weight in groups.values()
                ]
                values.append(
                    [*words("baseline" if runs[0].is_baseline else backbone, method), *cells]
                )
        caption = (
            "Test NDCG@10 by group of rows. Head and tail: the target is in the more or less frequent half of the items of test "
            f"(MTC Figure 3); warm and cold: the target was a training target or not; history: its length in items. {AT_ALPHA}"
        )
        columns, rows = ["Model", "Method", *groups], rows + marked(values, 2) if values else []
        tables.append(
            Table(slug("groups", dataset), f"Groups of rows: {dataset}", caption, columns, rows)
        )
    return tables


def groups_of(known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return by name the weight of each row (R,) in a group, 0 to 1; groups without rows are left out."""
    if not known:
        return {}
    head, cold, history = known["head"], known["cold"].astype(float), known["history"]
    groups = {"head": head, "tail": 1 - head, "warm": 1 - cold, "cold": cold}
    for low, high in HISTORY:
        inside = (history >= low) & (history <= (high or history.max()))
        groups[f"history {low}–{high}" if high else f"history {low}+"] = inside.astype(float)
    return {name: weight for name, weight in groups.items() if weight.sum()}


def diversity(study: Study) -> list[Table]:
    """Coverage, Gini index and popularity deciles of the lists (MTC Figure 2): a table per dataset."""
    tables = []
    for dataset in datasets(study):
        rows = []
        for (backbone, method), runs in methods(study, dataset, baselines=True).items():
            deciles = [
                figure(run, "test", CURRENT, ("popularity_deciles",)) or [None] * 10 for run in runs
            ]
            deciles = [over_seeds(list(shares)).value for shares in zip(*deciles, strict=True)]
            shares = [
                average(runs, name) for name in ("coverage", "gini_index", "cold_share_of_listed")
            ]
            kind = "baseline" if runs[0].is_baseline else backbone
            rows.append(
                [*words(kind, method), *shares, *(Cell(share, form=".3f") for share in deciles)]
            )
        if rows:
            targets = runs[0].test.get("target_popularity_deciles", [None] * 10)
            rows.insert(
                0,
                [
                    *words("", "targets", None, None, None),
                    *(Cell(share, form=".3f") for share in targets),
                ],
            )
        caption = (
            "First ten places of the lists, test, means over seeds. Coverage: share of the catalogue that is listed. Gini: 0 "
            "if all items are equally often. Cold: share of listed items that are no training target. D1 to D10: shares of the "
            f"catalogue's popularity deciles, the most popular first. {AT_ALPHA}"
        )
        columns = ["Model", "Method", "Coverage", "Gini", "Cold", *(f"D{i + 1}" for i in range(10))]
        tables.append(
            Table(
                slug("diversity", dataset),
                f"What is recommended: {dataset}",
                caption,
                columns,
                rows,
            )
        )
    return tables


def beam_and_exact(study: Study) -> list[Table]:
    """Beam search beside the exact search, where a run was evaluated with both: at `Run.alpha`, or the smallest α there is."""
    rows = []
    for dataset in datasets(study):
        for (backbone, method), runs in methods(study, dataset, "exact").items():
            alphas = [
                run.alpha if run.alpha in run.exact["alpha"] else min(run.exact["alpha"], key=float)
                for run in runs
            ]
            entries = [run.exact["alpha"][alpha] for run, alpha in zip(runs, alphas, strict=True)]
            accuracy = [
                over_seeds(
                    [
                        (entry["beam"] if by_beam else entry)["token_match"][measure]
                        for entry in entries
                    ]
                )
                for measure in (METRIC, "hr@10")
                for by_beam in (True, False)
            ]
            missed = [
                sorted(entry["beam"]["missed_of_true_top"].items(), key=lambda pair: int(pair[0]))
                for entry in entries
            ]
            missed = [over_seeds([pairs[place][1] for pairs in missed], ".3f") for place in (0, -1)]
            used = ", ".join(sorted({f"{float(alpha):g}" for alpha in alphas}, key=float))
            names = words(
                title_of(dataset, backbone), method, used, len(runs), runs[0].exact["rows"]
            )
            rows.append(
                [
                    *names,
                    *accuracy,
                    over_seeds([entry["proof_share"] for entry in entries], ".1%"),
                    *missed,
                ]
            )
    columns = [
        "Data",
        "Method",
        "α",
        "Seeds",
        "Rows",
        "NDCG@10 beam",
        "NDCG@10 exact",
        "HR@10 beam",
        "HR@10 exact",
        "Proven",
    ]
    columns += ["Missed of top 1", "Missed of the list"]
    caption = (
        "The same rows of test searched both ways. Proven: rows whose whole exact list is proven to be the best one. Missed: how "
        "many of the truly best items the beam's list lacks, where those are proven."
    )
    return [Table("beam-exact", "Beam and exact search", caption, columns, rows)]


def examples(study: Study) -> list[Table]:
    """MTC Table 7: lists side by side."""
    tables = []
    for e in study.examples:
        length = max(map(len, e["lists"].values()))
        rows = [
            [
                Cell(method),
                *(
                    Cell(title, mark="best" if title == e["target"] else "")
                    for title in titles + [""] * (length - len(titles))
                ),
            ]
            for method, titles in e["lists"].items()
        ]
        caption = f"Row {e['row']} of test, drawn at random among those that the methods rank differently. History, oldest first: "
        caption += (
            f"{'; '.join(e['history'])}. Next was: {e['target']} (bold where listed). {AT_ALPHA}"
        )
        columns = ["Method", *(f"Place {i + 1}" for i in range(length))]
        name, title = (
            slug("example", e["dataset"], e["backbone"], str(e["row"])),
            title_of(e["dataset"], e["backbone"]),
        )
        tables.append(Table(name, f"Example (MTC Table 7): {title}", caption, columns, rows))
    return tables


def all_runs(study: Study) -> list[Table]:
    """Every run, whole or not, with what it cost."""
    rows = []
    for run in study.runs:
        alpha = f"{float(run.alpha):g}" if run.whole and not run.is_baseline else ""
        seconds = [Cell(seconds, form=",.0f") for seconds in (run.seconds, run.eval_seconds)]
        named = words(
            run.name,
            run.dataset,
            run.backbone,
            run.method,
            run.seed,
            run.state,
            run.note,
            alpha,
            run.world_size,
        )
        rows.append([*named, *seconds])
    columns = [
        "Run",
        "Dataset",
        "Model",
        "Method",
        "Seed",
        "State",
        "Note",
        "α",
        "Ranks",
        "Training (s)",
        "Evaluation (s)",
    ]
    states = {
        state: sum(run.state == state for run in study.runs)
        for state in dict.fromkeys(run.state for run in study.runs)
    }
    notes = [
        f"Total cost: {cost(study.runs)}.",
        f"Runs: {', '.join(f'{count} {state}' for state, count in states.items())}.",
    ]
    caption = (
        f"Budget, fixed before the first run: {study.budget}"
        if study.budget
        else "All runs and what they cost."
    )
    return [Table("runs", "Runs and cost", caption, columns, rows, notes)]


def cost(runs: list[Run]) -> str:
    """Say how long the runs took, unfinished ones as far as they tell; over all ranks too, where their numbers are known."""
    training = sum(run.seconds or 0 for run in runs)
    searching = sum(run.eval_seconds or 0 for run in runs)
    ranks = [run.rank_seconds for run in runs if run.seconds or run.eval_seconds]
    silent = sum(run.seconds is None for run in runs if run.state not in NOT_BEGUN)
    text = f"{hours(training + searching)} of wall time ({hours(training)} training, {hours(searching)} evaluation)"
    text += f", {hours(sum(ranks))} over all ranks" if ranks and None not in ranks else ""
    return text + (f"; {silent} runs did not tell their training's" if silent else "")


def hours(seconds: float) -> str:
    """Write a time in hours, or in minutes where that is less than one."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
