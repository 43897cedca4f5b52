"""Run folders → `Study`. What is half-finished, failed, damaged or of an older version is noted at its run, never fatal."""

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from igd_ds.baselines.leaves import build_catalogue
from igd_ds.commands.stats import catalogue_statistics
from igd_ds.data.dataset import InteractionDataset
from igd_ds.errors import UsageError
from igd_ds.evaluation import metrics
from igd_ds.items.decisiveness import mean_by_token, purity_gain
from igd_ds.items.store import StoredCatalogue, load_catalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.studies.report.study import (
    METRIC,
    Ranks,
    Run,
    Study,
    family_of,
    labels,
    method_of,
    reported_alpha,
)

POINTS = 200  # of a stored curve
CURVES = (
    "train/loss",
    "train/nll",
    "train/alpha",
    "valid/",
)  # beginnings of the tags that are kept
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
# What must be equal in a dataset's evaluations (of metrics.json; `fingerprint` and `protocol` are the dataset's), and what only
# in those of one backbone: a backbone may stand for a way to decode, as BIGRec and D3 do.
ALIKE = ("fingerprint", "protocol", "rows", "num_rows", "seed", "num_beams", "popularity_baseline")
ALIKE_IN_BACKBONE = (
    "search", "decoding_rule", "length_penalty", "softmax", "temperature", "popularity_prior", "guidance", "guidance_weight",
    "item_filter",
)  # fmt: skip
# What is said of a validated run without test, by whether validation chose it.
UNTESTED = {True: "chosen, not tested yet", False: "", None: "validation has not chosen yet"}
NO_ROW = {
    "dataset": "",
    "method": "",
    "group": "",
    "settings": {},
}  # of a run folder outside of sweeps
EXAMPLE_LENGTH = 3  # places of a list that an example shows, as MTC Table 7


def read_runs(roots: list[Path], examples: int) -> Study:
    """Read run folders, folders of them, and sweeps' folders.

    Args:
        roots: the folders.
        examples: how many rows per dataset and backbone to show lists of.

    Raises:
        ValueError: a folder that is none of these; two runs of one name; runs of one dataset that were not evaluated alike.
    """
    names, budgets, found = [], [], {}
    for root in map(Path, roots):
        name, budget, entries = entries_of(root)
        if twice := [entry for entry in entries if entry in found]:
            folders = f"{found[twice[0]][0]} and {entries[twice[0]][0]}"
            raise UsageError(
                f"two runs are called {twice[0]}: {folders}; report them apart, or rename a folder"
            )
        names, budgets, found = [*names, name], [*budgets, budget], found | entries
    folders = {name: folder for name, (folder, _) in found.items()}
    runs = with_labels([read_run(name, folder, row) for name, (folder, row) in found.items()])
    catalogues, rows, shown, ranked = {}, {}, [], {}
    for dataset in dict.fromkeys(run.dataset for run in runs):
        evaluated = [run for run in runs if run.dataset == dataset and run.whole]
        if not evaluated:
            continue
        refuse_unlike(evaluated, folders)
        evaluated, twice = once(evaluated)
        ranked |= {run.name: run for run in twice}
        try:
            source, stored = open_source(evaluated, folders)
        except (ValueError, OSError) as error:
            ranked |= {
                run.name: with_note(run, f"no groups of rows and no tests by user: {error}")
                for run in evaluated
            }
            continue
        evaluated = [with_ranks(run, folders[run.name], source) for run in evaluated]
        ranked |= {run.name: run for run in evaluated}
        if stored:
            catalogues[dataset] = describe_catalogue(source, stored)
        else:  # baselines alone: who shares a leaf is known without a tokenizer, tokens are not
            stored = build_catalogue(source, evaluated[0].settings.get("item_kind", "auto"))
        rows[dataset] = row_groups(evaluated, source, stored.trie)
        shown += examples_of(evaluated, folders, source, examples)
    environment = environment_of([folder / "env.json" for folder in folders.values()])
    runs = [ranked.get(run.name, run) for run in runs]
    return Study(
        " + ".join(dict.fromkeys(names)),
        "\n".join(filter(None, budgets)),
        runs,
        catalogues,
        rows,
        shown,
        environment,
    )


