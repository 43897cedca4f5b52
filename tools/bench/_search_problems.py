"""The problems of tools/bench/search.py: trained models, catalogues and prompts, or random ones."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from _common import REPOSITORY
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from igd_ds.backbones.saved import describe
from igd_ds.backbones.tokenizer import load_tokenizer
from igd_ds.config.search import Limits
from igd_ds.data.batches import sample_rows
from igd_ds.data.dataset import InteractionDataset, Split
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import information_gain
from igd_ds.items.store import load_catalogue
from igd_ds.items.trie import TokenTrie

VOCABULARY = 151_936
# This token is in the tokenizer and in no training text, so training has made its logit negative
# everywhere. Eight times its row is very negative: 143,744 more rows of embedding and head take
# hardly any probability. (Unscaled copies take 0.2; measured.)
UNUSED_TOKEN, UNUSED_SCALE = "<|im_end|>", 8


@dataclass(frozen=True)
class Line:
    """One setting of the benchmark; all sides search the same problem."""

    name: str
    users: dict[str, int]
    """For how many of the prompts each side searches."""
    source: str = "books-small"
    """A folder under --runs, "generated:N" (N random items, random weights), or "t5" (the semantic
    IDs of instruments)."""
    prompt: int = 256
    """Tokens of every prompt; 0: as the evaluator would make them."""
    beams: int = 10
    batch: int = 16
    penalty: float = 0.0
    vocabulary: int = VOCABULARY
    alpha: float = 0.2
    row_positions: int = Limits.row_positions


@dataclass
class Problem:
    """What the sides of a line search."""

    model: torch.nn.Module
    trie: TokenTrie
    gain: np.ndarray
    prompts: list[np.ndarray]
    notes: dict[str, float] = field(default_factory=dict)
    """Figures for the reader."""


def load(line: Line, runs: Path, generated: Path) -> Problem:
    """Make a line's problem, the same at every call, with prompts for the side with most users."""
    num_users = max(line.users.values())
    if line.source == "t5":
        return load_t5(runs / "instruments", generated, num_users)
    if line.source.startswith("generated"):
        return load_generated(generated / line.source, line, num_users)
    return load_trained(runs / line.source, line, num_users)


def load_trained(folder: Path, line: Line, num_users: int) -> Problem:
    """Load a model that tools/search_models.sh has trained."""
    model_folder = folder / "run" / "model"
    description = describe(model_folder)
    dataset = InteractionDataset.load(folder / "data")
    tokenizer = load_tokenizer(str(model_folder))
    stored = load_catalogue(model_folder / "catalogue", tokenizer=tokenizer, dataset=dataset)
    template = Template.from_dict(description["prompt"], str(model_folder))

    budget = description["max_length"] - stored.catalogue.max_length
    builder = PromptBuilder.build(template, tokenizer, dataset, stored.catalogue.kind, budget)
    split = dataset.splits["test"]
    rows = sample_rows(len(split), num_users, seed=0)
    if line.prompt:
        prompts = [cut_prompt(builder, split, row, line.prompt) for row in rows]
    else:
        prompts = [builder.encode(split.history(row)) for row in rows]

    model = AutoModelForCausalLM.from_pretrained(
        model_folder, attn_implementation="sdpa", dtype=torch.float32
    ).eval()
    problem = Problem(model, stored.trie, stored.gain, prompts)
    if line.vocabulary:
        unused = tokenizer.convert_tokens_to_ids(UNUSED_TOKEN)
        problem.notes["share of probability on padded rows"] = pad_vocabulary(
            problem, line.vocabulary, unused
        )
    return problem


def cut_prompt(builder: PromptBuilder, split: Split, row: int, length: int) -> np.ndarray:
    """Return a prompt of exactly `length` tokens.

    It holds the newest tokens of the row's history, behind the histories of the rows before it.
    """

    def history(row: int) -> np.ndarray:
        return builder.encode(split.history(row))[len(builder.begin) : -len(builder.end)]

    # The instruction is left out if it would take half of the prompt.
    begin = builder.begin if length > 2 * len(builder.begin) else builder.begin[:0]
    room = length - len(begin) - len(builder.end)

    body = history(row)
    while len(body) < room:
        row = (row - 1) % len(split)
        body = np.concatenate([history(row), builder.separator, body])
    return np.concatenate([begin, body[len(body) - room :], builder.end])


