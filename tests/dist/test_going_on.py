"""A training that goes on with the LoRA adapter of another run, on two DeepSpeed ranks."""

import json
import shutil
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file

LORA = {"model_config": None, "lora_r": 4, "lora_dropout": 0.0}
KINDS = {"stage 2": (2, LORA), "stage 3": (3, LORA), "QLoRA": (2, LORA | {"load_in_4bit": True})}


def train(log: Path, flags: list[str]) -> str:
    return ranks.run(2, log, ranks.entry, *entry(flags))


def entry(flags: list[str]):
    from igd_ds import train

    return train.main, flags


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_on(world, tmp_path, kind):
    stage, settings = KINDS[kind]
    base = tmp_path / "base"
    shutil.copytree(world.pretrained, base)
    first, second = tmp_path / "first", tmp_path / "second"
    flags = world.train_flags(first, stage, **settings, model_name_or_path=base)
    train(tmp_path / "first.log", flags)

    # A step without a learning rate to speak of leaves the adapter as it was.
    still = {"learning_rate": 1e-30, "max_steps": 1, "tokenizer": None}
    settings = settings | {"model_name_or_path": first / "model"}
    train(tmp_path / "second.log", world.train_flags(second, stage, **settings | still))
    before, after = adapter_of(first), adapter_of(second)
    assert before.keys() == after.keys()
    assert any(value.abs().max() > 0 for name, value in before.items() if "lora_B" in name)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)

    # Both belong to the first base.
    records = [json.loads((run / "model" / "igd_ds.json").read_text()) for run in (first, second)]
    assert records[0]["base"] == records[1]["base"]
    assert records[0]["base"]["name"] == str(base)

    # Other weights at the base's place are refused, when a run goes on and when it resumes.
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    resumed = world.train_flags(first, stage, **settings | {"model_name_or_path": base})
    (first / "summary.json").unlink()
    third = world.train_flags(tmp_path / "third", stage, **settings | still)
    for flags, message in (
        (third, "not those that the adapter"),
        ([*resumed, "--resume", "auto"], "has other weights than when"),
    ):
        log = tmp_path / f"{message}.log"
        processes = ranks.start(2, log, ranks.entry, *entry(flags))
        assert ranks.wait(processes)[0] == 2, log.read_text()
        assert message in log.read_text()
