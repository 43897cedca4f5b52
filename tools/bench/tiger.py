"""Benchmark: TIGER's training step, length grouping, and the information gain of codes.

    python tools/bench/tiger.py [--quick]

The training step is compared with `transformers.Trainer` and with the bare step of the model. The
model is the T5 of tools/models/tiger.json (the paper's size) with random weights and without
dropout, in fp32, on a CPU with 2 threads. The data are synthetic (seed 0): 10,000 items with
different random semantic IDs of 4 × 256 codes and Zipf popularity; 20,000 users whose numbers of
interactions are spread as in instruments (at least 5, median 6, a long tail). Every prefix is a
row, with a history of 1 to 20 items. Trained on are 50 batches of 64 of these rows (--quick: 12 of
16), with objective `igd`, AdamW without decay, a constant learning rate, and clipping at norm 1.
All sides start from the same weights and see the same rows in the same order:

* Trainer: transformers' own loop with `_published_tiger.PublishedTrainer`, which pads dynamically
  and looks weights up in Python. Its time is all between the ends of two steps: collating, loss,
  backward, clipping, update, and its own bookkeeping.
* bare: the forward pass of T5 on a batch that was collated and weighted beforehand, the weighted
  mean, backward, clipping, torch's AdamW.
* ours: our Collator and `optimizer_step` (igd_ds/engine/step.py) on a real DeepSpeed engine (stage
  0, one process). The collator runs within the measured time, not in a thread ahead of it; the
  Trainer's runs in the same thread too (its default).

The losses of all steps must agree to 1e-4. This needs a small learning rate, 5e-6. At TIGER's 5e-4
from the first step on, even the bare step drifts from itself: with initial weights moved by one
fp32 rounding, its losses differ by 1e-4 after 16 steps. Speed does not depend on the learning rate.

The sides take turns at every step, so that all of them see the same state of a shared machine.
Times are wall time. Ratios are medians, over steps, of the ratio on the same rows.

Length grouping: our step on the same rows in both orders of `epoch_batches`, in turns of a few
batches; complete times are compared.

Gain: TokenTrie and information gain of 25,000 different random IDs, against the published nested
scan. The scan is timed on the prefixes of a few items, whose values are compared, and multiplied up
to all prefixes.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from _common import REPOSITORY, finish, print_table
from _engine import loop_options, make_engine
from _published_tiger import PublishedTrainer, scanned_gain, weight_table

from igd_ds import distributed
from igd_ds.backbones import T5, read_model_config
from igd_ds.config.model import ModelOptions
from igd_ds.contracts import IGNORED, Batch, ObjectiveContext
from igd_ds.data.batches import Collator, TokenColumns, epoch_batches
from igd_ds.data.dataset import Split
from igd_ds.data.prompts import PromptBuilder
from igd_ds.engine.step import optimizer_step
from igd_ds.generative_training import TokenLoss
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import information_gain
from igd_ds.items.ragged import index_within
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.store import StoredCatalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.objectives.gain import IGD, GainOptions

PAD, EOS, UNKNOWN, FIRST_CODE = range(4)
LEVELS, CODES = 4, 256
NUM_ITEMS, NUM_USERS, MAX_HISTORY, NUM_IG_ITEMS = 10_000, 20_000, 20, 25_000
BETA = 0.1
OPTIONS = loop_options(learning_rate=5e-6, max_grad_norm=1.0)
# Nats; the losses are about 7. fp32 sums in another order, carried through 50 updates.
LOSS_TOLERANCE = 1e-4
GAIN_TOLERANCE = 1e-12  # nats, float64; the gains are at most 10


def make_catalogue(num_items: int, counts: np.ndarray) -> Catalogue:
    """Make different random semantic IDs, each with EOS behind it."""
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(CODES, size=(num_items + 100, LEVELS)), axis=0)
    codes = rng.permutation(codes)[:num_items] + FIRST_CODE + CODES * np.arange(LEVELS)
    token_ids = np.hstack([codes, np.full((num_items, 1), EOS)]).astype(np.int32).ravel()
    offsets = np.arange(num_items + 1) * (LEVELS + 1)
    return Catalogue(token_ids, offsets, counts, EOS, "semantic-id", "", "")


def zipf_items(num_items: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `size` items with log-uniform ranks."""
    ranks = (np.exp(rng.random(size) * np.log(num_items + 1)) - 1).astype(np.int64)
    return rng.permutation(num_items)[ranks]


