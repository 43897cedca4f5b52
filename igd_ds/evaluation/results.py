"""What every evaluation writes from its ranked lists, whatever model they come from.

That is the predictions, metrics.json, timing.json and TensorBoard's views.

Letters in shapes: R rows, K length of a list.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from igd_ds.config.yaml_files import read_yaml_settings
from igd_ds.data.batches import sample_rows
from igd_ds.data.dataset import InteractionDataset, Split
from igd_ds.data.seen_items import SeenItems
from igd_ds.evaluation import metrics
from igd_ds.folders import write_json, write_table
from igd_ds.items import decisiveness
from igd_ds.items.ids import ItemIds
from igd_ds.items.shared_paths import SharedPaths, item_texts
from igd_ds.items.store import StoredCatalogue
from igd_ds.runlog import RunLog

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIST_SCHEMA = pa.schema([
    ("row_id", pa.int64()), ("user_id", pa.int64()), ("alpha", pa.float64()), ("rank", pa.int32()),
    ("leaf_id", pa.int32()), ("item_ids", pa.list_(pa.int32())), ("score", pa.float32()),
    ("certified", pa.bool_()),
])  # fmt: skip
"""Columns of lists, a line per listed leaf. `certified`: whether this rank is proven.

The files of predictions have a further column, `source_ids`: the source's ids of `item_ids`."""

PROBABILITY, SCORE = "log-probability", "score"
"""What the scores of lists are: logs of item probabilities, which sum to 1 over the catalogue, or
scores that only rank."""

SHOWN_ROWS = 5
"""Rows of an evaluation whose lists TensorBoard shows."""

SHOWN_ITEMS = 5
"""Items that TensorBoard shows of a row's history, and of its list."""


@dataclass(frozen=True)
class Ranked:
    """What was ranked, and for which rows."""

    stored: StoredCatalogue
    dataset: InteractionDataset
    split: Split
    rows: np.ndarray
    """int64 (R,), ascending: the row ids in the split."""
    length: int
    """K, the most entries of a list."""
    run: Path | None
    """Folder of the run that trained the model; None for a model from elsewhere."""

    @property
    def targets(self) -> np.ndarray:
        """Item id of each row's target, (R,)."""
        return self.split.targets[self.rows]


def write_results(
    output: Path,
    ranked: Ranked,
    settings: Mapping[str, Any],
    lists_by_alpha: Iterable[tuple[float, pa.Table, pa.Table | None]],
    timing: Mapping[str, Any],
    chosen_alpha: float | None = None,
) -> None:
    """Write the predictions of every α, the run log, timing.json and metrics.json.

    metrics.json is written last; its presence marks the evaluation as complete.

    Args:
        output: folder of the evaluation.
        ranked: what was ranked.
        settings: describes the evaluation; metrics.json holds it beside the metrics. Its
            `exclude_seen` is "yes" or "no".
        lists_by_alpha: α, its lists in LIST_SCHEMA sorted by row and rank, and, if an exact search
            began with a beam search, the lists of that.
        timing: content of timing.json.
        chosen_alpha: the α to report, if another split chose it. None: the best α here.
    """
    num_leaves = int(ranked.stored.trie.is_leaf.sum())
    cutoffs = metrics.usable_cutoffs(min(ranked.length, num_leaves))
    targets = _targets_of(ranked, cutoffs)
    seen = ranked.dataset.seen_items(ranked.split.name)
    repeats = seen.is_repeat()[ranked.rows]
    results: dict[str, Any] = {
        **settings,
        "rows": len(ranked.rows),
        "seen_targets": int(repeats.sum()),
        "target_repeat_rate": float(repeats.mean()),
        "entropy": ranked.stored.entropy,
        "alpha": {},
        **metrics.describe_targets(targets),
    }

    # The log starts from scratch: an earlier attempt may have been killed here.
    log = RunLog(output, enabled=True, resume_step=-1)
    source_ids = ItemIds.read(ranked.dataset.folder)
    for alpha, lists, by_beam in lists_by_alpha:
        leaves, scores, certified = lists_by_row(lists, ranked.rows, ranked.length)
        values = metrics.describe_lists(targets, leaves, scores, item_credit(ranked, lists))
        values["repeat_rate"] = repeat_rate(ranked, lists, seen)
        if ranked.stored.catalogue.kind == "semantic-id":
            # A title's first tokens say little about the item; a semantic ID's first codes do.
            values["relaxed_match"] = metrics.relaxed_match(
                targets.trie, targets.leaf, leaves, cutoffs
            )
        if settings.get("search") == "exact":
            values |= _describe_proofs(ranked, targets, leaves, certified, by_beam)
        if settings.get("scores") == PROBABILITY:
            values |= _describe_probabilities(leaves, scores, targets.leaf)
        results["alpha"][str(alpha)] = values
        results["short_lists"] = int((leaves[:, -1] < 0).sum())  # the same for every α

        predictions = with_source_ids(lists, source_ids)
        write_table(output / f"predictions-alpha{alpha}.parquet", predictions)
        _log_alpha(log, alpha, values, some_lists(ranked, leaves))

    _log_study(log, output.name, ranked, results, cutoffs, chosen_alpha)
    log.close()

    for warning in _warnings(ranked, results, num_leaves):
        print(warning)
    write_json(output / "timing.json", timing)
    write_json(output / "metrics.json", results)
    print(f"{len(ranked.rows)} rows of {ranked.split.name}: {output / 'metrics.json'}", flush=True)


