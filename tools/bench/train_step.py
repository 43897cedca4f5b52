"""Benchmark: one optimizer step, against the published way and against the bare step.

    python tools/bench/train_step.py [--quick]

Recipe: Qwen2 with random weights (hidden 256, 4 layers, vocabulary 151,936, tied), fp32, CPU, one thread, 16 × 224 tokens,
12 labelled per row on average (--quick: 5 rows); a synthetic catalogue of 5,000 items, seed 0; AdamW, clipping at norm 1.
Each step is forward, loss, backward, clipping and update of one and the same batch; the three are:

* published: what `transformers.Trainer` does with the loss of IGD's published code: logits of all positions, a shifted copy,
  cross-entropy everywhere, weights looked up in a trie of dicts, row by row. Written so that it costs less than the original:
  the loss that HF computes on the side whenever `labels` are passed, and the per-token logging, are left out.
* bare: HF's own `logits_to_keep` and the plain mean loss; no weights, no distribution. Nothing can be much faster.
* ours: `train.train_step` itself, on a real DeepSpeed engine (ZeRO stage 0, fp32, one process), with the batch of our Collator.
  DeepSpeed copies all gradients once to average them, one process or many: a constant, so --quick shows a larger overhead.

The published step and ours must give the same weighted loss and the same gradients. Times are medians over interleaved rounds
in one process, in CPU seconds: one thread does all the work, and other load on the machine hardly counts. Memory is
measured in a process of its own per step: the peak resident size during the step (ru_maxrss) above the resident size with
model and optimizer state loaded; gradients count, alike for all. `weight_lookup_share` is the time of one whole call of the
collator (prompts, labels and padding too: an upper bound of the gather) over that of our step.
"""

import argparse
import logging
import multiprocessing
import os
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from _common import finish, peak_bytes, print_table
from transformers import AutoModelForCausalLM, Qwen2Config

from igd_ds import distributed, engine, train
from igd_ds.backbones import causal_lm
from igd_ds.data.batches import Batch, Collator
from igd_ds.data.prompts import PromptBuilder
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import information_gain, zero_gain
from igd_ds.items.store import StoredCatalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.loss import IGNORED, at_labels, predicting_positions
from igd_ds.objectives import WEIGHTINGS

EOS, NEWLINE, VOCABULARY = 0, 1, 151_936
NUM_ITEMS, NUM_ROWS, ROW_TOKENS = 5_000, 16, 224
BETA, LEARNING_RATE, MAX_NORM = 0.1, 1e-4, 1.0
STEPS = ("published", "bare", "ours")
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5  # relative; gradients in the L2 norm


