"""A `Study`: all that tables and figures are made of, and nothing else of the runs. `folders.read_runs` makes one.

`save` keeps it as FOLDER/study.json and FOLDER/ranks.parquet: from these two the same report can be made again, byte for byte,
without the runs and their datasets. Letter in shapes: R evaluated rows of a split.
"""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from igd_ds.errors import UsageError
from igd_ds.evaluation import metrics
from igd_ds.evaluation.results import write_table
from igd_ds.folders import write_text
from igd_ds.runlog import FREE_ON_RESUME

BASELINE = (
    "uniform"  # what methods are held against, unless the study says otherwise: the plain loss
)
METRIC = "ndcg@10"  # chooses β and α on validation, and is what is tested
NOT_BEGUN = (
    "waiting",
    "not run",
)  # rows of a sweep whose turn has not come, and those that it only lists
RECOMMENDERS = {
    "popularity": "popularity", "last-item-knn": "last-item kNN", "gru4rec": "GRU4Rec", "sasrec": "SASRec", "lrurec": "LRURec",
}  # fmt: skip
SYMBOLS = {
    "igd_beta": "β", "position_floor": "b", "cft_lambda": "λ", "rank_tau": "τ", "frequency_beta": "b", "curriculum_c": "c",
    "curriculum_cT": "cT",
}  # fmt: skip
# Settings that make no other method: what a run is called, where it runs, its seed; the model is the backbone's name.
NO_METHOD = FREE_ON_RESUME | {
    "seed",
    "ds_config",
    "model_config",
    "model_name_or_path",
    "tokenizer",
}
SELECTABLE = SYMBOLS.keys() - {"frequency_beta"}  # what the papers let validation choose
IGD = ("igd", "igd-linear")  # the weightings that IGD's decoding belongs to
AT_ALPHA = "IGD's lists are at the α that was best on each run's validation, all others' at α = 0 (plain beam search)."


@dataclass(frozen=True)
class Run:
    """One run folder, or a row of a sweep that was never started.

    `state` is "finished", "no test" (a candidate that validation did not choose), "unfinished", "failed", or in NOT_BEGUN. `note`
    says what is missing and why, and is empty where nothing is. `settings` is config.yaml; `valid`, `test` and `exact` are the
    metrics.json of eval/valid, eval/test and eval/test-exact, None where there is none.
    """

    name: str
    dataset: str
    backbone: str
    method: str
    group: str  # name without the seed: the runs of a group differ in their seed only
    seed: int
    state: str
    note: str = ""
    family: str = ""  # equal for the runs that validation chooses among
    settings: dict = field(default_factory=dict)
    valid: dict | None = None
    test: dict | None = None
    exact: dict | None = None
    curves: dict[str, list] = field(default_factory=dict)  # tag → [[step, value], …], see `thinned`
    seconds: float | None = None  # wall time of the training
    eval_seconds: float | None = None  # of its evaluations' searches, all together
    rank_seconds: float | None = (
        None  # both, each times its ranks; None where their number is not known
    )
    world_size: int | None = None
    # "valid" and "test" → ids (R,) of the rows and rank (R,) of their target, 1 … K or 0 (not listed), int32, at `alpha`.
    ranks: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether its figures may be averaged with others'."""
        return self.state in ("finished", "no test")

    @property
    def is_baseline(self) -> bool:
        """Whether it is a recommender that does not generate: popularity, kNN, the sequential ones."""
        return "recommender" in self.settings

    @property
    def alpha(self) -> str | None:
        """The α it is reported at, see `reported_alpha`; None without a validation."""
        return reported_alpha(self.settings, self.valid) if self.valid else None

    @property
    def best_alpha(self) -> str | None:
        """The α that was best on validation, whatever the method; None without a validation."""
        return metrics.best_alpha(self.valid, METRIC) if self.valid else None


@dataclass(
    frozen=True, eq=False
)  # compared and hashed by identity: what is computed of one can be cached
class Study:
    """Runs that are reported together, in the order of their table.

    `catalogues` has each dataset's object of `igd_ds.commands.stats`, and its `purity_gain_by_token` (descending, thinned) and `quantizer`
    (or None). `rows` has, by dataset and split, what is known of the rows whoever ranks for them, arrays (R,): `row` int32
    ascending, `user` int64, `head` float64 (`metrics.head_share`), `cold` bool, `history` int32 (items). An example is a dict of
    `dataset`, `backbone`, `row`, `history` and `target` (titles) and, by method, `lists` of titles, best first. `baseline` is the
    method that the others are held against: of each backbone its own, or a recommender that does not generate.
    """

    name: str
    budget: str
    runs: list[Run]
    catalogues: dict[str, dict] = field(default_factory=dict)
    rows: dict[str, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)
    examples: list[dict] = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    baseline: str = BASELINE


def method_of(settings: dict) -> str:
    """Return the name of a config.yaml's method: its weighting with β or τ, or the recommender's name."""
    if "recommender" in settings:
        return RECOMMENDERS.get(settings["recommender"], settings["recommender"])
    weighting = settings["weighting"]
    if weighting in ("igd", "igd-linear"):
        return f"{weighting} β={settings['igd_beta']:g}"
    if weighting == "rank":
        return f"{weighting} τ={settings['rank_tau']:g}"
    return f"{weighting} + curriculum" if has_curriculum(settings) else weighting