def make_rows(num_rows: int) -> tuple[Split, np.ndarray]:
    """Return a seeded sample of all users' rows, and how often each item is a target of any row."""
    rng = np.random.default_rng(1)
    # Quartiles 5, 6, 9, as in instruments.
    lengths = 5 + rng.lognormal(np.log(1.7), 1.3, NUM_USERS).astype(np.int64)
    items = zipf_items(NUM_ITEMS, int(lengths.sum()), rng).astype(np.int32)

    # A user's first item has no history, and the last two are held out.
    position = index_within(np.append(0, np.cumsum(lengths)))
    targets = np.flatnonzero((position > 0) & (position < np.repeat(lengths, lengths) - 2))

    chosen = rng.choice(targets, num_rows, replace=False)
    kept = np.minimum(position[chosen], MAX_HISTORY)
    history = np.concatenate([items[t - n : t] for t, n in zip(chosen, kept, strict=True)])
    offsets = np.concatenate([[0], np.cumsum(kept)])
    split = Split("train", chosen, history, offsets, items[chosen], None)
    return split, np.bincount(items[targets], minlength=NUM_ITEMS)


def make_loss(catalogue: Catalogue) -> TokenLoss:
    """Return our loss: objective `igd` over a T5's logits."""
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    stored = StoredCatalogue.build(catalogue, trie, information_gain(trie, "prior"), "prior")
    context = ObjectiveContext(stored, SearchTrie.build(trie), dataset="")
    return TokenLoss(T5(), IGD(GainOptions(igd_beta=BETA), total_steps=1000), context)


def make_collator(loss: TokenLoss, split: Split) -> Collator:
    """Return our collator for prompts of codes and nothing else (template `codes`)."""
    catalogue = loss.context.stored.catalogue
    nothing = np.empty(0, np.int32)
    prompts = PromptBuilder(
        begin=nothing,
        separator=nothing,
        end=nothing,
        item_tokens=catalogue.token_ids.reshape(-1, LEVELS + 1)[:, :LEVELS].ravel(),
        item_offsets=np.arange(catalogue.num_items + 1) * LEVELS,
        budget=LEVELS * MAX_HISTORY,
        null=np.array([UNKNOWN], np.int32),
    )
    columns = TokenColumns.build(loss.context.stored, loss.objective.weights(loss.context))
    return Collator(split, prompts, columns, PAD, encoder_decoder=True)


def make_model() -> torch.nn.Module:
    """Return a model with the same random weights at every call."""
    path = str(REPOSITORY / "tools" / "models" / "tiger.json")
    model_config = read_model_config(path)
    model_config.vocab_size = FIRST_CODE + LEVELS * CODES
    model_config.dropout_rate = 0.0
    model_config.eos_token_id = EOS
    model_config.pad_token_id = PAD
    model_config.decoder_start_token_id = PAD

    torch.manual_seed(0)
    options = ModelOptions(model_config=path)
    return T5().build(options, model_config, torch.float32, torch.device("cpu")).train()


def make_trainer(
    collator: Collator, catalogue: Catalogue, order: np.ndarray, folder: str
) -> PublishedTrainer:
    """Return the Trainer over the rows of `order` (steps, G), tokenized."""
    split = collator.split
    rows = [
        {
            "input_ids": collator.prompts.encode(split.history(row)).tolist(),
            "labels": catalogue.path(split.targets[row]).tolist(),
        }
        for row in order.ravel()
    ]
    paths = [tuple(catalogue.path(item).tolist()) for item in range(catalogue.num_items)]
    table = weight_table(paths, catalogue.counts.tolist(), BETA)
    trainer = PublishedTrainer(make_model(), rows, order.shape[1], table, PAD, OPTIONS, folder)

    # Otherwise it would wrap the model to average gradients over processes.
    assert trainer.accelerator.distributed_type == "NO", trainer.accelerator.distributed_type
    return trainer


