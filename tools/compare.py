"""Print the test table of some runs of one dataset, the popularity baseline first.

    python tools/compare.py runs/demo/uniform runs/demo/igd

One line per run and evaluated α; `*` marks the α with the best NDCG@10 on validation, the one to report. Reads
RUN/eval/valid/metrics.json and RUN/eval/test/metrics.json: token match, all-ranking, cold items included.
"""

import argparse
import json
import sys
from pathlib import Path

import yaml

from igd_ds.metrics import best_alpha

COLUMNS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10")
ALIKE = ("dataset", "rows", "num_rows", "seed", "num_beams", "length_penalty", "popularity_baseline")


def read(run: Path, split: str) -> dict:
    """Return a run's metrics on a split; ValueError that names the command to run if it was not evaluated."""
    path = run / "eval" / split / "metrics.json"
    if not path.is_file():
        raise ValueError(f"no {path}: run igd_ds/eval.py --model {run}/model --split {split} --output_dir {path.parent} first")
    return json.loads(path.read_text())


def lines_of(run: Path) -> list[list[str]]:
    """Return a run's table lines: name, α, validation NDCG@10, test columns."""
    config, valid, test = yaml.safe_load((run / "config.yaml").read_text()), read(run, "valid"), read(run, "test")
    beta = "" if config["igd_beta"] is None else f" β={config['igd_beta']}"
    name, chosen = f"{config['weighting']}{beta}, seed {config['seed']}", best_alpha(valid)
    lines = []
    for alpha, entry in test["alpha"].items():
        validated = valid["alpha"][alpha]["token_match"]["ndcg@10"]
        values = [f"{entry['token_match'][column]:.4f}" for column in COLUMNS]
        lines.append([name, alpha + " *" * (alpha == chosen), f"{validated:.4f}", *values])
    return lines


def main(argv: list[str] | None = None) -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of one dataset, evaluated alike")
    try:
        runs = parser.parse_args(argv).runs
        tests = [read(run, "test") for run in runs]
        for run, test in zip(runs, tests, strict=True):
            if differing := [key for key in ALIKE if test[key] != tests[0][key]]:
                raise ValueError(f"{run} and {runs[0]} were not evaluated alike: {', '.join(differing)} differ")
        lines = [["run", "α", "valid ndcg@10", *COLUMNS], ["---"] * (3 + len(COLUMNS))]
        lines.append(["popularity", "", "", *(f"{tests[0]['popularity_baseline'][c]:.4f}" for c in COLUMNS)])
        lines += [line for run in runs for line in lines_of(run)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{tests[0]['rows']} test rows of {tests[0]['dataset']}, {tests[0]['num_beams']} beams; * = chosen on validation\n")
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
