"""A small generated dataset with tokenizer and models, shared by all multi-process tests."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import ranks

DS = {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": False}, "fp16": {"enabled": False}}


@dataclass(frozen=True)
class World:
    """Folders of a generated dataset, its tokenizer, a model config, and saved random weights."""

    folder: Path
    dataset: str
    tokenizer: str
    model_config: str
    pretrained: str

    def ds_config(self, stage: int, micro: int = 2, **changes) -> str:
        """Write a DeepSpeed file and return its path."""
        path = self.folder / f"ds-{stage}-{micro}-{'-'.join(changes)}.json"
        own = {"train_micro_batch_size_per_gpu": micro, "zero_optimization": {"stage": stage}}
        path.write_text(json.dumps(DS | own | changes))
        return str(path)

    def train_flags(self, run: Path, stage: int = 2, **settings) -> list[str]:
        """Return the flags of a short training. `settings` override them; None drops a flag."""
        flags = {
            "ds_config": self.ds_config(stage),
            "dataset": self.dataset,
            "model_config": self.model_config,
            "tokenizer": self.tokenizer,
            "output_dir": str(run),
            "igd_beta": 0.1,
            "global_batch_size": 8,
            "max_length": 160,
            "learning_rate": 3e-3,
            "max_steps": 6,
            "validate_every": 3,
            "validation_rows": 10,
            "patience": 0,
            "log_every": 1,
        } | settings
        words = []
        for key, value in flags.items():
            if value is not None:
                words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
        return words


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Build the small world once per session."""
    ranks.warm_up()
    folder = tmp_path_factory.mktemp("world")
    processes = ranks.start(1, folder / "log", _build, folder)
    assert ranks.wait(processes) == [0], (folder / "log").read_text()
    names = ("data", "tokenizer", "model.json", "pretrained")
    return World(folder, *(str(folder / name) for name in names))


def _build(folder: Path) -> None:
    # This runs in a child, because the ranks are forked from the parent, which must have no thread
    # pools.
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    from igd_ds.commands import prepare, tokenizer

    # The dataset and its tokenizer.
    data = str(folder / "data")
    source = ["--source", "synthetic", "--num_items", "60", "--num_users", "80"]
    protocol = ["--protocol", "d3", "--k_core", "0", "--min_items", "1"]
    prepare.main([*source, *protocol, "--output", data])
    vocabulary = ["--vocab_size", "400", "--output", str(folder / "tokenizer")]
    tokenizer.main(["--dataset", data, *vocabulary])

    # A model.
    config = Qwen2Config(
        vocab_size=len(PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    config.to_json_file(folder / "model.json")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "pretrained")