def _targets_of(ranked: Ranked, cutoffs: Sequence[int]) -> metrics.Targets:
    """Return what the metrics need to know about the rows' targets."""
    trie = ranked.stored.trie
    return metrics.Targets(
        trie=trie,
        entropy=decisiveness.entropy(trie, ranked.stored.entropy),
        frequency=np.bincount(trie.leaf_of_item[ranked.split.targets], minlength=trie.num_nodes),
        leaf=trie.leaf_of_item[ranked.targets],
        cutoffs=cutoffs,
    )


def _describe_proofs(
    ranked: Ranked,
    targets: metrics.Targets,
    leaves: np.ndarray,
    certified: np.ndarray,
    by_beam: pa.Table | None,
) -> dict[str, Any]:
    """Return the share of rows with a proven list and, if a beam search came first, its loss.

    Args:
        ranked: what was ranked.
        targets: of the rows.
        leaves, certified: of the exact lists, (R, K).
        by_beam: the beam's lists in LIST_SCHEMA.
    """
    proven = metrics.proven_places(leaves, certified)
    values: dict[str, Any] = {"proof_share": float(proven[:, -1].mean())}
    if by_beam is not None:
        beam, _, _ = lists_by_row(by_beam, ranked.rows, ranked.length)
        values["beam"] = metrics.compare_with_beam(
            leaves, proven, beam, targets.leaf, targets.cutoffs
        )
    return values


def _describe_probabilities(
    leaves: np.ndarray, scores: np.ndarray, target: np.ndarray
) -> dict[str, Any]:
    """Return mean probability of a whole list, and the calibration of its items' probabilities.

    Args:
        leaves, scores: of the lists, (R, K), with −1 and −inf behind a list's end.
        target: (R,), the leaf of each row's target.
    """
    listed, probability = leaves >= 0, np.exp(scores.astype(np.float64))
    hit = leaves == target[:, None]
    return {
        "mean_coverage": float(probability.sum(1).mean()),
        "calibration": metrics.calibration(probability[listed], hit[listed]),
    }


def with_source_ids(lists: pa.Table, ids: ItemIds) -> pa.Table:
    """Return lists in LIST_SCHEMA with a column of the source's ids of the listed items."""
    items = lists["item_ids"].combine_chunks()
    ends = np.append(0, np.cumsum(pc.list_value_length(items).to_numpy()))
    names = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), ids.column.take(items.flatten()))
    return lists.append_column("source_ids", names)


