"""Benchmark: one optimizer step, against the published way and against the bare step.

    python tools/bench/train_step.py [--quick]

The model is a Qwen2 with random weights (hidden size 256, 4 layers, vocabulary 151,936, tied), in
fp32, on a CPU with one thread. A batch has 16 × 224 tokens (--quick: 5 × 224), 12 of them labelled
per row on average. The catalogue is synthetic, with 5,000 items (seed 0). The optimizer is AdamW,
with clipping at norm 1. A step is forward, loss, backward, clipping and update of the same batch.
There are three steps:

* published: what `transformers.Trainer` does with the loss of IGD's published code. It computes the
  logits of all positions, a shifted copy, cross-entropy everywhere, and weights looked up in a trie
  of dicts, row by row. It is written to cost less than the original: the loss that Hugging Face
  computes whenever `labels` are passed, and the log per token, are left out.
* bare: Hugging Face's own `logits_to_keep` and the mean loss, without weights or distribution. No
  step can be much faster.
* ours: `optimizer_step` (igd_ds/engine/step.py) on a real DeepSpeed engine (ZeRO stage 0, fp32, one
  process), with a batch of our Collator. DeepSpeed copies all gradients once to average them, with
  one process or many. This is a constant, so --quick shows a larger overhead.

The published step and ours must give the same weighted loss and the same gradients.

Times are medians over interleaved rounds in one process, in CPU seconds: one thread does all the
work, and other load on the machine hardly changes them. Memory is measured in one process per step:
the peak resident size during the step (ru_maxrss) above the resident size with the model and the
optimizer's state loaded. Gradients count, for both alike. `weight_lookup_share` is the time of a
whole call of the collator over that of our step. Prompts, labels and padding are included, so it is
an upper bound for the gathering of weights.
"""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import finish, in_fork, peak_bytes, print_table
from _engine import loop_options, make_engine
from transformers import AutoModelForCausalLM, Qwen2Config

from igd_ds import distributed
from igd_ds.backbones import CausalLM
from igd_ds.backbones.causal_lm import predicting_positions
from igd_ds.contracts import IGNORED, Batch, ObjectiveContext
from igd_ds.data.batches import Collator, TokenColumns
from igd_ds.data.dataset import Split
from igd_ds.data.prompts import PromptBuilder
from igd_ds.engine.step import optimizer_step
from igd_ds.generative_training import TokenLoss
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import information_gain
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.store import StoredCatalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.objectives.gain import IGD, GainOptions

EOS, NEWLINE, VOCABULARY = 0, 1, 151_936
NUM_ITEMS, NUM_ROWS, ROW_TOKENS = 5_000, 16, 224
BETA, LEARNING_RATE, MAX_NORM = 0.1, 1e-4, 1.0
STEPS = ("published", "bare", "ours")
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5  # relative; gradients in the L2 norm

Step = Callable[[Batch], float]


