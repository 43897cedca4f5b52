"""Reads run folders into a `Study`.

`run_files` reads a single run; `dataset_details` adds what only the runs' dataset can tell.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from igd_ds.errors import UsageError
from igd_ds.studies.report.dataset_details import Details, add_details
from igd_ds.studies.report.run_files import Location, read_json, read_record, read_run
from igd_ds.studies.report.study import Json, Run, Study, method_names

OF_A_ROW = {
    "name", "dataset", "backbone", "method", "group", "seed", "state", "error", "chosen",
    "settings",
}  # fmt: skip
"""The entries of sweep.json's rows that a report needs."""


@dataclass(frozen=True)
class Root:
    """A folder that was given: its name, its budget and the runs below it by name."""

    name: str
    budget: str
    locations: dict[str, Location]


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
        if not is_sweep(sweep):
            raise UsageError(
                f"{root / 'sweep.json'} is damaged: "
                f"`igd sweep TABLE --output {root} --list` writes it again"
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


def is_sweep(sweep: Json) -> bool:
    """Return whether the content of a sweep.json has all entries that a report reads."""
    rows = sweep.get("rows")
    return (
        isinstance(sweep.get("name"), str)
        and isinstance(sweep.get("budget"), str)
        and isinstance(rows, list)
        and all(isinstance(row, dict) and row.keys() >= OF_A_ROW for row in rows)
    )


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


def environment_of(paths: Sequence[Path]) -> dict[str, str]:
    """Return versions and hardware from the runs' env.json.

    Different values of a key are joined, in order of appearance.
    """
    values: dict[str, dict[str, None]] = {}
    for path in paths:
        try:
            env = read_record(path, "env")
        except UsageError:
            continue
        if env is None:  # of a row that was never started
            continue
        program = env.get("igd_ds") or {}
        own = {
            "igd_ds": program.get("version"),
            "commit": program.get("commit") or "not recorded",
        }
        for key, value in (own | (env.get("versions") or {}) | (env.get("hardware") or {})).items():
            values.setdefault(key, {})[str(value)] = None
    return {key: ", ".join(different) for key, different in values.items()}