def _log_alpha(log: RunLog, alpha: float, values: Mapping[str, Any], examples: str) -> None:
    """Record and print the main metrics of one α. Its step in TensorBoard is 1000·α.

    Item match comes first: token match counts a hit in full however many items share the path.
    """
    step, item_match, token_match = round(1000 * alpha), values["item_match"], values["token_match"]
    log.log(
        step,
        {
            **{f"eval/{name}": value for name, value in item_match.items()},
            **{f"eval/token_match_{name}": value for name, value in token_match.items()},
        },
    )
    log.show(step, {"eval/lists": examples})

    line = ", ".join(f"{name} {value:.4f}" for name, value in item_match.items())
    if token_match == item_match:
        line += " (item match = token match)"
    else:
        other = ", ".join(f"{name} {value:.4f}" for name, value in token_match.items())
        line += f" (item match); token match: {other}"
    line += "; seen items: {first:.1%} of first places, {top10:.1%} of the top 10".format(
        **values["repeat_rate"]
    )
    if "proof_share" in values:
        line += f"; proven for {values['proof_share']:.2%} of rows"
    if "mean_coverage" in values:
        error = values["calibration"]["expected_calibration_error"]
        line += f"; a list holds {values['mean_coverage']:.1%} of the probability"
        line += f", calibration error {error:.4f}"
    print(f"alpha {alpha}: {line}", flush=True)


def _log_study(
    log: RunLog,
    name: str,
    ranked: Ranked,
    results: Mapping[str, Any],
    cutoffs: Sequence[int],
    chosen_alpha: float | None,
) -> None:
    """Show TensorBoard's figures, and the run's line in its HParams table."""
    best = max(k for k in cutoffs if k <= metrics.TOP)
    log.show(0, figures_of(results, best))
    if ranked.run is None:
        return

    if chosen_alpha is None:
        chosen = metrics.best_alpha(results, f"ndcg@{best}")
    else:
        chosen = str(chosen_alpha)
    run_settings = read_yaml_settings(ranked.run / "config.yaml")
    log.hparams(run_settings, final_metrics(name, results, chosen, best))


def _warnings(ranked: Ranked, results: Mapping[str, Any], num_leaves: int) -> Iterator[str]:
    """Yield what a reader of the metrics should know: what lists, targets and paths lack."""
    if (short := results["short_lists"]) and ranked.length <= num_leaves:
        reason = (
            f"they hold --coverage {results['coverage']:g} of the probability already"
            if results.get("coverage", 1) < 1
            else "the item filter, the guidance or --exclude_seen leaves those rows fewer items"
        )
        yield f"warning: {short} lists are shorter than --num_beams, because {reason}"
    if (missed := results["seen_targets"]) and results["exclude_seen"] == "yes":
        yield (
            f"warning: {missed} of {len(ranked.rows)} targets are seen items, which --exclude_seen "
            "leaves out of the lists: they count as misses"
        )
    shared = SharedPaths.find(
        ranked.stored.trie.leaf_of_item,
        item_texts(ranked.dataset, ranked.stored.catalogue.kind),
    )
    if warning := shared.warning():
        yield warning


def final_metrics(name: str, results: Mapping[str, Any], chosen: str, k: int) -> dict[str, float]:
    """Return an evaluation's values for TensorBoard's HParams table.

    They are HR@k and NDCG@k at the smallest α and at the chosen one: item match, and token match
    by that name.

    Args:
        name: of the evaluation.
        results: its metrics.json.
        chosen: α as written in metrics.json.
        k: the cutoff.
    """
    values: dict[str, float] = {}
    smallest = min(results["alpha"], key=float)
    for label, alpha in (("", smallest), (" at chosen alpha", chosen)):
        entry = results["alpha"][alpha]
        for metric in (f"hr@{k}", f"ndcg@{k}"):
            values[f"{name}/{metric}{label}"] = entry["item_match"][metric]
            values[f"{name}/token_match_{metric}{label}"] = entry["token_match"][metric]
    return values


