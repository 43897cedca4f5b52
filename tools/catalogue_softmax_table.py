"""Print the tables of docs/results/catalogue-softmax.md, from what tools/catalogue_softmax.sh made.

    python tools/catalogue_softmax_table.py runs/softmax [FIGURE.svg]

FIGURE.svg is the page's figure: NDCG@10 of each objective and way of ranking. A run counts once all
three ways of ranking the test rows are there, and a stage of `igd prefer` once it has improved the
model that it began with. Differences are NDCG@10, with the 95 % interval of a paired bootstrap over
users (igd compare).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from igd_ds.commands.compare import Json, compare, with_sd
from igd_ds.data.dataset import InteractionDataset
from igd_ds.studies.report.drawing import WIDTH, Figure, look
from igd_ds.studies.rounding import mean_sd

DATASETS = {
    "games-2015": "titles (games-2015, 2 epochs)",
    "instruments-1-epoch": "semantic IDs (instruments, 1 epoch)",
}
WAYS = {
    "full-beam": "beam, full softmax",
    "masked-beam": "beam, masked",
    "masked-exact": "**exact, masked**",
}
EXACT, REFERENCE = "masked-exact", "uniform"
STAGES = ("s-dpo", "grpo")
"""Beginnings of the names of what `igd prefer` made, which the figure leaves out."""


def runs_by_method(folder: Path) -> dict[str, dict[int, Path]]:
    """Return the finished runs of a dataset by method and seed, the reference first."""
    found: dict[str, dict[int, Path]] = {}
    for run in sorted(folder.glob("*-[0-9]")):
        summary = run / "summary.json"
        improved = summary.exists() and json.loads(summary.read_text())["best_step"] > 0
        if improved and all((run / "eval" / way / "metrics.json").exists() for way in WAYS):
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


def draw(canvas: Any, ndcg: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    """Draw a panel per dataset with a line per method and a mark per way, mean ± sd over seeds.

    Args:
        canvas: an empty matplotlib figure.
        ndcg: dataset → method → way → NDCG@10 of its seeds.
    """
    panels = canvas.subplots(1, len(ndcg), sharey=True)
    for axes, (title, methods) in zip(panels, ndcg.items(), strict=True):
        for index, (way, label) in enumerate(WAYS.items()):
            points = [mean_sd(by_way[way]) for by_way in methods.values()]
            height = np.arange(len(points)) + 0.18 * (index - 1)
            means = [mean for mean, _ in points]
            deviations = [deviation or 0.0 for _, deviation in points]
            style = look(index) | {"linestyle": "none", "capsize": 2}
            axes.errorbar(means, height, xerr=deviations, label=label.strip("*"), **style)
        axes.set(title=title, xlabel="NDCG@10")
        axes.set_yticks(range(len(methods)), list(methods))
    panels[0].invert_yaxis()
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def main() -> None:
    """Print both tables for each dataset; draw the figure where a file for it is given."""
    runs, *figure = map(Path, sys.argv[1:])
    drawn: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, title in DATASETS.items():
        methods = runs_by_method(runs / name)
        dataset = InteractionDataset.load(runs / name / "data")
        print(f"\n{title}\n")
        print_ways(methods, dataset)
        print()
        print_methods(methods, dataset)
        drawn[title] = {
            method: {
                way: [
                    metrics_of(folder)["alpha"]["0.0"]["item_match"]["ndcg@10"]
                    for folder in ranked(list(by_seed.values()), way)
                ]
                for way in WAYS
            }
            for method, by_seed in methods.items()
            if not method.startswith(STAGES)
        }
    for file in figure:
        picture = Figure("", "", "", lambda canvas: draw(canvas, drawn), (WIDTH, 3.0))
        file.write_bytes(picture.render("svg"))


if __name__ == "__main__":
    main()
