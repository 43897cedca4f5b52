"""Benchmark: training sequential recommenders on chained rows; a scan against its recurrence.

    python tools/bench/sequential.py [--quick]

SASRec, GRU4Rec and LRURec at their papers' sizes, without dropout, with random weights, in fp32, on
a CPU with one thread. The loss is cross-entropy over the full softmax. The data are synthetic (seed
0): 10,000 items with Zipf popularity; 5,000 users whose numbers of interactions are spread as in
instruments (at least 5, median 6, a long tail). Every prefix is a row, with a history of 1 to 20
items. The steps of an epoch cost alike, so an epoch is timed on some of its batches: 8 of 128
sequences (--quick: 2 of 32) after an untimed first one. There are three sides. They start from the
same weights, take the same rows in the same order, and take turns:

* loop: user after user and row after row, each history on its own through the model. The loss, a
  backward pass per user, clipping, and torch's AdamW per batch.
* padded rows: the rows of a batch at once, each with its own history, padded to the right. This
side
  is not in the figures.
* ours: chains that are collated, and `optimizer_step` (igd_ds/engine/step.py) on a real DeepSpeed
  engine (stage 0, one process).

The losses of all steps must agree to 1e-4. `epoch_speedup_NAME` is the loop's time over ours.

Scan: forward and backward pass of `linear_scan` against the recurrence written as a loop over
items, which autograd records (complex64, LRURec's width of 128). Values and gradients must agree to
1e-3 of their largest. `scan_speedup` is the ratio of medians for 32 sequences of 200 items, the
paper's length for ML-1M. The table has more shapes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from _common import finish, print_table
from _engine import loop_options, make_engine

from igd_ds.baselines.linear_scan import linear_scan
from igd_ds.baselines.losses import Negatives
from igd_ds.baselines.sequences import Chains
from igd_ds.baselines.sequential import SEQUENTIAL
from igd_ds.data.batches import epoch_batches
from igd_ds.data.dataset import Split
from igd_ds.engine.step import optimizer_step
from igd_ds.items.ragged import index_within
from igd_ds.sequential_training import SequenceLoss

NUM_ITEMS, NUM_USERS, MAX_HISTORY = 10_000, 5_000, 20
OPTIONS = loop_options(learning_rate=1e-3, max_grad_norm=5.0)
# Nats; the losses are about 9. fp32 sums in another order, carried through the updates.
LOSS_TOLERANCE = 1e-4
SCAN_TOLERANCE = 1e-3  # relative to the largest value
SCAN_SHAPES = [(128, 20), (32, 200), (8, 1000)]  # sequences, items
SCAN_FIGURE, SCAN_WIDTH = (32, 200), 128


Step = Callable[[np.ndarray], float]
"""From sequences, int64 (S,), to the mean loss over their targets; makes one update."""


def make_split() -> Split:
    """Draw users; each of their items but the first and the last two is the target of a row."""
    rng = np.random.default_rng(0)
    # Quartiles 5, 6, 9, as in instruments.
    lengths = 5 + rng.lognormal(np.log(1.7), 1.3, NUM_USERS).astype(np.int64)
    ranks = (np.exp(rng.random(lengths.sum()) * np.log(NUM_ITEMS + 1)) - 1).astype(np.int64)
    items = rng.permutation(NUM_ITEMS)[ranks].astype(np.int32)

    position = index_within(np.append(0, np.cumsum(lengths)))
    targets = np.flatnonzero((position > 0) & (position < np.repeat(lengths, lengths) - 2))
    kept = np.minimum(position[targets], MAX_HISTORY)
    history = np.concatenate([items[t - n : t] for t, n in zip(targets, kept, strict=True)])
    users = np.repeat(np.arange(NUM_USERS), lengths)[targets]
    offsets = np.concatenate([[0], np.cumsum(kept)])
    return Split("train", users, history, offsets, items[targets], None)


def make_model(name: str) -> torch.nn.Module:
    """Return a model with the same random weights at every call."""
    torch.manual_seed(0)
    form = SEQUENTIAL[name].form | {"dropout": 0.0}
    return SEQUENTIAL[name].model(num_items=NUM_ITEMS, max_history=MAX_HISTORY, **form).train()


def make_update(model: torch.nn.Module) -> Callable[[], None]:
    """Return a function that clips and makes AdamW's update, as the engine does."""
    settings = {"lr": OPTIONS.learning_rate, "weight_decay": OPTIONS.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return update


def make_loop(name: str, chains: Chains) -> Step:
    """Return the step that loops over users and their rows."""
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


def make_padded(name: str, chains: Chains) -> Step:
    """Return the step that takes all rows at once, each with its own history."""
    model = make_model(name)
    update = make_update(model)

    def padded(sequences: np.ndarray) -> float:
        rows = np.concatenate(
            [chains.rows[chains.offsets[s] : chains.offsets[s + 1]] for s in sequences]
        )
        batch = Chains.of_rows(chains.split, rows).collate(np.arange(len(rows)))
        loss = F.cross_entropy(model(batch.histories, batch.positions), batch.targets)
        loss.backward()
        update()
        return loss.item()

    return padded


def make_ours(name: str, chains: Chains, batch_size: int) -> Step:
    """Return our step: collate and `optimizer_step` on an engine."""
    engine = make_engine(make_model(name), OPTIONS, batch_size)
    loss = SequenceLoss("cross-entropy", Negatives(torch.ones(NUM_ITEMS), 0))

    def ours(sequences: np.ndarray) -> float:
        sums, _ = optimizer_step(engine, [chains.collate(sequences)], loss, step=0)
        return sums.objective

    return ours


def compare(name: str, chains: Chains, batches: np.ndarray) -> dict[str, float]:
    """Train on all sides in turns and assert equal losses.

    Returns:
        The seconds of each side, without the first batch.
    """
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
        f"{name}: {len(batches)} losses from {table[0, 0]:.4f} to {table[0, -1]:.4f} differ by "
        f"{spread:.1e} at most"
    )
    return seconds


