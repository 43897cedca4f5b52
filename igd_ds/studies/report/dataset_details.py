"""Adds to the runs of a study what their datasets tell: ranks, groups of rows, and examples.

The runs of a dataset must have been evaluated alike (ALIKE, ALIKE_IN_BACKBONE, AS_TRAINED).
"""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from igd_ds.backbones.saved import trained_likelihood
from igd_ds.baselines.leaves import build_catalogue
from igd_ds.contracts import Likelihood
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.statistics import catalogue_statistics
from igd_ds.errors import UsageError
from igd_ds.evaluation import metrics
from igd_ds.items.decisiveness import mean_by_token, purity_gain
from igd_ds.items.store import StoredCatalogue, load_catalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.run_folder import BEFORE_RECORDED
from igd_ds.studies.report.run_files import EVALUATIONS, fingerprint_of, read_json, thinned
from igd_ds.studies.report.study import Json, Ranks, RowGroups, Run

LISTS = {"valid": "valid", "test": "test", "exact": "test"}
"""The keys of `Run.ranks` with the splits whose rows were ranked."""

# Entries of metrics.json that must be equal in all evaluations of a dataset (`fingerprint` and
# `protocol` are the dataset's), and those that must be equal within one backbone: a backbone may
# stand for a way to decode, as BIGRec and D3 do.
ALIKE = (
    "fingerprint", "protocol", "rows", "num_rows", "seed", "num_beams", "popularity_baseline",
    "exclude_seen",
)  # fmt: skip
ALIKE_IN_BACKBONE = (
    "decoding_rule", "length_penalty", "popularity_prior", "guidance", "guidance_weight",
    "item_filter",
)  # fmt: skip
AS_TRAINED = ("search", "softmax", "temperature")
"""Entries that must be equal within one backbone too, unless they follow from the training: `auto`,
the default of `igd eval`, takes them from the objective (see `Ranking`)."""

EXAMPLE_LENGTH = 3
"""Items of a list that an example shows, as in MTC Table 7."""


@dataclass(frozen=True)
class Ranking:
    """How an evaluation ranked, and what its settings follow from if they are `auto`.

    A model of `msl` is ranked under the masked softmax with the temperature of its training, and by
    an exact search where α = 0 alone. Other models are ranked by a beam search under the full
    softmax. So evaluations of one table may differ in these settings.
    """

    values: tuple[Any, ...]  # of AS_TRAINED; None where an older version did not record one
    trained: Likelihood
    is_plain: bool  # whether α = 0 is the only one

    @property
    def is_as_trained(self) -> bool:
        """Whether the settings may be those that follow from the training."""
        search, *scores = self.values
        follows = (self.trained.softmax, self.trained.temperature)
        fits = all(found in (None, own) for found, own in zip(scores, follows, strict=True))
        return fits and (self.trained.softmax == "masked" or search in (None, "beam"))

    def unlike(self, other: "Ranking") -> Json:
        """Return those values of the other one that differ, but not for its training or its α."""
        both_follow = self.is_as_trained and other.is_as_trained
        if both_follow and (self.trained, self.is_plain) != (other.trained, other.is_plain):
            return {}
        pairs = zip(AS_TRAINED, self.values, other.values, strict=True)
        return {name: its for name, own, its in pairs if None not in (own, its) and own != its}


@dataclass
class Details:
    """The part of a study that comes from the datasets; see `Study` for the fields."""

    runs: dict[str, Run] = field(default_factory=dict)  # runs that were changed, by name
    catalogues: dict[str, Json] = field(default_factory=dict)
    rows: dict[str, dict[str, RowGroups]] = field(default_factory=dict)
    examples: list[Json] = field(default_factory=list)


def add_details(
    details: Details,
    dataset: str,
    runs: Sequence[Run],
    folders: Mapping[str, Path],
    examples: int,
) -> None:
    """Add the ranks, row groups and examples of a dataset's complete runs.

    If the dataset cannot be read, its runs get a note instead.
    """
    refuse_unlike(runs, folders)
    kept, twice = once(runs)
    details.runs |= {run.name: run for run in twice}
    try:
        opened, stored, damaged = open_dataset(kept, folders)
    except (ValueError, OSError) as error:
        why = f"no groups of rows and no tests by user: {error}"
        details.runs |= {run.name: with_note(run, why) for run in kept}
        return

    kept = [with_note(run, damaged.get(run.name, "")) for run in kept]
    kept = [with_ranks(run, folders[run.name], opened) for run in kept]
    details.runs |= {run.name: run for run in kept}
    if stored:
        details.catalogues[dataset] = describe_catalogue(opened, stored)
    else:
        # There are only baselines, so there is no tokenizer. The items that share a leaf are known
        # without one, and only they are needed here.
        stored = build_catalogue(opened, kept[0].settings.get("item_kind", "auto"))
        details.catalogues[dataset] = sizes_of(opened, stored.catalogue.kind)
    details.rows[dataset] = row_groups(kept, opened, stored.trie)
    details.examples += examples_of(kept, folders, opened, examples)