def make_catalogue() -> Catalogue:
    """Synthetic items of about 12 tokens: half of them share a series' first tokens; Zipf counts, one item in ten cold."""
    rng = np.random.default_rng(0)
    series = rng.integers(2, VOCABULARY, (NUM_ITEMS // 10, 6))
    shared = np.where(rng.random(NUM_ITEMS) < 0.5, rng.integers(2, 7, NUM_ITEMS), 0)
    length = np.minimum(shared + 4 + rng.poisson(4, NUM_ITEMS), 18) + 2
    offsets = np.concatenate([[0], np.cumsum(length)])
    token_ids = rng.integers(2, VOCABULARY, offsets[-1])
    for k in range(6):
        in_series = np.flatnonzero(shared > k)
        token_ids[offsets[in_series] + k] = series[in_series % len(series), k]
    token_ids[offsets[1:] - 2], token_ids[offsets[1:] - 1] = NEWLINE, EOS
    counts = np.minimum(rng.zipf(1.6, NUM_ITEMS), 10_000) * (rng.random(NUM_ITEMS) > 0.1)
    return Catalogue(token_ids.astype(np.int32), offsets, counts, EOS, "text", "", "")


def make_collator(catalogue: Catalogue) -> Collator:
    """Our collator over rows with random histories, cut to fit, and targets drawn by their counts."""
    rng = np.random.default_rng(1)
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    stored = StoredCatalogue(catalogue, trie, information_gain(trie, "prior", np.float32), "prior")
    histories = rng.integers(NUM_ITEMS, size=(NUM_ROWS, 20))
    targets = rng.choice(NUM_ITEMS, NUM_ROWS, p=catalogue.counts / catalogue.counts.sum())
    split = SimpleNamespace(history=lambda row: histories[row], targets=targets)
    frame = rng.integers(2, VOCABULARY, (2, 10)).astype(np.int32)
    budget = ROW_TOKENS - int((catalogue.offsets[targets + 1] - catalogue.offsets[targets]).max())
    # A history shows items as their catalogue tokens; between two of them stands one more.
    separator = np.array([NEWLINE], np.int32)
    prompts = PromptBuilder(
        frame[0], separator, frame[1], catalogue.token_ids, catalogue.offsets, budget, frame[0]
    )
    weights = WEIGHTINGS["igd"].targets[0](stored, SimpleNamespace(igd_beta=BETA))[:, None]
    zero = zero_gain(trie)[trie.path_nodes(catalogue.offsets)]
    return Collator(split, prompts, catalogue.token_ids, catalogue.offsets, weights, zero, EOS)


def make_model() -> torch.nn.Module:
    """The same random weights at every call."""
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
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", dtype=torch.float32
    ).train()


def make_dict_trie(catalogue: Catalogue) -> dict:
    """The published trie: a node is a dict of children with a score, the sum of -p ln p of the training items under it."""
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


def dict_trie_gains(trie: dict, tokens: list[int]) -> list[float]:
    """The gain of every token of a path."""
    gains, node = [], trie
    for token in tokens:
        node = node["children"][token]
        gains.append(node["gain"])
    return gains


def published_loss(model, trie: dict, batch: Batch) -> torch.Tensor:
    """Full logits, full cross-entropy, weights looked up in Python per row."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits
    shifted, labels = logits[:, :-1].contiguous(), batch.labels[:, 1:].contiguous()
    nll = F.cross_entropy(shifted.view(-1, VOCABULARY), labels.view(-1), reduction="none").view(
        labels.shape
    )
    labelled = labels != IGNORED
    gains = torch.cat(
        [torch.tensor(dict_trie_gains(trie, row[row != IGNORED].tolist())) for row in labels]
    )
    weights = torch.where(gains == 0, BETA, 1.0)
    return (nll[labelled] * weights).sum() / weights.sum()


def bare_loss(model, batch: Batch) -> torch.Tensor:
    """HF's logits_to_keep and the mean over labelled tokens."""
    keep = predicting_positions(batch.labels)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    return F.cross_entropy(logits.float(), at_labels(batch.labels, batch.labels))


def make_step(name: str, catalogue: Catalogue, num_rows: int):
    """Return (function from Batch to loss, its model, its torch optimizer)."""
    model = make_model()
    if name == "ours":
        if not torch.distributed.is_initialized():
            distributed.init()
        settings = SimpleNamespace(
            weight_decay=0.0,
            learning_rate=LEARNING_RATE,
            warmup_ratio=0.0,
            schedule="constant",
            normalization="global",
        )
        task = SimpleNamespace(adapter=causal_lm, weighting=WEIGHTINGS["igd"], mixing=None)
        ds = {
            "train_micro_batch_size_per_gpu": num_rows,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": 0},
        }
        ds |= {"gradient_clipping": MAX_NORM, "steps_per_print": 10**9}
        logging.disable(logging.WARNING)  # DeepSpeed's start-up lines would hide the table
        wrapped = engine.initialize(model, settings, ds, num_steps=1000)

        def ours(batch: Batch) -> float:
            sums, _ = train.train_step(wrapped, task, settings, [batch], False, 1)
            return sums[train.SUMS.index("objective")]

        return ours, model, wrapped.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    trie = make_dict_trie(catalogue) if name == "published" else None

    def theirs(batch: Batch) -> float:  # as Trainer does it
        loss = (
            published_loss(model, trie, batch) if name == "published" else bare_loss(model, batch)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return theirs, model, optimizer


def measure_memory(name: str, num_rows: int) -> int:
    """In a fresh process: the peak of one step above the loaded model, in bytes."""
    catalogue = make_catalogue()
    collator = make_collator(catalogue)
    step, _, _ = make_step(name, catalogue, num_rows)
    step(collator(np.arange(1)))  # one row: makes the optimizer's state
    batch = collator(np.arange(num_rows))
    with open("/proc/self/statm") as file:
        loaded = int(file.read().split()[1]) * resource.getpagesize()
    before = peak_bytes()
    step(batch)
    assert peak_bytes() > before, (
        "the step needs less memory than loading did: its peak cannot be told"
    )
    return peak_bytes() - loaded


def in_fresh_process(function, *arguments):
    """Fork, so that the imports are paid once: until now this process has computed nothing."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def with_gradients(step, model, optimizer, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Make one step; return its loss and the clipped gradients it was made with."""
    gradients = {}

    def keep(*_):
        gradients.update({name: p.grad.double() for name, p in model.named_parameters()})

    hook = optimizer.register_step_pre_hook(keep)
    loss = step(batch)
    hook.remove()
    return loss, gradients


def check_equal(steps: dict, batch: Batch) -> None:
    """Assert that the published step and ours have the same loss and gradients."""
    (expected, wanted), (found, got) = (
        with_gradients(*steps[name], batch) for name in ("published", "ours")
    )
    assert abs(found - expected) <= LOSS_TOLERANCE * expected, (
        f"weighted loss {found}, published {expected}"
    )
    assert wanted.keys() == got.keys()
    difference = sum((wanted[name] - got[name]).square().sum().item() for name in wanted) ** 0.5
    norm = sum(gradient.square().sum().item() for gradient in wanted.values()) ** 0.5
    assert difference <= GRADIENT_TOLERANCE * norm, (
        f"gradients differ by {difference / norm:.2e} of their norm"
    )
    print(
        f"equal: weighted loss {expected:.6f} and {found:.6f}, gradients differ by {difference / norm:.1e} of their norm"
    )


def seconds_of(function, *arguments) -> float:
    """CPU time of one call: all threads of this process, of which one works."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def main() -> None:
    """Measure memory, check equality, measure time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="5 rows and one round; under 50 s")
    quick = parser.parse_args().quick
    num_rows, rounds = (5, 1) if quick else (NUM_ROWS, 4)
    memory = {
        name: in_fresh_process(measure_memory, name, num_rows) for name in ("published", "ours")
    }

    catalogue = make_catalogue()
    collator = make_collator(catalogue)
    rows = np.arange(num_rows)
    batch = collator(rows)
    assert batch.labels.shape == (num_rows, ROW_TOKENS), batch.labels.shape
    steps = {name: make_step(name, catalogue, num_rows) for name in STEPS}
    check_equal(steps, batch)
    steps["bare"][0](batch)  # the others are warm from the check
    times = {name: [] for name in STEPS}
    for _ in range(rounds):
        times["published"].append(seconds_of(steps["published"][0], batch))
        for name in ("ours", "bare", "bare", "ours") * 2:
            times[name].append(seconds_of(steps[name][0], batch))
    median = {name: statistics.median(values) for name, values in times.items()}
    collate = statistics.median(seconds_of(collator, rows) for _ in range(50))

    labelled = int((batch.labels != IGNORED).sum())
    print(
        f"{num_rows} × {ROW_TOKENS} tokens, {labelled} labelled; a call of the collator takes {collate * 1e3:.2f} ms"
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
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }  # before torch or DeepSpeed look
    torch.set_num_threads(1)
    main()
