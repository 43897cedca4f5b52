"""Benchmark: an optimizer step on row trees, against padded rows and other trainers.

    python tools/bench/train_tree.py [--quick] [--model FOLDER] [--data FOLDER] [--rounds N]

The model is SmolLM2-135M (LLaMA: hidden size 576, 30 layers, vocabulary 49,152, tied) in fp32, on a
CPU with one thread. --model names its folder; without it, the weights are random and the tokenizer
is a BPE that is trained on the titles. --quick takes 2 of the layers, 8 rows and fewer sides.
--data names the folder with games-2015 and books-small (default: data/ of $IGD_DS_SHARED, or of
../shared). Each side makes a step to warm up and --rounds more; the median counts.

All sides train on the same rows: the first batches of an epoch of chains, leave-one-out with at
most 20 items of history for books-small, D3's rows for games-2015. They minimise the mean NLL of
the target tokens over all rows of the step, and must report the same loss. A step is forward, loss,
backward, clipping and AdamW with a learning rate of 0, so that every step has the same loss.

* tree: `igd train` with --packing tree: `optimizer_step` on a DeepSpeed engine (stage 0).
* rows: the same with --packing rows; rows are sorted by length before they are dealt, as the length
  grouping of a long epoch does.
* trainer: `transformers.Trainer` with dynamic padding and the same rows, sorted likewise.
* sft: TRL's SFTTrainer with packing to 1,024 tokens, where TRL is installed.

Frames are the Alpaca prompt of D3, the short template, and the template `list`. `tree_vs_rows_…`,
`tree_vs_trainer` and `tree_vs_sft` compare within the Alpaca frame; `list_vs_rows_…` compares trees
of `list` with padded rows of the Alpaca frame: the same rows, other prompts. A ratio is rows per
CPU second over rows per CPU second. Each side runs in a process of its own; memory is its peak
resident size above the size with the model and the optimizer's state; it is measured of our own two
sides, because a Trainer's first step leaves the allocator with memory that its later steps use.
"""

import argparse
import contextlib
import importlib.util
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import REPOSITORY, finish, in_fork, peak_bytes, print_table
from _engine import loop_options, make_engine
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from igd_ds import distributed, memory
from igd_ds.backbones import CausalLM
from igd_ds.commands import prepare
from igd_ds.contracts import IGNORED, ObjectiveContext
from igd_ds.data.batches import Collator, TokenColumns
from igd_ds.data.bpe import EOS, template_texts, train_bpe
from igd_ds.data.chains import RowChains
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.data.row_trees import build_row_tree
from igd_ds.engine.step import optimizer_step
from igd_ds.generative_training import TokenLoss
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import edge_gain
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.store import StoredCatalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.objectives.position import Uniform
from igd_ds.objectives.weighted import NoOptions

MAX_LENGTH = 512
MAX_NORM = 1.0
LOSS_TOLERANCE = 1e-5  # relative: fp32 sums of other shapes
PACKED_TOKENS = 1024
SIDES = {
    ("games-2015", "alpaca"): ("tree", "rows", "trainer", "sft"),
    ("games-2015", "short"): ("tree", "rows"),
    ("games-2015", "list"): ("tree", "rows"),
    ("books-small", "alpaca"): ("tree", "rows"),
    ("books-small", "short"): ("tree", "rows"),
    ("books-small", "list"): ("tree", "rows"),
}
"""What is measured, by dataset and frame. The tree's loss must be that of all sides."""

QUICK_SIDES = {
    ("games-2015", "alpaca"): ("tree", "rows", "trainer"),
    ("books-small", "alpaca"): ("tree", "rows"),
    ("books-small", "list"): ("tree",),
}
SOURCES = {
    "games-2015": ["--source", "d3-csv", "--protocol", "given"],
    "books-small": ["--source", "sequences", "--protocol", "leave-one-out", "--max_history", "20"],
}
VOCAB_SIZE = 8192  # of the tokenizer that is trained where there is no model


@dataclass(frozen=True)
class Sizes:
    """What differs between the quick and the full form."""

    model: str
    """Folder of SmolLM2; "" for random weights."""
    layers: int
    rows: int
    """Rows of a step."""
    micro_batch: int
    rounds: int


