"""A table of runs → rows, and the papers' rule that chooses among them. Reads the table alone, no run folder, no dataset.

A table is YAML. Every list in an entry of `runs` is expanded, with every other list of that entry:

    name: books                      # of the sweep
    budget: 8,000 users, 2 epochs    # free text for the report: what was fixed before the first run
    datasets: {books-small: data/books-small}
    backbones:                       # settings of igd_ds/train.py under a name
      qwen2-1m: {model_config: tools/models/qwen2-1m.json, tokenizer: "data/{dataset}-tokenizer"}
    defaults: {ds_config: ds_configs/zero1-fp32.json, epochs: 2, position_floor: 0.2}   # of igd_ds/train.py
    evaluation: {num_beams: 10, alpha: [0, 0.1, 0.2]}   # of igd_ds/eval.py
    exact: {num_rows: 500}           # where given, an exact search of the test rows too: what differs from the beam's
    baseline: {epochs: 50}           # of igd_ds/baseline.py
    select: [igd_beta]               # what validation chooses; rows that differ in anything else are compared
    runs:
      - {dataset: books-small, backbone: qwen2-1m, weighting: igd, igd_beta: [0.1, 0.3], seed: [0, 1, 2]}
      - {dataset: books-small, recommender: [sasrec, lrurec], seed: [0, 1, 2]}
      - {dataset: books-small, backbone: llama3-8b, weighting: uniform, seed: 0, run: false}

An entry's own setting wins over its backbone's, and that over `defaults`; `evaluation` and `exact` are merged in the same way
from table, backbone and entry. A report compares the rows of a dataset, so they must agree in num_beams, num_rows and seed of the
evaluation; baselines take these, and item_kind, from the dataset's other rows. `{dataset}` in a text stands for the dataset's
name, and in an evaluation `{split}` for valid or test. What one weighting or recommender alone uses (here position_floor) may
stand among what rows share: others pass it over. `run: false` keeps rows in the table and the report that are not run: rows that
need other hardware, or a candidate that failed and shall not hold up its family's choice.

A row is named DATASET-BACKBONE-WEIGHTING-…-seedN or DATASET-RECOMMENDER-…-seedN, with the entry's own settings between, so that
names stay when the table grows. Rows of a *group* differ in the seed alone, rows of a *family* in the seed and in what is
selected: validation chooses one group of each family.
"""

import dataclasses
import difflib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from statistics import fmean

import yaml

from igd_ds.config.options import EvalConfig, TrainConfig, checked
from igd_ds.errors import UsageError
from igd_ds.objectives import WEIGHTINGS, check_flags
from igd_ds.studies.report.study import has_curriculum

LIST_LENGTH = 10
METRIC = f"ndcg@{LIST_LENGTH}"  # chooses the group, on validation at α = 0; eval.py --alpha_from chooses α by it too
TABLE_KEYS = dict.fromkeys(
    ("datasets", "backbones", "defaults", "evaluation", "exact", "baseline"), dict
)
TABLE_KEYS |= {"name": str, "budget": str, "select": list, "runs": list}
REQUIRED = ("name", "datasets", "runs")
KINDS = {str: "a text", dict: "'name: value' lines", list: "a list"}
EVALUATIONS = ("evaluation", "exact")
NOT_EXPANDED = (*EVALUATIONS, "run")  # keys of an entry that hold no list to expand
SWEEPS_OWN = {
    "dataset",
    "output_dir",
    "resume",
    "splits",
}  # what the sweep itself gives train.py and baseline.py …
EVALUATIONS_OWN = {"model", "dataset", "output_dir", "split", "alpha_from"}  # … and eval.py
ALIKE = {
    "num_beams": "num_beams",
    "num_rows": "num_rows",
    "seed": "rows_seed",
}  # of eval.py: of baseline.py
WEIGHTING_SETTINGS = {
    name for weighting in WEIGHTINGS.values() for name in weighting.flags + weighting.optional
}


