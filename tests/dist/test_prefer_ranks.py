"""igd prefer on two DeepSpeed ranks: it resumes bit-identically, at any stage."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ranks
import torch
from safetensors.torch import load_file


def prefer(flags: list[str]):
    from igd_ds import prefer

    return prefer.main, flags


def metrics(run: Path, tag: str) -> list[float]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [e[tag] for e in entries if tag in e]


def weights(run: Path) -> dict:
    return load_file(next((run / "model").glob("*.safetensors")))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> dict[str, Path]:
    """Return short trainings to go on from: all weights, and an adapter."""
    from igd_ds import train

    folder = tmp_path_factory.mktemp("trained")
    lora = {"model_config": None, "model_name_or_path": world.pretrained, "lora_r": 4}
    msl = {"objective": "msl", "msl_tau": 0.8, "igd_beta": None}
    for name, settings in {"full": msl, "lora": lora}.items():
        flags = world.train_flags(folder / name, 2, **settings)
        ranks.run(1, folder / "log", ranks.entry, train.main, flags)
    return {name: folder / name for name in ("full", "lora")}


def flags_of(world, model: Path, run: Path, stage: int, **settings) -> list[str]:
    """Return the flags of a training of 6 steps, 4 of them in the first epoch."""
    flags = {
        "ds_config": world.ds_config(stage, micro=20),
        "dataset": world.dataset,
        "model": model,
        "output_dir": run,
        "beta": 0.5,
        "global_batch_size": 40,
        "learning_rate": 3e-3,
        "epochs": 2,
        "max_steps": 6,
        "validate_every": 3,
        "validation_rows": 10,
        "patience": 0,
        "log_every": 1,
        "save_every": 1,
    } | settings
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


BEAM = {"objective": "s-dpo", "negatives": "beam", "num_negatives": 4}
GRPO = {"objective": "grpo", "reward": "rank", "token_credit": "gain", "group_size": 6, "seed": 1}
GRPO |= {"max_steps": 3, "global_batch_size": 20, "validate_every": 2}
# name: (model, stage, settings, epochs whose pairs are stored, whether log π_ref is stored)
KINDS = {
    "stage 1 sibling": ("full", 1, {"negatives": "sibling", "sft_weight": 0.1}, 1, True),
    "stage 3 beam": ("full", 3, BEAM, 2, True),
    "stage 2 new adapter": ("full", 2, {"objective": "dpo", "lora_r": 4, "seed": 3}, 1, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_resumes_bit_identically(world, trained, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("igd_ds.preference.pairs.PART_ROWS", 40)  # several parts
    model, stage, settings, num_epochs, is_stored = KINDS[kind]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = flags_of(world, trained[model], whole, stage, **settings)
    ranks.run(2, tmp_path / "whole.log", ranks.entry, *prefer(flags))

    # The same run: killed while it makes its pairs, then stopped by a signal or killed in a step.
    flags = flags_of(world, trained[model], stopped, stage, **settings, resume="auto")
    log = tmp_path / "stopped.log"
    for pattern in ("pairs/epoch-0000/part-*.parquet", "checkpoints/step-*/manifest.json"):
        processes = ranks.start(2, log, ranks.entry, *prefer(flags))
        while not list(stopped.glob(pattern)):
            time.sleep(0.01)
            assert any(p.is_alive() for p in processes), log.read_text()
        if pattern.startswith("pairs") or stage == 1:
            for process in processes:
                process.kill()
            ranks.wait(processes)
        else:
            os.kill(processes[1].pid, signal.SIGUSR1)
            assert ranks.wait(processes) == [85, 85], log.read_text()
    text = ranks.run(2, log, ranks.entry, *prefer(flags))
    assert "resumed" in text

    # Weights and curves are the same, and the curves say what was trained.
    first, second = weights(whole), weights(stopped)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    for tag in ("train/loss", "train/margin", "train/kl", "train/grad_norm", "valid/ndcg@10"):
        assert metrics(whole, tag) == metrics(stopped, tag)
    losses = metrics(whole, "train/loss_preference")
    num_negatives = settings.get("num_negatives", 3)
    at_first = np.log(2) if settings.get("objective") == "dpo" else np.log(1 + num_negatives)
    assert len(losses) == 6 and losses[0] == pytest.approx(at_first, rel=1e-4)
    assert min(losses) < losses[0] and max(metrics(whole, "train/margin")) > 0
    assert abs(metrics(whole, "train/kl")[0]) < 1e-6 < metrics(whole, "train/kl")[-1]
    check_pairs(whole, num_epochs, num_negatives, is_stored)
    check_use(world, whole, "lora_r" in settings)


@pytest.mark.parametrize(("model", "settings"), [
    ("full", GRPO), ("full", GRPO | {"lora_r": 4, "lora_dropout": 0.0, "token_credit": "equal"}),
], ids=["all weights", "adapter"])  # fmt: skip
def test_groups_of_the_live_search_resume_bit_identically(
    world, trained, tmp_path, model, settings
):
    """Under ZeRO-3 the ranks search together; a resumed run finds the same groups."""
    whole, stopped, log = tmp_path / "whole", tmp_path / "stopped", tmp_path / "log"
    stage = 2 if "lora_r" in settings else 3
    settings = settings | {"ds_config": world.ds_config(stage, micro=5)}
    flags = flags_of(world, trained[model], whole, stage, **settings)
    ranks.run(2, log, ranks.entry, *prefer(flags))

    flags = flags_of(world, trained[model], stopped, stage, **settings, resume="auto")
    processes = ranks.start(2, log, ranks.entry, *prefer(flags))
    while not list(stopped.glob("checkpoints/step-*/manifest.json")):
        time.sleep(0.01)
        assert any(p.is_alive() for p in processes), log.read_text()
    os.kill(processes[0].pid, signal.SIGUSR1)
    assert ranks.wait(processes) == [85, 85], log.read_text()
    assert "resumed" in ranks.run(2, log, ranks.entry, *prefer(flags))

    first, second = weights(whole), weights(stopped)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    tags = ("train/loss", "train/kl", "train/reward", "train/groups_with_target", "valid/ndcg@10")
    for tag in tags:
        assert metrics(whole, tag) == metrics(stopped, tag)
    assert metrics(whole, "train/kl")[0] == pytest.approx(0, abs=1e-6)
    assert len(metrics(whole, "valid/ndcg@10")) == 3, "before step 1, after 2 and 3"
    assert max(metrics(whole, "train/groups_with_target")) > 0 < metrics(whole, "train/kl")[-1]
    assert min(metrics(whole, "speed/rollout_seconds")) > 0
    assert min(metrics(whole, "speed/update_seconds")) > 0
    check_use(world, whole, "lora_r" in settings)


def check_pairs(run: Path, num_epochs: int, num_negatives: int, is_stored: bool) -> None:
    """Check the stored pairs: negatives are different and never the target."""
    folders = sorted(path.name for path in (run / "pairs").glob("epoch-*"))
    assert folders == [f"epoch-{epoch:04d}" for epoch in range(num_epochs)]
    for folder in folders:
        table = pq.read_table(run / "pairs" / folder)
        items = np.array(table["items"].to_pylist())
        assert items.shape[1] == 1 + num_negatives and len(set(table["row_id"].to_pylist()))
        assert all(len(set(row)) == len(row) for row in items.tolist())
        assert ("reference" in table.column_names) == is_stored


def check_use(world, run: Path, is_adapter: bool) -> None:
    """Check that the result is taken like any trained run."""
    processes = ranks.start(1, run / "use.log", _recommend, world, run)
    assert ranks.wait(processes) == [0], (run / "use.log").read_text()
    assert (run / "model" / "adapter_config.json").is_file() == is_adapter


def _recommend(world, run: Path) -> None:
    from igd_ds import Recommender

    recommender = Recommender.load(run, dataset=world.dataset)
    (found,) = recommender.recommend([[0, 1]], k=5, ids="dense")
    assert len(found) == 5


def test_what_cannot_work_is_refused_before_anything_starts(world, trained, tmp_path):
    run = tmp_path / "run"
    other = world.folder / "other"
    cases = [
        ({"reference": "adapter-off"}, "there is no adapter to switch off"),
        ({"reference": str(trained["lora"])}, "does not belong to --model.*likelihood"),
        ({"objective": "grpo", "group_size": 1000}, "--group_size 1000: the catalogue has"),
        ({"num_negatives": 1000}, "the catalogue has .* items"),
        ({"model": str(other)}, "no model of igd train"),
        ({"model": str(trained["lora"]), "lora_r": 4}, "is an adapter already"),
        ({"dataset": str(tmp_path / "nothing")}, "nothing"),
    ]
    log = tmp_path / "log"
    for settings, message in cases:
        flags = flags_of(world, trained["full"], run, 2) + [
            word for key, value in settings.items() for word in (f"--{key}", str(value))
        ]
        log.unlink(missing_ok=True)
        codes = ranks.wait(ranks.start(1, log, ranks.entry, *prefer(flags)))
        assert codes == [2] and not run.exists(), log.read_text()
        assert re.search(message, log.read_text()), log.read_text()
