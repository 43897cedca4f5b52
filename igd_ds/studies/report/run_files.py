"""Reads one run folder into a `Run`.

A run that is unfinished, failed, damaged or written by an older version is noted, not an error.
"""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from igd_ds.config.options import current_names
from igd_ds.config.yaml_files import read_yaml_settings
from igd_ds.errors import UsageError
from igd_ds.evaluation import metrics
from igd_ds.studies.report.study import (
    EVALUATION,
    METRIC,
    SYMBOLS,
    Curves,
    Json,
    Run,
    family_of,
    method_of,
    reported_alpha,
)
from igd_ds.studies.rounding import significant
from igd_ds.train_config import TrainConfig

POINTS = 200
"""Points of a stored curve at most."""
CURVES = ("train/loss", "train/nll", "train/alpha", "valid/")
"""Beginnings of the tags whose curves are stored."""
EVALUATIONS = {
    "valid": "eval/valid/metrics.json",
    "test": "eval/test/metrics.json",
    "exact": "eval/test-exact/metrics.json",
}
FILES = {"config": "config.yaml", "summary": "summary.json", "env": "env.json"} | EVALUATIONS

# What the report reads of each file. A shape is a type, [shape] for a list, or {pattern: shape} for
# an object, of which an entry may be missing or null, as where there was nothing to count.
NUMBER = int | float
NUMBERS: Json = {"*": NUMBER}
BY_STEP: Json = {"nats": [NUMBER], "items": [NUMBER]}
BIN: Json = {"probability": NUMBER, "hit_rate": NUMBER}
AT_ONE_ALPHA: Json = {
    "item_match": NUMBERS,
    "token_match*": NUMBERS,
    "relaxed_match": {"[0-9]*": NUMBERS},
    "beam": {"token_match": NUMBERS, "missed_of_true_top": {"[0-9]*": NUMBER}},
    "calibration": {"expected_calibration_error": NUMBER, "bins": [BIN]},
    "repeat_rate": NUMBERS,
    "prefix_entropy": BY_STEP,
    "popularity_deciles": [NUMBER],
    **dict.fromkeys(
        ("first_token_repetition", "score_entropy_bits", "coverage", "gini_index",
         "cold_share_of_listed", "mean_coverage", "proof_share"), NUMBER,
    ),
}  # fmt: skip
METRICS: Json = {
    "dataset": str,
    "rows": int,
    **dict.fromkeys(("search", "softmax"), str),
    "temperature": NUMBER,
    "alpha": {"*": AT_ONE_ALPHA},
    "popularity_baseline": NUMBERS,
    "target_popularity_deciles": [NUMBER],
    "target_prefix_entropy": BY_STEP,
    **dict.fromkeys(("target_repeat_rate", "target_nll", "target_perplexity_per_token"), NUMBER),
}
SHAPES: dict[str, Json] = {
    "config": {
        **dict.fromkeys(("objective", "recommender", "loss", "item_kind"), str),
        **dict.fromkeys(("model_config", "model_name_or_path"), str),
        **dict.fromkeys(SYMBOLS, NUMBER),
    },
    "summary": {"seconds": NUMBER},
    "env": {
        "world_size": int,
        "command": [str],
        **dict.fromkeys(("igd_ds", "versions", "hardware"), {}),
    },
    "timing": {"rows_*": NUMBER, "world_size": int},
    **dict.fromkeys(EVALUATIONS, METRICS),
}
FIGURES = (
    "item_match",
    "first_token_repetition",
    "score_entropy_bits",
    "coverage",
    "gini_index",
    "popularity_deciles",
)
"""Entries of metrics.json that this version writes for each α."""

UNTESTED = {True: "chosen, not tested yet", False: "", None: "validation has not chosen yet"}
"""Notes of a validated run without a test, by whether validation chose it."""
NO_ROW: Json = {"dataset": "", "method": "", "group": "", "settings": {}}
"""Stands for the row of a sweep for run folders outside of sweeps."""


@dataclass(frozen=True)
class Location:
    """The place of a run: its folder and its row of sweep.json, None outside of sweeps."""

    folder: Path
    row: Json | None = None


@dataclass(frozen=True)
class Contents:
    """The readable files of a run folder (keys: FILES), and the problems of the others."""

    files: dict[str, Json | None]
    problems: dict[str, str]


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