def has_curriculum(settings: dict) -> bool:
    """Return whether a config.yaml gives the speed of a curriculum."""
    return settings.get("curriculum_c") is not None or settings.get("curriculum_cT") is not None


def reported_alpha(settings: dict, valid: dict) -> str:
    """Return the α that a run is reported at, as metrics.json writes it: for IGD the best one on validation, else 0."""
    return metrics.best_alpha(valid, METRIC) if settings.get("weighting") in IGD else "0.0"


def labels(many: list[dict]) -> list[str]:
    """Return `method_of` of each config.yaml of one dataset and backbone; where two agree, what differs follows as name=value."""
    methods = [method_of(settings) for settings in many]
    for method in set(methods):
        places = [i for i, other in enumerate(methods) if other == method]
        keys = sorted({key for i in places for key in many[i]} - NO_METHOD)
        differing = [key for key in keys if len({repr(many[i].get(key)) for i in places}) > 1]
        for i in places:
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


def family_of(settings: dict) -> str:
    """Return, of a config.yaml outside of sweeps, what is equal for the runs that validation chooses among."""
    kept = {
        key: value
        for key, value in settings.items()
        if key not in NO_METHOD | SELECTABLE and value is not None
    }
    return json.dumps(kept | {"curriculum": has_curriculum(settings)}, sort_keys=True)


def lines_by(runs: list[Run], setting: str) -> dict[str, dict[float, list[Run]]]:
    """Return the runs by line, named as their label without the setting, and by its value, ascending.

    The runs of a line differ in the setting and the seed alone. Lines of one value are left out.
    """
    lines = {}
    for run in sorted(
        (run for run in runs if run.settings.get(setting) is not None),
        key=lambda run: run.settings[setting],
    ):
        line = re.sub(rf" {SYMBOLS[setting]}=\S+", "", run.method)
        lines.setdefault(line, {}).setdefault(run.settings[setting], []).append(run)
    return {line: by_value for line, by_value in sorted(lines.items()) if len(by_value) > 1}


def save(study: Study, folder: Path) -> None:
    """Write FOLDER/study.json and FOLDER/ranks.parquet; equal studies give equal bytes.

    The Parquet file has a line per dataset, split and row: the row's groups, and in `rank of NAME` what the run NAME gives.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        f.name: getattr(study, f.name) for f in fields(Study) if f.name not in ("rows", "runs")
    }
    plain["runs"] = [
        {f.name: getattr(run, f.name) for f in fields(Run) if f.name != "ranks"}
        for run in study.runs
    ]
    tables = []
    for dataset, splits in study.rows.items():
        for split, groups in splits.items():
            ranked = [run for run in study.runs if run.dataset == dataset and split in run.ranks]
            columns = groups | {f"rank of {run.name}": run.ranks[split][1] for run in ranked}
            where = {
                "dataset": [dataset] * len(groups["row"]),
                "split": [split] * len(groups["row"]),
            }
            tables.append(pa.table(where | columns))
    empty = pa.table({"dataset": pa.array([], pa.string()), "split": pa.array([], pa.string())})
    write_table(
        folder / "ranks.parquet", pa.concat_tables([empty, *tables], promote_options="default")
    )
    write_text(folder / "study.json", json.dumps(plain, ensure_ascii=False) + "\n")


def load(folder: Path) -> Study:
    """Read what `save` wrote. Raises ValueError if it is not there, damaged, or of another version."""
    parts = {
        Path(folder) / "study.json": lambda path: json.loads(path.read_text()),
        Path(folder) / "ranks.parquet": pq.read_table,
    }
    if not all(path.is_file() for path in parts):
        raise UsageError(
            f"{folder} holds no study: study.json and ranks.parquet, which igd report leaves in DIR/data"
        )
    read = []
    for path, reader in parts.items():
        try:
            read.append(reader(path))
        except (ValueError, OSError) as error:  # pyarrow raises either
            raise UsageError(
                f"{path} is damaged ({error}): make the report from its runs again"
            ) from error
    try:
        return _study(*read)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{folder}: damaged, or of another version ({error!r}): make the report from its runs again"
        ) from error


def _study(plain: dict, table: pa.Table) -> Study:
    """Put together what `save` took apart."""
    rows, ranks = {}, {run["name"]: {} for run in plain["runs"]}
    for dataset, split in dict.fromkeys(
        zip(table["dataset"].to_pylist(), table["split"].to_pylist(), strict=True)
    ):
        part = table.filter(
            pc.and_(pc.equal(table["dataset"], dataset), pc.equal(table["split"], split))
        )
        rows.setdefault(dataset, {})[split] = {
            name: part[name].to_numpy() for name in ("row", "user", "head", "cold", "history")
        }
        for name in ranks:
            column = part[f"rank of {name}"] if f"rank of {name}" in part.column_names else None
            if column is not None and not column.null_count:
                ranks[name][split] = (rows[dataset][split]["row"], column.to_numpy())
    return Study(
        **plain
        | {"runs": [Run(**run, ranks=ranks[run["name"]]) for run in plain["runs"]], "rows": rows}
    )
