"""Benchmark: TIGER's training step against `transformers.Trainer` and against the bare step; length grouping; the gain of codes.

    python tools/bench/tiger.py [--quick]

Recipe: the T5 of tools/models/tiger.json (the paper's size) with random weights and without dropout, fp32, CPU, 2 threads;
10,000 synthetic items with different random semantic IDs of 4 × 256 codes; 20,000 users whose numbers of interactions are
spread as in instruments (5 at least, median 6, a long tail), every prefix a row, histories of 1 to 20 items; Zipf popularity;
seed 0. Trained on are 50 batches of 64 of these rows (--quick: 12 of 16) with `igd` weights, AdamW without decay, a constant
learning rate, clipping at norm 1. All sides start from the same weights and see the same rows in the same order:

* Trainer: transformers' own loop with `_published_tiger.PublishedTrainer`: dynamic padding, weights looked up in Python. Its
  time is all between two steps' ends: collating, loss, backward, clipping, update, and its own bookkeeping.
* bare: T5's forward pass on a batch collated and weighted beforehand, weighted mean, backward, clipping, torch's AdamW.
* ours: our Collator and `train.train_step` on a real DeepSpeed engine (stage 0, one process). The collator runs within the
  measured time, not in train.py's thread ahead of it; the Trainer's runs in the same thread too (its default).

The losses of all steps must agree to 1e-4. That needs a small learning rate, 5e-6: at TIGER's 5e-4 from the first step on, the
bare step itself, with initial weights moved by one fp32 rounding, is 1e-4 off its own losses after 16 steps. Speed does not
depend on it.

The sides take turns at every step, so that they see the same state of the machine, which others share. Times are wall time; the
ratios are medians over steps of the ratio on the same rows, one after the other.

Length grouping: ours on the same rows in `epoch_batches`' two orders, in turns of a few batches; whole times are compared.

Gain: TokenTrie and information gain of 25,000 different random IDs, against the published nested scan, which is timed on the
prefixes of a few items (values compared) and multiplied up to all prefixes.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from _common import REPOSITORY, finish, print_table
from _published_tiger import PublishedTrainer, scanned_gain, weight_table

from igd_ds import distributed, engine, train
from igd_ds.backbones import read_model_config
from igd_ds.backbones import t5 as tiger
from igd_ds.data.batches import Batch, Collator, epoch_batches
from igd_ds.data.dataset import Split
from igd_ds.data.prompts import PromptBuilder
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import information_gain, zero_gain
from igd_ds.items.store import StoredCatalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.objectives import WEIGHTINGS

PAD, EOS, UNKNOWN, FIRST_CODE = range(4)
LEVELS, CODES = 4, 256
NUM_ITEMS, NUM_USERS, MAX_HISTORY, NUM_IG_ITEMS = 10_000, 20_000, 20, 25_000
BETA = 0.1
SETTINGS = SimpleNamespace(
    learning_rate=5e-6,
    weight_decay=0.0,
    schedule="constant",
    warmup_ratio=0.0,
    max_grad_norm=1.0,
    normalization="global",
)
LOSS_TOLERANCE = 1e-4  # nats: fp32 in another order, carried through 50 updates
GAIN_TOLERANCE = 1e-12


def make_catalogue(num_items: int, counts: np.ndarray) -> Catalogue:
    """Different random semantic IDs, EOS behind each."""
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(CODES, size=(num_items + 100, LEVELS)), axis=0)
    codes = rng.permutation(codes)[:num_items] + FIRST_CODE + CODES * np.arange(LEVELS)
    token_ids = np.hstack([codes, np.full((num_items, 1), EOS)]).astype(np.int32).ravel()
    return Catalogue(
        token_ids, np.arange(num_items + 1) * (LEVELS + 1), counts, EOS, "semantic-id", "", ""
    )


def zipf_items(num_items: int, size: int, rng) -> np.ndarray:
    """`size` items drawn with log-uniform ranks."""
    return rng.permutation(num_items)[
        (np.exp(rng.random(size) * np.log(num_items + 1)) - 1).astype(np.int64)
    ]


def make_rows(num_rows: int) -> tuple[Split, np.ndarray]:
    """Draw users; return a seeded sample of their rows, and how often each item is a target in all of them (N,)."""
    rng = np.random.default_rng(1)
    lengths = 5 + rng.lognormal(np.log(1.7), 1.3, NUM_USERS).astype(
        np.int64
    )  # quartiles 5, 6, 9; instruments: 5, 6, 9
    begins = np.cumsum(lengths) - lengths
    items = zipf_items(NUM_ITEMS, int(lengths.sum()), rng).astype(np.int32)
    place = np.arange(len(items)) - np.repeat(begins, lengths)
    targets = np.flatnonzero(
        (place > 0) & (place < np.repeat(lengths, lengths) - 2)
    )  # a user's last two are held out
    chosen = rng.choice(targets, num_rows, replace=False)
    kept = np.minimum(place[chosen], MAX_HISTORY)
    history = np.concatenate([items[t - n : t] for t, n in zip(chosen, kept, strict=True)])
    split = Split(
        "train", chosen, history, np.concatenate([[0], np.cumsum(kept)]), items[chosen], None
    )
    return split, np.bincount(items[targets], minlength=NUM_ITEMS)


def make_collator(catalogue: Catalogue, split: Split) -> Collator:
    """Our collator for prompts of codes and nothing else (template `codes`)."""
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    stored = StoredCatalogue(catalogue, trie, information_gain(trie, "prior"), "prior")
    inside = catalogue.token_ids.reshape(-1, LEVELS + 1)[:, :LEVELS].ravel()
    offsets, nothing = np.arange(catalogue.num_items + 1) * LEVELS, np.empty(0, np.int32)
    prompts = PromptBuilder(
        nothing,
        nothing,
        nothing,
        inside,
        offsets,
        LEVELS * MAX_HISTORY,
        np.array([UNKNOWN], np.int32),
    )
    weights = WEIGHTINGS["igd"].targets[0](stored, SimpleNamespace(igd_beta=BETA))[:, None]
    zero = zero_gain(trie)[trie.path_nodes(catalogue.offsets)]
    return Collator(
        split,
        prompts,
        catalogue.token_ids,
        catalogue.offsets,
        weights,
        zero,
        PAD,
        encoder_decoder=True,
    )


def make_model() -> torch.nn.Module:
    """The same random weights at every call."""
    path = str(REPOSITORY / "tools" / "models" / "tiger.json")
    model_config = read_model_config(path)
    model_config.vocab_size, model_config.dropout_rate = FIRST_CODE + LEVELS * CODES, 0.0
    model_config.eos_token_id, model_config.pad_token_id, model_config.decoder_start_token_id = (
        EOS,
        PAD,
        PAD,
    )
    config = SimpleNamespace(
        model_config=path, attn_implementation="sdpa", gradient_checkpointing=False
    )
    torch.manual_seed(0)
    return tiger.build(config, model_config, torch.float32, torch.device("cpu")).train()


def make_trainer(
    collator: Collator, catalogue: Catalogue, order: np.ndarray, folder: str
) -> PublishedTrainer:
    """The Trainer over the rows of `order` (steps, G), tokenized."""
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
    trainer = PublishedTrainer(make_model(), rows, order.shape[1], table, PAD, SETTINGS, folder)
    # Otherwise it would wrap the model to average gradients over processes.
    assert trainer.accelerator.distributed_type == "NO", trainer.accelerator.distributed_type
    return trainer


def make_bare():
    """Return a function from a Batch to its loss: the least that a step is."""
    model = make_model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=SETTINGS.learning_rate, weight_decay=SETTINGS.weight_decay
    )

    def bare(batch: Batch) -> float:
        decoder_input_ids = model.prepare_decoder_input_ids_from_labels(batch.labels)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        logits = model(**inputs, decoder_input_ids=decoder_input_ids, use_cache=False).logits
        nll = F.cross_entropy(
            logits.view(-1, logits.shape[-1]), batch.labels.view(-1), reduction="none"
        )
        weights = batch.token_weights.view(-1)
        loss = (nll * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return bare


def make_ours(collator: Collator, batch_size: int):
    """Return a function from row ids to their loss: collator and train_step."""
    distributed.init()
    ds = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 0},
    }
    ds |= {"gradient_clipping": SETTINGS.max_grad_norm, "steps_per_print": 10**9}
    logging.disable(logging.WARNING)  # DeepSpeed's start-up lines would hide the table
    wrapped = engine.initialize(make_model(), SETTINGS, ds, num_steps=1000)
    task = SimpleNamespace(adapter=tiger, weighting=WEIGHTINGS["igd"], mixing=None)

    def ours(rows: np.ndarray) -> float:
        sums, _ = train.train_step(wrapped, task, SETTINGS, [collator(rows)], False, 1)
        return sums[train.SUMS.index("objective")]

    return ours


class TakeTurns(transformers.TrainerCallback):
    """After each step of the Trainer the other sides make theirs on the same rows; `seconds` and `losses` by side, per step."""

    def __init__(self, bare, ours, collator: Collator, order: np.ndarray):
        self.sides = {"bare": bare, "ours": ours}
        self.collator, self.order = collator, order
        self.seconds = {name: [] for name in ("Trainer", *self.sides)}
        self.losses = {name: [] for name in self.sides}

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Start the Trainer's clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop it, take the others' turns, start it again."""
        self.seconds["Trainer"].append(time.perf_counter() - self.started)
        rows = self.order[state.global_step - 1]
        inputs = {"bare": self.collator(rows), "ours": rows}
        for name in list(self.sides)[:: 1 if state.global_step % 2 else -1]:
            begin = time.perf_counter()
            self.losses[name].append(self.sides[name](inputs[name]))
            self.seconds[name].append(time.perf_counter() - begin)
        self.started = time.perf_counter()