def figures_of(results: Mapping[str, Any], k: int) -> dict[str, "Figure"]:
    """Return TensorBoard's figures of a metrics.json, tag → matplotlib figure.

    Args:
        results: content of metrics.json.
        k: the cutoff of HR and NDCG in the figure of the α grid.
    """
    from matplotlib.figure import Figure

    labels = {
        "alpha_grid": ("α", "item match"),
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

    # Metrics over the grid of α.
    alphas = [float(alpha) for alpha in results["alpha"]]
    for metric, marker in (("hr", "o"), ("ndcg", "s")):
        values = [entry["item_match"][f"{metric}@{k}"] for entry in results["alpha"].values()]
        grid.plot(alphas, values, marker=marker, label=f"{metric.upper()}@{k}")

    # Popularity of the lists, and entropy of their prefixes, compared with the targets.
    deciles.plot(range(1, 11), results["target_popularity_deciles"], "k--", label="targets")
    of_targets = results["target_prefix_entropy"]["nats"]
    for number, (alpha, entry) in enumerate(results["alpha"].items()):
        marker, label = "os^Dv<>"[number % 7], f"α = {alpha}"
        deciles.plot(range(1, 11), entry["popularity_deciles"], marker=marker, label=label)

        of_lists = entry["prefix_entropy"]["nats"]
        difference = [ours - theirs for ours, theirs in zip(of_lists, of_targets, strict=False)]
        gap.plot(range(1, len(difference) + 1), difference, marker=marker, label=label)

    for axes in (grid, deciles, gap):
        axes.legend()

    # Whether an item of probability p is the target in a share p of the cases. Scores are
    # probabilities at α = 0 alone.
    for entry in results["alpha"].values():
        if "calibration" in entry:
            figures["eval/calibration"] = reliability_figure(entry["calibration"])
    return figures


def reliability_figure(calibration: Mapping[str, Any]) -> "Figure":
    """Return the reliability diagram of `metrics.calibration`, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.add_subplot(
        xlabel="mean p(item) of a tenth of the listed items",
        ylabel="share that is the target",
        xscale="log",
        yscale="log",
    )
    probability = [one["probability"] for one in calibration["bins"]]
    axes.plot(probability, probability, "k--", label="calibrated")
    # A tenth without a hit has no place on a logarithmic axis.
    found = [one for one in calibration["bins"] if one["hit_rate"]]
    axes.plot([one["probability"] for one in found], [one["hit_rate"] for one in found], "o-")
    axes.legend()
    return figure


def some_lists(ranked: Ranked, leaves: np.ndarray) -> str:
    """Return, in Markdown, the histories, the targets and the lists of a few rows.

    The rows are the same in all evaluations of the same rows.

    Args:
        ranked: what was ranked.
        leaves: the lists, (R, K), −1 behind a list's end.
    """
    trie, text = ranked.stored.trie, ""
    for place in sample_rows(len(ranked.rows), SHOWN_ROWS, seed=0):
        row = ranked.rows[place]
        target = ranked.split.targets[row]
        history = ranked.split.history(row)[-SHOWN_ITEMS:]
        names = [_item_name(ranked.dataset, item) for item in (*history, target)]
        text += f"**Row {row}**: {' → '.join(names[:-1])} → target {names[-1]}\n\n"

        listed = leaves[place][leaves[place] >= 0][:SHOWN_ITEMS]
        for rank, leaf in enumerate(listed, 1):
            name = _item_name(ranked.dataset, trie.item_order[trie.first_item[leaf]])
            hit = " **hit**" if leaf == trie.leaf_of_item[target] else ""
            text += f"{rank}. {name}{hit}\n"
        text += "\n"
    return text


def _item_name(dataset: InteractionDataset, item: int) -> str:
    """Return an item's title, or its semantic ID if it has none, as Markdown code.

    As code, the title's own characters have no meaning in Markdown.
    """
    name = dataset.titles[item]
    if not name and dataset.semantic_ids is not None:
        name = " ".join(dataset.semantic_ids[item])
    return f"`{(name or '').replace('`', chr(39))}`"


def lists_by_row(
    lists: pa.Table, rows: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return one α's leaves int64, scores float32 and certified flags, (R, length) each.

    Behind a list's end they are −1, −inf and False.

    Args:
        lists: table in LIST_SCHEMA: one list for each of `rows`, and no other lines.
        rows: (R,), row ids, ascending.
        length: the most entries of a list.
    """
    row = np.searchsorted(rows, lists["row_id"].to_numpy())
    place = lists["rank"].to_numpy() - 1

    shape = (len(rows), length)
    leaves = np.full(shape, -1, np.int64)
    scores = np.full(shape, -np.inf, np.float32)
    certified = np.zeros(shape, bool)
    leaves[row, place] = lists["leaf_id"].to_numpy()
    scores[row, place] = lists["score"].to_numpy()
    certified[row, place] = lists["certified"].to_numpy()

    there = leaves >= 0
    same_rows = np.array_equal(lists["row_id"].to_numpy(), rows[row]) and there[:, 0].all()
    assert same_rows, "the lists are those of the expected rows"
    no_gap = there.sum() == len(row) and (there[:, :-1] >= there[:, 1:]).all()
    assert no_gap, "each row has one list, whose ranks have no gap"
    return leaves, scores, certified


def item_credit(ranked: Ranked, lists: pa.Table) -> np.ndarray:
    """Return the share of a hit that counts in item match, float64 (R,).

    It is 1 / n if the target is among the n items of the hit's leaf that the row may get, and 0
    without a hit, or if the row may not get the target.

    Args:
        ranked: what was ranked.
        lists: one α's lists in LIST_SCHEMA.
    """
    target, leaf_of_item = ranked.targets, ranked.stored.trie.leaf_of_item
    row = np.searchsorted(ranked.rows, lists["row_id"].to_numpy())
    hit = leaf_of_item[target[row]] == lists["leaf_id"].to_numpy()

    # The items of each hit's leaf, and how many of them are the row's target.
    row, items = row[hit], lists["item_ids"].filter(pa.array(hit)).combine_chunks()
    count = pc.list_value_length(items).to_numpy()
    owner = np.repeat(row, count)
    is_target = items.flatten().to_numpy() == target[owner]
    number_of_target = np.bincount(owner, is_target, len(target))

    credit = np.zeros(len(target))
    credit[row] = number_of_target[row] / count
    return credit


def repeat_rate(ranked: Ranked, lists: pa.Table, seen: SeenItems) -> dict[str, float]:
    """Return the share of seen items among the first places, and among the top 10 of all lists.

    A place that n items share, of which the user has met m, counts m / n.

    Args:
        ranked: what was ranked.
        lists: one α's lists in LIST_SCHEMA.
        seen: what the users of the split's rows have met before.
    """
    top = lists.filter(pc.less_equal(lists["rank"], metrics.TOP))
    items = top["item_ids"].combine_chunks()
    count = pc.list_value_length(items).to_numpy()
    place = np.repeat(np.arange(len(top)), count)
    row = np.searchsorted(ranked.rows, top["row_id"].to_numpy())

    # Pairs of a row and an item as one number each.
    num_items = ranked.dataset.num_items
    met = seen.of(ranked.rows)
    met_pairs = np.repeat(np.arange(len(met)), [len(m) for m in met]) * num_items
    met_pairs += np.concatenate(met)
    is_seen = np.isin(row[place] * num_items + items.flatten().to_numpy(), met_pairs)

    share = np.bincount(place, is_seen, len(top)) / count
    is_first = top["rank"].to_numpy() == 1
    return {"first": float(share[is_first].mean()), "top10": float(share.mean())}
