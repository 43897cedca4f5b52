"""`igd plan`: its tables, its JSON, what it proposes, what it refuses, and its error on a CPU."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from igd_ds.commands import plan
from igd_ds.errors import UsageError
from igd_ds.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
}
"""Eight layers of LLaMA-3 70B."""

LINEAR = [(8192, 8192)] * 2 + [(8192, 1024)] * 2 + [(8192, 28672)] * 3
"""Widths of the linear layers in each of them."""
PARAMETERS = 8 * (sum(a * b for a, b in LINEAR) + 2 * 8192) + 2 * 128_256 * 8192 + 8192


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a folder with a dataset, a tokenizer and a large configuration."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_run.write_data(tmp_path / "data", tiny_run.TITLES, None)
    tiny_run.letter_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "llama.json").write_text(json.dumps(LLAMA))
    return tmp_path


def run(folder: Path, monkeypatch, capsys, **settings) -> str:
    """Run the command and return what it prints; a setting of None is left out."""
    flags = {
        "gpu": "A100-80GB",
        "num_gpus": 8,
        "ds_config": "zero2",
        "dataset": folder / "data",
        "model_config": folder / "llama.json",
        "tokenizer": folder / "tokenizer",
        "max_length": 160,
    } | settings
    words = ["igd plan"]
    for key, value in flags.items():
        if value is not None:
            words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    monkeypatch.setattr(sys, "argv", words)
    assert plan.main() == 0
    return capsys.readouterr().out


def test_a_plan_that_fits(folder, monkeypatch, capsys):
    text = run(folder, monkeypatch, capsys)
    assert f"{PARAMETERS:,} parameters, of which {PARAMETERS:,} are trained" in text
    assert "ZeRO stage 2, bfloat16, micro-batch 8 × 1 accumulation steps × 8 ranks" in text
    assert text.endswith("It fits.\n")
    found = json.loads(run(folder, monkeypatch, capsys, json=True))
    assert found["fits"] and found["smaller"] == {} and found["packing"] == "tree"

    # 12 training rows of one history item; 2 bytes a weight; 8 ranks share the optimizer.
    needed, parameters = found["memory"], found["parameters"]
    assert needed["weights"] == 2 * parameters and needed["optimizer"] == 12 * parameters / 8
    assert found["activations"]["checkpointed"] < found["activations"]["plain"] / 2
    assert found["search_cache_per_user"] > 160 * 8 * 2 * 1024 * 2
    tokens = found["epoch_tokens"]
    assert tokens["tree"] < tokens["rows"]

    # Twice the GPUs or twice the utilisation: half the time.
    faster = json.loads(run(folder, monkeypatch, capsys, json=True, utilisation=0.7))
    assert faster["epoch_seconds"] == pytest.approx(found["epoch_seconds"] / 2)
    assert found["seconds"] == 3 * found["epoch_seconds"]


def test_a_plan_that_does_not_fit_says_what_would(folder, monkeypatch, capsys):
    settings = {"num_gpus": 1, "gpu": "RTX4090", "ds_config": "zero1"}
    found = json.loads(run(folder, monkeypatch, capsys, json=True, **settings))
    needed, smaller = found["memory"], found["smaller"]
    assert not found["fits"] and needed["peak"] > needed["available"]
    assert all(peak <= needed["peak"] for name, peak in smaller.items() if "ZeRO" not in name)
    assert smaller["--lora_r 32 --load_in_4bit"] < needed["available"]
    assert smaller["--lora_r 32 --load_in_4bit"] < smaller["--lora_r 32"]
    assert smaller["optimizer in CPU memory"] < smaller["micro-batch of 1 row"]

    text = run(folder, monkeypatch, capsys, **settings)
    assert re.search(r"It does not fit: [\d.]+ GiB are missing", text)
    assert re.search(r"  [\d.]+ GiB  fits +--lora_r 32 --load_in_4bit\n", text)
    assert re.search(r"  [\d.]+ GiB  does not fit +ZeRO stage 2\n", text)

    adapted = run(folder, monkeypatch, capsys, **settings, lora_r=16, load_in_4bit=True)
    trained = 8 * 16 * sum(a + b for a, b in LINEAR)
    assert adapted.endswith("It fits.\n") and f"of which {trained:,} are trained" in adapted


def test_a_t5_is_planned(folder, monkeypatch, capsys):
    settings = {"model_config": "tiger-small", "ds_config": "zero1-fp32", "gpu": "t4"}
    text = run(folder, monkeypatch, capsys, **settings)
    assert "packing: rows" in text and text.endswith("It fits.\n")
    assert "time" in text and "CPU memory" not in text
    offloaded = run(folder, monkeypatch, capsys, **settings | {"ds_config": "zero3-offload"})
    assert "CPU memory" in offloaded


def test_bad_input_is_refused(folder, monkeypatch, capsys):
    def refused(message: str, **settings) -> None:
        with pytest.raises(UsageError, match=message):
            run(folder, monkeypatch, capsys, **settings)

    refused(r"--gpu: no GPU 'A100-80', did you mean 'A100-80GB'\?", gpu="A100-80")
    refused("required settings are missing: --gpu", gpu=None)
    refused("--global_batch_size 60 is not a multiple of micro-batch 7", global_batch_size=60)
    refused(r"--utilisation must lie in \(0, 1\]", utilisation=35)
    refused("--num_gpus must be at least 1", num_gpus=0)
    refused("no model configuration at", model_config=folder / "nowhere")
    refused("give --tokenizer", tokenizer=None)
    refused("not both", model_name_or_path="m")

    (folder / "none.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 64}))
    refused("number of layers is missing .num_hidden_layers", model_config=folder / "none.json")
    (folder / "none.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    refused("width is missing", model_config=folder / "none.json")


def test_fp16_needs_no_gpu_here(folder, monkeypatch, capsys):
    settings = {"ds_config": "zero2-fp16", "gpu": "V100-32GB", "model_config": "qwen2-1m"}
    assert "float16" in run(folder, monkeypatch, capsys, **settings)


def test_expected_memory_is_that_of_trainings():
    """The benchmark trains small models in processes of their own; it fails beyond 15 %."""
    command = [sys.executable, str(ROOT / "tools" / "bench" / "plan.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert len(figures) == 3
    assert all(0.85 <= ratio <= 1.15 for ratio in figures.values()), figures


def test_each_change_is_proposed_once():
    named = {"ds_config": "", "dataset": "", "output_dir": "", "model_name_or_path": "m"}
    ds = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    case = plan.Case(TrainConfig(**named, gradient_checkpointing=True, lora_r=8), ds, rows=2)
    least = "ZeRO stage 3, --gradient_checkpointing, micro-batch of 1 row"
    assert [name for name, _ in plan.variants(case, can_adapt=True)] == [
        "micro-batch of half the rows",  # which is 1 row
        "optimizer in CPU memory",
        "ZeRO stage 3, optimizer and weights in CPU memory",
        "--lora_r 8 --load_in_4bit",
        "--lora_r 8 --load_in_4bit --gradient_checkpointing, micro-batch of 1 row",
        f"{least}, optimizer and weights in CPU memory",
    ]
    assert "--lora_r 8 --load_in_4bit" not in dict(plan.variants(case, can_adapt=False))
