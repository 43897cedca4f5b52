"""Benchmark: training SASRec, GRU4Rec and LRURec on chained rows against a loop over users; the scan against the recurrence.

    python tools/bench/sequential.py [--quick]

Recipe: the papers' sizes without dropout, random weights, full-softmax cross-entropy, fp32, CPU, 1 thread; 10,000 items with Zipf
popularity; 5,000 users whose numbers of interactions are spread as in instruments (5 at least, median 6, a long tail), every
prefix a row, histories of 1 to 20 items; seed 0. An epoch's steps cost alike, so it is timed on some of its batches: 8 of 128
sequences (--quick: 2 of 32), the first one untimed. All sides start from the same weights and take the same rows in the same
order, in turns:

* loop: user after user and row after row, each history on its own through the same model; loss, backward pass per user, clipping
  and torch's AdamW per batch.
* padded rows: the rows of a batch at once, each with its own history, right-padded. Not in the figures.
* ours: chains collated and baseline.train_step on a real DeepSpeed engine (stage 0, one process).

The losses of all steps must agree to 1e-4. `epoch_speedup_NAME` is the loop's time over ours.

Scan: forward and backward pass of linear_scan against the recurrence as a loop over items that autograd records, complex64,
LRURec's width of 128; values and gradients must agree to 1e-3 of their largest. `scan_speedup` is that of 32 sequences of 200
items (the length for ML-1M in the paper), a ratio of medians; the table has more shapes.
"""

import argparse
import logging
import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from _common import finish, print_table

from igd_ds import baseline, distributed, engine
from igd_ds.baselines.sequences import Chains
from igd_ds.baselines.sequential import SEQUENTIAL, linear_scan
from igd_ds.data.batches import epoch_batches
from igd_ds.data.dataset import Split

NUM_ITEMS, NUM_USERS, MAX_HISTORY = 10_000, 5_000, 20
SETTINGS = SimpleNamespace(
    learning_rate=1e-3, weight_decay=0.0, schedule="constant", warmup_ratio=0.0, max_grad_norm=5.0
)
LOSS_TOLERANCE = 1e-4  # nats: fp32 in another order, carried through the updates
SCAN_TOLERANCE = 1e-3
SCAN_SHAPES = [(128, 20), (32, 200), (8, 1000)]  # sequences, items
SCAN_FIGURE, SCAN_WIDTH = (32, 200), 128


def make_split() -> Split:
    """Every prefix of the users' items but the last two is a row."""
    rng = np.random.default_rng(0)
    lengths = 5 + rng.lognormal(np.log(1.7), 1.3, NUM_USERS).astype(
        np.int64
    )  # quartiles 5, 6, 9; instruments: 5, 6, 9
    ranks = (np.exp(rng.random(lengths.sum()) * np.log(NUM_ITEMS + 1)) - 1).astype(np.int64)
    items = rng.permutation(NUM_ITEMS)[ranks].astype(np.int32)
    place = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    targets = np.flatnonzero((place > 0) & (place < np.repeat(lengths, lengths) - 2))
    kept = np.minimum(place[targets], MAX_HISTORY)
    history = np.concatenate([items[t - n : t] for t, n in zip(targets, kept, strict=True)])
    users = np.repeat(np.arange(NUM_USERS), lengths)[targets]
    return Split(
        "train", users, history, np.concatenate([[0], np.cumsum(kept)]), items[targets], None
    )


def make_model(name: str) -> torch.nn.Module:
    """The same random weights at every call."""
    torch.manual_seed(0)
    form = SEQUENTIAL[name].form | {"dropout": 0.0}
    return SEQUENTIAL[name].model(num_items=NUM_ITEMS, max_history=MAX_HISTORY, **form).train()


def make_update(model: torch.nn.Module):
    """Return clipping and AdamW's update, as the engine makes them without weight decay."""
    settings = {"lr": SETTINGS.learning_rate, "weight_decay": SETTINGS.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return update


def make_loop(name: str, chains: Chains):
    """Return a function from a batch of sequences to its mean loss: a loop over users and their rows."""
    model = make_model(name)
    update = make_update(model)

    def loop(sequences: np.ndarray) -> float:
        rows_by_user = [chains.rows[chains.offsets[s] : chains.offsets[s + 1]] for s in sequences]
        num_targets, total = sum(map(len, rows_by_user)), 0.0
        for rows in rows_by_user:
            loss = 0.0
            for row in rows:
                history = torch.from_numpy(chains.split.history(row).astype(np.int64))[None]
                scores = model(history, torch.tensor([history.shape[1] - 1]))
                loss = loss + F.cross_entropy(
                    scores, torch.tensor([int(chains.split.targets[row])])
                )
            (loss / num_targets).backward()
            total += loss.item()
        update()
        return total / num_targets

    return loop


def make_padded(name: str, chains: Chains):
    """Return a function from a batch of sequences to its mean loss: all rows at once, each with its own history."""
    model = make_model(name)
    update = make_update(model)

    def padded(sequences: np.ndarray) -> float:
        rows = np.concatenate(
            [chains.rows[chains.offsets[s] : chains.offsets[s + 1]] for s in sequences]
        )
        batch = Chains.of_rows(chains.split, rows).collate(np.arange(len(rows)))
        loss = F.cross_entropy(model(batch.histories, batch.places), batch.targets)
        loss.backward()
        update()
        return loss.item()

    return padded


def make_ours(name: str, chains: Chains, batch_size: int):
    """Return a function from a batch of sequences to its mean loss: collate and train_step on an engine."""
    ds = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 0},
    }
    ds |= {"gradient_clipping": SETTINGS.max_grad_norm, "steps_per_print": 10**9}
    wrapped = engine.initialize(make_model(name), SETTINGS, ds, num_steps=1000)
    task = SimpleNamespace(negatives=None)

    def ours(sequences: np.ndarray) -> float:
        (total, num_targets), _ = baseline.train_step(
            wrapped, task, "cross-entropy", [chains.collate(sequences)], False, 1
        )
        return total / num_targets

    return ours


