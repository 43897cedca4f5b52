"""Reads run folders into a `Study`.

A run that is unfinished, failed, damaged or written by an older version is noted, not an error.
"""

import contextlib
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from igd_ds.baselines.leaves import build_catalogue
from igd_ds.config.options import current_names
from igd_ds.config.yaml_files import read_yaml_settings
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.statistics import catalogue_statistics
from igd_ds.errors import UsageError
from igd_ds.evaluation import metrics
from igd_ds.items.decisiveness import mean_by_token, purity_gain
from igd_ds.items.store import StoredCatalogue, load_catalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.run_folder import BEFORE_RECORDED
from igd_ds.studies.report.study import (
    EVALUATION,
    METRIC,
    Curves,
    Json,
    Ranks,
    RowGroups,
    Run,
    Study,
    family_of,
    method_names,
    method_of,
    reported_alpha,
)
from igd_ds.studies.rounding import significant
from igd_ds.train_config import TrainConfig

POINTS = 200
"""Points of a stored curve at most."""
CURVES = ("train/loss", "train/nll", "train/alpha", "valid/")
"""Beginnings of the tags whose curves are stored."""
SPLITS = ("valid", "test")
EVALUATIONS = {
    "valid": "eval/valid/metrics.json",
    "test": "eval/test/metrics.json",
    "exact": "eval/test-exact/metrics.json",
}
FILES = {"config": "config.yaml", "summary": "summary.json", "env": "env.json"} | EVALUATIONS
FIGURES = (
    "item_match",
    "first_token_repetition",
    "score_entropy_bits",
    "coverage",
    "gini_index",
    "popularity_deciles",
)
"""Entries of metrics.json that this version writes for each α."""

# Entries of metrics.json that must be equal in all evaluations of a dataset (`fingerprint` and
# `protocol` are the dataset's), and those that must be equal within one backbone: a backbone may
# stand for a way to decode, as BIGRec and D3 do.
ALIKE = (
    "fingerprint", "protocol", "rows", "num_rows", "seed", "num_beams", "popularity_baseline",
    "exclude_seen",
)  # fmt: skip
ALIKE_IN_BACKBONE = (
    "search", "decoding_rule", "length_penalty", "softmax", "temperature", "popularity_prior",
    "guidance", "guidance_weight", "item_filter",
)  # fmt: skip

UNTESTED = {True: "chosen, not tested yet", False: "", None: "validation has not chosen yet"}
"""Notes of a validated run without a test, by whether validation chose it."""
NO_ROW: Json = {"dataset": "", "method": "", "group": "", "settings": {}}
"""Stands for the row of a sweep for run folders outside of sweeps."""
EXAMPLE_LENGTH = 3
"""Items of a list that an example shows, as in MTC Table 7."""


@dataclass(frozen=True)
class Location:
    """The place of a run: its folder and its row of sweep.json, None outside of sweeps."""

    folder: Path
    row: Json | None = None


@dataclass(frozen=True)
class Root:
    """A folder that was given: its name, its budget and the runs below it by name."""

    name: str
    budget: str
    locations: dict[str, Location]


@dataclass(frozen=True)
class Contents:
    """The readable files of a run folder (keys: FILES), and the problems of the others."""

    files: dict[str, Json | None]
    problems: dict[str, str]


@dataclass
class Details:
    """The part of a study that comes from the datasets; see `Study` for the fields."""

    runs: dict[str, Run] = field(default_factory=dict)  # runs that were changed, by name
    catalogues: dict[str, Json] = field(default_factory=dict)
    rows: dict[str, dict[str, RowGroups]] = field(default_factory=dict)
    examples: list[Json] = field(default_factory=list)


