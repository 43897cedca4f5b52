"""A run folder as prepare_data.py and train.py leave it, small and with random weights: what eval.py and Recommender read."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import tokenizers
import torch
import transformers
import yaml

from igd_ds.backbones import causal_lm
from igd_ds.data.dataset import InteractionDataset, item_table, user_table, write_dataset
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.items import decisiveness
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.store import save_catalogue
from igd_ds.items.trie import TokenTrie

TITLES = [
    "ab",
    "abc",
    "ba",
    "ba",
    "bcc",
    "cab",
    "caba",
    "c",
    "aa",
    "acb",
]  # items 2 and 3 share a leaf
INFO = {
    "name": "toy",
    "domain": "items",
    "protocol": "none",
    "parameters": {},
    "counts": {},
    "sources": [],
    "hygiene": {},
}
INFO |= {"funnel": []}
TRAIN_TARGETS = [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 6, 7]  # 8 and 9 are cold
NUM_TEST = 11
EOS = 256


def rows(users, histories, targets):
    columns = [pa.array(users, pa.int64()), pa.array(histories, pa.list_(pa.int32())), pa.array(targets, pa.int32()),
               pa.nulls(len(users), pa.int64())]  # fmt: skip
    return pa.table(columns, names=["user_id", "history", "target", "timestamp"])


def make(folder: Path, titles: list[str] = TITLES) -> Path:
    """Write folder/data and folder/run; returns the run folder. Row 4 of the validation split has no history."""
    random = np.random.default_rng(0)
    histories = [
        [int(i) for i in random.integers(0, len(titles), random.integers(1, 5))]
        for _ in range(NUM_TEST)
    ]
    users, targets = (
        [7, 7, 7, 8, 9, 9, 10, 11, 12, 12, 13],
        [int(t) for t in random.integers(0, 10, NUM_TEST - 2)] + [8, 3],
    )
    splits = {
        "train": rows(range(12), [[1]] * 12, TRAIN_TARGETS),
        "valid": rows(users, [*histories[:4], [], *histories[5:]], targets),
        "test": rows(users, histories, targets),
    }
    items = item_table(titles, None, pa.array(range(len(titles))))
    write_dataset(folder / "data", items, user_table(splits, None), splits, INFO)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>"
    )
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=EOS + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)  # fmt: skip
    model = folder / "run" / "model"
    transformers.Qwen2ForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    dataset = InteractionDataset.load(folder / "data")
    catalogue = Catalogue.build(dataset, tokenizer)
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    save_catalogue(
        model / "catalogue", catalogue, trie, decisiveness.information_gain(trie, "prior"), "prior"
    )
    description = {
        "prompt": Template.load("short").as_dict(),
        "max_length": 160,
        "load_in_4bit": False,
    }
    (model / causal_lm.DESCRIPTION_FILE).write_text(json.dumps(description))
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"dataset": str(folder / "data")}))
    return folder / "run"


class Plain:
    """The same run loaded without the package's search: what a ranking is held against."""

    def __init__(self, run: Path):
        self.dataset = InteractionDataset.load(run.parent / "data")
        tokenizer = causal_lm.load_tokenizer(str(run / "model"))
        catalogue = Catalogue.build(self.dataset, tokenizer)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(run / "model").eval()
        self.trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
        self.gain = decisiveness.information_gain(self.trie, "prior")
        budget = 160 - catalogue.max_length
        self.prompts = PromptBuilder.build(
            Template.load("short"), tokenizer, self.dataset, "text", budget
        )
        self.paths = [tuple(catalogue.path(item).tolist()) for item in range(10)]
        self.different_paths = sorted(set(self.paths))

    def prompt(self, history) -> list[int]:
        return self.prompts.encode(np.asarray(history)).tolist()
