"""Benchmark: exact search under the catalogue's softmax against beam search, on trained models.

    python tools/bench/catalogue_softmax.py [--runs runs/softmax] [--rows 200] [--quick]

The models are those of tools/catalogue_softmax.sh: trained by `msl` with τ = 1, seed 0. Each
searches for the same rows of the test split, K = 10, α = 0, in batches of 16 on one thread. Three
sides take turns, batch by batch, so that all of them have the machine in the same state:

* beam, full: beam search, log p over the whole vocabulary. What others do.
* beam, masked: beam search, log p over the trie's next tokens.
* exact, masked: the proven list under the catalogue's softmax.

Counts are per row, without the prompt. *One token a step* are the positions of a beam search that
sends one token of each hypothesis per pass, under the full softmax. Seconds are CPU seconds of the
whole search, prompt included. --quick takes 32 rows.

Keys: `exact_masked_positions_vs_beam`, positions of the exact search over those of one token a
step; `exact_masked_time_vs_beam`, its seconds over those of the full beam search, and
`exact_masked_time_vs_masked_beam`; `proven`, the share of rows whose list is proven.
"""

import argparse
import os
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _common import finish, print_table

from igd_ds.config.search import Limits, ScoringOptions
from igd_ds.data.batches import sample_rows
from igd_ds.evaluation.recommender import Recommender
from igd_ds.search.frontier import PerUser

DATASETS = ("games-2015", "books-small", "instruments")
SIDES = {
    "beam, full": ("full", "beam"),
    "beam, masked": ("masked", "beam"),
    "exact, masked": ("masked", "exact"),
}
K, BATCH = 10, 16


def measure(run: Path, dataset: Path, num_rows: int) -> dict[str, Counter]:
    """Return the sums over the rows of each side's counts and seconds."""
    recommender = Recommender.load(run, dataset, device="cpu")
    split = recommender.dataset.splits["test"]
    rows = sample_rows(len(split), num_rows, seed=0)
    sums: dict[str, Counter] = {side: Counter() for side in SIDES}
    for number, begin in enumerate(range(-BATCH, len(rows), BATCH)):
        # The batch before the first one warms up and is not counted.
        batch = rows[max(begin, 0) : max(begin, 0) + BATCH]
        histories = [split.history(row) for row in batch]
        order = list(SIDES)[number % len(SIDES) :] + list(SIDES)[: number % len(SIDES)]
        for side in order:
            softmax, method = SIDES[side]
            scoring = recommender.scoring(ScoringOptions(softmax=softmax))
            began = time.process_time()
            found = recommender.search(histories, scoring, K, method, PerUser(), Limits())
            seconds = time.process_time() - began
            if begin >= 0:
                sums[side] += figures(found, seconds)
    return sums


def figures(found, seconds: float) -> Counter:
    """Return one batch's sums."""
    counts = {name: float(values.sum()) for name, values in found.counts.items()}
    full = (found.certified[0] >= (found.leaves[0] >= 0).sum(1)).double().sum().item()
    return Counter(counts | {"seconds": seconds, "proven": full, "rows": found.leaves.shape[1]})


def main() -> None:
    """Measure every dataset whose model is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/softmax"))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    results: dict[str, float] = {}
    for name in DATASETS:
        run = arguments.runs / name / "msl-0"
        if not (run / "model").is_dir():
            print(f"{name}: no model in {run} (tools/catalogue_softmax.sh trains it)")
            continue
        sums = measure(
            run, arguments.runs / name / "data", 32 if arguments.quick else arguments.rows
        )
        plain, masked, exact = (sums[side] for side in SIDES)
        one_token = plain["beam_positions"]
        print(
            f"\n{name}: {int(exact['rows'])} rows, one token a step {one_token / exact['rows']:.1f}"
        )
        print_table(
            ["side", "positions", "passes", "ms"],
            [
                [
                    side,
                    f"{of['positions'] / of['rows']:.1f}",
                    f"{of['passes'] / of['rows']:.1f}",
                    f"{1000 * of['seconds'] / of['rows']:.1f}",
                ]
                for side, of in sums.items()
            ],
        )
        measured = {
            "rows": int(exact["rows"]),
            "exact_masked_positions_vs_beam": exact["positions"] / one_token,
            "exact_masked_time_vs_beam": exact["seconds"] / plain["seconds"],
            "exact_masked_time_vs_masked_beam": exact["seconds"] / masked["seconds"],
            "proven": exact["proven"] / exact["rows"],
        }
        results |= {f"{name}_{key}": value for key, value in measured.items()}
    if results:
        finish("catalogue_softmax", results, arguments.quick)


if __name__ == "__main__":
    main()
