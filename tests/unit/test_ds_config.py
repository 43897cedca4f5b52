"""The DeepSpeed file: each that we ship resolves, each mistake is named; checkpoints on disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from igd_ds.config.training import LoopOptions
from igd_ds.engine import checkpoint
from igd_ds.engine.build import schedule_factor
from igd_ds.engine.checkpoint import check_disk_space
from igd_ds.engine.ds_config import dtype_of, find_ds_config, resolve_ds_config, zero_stage
from igd_ds.errors import UsageError

FOLDER = Path(__file__).parents[2] / "ds_configs"


def options(path, **changes) -> LoopOptions:
    return LoopOptions(ds_config=str(path), dataset="unused", output_dir="unused", **changes)


def resolve(path, world, load_in_4bit=False, **changes):
    return resolve_ds_config(options(path, **changes), world, load_in_4bit)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda p: p.stem)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shipped_files_resolve_for_any_number_of_ranks(path, world, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ds = resolve(path, world, global_batch_size=256)
    micro = ds["train_micro_batch_size_per_gpu"]
    assert micro * ds["gradient_accumulation_steps"] * world == ds["train_batch_size"] == 256
    assert ds["gradient_clipping"] == 1.0
    assert zero_stage(ds) == int(path.stem[4])
    expected = {"fp32": torch.float32, "fp16": torch.float16}.get(
        path.stem.split("-")[-1], torch.bfloat16
    )
    assert dtype_of(ds) == expected
    assert ("offload" in path.stem) == ("offload_optimizer" in ds["zero_optimization"])


@pytest.mark.parametrize(
    ("batch", "world", "micro"), [(32, 1, 32), (32, 8, 4), (256, 2, 64), (64, 1, 64)]
)
def test_a_micro_batch_is_at_most_the_global_batch_over_the_ranks(batch, world, micro):
    ds = resolve(FOLDER / "zero1-batch64-fp32.json", world, global_batch_size=batch)
    assert (ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]) == (
        micro,
        batch // (micro * world),
    )


GOOD = {
    "train_micro_batch_size_per_gpu": 8,
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"zero_optimisation": {}}, {}, "did you mean 'zero_optimization'"),
        ({"gradient_acumulation_steps": 2}, {}, "unknown key 'gradient_acumulation_steps'"),
        ({"checkpoint": {"load_universal": True}}, {}, "checkpoint.load_universal belongs to"),
        ({"gradient_accumulation_steps": 2}, {}, "belongs to the run.*--global_batch_size"),
        ({"train_batch_size": 64}, {}, "belongs to the run.*--global_batch_size"),
        ({"gradient_clipping": 1.0}, {}, "--max_grad_norm"),
        ({"optimizer": {}}, {}, "--learning_rate"),
        ({"scheduler": {}}, {}, "--schedule"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            {},
            "zero_optimization.reduce_bucket_size.*auto",
        ),
        ({"bf16": {"enabled": "auto"}}, {}, "bf16.enabled"),
        ({"train_micro_batch_size_per_gpu": "auto"}, {}, "train_micro_batch_size_per_gpu"),
        ({"train_micro_batch_size_per_gpu": 0}, {}, "positive whole number"),
        ({"zero_optimization": {"stage": 4}}, {}, "stage must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, {}, "use stage 1"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": True}}, {}, "fp16 needs a GPU"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            {"load_in_4bit": True},
            "--load_in_4bit",
        ),
        (
            {},
            {"global_batch_size": 1},
            "--global_batch_size 1 is not a multiple of micro-batch 1 .* × 2 ranks = 2",
        ),
        (
            {},
            {"global_batch_size": 20},
            "--global_batch_size 20 is not a multiple of micro-batch 8 .* × 2 ranks = 16",
        ),
    ],
)
def test_mistakes_name_file_and_key(tmp_path, monkeypatch, change, settings, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(GOOD | change))
    with pytest.raises(UsageError, match=message) as caught:
        resolve(file, 2, **settings)
    assert "ds.json" in str(caught.value)


def test_files_that_come_with_the_package_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = find_ds_config("zero2-fp32")
    assert json.loads(shipped.read_text())["zero_optimization"]["stage"] == 2
    with pytest.raises(UsageError, match="no file zero4, did you mean 'zero3'.* zero2-fp32"):
        find_ds_config("zero4")

    (tmp_path / "zero2").write_text("{}")  # a file of the user's own comes first
    assert find_ds_config("zero2") == Path("zero2")


def test_a_missing_or_broken_file(tmp_path):
    with pytest.raises(UsageError, match="--ds_config: no file"):
        resolve(tmp_path / "none.json", 1)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UsageError, match="broken.json: not JSON"):
        resolve(tmp_path / "broken.json", 1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_schedule(schedule, expected):
    factor = schedule_factor(options("unused", warmup_ratio=1 / 3, schedule=schedule), 6)
    assert [factor(s) for s in range(6)] == pytest.approx(expected)


def test_disk_space(tmp_path, monkeypatch):
    check_disk_space(tmp_path, 1_000_000, 2)
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match="--output_dir .*MiB free"):
        check_disk_space(tmp_path, 1_000_000, 2)
    (tmp_path / "checkpoints").mkdir()
    # What lies there already takes no further space.
    (tmp_path / "checkpoints" / "state").write_bytes(b"0" * 50_000_000)
    check_disk_space(tmp_path, 1_000_000, 2)


def manifest(world_size: int, size: int) -> str:
    """Return the manifest of a checkpoint with one file of `size` bytes."""
    content = {"world_size": world_size, "trained": [], "files": {"weights": size}, "state": {}}
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    ["[]", '{"train_micro_batch_size_per_gpu": 1, "bf16": true}', '{"zero_optimization": null}'],
)
def test_malformed_files(tmp_path, text):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UsageError, match="ds.json: .*must be JSON objects"):
        resolve(tmp_path / "ds.json", 1)