def make_bare() -> Callable[[Batch], float]:
    """Return a function from a batch to its loss: the least that a step is."""
    model = make_model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIONS.learning_rate, weight_decay=OPTIONS.weight_decay
    )

    def bare(batch: Batch) -> float:
        decoder_input_ids = model.prepare_decoder_input_ids_from_labels(batch.inputs.labels)
        inputs = {
            "input_ids": batch.inputs.input_ids,
            "attention_mask": batch.inputs.attention_mask,
        }
        logits = model(**inputs, decoder_input_ids=decoder_input_ids, use_cache=False).logits
        # Every label is a token: items have equal lengths, and no row is masked.
        flat = logits.view(-1, logits.shape[-1])
        nll = F.cross_entropy(
            flat, batch.inputs.labels.view(-1), ignore_index=IGNORED, reduction="none"
        )
        weights = batch.weights[:, 0]
        loss = (nll * weights).sum() / weights.sum()

        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return bare


def make_ours(
    loss: TokenLoss, collator: Collator, batch_size: int
) -> Callable[[np.ndarray], float]:
    """Return a function from row ids to their loss: collator and optimizer step."""
    engine = make_engine(make_model(), OPTIONS, batch_size)

    def ours(rows: np.ndarray) -> float:
        sums, _ = optimizer_step(engine, [collator(rows)], loss, step=0)
        return sums.objective

    return ours


class TakeTurns(transformers.TrainerCallback):
    """After each step of the Trainer, make the other sides' steps on the same rows.

    `seconds` and `losses` have one entry per step, by side.
    """

    def __init__(
        self,
        bare: Callable[[Batch], float],
        ours: Callable[[np.ndarray], float],
        collator: Collator,
        order: np.ndarray,
    ):
        self.sides = {"bare": bare, "ours": ours}
        self.collator, self.order = collator, order
        self.seconds = {name: [] for name in ("Trainer", *self.sides)}
        self.losses = {name: [] for name in self.sides}

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Start the Trainer's clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the Trainer's clock, take the others' turns, and start it again."""
        self.seconds["Trainer"].append(time.perf_counter() - self.started)
        rows = self.order[state.global_step - 1]
        inputs = {"bare": self.collator(rows), "ours": rows}
        for name in list(self.sides)[:: 1 if state.global_step % 2 else -1]:
            begin = time.perf_counter()
            self.losses[name].append(self.sides[name](inputs[name]))
            self.seconds[name].append(time.perf_counter() - begin)
        self.started = time.perf_counter()


def compare_sides(
    loss: TokenLoss, collator: Collator, order: np.ndarray
) -> tuple[dict[str, list[float]], Callable[[np.ndarray], float]]:
    """Train on all sides and assert equal losses.

    Returns:
        The seconds per step of each side, and our side's step, to go on with.
    """
    catalogue = loss.context.stored.catalogue
    with tempfile.TemporaryDirectory() as folder:
        # The Trainer comes before the process group, which it would join.
        trainer = make_trainer(collator, catalogue, order, folder)
        ours = make_ours(loss, collator, order.shape[1])
        turns = TakeTurns(make_bare(), ours, collator, order)
        trainer.add_callback(turns)
        trainer.train()

    losses = np.array([trainer.losses, *turns.losses.values()])
    assert losses.shape == (3, len(order)), losses.shape
    spread = np.ptp(losses, axis=0)
    assert spread.max() <= LOSS_TOLERANCE, (
        f"losses differ by {spread.max():.1e} at step {spread.argmax() + 1}"
    )
    print(
        f"equal: {len(order)} losses from {losses[0, 0]:.3f} to {losses[0, -1]:.3f} differ by "
        f"{spread.max():.1e} at most (by {spread[0]:.1e} at the first step)"
    )
    return turns.seconds, turns.sides["ours"]


def time_orders(
    ours: Callable[[np.ndarray], float], orders: dict[bool, np.ndarray], turn: int
) -> dict[bool, float]:
    """Return our seconds over each order of the same rows, in turns of `turn` batches."""
    seconds = dict.fromkeys(orders, 0.0)
    for first in range(0, len(orders[True]), turn):
        for group, order in orders.items():
            begin = time.perf_counter()
            for rows in order[first : first + turn]:
                ours(rows)
            seconds[group] += time.perf_counter() - begin
    return seconds


