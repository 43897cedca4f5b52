"""A `Study`: the data of a report, independent of the runs it was read from.

`runs.read_runs` makes a study from run folders. `save` writes it as FOLDER/study.json and
FOLDER/ranks.parquet. From these two files the same report can be made again, without the runs and
their datasets. Letter in shapes: R evaluated rows of a split.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from igd_ds.baseline_config import BaselineConfig
from igd_ds.config.options import current_names
from igd_ds.errors import UsageError
from igd_ds.evaluation import metrics
from igd_ds.folders import write_table, write_text
from igd_ds.run_folder import FREE_ON_RESUME, with_defaults
from igd_ds.train_config import TrainConfig

Json = dict[str, Any]
"""A JSON object, such as a config.yaml or a metrics.json."""
Curves = dict[str, list[list[float]]]
"""Tag of the log → [[step, value], …]."""
RowGroups = dict[str, np.ndarray]
"""Properties of evaluated rows, each an array (R,); see `Study.rows`."""

REFERENCE = "uniform"
"""The method that the others are compared with by default: the unweighted loss."""
METRIC = "ndcg@10"
"""The metric that chooses β and α on validation and that the significance tests compare."""
NOT_BEGUN = ("waiting", "not run")
"""States of the rows of a sweep that have not started, and of those that are only listed."""
RECOMMENDERS = {
    "popularity": "popularity", "last-item-knn": "last-item kNN", "gru4rec": "GRU4Rec",
    "sasrec": "SASRec", "lrurec": "LRURec", "hstu": "HSTU",
}  # fmt: skip
SYMBOLS = {
    "igd_beta": "β", "position_floor": "b", "cft_lambda": "λ", "rank_tau": "τ",
    "frequency_beta": "b", "curriculum_c": "c", "curriculum_cT": "cT",
}  # fmt: skip

CROSS_ENTROPY = "cross-entropy"
"""The loss of a baseline whose name does not say its loss."""

# These settings do not change a method: a run's name, its hardware and its seed, and how all
# methods of a dataset are evaluated. The model is left out because the backbone's name stands for
# it.
NO_METHOD = FREE_ON_RESUME | {
    "seed",
    "exclude_seen",
    "ds_config",
    "model_config",
    "model_name_or_path",
    "tokenizer",
}
EVALUATION = (
    "exclude_seen", "search", "num_beams", "rows", "num_rows", "seed", "item_filter", "softmax",
    "temperature", "decoding_rule", "length_penalty", "popularity_prior", "guidance",
    "guidance_weight", "renormalise", "coverage",
)  # fmt: skip
"""Entries of metrics.json that tell the evaluations of a run apart."""
SELECTABLE = SYMBOLS.keys() - {"frequency_beta"}
"""The settings that the papers choose on validation."""
IGD = ("igd", "igd-linear")
"""The objectives that IGD's decoding belongs to."""
MATCHES = (
    "Item match: a hit on a token path that n items share counts 1/n. Token match, the measure of "
    "the papers, counts it in full."
)
AT_ALPHA = (
    "IGD is reported at the α that was best on each run's validation rows, every other method at "
    "α = 0 (plain search)."
)


class Ranks(NamedTuple):
    """The ranks of the evaluated rows' targets in a run's lists.

    `row` (R,) int32 holds the row ids, ascending. `rank` (R,) int32 holds the rank of each row's
    target, from 1, or 0 where the list does not contain it. `credit` (R,) float64 is the share of
    the hit that counts in item match: 1 / n if n items share the rank, 0 without a hit.
    """

    row: np.ndarray
    rank: np.ndarray
    credit: np.ndarray