def entries_of(root: Path) -> tuple[str, str, dict[str, tuple[Path, dict | None]]]:
    """Return the name, the budget and, by name, the run folders below `root` with their rows of the sweep (or None)."""
    if (root / "sweep.json").is_file():
        sweep = read_json(root / "sweep.json")
        if sweep.get("version") != 1:
            raise UsageError(
                f"{root / 'sweep.json'} has version {sweep.get('version')}, this program reads 1: start the sweep anew"
            )
        return (
            sweep["name"],
            sweep["budget"],
            {row["name"]: (root / row["name"], row) for row in sweep["rows"]},
        )
    if (root / "config.yaml").is_file():
        return root.resolve().parent.name, "", {root.name: (root, None)}
    inside = sorted(path.parent for path in root.glob("*/config.yaml"))
    if not inside:
        raise UsageError(
            f"{root} is no sweep (sweep.json), no run folder (config.yaml) and holds no run folders"
        )
    return root.name, "", {folder.name: (folder, None) for folder in inside}


def read_json(path: Path) -> dict | None:
    """Return a JSON object, None where there is no file; ValueError that names a file which is not whole."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object")
    return value


def read_run(name: str, folder: Path, row: dict | None) -> Run:
    """Read one run folder; what is missing or damaged is noted, not raised. `row` is its row of a sweep, None outside of one."""
    problems, read = {}, {}
    for key, path in FILES.items():
        try:
            read[key] = (
                read_settings(folder / path) if key == "config" else read_json(folder / path)
            )
            if key in EVALUATIONS and read[key] and (problem := problem_of(key, read[key])):
                raise UsageError(f"{path}: {problem}")
        except ValueError as error:
            problems[key], read[key] = str(error).replace(f"{folder}/", ""), None
    state, reason = state_of(row, read, problems)
    notes = [reason, *(problem for problem in problems.values() if problem != reason)]
    if state in ("finished", "no test"):
        notes += older_version(read)
    settings, summary, env = (read[key] or {} for key in ("config", "summary", "env"))
    row = row or NO_ROW | {"backbone": backbone_of(settings), "seed": settings.get("seed", 0)}
    evaluated = [read[split]["dataset"] for split in EVALUATIONS if read[split]]
    searched = searches(folder / "eval")
    spent = [
        (seconds, ranks)
        for seconds, ranks in [(summary.get("seconds"), env.get("world_size")), *searched]
        if seconds
    ]
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
        **{split: read[split] for split in EVALUATIONS},
        curves=read_curves(folder / "metrics.jsonl"),
        seconds=summary.get("seconds"),
        eval_seconds=sum(seconds for seconds, _ in searched) if searched else None,
        rank_seconds=sum(s * ranks for s, ranks in spent)
        if spent and all(ranks for _, ranks in spent)
        else None,
        world_size=env.get("world_size"),
    )


def read_settings(path: Path) -> dict | None:
    """Return a config.yaml, None where there is none; ValueError for one that names no dataset, method or seed."""
    if not path.is_file():
        return None
    try:
        settings = yaml.safe_load(path.read_text())
        method_of(settings)
        return settings | {"seed": int(settings["seed"]), "dataset": str(settings["dataset"])}
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no configuration of a run ({type(error).__name__}: {error})"
        ) from None


def problem_of(split: str, results: dict) -> str:
    """Return what keeps a metrics.json of EVALUATIONS from being used; empty if nothing does."""
    if (
        not isinstance(results.get("alpha"), dict)
        or not results["alpha"]
        or "dataset" not in results
    ):
        return "an older version's: it has no dataset or no figures by α"
    if split == "valid" and "0.0" not in results["alpha"]:
        return "no α = 0, at which validation chooses; evaluate with it too"
    for alpha, entry in results["alpha"].items():
        if METRIC not in entry.get("token_match", {}):
            return f"no {METRIC} at α = {alpha}, which chooses α; its lists hold {results.get('num_beams', 'too few')} items"
    broken = next((path for path, number in numbers_in(results) if not math.isfinite(number)), None)
    return f"{broken} is not finite" if broken else ""


def numbers_in(value, path: str = ""):
    """Yield (path, number) of every float within a JSON value."""
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers_in(inner, f"{path}.{key}".strip("."))


def state_of(row: dict | None, read: dict, problems: dict[str, str]) -> tuple[str, str]:
    """Return (state, reason) of a run from its row of the sweep, what could be read of its folder, and what could not (FILES)."""
    if row and (row["state"] == "not run" or (row["state"] == "waiting" and not read["config"])):
        return row["state"], ""
    error = row["error"] or "no error line" if row and row["state"] == "failed" else ""
    for key, missing in (
        ("config", "no config.yaml"),
        ("summary", "the training has not finished"),
        ("valid", "no eval/valid"),
    ):
        if not read[key]:
            if error:
                return "failed", error
            pending = row["state"] if row and row["state"] != "finished" else ""
            return "unfinished", pending or problems.get(key, missing)
    if "test" in problems:
        return "unfinished", problems["test"]
    if not read["test"]:
        untested = UNTESTED[row["chosen"]] if row else "not evaluated on test"
        return "no test", "; ".join(filter(None, [untested, error]))
    alpha = reported_alpha(read["config"], read["valid"])
    if alpha not in read["test"]["alpha"]:
        return "unfinished", f"eval/test lacks α = {alpha}, at which it is to be reported"
    return "finished", error


def older_version(read: dict) -> list[str]:
    """Return a note for each file of a whole run that lacks what this version writes."""
    lacking = {
        "summary.json": {"seconds"} - read["summary"].keys(),
        "env.json": {"world_size"} - (read["env"] or {}).keys(),
    }
    for split, path in EVALUATIONS.items():
        entries = read[split]["alpha"].values() if read[split] else ()
        lacking[path] = {figure for entry in entries for figure in FIGURES if figure not in entry}
    return [
        f"{path} lacks {', '.join(sorted(keys))} (an older version?)"
        for path, keys in lacking.items()
        if keys
    ]


def backbone_of(settings: dict) -> str:
    """Return the name of the model configuration or of the pretrained model; nothing for a recommender that does not generate."""
    return Path(
        settings.get("model_config") or settings.get("model_name_or_path") or ""
    ).name.removesuffix(".json")


def dataset_name(settings: dict) -> str:
    """Return the name of the dataset that a run was given: its own or, where it is gone, its folder's."""
    folder = Path(settings.get("dataset", "unknown"))
    try:
        return (read_json(folder / "dataset.json") or {}).get("name", folder.name)
    except ValueError:
        return folder.name