@dataclass(frozen=True)
class Work:
    """The rows of a dataset in a frame, and the loss that is minimised on them."""

    loss: TokenLoss
    tree: Collator
    rows: Collator
    chains: RowChains
    chosen: np.ndarray
    """int64, the rows of the step, chain after chain."""
    tokenizer: Any

    @classmethod
    def build(cls, folder: Path, tokenizer: Any, frame: str, sizes: Sizes) -> "Work":
        """Tokenize a dataset and choose the rows."""
        dataset = InteractionDataset.load(folder)
        catalogue = Catalogue.build(dataset, tokenizer)
        trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
        stored = StoredCatalogue.build(catalogue, trie, edge_gain(trie), "prior")
        context = ObjectiveContext(stored, SearchTrie.build(trie), str(folder))
        objective = Uniform(NoOptions(), total_steps=1)

        train = dataset.splits["train"]
        columns = TokenColumns.build(stored, objective.weights(context))

        def written(name: str) -> tuple[PromptBuilder, RowChains]:
            budget = MAX_LENGTH - catalogue.max_length
            template = Template.load(name, tokenizer)
            prompts = PromptBuilder.build(template, tokenizer, dataset, catalogue.kind, budget)
            return prompts, RowChains.build(train, prompts, columns)

        # Which prompts are cut depends on the frame: one frame chooses the rows for all.
        chosen = written("alpaca")[1].epoch(sizes.rows, seed=0, epoch=0)[0]
        prompts, chains = written(frame)
        pad = tokenizer.pad_token_id
        return cls(
            loss=TokenLoss(CausalLM(), objective, context),
            tree=Collator(train, prompts, columns, pad, as_tree=True),
            rows=Collator(train, prompts, columns, pad),
            chains=chains,
            chosen=chosen,
            tokenizer=tokenizer,
        )

    def by_length(self) -> np.ndarray:
        """Return the chosen rows, longest first."""
        return self.chosen[np.argsort(-self.chains.tokens[self.chosen], kind="stable")]

    def examples(self) -> list[dict[str, list[int]]]:
        """Return the rows, longest first, as `transformers` takes them."""
        examples = []
        for row in self.by_length():
            inputs = self.rows(np.array([row])).inputs
            length = int(inputs.num_tokens())
            labels = inputs.labels[0, :length].tolist()
            examples.append({"input_ids": inputs.input_ids[0, :length].tolist(), "labels": labels})
        return examples


def order_costs(folder: Path, tokenizer: Any, sizes: Sizes) -> list[str]:
    """Return lines on what trees and chains cost the host, and how equal the ranks' trees are."""
    random = np.random.default_rng(0)
    rows = [random.integers(0, 50_000, 200) for _ in range(64)]
    for row, shared in zip(rows[1:], random.integers(0, 200, 63), strict=True):
        row[:shared] = rows[0][:shared]
    build = median_ms(lambda: build_row_tree(rows, np.full(64, 10)))

    # An epoch of the Alpaca frame, in global batches of four micro-batches.
    work = Work.build(folder, tokenizer, "alpaca", sizes)
    train, micro_batch = work.tree.split, sizes.micro_batch
    prompts, columns = work.tree.prompts, work.tree.columns
    link = median_ms(lambda: RowChains.build(train, prompts, columns))
    order = median_ms(lambda: work.chains.epoch(4 * micro_batch, seed=0, epoch=0))
    batches = work.chains.epoch(4 * micro_batch, seed=0, epoch=0)
    lines = [
        f"tree of 64 × 200 tokens {build:.2f} ms; {len(train):,} rows: chains {link:.0f} ms, "
        f"order of an epoch {order:.0f} ms"
    ]

    for ranks in (2, 4):
        shares = []
        for batch in batches[:200]:
            dealt = [work.chains.deal(batch, rank, ranks, micro_batch) for rank in range(ranks)]
            nodes = [sum(map(work.chains.num_nodes, parts)) for parts in dealt]
            shares.append(max(nodes) / statistics.mean(nodes) - 1)
        lines.append(
            f"{ranks} ranks × {4 // ranks} accumulation steps of {micro_batch} rows: the largest "
            f"rank has {statistics.mean(shares):.0%} more nodes than the mean"
        )
    return lines


def median_ms(function: Callable[[], object]) -> float:
    """Return the median time of five calls, in milliseconds."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def load_tokenizer(model: str, folder: Path) -> Any:
    """Return SmolLM2's tokenizer, or a BPE trained on the titles of a dataset."""
    if model:
        return AutoTokenizer.from_pretrained(model)
    titles = [title for title in InteractionDataset.load(folder).titles if title is not None]
    core = train_bpe(titles, template_texts("items"), VOCAB_SIZE)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=EOS)


def make_model(sizes: Sizes) -> torch.nn.Module:
    """Return SmolLM2-135M or a model of its shape; with fewer layers, those nearest the input."""
    torch.manual_seed(0)
    settings = {"attn_implementation": "sdpa", "dtype": torch.float32}
    if sizes.model:
        layers = {"num_hidden_layers": sizes.layers}
        return AutoModelForCausalLM.from_pretrained(sizes.model, **layers, **settings).train()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=sizes.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, **settings).train()


