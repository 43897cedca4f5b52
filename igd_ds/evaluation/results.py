"""Ranked lists → the predictions, metrics.json and TensorBoard views that every evaluation leaves, whatever model made the lists.

Letters: R rows, K length of a list.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from igd_ds.data.batches import sample_rows
from igd_ds.data.dataset import InteractionDataset, Split
from igd_ds.evaluation import metrics
from igd_ds.folders import write_json, write_table
from igd_ds.items import decisiveness
from igd_ds.items.store import StoredCatalogue
from igd_ds.runlog import RunLog

LIST_SCHEMA = pa.schema([
    ("row_id", pa.int64()), ("user_id", pa.int64()), ("alpha", pa.float64()), ("rank", pa.int32()), ("leaf_id", pa.int32()),
    ("item_ids", pa.list_(pa.int32())), ("score", pa.float32()), ("certified", pa.bool_()),
])  # fmt: skip

SHOWN_ROWS = SHOWN_PLACES = (
    5  # of an evaluation in TensorBoard: rows, and items of a row's history and list
)


@dataclass(frozen=True)
class Ranked:
    """What was ranked for whom: the catalogue, the ids (R,) of a split's rows, ascending, and K, how long a list may be.

    `run` is the folder of the training that made the model, None where there is none: a model from elsewhere.
    """

    stored: StoredCatalogue
    dataset: InteractionDataset
    split: Split
    rows: np.ndarray
    length: int
    run: Path | None


def write_results(
    output: Path,
    ranked: Ranked,
    settings: dict,
    lists_by_alpha: Iterable[tuple[float, pa.Table, pa.Table | None]],
    timing: dict,
    chosen_alpha: float | None = None,
) -> None:
    """Write the predictions of every α, the run log, timing.json and, last, metrics.json: all it takes to be finished.

    Args:
        output: folder of the evaluation.
        ranked: what the lists are measured against.
        settings: of metrics.json, what describes the evaluation; the figures are added.
        lists_by_alpha: α, its lists in LIST_SCHEMA sorted by row and rank and, for an exact search, those that the beam found.
        timing: of timing.json.
        chosen_alpha: the one to report, where another split chose it; None: the best of this evaluation.
    """
    trie, num_rows = ranked.stored.trie, len(ranked.rows)
    entropy = decisiveness.entropy(trie, ranked.stored.entropy)
    target = trie.leaf_of_item[ranked.split.targets[ranked.rows]]
    frequency = np.bincount(trie.leaf_of_item[ranked.split.targets], minlength=trie.num_nodes)
    num_leaves = int(trie.is_leaf.sum())
    cutoffs = metrics.usable_cutoffs(min(ranked.length, num_leaves))
    results = settings | {"rows": num_rows, "entropy": ranked.stored.entropy, "alpha": {}}
    results |= metrics.describe_targets(trie, entropy, frequency, target, cutoffs)
    log = RunLog(
        output, enabled=True, resume_step=-1
    )  # from scratch, should an earlier attempt have been killed here
    for alpha, lists, by_beam in lists_by_alpha:
        leaves, scores, certified = lists_by_row(lists, ranked.rows, ranked.length)
        values = metrics.describe_lists(
            trie, entropy, frequency, target, leaves, scores, item_credit(ranked, lists), cutoffs
        )
        if (
            ranked.stored.catalogue.kind == "semantic-id"
        ):  # a title's first tokens say little about what it is
            values["relaxed_match"] = metrics.relaxed_match(trie, target, leaves, cutoffs)
        line = ", ".join(f"{name} {value:.4f}" for name, value in values["token_match"].items())
        if by_beam is not None:
            beam, _, _ = lists_by_row(by_beam, ranked.rows, ranked.length)
            values |= metrics.compare_with_beam(leaves, certified, beam, target, cutoffs)
            line += f"; proven for {values['proof_share']:.2%} of rows"
        results["alpha"][str(alpha)] = values
        results["short_lists"] = int((leaves[:, -1] < 0).sum())  # the same for every α
        log.log(
            round(1000 * alpha),
            {f"eval/{name}": value for name, value in values["token_match"].items()},
        )
        log.show(round(1000 * alpha), {"eval/lists": some_lists(ranked, leaves)})
        write_table(output / f"predictions-alpha{alpha}.parquet", lists)
        print(f"alpha {alpha}: {line}", flush=True)
    best = max(k for k in cutoffs if k <= metrics.TOP)
    log.show(0, figures_of(results, best))
    if ranked.run:
        chosen = (
            metrics.best_alpha(results, f"ndcg@{best}")
            if chosen_alpha is None
            else str(chosen_alpha)
        )
        log.hparams(
            yaml.safe_load((ranked.run / "config.yaml").read_text()),
            final_metrics(output.name, results, chosen, best),
        )
    log.close()
    if (short := results["short_lists"]) and ranked.length <= num_leaves:
        print(
            f"warning: {short} lists are shorter than --num_beams, because filter or guidance leaves those rows fewer items"
        )
    write_json(output / "timing.json", timing)
    write_json(output / "metrics.json", results)
    print(f"{num_rows} rows of {ranked.split.name}: {output / 'metrics.json'}", flush=True)


def final_metrics(name: str, results: dict, chosen: str, k: int) -> dict[str, float]:
    """Return what TensorBoard's hparams table shows of evaluation `name`: HR@k and NDCG@k at the smallest and at the chosen α."""
    values = {}
    for label, alpha in (("", min(results["alpha"], key=float)), (" at chosen alpha", chosen)):
        token_match = results["alpha"][alpha]["token_match"]
        values |= {
            f"{name}/{metric}@{k}{label}": token_match[f"{metric}@{k}"] for metric in ("hr", "ndcg")
        }
    return values