@dataclass(frozen=True)
class Row:
    """One run: `settings` of train.py or, where they name a recommender, of baseline.py; `evaluation` of eval.py."""

    name: str  # folder below RUNS
    group: str  # name without the seed
    family: tuple  # what its rows have in common
    dataset: str
    backbone: str  # "" of a baseline
    seed: int
    settings: dict
    config: object  # TrainConfig or BaselineConfig: the settings with all defaults
    evaluation: dict
    exact: (
        dict | None
    )  # the evaluation's settings with those of the exact search; None: there is none
    run: bool

    @property
    def is_baseline(self) -> bool:
        """Whether the row is a run of baseline.py."""
        return "recommender" in self.settings

    @property
    def alike(self) -> dict[str, dict[str, int]]:
        """What the report wants equal in all rows of a dataset (ALIKE), of `evaluation` and, where there is one, of `exact`."""
        if self.is_baseline:
            return {
                "evaluation": {
                    name: getattr(self.config, of_baseline) for name, of_baseline in ALIKE.items()
                }
            }
        blocks = {
            block: values for block in EVALUATIONS if (values := getattr(self, block)) is not None
        }
        return {
            block: {name: resolved(values)[name] for name in ALIKE}
            for block, values in blocks.items()
        }

    def check_inputs(self) -> None:
        """Raise ValueError, before anything starts, for a dataset or file that is not there and for settings that do not fit."""
        if not (Path(self.settings["dataset"]) / "dataset.json").is_file():
            raise UsageError(
                f"{self.name}: no dataset at {self.settings['dataset']}; igd prepare makes one"
            )
        for name in ("ds_config", "model_config"):
            if (path := self.settings.get(name)) and not Path(path).exists():
                raise UsageError(f"{self.name}: {name}: no file {path}")
        if not self.is_baseline:
            try:
                check_flags(self.config)
            except ValueError as error:
                raise UsageError(f"{self.name}: {error}") from None


@dataclass(frozen=True)
class Table:
    """A table's rows, in its order, and what it says about all of them."""

    path: str
    name: str
    budget: str
    select: list[str]
    rows: list[Row]

    @property
    def to_run(self) -> list[Row]:
        """Rows that are run: what --row and a SLURM array count, from 0."""
        return [row for row in self.rows if row.run]

    def choose(self, scores: dict[str, float | None]) -> dict[str, bool | None]:
        """Return, for every row that is run, whether validation chose its group: the best mean score over the seeds.

        Args:
            scores: by row name, METRIC on validation at α = 0, None for a row without (not finished, or failed).

        None: undecided, because some row of the family has no score. Of equal means the first in the table wins. Where a family
        has one group there is nothing to choose, and a row is decided by its own score.
        """
        families = defaultdict(lambda: defaultdict(list))
        for row in self.to_run:
            families[row.family][row.group].append(scores[row.name])
        chosen = {}
        for row in self.to_run:
            groups = families[row.family]
            if None in (
                itertools.chain(*groups.values()) if len(groups) > 1 else [scores[row.name]]
            ):
                chosen[row.name] = None
            else:
                chosen[row.name] = len(groups) == 1 or row.group == max(
                    groups, key=lambda group: fmean(groups[group])
                )
        return chosen


def read_table(path: str) -> Table:
    """Read and expand a table. Raises ValueError that names table, entry and key for whatever is wrong with it."""
    table = _load(path)
    table["defaults"] = _settings(TrainConfig, table["defaults"], f"{path}: defaults")
    table |= _evaluation_blocks(table, path)
    if table["baseline"]:
        table["baseline"] = _settings(_baseline_config(), table["baseline"], f"{path}: baseline")
    for name, backbone in table["backbones"].items():
        table["backbones"][name] = _backbone(backbone, f"{path}: backbone {name}")
    selectable = _names(TrainConfig)
    if any("recommender" in entry for entry in table["runs"]):
        selectable += _names(_baseline_config())
    _refuse_unknown(
        table["select"],
        [name for name in selectable if name not in {"seed", *SWEEPS_OWN}],
        f"{path}: select",
        "setting",
    )
    expanded, table["first"] = {}, {}
    entries = sorted(enumerate(table["runs"], 1), key=lambda numbered: "recommender" in numbered[1])
    for (
        number,
        entry,
    ) in entries:  # baselines last: they are evaluated as the dataset's other rows are
        expanded[number] = list(_rows_of(entry, f"{path}: run {number}", table))
        for row in expanded[number]:
            table["first"].setdefault(row.dataset, row)
    rows = [row for number in sorted(expanded) for row in expanded[number]]
    _check_names(path, rows)
    _check_alike(path, rows)
    return Table(path, table["name"], table["budget"], table["select"], rows)