@dataclass(frozen=True)
class Run:
    """One run folder, or a row of a sweep that was never started.

    `state` is "finished", "no test" (a candidate that validation did not choose), "unfinished",
    "failed", or one of NOT_BEGUN. `note` says what is missing and why; it is empty where nothing is
    missing. `settings` is the config.yaml. `valid`, `test` and `exact` are the metrics.json of
    eval/valid, eval/test and eval/test-exact, or None where the file does not exist. `other_tests`
    has the further evaluations of the test rows, by the name of their folder below eval/: of each
    metrics.json the entries of EVALUATION and the headline measures by α, or `problem`, the reason
    why it cannot be used.
    """

    name: str
    dataset: str
    backbone: str
    method: str
    group: str  # the name without the seed: the runs of a group differ only in their seed
    seed: int
    state: str
    note: str = ""
    family: str = ""  # a key that is equal for the candidates of one choice on validation
    settings: Json = field(default_factory=dict)
    valid: Json | None = None
    test: Json | None = None
    exact: Json | None = None
    curves: Curves = field(default_factory=dict)  # see `runs.thinned`
    seconds: float | None = None  # wall time of the training
    eval_seconds: float | None = None  # wall time of the searches of all its evaluations
    rank_seconds: float | None = None  # both, times the number of ranks; None where unknown
    world_size: int | None = None
    command: str = ""  # that began the training
    protocol: str = ""  # how the dataset was split
    other_tests: dict[str, Json] = field(default_factory=dict)
    ranks: dict[str, Ranks] = field(default_factory=dict)  # of "valid", "test", "exact"; `alpha_of`

    @property
    def is_complete(self) -> bool:
        """Whether the run is complete, so that its figures may be averaged with others."""
        return self.state in ("finished", "no test")

    @property
    def is_baseline(self) -> bool:
        """Whether the run is a baseline: popularity, kNN or a sequential recommender."""
        return "recommender" in self.settings

    @property
    def objective(self) -> str | None:
        """The objective that the run was trained with; None for a baseline."""
        return objective_of(self.settings)

    @property
    def alpha(self) -> str | None:
        """The α that the run is reported at (`reported_alpha`); None without a validation."""
        return reported_alpha(self.settings, self.valid) if self.valid else None

    def alpha_of(self, lists: str) -> str | None:
        """Return the α that the lists of "valid", "test" or "exact" are reported at.

        It is `alpha` or, where the exact search was not made at this α, the smallest one.
        """
        searched = self.exact["alpha"] if lists == "exact" and self.exact else {}
        if searched and self.alpha not in searched:
            return min(searched, key=float)
        return self.alpha

    @property
    def best_alpha(self) -> str | None:
        """The α that was best on validation, for any method; None without a validation."""
        return metrics.best_alpha(self.valid, METRIC) if self.valid else None


@dataclass(frozen=True, eq=False)  # hashed by identity, so that results about it can be cached
class Study:
    """The runs that are reported together, in the order of their table.

    Attributes:
        name: title of the report.
        budget: free text on what was fixed before the first run.
        runs: all runs, complete or not.
        catalogues: for each dataset the statistics of `igd stats`, with `purity_gain_by_token`
            (descending, thinned) and `quantizer` (or None). A dataset that only baselines were
            trained on has its `kind`, `items` and rows alone.
        rows: for each dataset the properties of the rows of "valid", "test" and "exact" (the test
            rows that were searched exactly), arrays (R,): `row` int32 ascending, `user` int64,
            `head` float64 (`metrics.head_share`), `cold` bool, `history` int32 (number of items).
        examples: lists side by side. Each has `dataset`, `backbone`, `row`, `history` and `target`
            (titles) and, by method, `lists` of titles, best first.
        environment: versions and hardware, and the `command` that made the report.
        reference: the method that the others are compared with, in each backbone its own, or a
            baseline. Files store it under the key `baseline`.
        published: the numbers of others that the ledger shows, see `ledger.read_published`.
    """

    name: str
    budget: str
    runs: list[Run]
    catalogues: dict[str, Json] = field(default_factory=dict)
    rows: dict[str, dict[str, RowGroups]] = field(default_factory=dict)
    examples: list[Json] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    reference: str = REFERENCE
    published: list[Json] = field(default_factory=list)


