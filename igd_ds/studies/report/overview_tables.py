"""The tables of what a study consists of: its datasets, its runs and their cost."""

from collections.abc import Sequence

from igd_ds.studies.report.cells import words
from igd_ds.studies.report.layout import Cell, Table
from igd_ds.studies.report.study import NOT_BEGUN, Run, Study


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