def read_runs(roots: Sequence[Path], examples: int) -> Study:
    """Read run folders, sweeps, and folders that hold them at any depth.

    Args:
        roots: the folders.
        examples: number of rows per dataset and backbone whose lists are shown.

    Raises:
        UsageError: a folder is none of these, or runs of one dataset were not evaluated alike.
    """
    given = [read_root(Path(root)) for root in roots]
    names = Counter(name for root in given for name in root.locations)
    found: dict[str, Location] = {}
    for path, root in zip(roots, given, strict=True):
        for name, location in root.locations.items():
            # Runs that are called alike are told apart by the folder that was given.
            is_root = location.folder == Path(path)
            full = str(path) if is_root else f"{path}/{name}"
            found[name if names[name] == 1 else full] = location

    folders = {name: location.folder for name, location in found.items()}
    runs = with_methods([read_run(name, location) for name, location in found.items()])
    details = Details()
    for dataset in dict.fromkeys(run.dataset for run in runs):
        complete = [run for run in runs if run.dataset == dataset and run.is_complete]
        if complete:
            add_details(details, dataset, complete, folders, examples)

    return Study(
        name=" + ".join(dict.fromkeys(root.name for root in given)),
        budget="\n".join(filter(None, (root.budget for root in given))),
        runs=[details.runs.get(run.name, run) for run in runs],
        catalogues=details.catalogues,
        rows=details.rows,
        examples=details.examples,
        environment=environment_of([folder / "env.json" for folder in folders.values()]),
    )


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
        opened, stored = open_dataset(kept, folders)
    except (ValueError, OSError) as error:
        why = f"no groups of rows and no tests by user: {error}"
        details.runs |= {run.name: with_note(run, why) for run in kept}
        return

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


def read_root(root: Path) -> Root:
    """Return the runs of a folder and of the folders below it.

    A run that lies deeper is called by its path from `root`.

    Raises:
        UsageError: it is no sweep and no run folder, and holds none.
    """
    sweep = read_json(root / "sweep.json")
    if sweep is not None:
        if sweep.get("version") != 1:
            raise UsageError(
                f"{root / 'sweep.json'} has version {sweep.get('version')}, but this program reads "
                "version 1: start the sweep anew"
            )
        rows = {row["name"]: Location(root / row["name"], row) for row in sweep["rows"]}
        return Root(sweep["name"], sweep["budget"], rows)

    if (root / "config.yaml").is_file():
        return Root(root.resolve().parent.name, "", {root.name: Location(root)})

    budgets: list[str] = []
    locations: dict[str, Location] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ():
        if not any(next(folder.rglob(name), None) for name in ("config.yaml", "sweep.json")):
            continue
        inside = read_root(folder)
        budgets.append(inside.budget)
        is_run = (folder / "config.yaml").is_file()
        locations |= {
            name if is_run else f"{folder.name}/{name}": location
            for name, location in inside.locations.items()
        }
    if not locations:
        raise UsageError(
            f"{root} is no sweep (sweep.json), no run folder (config.yaml) and holds none"
        )
    return Root(root.name, "\n".join(filter(None, budgets)), locations)


def read_json(path: Path) -> Json | None:
    """Return a JSON object, or None if there is no such file.

    Raises:
        UsageError: names a file that is damaged.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object")
    return value


def read_run(name: str, location: Location) -> Run:
    """Read one run folder. A missing or damaged file becomes a note of the run, not an error."""
    folder, row = location.folder, location.row
    contents = read_contents(folder)
    files = contents.files
    state, reason = state_of(row, contents)
    notes = [reason, *(problem for problem in contents.problems.values() if problem != reason)]
    if state in ("finished", "no test"):
        notes += older_version(files)

    settings, summary, env = (files[key] or {} for key in ("config", "summary", "env"))
    row = row or NO_ROW | {"backbone": backbone_of(settings), "seed": settings.get("seed", 0)}
    evaluated = [results["dataset"] for split in EVALUATIONS if (results := files[split])]
    searched = searches(folder / "eval")
    training = Search(summary.get("seconds") or 0.0, env.get("world_size"))
    return Run(
        name=name,
        dataset=row["dataset"] or (evaluated or [dataset_name(settings)])[0],
        backbone=row["backbone"],
        method=row["method"],
        group=row["group"],
        seed=row["seed"],
        state=state,
        note="; ".join(filter(None, notes)),
        family=row.get("family") or family_of(settings or row["settings"]),
        settings=settings or row["settings"],
        valid=files["valid"],
        test=files["test"],
        exact=files["exact"],
        curves=read_curves(folder / "metrics.jsonl"),
        seconds=summary.get("seconds"),
        eval_seconds=sum(search.seconds for search in searched) if searched else None,
        rank_seconds=rank_seconds([training, *searched]),
        world_size=env.get("world_size"),
        command=command_of(env),
        protocol=dataset_info(settings).get("protocol", ""),
        other_tests=other_tests(folder),
    )


def read_contents(folder: Path) -> Contents:
    """Read the files of a run folder that are named in FILES."""
    contents = Contents({}, {})
    for key, name in FILES.items():
        path = folder / name
        try:
            found = read_settings(path) if key == "config" else read_json(path)
            if key in EVALUATIONS and found and (problem := problem_of(key, found)):
                raise UsageError(f"{name}: {problem}")
            contents.files[key] = found
        except ValueError as error:
            contents.problems[key] = str(error).replace(f"{folder}/", "")
            contents.files[key] = None
    return contents


def read_settings(path: Path) -> Json | None:
    """Return a config.yaml with present names of settings, or None if there is no such file.

    Raises:
        UsageError: the file is no YAML, or names no dataset, no method or no seed.
    """
    if not path.is_file():
        return None
    try:
        settings = current_names(TrainConfig, read_yaml_settings(path))
        method_of(settings)
        return settings | {"seed": int(settings["seed"]), "dataset": str(settings["dataset"])}
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no configuration of a run ({type(error).__name__}: {error})"
        ) from None


def problem_of(split: str, results: Json) -> str:
    """Return why a metrics.json cannot be used; empty if it can."""
    alphas = results.get("alpha")
    if not isinstance(alphas, dict) or not alphas or "dataset" not in results:
        return "written by an older version: it has no dataset or no figures by α"
    if split == "valid" and "0.0" not in alphas:
        return "no α = 0, at which validation chooses; evaluate with it too"
    for alpha, entry in alphas.items():
        if METRIC not in entry.get(metrics.HEADLINE, {}):
            length = results.get("num_beams", "too few")
            return f"no {METRIC} at α = {alpha}, which chooses α; its lists hold {length} items"
    broken = next((path for path, number in numbers_in(results) if not math.isfinite(number)), None)
    return f"{broken} is not finite" if broken else ""


def numbers_in(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield (path, number) of every float in a JSON value."""
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers_in(inner, f"{path}.{key}".strip("."))


