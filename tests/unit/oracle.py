"""A plain search for the tests of the engine: one user, one beam, one forward pass at a time."""

import contextlib
import copy

import numpy as np
import torch
import transformers
from pretend_device import pretend_device

from igd_ds.backbones import backbone_of
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.trie import TokenTrie
from igd_ds.search.engine import search
from igd_ds.search.scoring import Scoring

EOS, VOCABULARY = 0, 48

DEVICE = "cpu"
"""Where `run_search` lets the engine search; the fixture `searched_on` sets it."""

# How far fp32 scores of two implementations may lie apart. Relative: 5e-6, as in the golden README
# (sums in another order, on another CPU). Absolute: log p is a difference of logits of size 5 or
# so, whose rounding (4 units in the last place, 2e-6) does not shrink where p is near 1. A path has
# up to 8 tokens.
SCORE_RTOL, SCORE_ATOL = 5e-6, 2e-5


def tiny_model(kind: str = "qwen2", seed: int = 0, attention: str = "sdpa", **more):
    """A random causal LM with sharp logits, so that scores are far apart; float32, eval mode."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "attn_implementation": attention,
    }
    if kind == "qwen3":
        settings["head_dim"] = 8
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **settings | more)
    ).eval()


def tiny_t5(vocab_size: int = VOCABULARY, eos: int = EOS, **more):
    """Return a random T5 in eval mode."""
    torch.manual_seed(0)
    special = {"pad_token_id": eos, "eos_token_id": eos, "decoder_start_token_id": eos}
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=vocab_size, **sizes, **special, **more)
    return transformers.T5ForConditionalGeneration(config).eval()


def random_items(num_items: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Distinct token paths with shared prefixes and forced chains; lengths 2 to 8 with EOS."""
    random = np.random.default_rng(seed)
    items = {(1, EOS), (1, 2, EOS), (1, 2, 3, 4, 5, 6, 7, EOS)}
    while len(items) < num_items:
        length = random.integers(1, 7)
        items.add((*(int(t) for t in random.integers(1, 7, size=length)), EOS))
    return sorted(items, key=lambda path: random.random())


def build_trie(items, counts=None) -> TokenTrie:
    """Return the TokenTrie of token paths."""
    offsets = np.concatenate([[0], np.cumsum([len(path) for path in items])]).astype(np.int64)
    counts = np.ones(len(items), np.int64) if counts is None else np.asarray(counts, np.int64)
    return TokenTrie.build(np.concatenate(items).astype(np.int32), offsets, counts)


def node_paths(trie) -> list[tuple[int, ...]]:
    """Return the token path of every trie node."""
    paths = [()]
    for parent, token in zip(trie.parent[1:], trie.token[1:], strict=True):
        paths.append((*paths[parent], int(token)))
    return paths


def random_weights(trie, seed: int = 0) -> np.ndarray:
    """Arbitrary edge weights in [0.5, 1]."""
    return np.random.default_rng(seed).uniform(0.5, 1, trie.num_nodes).astype(np.float32)


def random_prompts(num_users: int, seed: int = 0) -> list[list[int]]:
    """Prompts of different lengths, 3 to 12."""
    random = np.random.default_rng(seed)
    return [
        [int(t) for t in random.integers(1, VOCABULARY, size=random.integers(3, 13))]
        for _ in range(num_users)
    ]


