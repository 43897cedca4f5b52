"""What only a GPU shows: training in each precision and ZeRO stage on NCCL, and the CPU's lists."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from igd_ds.backbones import CausalLM
from igd_ds.data.row_trees import build_row_tree
from igd_ds.memory import keep_freed_memory

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def igd(words: str, **environment: str) -> None:
    """Run a subcommand of `igd` in a process of its own."""
    command = [sys.executable, "-m", "igd_ds.cli", *words.split()]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | environment)


def test_the_memory_of_the_c_library_is_left_alone():
    assert not keep_freed_memory()


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2-offload", "zero2-fp16"])
def test_training_and_search_on_one_gpu(name, tmp_path):
    data, tokenizer, run = tmp_path / "data", tmp_path / "tokenizer", tmp_path / "run"
    size = "--num_items 60 --num_users 80"
    igd(f"prepare --source synthetic {size} --protocol leave-one-out --output {data}")
    igd(f"tokenizer --dataset {data} --vocab_size 400 --output {tokenizer}")

    model = f"--model_config tools/models/qwen2-demo.json --tokenizer {tokenizer}"
    steps = "--global_batch_size 16 --max_steps 20 --log_every 1 --learning_rate 2e-3"
    igd(
        f"train --ds_config ds_configs/{name}.json --dataset {data} {model} --igd_beta 0.1 {steps} "
        f"--output_dir {run}"
    )
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["train/nll"] for entry in entries if "train/nll" in entry]
    assert losses[-1] < losses[0]

    found = []
    for devices in ("0", ""):
        output = tmp_path / f"eval-{devices}"
        search = "--alpha 0.2 --search exact --dtype float32"
        igd(
            f"eval --model {run}/model --dataset {data} {search} --output_dir {output}",
            CUDA_VISIBLE_DEVICES=devices,
        )
        metrics = json.loads((output / "metrics.json").read_text())
        found.append(metrics["alpha"]["0.2"]["token_match"])
    # Shares of 80 rows: where scores are nearly equal, one or two rows may differ.
    assert found[0] == pytest.approx(found[1], abs=0.02)


@pytest.mark.parametrize("window", [None, 100])
def test_row_trees_give_the_gradients_of_the_cpu(window):
    """FlexAttention reads the blocks of the tree; the CPU's SDPA is compared with padded rows."""
    random = np.random.default_rng(0)
    history, rows = list(range(20)), []
    for _ in range(30):
        history = [*history, *random.integers(1, 500, 12)]
        rows.append(np.array([*history, *random.integers(1, 500, 5)]))
    tree = build_row_tree(rows, np.full(30, 5))
    targets = torch.from_numpy(random.integers(1, 500, 150))

    found = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        windows = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
        config = Qwen2Config(
            vocab_size=500, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, **(windows if window else {}),
        )  # fmt: skip
        model = Qwen2ForCausalLM(config).to(device)
        batch = SimpleNamespace(inputs=tree.to(torch.device(device)))
        logits = CausalLM().label_logits(model, batch)
        torch.nn.functional.cross_entropy(logits, targets.to(device)).backward()
        found[device] = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])

    # TF32 is off by default; sums run in another order.
    distance = (found["cuda"] - found["cpu"]).norm() / found["cpu"].norm()
    assert distance < 1e-4
