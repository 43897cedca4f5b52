"""Reads a table of runs, expands it to rows, and applies the papers' rule that chooses among them.

This module reads the table only, no run folder and no dataset. A table is YAML. Every list in an
entry of `runs` is expanded, in combination with every other list of the entry:

    name: books                      # of the sweep
    budget: 8,000 users, 2 epochs    # text for the report: what was fixed before the first run
    datasets: {books-small: data/books-small}
    backbones:                       # named settings of igd_ds/train.py
      qwen2-1m: {model_config: tools/models/qwen2-1m.json, tokenizer: "data/{dataset}-tokenizer"}
    defaults: {ds_config: ds_configs/zero1-fp32.json, epochs: 2}   # settings of igd_ds/train.py
    evaluation: {num_beams: 10, alpha: [0, 0.1, 0.2]}              # settings of igd_ds/eval.py
    exact: {num_rows: 500}           # optional exact search of the test rows: what differs
    baseline: {epochs: 50}           # settings of igd_ds/baseline.py
    select: [igd_beta]               # settings that validation chooses
    runs:
      - {dataset: books-small, backbone: qwen2-1m, objective: igd, igd_beta: [0.1, 0.3],
         seed: [0, 1, 2]}
      - {dataset: books-small, recommender: [sasrec, lrurec], seed: [0, 1, 2]}
      - {dataset: books-small, backbone: llama3-8b, objective: uniform, seed: 0, run: false}

The setting of an entry wins over that of its backbone, which wins over `defaults`. The blocks
`evaluation` and `exact` of table, backbone and entry are merged in the same way. A report compares
the rows of a dataset, so these rows must have the same num_beams, num_rows, seed and exclude_seen
of the evaluation; baselines take these values, and item_kind, from the other rows of the dataset.

`{dataset}` in a text is replaced by the dataset's name, and `{split}` in an evaluation by valid or
test. Shared settings may contain what a single objective or recommender uses; the others ignore it.
`run: false` keeps rows in the table and the report without running them, such as rows that need
other hardware, or a failed candidate that should not hold up the choice.

A row is called DATASET-BACKBONE-OBJECTIVE-…-seedN or DATASET-RECOMMENDER-…-seedN, with the entry's
own settings in between, so that names stay when the table grows. The rows of a *group* differ only
in the seed. The *candidates* of one choice differ in the seed and in the settings of `select`;
validation chooses one group among them.
"""

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from igd_ds.backbones.model_config import shape_file
from igd_ds.baseline_config import BaselineConfig
from igd_ds.baselines.sequential import SEQUENTIAL
from igd_ds.config.model import ModelOptions
from igd_ds.config.options import checked, current_names
from igd_ds.config.training import LoopOptions
from igd_ds.config.yaml_files import read_yaml_file
from igd_ds.engine.ds_config import find_ds_config
from igd_ds.errors import UsageError, did_you_mean
from igd_ds.eval_config import EvalConfig
from igd_ds.objectives import OBJECTIVES, ObjectiveOptions, options_of
from igd_ds.studies.report.study import METRIC, has_curriculum
from igd_ds.train_config import TrainConfig

Settings = dict[str, Any]
"""Settings of an entry script by name, as YAML gives them."""
Config = TrainConfig | BaselineConfig
C = TypeVar("C", TrainConfig, EvalConfig, BaselineConfig)

LIST_LENGTH = 10
"""The k of METRIC: a list must have at least this many items."""
TABLE_KEYS: dict[str, type] = {
    **dict.fromkeys(("datasets", "backbones", "defaults", "evaluation", "exact", "baseline"), dict),
    "name": str,
    "budget": str,
    "select": list,
    "runs": list,
}
REQUIRED = ("name", "datasets", "runs")
KINDS: dict[type, str] = {str: "a text", dict: "'name: value' lines", list: "a list"}
EVALUATIONS = ("evaluation", "exact")
NOT_EXPANDED = (*EVALUATIONS, "run")
"""Keys of an entry whose value is not a list to expand."""

# Settings that the sweep itself passes to train.py and baseline.py, and to eval.py.
SWEEPS_OWN = {"dataset", "output_dir", "resume", "splits"}
EVALUATIONS_OWN = {"model", "dataset", "output_dir", "split", "alpha_from"}