@torch.no_grad()
def pad_vocabulary(problem: Problem, size: int, unused: int) -> float:
    """Pad embedding and head (one matrix) to `size` rows; return the new rows' probability."""
    model, first = problem.model, problem.model.config.vocab_size
    model.resize_token_embeddings(size, mean_resizing=False)
    rows = model.get_input_embeddings().weight
    rows[first:] = UNUSED_SCALE * rows[unused]
    prompts = [torch.from_numpy(prompt[None].astype(np.int64)) for prompt in problem.prompts[:4]]
    logits = torch.cat([model(prompt, logits_to_keep=32).logits[0] for prompt in prompts])
    return logits.softmax(-1)[:, first:].sum(-1).mean().item()


def load_generated(folder: Path, line: Line, num_users: int) -> Problem:
    """Make a problem of items of tools/bench/trie.py in `folder`, random weights and prompts."""
    token_ids, offsets, counts = (
        np.load(folder / f"{name}.npy") for name in ("token_ids", "offsets", "counts")
    )
    trie = TokenTrie.build(token_ids, offsets, counts)
    config = Qwen2Config.from_pretrained(REPOSITORY / "tools" / "models" / "qwen2-5m.json")
    config.vocab_size = VOCABULARY
    config.initializer_range = 0.1  # at 0.02 all items of one length score nearly the same

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", dtype=torch.float32
    ).eval()
    prompts = np.random.default_rng(1).integers(2, VOCABULARY, (num_users, line.prompt or 256))
    return Problem(model, trie, information_gain(trie, "prior", np.float32), list(prompts))


def load_t5(folder: Path, generated: Path, num_users: int) -> Problem:
    """Make a problem of TIGER's T5 with random weights over the semantic IDs of instruments.

    Prompts are the codes of the histories' items. Without instruments' data, codes are random.
    """
    if (folder / "tokenizer").exists():
        dataset = InteractionDataset.load(folder / "data")
        catalogue = Catalogue.build(
            dataset, AutoTokenizer.from_pretrained(folder / "tokenizer"), "semantic-id"
        )
        token_ids, offsets, counts = catalogue.token_ids, catalogue.offsets, catalogue.counts
        split = dataset.splits["test"]
        histories = [split.history(row) for row in sample_rows(len(split), num_users, seed=0)]
    else:
        token_ids, offsets, counts = (
            np.load(generated / "codes" / f"{name}.npy")
            for name in ("token_ids", "offsets", "counts")
        )
        histories = np.random.default_rng(2).integers(len(counts), size=(num_users, 10))

    trie = TokenTrie.build(token_ids, offsets, counts)
    prompts = [
        np.concatenate([token_ids[offsets[item] : offsets[item + 1] - 1] for item in history])
        for history in histories
    ]

    eos = int(token_ids[-1])
    config = T5Config(
        vocab_size=int(token_ids.max()) + 1,
        d_model=128,
        d_kv=64,
        d_ff=1024,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=6,
        eos_token_id=eos,
        pad_token_id=eos,
        decoder_start_token_id=eos,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    return Problem(model, trie, information_gain(trie, "prior", np.float32), prompts)


def generate_codes(folder: Path, num_items: int) -> None:
    """Write random semantic IDs of four codes, each out of 256, without duplicates."""
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(256, size=(num_items, 4)), axis=0)
    tokens = np.concatenate(
        [codes + 1 + 256 * np.arange(4), np.zeros((len(codes), 1), int)], axis=1
    )
    folder.mkdir()
    np.save(folder / "token_ids.npy", tokens.astype(np.int32).ravel())
    np.save(folder / "offsets.npy", np.arange(len(codes) + 1) * 5)
    np.save(folder / "counts.npy", rng.zipf(1.6, len(codes)).clip(max=10_000))