def recurrence(decay: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Compute what `linear_scan` does, item after item."""
    hidden, states = torch.zeros_like(inputs[:, 0]), []
    for x in inputs.unbind(1):
        hidden = torch.addcmul(x, decay, hidden)
        states.append(hidden)
    return torch.stack(states, 1)


def time_scan(batch: int, length: int, repetitions: int) -> tuple[float, float]:
    """Return milliseconds of the recurrence and of the scan; assert equal results.

    They are medians of a forward and a backward pass, in turns.
    """
    torch.manual_seed(0)
    inputs = torch.randn(batch, length, SCAN_WIDTH, dtype=torch.cfloat, requires_grad=True)
    decay = torch.polar(
        0.8 + 0.19 * torch.rand(SCAN_WIDTH), 6.28 * torch.rand(SCAN_WIDTH)
    ).requires_grad_()
    gradient = torch.randn_like(inputs)
    seconds: dict[Callable, list[float]] = {recurrence: [], linear_scan: []}
    results = {}

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


def compare_models(quick: bool) -> tuple[list[list], dict[str, float]]:
    """Return the table's rows and the figures of the three recommenders."""
    chains = Chains.build(make_split())
    size, steps = (32, 3) if quick else (128, 9)
    batches = epoch_batches(chains.lengths, size, seed=0, epoch=0, group=True)
    batches = batches[(batches >= 0).all(1)][:steps]
    print(
        f"{len(chains.split)} rows of {NUM_USERS} users in {len(chains)} sequences; "
        f"batches of {size} sequences\n"
    )

    lines, figures = [], {}
    for name in ("sasrec", "gru4rec", "lrurec"):
        seconds = compare(name, chains, batches)
        per_step = [1e3 * total / (steps - 1) for total in seconds.values()]
        speedup = seconds["loop"] / seconds["ours"]
        figures[f"epoch_speedup_{name}"] = speedup
        lines.append([name, *per_step, speedup, seconds["padded rows"] / seconds["ours"]])
    return lines, figures


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

    lines, figures = compare_models(quick)
    print()
    sides = ["loop", "padded rows", "ours", "loop / ours", "padded / ours"]
    print_table(["ms a batch", *sides], lines)

    lines = []
    for shape in SCAN_SHAPES:
        plain, scan = time_scan(*shape, repetitions=5 if quick else 31)
        lines.append(["{} × {}".format(*shape), plain, scan, plain / scan])
        if shape == SCAN_FIGURE:
            figures["scan_speedup"] = plain / scan
    print()
    print_table(["sequences × items, ms", "recurrence", "scan", "speed-up"], lines)
    finish("sequential", figures, quick)


if __name__ == "__main__":
    main()