def figures_of(results: dict, k: int) -> dict:
    """Return TensorBoard's figures of a metrics.json (tag → matplotlib figure), those of the α grid at cutoff k."""
    from matplotlib.figure import Figure

    labels = {
        "alpha_grid": ("α", "token match"),
        "popularity_deciles": (
            "tenth of the catalogue by training count, most popular first",
            "share of top 10",
        ),
        "prefix_entropy": ("tokens of the prefix", "entropy of lists − targets, nats"),
    }
    figures = {f"eval/{name}": Figure(layout="constrained") for name in labels}
    grid, deciles, gap = (
        figures[f"eval/{name}"].add_subplot(xlabel=x, ylabel=y) for name, (x, y) in labels.items()
    )
    for metric, marker in (("hr", "o"), ("ndcg", "s")):
        values = [entry["token_match"][f"{metric}@{k}"] for entry in results["alpha"].values()]
        grid.plot(
            [float(alpha) for alpha in results["alpha"]],
            values,
            marker=marker,
            label=f"{metric.upper()}@{k}",
        )
    deciles.plot(range(1, 11), results["target_popularity_deciles"], "k--", label="targets")
    targets = results["target_prefix_entropy"]["nats"]
    for number, (alpha, entry) in enumerate(results["alpha"].items()):
        style = {"marker": "os^Dv<>"[number % 7], "label": f"α = {alpha}"}
        deciles.plot(range(1, 11), entry["popularity_deciles"], **style)
        difference = [
            lists - target
            for lists, target in zip(entry["prefix_entropy"]["nats"], targets, strict=False)
        ]
        gap.plot(range(1, len(difference) + 1), difference, **style)
    for axes in (grid, deciles, gap):
        axes.legend()
    return figures


def some_lists(ranked: Ranked, leaves: np.ndarray) -> str:
    """Return in Markdown what a few rows' users had last, their target, and the first entries of their lists, `leaves` (R, K).

    The rows are the same in all evaluations of equal rows. Items are named by title, or by semantic ID where they have none.
    """
    dataset, trie, text = ranked.dataset, ranked.stored.trie, ""

    def name(item: int) -> str:  # as code: Markdown in titles means nothing
        return (
            "`"
            + (dataset.titles[item] or " ".join(dataset.semantic_ids[item])).replace("`", "'")
            + "`"
        )

    for place in sample_rows(len(ranked.rows), SHOWN_ROWS, seed=0):
        row, listed = ranked.rows[place], leaves[place][leaves[place] >= 0][:SHOWN_PLACES]
        target = ranked.split.targets[row]
        text += f"**Row {row}**: {' → '.join(map(name, ranked.split.history(row)[-SHOWN_PLACES:]))} → target {name(target)}\n\n"
        for rank, leaf in enumerate(listed, 1):
            hit = " **hit**" if leaf == trie.leaf_of_item[target] else ""
            text += f"{rank}. {name(trie.item_order[trie.first_item[leaf]])}{hit}\n"
        text += "\n"
    return text


def lists_by_row(
    lists: pa.Table, rows: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return one α's leaves int64, scores float32 and certified bool, each (R, length); −1, −inf, False behind a list's end."""
    row, place, by_row = (
        np.searchsorted(rows, lists["row_id"].to_numpy()),
        lists["rank"].to_numpy() - 1,
        [],
    )
    for name, nothing in (
        ("leaf_id", np.int64(-1)),
        ("score", np.float32(-np.inf)),
        ("certified", False),
    ):
        by_row.append(np.full((len(rows), length), nothing))
        by_row[-1][row, place] = lists[name].to_numpy()
    there = by_row[0] >= 0
    assert np.array_equal(lists["row_id"].to_numpy(), rows[row]) and there[:, 0].all(), (
        "the expected rows, all of them, no other"
    )
    assert there.sum() == len(row) and (there[:, :-1] >= there[:, 1:]).all(), (
        "each has one list, without a hole"
    )
    return tuple(by_row)


def item_credit(ranked: Ranked, lists: pa.Table) -> np.ndarray:
    """Return the share of a hit that item match counts, float64 (R,): of the leaf's items that the row may get one is drawn."""
    target = ranked.split.targets[ranked.rows]
    row = np.searchsorted(ranked.rows, lists["row_id"].to_numpy())
    hit = ranked.stored.trie.leaf_of_item[target[row]] == lists["leaf_id"].to_numpy()
    row, items = row[hit], lists["item_ids"].filter(pa.array(hit)).combine_chunks()
    count = pc.list_value_length(items).to_numpy()
    owner = np.repeat(row, count)
    credit = np.zeros(len(target))
    credit[row] = (
        np.bincount(owner, items.flatten().to_numpy() == target[owner], len(target))[row] / count
    )
    return credit