def once(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Return the first run of each method and seed; and the other ones, each with a note."""
    first: dict[tuple[str, str, int], Run] = {}
    twice = []
    for run in runs:
        kept = first.setdefault((run.backbone, run.method, run.seed), run)
        if kept is not run:
            note = f"left out: same method and seed as {kept.name}"
            twice.append(replace(run, state="unfinished", note=note))
    return list(first.values()), twice


def with_note(run: Run, note: str) -> Run:
    """Return the run with one more note."""
    return replace(run, note="; ".join(filter(None, [run.note, note])))


def refuse_unlike(runs: Sequence[Run], folders: Mapping[str, Path]) -> None:
    """Check that runs of one dataset were evaluated alike.

    All of them in ALIKE, and those of a backbone in ALIKE_IN_BACKBONE and AS_TRAINED.

    Raises:
        UsageError: names two evaluations and what differs.
    """
    for split, path in EVALUATIONS.items():
        seen: dict[tuple[str, str], tuple[Any, Path]] = {}
        rankings: dict[str, dict[Ranking, Path]] = {}
        for run in (run for run in runs if getattr(run, split)):
            evaluation = (folders[run.name] / path).parent
            values = describe_evaluation(evaluation, run)
            different = {}
            for key in values.keys() - AS_TRAINED:
                place = key, run.backbone if key in ALIKE_IN_BACKBONE else ""
                first = seen.setdefault(place, (values[key], evaluation))
                if first[0] != values[key]:
                    different[key] = first

            ranking = ranking_of(folders[run.name], run, values, getattr(run, split)["alpha"])
            others = rankings.setdefault(run.backbone, {})
            for other, folder in others.items():
                if unlike := ranking.unlike(other):
                    different |= {key: (value, folder) for key, value in unlike.items()}
                    break
            others.setdefault(ranking, evaluation)
            if different:
                refuse(run.dataset, evaluation, values, different)


def refuse(
    dataset: str, evaluation: Path, values: Json, different: Mapping[str, tuple[Any, Path]]
) -> NoReturn:
    """Raise UsageError for an evaluation that differs from earlier ones.

    Args:
        dataset: its name.
        evaluation: the folder.
        values: what `describe_evaluation` returns of it.
        different: by entry that differs, the earlier value and its folder.
    """
    keys = [key for key in (*ALIKE, *AS_TRAINED, *ALIKE_IN_BACKBONE) if key in different]
    shown = [
        key if isinstance(values[key], dict) else f"{key} ({values[key]} and {different[key][0]})"
        for key in keys
    ]
    raise UsageError(
        f"{evaluation} and {different[keys[0]][1]} are evaluations of {dataset} that are not alike "
        f"({', '.join(shown)} differ): make separate reports, or evaluate one of them again"
    )


def ranking_of(folder: Path, run: Run, values: Json, alphas: Collection[str]) -> Ranking:
    """Return how one of a run's evaluations ranked.

    Args:
        folder: the run folder.
        run: the run.
        values: what `describe_evaluation` returns of the evaluation.
        alphas: the values of α.
    """
    trained = None
    with contextlib.suppress(UsageError, TypeError):  # a damaged description
        trained = trained_likelihood(folder / "model")
    if trained is None:  # as where the weights were removed
        is_msl = run.objective == "msl"
        trained = Likelihood("masked", values.get("temperature", 1.0)) if is_msl else Likelihood()
    return Ranking(tuple(map(values.get, AS_TRAINED)), trained, list(alphas) == ["0.0"])


def describe_evaluation(folder: Path, run: Run) -> Json:
    """Return those values of ALIKE, ALIKE_IN_BACKBONE and AS_TRAINED that are recorded."""
    results = BEFORE_RECORDED | (read_json(folder / "metrics.json") or {})
    dataset: Json = {"fingerprint": fingerprint_of(folder)}
    with contextlib.suppress(KeyError, ValueError):
        info = read_json(Path(run.settings["dataset"]) / "dataset.json") or {}
        dataset["protocol"] = info.get("protocol")
    results |= {key: value for key, value in dataset.items() if value is not None}
    keys = (*ALIKE, *ALIKE_IN_BACKBONE, *AS_TRAINED)
    return {key: results[key] for key in keys if key in results}


def open_dataset(
    runs: Sequence[Run], folders: Mapping[str, Path]
) -> tuple[InteractionDataset, StoredCatalogue | None, dict[str, str]]:
    """Open the dataset of some runs.

    Returns:
        The dataset, the first whole catalogue that a generative run stored (None if there is none),
        and by run what is wrong with a catalogue that was found before.

    Raises:
        UsageError: the dataset is gone or is another one now, or all catalogues are damaged.
    """
    candidates = list(dict.fromkeys(Path(run.settings["dataset"]) for run in runs))
    there = [folder for folder in candidates if (folder / "dataset.json").is_file()]
    if not there:
        raise UsageError(f"the dataset is not at {candidates[0]}")
    dataset = InteractionDataset.load(there[0])
    for run in runs:
        evaluated = fingerprint_of((folders[run.name] / EVALUATIONS["valid"]).parent)
        if evaluated not in (None, dataset.fingerprint):
            raise UsageError(f"{there[0]} is not the dataset that was evaluated")

    damaged: dict[str, str] = {}
    for run in runs:
        for folder in (folders[run.name] / "model" / "catalogue", folders[run.name] / "catalogue"):
            if folder.is_dir():
                try:
                    return dataset, load_catalogue(folder, dataset=dataset), damaged
                except UsageError as error:
                    damaged[run.name] = str(error).replace(f"{folders[run.name]}/", "")
    if damaged:
        raise UsageError(next(iter(damaged.values())))
    return dataset, None, damaged


def describe_catalogue(dataset: InteractionDataset, stored: StoredCatalogue) -> Json:
    """Return what `Study.catalogues` keeps of a dataset."""
    statistics = catalogue_statistics(dataset, stored.catalogue, stored.trie, stored.entropy)
    gains = sorted(mean_by_token(stored.trie, purity_gain(stored.trie))[1].tolist(), reverse=True)
    by_token = [gain for _, gain in thinned(list(enumerate(gains)))]
    request = dataset.info.get("semantic_ids", {}).get("request", {})

    described = {"purity_gain_by_token": by_token, "quantizer": request.get("quantizer")}
    return statistics | interactions_of(dataset) | described


def sizes_of(dataset: InteractionDataset, kind: str) -> Json:
    """Return what `Study.catalogues` keeps of a dataset that no generative run was trained on."""
    rows = {f"{name}_rows": len(split) for name, split in dataset.splits.items()}
    return {"kind": kind, "items": dataset.num_items} | rows | interactions_of(dataset)


def interactions_of(dataset: InteractionDataset) -> Json:
    """Return the users and interactions before rows were made; {} for ready-made rows."""
    sizes = [
        step
        for step in dataset.info.get("funnel", ())
        if "users" in step and "interactions" in step
    ]
    return {key: sizes[-1][key] for key in ("users", "interactions")} if sizes else {}


def with_ranks(run: Run, folder: Path, dataset: InteractionDataset) -> Run:
    """Return the run with the ranks of the targets in its lists at `Run.alpha_of`."""
    for lists, split in LISTS.items():
        if not getattr(run, lists):
            continue
        path = folder / Path(EVALUATIONS[lists]).with_name(
            f"predictions-alpha{run.alpha_of(lists)}.parquet"
        )
        try:
            ranks = target_ranks(path, dataset.splits[split].targets)
        except (ValueError, KeyError, IndexError, OSError) as error:  # pyarrow raises any of them
            why = f"damaged ({' '.join(str(error).split())})" if path.is_file() else "missing"
            note = f"{path.relative_to(folder)} is {why}: no groups of rows and no tests by user"
            return with_note(run, note)
        run = replace(run, ranks=run.ranks | {lists: ranks})
    return run


def target_ranks(path: Path, targets: np.ndarray) -> Ranks:
    """Return where the targets stand in the lists of a predictions file.

    Items that share a leaf share its rank.

    Args:
        path: the predictions of one α.
        targets: the target of every row of the split.
    """
    table = pq.read_table(path, columns=["row_id", "rank", "item_ids"])
    row, items = table["row_id"].to_numpy(), table["item_ids"].combine_chunks()
    num_items = pc.list_value_length(items).to_numpy()

    # `line` has the table's line of each listed item, then of each one that is the row's target.
    line = np.repeat(np.arange(len(row)), num_items)
    line = line[items.flatten().to_numpy() == targets[row[line]]]
    rows = np.unique(row)
    place = np.searchsorted(rows, row[line])
    rank, credit = np.zeros(len(rows), np.int32), np.zeros(len(rows))
    rank[place] = table["rank"].to_numpy()[line]
    credit[place] = 1 / num_items[line]
    return Ranks(rows.astype(np.int32), rank, credit)


def row_groups(
    runs: Sequence[Run], dataset: InteractionDataset, trie: TokenTrie
) -> dict[str, RowGroups]:
    """Return `Study.rows` of a dataset.

    Raises:
        UsageError: the predictions of two runs are of different rows.
    """
    groups: dict[str, RowGroups] = {}
    leaf = np.asarray(trie.leaf_of_item)
    for lists, name in LISTS.items():
        ranked = [run for run in runs if lists in run.ranks]
        if not ranked:
            continue
        split, rows = dataset.splits[name], ranked[0].ranks[lists].row
        for run in ranked:
            if not np.array_equal(run.ranks[lists].row, rows):
                raise UsageError(
                    f"the predictions of {run.name} and {ranked[0].name} on {name} are of "
                    "different rows"
                )

        target = leaf[split.targets[rows]]
        frequency = np.bincount(leaf[split.targets], minlength=trie.num_nodes)
        groups[lists] = {
            "row": rows,
            "user": split.user_ids[rows].astype(np.int64),
            "head": metrics.head_share(frequency, target),
            "cold": trie.train_count[target] == 0,
            "history": np.diff(split.history_offsets)[rows].astype(np.int32),
        }
    return groups


def examples_of(
    runs: Sequence[Run], folders: Mapping[str, Path], dataset: InteractionDataset, number: int
) -> list[Json]:
    """Return lists side by side for rows of test.

    The rows are drawn at random among those whose target the methods rank differently. Of each
    method the run with the smallest seed is shown. A dataset with items without a title has no
    examples.
    """
    titles = [title for title in dataset.titles if title is not None]
    if len(titles) < len(dataset.titles):
        return []

    split, shown = dataset.splits["test"], []
    for backbone in dict.fromkeys(run.backbone for run in runs if not run.is_baseline):
        methods = first_by_method(runs, backbone)
        if len(methods) < 2:
            continue
        ranks = np.stack([run.ranks["test"].rank for run in methods.values()])
        rows = next(iter(methods.values())).ranks["test"].row[(ranks != ranks[0]).any(0)]
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:number])
        lists = {
            method: first_titles(folders[run.name], run.alpha, rows, titles)
            for method, run in methods.items()
        }

        for row in rows.tolist():
            shown.append(
                {
                    "dataset": runs[0].dataset,
                    "backbone": backbone,
                    "row": row,
                    "history": [titles[item] for item in split.history(row)],
                    "target": titles[split.targets[row]],
                    "lists": {method: by_row[row] for method, by_row in lists.items()},
                }
            )
    return shown


def first_by_method(runs: Sequence[Run], backbone: str) -> dict[str, Run]:
    """Return the tested run with the smallest seed of each method, in the table's order.

    These are the methods of a backbone and the baselines.
    """
    tested = [run for run in runs if "test" in run.ranks]
    tested = [run for run in tested if run.is_baseline or run.backbone == backbone]
    first: dict[str, Run] = {}
    for run in sorted(tested, key=lambda run: run.seed):
        first.setdefault(run.method, run)
    return {run.method: first[run.method] for run in runs if run.method in first}


def first_titles(
    run: Path, alpha: str | None, rows: np.ndarray, titles: Sequence[str]
) -> dict[int, list[str]]:
    """Return by row the titles of the first EXAMPLE_LENGTH items of a run's lists on test."""
    path = run / "eval" / "test" / f"predictions-alpha{alpha}.parquet"
    table = pq.read_table(path, columns=["row_id", "rank", "item_ids"])
    is_shown = pc.and_(
        pc.is_in(table["row_id"], pa.array(rows, pa.int64())),
        pc.less_equal(table["rank"], EXAMPLE_LENGTH),
    )
    table = table.filter(is_shown).sort_by([("row_id", "ascending"), ("rank", "ascending")])

    found: dict[int, list[str]] = {row: [] for row in rows.tolist()}
    for line in table.to_pylist():
        found[line["row_id"]].append(titles[line["item_ids"][0]])
    return found
