"""The tree over a T5's decoder and the searches on it, against full decoder passes."""

import numpy as np
import pytest
import torch
import transformers
from oracle import (
    EOS,
    SCORE_ATOL,
    SCORE_RTOL,
    VOCABULARY,
    as_lists,
    assert_same_lists,
    build_trie,
    random_prompts,
    random_weights,
    scoring_of,
    tiny_model,
    weight_by_path,
)

from igd_ds.backbones.encoder_tree import EncoderPromptTree
from igd_ds.items.search_trie import SearchTrie
from igd_ds.search.engine import search


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
        "num_heads": 4, "relative_attention_num_buckets": 4, "relative_attention_max_distance": 6,
        "initializer_factor": 2.0, "eos_token_id": EOS, "pad_token_id": VOCABULARY - 1,
        "decoder_start_token_id": VOCABULARY - 1,
    }  # fmt: skip
    config = transformers.T5Config(**settings)
    model = transformers.T5ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(
        model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    )
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


@torch.no_grad()
def full_pass(model, prompt, tokens):
    """Logits of each next token, (1 + tokens, V), from one decoder pass without a cache."""
    start = model.config.decoder_start_token_id
    return model(
        input_ids=torch.tensor([prompt]),
        decoder_input_ids=torch.tensor([[start, *tokens]]),
        use_cache=False,
    ).logits[0]


def semantic_ids(num_items: int) -> list[tuple[int, ...]]:
    random = np.random.default_rng(0)
    codes = {
        tuple(int(level * 10 + c) for level, c in enumerate(random.integers(1, 10, 4)))
        for _ in range(2 * num_items)
    }
    return [(*path, EOS) for path in sorted(codes)[:num_items]]


def test_packed_runs_equal_full_decoder_passes_also_after_users_retire(model):
    prompts = random_prompts(3)
    tree = EncoderPromptTree(model)
    first = tree.prefill([np.array(prompt) for prompt in prompts])
    expected = torch.stack([full_pass(model, p, [])[-1] for p in prompts])
    torch.testing.assert_close(first, expected, rtol=SCORE_RTOL, atol=SCORE_ATOL)

    path = {run: ([], run) for run in range(3)}
    for parents, runs, left in [
        ([0, 1, 2, 1], [[7], [8, 9, 10], [9], [11]], [0, 1, 2]),
        ([6, 4, 4], [[1, 2], [3], [4, 5]], [1]),
    ]:
        if len(left) < 3:
            tree.retain(torch.tensor(left))
        lengths = torch.tensor([len(run) for run in runs])
        logits, numbers = tree.extend(torch.tensor(parents), lengths, torch.tensor(sum(runs, [])))
        for rows, parent, run, number in zip(
            logits.split(lengths.tolist()), parents, runs, numbers.tolist(), strict=True
        ):
            above, user = path[parent]
            path[number] = (above + run, user)
            expected = full_pass(model, prompts[user], above + run)[-len(run) :]
            torch.testing.assert_close(rows, expected, rtol=SCORE_RTOL, atol=SCORE_ATOL)


@pytest.mark.parametrize("method", ["beam", "exact"])
def test_wide_and_exact_searches_rank_every_item(model, method):
    items, prompts = semantic_ids(60), random_prompts(3)
    trie = build_trie(items)
    weights = random_weights(trie)
    tree = EncoderPromptTree(model)
    tree.prefill([np.array(prompt) for prompt in prompts])
    width = len(items) if method == "beam" else 12

    result = search(tree, SearchTrie.build(trie), scoring_of(weights), width, method=method)
    weight = weight_by_path(trie, weights)
    for prompt, found in zip(
        prompts, as_lists(trie, result.leaves[0], result.scores[0]), strict=True
    ):
        expected = []
        for path in items:
            logprob = full_pass(model, prompt, path[:-1]).log_softmax(-1)
            expected.append(
                (
                    sum(
                        weight[path[: t + 1]] * logprob[t, token].item()
                        for t, token in enumerate(path)
                    ),
                    path,
                )
            )
        assert_same_lists(found, sorted(expected, reverse=True)[:width])


def test_other_encoder_decoders_are_refused_by_name():
    with pytest.raises(ValueError, match="knows T5, found qwen2"):
        EncoderPromptTree(tiny_model())