def _load(path: str) -> dict:
    """Return the table with all of TABLE_KEYS, of the right kinds."""
    if not Path(path).is_file():
        raise UsageError(f"no table {path}")
    try:
        table = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(table, dict):
        raise UsageError(f"{path}: expected the keys {', '.join(TABLE_KEYS)}")
    _refuse_unknown(table, TABLE_KEYS, path, "key")
    for key, kind in TABLE_KEYS.items():
        value = table.get(key, kind())
        if not isinstance(value, kind) or (key in REQUIRED and not value):
            raise UsageError(f"{path}: {key}: expected {KINDS[kind]}, found {value!r}")
    table = {key: kind() for key, kind in TABLE_KEYS.items() if key not in EVALUATIONS} | table
    for key in ("datasets", "backbones"):
        if bad := [
            name
            for name in table[key]
            if not (isinstance(name, str) and re.fullmatch(r"[\w.+-]+", name))
        ]:
            raise UsageError(
                f"{path}: {key}: {bad[0]!r} becomes part of folder names: use letters, digits and . + - _; quote a number"
            )
    if bad := [name for name, folder in table["datasets"].items() if not isinstance(folder, str)]:
        raise UsageError(
            f"{path}: datasets: {bad[0]}: expected a folder, found {table['datasets'][bad[0]]!r}"
        )
    for number, entry in enumerate(table["runs"], 1):
        if not isinstance(entry, dict):
            raise UsageError(
                f"{path}: run {number}: expected 'setting: value' lines, found {entry!r}"
            )
    return table


def _names(cls) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _with_preset(config):
    from igd_ds.baseline import with_preset

    return with_preset(config)


def _baseline_config():
    from igd_ds.baseline import BaselineConfig  # only for tables with baselines

    return BaselineConfig


def _foreign_settings(recommender: str) -> set[str]:
    """Return the settings of baseline.py that other recommenders have and this one has not."""
    from igd_ds.baselines.sequential import SEQUENTIAL

    of_models = {
        field.name for field in dataclasses.fields(_baseline_config()) if field.default is None
    }
    if recommender not in SEQUENTIAL:  # it only counts
        return of_models | {"loss"}
    return of_models - {
        *SEQUENTIAL[recommender].form,
        *SEQUENTIAL[recommender].training,
        "num_negatives",
    }