def compare_sides(collator: Collator, catalogue: Catalogue, order: np.ndarray):
    """Train on all sides, assert equal losses; return the seconds per step by side and our side, to go on with."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            collator, catalogue, order, folder
        )  # before the process group, which it would join
        turns = TakeTurns(make_bare(), make_ours(collator, order.shape[1]), collator, order)
        trainer.add_callback(turns)
        trainer.train()
    losses = np.array([trainer.losses, *turns.losses.values()])
    assert losses.shape == (3, len(order)), losses.shape
    spread = np.ptp(losses, axis=0)
    assert spread.max() <= LOSS_TOLERANCE, (
        f"losses differ by {spread.max():.1e} at step {spread.argmax() + 1}"
    )
    print(
        f"equal: {len(order)} losses from {losses[0, 0]:.3f} to {losses[0, -1]:.3f} differ by {spread.max():.1e} at most "
        f"(by {spread[0]:.1e} at the first step)"
    )
    return turns.seconds, turns.sides["ours"]


def time_orders(ours, orders: dict[bool, np.ndarray], turn: int) -> dict[bool, float]:
    """Seconds of ours over each order of the same rows, `turn` batches of one and then of the other."""
    seconds = dict.fromkeys(orders, 0.0)
    for first in range(0, len(orders[True]), turn):
        for group, order in orders.items():
            begin = time.perf_counter()
            for rows in order[first : first + turn]:
                ours(rows)
            seconds[group] += time.perf_counter() - begin
    return seconds


def gain_seconds(num_scanned: int) -> tuple[float, float, int]:
    """Return seconds of our gain, seconds of the nested scan multiplied up to all prefixes, and how many it was timed on."""
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
    catalogue = make_catalogue(NUM_ITEMS, counts)
    collator = make_collator(catalogue, split)
    lengths = collator.prompts.lengths(split) + LEVELS + 1
    orders = {group: epoch_batches(lengths, batch_size, 0, 0, group) for group in (False, True)}

    seconds, ours = compare_sides(collator, catalogue, orders[False])
    collate = statistics.median(timed(collator, rows) for rows in orders[False])
    items = np.diff(split.history_offsets)
    print(
        f"{steps} batches of {batch_size}; items in a history: median {np.median(items):.0f}, mean {items.mean():.1f}"
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
    """The median ratio of two sides on the same rows."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def timed(function, *arguments) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


if __name__ == "__main__":
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }  # before torch or DeepSpeed look
    torch.set_num_threads(2)
    main()