def make_catalogue() -> Catalogue:
    """Make synthetic items of about 12 tokens.

    Half of them share the first tokens of a series. Counts follow Zipf's law, and one item in ten
    is cold.
    """
    rng = np.random.default_rng(0)
    series = rng.integers(2, VOCABULARY, (NUM_ITEMS // 10, 6))
    shared = np.where(rng.random(NUM_ITEMS) < 0.5, rng.integers(2, 7, NUM_ITEMS), 0)
    length = np.minimum(shared + 4 + rng.poisson(4, NUM_ITEMS), 18) + 2
    offsets = np.concatenate([[0], np.cumsum(length)])
    token_ids = rng.integers(2, VOCABULARY, offsets[-1])

    for k in range(6):
        in_series = np.flatnonzero(shared > k)
        token_ids[offsets[in_series] + k] = series[in_series % len(series), k]
    token_ids[offsets[1:] - 2] = NEWLINE
    token_ids[offsets[1:] - 1] = EOS

    counts = np.minimum(rng.zipf(1.6, NUM_ITEMS), 10_000) * (rng.random(NUM_ITEMS) > 0.1)
    return Catalogue(token_ids.astype(np.int32), offsets, counts, EOS, "text", "", "")


def make_context(catalogue: Catalogue) -> ObjectiveContext:
    """Build trie and gain of the catalogue."""
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    stored = StoredCatalogue.build(catalogue, trie, information_gain(trie, "prior"), "prior")
    return ObjectiveContext(stored, SearchTrie.build(trie), dataset="")


def make_loss(catalogue: Catalogue) -> TokenLoss:
    """Return our loss: objective `igd` over a causal LM's logits."""
    context = make_context(catalogue)
    objective = IGD(GainOptions(igd_beta=BETA), total_steps=1000)
    return TokenLoss(CausalLM(), objective, context)


def make_collator(loss: TokenLoss) -> Collator:
    """Return our collator over rows with random histories and targets drawn by their counts."""
    rng = np.random.default_rng(1)
    catalogue = loss.context.stored.catalogue
    histories = rng.integers(NUM_ITEMS, size=(NUM_ROWS, 20))
    targets = rng.choice(NUM_ITEMS, NUM_ROWS, p=catalogue.counts / catalogue.counts.sum())
    split = Split(
        name="train",
        user_ids=np.arange(NUM_ROWS),
        history_items=histories.ravel(),
        history_offsets=np.arange(NUM_ROWS + 1) * 20,
        targets=targets,
        timestamps=None,
    )

    # Histories are cut to fit. An item in them is its catalogue tokens, and a newline follows.
    frame = rng.integers(2, VOCABULARY, (2, 10)).astype(np.int32)
    longest = int((catalogue.offsets[targets + 1] - catalogue.offsets[targets]).max())
    prompts = PromptBuilder(
        begin=frame[0],
        separator=np.array([NEWLINE], np.int32),
        end=frame[1],
        item_tokens=catalogue.token_ids,
        item_offsets=catalogue.offsets,
        budget=ROW_TOKENS - longest,
        null=frame[0],
    )
    weights = loss.objective.weights(loss.context)
    return Collator(split, prompts, TokenColumns.build(loss.context.stored, weights), EOS)


def make_model() -> torch.nn.Module:
    """Return a model with the same random weights at every call."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=ROW_TOKENS,
        tie_word_embeddings=True,
    )
    settings = {"attn_implementation": "sdpa", "dtype": torch.float32}
    return AutoModelForCausalLM.from_config(config, **settings).train()


def make_dict_trie(catalogue: Catalogue) -> dict[str, Any]:
    """Build the published trie of dicts; a node's score sums -p ln p of the items under it."""
    root = {"children": {}, "score": 0.0, "gain": 0.0}
    total = int(catalogue.counts.sum())
    for item in np.flatnonzero(catalogue.counts).tolist():
        p = int(catalogue.counts[item]) / total
        node = root
        node["score"] -= p * np.log(p)
        for token in catalogue.path(item).tolist():
            node = node["children"].setdefault(token, {"children": {}, "score": 0.0, "gain": 0.0})
            node["score"] -= p * np.log(p)

    stack = [root]
    while stack:
        node = stack.pop()
        for child in node["children"].values():
            child["gain"] = node["score"] - child["score"]
            stack.append(child)
    return root


def dict_trie_gains(trie: dict[str, Any], tokens: list[int]) -> list[float]:
    """Return the gain of every token of a path."""
    gains, node = [], trie
    for token in tokens:
        node = node["children"][token]
        gains.append(node["gain"])
    return gains


def published_loss(model: torch.nn.Module, trie: dict[str, Any], batch: Batch) -> torch.Tensor:
    """Compute logits and cross-entropy everywhere; look up the weights in Python, row by row."""
    inputs = {"input_ids": batch.inputs.input_ids, "attention_mask": batch.inputs.attention_mask}
    logits = model(**inputs, use_cache=False).logits
    shifted, labels = logits[:, :-1].contiguous(), batch.inputs.labels[:, 1:].contiguous()
    flat = F.cross_entropy(shifted.view(-1, VOCABULARY), labels.view(-1), reduction="none")
    nll = flat.view(labels.shape)

    labelled = labels != IGNORED
    gains = torch.cat(
        [torch.tensor(dict_trie_gains(trie, row[row != IGNORED].tolist())) for row in labels]
    )
    weights = torch.where(gains == 0, BETA, 1.0)
    return (nll[labelled] * weights).sum() / weights.sum()


def bare_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Compute the mean over labelled tokens with Hugging Face's `logits_to_keep`."""
    keep = predicting_positions(batch.inputs.labels)
    inputs = {"input_ids": batch.inputs.input_ids, "attention_mask": batch.inputs.attention_mask}
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    return F.cross_entropy(logits.float(), batch.targets)


def make_step(
    name: str, loss: TokenLoss, num_rows: int
) -> tuple[Step, torch.nn.Module, torch.optim.Optimizer]:
    """Return a function from a batch to its loss, its model, and its optimizer."""
    model = make_model()
    if name == "ours":
        engine = make_engine(model, loop_options(LEARNING_RATE, MAX_NORM), num_rows)

        def ours(batch: Batch) -> float:
            sums, _ = optimizer_step(engine, [batch], loss, step=0)
            return sums.objective

        return ours, model, engine.optimizer

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    trie = make_dict_trie(loss.context.stored.catalogue) if name == "published" else {}

    def theirs(batch: Batch) -> float:  # as Trainer does it
        value = published_loss(model, trie, batch) if trie else bare_loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return theirs, model, optimizer


def measure_memory(name: str, num_rows: int) -> int:
    """Return the peak of one step above the loaded model, in bytes, of a process of its own."""
    loss = make_loss(make_catalogue())
    collator = make_collator(loss)
    step, _, _ = make_step(name, loss, num_rows)
    step(collator(np.arange(1)))  # one row: this makes the optimizer's state
    batch = collator(np.arange(num_rows))

    with open("/proc/self/statm") as file:
        loaded = int(file.read().split()[1]) * resource.getpagesize()
    before = peak_bytes()
    step(batch)
    assert peak_bytes() > before, (
        "the step needs less memory than loading did, so its peak is unknown"
    )
    return peak_bytes() - loaded


def with_gradients(
    step: Step, model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch
) -> tuple[float, dict[str, torch.Tensor]]:
    """Make one step; return its loss and its clipped gradients."""
    gradients = {}

    def keep(*_: object) -> None:
        gradients.update({name: p.grad.double() for name, p in model.named_parameters()})

    hook = optimizer.register_step_pre_hook(keep)
    loss = step(batch)
    hook.remove()
    return loss, gradients


def check_equal(steps: dict[str, tuple], batch: Batch) -> None:
    """Assert that the published step and ours have the same loss and gradients."""
    expected, wanted = with_gradients(*steps["published"], batch)
    found, got = with_gradients(*steps["ours"], batch)
    assert abs(found - expected) <= LOSS_TOLERANCE * expected, (
        f"weighted loss {found}, published {expected}"
    )

    assert wanted.keys() == got.keys()
    difference = sum((wanted[name] - got[name]).square().sum().item() for name in wanted) ** 0.5
    norm = sum(gradient.square().sum().item() for gradient in wanted.values()) ** 0.5
    share = difference / norm
    assert share <= GRADIENT_TOLERANCE, f"gradients differ by {share:.2e} of their norm"
    print(
        f"equal: weighted loss {expected:.6f} and {found:.6f}, gradients differ by {share:.1e} of "
        "their norm"
    )


def seconds_of(function: Callable[..., object], *arguments: object) -> float:
    """Return the CPU time of one call: of all threads of this process, of which one works."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def measure_times(steps: dict[str, tuple], batch: Batch, rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds of each step, in turns."""
    steps["bare"][0](batch)  # the other two are warm from the check
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(rounds):
        times["published"].append(seconds_of(steps["published"][0], batch))
        for name in ("ours", "bare", "bare", "ours") * 2:
            times[name].append(seconds_of(steps[name][0], batch))
    return times


def main() -> None:
    """Measure memory, check equality, measure time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="5 rows and one round; under 50 s")
    quick = parser.parse_args().quick
    num_rows, rounds = (5, 1) if quick else (NUM_ROWS, 4)
    memory = {name: in_fork(measure_memory, name, num_rows) for name in ("published", "ours")}

    loss = make_loss(make_catalogue())
    collator = make_collator(loss)
    rows = np.arange(num_rows)
    batch = collator(rows)
    assert batch.inputs.labels.shape == (num_rows, ROW_TOKENS), batch.inputs.labels.shape
    steps = {name: make_step(name, loss, num_rows) for name in STEPS}
    check_equal(steps, batch)
    times = measure_times(steps, batch, rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    collate = statistics.median(seconds_of(collator, rows) for _ in range(50))

    print(
        f"{num_rows} × {ROW_TOKENS} tokens, {len(batch.targets)} labelled; a call of the collator "
        f"takes {collate * 1e3:.2f} ms"
    )
    mebibytes = {name: round(peak / 2**20) for name, peak in memory.items()} | {"bare": "-"}
    table = [
        [name, median[name], min(times[name]), max(times[name]), mebibytes[name]] for name in STEPS
    ]
    print_table(["step", "CPU s (median)", "least", "most", "peak MiB above the model"], table)
    figures = {
        "speedup": median["published"] / median["ours"],
        "memory_ratio": memory["published"] / memory["ours"],
        "overhead_vs_bare_step": median["ours"] / median["bare"] - 1,
        "weight_lookup_share": collate / median["ours"],
    }
    finish("train_step", figures, quick)
    distributed.exit_process(0)


if __name__ == "__main__":
    # Before torch or DeepSpeed look for devices.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    main()
