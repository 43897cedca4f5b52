"""A small generated dataset with tokenizer and models, shared by all multi-process tests."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import ranks

DS = {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": False}, "fp16": {"enabled": False}}


@dataclass(frozen=True)
class World:
    """Folders of a generated dataset, its tokenizer, a model config, and pretrained (random) weights."""

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
        """Flags of a short training; settings override, None drops."""
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
        return [word for key, value in flags.items() if value is not None
                for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]  # fmt: skip


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
    # In a child: the parent must stay free of thread pools, because the ranks are forked from it.
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    from igd_ds.commands import prepare as prepare_data
    from igd_ds.commands import tokenizer as train_tokenizer

    prepare_data.main(["--source", "synthetic", "--num_items", "60", "--num_users", "80", "--protocol", "d3", "--k_core", "0",
                       "--min_items", "1", "--output", str(folder / "data")])  # fmt: skip
    train_tokenizer.main(
        [
            "--dataset",
            str(folder / "data"),
            "--vocab_size",
            "400",
            "--output",
            str(folder / "tokenizer"),
        ]
    )
    vocabulary = len(PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"))
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True)  # fmt: skip
    config.to_json_file(folder / "model.json")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "pretrained")
