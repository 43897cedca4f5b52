"""A small run folder with random weights, as `igd prepare` and `igd train` leave it.

Evaluations and the Recommender read it.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import tokenizers
import torch
import transformers
import yaml

from igd_ds.backbones.saved import DESCRIPTION_FILE, describe
from igd_ds.backbones.tokenizer import load_tokenizer
from igd_ds.data.dataset import InteractionDataset, item_table, user_table, write_dataset
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.folders import write_json
from igd_ds.items import decisiveness
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.store import StoredCatalogue, save_catalogue
from igd_ds.items.trie import TokenTrie

TITLES = ["ab", "abc", "ba", "ba", "bcc", "cab", "caba", "c", "aa", "acb"]
"""Titles of the items. Items 2 and 3 share a leaf."""

INFO = {
    "name": "toy",
    "domain": "items",
    "protocol": "none",
    "parameters": {},
    "counts": {},
    "sources": [],
    "hygiene": {},
    "funnel": [],
}
TRAIN_TARGETS = [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 6, 7]
"""Targets of the training rows. Items 8 and 9 are cold."""

NUM_TEST = 11
"""Rows of the validation split, and of the test split."""

TokenPath = tuple[int, ...]
USERS = [7, 7, 7, 8, 9, 9, 10, 11, 12, 12, 13]
EOS = 256
MAX_LENGTH = 160


def rows(users, histories, targets) -> pa.Table:
    """Return a split's table; no row has a timestamp."""
    return pa.table({
        "user_id": pa.array(users, pa.int64()),
        "history": pa.array(histories, pa.list_(pa.int32())),
        "target": pa.array(targets, pa.int32()),
        "timestamp": pa.nulls(len(users), pa.int64()),
    })  # fmt: skip


def make(folder: Path, titles: list[str] = TITLES, source_ids: list[str] | None = None) -> Path:
    """Write folder/data and folder/run; return the run folder.

    Row 4 of the validation split has no history. Without `source_ids` the items' numbers are also
    the source's.
    """
    write_data(folder / "data", titles, source_ids)
    model = folder / "run" / "model"
    write_model(model)

    # Tokenizer and catalogue.
    tokenizer = letter_tokenizer()
    tokenizer.save_pretrained(model)
    stored = store(Catalogue.build(InteractionDataset.load(folder / "data"), tokenizer))
    save_catalogue(model / "catalogue", stored)

    # What the run says of itself.
    description = {
        "prompt": Template.load("short").as_dict(),
        "max_length": MAX_LENGTH,
        "load_in_4bit": False,
    }
    write_json(model / DESCRIPTION_FILE, description)
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"dataset": str(folder / "data")}))
    return folder / "run"


def write_data(folder: Path, titles: list[str], source_ids: list[str] | None = None) -> None:
    """Write the dataset, with random histories and targets."""
    random = np.random.default_rng(0)
    histories = [
        [int(item) for item in random.integers(0, len(titles), random.integers(1, 5))]
        for _ in range(NUM_TEST)
    ]
    targets = [*(int(item) for item in random.integers(0, 10, NUM_TEST - 2)), 8, 3]
    splits = {
        "train": rows(range(12), [[1]] * 12, TRAIN_TARGETS),
        "valid": rows(USERS, [*histories[:4], [], *histories[5:]], targets),
        "test": rows(USERS, histories, targets),
    }
    items = item_table(titles, None, pa.array(source_ids or range(len(titles))))
    write_dataset(folder, items, user_table(splits, None), splits, INFO)


def letter_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, and EOS."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>"
    )


def write_model(folder: Path) -> None:
    """Write a model with random weights, whose logits are sharp."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=EOS + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def store(catalogue: Catalogue) -> StoredCatalogue:
    """Return the catalogue with its trie and information gain."""
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    gain = decisiveness.information_gain(trie, "prior")
    return StoredCatalogue.build(catalogue, trie, gain, "prior")


class Plain:
    """The same run, loaded without the package's search: what a ranking is compared with."""

    def __init__(self, run: Path):
        self.dataset = InteractionDataset.load(run.parent / "data")
        self.tokenizer = load_tokenizer(str(run / "model"))
        config = transformers.AutoConfig.from_pretrained(run / "model")
        kind = getattr(transformers, config.architectures[0])
        self.model = kind.from_pretrained(run / "model").eval()

        catalogue = Catalogue.build(self.dataset, self.tokenizer)
        self.stored = store(catalogue)
        self.trie = self.stored.trie
        self.gain = decisiveness.information_gain(self.trie, "prior")
        budget = MAX_LENGTH - catalogue.max_length
        template = Template.load("short")
        self.prompts = PromptBuilder.build(template, self.tokenizer, self.dataset, "text", budget)

        self.paths = [tuple(catalogue.path(item).tolist()) for item in range(10)]
        self.different_paths = sorted(set(self.paths))

    def prompt(self, history) -> list[int]:
        """Return the token ids of a history's prompt."""
        return self.prompts.encode(np.asarray(history)).tolist()

    def siblings(self, path: TokenPath, t: int) -> list[int]:
        """Return the tokens that can follow the first t tokens of a path in the catalogue."""
        return sorted({p[t] for p in self.different_paths if len(p) > t and p[:t] == path[:t]})

    @torch.no_grad()
    def masked_logprobs(
        self, prompt: list[int], path: TokenPath, temperature: float
    ) -> list[float]:
        """Return log p of each token of a path under a softmax over its siblings alone, nats.

        It is computed in fp64 from the logits of one full forward pass.
        """
        logits = self.model(torch.tensor([[*prompt, *path]])).logits[0].double() / temperature
        values = []
        for t, token in enumerate(path):
            siblings = self.siblings(path, t)
            legal = logits[len(prompt) + t - 1, siblings]
            values.append(legal.log_softmax(0)[siblings.index(token)].item())
        return values

    def masked_ranking(
        self, prompt: list[int], temperature: float
    ) -> list[tuple[float, TokenPath]]:
        """Return [(score, path)] of the whole catalogue, best first, by `masked_logprobs`."""
        scored = [
            (sum(self.masked_logprobs(prompt, path, temperature)), path)
            for path in self.different_paths
        ]
        return sorted(scored, reverse=True)


def set_likelihood(model: Path, likelihood: dict | None) -> None:
    """Record in a model's description what it was trained with; None: as older models, nothing."""
    description = describe(model)
    description.pop("likelihood", None)
    if likelihood is not None:
        description["likelihood"] = likelihood
    write_json(model / DESCRIPTION_FILE, description)