def misfit(value: Any, shape: Any, path: str = "") -> str:
    """Return the path of the first entry of a JSON value that has another shape; "" if it fits.

    Example:
        >>> misfit({"seconds": "1"}, {"seconds": int | float})
        'seconds'
    """
    if value is None:
        return ""
    inner: Iterator[tuple[str, Any, Any]] = iter(())
    if isinstance(shape, dict) and isinstance(value, dict):
        inner = (
            (key, entry, expected)
            for key, entry in value.items()
            for pattern, expected in shape.items()
            if fnmatchcase(key, pattern)
        )
    elif isinstance(shape, list) and isinstance(value, list) and None not in value:
        inner = ((str(place), entry, shape[0]) for place, entry in enumerate(value))
    elif isinstance(shape, dict | list) or not isinstance(value, shape):
        return path
    found = (misfit(entry, expected, f"{path}.{key}".strip(".")) for key, entry, expected in inner)
    return next(filter(None, found), "")


def read_record(path: Path, key: str) -> Json | None:
    """Return a file of a run, checked against its shape; None if there is no such file.

    Args:
        path: the file.
        key: of SHAPES.

    Raises:
        UsageError: names a file that is damaged.
    """
    found = read_settings(path) if key == "config" else read_json(path)
    if broken := misfit(found, SHAPES[key]):
        raise UsageError(f"{path} is damaged: {broken} is not what `igd` writes there")
    return found


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
    searched, damaged = searches(folder)
    notes += damaged
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
            found = read_record(path, key)
            if key in EVALUATIONS and found:
                fingerprint_of(path.parent)  # its request.json must be whole too
                if problem := problem_of(key, found):
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
    settings = current_names(TrainConfig, read_yaml_settings(path))
    try:
        method_of(settings)
        return settings | {"seed": int(settings["seed"]), "dataset": str(settings["dataset"])}
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} is no configuration of a run ({type(error).__name__}: {error})"
        ) from None


def problem_of(split: str, results: Json) -> str:
    """Return why a metrics.json cannot be used; empty if it can."""
    alphas = results.get("alpha")
    if not isinstance(alphas, dict) or not alphas or not results.get("dataset"):
        return "written by an older version: it has no dataset or no figures by α"
    if split == "valid" and "0.0" not in alphas:
        return "no α = 0, at which validation chooses; evaluate with it too"
    for alpha, entry in alphas.items():
        if not is_number(alpha):
            return f"damaged: {alpha!r} is no α"
        if ((entry or {}).get(metrics.HEADLINE) or {}).get(METRIC) is None:
            length = results.get("num_beams", "too few")
            return f"no {METRIC} at α = {alpha}, which chooses α; its lists hold {length} items"
    broken = next((path for path, number in numbers_in(results) if not math.isfinite(number)), None)
    return f"{broken} is not finite" if broken else ""


def is_number(text: str) -> bool:
    """Return whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


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
            results = read_record(path, "test") or {}
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
            if tag.startswith(CURVES) and isinstance(step, NUMBER) and isinstance(value, NUMBER):
                curves.setdefault(tag, []).append([step, value])
    return {tag: thinned(points) for tag, points in curves.items()}


@dataclass(frozen=True)
class Search:
    """Wall time of a search or a training, and its number of ranks, None where unknown."""

    seconds: float
    world_size: int | None


def searches(run: Path) -> tuple[list[Search], list[str]]:
    """Return the searches of a run's evaluations, as if each had run without interruption.

    Evaluations without a usable timing.json are left out.

    Returns:
        The searches, and a note for each damaged timing.json.
    """
    found, damaged = [], []
    for path in sorted(run.glob("eval/*/timing.json")):
        try:
            timing = read_record(path, "timing") or {}
            rows = timing["rows_searched"] + timing["rows_already_there"]
            found.append(Search(rows / timing["rows_per_second"], timing.get("world_size")))
        except UsageError as error:
            damaged.append(str(error).replace(f"{run}/", ""))
        except (KeyError, TypeError, ZeroDivisionError):
            continue  # of an older version, or there was nothing left to search
    return found, damaged


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


def fingerprint_of(evaluation: Path) -> str | None:
    """Return the fingerprint of the evaluated dataset; None where an older version left it out."""
    fingerprint: str | None = (read_json(evaluation / "request.json") or {}).get("dataset")
    return fingerprint