def resident_bytes() -> int:
    """Return the resident memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@dataclass
class Measured:
    """One side: CPU seconds of each step, its loss, its memory, and the tokens that it computes."""

    seconds: list[float]
    loss: float
    peak: int | None
    tokens: int


def measure_ours(side: str, work: Work, sizes: Sizes) -> Measured:
    """Make steps of `igd train`."""
    model = make_model(sizes)
    accumulation = len(work.chosen) // sizes.micro_batch
    engine = make_engine(model, loop_options(1e-30, MAX_NORM), sizes.micro_batch, accumulation)
    if side == "tree":
        parts = work.chains.deal(work.chosen, 0, 1, sizes.micro_batch)
        batches = [work.tree(part) for part in parts]
        tokens = sum(len(batch.inputs.token) for batch in batches)
    else:
        parts = np.split(work.by_length(), accumulation)
        batches = [work.rows(part) for part in parts]
        tokens = sum(batch.inputs.input_ids.numel() for batch in batches)

    one_row = [work.rows(work.chosen[:1])] * accumulation
    optimizer_step(engine, one_row, work.loss, step=0)  # makes the optimizer's state
    loaded, seconds = resident_bytes(), []
    for _ in range(sizes.rounds):
        start = time.process_time()
        sums, _ = optimizer_step(engine, batches, work.loss, step=0)
        seconds.append(time.process_time() - start)
    return Measured(seconds, sums.objective, peak_bytes() - loaded, tokens)


class StepTimes(TrainerCallback):
    """Notes CPU time and loss of each step of a Trainer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.loss = 0.0
        self.start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.process_time() - self.start)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Note the loss of a step."""
        self.loss = logs.get("loss", self.loss)


def trainer_settings(folder: str, sizes: Sizes, accumulation: int) -> dict[str, Any]:
    """Return settings of TrainingArguments, with one step more than is measured."""
    return {
        "output_dir": folder,
        "gradient_accumulation_steps": accumulation,
        "max_steps": sizes.rounds + 1,
        "learning_rate": 0.0,
        "max_grad_norm": MAX_NORM,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def run_trainer(trainer: Trainer, tokens: int) -> Measured:
    """Train; the first step is not measured."""
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return Measured(times.seconds[1:], times.loss, None, tokens)


def padded(pad: int, examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Return examples as a batch of Trainer, padded to a multiple of 8 tokens."""
    width = -(-max(len(example["input_ids"]) for example in examples) // 8) * 8
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in examples:
        fill = width - len(example["input_ids"])
        batch["input_ids"].append(example["input_ids"] + [pad] * fill)
        batch["attention_mask"].append([1] * (width - fill) + [0] * fill)
        batch["labels"].append(example["labels"] + [IGNORED] * fill)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def measure_trainer(work: Work, sizes: Sizes) -> Measured:
    """Make steps of `transformers.Trainer` on the same rows, each micro-batch padded by itself."""
    accumulation = len(work.chosen) // sizes.micro_batch
    examples, collate = work.examples(), partial(padded, work.tokenizer.pad_token_id)
    parts = [
        examples[i : i + sizes.micro_batch] for i in range(0, len(examples), sizes.micro_batch)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            per_device_train_batch_size=sizes.micro_batch,
            remove_unused_columns=False,
            **trainer_settings(folder, sizes, accumulation),
        )
        trainer = Trainer(
            model=make_model(sizes), args=arguments, train_dataset=examples, data_collator=collate
        )
        return run_trainer(trainer, sum(collate(part)["input_ids"].numel() for part in parts))


def measure_sft(work: Work, sizes: Sizes) -> Measured:
    """Make steps of TRL's SFTTrainer on the same rows, packed to PACKED_TOKENS."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    accumulation = 1
    with tempfile.TemporaryDirectory() as folder:
        # Only the trainer knows how many packs the rows become: the second one makes one step of
        # them.
        for _ in range(2):
            config = SFTConfig(
                packing=True,
                max_length=PACKED_TOKENS,
                per_device_train_batch_size=1,
                gradient_checkpointing=False,
                **trainer_settings(folder, sizes, accumulation),
            )
            trainer = SFTTrainer(
                model=make_model(sizes),
                args=config,
                train_dataset=Dataset.from_list(work.examples()),
                processing_class=work.tokenizer,
            )
            accumulation = len(trainer.train_dataset)
        return run_trainer(trainer, sum(map(len, trainer.train_dataset["input_ids"])))


def measure(folder: Path, tokenizer: Any, frame: str, side: str, sizes: Sizes) -> Measured:
    """Measure one side, in a process of its own."""
    torch.set_num_threads(1)
    memory.keep_freed_memory()
    work = Work.build(folder, tokenizer, frame, sizes)
    if side in ("tree", "rows"):
        return measure_ours(side, work, sizes)
    return (measure_trainer if side == "trainer" else measure_sft)(work, sizes)


def prepare_datasets(data: Path, out: Path, quick: bool) -> dict[str, Path]:
    """Prepare both datasets, books-small with all users or 500; return their folders."""
    folders = {}
    for name, flags in SOURCES.items():
        words = [
            *flags,
            "--input",
            str(data / name),
            "--name",
            name,
            "--domain",
            name.split("-")[0],
        ]
        folders[name] = out / name
        if quick and name == "books-small":
            words += ["--num_users", "500"]
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            prepare.main([*words, "--output", str(folders[name])])
    return folders


def main() -> None:
    """Measure every side of every frame and dataset, assert equal losses, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = Path(os.environ.get("IGD_DS_SHARED", REPOSITORY.parent / "shared"))
    parser.add_argument("--quick", action="store_true", help="2 layers and 8 rows; under 50 s")
    parser.add_argument("--model", default="", help="folder of SmolLM2-135M")
    parser.add_argument("--data", type=Path, default=shared / "data", help="the raw datasets")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each side")
    arguments = parser.parse_args()
    if arguments.quick:
        sizes = Sizes(arguments.model, layers=2, rows=8, micro_batch=8, rounds=1)
    else:
        sizes = Sizes(arguments.model, layers=30, rows=64, micro_batch=16, rounds=arguments.rounds)
    has_trl = importlib.util.find_spec("trl") is not None

    measured: dict[tuple[str, str, str], Measured] = {}
    with tempfile.TemporaryDirectory() as out:
        folders = in_fork(prepare_datasets, arguments.data, Path(out), arguments.quick)
        for (dataset, frame), sides in (QUICK_SIDES if arguments.quick else SIDES).items():
            tokenizer = in_fork(load_tokenizer, arguments.model, folders[dataset])
            if frame == "alpaca":
                costs = in_fork(order_costs, folders[dataset], tokenizer, sizes)
                print(f"{dataset}:", *costs, sep="\n  ", flush=True)
            for side in sides:
                if side != "sft" or has_trl:
                    found = in_fork(measure, folders[dataset], tokenizer, frame, side, sizes)
                    measured[dataset, frame, side] = found

    # All sides of a frame minimise the same loss.
    for (dataset, frame, side), found in measured.items():
        expected = measured[dataset, frame, "tree"].loss
        assert abs(found.loss - expected) <= LOSS_TOLERANCE * expected, (
            f"{dataset}, {frame}: loss of {side} {found.loss}, of tree {expected}"
        )

    median = {key: statistics.median(found.seconds) for key, found in measured.items()}
    weights = f"weights of {arguments.model}" if arguments.model else "random weights"
    print(f"{weights}, {sizes.layers} layers; {sizes.rows} rows, {sizes.micro_batch} a micro-batch")
    if not has_trl:
        print("TRL is not installed: no column for SFTTrainer")
    table = [
        [" ".join(key), found.loss, found.tokens, median[key], sizes.rows / median[key],
         "-" if found.peak is None else round(found.peak / 2**20)]
        for key, found in measured.items()
    ]  # fmt: skip
    print_table(["side", "loss", "tokens", "CPU s", "rows/s", "peak MiB above the model"], table)

    def gain(dataset: str, frame: str, side: str, tree_frame: str = "") -> float | None:
        """Return how many times faster the tree of a frame is, where both were measured."""
        keys = (dataset, frame, side), (dataset, tree_frame or frame, "tree")
        return (
            median[keys[0]] / median[keys[1]] if keys[0] in median and keys[1] in median else None
        )

    figures = {
        "tree_vs_rows_games": gain("games-2015", "alpaca", "rows"),
        "tree_vs_rows_books": gain("books-small", "alpaca", "rows"),
        "tree_vs_rows_games_short": gain("games-2015", "short", "rows"),
        "tree_vs_rows_books_short": gain("books-small", "short", "rows"),
        "tree_vs_trainer": gain("games-2015", "alpaca", "trainer"),
        "tree_vs_sft": gain("games-2015", "alpaca", "sft"),
        "list_vs_rows_games": gain("games-2015", "alpaca", "rows", tree_frame="list"),
        "list_vs_rows_books": gain("books-small", "alpaca", "rows", tree_frame="list"),
    }
    figures = {key: value for key, value in figures.items() if value is not None}
    rows, tree = (measured["games-2015", "alpaca", side].peak for side in ("rows", "tree"))
    figures["memory_vs_rows_games"] = rows / tree
    finish("train_tree", figures, arguments.quick)
    distributed.exit_process(0)


if __name__ == "__main__":
    # Before torch or DeepSpeed look for devices.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    main()