def left_pad(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask (B, P), padded on the left as `generate` takes them."""
    width = max(map(len, prompts))
    ids = torch.tensor([[EOS] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@torch.no_grad()
def token_logprobs(model, prompt, path) -> list[float]:
    """Return log p of each token of `path` after `prompt`, from one pass without a cache."""
    logits = model(torch.tensor([[*prompt, *path]])).logits[0].float().log_softmax(-1)
    return [logits[len(prompt) - 1 + t, token].item() for t, token in enumerate(path)]


def plain_search(model, prompt, items, weight, num_beams, length_penalty):
    """Return the beam search's [(score, path)], best first, found with lists and tuples."""
    finished_paths = set(items)
    longest = {}
    for path in items:
        for t in range(len(path) + 1):
            longest[path[:t]] = max(longest.get(path[:t], 0), len(path))

    live, done = [(0.0, ())], []
    while live:
        candidates = []
        for score, prefix in live:
            for path in longest:
                if len(path) == len(prefix) + 1 and path[:-1] == prefix:
                    candidates.append(
                        (score + weight[path] * token_logprobs(model, prompt, path)[-1], path)
                    )

        candidates = sorted(candidates, reverse=True)[: 2 * num_beams]
        done += [
            (s / len(p) ** length_penalty, p)
            for s, p in candidates[:num_beams]
            if p in finished_paths
        ]
        done = sorted(done, reverse=True)[:num_beams]
        live = [(s, p) for s, p in candidates if p not in finished_paths][:num_beams]

        if len(done) == num_beams and all(
            s / longest[p] ** length_penalty <= done[-1][0] for s, p in live
        ):
            break
    return done


def scoring_of(
    weights: np.ndarray, length_penalty: float = 0.0, alphas=(1.0,), **options
) -> Scoring:
    """Return a Scoring with edge weights 1 − α·(1 − weights), which at α = 1 are `weights`."""
    settings = {
        "name": "per-node",
        "pooled": False,
        "masked_softmax": False,
        "renormalise": False,
        "temperature": 1.0,
        "prior": None,
    } | options
    return Scoring(gain=1 - weights, alphas=alphas, length_penalty=length_penalty, **settings)


def run_search(model, prompts, trie, scoring, num_beams, **options):
    """Return the engine's SearchResult."""
    with contextlib.nullcontext() if DEVICE == "cpu" else pretend_device():
        model = model if DEVICE == "cpu" else copy.deepcopy(model).to(DEVICE)
        search_trie = SearchTrie.build(trie)
        tree = backbone_of(model.config).prompt_tree(model, scoring.output_tokens(search_trie))
        tree.prefill([np.array(prompt) for prompt in prompts])
        return search(tree, search_trie, scoring, num_beams, **options)


def as_lists(trie, leaves, scores) -> list[list[tuple[float, tuple[int, ...]]]]:
    """Return leaves and scores (B, K) as [(score, path)] per user."""
    paths = node_paths(trie)
    return [[(s, paths[leaf]) for s, leaf in zip(*row, strict=True) if leaf >= 0]
            for row in zip(scores.tolist(), leaves.tolist(), strict=True)]  # fmt: skip


def found_lists(model, prompts, trie, weights, num_beams, length_penalty, **options):
    """Return the engine's lists at one α, per user [(score, path)]."""
    result = run_search(
        model, prompts, trie, scoring_of(weights, length_penalty), num_beams, **options
    )
    return as_lists(trie, result.leaves[0], result.scores[0])


def assert_same_lists(found, expected):
    """Same scores by rank and the same paths; paths of equal scores (to fp32) may change places."""
    scores, paths = [score for score, _ in found], [path for _, path in found]
    expected_scores = [score for score, _ in expected]
    np.testing.assert_allclose(scores, expected_scores, rtol=SCORE_RTOL, atol=SCORE_ATOL)
    assert len(set(paths)) == len(paths)
    if paths != [path for _, path in expected]:
        score_of = {path: score for score, path in expected}
        # A path that is not expected has changed places with one behind the end of the list.
        by_path = [score_of.get(path, expected_scores[-1]) for path in paths]
        np.testing.assert_allclose(scores, by_path, rtol=SCORE_RTOL, atol=SCORE_ATOL)


def weight_by_path(trie, weights) -> dict:
    """Return the weight of the edge into each node, by the node's path."""
    return {path: float(w) for path, w in zip(node_paths(trie), weights, strict=True)}


def ranking(model, prompt, items, weight, length_penalty):
    """Return [(score, path)] of every item of the catalogue, best first."""
    scores = {}
    for path in items:
        edges = [weight[path[: t + 1]] for t in range(len(path))]
        scores[path] = (
            float(np.dot(edges, token_logprobs(model, prompt, path))) / len(path) ** length_penalty
        )
    return sorted(((s, p) for p, s in scores.items()), reverse=True)
