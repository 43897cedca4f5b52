"""The tables that analyse the recommended lists.

Which codes and which groups of rows they hit, which items they show, what the beam misses, how
item probabilities compare with hits, and examples.
"""

import math
from collections.abc import Sequence

import numpy as np

from igd_ds.evaluation.metrics import CALIBRATION_BINS
from igd_ds.studies.report.cells import (
    CURRENT,
    as_list,
    average,
    datasets,
    marked,
    methods,
    metric_of,
    over_seeds,
    rows_behind,
    rows_of,
    slug,
    title_of,
    words,
)
from igd_ds.studies.report.layout import Cell, Row, Table
from igd_ds.studies.report.study import AT_ALPHA, METRIC, RowGroups, Run, Study
from igd_ds.studies.significance import ndcg

REPEATS = (("repeat_rate", "top10", "Seen"), ("repeat_rate", "first", "Seen, first place"))
"""Entries of metrics.json about items that users had met before, and their column headings."""
HISTORY = ((1, 5), (6, 10), (11, None))
"""History lengths that are reported separately; None: no upper limit."""


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
            targets = results.get("target_popularity_deciles") or [None] * 10
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


def has_beam_lists(run: Run) -> bool:
    """Return whether the run's exact search began with a beam search."""
    return run.exact is not None and any("beam" in one for one in run.exact["alpha"].values())


def beam_and_exact_row(data: str, method: str, runs: Sequence[Run]) -> Row:
    """Return the row of one method of `beam_and_exact`, at `Run.alpha_of` of exact lists."""
    exact = [run.exact for run in runs if run.exact]
    alphas = [alpha for run in runs if (alpha := run.alpha_of("exact")) is not None]
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