def objective_of(settings: Json) -> str | None:
    """Return the objective of a config.yaml, also under its former key; None for a baseline."""
    objective: str | None = current_names(TrainConfig, settings).get("objective")
    return objective


def method_of(settings: Json) -> str:
    """Return the name of a config.yaml's method: its objective with β or τ, or its recommender.

    Raises:
        KeyError: the settings name neither an objective nor a recommender.
    """
    if "recommender" in settings:
        recommender: str = settings["recommender"]
        name = RECOMMENDERS.get(recommender, recommender)
        loss = settings.get("loss", CROSS_ENTROPY)
        return name if loss == CROSS_ENTROPY else f"{name}, {loss}"

    objective = objective_of(settings)
    if objective is None:
        raise KeyError("objective")
    if objective in IGD:
        return f"{objective} β={settings['igd_beta']:g}"
    if objective == "rank":
        return f"{objective} τ={settings['rank_tau']:g}"
    return f"{objective} + curriculum" if has_curriculum(settings) else objective


def has_curriculum(settings: Json) -> bool:
    """Return whether a config.yaml sets the speed of a curriculum."""
    return settings.get("curriculum_c") is not None or settings.get("curriculum_cT") is not None


def reported_alpha(settings: Json, valid: Json) -> str:
    """Return the α that a run is reported at, as metrics.json writes it.

    It is the best one on validation for IGD, and 0 for every other method.
    """
    return metrics.best_alpha(valid, METRIC) if objective_of(settings) in IGD else "0.0"


def method_names(many: Sequence[Json]) -> list[str]:
    """Return a method name for each config.yaml of one dataset and backbone.

    The name is `method_of`. Where two settings have the same method, the settings in which they
    differ follow as name=value.
    """
    methods = [method_of(settings) for settings in many]
    many = [complete(settings) for settings in many]
    for method in set(methods):
        indices = [i for i, other in enumerate(methods) if other == method]
        keys = sorted({key for i in indices for key in many[i]} - NO_METHOD)
        differing = [key for key in keys if len({repr(many[i].get(key)) for i in indices}) > 1]

        for i in indices:
            values = {
                SYMBOLS.get(key, key): many[i][key]
                for key in differing
                if many[i].get(key) is not None
            }
            shown = [
                f" {name}={value:g}" if isinstance(value, float) else f" {name}={value}"
                for name, value in values.items()
            ]
            methods[i] += "".join(shown)
    return methods


def complete(settings: Json) -> Json:
    """Return a config.yaml in which settings that are newer than its run have their defaults."""
    return with_defaults(BaselineConfig if "recommender" in settings else TrainConfig, settings)


def family_of(settings: Json) -> str:
    """Return a key that is equal for the candidates of one choice on validation (no sweep)."""
    kept = {
        key: value
        for key, value in complete(settings).items()
        if key not in NO_METHOD | SELECTABLE and value is not None
    }
    return json.dumps(kept | {"curriculum": has_curriculum(settings)}, sort_keys=True)


def lines_by(runs: Sequence[Run], setting: str) -> dict[str, dict[float, list[Run]]]:
    """Return the runs by line and by the setting's value, ascending.

    The runs of a line differ only in the setting and the seed. The name of a line is its method
    without the setting. Lines with a single value are left out.
    """
    lines: dict[str, dict[float, list[Run]]] = {}
    having = [run for run in runs if run.settings.get(setting) is not None]
    for run in sorted(having, key=lambda run: float(run.settings[setting])):
        line = re.sub(rf" {SYMBOLS[setting]}=\S+", "", run.method)
        lines.setdefault(line, {}).setdefault(run.settings[setting], []).append(run)
    return {line: by_value for line, by_value in sorted(lines.items()) if len(by_value) > 1}


# What a field of `Study` is called in study.json, where that is another name.
STORED = {"reference": "baseline"}
NEWER = ("published", "command", "protocol", "other_tests")
"""Fields that study.json leaves out where they are empty, as before there were such fields."""