def gain_seconds(num_scanned: int) -> tuple[float, float, int]:
    """Time our gain and the nested scan, and assert that their values agree.

    Returns:
        Seconds of our gain; seconds of the nested scan, multiplied up to all prefixes; the number
        of prefixes that the scan was timed on.
    """
    rng = np.random.default_rng(2)
    counts = np.bincount(zipf_items(NUM_IG_ITEMS, 10 * NUM_IG_ITEMS, rng), minlength=NUM_IG_ITEMS)
    catalogue = make_catalogue(NUM_IG_ITEMS, counts)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
        gain = information_gain(trie, "prior")
        times.append(time.perf_counter() - begin)

    paths = [tuple(catalogue.path(item).tolist()) for item in range(NUM_IG_ITEMS)]
    scanned = rng.choice(NUM_IG_ITEMS, num_scanned, replace=False).tolist()
    prefixes = list(
        dict.fromkeys(paths[item][:end] for item in scanned for end in range(LEVELS + 2))
    )
    begin = time.perf_counter()
    found = scanned_gain(paths, counts.tolist(), prefixes)
    seconds = time.perf_counter() - begin
    nodes = trie.path_nodes(catalogue.offsets)
    for item in scanned:
        ours = gain[nodes[catalogue.offsets[item] : catalogue.offsets[item + 1]]]
        theirs = [found[paths[item][: end + 1]] for end in range(LEVELS + 1)]
        assert np.allclose(ours, theirs, rtol=0, atol=GAIN_TOLERANCE), (
            f"item {item}: gains {ours}, scanned {theirs}"
        )
    return statistics.median(times), seconds * trie.num_nodes / len(prefixes), len(prefixes)


def main() -> None:
    """Compare the sides, the orders and the gains; print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="12 batches of 16 rows; under 50 s")
    quick = parser.parse_args().quick
    steps, batch_size, num_scanned = (12, 16, 20) if quick else (50, 64, 100)
    split, counts = make_rows(steps * batch_size)
    loss = make_loss(make_catalogue(NUM_ITEMS, counts))
    collator = make_collator(loss, split)
    lengths = collator.prompts.lengths(split) + LEVELS + 1
    orders = {group: epoch_batches(lengths, batch_size, 0, 0, group) for group in (False, True)}

    seconds, ours = compare_sides(loss, collator, orders[False])
    collate = statistics.median(timed(collator, rows) for rows in orders[False])
    items = np.diff(split.history_offsets)
    print(
        f"{steps} batches of {batch_size}; items in a history: median {np.median(items):.0f}, "
        f"mean {items.mean():.1f}"
    )
    print(f"a call of our collator takes {collate * 1e3:.2f} ms")
    rows = [
        [n, batch_size / statistics.median(s), statistics.median(s), min(s), max(s)]
        for n, s in seconds.items()
    ]
    print_table(["side", "samples/s", "s a step (median)", "least", "most"], rows)

    grouping = time_orders(ours, orders, turn=4 if quick else 5)
    ig_seconds, scan_seconds, num_prefixes = gain_seconds(num_scanned)

    for name, group in (("as they come", False), ("grouped by length", True)):
        print(f"ours, rows {name}: {split.targets.size / grouping[group]:.1f} samples/s")
    scanned = f"nested scan: {scan_seconds:.0f} s (from {num_prefixes} prefixes)"
    print(f"gain of {NUM_IG_ITEMS:,} × {LEVELS} codes: {ig_seconds:.3f} s; {scanned}")
    figures = {
        "samples_per_s": batch_size / statistics.median(seconds["ours"]),
        "samples_per_s_vs_trainer": paired(seconds["Trainer"], seconds["ours"]),
        "overhead_vs_bare_step": paired(seconds["ours"], seconds["bare"]) - 1,
        "length_grouping_gain": grouping[False] / grouping[True],
        "ig_seconds_25k": ig_seconds,
        "ig_scan_seconds_25k_estimated": scan_seconds,
    }
    finish("tiger", figures, quick)
    distributed.exit_process(0)


def paired(numerators: list[float], denominators: list[float]) -> float:
    """Return the median ratio of two sides on the same rows."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def timed(function: Callable[..., object], *arguments: object) -> float:
    """Return the wall time of one call."""
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


if __name__ == "__main__":
    # Before torch or DeepSpeed look for devices.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(2)
    main()