ALIKE = {
    "num_beams": "num_beams",
    "num_rows": "num_rows",
    "seed": "rows_seed",
    "exclude_seen": "exclude_seen",
}
"""Settings of eval.py that the rows of a dataset must share → their names in baseline.py."""
PLACEHOLDER = re.compile(r"\{(\w+)\}")
"""What is replaced in texts, see `filled`."""
OBJECTIVE_SETTINGS = {field.name for field in dataclasses.fields(ObjectiveOptions)}


@dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Attributes:
        name: folder of the run below RUNS.
        group: the name without the seed.
        family: a key that is equal for the candidates of one choice.
        dataset: name of the dataset.
        backbone: name of the backbone; "" for a baseline.
        seed: seed of the run.
        settings: settings of train.py or, if they name a recommender, of baseline.py.
        config: the same with all defaults.
        evaluation: settings of eval.py.
        exact: settings of eval.py for the exact search of the test rows; None without one.
        run: whether the row is run; otherwise it is only listed.
    """

    name: str
    group: str
    family: tuple[str, ...]
    dataset: str
    backbone: str
    seed: int
    settings: Settings
    config: Config
    evaluation: Settings
    exact: Settings | None
    run: bool

    @property
    def is_baseline(self) -> bool:
        """Whether the row is a run of baseline.py."""
        return isinstance(self.config, BaselineConfig)

    @property
    def alike(self) -> dict[str, dict[str, int | str]]:
        """The settings that all rows of a dataset must share (ALIKE), by evaluation."""
        if isinstance(self.config, BaselineConfig):
            values = {name: getattr(self.config, theirs) for name, theirs in ALIKE.items()}
            return {"evaluation": values}
        blocks = {"evaluation": self.evaluation, "exact": self.exact}
        return {
            block: {name: resolved(values)[name] for name in ALIKE}
            for block, values in blocks.items()
            if values is not None
        }

    def check_inputs(self) -> None:
        """Check the row's dataset, its files and its objective's settings, before anything starts.

        Raises:
            UsageError: names the row and what is missing or wrong.
        """
        if not (Path(self.settings["dataset"]) / "dataset.json").is_file():
            raise UsageError(
                f"{self.name}: no dataset at {self.settings['dataset']}; igd prepare makes one"
            )
        try:
            if ds_config := self.settings.get("ds_config"):
                find_ds_config(ds_config)
            if (shape := self.settings.get("model_config")) and not shape_file(shape).exists():
                raise UsageError(f"--model_config: no file {shape}")
            for evaluation in filter(None, (self.evaluation, self.exact)):
                check_files(evaluation)
            self.config.check()
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}") from None


@dataclass(frozen=True)
class Table:
    """The rows of a table, in its order, and what the table says about all of them."""

    path: str
    name: str
    budget: str
    select: list[str]
    rows: list[Row]

    @property
    def to_run(self) -> list[Row]:
        """The rows that are run: --row and a SLURM array count these, from 0."""
        return [row for row in self.rows if row.run]

    def choose(self, scores: Mapping[str, float | None]) -> dict[str, bool | None]:
        """Return for every row that is run whether validation chose its group.

        The group with the best mean score over its seeds is chosen; of equal means the first in the
        table wins. Where the candidates are a single group, there is nothing to choose: each row is
        decided by its own score.

        Args:
            scores: METRIC on validation at α = 0 by row name; None for a row that has not finished
                or has failed.

        Returns:
            True or False by row name; None if a candidate has no score yet.
        """
        choices: defaultdict[tuple[str, ...], defaultdict[str, list[float | None]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for row in self.to_run:
            choices[row.family][row.group].append(scores[row.name])

        chosen: dict[str, bool | None] = {}
        for row in self.to_run:
            groups = choices[row.family]
            if len(groups) == 1:
                chosen[row.name] = None if scores[row.name] is None else True
            else:
                best = best_group(groups)
                chosen[row.name] = None if best is None else row.group == best
        return chosen


def best_group(groups: Mapping[str, Sequence[float | None]]) -> str | None:
    """Return the group with the best mean score; None if a score is missing."""
    means = {}
    for group, scores in groups.items():
        known = [score for score in scores if score is not None]
        if len(known) < len(scores):
            return None
        means[group] = fmean(known)
    return max(means, key=lambda group: means[group])


@dataclass(frozen=True)
class TableFile:
    """The content of a table's file, with every block checked (see the module's example)."""

    path: str
    name: str
    budget: str
    select: list[str]
    datasets: dict[str, str]
    backbones: dict[str, Settings]
    defaults: Settings
    blocks: dict[str, Settings]  # `evaluation` and `exact`, where the table has them
    baseline: Settings
    entries: list[Settings]


def read_table(path: str) -> Table:
    """Read and expand a table.

    Raises:
        UsageError: names the table, the entry and the key of whatever is wrong.
    """
    file = _checked_file(path, _load(path))
    selectable = set(_names(TrainConfig))
    if any("recommender" in entry for entry in file.entries):
        selectable |= set(_names(BaselineConfig))
    known = sorted(selectable - {"seed", *SWEEPS_OWN})
    _refuse_unknown(file.select, known, f"{path}: select", "setting")

    # Baselines are expanded last, because they are evaluated like the other rows of the dataset.
    expanded: dict[int, list[Row]] = {}
    first: dict[str, Row] = {}
    for number, entry in sorted(
        enumerate(file.entries, 1), key=lambda numbered: "recommender" in numbered[1]
    ):
        expanded[number] = list(_rows_of(entry, f"{path}: run {number}", file, first))
        for row in expanded[number]:
            first.setdefault(row.dataset, row)

    rows = [row for number in sorted(expanded) for row in expanded[number]]
    _check_names(path, rows)
    _check_alike(path, rows)
    return Table(path, file.name, file.budget, file.select, rows)


def _load(path: str) -> Settings:
    """Return the YAML of a table with all keys of TABLE_KEYS that are not EVALUATIONS."""
    if not Path(path).is_file():
        raise UsageError(f"no table {path}")
    table = read_yaml_file(path)
    if not isinstance(table, dict):
        raise UsageError(f"{path}: expected the keys {', '.join(TABLE_KEYS)}")

    _refuse_unknown(table, TABLE_KEYS, path, "key")
    for key, kind in TABLE_KEYS.items():
        value = table.get(key, kind())
        if not isinstance(value, kind) or (key in REQUIRED and not value):
            raise UsageError(f"{path}: {key}: expected {KINDS[kind]}, found {value!r}")
    return {key: kind() for key, kind in TABLE_KEYS.items() if key not in EVALUATIONS} | table


def _checked_file(path: str, table: Settings) -> TableFile:
    """Return the content of a table with its blocks checked."""
    for key in ("datasets", "backbones"):
        for name in table[key]:
            if not (isinstance(name, str) and re.fullmatch(r"[\w.+-]+", name)):
                raise UsageError(
                    f"{path}: {key}: {name!r} becomes part of folder names: use letters, digits "
                    "and . + - _; quote a number"
                )
    for name, folder in table["datasets"].items():
        if not isinstance(folder, str):
            raise UsageError(f"{path}: datasets: {name}: expected a folder, found {folder!r}")
    for number, entry in enumerate(table["runs"], 1):
        if not isinstance(entry, dict):
            raise UsageError(
                f"{path}: run {number}: expected 'setting: value' lines, found {entry!r}"
            )

    select = list(current_names(TrainConfig, {str(name): None for name in table["select"]}))
    return TableFile(
        path=path,
        name=table["name"],
        budget=table["budget"],
        select=select,
        datasets=table["datasets"],
        backbones={
            name: _backbone(backbone, f"{path}: backbone {name}")
            for name, backbone in table["backbones"].items()
        },
        defaults=_settings(TrainConfig, table["defaults"], f"{path}: defaults"),
        blocks=_evaluation_blocks(table, path),
        baseline=_settings(BaselineConfig, table["baseline"], f"{path}: baseline"),
        entries=[current_names(TrainConfig, entry) for entry in table["runs"]],
    )


def _names(cls: type) -> list[str]:
    """Return the names of a configuration's settings."""
    return [field.name for field in dataclasses.fields(cls)]