def _refuse_unknown(names: Iterable, known: Iterable[str], where: str, what: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise UsageError(
                f"{where}: unknown {what} {name!r}"
                + (f", did you mean '{near[0]}'?" if near else "")
            )


def _settings(cls, values, where: str) -> dict:
    """Return the settings of a block as the types that `cls` declares; ValueError for what it does not know or the sweep sets."""
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected settings, found {values!r}")
    own = EVALUATIONS_OWN if cls is EvalConfig else SWEEPS_OWN
    if taken := [name for name in values if name in own]:
        raise UsageError(
            f"{where}: '{taken[0]}' is what the sweep itself sets, row by row: leave it out"
        )
    return {name: checked(cls, str(name), value, where) for name, value in values.items()}


def _backbone(values, where: str) -> dict:
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected settings of train.py, found {values!r}")
    training = {name: value for name, value in values.items() if name not in EVALUATIONS}
    return _settings(TrainConfig, training, where) | _evaluation_blocks(values, where)


def _evaluation_blocks(values: dict, where: str) -> dict:
    return {
        block: _settings(EvalConfig, values[block], f"{where}: {block}")
        for block in EVALUATIONS
        if block in values
    }


def _rows_of(entry: dict, where: str, table: dict) -> Iterator[Row]:
    """Expand an entry: one row for every choice of a value from each of its lists."""
    is_baseline = "recommender" in entry
    if is_baseline == ("backbone" in entry):
        raise UsageError(
            f"{where}: give either 'backbone' (a run of train.py) or 'recommender' (a run of baseline.py)"
        )
    cls = _baseline_config() if is_baseline else TrainConfig
    required = ("dataset", "seed") if is_baseline else ("dataset", "seed", "weighting")
    if missing := [name for name in required if name not in entry]:
        raise UsageError(f"{where}: '{missing[0]}' is missing: every row names it")
    of_the_table = ["run"] if is_baseline else ["backbone", "run", *EVALUATIONS]
    _refuse_unknown(entry, [*_names(cls), *of_the_table], where, "setting")
    if type(run := entry.get("run", True)) is not bool:
        raise UsageError(f"{where}: 'run' is true or false, found {run!r}")
    axes = {
        name: value if isinstance(value, list) else [value]
        for name, value in entry.items()
        if name not in NOT_EXPANDED
    }
    if empty := [name for name, values in axes.items() if not values]:
        raise UsageError(f"{where}: the list of '{empty[0]}' is empty")
    for values in itertools.product(*axes.values()):
        yield _row(dict(zip(axes, values, strict=True)), entry, where, table, cls)


def _row(point: dict, entry: dict, where: str, table: dict, cls) -> Row:
    """Make one row of an expanded entry: `point` has one value of each of its lists."""
    dataset, backbone = point.pop("dataset"), point.pop("backbone", "")
    _refuse_unknown([dataset], table["datasets"], f"{where}: dataset", "name")
    own = _settings(cls, point, where)
    if cls is TrainConfig:
        shared, evaluation, exact = _shared(own["weighting"], backbone, entry, where, table)
        words = [dataset, backbone, own["weighting"]]
    else:
        shared = _evaluated_like(table["first"].get(dataset), table) | table["baseline"]
        foreign = _foreign_settings(own["recommender"])
        shared = {name: value for name, value in shared.items() if name not in foreign}
        evaluation, exact, words = {}, None, [dataset, own["recommender"]]
    settings = shared | own | {"dataset": table["datasets"][dataset]}
    settings, evaluation, exact = (
        filled(values, "dataset", dataset) for values in (settings, evaluation, exact)
    )
    config = _build(cls, settings | {"output_dir": ""}, where)
    config = (
        config if cls is TrainConfig else _with_preset(config)
    )  # as the run's config.yaml has it
    every = dataclasses.asdict(config)
    compared = {
        name: value for name, value in every.items() if name not in ("seed", *table["select"])
    }
    compared["curriculum"] = has_curriculum(
        every
    )  # its speed may be selected; with and without one are two methods
    family = (dataset, backbone, repr(compared), repr(evaluation))
    words += [
        f"{name}{_in_name(value)}"
        for name, value in own.items()
        if name not in ("weighting", "recommender", "seed")
    ]
    group, seed, run = "-".join(words), own["seed"], entry.get("run", True)
    return Row(
        f"{group}-seed{seed}",
        group,
        family,
        dataset,
        backbone,
        seed,
        settings,
        config,
        evaluation,
        exact,
        run,
    )


def _shared(
    weighting: str, backbone: str, entry: dict, where: str, table: dict
) -> tuple[dict, dict, dict | None]:
    """Return what a run of train.py has from defaults and backbone, its evaluation, and its exact search's or None."""
    _refuse_unknown([backbone], table["backbones"], f"{where}: backbone", "name")
    _refuse_unknown([weighting], WEIGHTINGS, f"{where}: weighting", "name")
    levels = (table, table["backbones"][backbone], _evaluation_blocks(entry, where))
    unused = WEIGHTING_SETTINGS - {
        *WEIGHTINGS[weighting].flags,
        *WEIGHTINGS[weighting].optional,
    } | {*EVALUATIONS}
    shared = table["defaults"] | table["backbones"][backbone]
    return {name: value for name, value in shared.items() if name not in unused}, *_evaluation(
        levels, where
    )


def _evaluated_like(row: Row | None, table: dict) -> dict:
    """Return settings of baseline.py that evaluate like `row`, its dataset's first; None: as the table's `evaluation` says."""
    alike = row.alike["evaluation"] if row else resolved(table.get("evaluation", {}))
    return {ALIKE[name]: alike[name] for name in ALIKE} | (
        {"item_kind": row.config.item_kind} if row else {}
    )


def resolved(evaluation: dict) -> dict:
    """Return all settings of eval.py for an evaluation that names some of them; empty what the sweep sets."""
    return dataclasses.asdict(EvalConfig(**dict.fromkeys(EVALUATIONS_OWN, "") | evaluation))


def filled(settings: dict | None, name: str, value: str) -> dict | None:
    """Return settings with `value` in place of {name} in every text."""
    return settings and {
        key: v.replace(f"{{{name}}}", value) if isinstance(v, str) else v
        for key, v in settings.items()
    }


def _in_name(value) -> str:
    """Return a setting's value as part of a folder name: of a path its last part."""
    return re.sub(r"[^\w.+-]", "_", Path(value).name if isinstance(value, str) else str(value))


def _evaluation(levels: tuple[dict, ...], where: str) -> tuple[dict, dict | None]:
    """Merge `evaluation` and `exact` of table, backbone and entry; the latter is None where none of them has it."""
    evaluation, exact = (
        [level[block] for level in levels if block in level] for block in EVALUATIONS
    )
    evaluation = {name: value for block in evaluation for name, value in block.items()}
    config = _build(
        EvalConfig, dict.fromkeys(EVALUATIONS_OWN, "") | evaluation, f"{where}: evaluation"
    )
    if 0 not in config.alpha:
        raise UsageError(
            f"{where}: evaluation: alpha {config.alpha} lacks 0, at which validation chooses"
        )
    if config.num_beams < LIST_LENGTH:
        raise UsageError(
            f"{where}: evaluation: lists of num_beams {config.num_beams} have no {METRIC}, by which validation chooses"
        )
    if not exact:
        return evaluation, None
    exact = (
        evaluation
        | {"search": "exact"}
        | {name: value for block in exact for name, value in block.items()}
    )
    _build(EvalConfig, dict.fromkeys(EVALUATIONS_OWN, "") | exact, f"{where}: exact")
    return evaluation, exact


def _build(cls, values: dict, where: str):
    """Return `values` as a checked `cls`."""
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is MISSING and field.default_factory is MISSING
    ]
    if missing := [name for name in required if name not in values]:
        raise UsageError(
            f"{where}: '{missing[0]}' is given neither there nor in what all rows share"
        )
    config = cls(**values)
    try:
        config.check()
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    return config