def state_of(row: Json | None, contents: Contents) -> tuple[str, str]:
    """Return the state of a run and its reason.

    Args:
        row: its row of the sweep; None outside of sweeps.
        contents: the files of its folder.
    """
    files, problems = contents.files, contents.problems
    if row and (row["state"] == "not run" or (row["state"] == "waiting" and not files["config"])):
        return row["state"], ""

    error = ""
    if row and row["state"] == "failed":
        error = row["error"] or "no error line"
    for key, missing in (
        ("config", "no config.yaml"),
        ("summary", "the training has not finished"),
        ("valid", "no eval/valid"),
    ):
        if not files[key]:
            if error:
                return "failed", error
            pending = row["state"] if row and row["state"] != "finished" else ""
            return "unfinished", pending or problems.get(key, missing)

    if "test" in problems:
        return "unfinished", problems["test"]
    config, valid, test = files["config"], files["valid"], files["test"]
    if not test:
        untested = UNTESTED[row["chosen"]] if row else "not evaluated on test"
        return "no test", "; ".join(filter(None, [untested, error]))
    alpha = reported_alpha(config or {}, valid or {})
    if alpha not in test["alpha"]:
        return "unfinished", f"eval/test lacks α = {alpha}, at which the run is reported"
    return "finished", error


def older_version(files: Mapping[str, Json | None]) -> list[str]:
    """Return a note for each file of a complete run that lacks what this version writes."""
    lacking: dict[str, set[str]] = {
        "summary.json": {"seconds"} - (files["summary"] or {}).keys(),
        "env.json": {"world_size"} - (files["env"] or {}).keys(),
    }
    for split, path in EVALUATIONS.items():
        results = files[split]
        entries = results["alpha"].values() if results else ()
        lacking[path] = {name for entry in entries for name in FIGURES if name not in entry}
    return [
        f"{path} lacks {', '.join(sorted(names))} (written by an older version?)"
        for path, names in lacking.items()
        if names
    ]


def backbone_of(settings: Json) -> str:
    """Return the name of the model configuration or of the pretrained model; "" for a baseline."""
    name = settings.get("model_config") or settings.get("model_name_or_path") or ""
    return Path(name).name.removesuffix(".json")


def dataset_name(settings: Json) -> str:
    """Return the name of a run's dataset or, if the dataset is gone, the name of its folder."""
    folder = Path(settings.get("dataset", "unknown"))
    return str(dataset_info(settings).get("name", folder.name))


def dataset_info(settings: Json) -> Json:
    """Return the dataset.json of a run's dataset; {} if it is gone or damaged."""
    try:
        return read_json(Path(settings.get("dataset", "unknown")) / "dataset.json") or {}
    except UsageError:
        return {}