def _foreign_settings(recommender: str) -> set[str]:
    """Return the settings of baseline.py that only other recommenders use."""
    of_models = {
        field.name for field in dataclasses.fields(BaselineConfig) if field.default is None
    }
    if recommender not in SEQUENTIAL:  # it only counts
        return of_models | {"loss"}
    preset = SEQUENTIAL[recommender]
    return of_models - {*preset.form, *preset.training, "num_negatives"}


def _refuse_unknown(names: Iterable[Any], known: Iterable[str], where: str, what: str) -> None:
    """Raise UsageError for the first name that is unknown, with the nearest known one."""
    known = list(known)
    for name in names:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise UsageError(f"{where}: unknown {what} {name!r}{hint}")


def _settings(cls: type, values: Any, where: str) -> Settings:
    """Return the settings of a block as the types that `cls` declares.

    Raises:
        UsageError: an unknown setting, or one that the sweep itself sets.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected settings, found {values!r}")
    values = current_names(cls, values)
    own = EVALUATIONS_OWN if cls is EvalConfig else SWEEPS_OWN
    if taken := [name for name in values if name in own]:
        raise UsageError(f"{where}: '{taken[0]}' is set by the sweep for each row: leave it out")
    return {name: checked(cls, str(name), value, where) for name, value in values.items()}


def _backbone(values: Any, where: str) -> Settings:
    """Return the settings of a backbone, with its blocks of EVALUATIONS."""
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected settings of train.py, found {values!r}")
    training = {name: value for name, value in values.items() if name not in EVALUATIONS}
    return _settings(TrainConfig, training, where) | _evaluation_blocks(values, where)


def _evaluation_blocks(values: Settings, where: str) -> dict[str, Settings]:
    """Return the blocks of EVALUATIONS that `values` has."""
    return {
        block: _settings(EvalConfig, values[block], f"{where}: {block}")
        for block in EVALUATIONS
        if block in values
    }


def _rows_of(
    entry: Settings, where: str, file: TableFile, first: Mapping[str, Row]
) -> Iterator[Row]:
    """Expand an entry: yield one row for every combination of a value from each of its lists.

    Args:
        entry: the entry, with present names of settings.
        where: names the entry in error messages.
        file: the table.
        first: the first row of each dataset; baselines are evaluated like it.
    """
    is_baseline = "recommender" in entry
    if is_baseline == ("backbone" in entry):
        raise UsageError(
            f"{where}: give either 'backbone' (a run of train.py) or 'recommender' (a run of "
            "baseline.py)"
        )
    required = ("dataset", "seed") if is_baseline else ("dataset", "seed", "objective")
    if missing := [name for name in required if name not in entry]:
        raise UsageError(f"{where}: '{missing[0]}' is missing: every entry needs it")
    of_the_table = ["run"] if is_baseline else ["backbone", "run", *EVALUATIONS]
    cls = BaselineConfig if is_baseline else TrainConfig
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
        point = dict(zip(axes, values, strict=True))
        dataset, backbone = point.pop("dataset"), point.pop("backbone", "")
        _refuse_unknown([dataset], file.datasets, f"{where}: dataset", "name")
        if is_baseline:
            yield _baseline_row(point, run, dataset, where, file, first.get(dataset))
        else:
            yield _training_row(point, entry, run, dataset, backbone, where, file)


def _training_row(
    point: Settings,
    entry: Settings,
    run: bool,
    dataset: str,
    backbone: str,
    where: str,
    file: TableFile,
) -> Row:
    """Return a row of train.py; `point` has one value of each list of the entry."""
    _refuse_unknown([backbone], file.backbones, f"{where}: backbone", "name")
    own = _settings(TrainConfig, point, where)
    objective = own["objective"]
    _refuse_unknown([objective], OBJECTIVES, f"{where}: objective", "name")

    # Shared settings of other objectives do not apply.
    unused = OBJECTIVE_SETTINGS - {field.name for field in options_of(objective)} | {*EVALUATIONS}
    shared = file.defaults | file.backbones[backbone]
    shared = {name: value for name, value in shared.items() if name not in unused}
    settings = filled(shared | own | {"dataset": file.datasets[dataset]}, "dataset", dataset)
    config = _build(TrainConfig, settings | {"output_dir": ""}, where)

    levels = (file.blocks, file.backbones[backbone], _evaluation_blocks(entry, where))
    evaluation, exact = _evaluation(levels, where)
    evaluation = filled(evaluation, "dataset", dataset)
    exact = None if exact is None else filled(exact, "dataset", dataset)
    refuse_placeholders(settings, (), where)
    refuse_placeholders(evaluation | (exact or {}), ("split",), where)
    words = [dataset, backbone, objective, *_words(own, "objective")]
    family = _family(dataset, backbone, config, evaluation, file.select)
    return _named_row(words, family, dataset, backbone, settings, config, evaluation, exact, run)


def _baseline_row(
    point: Settings, run: bool, dataset: str, where: str, file: TableFile, like: Row | None
) -> Row:
    """Return a row of baseline.py, evaluated like the row `like` of the same dataset."""
    own = _settings(BaselineConfig, point, where)
    foreign = _foreign_settings(own["recommender"])
    shared = _evaluated_like(like, file) | file.baseline
    shared = {name: value for name, value in shared.items() if name not in foreign}
    settings = filled(shared | own | {"dataset": file.datasets[dataset]}, "dataset", dataset)
    refuse_placeholders(settings, (), where)
    config = _build(BaselineConfig, settings | {"output_dir": ""}, where).with_preset()

    words = [dataset, own["recommender"], *_words(own, "recommender")]
    family = _family(dataset, "", config, {}, file.select)
    return _named_row(words, family, dataset, "", settings, config, {}, None, run)


def _named_row(
    words: Sequence[str],
    family: tuple[str, ...],
    dataset: str,
    backbone: str,
    settings: Settings,
    config: Config,
    evaluation: Settings,
    exact: Settings | None,
    run: bool,
) -> Row:
    """Return a row whose name is made of `words` and the seed."""
    group, seed = "-".join(words), settings["seed"]
    return Row(
        name=f"{group}-seed{seed}",
        group=group,
        family=family,
        dataset=dataset,
        backbone=backbone,
        seed=seed,
        settings=settings,
        config=config,
        evaluation=evaluation,
        exact=exact,
        run=run,
    )


def _words(own: Settings, method: str) -> list[str]:
    """Return an entry's own settings as parts of a folder name, without method and seed."""
    return [
        f"{name}{_in_name(value)}" for name, value in own.items() if name not in (method, "seed")
    ]