def read_curves(path: Path) -> dict[str, list]:
    """Return the thinned curves of a metrics.jsonl by tag, as far as they are kept (CURVES)."""
    curves = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, KeyError, TypeError):
            break  # a kill cut the last line off
        for tag, value in entry.items():
            if tag.startswith(CURVES):
                curves.setdefault(tag, []).append([step, value])
    return {tag: thinned(points) for tag, points in curves.items()}


def searches(folder: Path) -> list[tuple[float, int | None]]:
    """Return (seconds, ranks) of the searches of a run's evaluations that tell, as if each had run in one go."""
    found = []
    for path in sorted(folder.glob("*/timing.json")):
        try:
            timing = read_json(path)
            seconds = (timing["rows_searched"] + timing["rows_already_there"]) / timing[
                "rows_per_second"
            ]
            found.append((seconds, timing.get("world_size")))
        except (
            ValueError,
            KeyError,
            ZeroDivisionError,
        ):  # damaged, an older version, nothing left to search
            continue
    return found


def thinned(points: list[list], most: int = POINTS) -> list[list]:
    """Return at most `most` [step, value] points: means over equal stretches, to six digits."""
    stretches = (
        np.array_split(np.array(points, dtype=np.float64), min(most, len(points))) if points else []
    )
    return [[float(f"{number:.6g}") for number in stretch.mean(0)] for stretch in stretches]


def environment_of(paths: list[Path]) -> dict:
    """Return what the runs' env.json say of versions and hardware: by key the different values, in order of appearance."""
    values = {}
    for path in paths:
        try:
            env = read_json(path)
        except ValueError:
            continue
        if env is None:  # of a row that was never started
            continue
        program = env.get("igd_ds", {})
        igd_ds = {
            "igd_ds": program.get("version"),
            "commit": program.get("commit") or "not recorded",
        }
        for key, value in (igd_ds | env.get("versions", {}) | env.get("hardware", {})).items():
            values.setdefault(key, {})[str(value)] = None
    return {key: ", ".join(different) for key, different in values.items()}


def with_labels(runs: list[Run]) -> list[Run]:
    """Return the runs, those outside of sweeps with method and group too."""
    labelled = {}
    for dataset, backbone in {(run.dataset, run.backbone): None for run in runs}:
        alike = [
            r
            for r in runs
            if (r.dataset, r.backbone) == (dataset, backbone) and not r.method and r.settings
        ]
        for run, method in zip(alike, labels([r.settings for r in alike]), strict=True):
            group = "-".join(filter(None, [dataset, backbone, method]))
            labelled[run.name] = replace(run, method=method, group=group)
    return [labelled.get(run.name, run) for run in runs]


