"""Benchmark: rows of similar length in the batches of an evaluation, against the order of the file.

    python tools/bench/evaluation.py [--quick]

A beam search of ten beams at α = 0 over a catalogue of 10,000 random semantic IDs (4 × 256 codes),
by the T5 of tools/models/tiger.json and the Qwen2 of tools/models/qwen2-codes.json, with random
weights, in fp32, on a CPU with one thread. Each of 1,024 users (--quick: 64) has one row, with a
history of 4 to 50 items; lengths are spread as in instruments (median 5, a long tail). In a batch,
the memory of all rows is as wide as that of the longest one.

Both sides search the same rows with the same number of rows in a batch, and take turns at every
batch. Their scores must agree to 1e-4. `speedup_NAME_SIZE` is the ratio of the sums of wall times.
"""

import argparse
import time

import numpy as np
import torch
from _common import REPOSITORY, finish, print_table
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from igd_ds.backbones import T5, CausalLM, read_model_config
from igd_ds.config.search import ScoringOptions
from igd_ds.contracts import Backbone
from igd_ds.data.batches import batches_of, length_batches
from igd_ds.items.decisiveness import information_gain
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.trie import TokenTrie
from igd_ds.search.engine import search
from igd_ds.search.scoring import Scoring

PAD, EOS, FIRST_CODE = 0, 1, 2
LEVELS, CODES, NUM_ITEMS, MAX_HISTORY, BEAMS = 4, 256, 10_000, 50, 10
SIZES = (16, 64, 256)  # rows of a batch; 16 is the default of `igd eval`
SCORE_TOLERANCE = 1e-4  # nats; scores are about −20


def make_items() -> np.ndarray:
    """Return different random semantic IDs (N, LEVELS + 1), EOS at their ends."""
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(CODES, size=(NUM_ITEMS + 100, LEVELS)), axis=0)
    codes = rng.permutation(codes)[:NUM_ITEMS] + FIRST_CODE + CODES * np.arange(LEVELS)
    return np.hstack([codes, np.full((NUM_ITEMS, 1), EOS)]).astype(np.int32)


def make_prompts(items: np.ndarray, num_users: int) -> list[np.ndarray]:
    """Return the codes of each user's history, int32 (P,)."""
    rng = np.random.default_rng(1)
    # Without the last item, as the history of a test row: quartiles 4, 5, 8.
    lengths = 4 + rng.lognormal(np.log(1.7), 1.3, num_users).astype(np.int64)
    return [
        items[rng.integers(NUM_ITEMS, size=length), :LEVELS].ravel()
        for length in np.minimum(lengths, MAX_HISTORY)
    ]


def make_models() -> dict[str, tuple[Backbone, torch.nn.Module]]:
    """Return both models, with random weights that tell items apart."""
    torch.manual_seed(0)
    models: dict[str, tuple[Backbone, torch.nn.Module]] = {}
    for name, file, backbone, kind in (
        ("t5", "tiger.json", T5(), AutoModelForSeq2SeqLM),
        ("qwen2", "qwen2-codes.json", CausalLM(), AutoModelForCausalLM),
    ):
        config = read_model_config(str(REPOSITORY / "tools" / "models" / file))
        config.vocab_size = FIRST_CODE + LEVELS * CODES
        config.eos_token_id, config.pad_token_id = EOS, PAD
        config.decoder_start_token_id = PAD
        config.initializer_range = 0.1
        model = kind.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        models[name] = backbone, model.eval()
    return models


def compare(
    backbone: Backbone,
    model: torch.nn.Module,
    trie: TokenTrie,
    prompts: list[np.ndarray],
    batch_size: int,
) -> tuple[float, float]:
    """Search all prompts on both sides; return the seconds in the order of the file and by length.

    The first batches are searched once before, untimed.
    """
    searched, scoring = (
        SearchTrie.build(trie),
        Scoring.build(trie, information_gain(trie, "prior"), ScoringOptions(alpha=(0.0,))),
    )
    rows = np.arange(len(prompts))
    lengths = np.array([len(prompt) for prompt in prompts])
    sides = [batches_of(rows, batch_size), length_batches(lengths, batch_size)]
    scores, seconds = np.zeros((2, len(prompts), BEAMS)), [0.0, 0.0]

    pairs = list(zip(*sides, strict=True))
    for number, batches in enumerate([pairs[0], *pairs]):
        for side, batch in enumerate(batches):
            begin = time.perf_counter()
            tree = backbone.prompt_tree(model, scoring.output_tokens(searched))
            tree.prefill([prompts[row] for row in batch])
            found = search(tree, searched, scoring, BEAMS)
            seconds[side] += (time.perf_counter() - begin) * (number > 0)
            scores[side, batch] = found.scores[0].numpy()

    spread = np.abs(scores[0] - scores[1]).max()
    assert spread <= SCORE_TOLERANCE, f"scores differ by {spread:.1e}"
    return seconds[0], seconds[1]


def main() -> None:
    """Compare both orders with both models and every size of a batch; print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="64 users; nothing is written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)

    items = make_items()
    offsets = np.arange(NUM_ITEMS + 1) * (LEVELS + 1)
    trie = TokenTrie.build(items.ravel(), offsets, np.ones(NUM_ITEMS, np.int64))
    prompts = make_prompts(items, 64 if quick else 1024)
    lengths = np.array([len(prompt) for prompt in prompts])
    print(
        f"{len(prompts)} prompts of {lengths.mean():.0f} tokens (median {np.median(lengths):.0f})"
    )

    lines, figures = [], {}
    for name, (backbone, model) in make_models().items():
        for size in SIZES[:1] if quick else SIZES:
            unsorted, by_length = compare(backbone, model, trie, prompts, size)
            figures[f"speedup_{name}_{size}"] = unsorted / by_length
            speeds = [len(prompts) / seconds for seconds in (unsorted, by_length)]
            lines.append([f"{name}, {size} rows a batch", *speeds, unsorted / by_length])
    print_table(["rows/s", "order of the file", "similar length", "speed-up"], lines)
    finish("evaluation", figures, quick)


if __name__ == "__main__":
    main()
