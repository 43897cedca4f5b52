"""Benchmark: the memory that `igd plan` expects against the memory that a training takes on a CPU.

    python tools/bench/plan.py [--quick]

Trainings of a small Qwen2 (random weights, fp32, one rank, one thread) run through igd_ds/train.py.
Each has a process of its own, in which every block of 64 KiB and more is mapped and unmapped at
once, so that resident memory is memory in use. What all trainings have in common (libraries, data)
is left out: from measured and expected peaks those of a tiny model are subtracted. The plan is
asked about the largest micro-batch that the training had. Expected and measured memory must agree
within 15 %.

DeepSpeed's buckets are small here: on a CPU, buckets that are not filled take no memory.
"""

import argparse
import contextlib
import ctypes
import io
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from _common import finish, in_fork, peak_bytes, print_table
from memory import make_data
from torch.optim.optimizer import register_optimizer_step_post_hook

from igd_ds import distributed, planning, train
from igd_ds.commands.plan import PlanConfig
from igd_ds.config.options import parse
from igd_ds.data.batches import Collator
from igd_ds.engine.ds_config import dtype_of, resolve_ds_config
from igd_ds.planning import MicroBatch
from igd_ds.training_inputs import load_inputs

M_MMAP_THRESHOLD = -3  # of mallopt(3)
TOLERANCE = 0.15
NUM_STEPS = 3
TINY = {"width": 64, "num_layers": 1, "rows": 2}
LARGE = {"width": 320, "num_layers": 4, "rows": 16}
CASES: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2_tree": {"stage": 2, "packing": "tree"},
    "zero2_checkpointing": {"stage": 2, "gradient_checkpointing": True},
    "zero1_lora": {"stage": 1, "lora_r": 16},
}
QUICK = ("zero2", "zero3", "zero2_checkpointing")


def write_files(folder: Path, name: str, case: Mapping[str, Any], size: Mapping[str, int]) -> None:
    """Write the model's configuration and the DeepSpeed file; with LoRA, random weights too."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    heads = size["width"] // 32
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=size["width"],
        intermediate_size=4 * size["width"],
        num_hidden_layers=size["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    config.to_json_file(folder / f"{name}.json")
    if case.get("lora_r"):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)

    zero = {
        "stage": case["stage"],
        "overlap_comm": False,
        "reduce_bucket_size": 100_000,
        "stage3_max_live_parameters": 100_000,
        "stage3_prefetch_bucket_size": 10_000,
        "stage3_param_persistence_threshold": 1_000,
    }
    ds = {"train_micro_batch_size_per_gpu": size["rows"], "zero_optimization": zero}
    (folder / f"{name}-ds.json").write_text(json.dumps(ds))


def flags_of(folder: Path, name: str, case: Mapping[str, Any], rows: int) -> list[str]:
    """Return the flags of a training, which a plan takes too."""
    settings: dict[str, Any] = {
        "ds_config": folder / f"{name}-ds.json",
        "dataset": folder / "data",
        "tokenizer": folder / "tokenizer",
        "igd_beta": 0.1,
        "global_batch_size": 2 * rows,
        "max_length": 256,
        "packing": "rows",
        "max_steps": NUM_STEPS,
        "validate_every": NUM_STEPS,
        "validation_rows": 4,
    } | {key: value for key, value in case.items() if key != "stage"}
    is_pretrained = bool(case.get("lora_r"))
    settings["model_name_or_path" if is_pretrained else "model_config"] = (
        folder / name if is_pretrained else folder / f"{name}.json"
    )
    words = []
    for key, value in settings.items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


def measure(flags: list[str], run: Path) -> tuple[int, int, int]:
    """Train for some steps in this process.

    Returns:
        The peak of resident memory at the end of the last step, bytes, and tokens and labelled
        tokens of the largest micro-batch.
    """
    distributed.keep_freed_memory = lambda: False
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65_536), "needs glibc"
    peaks: list[int] = []
    register_optimizer_step_post_hook(lambda *_: peaks.append(peak_bytes()))

    sizes: list[tuple[int, int]] = []
    collate = Collator.__call__

    def noted(self: Collator, rows: Any) -> Any:
        batch = collate(self, rows)
        if self.split.name == "train":
            tokens = getattr(batch.inputs, "input_ids", None)
            tokens = batch.inputs.token if tokens is None else tokens
            sizes.append((tokens.numel(), len(batch.targets)))
        return batch

    Collator.__call__ = noted  # type: ignore[method-assign]
    sys.argv = ["train", *flags, "--output_dir", str(run)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main()
    return peaks[-1], *max(sizes)


def expect(flags: list[str], rows: int, tokens: int, labels: int) -> float:
    """Return the peak that the plan expects of this micro-batch, bytes."""
    config = parse(PlanConfig, [*flags, "--gpu", "H100"])
    ds = resolve_ds_config(config, 1, load_in_4bit=False)
    batch = MicroBatch(rows, tokens, labels)
    found = planning.trace(config, load_inputs(config), dtype_of(ds), batch)
    return planning.memory(config, ds, 1, found).peak


def peaks(
    folder: Path, name: str, case: Mapping[str, Any], size: Mapping[str, int]
) -> tuple[float, float]:
    """Return the measured and the expected peak of a training, bytes."""
    in_fork(write_files, folder, name, case, size)
    flags = flags_of(folder, name, case, size["rows"])
    peak, tokens, labels = in_fork(measure, flags, folder / f"{name}-run")
    return peak, in_fork(expect, flags, size["rows"], tokens, labels)


def main() -> None:
    """Measure all cases and print a table and the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three cases; under 50 s")
    quick = parser.parse_args().quick

    table, figures = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(io.StringIO()):
            in_fork(make_data, folder)
        # A training with adapters loads more libraries, and ZeRO more of DeepSpeed.
        tiny: dict[tuple[bool, bool], tuple[float, float]] = {}
        for label in QUICK if quick else CASES:
            case = CASES[label]
            loads = "lora_r" in case, case["stage"] > 0
            if loads not in tiny:
                tiny[loads] = peaks(folder, f"tiny-{label}", case, TINY)
            large = peaks(folder, label, case, LARGE)
            measured, expected = (
                big - small for big, small in zip(large, tiny[loads], strict=True)
            )
            table.append([label, measured / 2**20, expected / 2**20, expected / measured])
            figures[f"expected_over_measured_{label}"] = expected / measured

    print_table(["case", "measured MiB", "expected MiB", "ratio"], table)
    worst = max(figures.values(), key=lambda ratio: abs(ratio - 1))
    assert abs(worst - 1) <= TOLERANCE, f"a plan is wrong by a factor of {worst:.3f}"
    finish("plan", figures, quick)


if __name__ == "__main__":
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    main()
