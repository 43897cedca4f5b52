"""Print the tables of docs/results/catalogue-softmax.md, from what tools/catalogue_softmax.sh made.

    python tools/catalogue_softmax_table.py runs/softmax

A run counts once all three ways of ranking the test rows are there. Differences are NDCG@10, with
the 95 % interval of a paired bootstrap over users (igd compare).
"""

import json
import sys
from pathlib import Path

import numpy as np

from igd_ds.commands.compare import Json, compare, with_sd
from igd_ds.data.dataset import InteractionDataset

WAYS = {
    "full-beam": "beam, full softmax",
    "masked-beam": "beam, masked",
    "masked-exact": "**exact, masked**",
}
EXACT, REFERENCE = "masked-exact", "uniform"


def runs_by_method(folder: Path) -> dict[str, dict[int, Path]]:
    """Return the finished runs of a dataset by method and seed, the reference first."""
    found: dict[str, dict[int, Path]] = {}
    for run in sorted(folder.glob("*-[0-9]")):
        if all((run / "eval" / way / "metrics.json").exists() for way in WAYS):
            method, _, seed = run.name.rpartition("-")
            found.setdefault(method, {})[int(seed)] = run
    return dict(sorted(found.items(), key=lambda entry: (entry[0] != REFERENCE, entry[0])))


def ranked(runs: list[Path], way: str) -> list[Path]:
    """Return the evaluations of some runs in one of WAYS."""
    return [run / "eval" / way for run in runs]


def interval(entry: Json) -> str:
    """Return a difference with its interval."""
    return f"{entry['difference']:+.4f} ({entry['low']:+.4f} to {entry['high']:+.4f})"


def metrics_of(folder: Path) -> Json:
    """Return the metrics.json of an evaluation."""
    metrics: Json = json.loads((folder / "metrics.json").read_text())
    return metrics


def print_ways(methods: dict[str, dict[int, Path]], dataset: InteractionDataset) -> None:
    """Print a line per method and way of ranking."""
    print("| objective | seeds | lists | HR@10 | NDCG@10 | positions per row | exact − this |")
    print("|---|---|---|---|---|---|---|")
    for method, by_seed in methods.items():
        runs, exact = list(by_seed.values()), ranked(list(by_seed.values()), EXACT)
        for way, title in WAYS.items():
            folders = ranked(runs, way)
            found = compare(exact, folders, dataset, None)
            sides = (
                with_sd(found[name]["against"], found[name]["against_sd"])
                for name in ("hr@10", "ndcg@10")
            )
            positions = [metrics_of(f)["search_per_row"]["positions"] for f in folders]
            gap = "" if way == EXACT else interval(found["ndcg@10"])
            print(
                f"| `{method}` | {len(runs)} | {title} | {next(sides)} | {next(sides)} | "
                f"{np.mean(positions):.1f} | {gap} |"
            )


def print_methods(methods: dict[str, dict[int, Path]], dataset: InteractionDataset) -> None:
    """Print each method against the reference, on the seeds that both have."""
    print("| objective | seeds | − uniform, exact | − uniform, beam, full | nats, masked, full |")
    print("|---|---|---|---|---|")
    for method, by_seed in methods.items():
        seeds = sorted(by_seed.keys() & methods[REFERENCE].keys())
        runs = [by_seed[seed] for seed in seeds]
        others = [methods[REFERENCE][seed] for seed in seeds]
        gaps, nats = [], []
        for way in (EXACT, "full-beam"):
            folders = ranked(runs, way)
            gaps.append(interval(compare(folders, ranked(others, way), dataset, None)["ndcg@10"]))
            nats.append(np.mean([metrics_of(folder)["target_nll"] for folder in folders]))
        print(
            f"| `{method}` | {len(seeds)} | {gaps[0]} | {gaps[1]} | {nats[0]:.2f}, {nats[1]:.2f} |"
        )


def main() -> None:
    """Print both tables for each dataset."""
    for folder in (Path(sys.argv[1]) / name for name in ("games-2015", "instruments")):
        methods = runs_by_method(folder)
        dataset = InteractionDataset.load(folder / "data")
        print(f"\n{folder.name}\n")
        print_ways(methods, dataset)
        print()
        print_methods(methods, dataset)


if __name__ == "__main__":
    main()
