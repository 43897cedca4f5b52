"""Baselines on two DeepSpeed ranks: as on one rank, resumed to the bit, in all ZeRO stages."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ranks
import torch
from safetensors.torch import load_file


def entry(flags):
    from igd_ds import baseline

    return baseline.main, [str(flag) for flag in flags]


def flags(world, run, stage, *more):
    usual = {"global_batch_size": 8, "log_every": 1, "batch_size": 7, "patience": 0}
    words = [word for name, value in usual.items() for word in (f"--{name}", value)]
    return [
        "--dataset",
        world.dataset,
        "--ds_config",
        world.ds_config(stage, micro=4),
        "--output_dir",
        run,
        *words,
        *more,
    ]


def weights(run: Path) -> dict:
    return load_file(run / "model" / "model.safetensors")


def logged(run: Path, tag: str) -> list[float]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry[tag] for entry in entries if tag in entry]


def read(run: Path, split: str) -> dict:
    return json.loads((run / "eval" / split / "metrics.json").read_text())


@pytest.mark.parametrize(
    "name", ["gru4rec", pytest.param("sasrec", marks=pytest.mark.isa), "lrurec", "hstu"]
)
def test_two_ranks_are_one(world, tmp_path, name):
    """Without dropout the losses are the same, and the lists differ by rounding at most.

    Each rank ranks its own batches.
    """
    common = (
        "--recommender",
        name,
        "--dropout",
        0,
        "--max_steps",
        6,
        "--learning_rate",
        0.01,
        "--save_scores",
    )
    for size in (1, 2):
        ranks.run(
            size,
            tmp_path / "log",
            ranks.entry,
            *entry(flags(world, tmp_path / f"on-{size}", 1, *common)),
        )
    one, two = (tmp_path / f"on-{size}" for size in (1, 2))
    losses = [logged(run, "train/loss") for run in (one, two)]
    assert len(losses[0]) == 6 and losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert logged(one, "valid/ndcg@10") == pytest.approx(logged(two, "valid/ndcg@10"), rel=1e-3)
    for split in ("valid", "test"):
        scores = [np.load(run / "eval" / split / "scores.npy") for run in (one, two)]
        assert np.allclose(scores[0], scores[1], rtol=1e-3) and np.allclose(
            scores[0].sum(1), 1, atol=1e-5
        )
        assert read(one, split)["rows"] == read(two, split)["rows"] == len(scores[0])
        lists = pq.read_table(two / "eval" / split / "predictions-alpha0.0.parquet")
        assert np.array_equal(np.unique(lists["row_id"]), np.arange(len(scores[0])))
        assert json.loads((two / "eval" / split / "timing.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    ("stage", "name", "loss"),
    [(1, "sasrec", "bce"), (3, "lrurec", "bpr-max"), (3, "gru4rec", "cross-entropy")],
)
def test_a_stopped_run_resumes_bit_identically(world, tmp_path, stage, name, loss):
    """With dropout and negatives, stopped by a signal after its first checkpoint."""
    more = [
        "--recommender",
        name,
        "--loss",
        loss,
        "--dropout",
        0.3,
        "--max_steps",
        9,
        "--validate_every",
        3,
        "--splits",
        "test",
    ]
    more += [] if loss == "cross-entropy" else ["--num_negatives", 5]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ranks.run(2, tmp_path / "log", ranks.entry, *entry(flags(world, whole, stage, *more)))
    words = entry(flags(world, stopped, stage, *more, "--resume", "auto"))
    processes = ranks.start(2, tmp_path / "stopped.log", ranks.entry, *words)
    while not list((stopped / "checkpoints").glob("step-*/manifest.json")):
        time.sleep(0.01)
        assert any(p.is_alive() for p in processes), (tmp_path / "stopped.log").read_text()
    os.kill(processes[1].pid, signal.SIGUSR1)  # one rank gets it, all ranks stop
    assert ranks.wait(processes) == [85, 85], (tmp_path / "stopped.log").read_text()
    assert not (stopped / "summary.json").exists()
    assert "resumed" in ranks.run(2, tmp_path / "resumed.log", ranks.entry, *words)
    first, second = weights(whole), weights(stopped)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert all(tensor.numel() > 0 for tensor in first.values()), "ZeRO-3 must gather its parts"
    for tag in ("train/loss", "valid/ndcg@10"):
        assert logged(whole, tag) == logged(stopped, tag)
    assert read(whole, "test") == read(stopped, "test")


def test_training_beats_popularity_and_stops_early(world, tmp_path):
    """The generated users follow item-to-item steps, which popularity cannot know."""
    results = {}
    trained = flags(
        world,
        tmp_path / "sasrec",
        1,
        "--dropout",
        0.1,
        "--learning_rate",
        0.01,
        "--patience",
        8,
        "--epochs",
        60,
    )
    for name in ("popularity", "last-item-knn", "sasrec"):
        words = (
            trained
            if name == "sasrec"
            else ["--dataset", world.dataset, "--output_dir", tmp_path / name]
        )
        ranks.run(2, tmp_path / "log", ranks.entry, *entry([*words, "--recommender", name]))
        results[name] = read(tmp_path / name, "test")["alpha"]["0.0"]["token_match"]["ndcg@10"]
    assert (
        results["sasrec"] > 1.5 * results["popularity"]
        and results["last-item-knn"] > 1.5 * results["popularity"]
    ), results
    summary = json.loads((tmp_path / "sasrec" / "summary.json").read_text())
    assert summary["stale"] == 8 and summary["best"] == max(
        logged(tmp_path / "sasrec", "valid/ndcg@10")
    )
    assert summary["best_step"] < summary["step"] and summary["seconds"] > 0
