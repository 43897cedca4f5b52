"""A run goes on with another number of ranks, and stays the run that it was."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from safetensors.torch import load_file

LORA = {"model_config": None, "lora_r": 4, "lora_dropout": 0.0, "gradient_checkpointing": True}
MSL = {"objective": "msl", "igd_beta": None, "msl_tau": "adaptive"}
STEPS = 6

# name: (stage, numbers of ranks one after the other, settings). The first one trains to the end.
KINDS = {
    "stage 0": (0, (2, 1), {}),
    "stage 1": (1, (2, 4, 1), {"weight_decay": 0.1}),
    "stage 2": (2, (4, 2), MSL),
    "stage 3": (3, (1, 2, 4), {"weight_decay": 0.1}),
    "stage 2 LoRA": (2, (2, 1), LORA),
    "stage 3 QLoRA": (3, (2, 1), LORA | {"load_in_4bit": True}),
}


def train(size: int, log: Path, flags: list[str]) -> str:
    from igd_ds import train

    return ranks.run(size, log, ranks.entry, train.main, flags)


def refused(size: int, log: Path, flags: list[str]) -> str:
    """Return the line with which every rank ends."""
    from igd_ds import train

    processes = ranks.start(size, log, ranks.entry, train.main, flags)
    assert ranks.wait(processes)[0] == 2, log.read_text()
    lines = {line for line in log.read_text().splitlines() if line.startswith("error: ")}
    assert len(lines) == 1, lines
    return lines.pop()


def logged(run: Path, tag: str) -> list[float]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry[tag] for entry in entries if tag in entry]


def go_back(run: Path, step: int) -> None:
    """Make a finished run one that was stopped after `step`."""
    (run / "summary.json").unlink()
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_training(run: Path, whole: Path, rel: float) -> None:
    """Same batches, rates and validations; the rest is equal but for the order of sums."""
    assert logged(run, "train/learning_rate") == logged(whole, "train/learning_rate")
    assert len(logged(run, "train/loss")) == STEPS
    for tag in ("train/loss", "train/nll", "train/grad_norm", "valid/nll", "train/msl_tau"):
        assert logged(run, tag) == pytest.approx(logged(whole, tag), rel=rel), tag

    first, second = (load_file(next((r / "model").glob("*.safetensors"))) for r in (run, whole))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_other_numbers_of_ranks(world, tmp_path, monkeypatch, kind):
    # A model that has learned nothing is far below msl's least τ: without that bound, τ moves.
    monkeypatch.setattr("igd_ds.objectives.msl.TAU_LEAST", -np.inf)
    stage, sizes, settings = KINDS[kind]
    settings = settings | {"save_every": 2, "keep_checkpoints": 9, "resume": "auto"}
    if "model_config" in settings:
        settings |= {"model_name_or_path": world.pretrained}
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(sizes[0], tmp_path / "log", world.train_flags(whole, stage, **settings))
    shutil.copytree(whole, run)

    for turn, size in enumerate(sizes[1:]):
        step = (2, 4)[turn]
        go_back(run, step)
        saved = bytes_of(run / "checkpoints" / f"step-{step:08d}")
        text = train(size, tmp_path / f"log-{turn}", world.train_flags(run, stage, **settings))
        assert f"resumed {run} from step-{step:08d}" in text
        assert ("converting it" in text) == (stage > 0)

        # The checkpoint is only read, and nothing of the conversion is left.
        assert bytes_of(run / "checkpoints" / f"step-{step:08d}") == saved
        assert not list((run / "checkpoints").glob("*.tmp-*"))
        assert_same_training(run, whole, rel=1e-5)


def test_a_baseline_goes_on_too_under_a_name_that_looks_like_a_pattern(world, tmp_path):
    from igd_ds import baseline

    settings = {
        "dataset": world.dataset,
        "ds_config": world.ds_config(1, micro=4),
        "recommender": "sasrec",
        "dropout": 0,
        "global_batch_size": 8,
        "max_steps": STEPS,
        "validate_every": 2,
        "keep_checkpoints": 9,
        "log_every": 1,
        "patience": 0,
        "splits": "test",
        "resume": "auto",
    }
    whole, run = tmp_path / "whole", tmp_path / "run [1]+"
    for folder, size in ((whole, 2), (run, 1)):
        flags = [word for item in settings.items() for word in (f"--{item[0]}", str(item[1]))]
        flags += ["--output_dir", str(folder)]
        ranks.run(size, tmp_path / "log", ranks.entry, baseline.main, flags)
        if folder == whole:
            shutil.copytree(whole, run)
            go_back(run, 2)
    assert "converting it for 1" in (tmp_path / "log").read_text()
    assert logged(run, "train/loss") == pytest.approx(logged(whole, "train/loss"), rel=1e-5)
    assert logged(run, "valid/ndcg@10") == pytest.approx(logged(whole, "valid/ndcg@10"), rel=1e-3)


def test_what_cannot_be_done_is_said_for_its_real_reason(world, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {"max_steps": 2, "save_every": 1, "resume": "auto"}
    train(1, log, world.train_flags(run, 1, **settings))
    (run / "summary.json").unlink()

    text = refused(1, tmp_path / "1", world.train_flags(run, 2, **settings))
    assert "was begun at ZeRO stage 1, and --ds_config now says stage 2" in text
    other = settings | {"ds_config": world.ds_config(1, micro=4)}
    text = refused(1, tmp_path / "2", world.train_flags(run, **other))
    assert "ds_config: train_micro_batch_size_per_gpu (2 then, 4 now)" in text
    text = refused(3, tmp_path / "3", world.train_flags(run, 1, **settings))
    assert "--global_batch_size 8 is not a multiple" in text

    # On other ranks the micro-batch is free, and what a killed conversion left is removed.
    left = run / "checkpoints" / "universal.tmp-123"
    (left / "step-00000002").mkdir(parents=True)
    assert "resumed" in train(2, tmp_path / "4", world.train_flags(run, **other))
    assert not left.exists()


def test_a_killed_conversion_does_no_harm(world, tmp_path, monkeypatch):
    from deepspeed.checkpoint import ds_to_universal

    from igd_ds import train as entry

    run, log = tmp_path / "run", tmp_path / "log"
    flags = world.train_flags(run, 2, max_steps=2, save_every=1, resume="auto")
    train(2, log, flags)
    go_back(run, 1)
    before = bytes_of(run / "checkpoints")

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(ds_to_universal, "_save_optimizer_state", die)
        processes = ranks.start(1, tmp_path / "killed", ranks.entry, entry.main, flags)
        assert ranks.wait(processes) == [-signal.SIGKILL], (tmp_path / "killed").read_text()
    assert list((run / "checkpoints").glob("universal.tmp-*"))

    # On as many ranks as before, or on others.
    shutil.copytree(run, tmp_path / "other")
    assert "resumed" in train(2, tmp_path / "1", flags)
    flags[flags.index(str(run))] = str(tmp_path / "other")
    assert "converting it for 1" in train(1, tmp_path / "2", flags)
    for folder in (run, tmp_path / "other"):
        after = bytes_of(folder / "checkpoints" / "step-00000001")
        assert after == {name: before[name] for name in after}


def test_more_ranks_than_a_group_of_parameters_has_shares(world, tmp_path):
    """Three norms have 12 numbers, padded to 16: the fourth rank would get padding alone."""
    small = json.loads(Path(world.model_config).read_text())
    small |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4}
    small |= {"num_hidden_layers": 1, "head_dim": 4, "num_attention_heads": 1, "layer_types": None}
    (tmp_path / "small.json").write_text(json.dumps(small))
    settings = {"model_config": tmp_path / "small.json", "max_steps": 2, "save_every": 1}
    flags = world.train_flags(tmp_path / "run", 2, **settings, resume="auto")
    train(1, tmp_path / "log", flags)
    go_back(tmp_path / "run", 1)
    assert "4 ranks are too many for this small model" in refused(4, tmp_path / "log2", flags)