def save(study: Study, folder: Path) -> None:
    """Write FOLDER/study.json and FOLDER/ranks.parquet; equal studies give equal bytes.

    The Parquet file has one line per dataset, split and row: the row's groups, and in the columns
    `rank of NAME` and `credit of NAME` the target's place in the lists of the run NAME (see Ranks).
    `split` is a key of `Run.ranks`, so that exact lists of test have "exact".
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        STORED.get(f.name, f.name): getattr(study, f.name)
        for f in fields(Study)
        if f.name not in ("rows", "runs") and is_stored(study, f.name)
    }
    stored["runs"] = [
        {
            f.name: getattr(run, f.name)
            for f in fields(Run)
            if f.name != "ranks" and is_stored(run, f.name)
        }
        for run in study.runs
    ]

    tables = []
    for dataset, splits in study.rows.items():
        for split, groups in splits.items():
            ranked = [run for run in study.runs if run.dataset == dataset and split in run.ranks]
            columns = dict(groups)
            for run in ranked:
                columns[f"rank of {run.name}"] = run.ranks[split].rank
                columns[f"credit of {run.name}"] = run.ranks[split].credit
            where = {
                "dataset": [dataset] * len(groups["row"]),
                "split": [split] * len(groups["row"]),
            }
            tables.append(pa.table(where | columns))

    empty = pa.table({"dataset": pa.array([], pa.string()), "split": pa.array([], pa.string())})
    together = pa.concat_tables([empty, *tables], promote_options="default")
    write_table(folder / "ranks.parquet", together)
    write_text(folder / "study.json", json.dumps(stored, ensure_ascii=False) + "\n")


def is_stored(thing: Study | Run, name: str) -> bool:
    """Return whether study.json has a field of a study or a run (see NEWER)."""
    return name not in NEWER or bool(getattr(thing, name))


def load(folder: Path) -> Study:
    """Read a study that `save` wrote.

    Raises:
        UsageError: a file is missing, damaged, or was written by another version.
    """
    study, ranks = folder / "study.json", folder / "ranks.parquet"
    if not (study.is_file() and ranks.is_file()):
        raise UsageError(
            f"{folder} holds no study (study.json and ranks.parquet); "
            "give the folder data of a report"
        )

    stored = _read(study, lambda path: json.loads(path.read_text(encoding="utf-8")))
    table = _read(ranks, pq.read_table)
    try:
        return _study(stored, table)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{folder} is damaged or was written by another version ({error!r}); "
            "make the report from its runs again"
        ) from error


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """Return the result of `reader` for a file; raise UsageError where it cannot read it."""
    try:
        return reader(path)
    except (ValueError, OSError) as error:  # pyarrow raises either
        raise UsageError(
            f"{path} is damaged ({error}); make the report from its runs again"
        ) from error


def _study(stored: Json, table: pa.Table) -> Study:
    """Return the study from the JSON object and the table that `save` wrote."""
    rows: dict[str, dict[str, RowGroups]] = {}
    ranks: dict[str, dict[str, Ranks]] = {run["name"]: {} for run in stored["runs"]}
    parts = dict.fromkeys(
        zip(table["dataset"].to_pylist(), table["split"].to_pylist(), strict=True)
    )
    for dataset, split in parts:
        part = table.filter(
            pc.and_(pc.equal(table["dataset"], dataset), pc.equal(table["split"], split))
        )
        groups = {
            name: part[name].to_numpy() for name in ("row", "user", "head", "cold", "history")
        }
        rows.setdefault(dataset, {})[split] = groups
        for name, by_split in ranks.items():
            column = part[f"rank of {name}"] if f"rank of {name}" in part.column_names else None
            if column is not None and not column.null_count:
                credit = part[f"credit of {name}"].to_numpy()
                by_split[split] = Ranks(groups["row"], column.to_numpy(), credit)

    names = {key: name for name, key in STORED.items()}
    values = {names.get(name, name): value for name, value in stored.items() if name != "runs"}
    runs = [Run(**run, ranks=ranks[run["name"]]) for run in stored["runs"]]
    return Study(**values, runs=runs, rows=rows)