def command_of(env: Json) -> str:
    """Return the command line in an env.json as a user types it; "" where none is recorded.

    A launcher starts the entry script, such as igd_ds/train.py, instead of `igd train`.

    Example:
        >>> command_of({"command": ["/home/me/igd_ds/train.py", "--seed", "1"]})
        'igd train --seed 1'
    """
    if not (recorded := env.get("command")):
        return ""
    program, *arguments = recorded
    name = f"igd {Path(program).stem}" if program.endswith(".py") else program
    return " ".join(filter(None, [name, shlex.join(arguments)]))


def other_tests(folder: Path) -> dict[str, Json]:
    """Return `Run.other_tests` of a run folder: what `igd eval` wrote to eval/NAME."""
    found: dict[str, Json] = {}
    reported = {(folder / path) for path in EVALUATIONS.values()}
    for path in sorted(set((folder / "eval").glob("*/metrics.json")) - reported):
        try:
            results = read_json(path) or {}
            if results.get("split", "test") != "test":
                continue
            if problem := problem_of("test", results) or other_dataset(folder, path.parent):
                raise UsageError(problem)
        except UsageError as error:
            found[path.parent.name] = {"problem": str(error).replace(f"{folder}/", "")}
            continue

        alphas = {
            alpha: {metrics.HEADLINE: entry[metrics.HEADLINE]}
            for alpha, entry in results["alpha"].items()
        }
        kept = {key: results[key] for key in EVALUATION if key in results}
        found[path.parent.name] = kept | {"alpha": alphas}
    return found


def other_dataset(folder: Path, evaluation: Path) -> str:
    """Return why an evaluation of a run folder is not of the dataset of its validation, or ""."""
    validated = fingerprint_of((folder / EVALUATIONS["valid"]).parent)
    evaluated = fingerprint_of(evaluation)
    differs = None not in (validated, evaluated) and validated != evaluated
    return "it evaluated another dataset than eval/valid" if differs else ""


def read_curves(path: Path) -> Curves:
    """Return the thinned curves of a metrics.jsonl by tag, of the tags in CURVES."""
    curves: Curves = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, KeyError, TypeError):
            continue  # damaged, or cut off by a kill
        for tag, value in entry.items():
            if tag.startswith(CURVES):
                curves.setdefault(tag, []).append([step, value])
    return {tag: thinned(points) for tag, points in curves.items()}


@dataclass(frozen=True)
class Search:
    """Wall time of a search or a training, and its number of ranks, None where unknown."""

    seconds: float
    world_size: int | None


def searches(folder: Path) -> list[Search]:
    """Return the searches of a run's evaluations, as if each had run without interruption.

    Evaluations without a usable timing.json are left out.
    """
    found = []
    for path in sorted(folder.glob("*/timing.json")):
        # The file may be damaged or of an older version, or there was nothing left to search.
        with contextlib.suppress(ValueError, KeyError, ZeroDivisionError):
            timing = read_json(path) or {}
            rows = timing["rows_searched"] + timing["rows_already_there"]
            found.append(Search(rows / timing["rows_per_second"], timing.get("world_size")))
    return found


def rank_seconds(spent: Sequence[Search]) -> float | None:
    """Return the time over all ranks; None without times or where a number of ranks is unknown."""
    total, is_known = 0.0, False
    for part in spent:
        if part.seconds and not part.world_size:
            return None
        if part.seconds and part.world_size:
            total, is_known = total + part.seconds * part.world_size, True
    return total if is_known else None


def thinned(points: Sequence[Sequence[float]], most: int = POINTS) -> list[list[float]]:
    """Return at most `most` [step, value] points: means over equal stretches, six digits."""
    if not points:
        return []
    stretches = np.array_split(np.array(points, dtype=np.float64), min(most, len(points)))
    return [[significant(number) for number in stretch.mean(0)] for stretch in stretches]


def environment_of(paths: Sequence[Path]) -> dict[str, str]:
    """Return versions and hardware from the runs' env.json.

    Different values of a key are joined, in order of appearance.
    """
    values: dict[str, dict[str, None]] = {}
    for path in paths:
        try:
            env = read_json(path)
        except UsageError:
            continue
        if env is None:  # of a row that was never started
            continue
        program = env.get("igd_ds", {})
        own = {
            "igd_ds": program.get("version"),
            "commit": program.get("commit") or "not recorded",
        }
        for key, value in (own | env.get("versions", {}) | env.get("hardware", {})).items():
            values.setdefault(key, {})[str(value)] = None
    return {key: ", ".join(different) for key, different in values.items()}


