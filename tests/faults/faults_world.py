"""What the fault campaign works on: two tiny datasets, their tokenizers and models, all commands.

The text dataset has titles; the codes dataset has semantic IDs, as LC-Rec's files bring them.
"""

import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
TIGER = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.1,
}
ITEMS, USERS = 40, 30
ALL = os.environ.get("IGD_DS_FAULTS") == "all"
"""Whether `make faults` runs: all cases instead of a few dozen."""


@dataclass(frozen=True)
class Command:
    """A command, ready to run on an output folder."""

    module: str
    """Its module, which has a `main`."""
    flags: tuple[str, ...]
    """Its flags, without that of the output folder."""
    output: str = "--output"
    """The flag of the output folder."""
    size: int = 1
    """Number of ranks."""
    resumes: bool = False
    """Whether it is a training, which compares logs and goes on from checkpoints."""

    @property
    def main(self) -> Any:
        """Return the command's function."""
        return importlib.import_module(self.module).main

    def words(self, output: Path) -> list[str]:
        """Return the command line for an output folder."""
        return [*self.flags, self.output, str(output)]


def words(**flags: Any) -> tuple[str, ...]:
    """Return flags and their values as words; True is a flag without a value."""
    found: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        found += [f"--{name}", *map(str, values)]
    return tuple(found)


def commands(folder: Path) -> dict[str, Command]:
    """Return the commands of the campaign by name; `build` made what they read."""

    def training(objective: dict[str, Any], size: int = 1, stage: int = 1, **model: Any) -> Command:
        ds_config = folder / f"ds-{stage}.json"
        steps = {"max_steps": 6, "validate_every": 3, "save_every": 2, "log_every": 1}
        usual = {
            "ds_config": ds_config,
            "dataset": folder / "text",
            "tokenizer": folder / "tokenizer",
            "global_batch_size": 8,
            "max_length": 160,
            "learning_rate": 3e-3,
            "validation_rows": 8,
            "patience": 0,
            "resume": "auto",
        }
        flags = words(**(usual | steps | objective | model))
        return Command("igd_ds.train", flags, "--output_dir", size, resumes=True)

    igd = {"igd_beta": 0.1}
    own_model = {"model_config": folder / "model.json"}
    adapter = {"model_name_or_path": folder / "pretrained", "lora_r": 4, "lora_dropout": 0.1}
    codes = {"dataset": folder / "codes-data", "tokenizer": folder / "codes", "prompt": "codes"}
    targets = {"objective": "multi-target", "frequency_beta": 0.9, "curriculum_cT": 2.0}
    targets |= {"item_embeddings": folder / "vectors"}
    evaluation = {"dataset": folder / "text", "alpha": (0, 0.3), "num_beams": 5, "batch_size": 4}
    steps = {"max_steps": 6, "validate_every": 3, "save_every": 2, "log_every": 1, "patience": 0}
    baseline = {"dataset": folder / "text", "ds_config": folder / "ds-1.json"} | steps
    sources = {"source": "sequences", "input": folder / "source", "protocol": "leave-one-out"}
    return {
        "full": training(igd, **own_model),
        "full-2": training(igd, size=2, stage=2, **own_model),
        "lora": training(igd, **adapter),
        "qlora": training(igd, **adapter, load_in_4bit=True),
        "t5": training({"objective": "uniform"}, **codes, model_config=folder / "tiger.json"),
        "multi-target": training(targets, **own_model),
        "baseline": Command(
            "igd_ds.baseline",
            words(**baseline, recommender="sasrec", global_batch_size=8, resume="auto"),
            "--output_dir",
            resumes=True,
        ),
        "evaluation": Command(
            "igd_ds.eval", words(model=folder / "trained" / "model", **evaluation), "--output_dir"
        ),
        "prepare": Command("igd_ds.commands.prepare", words(**sources)),
        "tokenizer": Command(
            "igd_ds.commands.tokenizer", words(dataset=folder / "text", vocab_size=300)
        ),
        "ids": Command(
            "igd_ds.commands.ids",
            words(dataset=folder / "text", embeddings=folder / "vectors", quantizer="rq-vae")
            + words(levels=2, codes=8, epochs=3),
        ),
        "embed": Command("igd_ds.commands.embed", words(dataset=folder / "text", cooccurrence=8)),
        "report": Command("igd_ds.commands.report", (str(folder / "trained"),)),
    }


def build(folder: Path) -> None:
    """Write what the commands read."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    random = np.random.default_rng(0)
    write_sources(folder, random)

    def run(name: str, *flags: Any) -> None:
        module = importlib.import_module(f"igd_ds.commands.{name}")
        assert module.main([str(flag) for flag in flags]) == 0

    split = ("--protocol", "leave-one-out")
    run("prepare", *words(source="sequences", input=folder / "source"), *split, "--output",
        folder / "text")  # fmt: skip
    run("prepare", *words(source="lcrec-json", input=folder / "lcrec"), *split, "--output",
        folder / "codes-data")  # fmt: skip
    run("tokenizer", "--dataset", folder / "text", "--vocab_size", 300, "--output",
        folder / "tokenizer")  # fmt: skip
    run("tokenizer", "--dataset", folder / "codes-data", "--codes_only", "--output",
        folder / "codes")  # fmt: skip

    run("embed", "--dataset", folder / "text", "--cooccurrence", 8, "--output", folder / "vectors")

    vocabulary = len(PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"))
    config = Qwen2Config(vocab_size=vocabulary, **LLAMA)
    config.to_json_file(folder / "model.json")
    (folder / "tiger.json").write_text(json.dumps(TIGER))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "pretrained")

    for stage in (1, 2):
        own = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
        own |= {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
        (folder / f"ds-{stage}.json").write_text(json.dumps(own))


def write_sources(folder: Path, random: np.random.Generator) -> None:
    """Write the raw files of both datasets."""
    (folder / "source").mkdir()
    (folder / "lcrec").mkdir()
    histories = {user: random.integers(0, ITEMS, 8).tolist() for user in range(USERS)}

    lines = [json.dumps({"item_id": item, "title": f"Song {item}"}) for item in range(ITEMS)]
    (folder / "source" / "items.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"user_id": user, "items": items}) for user, items in histories.items()]
    (folder / "source" / "sequences.jsonl").write_text("\n".join(lines) + "\n")

    codes = {item: [f"<a_{item // 8}>", f"<b_{item % 8}>"] for item in range(ITEMS)}
    (folder / "lcrec" / "X.index.json").write_text(json.dumps(codes))
    (folder / "lcrec" / "X.inter.json").write_text(json.dumps(histories))
