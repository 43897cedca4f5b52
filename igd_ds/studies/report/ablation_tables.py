"""The tables of settings and components: what validation chose, and what each part adds."""

from collections.abc import Sequence
from dataclasses import replace

from igd_ds.evaluation.metrics import HEADLINE
from igd_ds.studies import significance
from igd_ds.studies.report.cells import (
    BEST,
    CURRENT,
    UNMEASURED,
    Accept,
    as_list,
    average,
    backbones_of,
    best_on_valid,
    chosen_alphas,
    datasets,
    headings,
    marked,
    measured,
    measures_of,
    methods,
    rows_behind,
    rows_of,
    title_of,
    words,
)
from igd_ds.studies.report.layout import Cell, Row, Table, formatted
from igd_ds.studies.report.study import IGD, METRIC, REFERENCE, Run, Study, has_curriculum, lines_by
from igd_ds.studies.significance import ndcg

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
            betas = [f"{found[backbone, form][0].settings['igd_beta']:g}" for form in forms[1:]]
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


def trained_with(objective: str) -> Accept:
    """Return a test of whether a run was trained with an objective."""
    return lambda run: run.objective == objective


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