def _in_name(value: Any) -> str:
    """Return the value of a setting as part of a folder name; of a path its last part."""
    return re.sub(r"[^\w.+-]", "_", Path(value).name if isinstance(value, str) else str(value))


def _family(
    dataset: str, backbone: str, config: Config, evaluation: Settings, select: Sequence[str]
) -> tuple[str, ...]:
    """Return the key of a row's candidates: everything but the seed and the selected settings."""
    every = dataclasses.asdict(config)
    compared = {name: value for name, value in every.items() if name not in ("seed", *select)}
    # The speed of a curriculum may be selected; with and without a curriculum are two methods.
    compared["curriculum"] = has_curriculum(every)
    return dataset, backbone, repr(compared), repr(evaluation)


def _evaluated_like(row: Row | None, file: TableFile) -> Settings:
    """Return the settings with which baseline.py evaluates like `row`.

    Without a row these are the ones of the table's block `evaluation`.
    """
    alike = row.alike["evaluation"] if row else resolved(file.blocks.get("evaluation", {}))
    settings: Settings = {ALIKE[name]: alike[name] for name in ALIKE}
    return settings | ({"item_kind": row.config.item_kind} if row else {})


def resolved(evaluation: Settings) -> Settings:
    """Return all settings of eval.py for an evaluation that names some of them.

    The settings that the sweep sets are empty.
    """
    own: Settings = dict.fromkeys(EVALUATIONS_OWN, "")
    return dataclasses.asdict(EvalConfig(**own | evaluation))


