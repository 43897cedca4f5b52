"""The command `igd`: one entry for everything a user runs. `igd SUB --help` explains a subcommand.

The launchers start the same mains: `deepspeed igd_ds/train.py …`, `torchrun -m igd_ds.train …`,
`deepspeed --module igd_ds.train …`, `srun python -m igd_ds.train …` and
`mpirun python -m igd_ds.train …`.
"""

import importlib
import sys
from collections.abc import Sequence

from igd_ds.ending import run
from igd_ds.errors import UsageError, did_you_mean, end_without_working_folder

# Subcommand: (module with a `main`, what it does). Modules are imported only when their subcommand
# runs.
COMMANDS = {
    "prepare": ("igd_ds.commands.prepare", "raw files to a canonical dataset"),
    "tokenizer": ("igd_ds.commands.tokenizer", "train a tokenizer, or add codes to one"),
    "embed": ("igd_ds.commands.embed", "embeddings of a dataset's items"),
    "ids": ("igd_ds.commands.ids", "semantic IDs from embeddings"),
    "stats": ("igd_ds.commands.stats", "statistics of a catalogue and its trie"),
    "show": ("igd_ds.commands.show", "one item's tokens and their information gain"),
    "plan": ("igd_ds.commands.plan", "whether a training fits on its GPUs, and how long it takes"),
    "train": ("igd_ds.train", "train a generative recommender"),
    "prefer": ("igd_ds.prefer", "train a trained model on preferences between items"),
    "baseline": ("igd_ds.baseline", "train and evaluate a sequential baseline"),
    "eval": ("igd_ds.eval", "rank the whole catalogue and measure the lists"),
    "compare": ("igd_ds.commands.compare", "two evaluations of the same rows, and how sure"),
    "sweep": ("igd_ds.commands.sweep", "a table of trainings and evaluations"),
    "report": ("igd_ds.commands.report", "tables and figures of finished runs"),
    "export": ("igd_ds.commands.export", "weights and catalogue for vLLM, SGLang or FlashRec"),
    "push": ("igd_ds.commands.push", "a trained model to the Hugging Face Hub"),
}


def usage() -> str:
    """Return the overview that `igd --help` prints."""
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: igd SUBCOMMAND [options]   (igd SUBCOMMAND --help)", "", *lines])


def dispatch(argv: Sequence[str]) -> int:
    """Run the subcommand that `argv` names and return its exit code.

    Raises:
        UsageError: there is no such subcommand.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name = argv[0]
    if name not in COMMANDS:
        hint, known = did_you_mean(name, COMMANDS), ", ".join(COMMANDS)
        raise UsageError(f"igd: no subcommand '{name}'{hint} (known: {known})")

    # Each main reads sys.argv, as it does under a launcher.
    sys.argv = [f"igd {name}", *argv[1:]]
    main = importlib.import_module(COMMANDS[name][0]).main
    return int(main())


def main() -> None:
    """Entry point of the console script; ends the process."""
    end_without_working_folder()
    run(lambda: dispatch(sys.argv[1:]))


if __name__ == "__main__":
    main()