def compare(name: str, chains: Chains, batches: np.ndarray) -> dict[str, float]:
    """Train on all sides in turns, assert equal losses, and return the seconds of each, the first batch left out."""
    sides = {"loop": make_loop(name, chains), "padded rows": make_padded(name, chains)}
    sides["ours"] = make_ours(name, chains, batches.shape[1])
    seconds, losses = dict.fromkeys(sides, 0.0), {side: [] for side in sides}
    for number, sequences in enumerate(batches):
        for side, step in sides.items():
            begin = time.perf_counter()
            losses[side].append(step(sequences))
            seconds[side] += (time.perf_counter() - begin) * (number > 0)
    table = np.array(list(losses.values()))
    spread = np.ptp(table, axis=0).max()
    assert spread <= LOSS_TOLERANCE, f"{name}: losses differ by {spread:.1e}"
    print(
        f"{name}: {len(batches)} losses from {table[0, 0]:.4f} to {table[0, -1]:.4f} differ by {spread:.1e} at most"
    )
    return seconds


def recurrence(decay: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The recurrence of linear_scan as it is written."""
    hidden, states = torch.zeros_like(inputs[:, 0]), []
    for x in inputs.unbind(1):
        hidden = torch.addcmul(x, decay, hidden)
        states.append(hidden)
    return torch.stack(states, 1)


def time_scan(batch: int, length: int, repetitions: int) -> tuple[float, float]:
    """Return milliseconds of the recurrence and of the scan, forward and backward, medians in turns; assert equal results."""
    torch.manual_seed(0)
    inputs = torch.randn(batch, length, SCAN_WIDTH, dtype=torch.cfloat, requires_grad=True)
    decay = torch.polar(
        0.8 + 0.19 * torch.rand(SCAN_WIDTH), 6.28 * torch.rand(SCAN_WIDTH)
    ).requires_grad_()
    gradient, seconds, results = torch.randn_like(inputs), {recurrence: [], linear_scan: []}, {}
    for _ in range(repetitions):
        for function in seconds:
            begin = time.perf_counter()
            states = function(decay, inputs)
            gradients = torch.autograd.grad(states, (decay, inputs), gradient)
            seconds[function].append(time.perf_counter() - begin)
            results[function] = (states.detach(), *gradients)
    for plain, found in zip(results[recurrence], results[linear_scan], strict=True):
        assert (plain - found).abs().max() <= SCAN_TOLERANCE * plain.abs().max()
    return tuple(1e3 * statistics.median(values) for values in seconds.values())


def main() -> None:
    """Run the comparisons and print tables and figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller batches, fewer of them; nothing is written"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # DeepSpeed's start-up lines would hide the tables
    distributed.init()
    split = make_split()
    chains, size, steps = Chains.build(split), *((32, 3) if quick else (128, 9))
    batches = epoch_batches(chains.lengths, size, seed=0, epoch=0, group=True)
    batches = batches[(batches >= 0).all(1)][:steps]
    print(
        f"{len(split)} rows of {NUM_USERS} users in {len(chains)} sequences; batches of {size} sequences\n"
    )
    figures, lines = {}, []
    for name in ("sasrec", "gru4rec", "lrurec"):
        seconds = compare(name, chains, batches)
        per_step = {side: 1e3 * total / (steps - 1) for side, total in seconds.items()}
        figures[f"epoch_speedup_{name}"] = seconds["loop"] / seconds["ours"]
        lines.append(
            [
                name,
                *per_step.values(),
                figures[f"epoch_speedup_{name}"],
                seconds["padded rows"] / seconds["ours"],
            ]
        )
    print()
    print_table(
        ["ms a batch", "loop", "padded rows", "ours", "loop / ours", "padded / ours"], lines
    )
    print()
    lines = []
    for shape in SCAN_SHAPES:
        plain, scan = time_scan(*shape, repetitions=5 if quick else 31)
        lines.append(["{} × {}".format(*shape), plain, scan, plain / scan])
        if shape == SCAN_FIGURE:
            figures["scan_speedup"] = plain / scan
    print_table(["sequences × items, ms", "recurrence", "scan", "speed-up"], lines)
    finish("sequential", figures, quick)


if __name__ == "__main__":
    main()