def once(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """Return a dataset's runs without those that are there already with their method and seed, and these, set aside."""
    first, twice = {}, []
    for run in runs:
        key = (run.backbone, run.method, run.seed)
        if first.setdefault(key, run) is not run:
            twice.append(
                replace(
                    run, state="unfinished", note=f"left out: method and seed of {first[key].name}"
                )
            )
    return list(first.values()), twice


def with_note(run: Run, note: str) -> Run:
    """Return the run with one more note."""
    return replace(run, note="; ".join(filter(None, [run.note, note])))


def refuse_unlike(runs: list[Run], folders: dict[str, Path]) -> None:
    """Raise ValueError if a dataset's runs were not evaluated alike (ALIKE), or those of one backbone not decoded alike."""
    for split, path in EVALUATIONS.items():
        seen = {}
        for run in (run for run in runs if getattr(run, split)):
            evaluation = (folders[run.name] / path).parent
            values = describe_evaluation(evaluation, run)
            scope = {key: run.backbone if key in ALIKE_IN_BACKBONE else "" for key in values}
            first = {
                key: seen.setdefault((key, scope[key]), (values[key], evaluation)) for key in values
            }
            different = [key for key in values if first[key][0] != values[key]]
            if different:
                shown = {
                    key: f" ({values[key]} and {first[key][0]})"
                    for key in different
                    if not isinstance(values[key], dict)
                }
                raise UsageError(
                    f"{evaluation} and {first[different[0]][1]} are evaluations of {run.dataset}, but not alike: "
                    f"{', '.join(key + shown.get(key, '') for key in different)} differ; report them apart, or evaluate one again"
                )


def describe_evaluation(folder: Path, run: Run) -> dict:
    """Return what must be alike as far as the evaluation in `folder` and its run's dataset tell it."""
    results, dataset = read_json(folder / "metrics.json"), {"fingerprint": fingerprint_of(folder)}
    with contextlib.suppress(KeyError, ValueError):
        dataset |= {
            "protocol": (read_json(Path(run.settings["dataset"]) / "dataset.json") or {}).get(
                "protocol"
            )
        }
    results |= {key: value for key, value in dataset.items() if value is not None}
    return {key: results[key] for key in (*ALIKE, *ALIKE_IN_BACKBONE) if key in results}


def fingerprint_of(evaluation: Path) -> str | None:
    """Return the fingerprint of the dataset that was evaluated, None where an older version did not write it down."""
    return (read_json(evaluation / "request.json") or {}).get("dataset")


def open_source(
    runs: list[Run], folders: dict[str, Path]
) -> tuple[InteractionDataset, StoredCatalogue | None]:
    """Return the dataset that runs were evaluated on, and a generating run's catalogue of it, None where there is no such run.

    Raises ValueError if the dataset is gone or another one now.
    """
    places = list(dict.fromkeys(Path(run.settings["dataset"]) for run in runs))
    there = [place for place in places if (place / "dataset.json").is_file()]
    if not there:
        raise UsageError(f"the dataset is not at {places[0]}")
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


def describe_catalogue(dataset: InteractionDataset, stored: StoredCatalogue) -> dict:
    """Return what `Study.catalogues` keeps of a dataset."""
    gains = sorted(mean_by_token(stored.trie, purity_gain(stored.trie))[1].tolist(), reverse=True)
    statistics = catalogue_statistics(dataset, stored.catalogue, stored.trie, stored.entropy)
    sizes = [
        step
        for step in dataset.info.get("funnel", ())
        if "users" in step and "interactions" in step
    ]
    interactions = (
        {key: sizes[-1][key] for key in ("users", "interactions")} if sizes else {}
    )  # none of ready-made rows
    return (
        statistics
        | interactions
        | {
            "purity_gain_by_token": [gain for _, gain in thinned(list(enumerate(gains)))],
            "quantizer": dataset.info.get("semantic_ids", {}).get("request", {}).get("quantizer"),
        }
    )


def with_ranks(run: Run, folder: Path, dataset: InteractionDataset) -> Run:
    """Return the run with the ranks of the targets in its lists at `Run.alpha`."""
    for split in (split for split in SPLITS if getattr(run, split)):
        path = folder / "eval" / split / f"predictions-alpha{run.alpha}.parquet"
        try:
            ranks = target_ranks(path, dataset.splits[split].targets)
        except (ValueError, KeyError, IndexError, OSError) as error:  # pyarrow raises any of them
            why = f"damaged ({' '.join(str(error).split())})" if path.is_file() else "not there"
            return with_note(
                run, f"{path.relative_to(folder)} is {why}: no groups of rows and no tests by user"
            )
        run = replace(run, ranks=run.ranks | {split: ranks})
    return run


def target_ranks(path: Path, targets: np.ndarray) -> Ranks:
    """Return the ids of the rows in a predictions file, ascending, and the rank of each one's target, 0 where it is not listed.

    Both are int32 (R,). `targets` has the target of every row of the split. Items that share a leaf share its rank.
    """
    table = pq.read_table(path, columns=["row_id", "rank", "item_ids"])
    row, items = table["row_id"].to_numpy(), table["item_ids"].combine_chunks()
    line = np.repeat(np.arange(len(row)), pc.list_value_length(items).to_numpy())
    line = line[items.flatten().to_numpy() == targets[row[line]]]
    rows = np.unique(row)
    rank = np.zeros(len(rows), np.int32)
    rank[np.searchsorted(rows, row[line])] = table["rank"].to_numpy()[line]
    return Ranks(rows.astype(np.int32), rank)


def row_groups(
    runs: list[Run], dataset: InteractionDataset, trie: TokenTrie
) -> dict[str, dict[str, np.ndarray]]:
    """Return `Study.rows` of a dataset. Raises ValueError if the runs' predictions are of different rows."""
    groups, leaf = {}, np.asarray(trie.leaf_of_item)
    for name in SPLITS:
        ranked = [run for run in runs if name in run.ranks]
        if not ranked:
            continue
        split, rows = dataset.splits[name], ranked[0].ranks[name].row
        for run in ranked:
            if not np.array_equal(run.ranks[name].row, rows):
                raise UsageError(
                    f"the predictions of {run.name} and {ranked[0].name} on {name} are of different rows"
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
    runs: list[Run], folders: dict[str, Path], dataset: InteractionDataset, number: int
) -> list[dict]:
    """Return lists side by side for rows of test drawn at random from those whose target the methods do not rank alike.

    Of each method the run with the smallest seed is shown. Nothing for a dataset with items that have no title.
    """
    shown, title = [], dataset.titles
    tested = sorted((run for run in runs if "test" in run.ranks), key=lambda run: run.seed)
    for backbone in (
        dict.fromkeys(run.backbone for run in runs if not run.is_baseline)
        if None not in title
        else ()
    ):
        methods = {
            run.method: run
            for run in reversed(tested)
            if run.is_baseline or run.backbone == backbone
        }
        methods = {
            run.method: methods[run.method] for run in runs if run.method in methods
        }  # in the table's order
        if len(methods) < 2:
            continue
        ranks = np.stack([run.ranks["test"].rank for run in methods.values()])
        rows = next(iter(methods.values())).ranks["test"].row[(ranks != ranks[0]).any(0)]
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:number])
        lists = {
            method: first_titles(folders[run.name], run.alpha, rows, title)
            for method, run in methods.items()
        }
        for row in rows.tolist():
            history = [title[item] for item in dataset.splits["test"].history(row)]
            entry = {
                "dataset": runs[0].dataset,
                "backbone": backbone,
                "row": row,
                "history": history,
            }
            entry |= {"target": title[dataset.splits["test"].targets[row]]}
            shown.append(
                entry | {"lists": {method: by_row[row] for method, by_row in lists.items()}}
            )
    return shown


def first_titles(
    run: Path, alpha: str, rows: np.ndarray, titles: list[str]
) -> dict[int, list[str]]:
    """Return by row the titles on the first places of a run's lists on test."""
    table = pq.read_table(
        run / "eval" / "test" / f"predictions-alpha{alpha}.parquet",
        columns=["row_id", "rank", "item_ids"],
    )
    table = table.filter(
        pc.and_(
            pc.is_in(table["row_id"], pa.array(rows, pa.int64())),
            pc.less_equal(table["rank"], EXAMPLE_LENGTH),
        )
    )
    found = {row: [] for row in rows.tolist()}
    for line in table.sort_by([("row_id", "ascending"), ("rank", "ascending")]).to_pylist():
        found[line["row_id"]].append(titles[line["item_ids"][0]])
    return found
