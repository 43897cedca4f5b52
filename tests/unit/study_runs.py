"""Run folders made by hand around a tiny dataset, with lists that the test chooses."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiny_run
import yaml

from igd_ds.data.dataset import InteractionDataset

TITLES = [*tiny_run.TITLES, "bb", "bca", "cc", "cba"]  # items 2 and 3 share a leaf
ROWS = {
    "valid": [0, 1, 2, 3, 5, 6, 7, 8, 9, 10],
    "test": list(range(tiny_run.NUM_TEST)),
}  # row 4 of valid has no history
LENGTH = 10
ALPHAS = ("0.0", "0.2")


def ndcg(rank: int, cutoff: int = LENGTH) -> float:
    return 1 / np.log2(rank + 1) if 0 < rank <= cutoff else 0.0


def match(ranks: list[int], credit: np.ndarray) -> dict[str, float]:
    found = {}
    for k in (5, 10):
        found[f"ndcg@{k}"] = float(np.mean(credit * [ndcg(rank, k) for rank in ranks]))
        found[f"hr@{k}"] = float(np.mean(credit * [0 < rank <= k for rank in ranks]))
    return found


def draw(random) -> dict:
    """Ranks 0 … LENGTH of each row's target, by split and α."""
    return {
        split: {alpha: random.integers(0, LENGTH + 1, len(rows)).tolist() for alpha in ALPHAS}
        for split, rows in ROWS.items()
    }


def write_run(folder: Path, source: Path, settings: dict, ranks: dict, **changes) -> Path:
    """Write a run folder.

    Args:
        folder: the run folder.
        source: the folder that tiny_run.make left.
        settings: the config.yaml.
        ranks: as `draw` returns them.
        changes: entries of metrics.json.
    """
    dataset = InteractionDataset.load(source.parent / "data")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            {"dataset": str(source.parent / "data"), "model_config": "m/q.json"} | settings
        )
    )
    (folder / "summary.json").write_text(json.dumps({"step": 3, "seconds": 60.0}))
    environment = {
        "versions": {"torch": "2"},
        "igd_ds": {"version": "1", "commit": "c"},
        "hardware": {"cpus": 2, "gpu": None},
    }
    (folder / "env.json").write_text(json.dumps(environment | {"world_size": 2}))
    lines = [
        {"step": step, "train/nll": step / 2, "speed/rows_per_second": 1.0}
        for step in range(1, 401)
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 401, "train/n'
    )
    (folder / "model").mkdir()
    if not (folder / "model" / "catalogue").exists():
        (folder / "model" / "catalogue").symlink_to(source / "model" / "catalogue")

    for split, by_alpha in ranks.items():
        write_evaluation(folder / "eval" / split, dataset, split, by_alpha, changes)
    return folder


def write_evaluation(folder: Path, dataset, split: str, by_alpha: dict, changes: dict) -> None:
    folder.mkdir(parents=True)
    results = {
        "split": split,
        "dataset": "toy",
        "rows": len(ROWS[split]),
        "num_rows": 0,
        "seed": 0,
        "num_beams": LENGTH,
        "alpha": {},
    }
    results |= {
        "length_penalty": 0.0,
        "popularity_baseline": {f"{m}@{k}": 0.1 for m in ("hr", "ndcg") for k in (5, 10)},
    }
    results |= {"target_popularity_deciles": [0.1] * 10}

    targets = dataset.splits[split].targets[ROWS[split]]
    shared = np.where(np.isin(targets, (2, 3)), 0.5, 1.0)
    for alpha, ranks in by_alpha.items():
        results["alpha"][alpha] = {
            "token_match": match(ranks, np.ones(len(ranks))),
            "item_match": match(ranks, shared),
            "first_token_repetition": 0.5,
            "score_entropy_bits": 2.0,
            "coverage": 0.3,
            "gini_index": 0.4,
            "popularity_deciles": [0.1] * 10,
            "cold_share_of_listed": 0.0,
        }
        write_lists(
            folder / f"predictions-alpha{alpha}.parquet",
            ROWS[split],
            dataset.splits[split].targets,
            ranks,
        )
    (folder / "metrics.json").write_text(json.dumps(results | changes, sort_keys=True))
    (folder / "timing.json").write_text(
        json.dumps(
            {"rows_searched": 8, "rows_already_there": 2, "rows_per_second": 5.0}
            | {"world_size": 3}
        )
    )
    (folder / "request.json").write_text(json.dumps({"dataset": dataset.fingerprint}))


def write_lists(path: Path, rows: list[int], targets, ranks: list[int]) -> None:
    """Lists of LENGTH leaves, one item each but for items 2 and 3, with the target at its rank."""
    lines = []
    for row, rank in zip(rows, ranks, strict=True):
        target = int(targets[row])
        leaf = [2, 3] if target in (2, 3) else [target]
        others = [[item] for item in range(len(TITLES)) if item not in (*leaf, 3)]
        listed = [*others[: rank - 1], leaf, *others[rank - 1 :]] if rank else others
        lines += [
            {"row_id": row, "rank": place + 1, "item_ids": items}
            for place, items in enumerate(listed[:LENGTH])
        ]
    schema = pa.schema(
        [("row_id", pa.int64()), ("rank", pa.int32()), ("item_ids", pa.list_(pa.int32()))]
    )
    pq.write_table(pa.Table.from_pylist(lines, schema=schema), path)


def sweep_row(name: str, state: str = "finished", **changes) -> dict:
    """A row of sweep.json."""
    row = {
        "name": name,
        "state": state,
        "error": None,
        "dataset": "toy",
        "backbone": "q",
        "method": "uniform",
        "group": "g",
        "seed": 0,
    }
    return row | {"settings": {"objective": "uniform"}, "chosen": True} | changes


def write_sweep(folder: Path, rows: list[dict]) -> Path:
    sweep = {
        "version": 1,
        "name": "a sweep",
        "table": "t.yaml",
        "budget": "little",
        "select": {},
        "rows": rows,
    }
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder
