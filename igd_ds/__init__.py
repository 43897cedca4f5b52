"""Recommenders that generate the next item token by token, weighted by information gain.

Items are token paths in one trie. The trie says how decisive each token is. That number weights
the loss while DeepSpeed trains, and the scores while the evaluator searches.

Imports flow one way, from right to left; parts that stand between the same arrows do not import
each other (`tests/unit/test_structure.py` checks both):

    errors · process
    → locks
    → ending
    → config · folders · heartbeat · memory
    → distributed · runlog · run_folder · contracts
    → items · console
    → backbones · data · engine
    → objectives · search · baselines · semantic_ids
    → train_config · eval_config · baseline_config
    → prefer_config
    → evaluation
    → studies
    → loop · training_inputs
    → planning
    → generative_training · sequential_training
    → preference
    → train · prefer · eval · baseline
    → commands → cli

| part | what it is for |
|---|---|
| `errors` | bad input as an exception of its own, exit codes |
| `config` | how settings are declared, parsed and checked; settings that several commands share |
| `process` | whether a process still runs, and that it ends with its launcher |
| `locks` | two processes never write one folder |
| `ending` | how a command ends: its message and exit code |
| `folders` | output folders that are complete or absent, atomic files |
| `heartbeat` | a rank that no longer answers is noticed and named |
| `memory` | the C library's memory settings on a CPU |
| `distributed` | process group, collectives, device, shutdown |
| `runlog` | TensorBoard and metrics.jsonl; every tag and its unit |
| `run_folder` | a run's folder: claim, resume, record of settings and versions |
| `contracts` | what parts promise each other: Batch, Objective, Backbone, PromptTree |
| `console` | what a run shows: header, progress bar, expected time |
| `items` | catalogue, token trie, decisiveness, storage of all three |
| `data` | raw files to datasets, prompts, batches |
| `backbones` | causal LMs, T5, LoRA, tokenizers, attention over trees |
| `engine` | DeepSpeed: its configuration, optimizer steps, checkpoints, export |
| `objectives` | what a training minimises |
| `search` | beam search and exact search over the trie, scoring rules, item filters |
| `baselines` | sequential recommenders that score items |
| `semantic_ids` | embeddings, quantizers, collisions, codes as tokens |
| `evaluation` | metrics, validation, result files, recommending from Python |
| `studies` | tables of runs, significance tests, the report |
| `loop` | the training loop |
| `training_inputs` | what a training begins with: dataset, tokenizer, weights, catalogue |
| `planning` | memory and time of a training, from shapes alone |
| `generative_training`, `sequential_training` | what it trains: language models, baselines |
| `preference` | preference training: reference, negatives, loss |
| `train`, `prefer`, `eval`, `baseline` | entries, each with its settings in `…_config` |
| `commands`, `cli` | the command `igd` and its subcommands |

Example:
    >>> import igd_ds
    >>> dataset = igd_ds.prepare(frame, "DATASET")  # a DataFrame with user, item, time, title
    >>> run = igd_ds.train(dataset, "HuggingFaceTB/SmolLM2-135M", "RUN", igd_beta=0.1)
    >>> metrics = igd_ds.evaluate(run, split="test")
    >>> recommender = igd_ds.Recommender.load(run)
    >>> lists = recommender.recommend([["B0031", "B0007"]], k=10)  # ids as the source has them
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from igd_ds.data.frames import prepare as prepare
    from igd_ds.eval import evaluate as evaluate
    from igd_ds.evaluation.recommender import RankedList as RankedList
    from igd_ds.evaluation.recommender import Recommender as Recommender
    from igd_ds.items.catalogue import Catalogue as Catalogue
    from igd_ds.items.trie import TokenTrie as TokenTrie
    from igd_ds.search.processor import IGDLogitsProcessor as IGDLogitsProcessor
    from igd_ds.train import train as train

__version__ = "0.1.0"

_PUBLIC = {
    "prepare": "igd_ds.data.frames",
    "train": "igd_ds.train",
    "evaluate": "igd_ds.eval",
    "Recommender": "igd_ds.evaluation.recommender",
    "RankedList": "igd_ds.evaluation.recommender",
    "Catalogue": "igd_ds.items.catalogue",
    "TokenTrie": "igd_ds.items.trie",
    "IGDLogitsProcessor": "igd_ds.search.processor",
}
"""Public names and their modules, which are loaded at first use: torch is slow to import."""


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """List the public names beside what is loaded already."""
    return sorted({*globals(), *_PUBLIC})
