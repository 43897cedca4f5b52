"""Print the test table of some runs: the popularity baseline, each run at α = 0, and at the α chosen on validation.

    python tools/compare.py runs/demo/uniform runs/demo/igd

Reads RUN/eval/valid/metrics.json (to choose α) and RUN/eval/test/metrics.json. Token match, all-ranking, cold items included.
"""

import argparse
import json
from pathlib import Path

import yaml

from igd_ds.metrics import best_alpha

COLUMNS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10")


def read(run: Path, split: str) -> dict:
    """Return a run's metrics on a split; ValueError that names the command to run if it was not evaluated."""
    path = run / "eval" / split / "metrics.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: run igd_ds/eval.py --model {run}/model --split {split} --output_dir {path.parent}")
    return json.loads(path.read_text())


def rows_of(run: Path) -> list[tuple[str, dict]]:
    """Return (label, metrics) of a run at α = 0 and at the chosen α."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    beta = f" β={config['igd_beta']}" if config["igd_beta"] is not None else ""
    chosen, test = best_alpha(read(run, "valid")), read(run, "test")["alpha"]
    if chosen not in test:
        raise ValueError(f"{run}: α = {chosen} is best on validation but was not evaluated on test (there: {', '.join(test)})")
    name = f"{config['weighting']}{beta} seed {config['seed']}"
    labels = {"0.0": "α=0"} | {chosen: f"α={chosen} (chosen on validation)"}
    return [(f"{name}, {label}", test[key]["token_match"]) for key, label in labels.items()]


def main(argv: list[str] | None = None) -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of one dataset")
    runs = parser.parse_args(argv).runs
    tests = [read(run, "test") for run in runs]
    for key in ("dataset", "rows", "num_beams", "popularity_baseline"):
        if any(test[key] != tests[0][key] for test in tests):
            raise ValueError(f"these runs were not evaluated alike: '{key}' differs in their test metrics.json")
    lines = [("popularity (training counts)", tests[0]["popularity_baseline"])]
    lines += [line for run in runs for line in rows_of(run)]
    width = max(len(label) for label, _ in lines)
    print(f"| {tests[0]['rows']} test rows of {tests[0]['dataset']}".ljust(width + 2) + " | " + " | ".join(COLUMNS) + " |")
    print("|---|" + "---|" * len(COLUMNS))
    for label, values in lines:
        print(f"| {label:{width}} | " + " | ".join(f"{values[c]:.4f}" if c in values else "–" for c in COLUMNS) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