def with_methods(runs: Sequence[Run]) -> list[Run]:
    """Return the runs; those outside of sweeps get a method and a group."""
    named: dict[str, Run] = {}
    for dataset, backbone in dict.fromkeys((run.dataset, run.backbone) for run in runs):
        alike = [
            run
            for run in runs
            if (run.dataset, run.backbone) == (dataset, backbone)
            and not run.method
            and run.settings
        ]
        methods = method_names([run.settings for run in alike])
        for run, method in zip(alike, methods, strict=True):
            group = "-".join(filter(None, [dataset, backbone, method]))
            named[run.name] = replace(run, method=method, group=group)
    return [named.get(run.name, run) for run in runs]


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
    """Check that runs of one dataset were evaluated alike (ALIKE, ALIKE_IN_BACKBONE).

    Raises:
        UsageError: names two evaluations and what differs.
    """
    for split, path in EVALUATIONS.items():
        seen: dict[tuple[str, str], tuple[Any, Path]] = {}
        for run in (run for run in runs if getattr(run, split)):
            evaluation = (folders[run.name] / path).parent
            values = describe_evaluation(evaluation, run)
            first = {
                key: seen.setdefault(
                    (key, run.backbone if key in ALIKE_IN_BACKBONE else ""), (value, evaluation)
                )
                for key, value in values.items()
            }

            different = [key for key in values if first[key][0] != values[key]]
            if different:
                shown = [
                    key
                    if isinstance(values[key], dict)
                    else f"{key} ({values[key]} and {first[key][0]})"
                    for key in different
                ]
                raise UsageError(
                    f"{evaluation} and {first[different[0]][1]} are evaluations of {run.dataset} "
                    f"that are not alike ({', '.join(shown)} differ): make separate reports, or "
                    "evaluate one of them again"
                )


def describe_evaluation(folder: Path, run: Run) -> Json:
    """Return those values of ALIKE and ALIKE_IN_BACKBONE that evaluation or dataset record."""
    results = BEFORE_RECORDED | (read_json(folder / "metrics.json") or {})
    dataset: Json = {"fingerprint": fingerprint_of(folder)}
    with contextlib.suppress(KeyError, ValueError):
        info = read_json(Path(run.settings["dataset"]) / "dataset.json") or {}
        dataset["protocol"] = info.get("protocol")
    results |= {key: value for key, value in dataset.items() if value is not None}
    return {key: results[key] for key in (*ALIKE, *ALIKE_IN_BACKBONE) if key in results}


def fingerprint_of(evaluation: Path) -> str | None:
    """Return the fingerprint of the evaluated dataset; None where an older version left it out."""
    fingerprint: str | None = (read_json(evaluation / "request.json") or {}).get("dataset")
    return fingerprint


def open_dataset(
    runs: Sequence[Run], folders: Mapping[str, Path]
) -> tuple[InteractionDataset, StoredCatalogue | None]:
    """Open the dataset of some runs.

    Returns:
        The dataset, and the catalogue that a generative run stored; None if there is none.

    Raises:
        UsageError: the dataset is gone, or is another one now.
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

    for run in runs:
        for folder in (folders[run.name] / "model" / "catalogue", folders[run.name] / "catalogue"):
            if folder.is_dir():
                return dataset, load_catalogue(folder, dataset=dataset)
    return dataset, None


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
    """Return the run with the ranks of the targets in its lists at `Run.alpha`."""
    for split in (split for split in SPLITS if getattr(run, split)):
        path = folder / "eval" / split / f"predictions-alpha{run.alpha}.parquet"
        try:
            ranks = target_ranks(path, dataset.splits[split].targets)
        except (ValueError, KeyError, IndexError, OSError) as error:  # pyarrow raises any of them
            why = f"damaged ({' '.join(str(error).split())})" if path.is_file() else "missing"
            note = f"{path.relative_to(folder)} is {why}: no groups of rows and no tests by user"
            return with_note(run, note)
        run = replace(run, ranks=run.ranks | {split: ranks})
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
    for name in SPLITS:
        ranked = [run for run in runs if name in run.ranks]
        if not ranked:
            continue
        split, rows = dataset.splits[name], ranked[0].ranks[name].row
        for run in ranked:
            if not np.array_equal(run.ranks[name].row, rows):
                raise UsageError(
                    f"the predictions of {run.name} and {ranked[0].name} on {name} are of "
                    "different rows"
                )

        target = leaf[split.targets[rows]]
        frequency = np.bincount(leaf[split.targets], minlength=trie.num_nodes)
        groups[name] = {
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