def _check_names(path: str, rows: list[Row]) -> None:
    """Raise ValueError if two rows would lie in one folder."""
    seen = {}
    for row in rows:
        if (other := seen.setdefault(row.name, row)) is row:
            continue
        parts = ("settings", "evaluation", "exact", "backbone", "dataset")
        both = [{part: getattr(r, part) for part in parts} | r.settings for r in (row, other)]
        differing = [
            key
            for key in {**both[0], **both[1]}
            if key != "settings" and both[0].get(key) != both[1].get(key)
        ]
        why = (
            f"they differ in {', '.join(differing)}, which is not in the name"
            if differing
            else "they are the same run"
        )
        raise UsageError(f"{path}: two rows are called {row.name}: {why}")


def _check_alike(path: str, rows: list[Row]) -> None:
    """Raise ValueError if rows of one dataset are evaluated on other rows or with lists of other lengths (ALIKE)."""
    seen = {}
    for row in rows:
        for block, values in row.alike.items():
            for name, value in values.items():
                first, expected = seen.setdefault((row.dataset, block, name), (row, value))
                if value != expected:
                    raise UsageError(
                        f"{path}: dataset {row.dataset}: {block}: {name} is {expected} for {first.name}, {value} for {row.name}; "
                        "a report compares the rows of a dataset: evaluate them alike"
                    )