def refuse_placeholders(settings: Settings, known: Sequence[str], where: str) -> None:
    """Raise UsageError for a {name} that is left in a text, other than those that are known."""
    for key, text in settings.items():
        for name in PLACEHOLDER.findall(text) if isinstance(text, str) else ():
            if name not in known:
                names = ("dataset", *known)
                near = did_you_mean(name, names)
                raise UsageError(
                    f"{where}: {key}: {text!r}: nothing replaces {{{name}}}{near} (known: "
                    f"{', '.join(names)})"
                )


def check_files(evaluation: Settings) -> None:
    """Raise UsageError for a file of an evaluation that is missing, on either split."""
    for name in ("item_filter", "guidance", "guidance_ids"):
        for split in ("valid", "test"):
            file = evaluation.get(name, "").replace("{split}", split)
            if file and not Path(file).is_file():
                raise UsageError(f"evaluation: {name}: no file {file}")


def filled(settings: Settings, name: str, value: str) -> Settings:
    """Return settings with {name} replaced by `value` in every text."""
    return {
        key: v.replace(f"{{{name}}}", value) if isinstance(v, str) else v
        for key, v in settings.items()
    }


def _evaluation(
    levels: Sequence[Mapping[str, Settings]], where: str
) -> tuple[Settings, Settings | None]:
    """Merge `evaluation` and `exact` of table, backbone and entry.

    Returns:
        Both; the second one is None where no level has `exact`.
    """
    evaluation = _merged(level.get("evaluation", {}) for level in levels)
    own = dict.fromkeys(EVALUATIONS_OWN, "")
    config = _build(EvalConfig, own | evaluation, f"{where}: evaluation")
    if 0 not in config.alpha:
        raise UsageError(
            f"{where}: evaluation: alpha {list(config.alpha)} lacks 0, at which validation chooses"
        )
    if config.num_beams < LIST_LENGTH:
        raise UsageError(
            f"{where}: evaluation: lists of num_beams {config.num_beams} have no {METRIC}, by "
            "which validation chooses"
        )

    if not any("exact" in level for level in levels):
        return evaluation, None
    asked = _merged(level.get("exact", {}) for level in levels)
    exact = evaluation | {"search": "exact"} | asked
    _build(EvalConfig, own | exact, f"{where}: exact")
    return evaluation, exact


