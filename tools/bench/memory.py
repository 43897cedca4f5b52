"""Benchmark: training steps on a CPU with and without keeping freed memory (igd_ds/memory.py).

    python tools/bench/memory.py [--quick]

Two models train on the generated data of `make demo`, through igd_ds/train.py itself (fp32, ZeRO
stage 2, one rank, one thread):

* demo: the model of `make demo`, batches of 32 rows.
* large: a Qwen2 of 43 million random parameters, with the widths of SmolLM2-135M (hidden size 576)
  and 12 layers, on batches of 8 rows. With --quick it has 4 layers.

Each training runs in a process of its own, in turns: once with glibc's defaults, once with
`keep_freed_memory()`. The losses of all steps must agree to 1e-5 of their size. A step's time is
the time between two updates of the optimizer. The first steps are left out, because they allocate
the gradients and the optimizer's state. Times are medians in CPU seconds: they include the kernel's
work on page faults, and other load on the machine hardly changes them.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _common import REPOSITORY, finish, in_fork, peak_bytes, print_table
from torch.optim.optimizer import register_optimizer_step_post_hook

from igd_ds import distributed, loop, train
from igd_ds.commands import prepare, tokenizer
from igd_ds.memory import keep_freed_memory

SIDES = ("default", "kept")
WARM_UP = 2
LOSS_TOLERANCE = 1e-5  # relative: another alignment of the blocks is another order of summation
DEMO_MODEL = REPOSITORY / "tools" / "models" / "qwen2-demo.json"


class Measured(NamedTuple):
    """One training: figures per step after the warm-up, and the peak of the whole process."""

    cpu_seconds: list[float]
    page_faults: list[int]
    peak_mib: float
    losses: list[float]


def make_data(folder: Path) -> None:
    """Make the dataset and the tokenizer of `make demo`."""
    size = ["--num_items", "600", "--num_users", "1500", "--max_history", "5"]
    kind = ["--source", "synthetic", "--protocol", "leave-one-out", "--domain", "books"]
    prepare.main([*kind, *size, "--name", "demo", "--output", str(folder / "data")])

    data = ["--dataset", str(folder / "data"), "--vocab_size", "1024"]
    tokenizer.main([*data, "--output", str(folder / "tokenizer")])


def write_large_model(path: Path, num_layers: int) -> None:
    """Write the configuration of the large model."""
    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    path.write_text(json.dumps(json.loads(DEMO_MODEL.read_text()) | shape))


def measure(side: str, folder: Path, model: Path, batch_size: int, num_steps: int) -> Measured:
    """Train for some steps in this process and measure each of them."""
    # The "default" side goes without the calls of `distributed.init` and of the training loop.
    if side == "default":
        distributed.keep_freed_memory = lambda: False
        loop.return_freed_memory = lambda: None
    else:
        assert keep_freed_memory(), "this machine has a GPU or no glibc: nothing to measure"

    # The hook may be called more than once a step: once for each group of parameters.
    calls: list[tuple[float, int]] = []

    def note(*_: object) -> None:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        calls.append((time.process_time(), faults))

    register_optimizer_step_post_hook(note)

    run = folder / "run"
    settings = {
        "ds_config": REPOSITORY / "ds_configs" / "zero2-fp32.json",
        "dataset": folder / "data",
        "model_config": model,
        "tokenizer": folder / "tokenizer",
        "igd_beta": 0.1,
        "packing": "rows",
        "batching": "rows",
        "global_batch_size": batch_size,
        "learning_rate": 1e-3,
        "max_length": 256,
        "max_steps": num_steps,
        "validate_every": num_steps,
        "validation_rows": 8,
        "log_every": 1,
        "output_dir": run,
    }
    sys.argv = [
        "train",
        *(str(word) for key, value in settings.items() for word in (f"--{key}", value)),
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main()

    assert len(calls) % num_steps == 0, (len(calls), num_steps)
    ends = calls[len(calls) // num_steps - 1 :: len(calls) // num_steps][WARM_UP - 1 :]
    steps = list(zip(ends[:-1], ends[1:], strict=True))
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Measured(
        [end[0] - start[0] for start, end in steps],
        [end[1] - start[1] for start, end in steps],
        peak_bytes() / 2**20,
        [entry["train/loss"] for entry in log if "train/loss" in entry],
    )


def compare(
    folder: Path, model: Path, batch_size: int, num_steps: int, rounds: int
) -> dict[str, Measured]:
    """Train both sides in turns; assert equal losses; return each side's steps of all rounds."""
    found: dict[str, list[Measured]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES[:: 1 if number % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory(dir=folder) as name:
                own = Path(name)
                (own / "data").symlink_to(folder / "data")
                (own / "tokenizer").symlink_to(folder / "tokenizer")
                found[side].append(in_fork(measure, side, own, model, batch_size, num_steps))

    losses = np.array([one.losses for runs in found.values() for one in runs])
    assert losses.shape == (2 * rounds, num_steps), losses.shape
    spread = (np.ptp(losses, axis=0) / losses[0]).max()
    assert spread <= LOSS_TOLERANCE, f"losses differ by {spread:.1e} of their size"
    print(
        f"equal: {num_steps} losses from {losses[0, 0]:.4f} to {losses[0, -1]:.4f} "
        f"differ by {spread:.1e} of their size"
    )

    return {
        side: Measured(
            [seconds for one in runs for seconds in one.cpu_seconds],
            [faults for one in runs for faults in one.page_faults],
            max(one.peak_mib for one in runs),
            runs[0].losses,
        )
        for side, runs in found.items()
    }


def main() -> None:
    """Measure both models and print a table and the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round, fewer steps; under 50 s")
    quick = parser.parse_args().quick

    table, figures = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(io.StringIO()):
            in_fork(make_data, folder)
        large = folder / "large.json"
        write_large_model(large, num_layers=4 if quick else 12)
        shapes = {
            "demo": (DEMO_MODEL, 32, 20 if quick else 60, 1 if quick else 3),
            "large": (large, 8, 6 if quick else 8, 1 if quick else 2),
        }

        for label, shape in shapes.items():
            sides = compare(folder, *shape)
            seconds = {side: statistics.median(one.cpu_seconds) for side, one in sides.items()}
            for side, one in sides.items():
                faults = round(statistics.median(one.page_faults))
                table.append([f"{label}, {side}", seconds[side], faults, round(one.peak_mib)])
            figures[f"step_speedup_{label}"] = seconds["default"] / seconds["kept"]
            figures[f"peak_memory_ratio_{label}"] = (
                sides["kept"].peak_mib / sides["default"].peak_mib
            )

    print_table(
        ["model, freed memory", "CPU s a step (median)", "page faults a step", "peak MiB"], table
    )
    finish("memory", figures, quick)


if __name__ == "__main__":
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    main()