def _merged(blocks: Iterable[Settings]) -> Settings:
    """Return the settings of several blocks; later ones win."""
    return {name: value for block in blocks for name, value in block.items()}


def _build(cls: type[C], values: Settings, where: str) -> C:
    """Return `values` as a `cls` whose values are checked."""
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is MISSING and field.default_factory is MISSING
    ]
    if missing := [name for name in required if name not in values]:
        raise UsageError(
            f"{where}: '{missing[0]}' is missing in the entry and in the shared settings"
        )

    config = cls(**values)
    try:
        if isinstance(config, TrainConfig):
            # The objective's settings may name files; `Row.check_inputs` checks them.
            ModelOptions.check(config)
            LoopOptions.check(config)
        else:
            config.check()
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return config


def _check_names(path: str, rows: Iterable[Row]) -> None:
    """Raise UsageError if two rows have the same folder."""
    seen: dict[str, Row] = {}
    for row in rows:
        other = seen.setdefault(row.name, row)
        if other is not row:
            differing = _differing(row, other)
            why = "they are the same run"
            if differing:
                why = f"they differ in {', '.join(differing)}, which is not in the name"
            raise UsageError(f"{path}: two rows are called {row.name}: {why}")


def _differing(row: Row, other: Row) -> list[str]:
    """Return the names of the parts and settings in which two rows differ."""
    parts = ("evaluation", "exact", "backbone", "dataset")
    first, second = (
        {part: getattr(which, part) for part in parts} | which.settings for which in (row, other)
    )
    return [key for key in {**first, **second} if first.get(key) != second.get(key)]


def _check_alike(path: str, rows: Iterable[Row]) -> None:
    """Raise UsageError if rows of one dataset are not evaluated alike (ALIKE)."""
    seen: dict[tuple[str, str, str], tuple[Row, int | str]] = {}
    for row in rows:
        for block, values in row.alike.items():
            for name, value in values.items():
                first, expected = seen.setdefault((row.dataset, block, name), (row, value))
                if value != expected:
                    raise UsageError(
                        f"{path}: dataset {row.dataset}: {block}: {name} is {expected} for "
                        f"{first.name}, {value} for {row.name}; a report compares the rows of a "
                        "dataset: evaluate them alike"
                    )
