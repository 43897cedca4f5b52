"""Trees of tokens behind prompts, against a full forward pass of each path, per architecture."""

import numpy as np
import pytest
import torch
import transformers
from oracle import (
    assert_same_lists,
    build_trie,
    found_lists,
    random_items,
    random_prompts,
    random_weights,
    ranking,
    weight_by_path,
)

from igd_ds.backbones import CausalLM
from igd_ds.backbones.cache_tree import CachePromptTree
from igd_ds.backbones.prompt_tree import CausalPromptTree
from igd_ds.backbones.tree_attention import tree_attention
from igd_ds.errors import UsageError

VOCABULARY = 64
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip

# Prompts have 3 to 9 tokens and paths up to 6, so a window of 5 hides tokens in every pass.
TREES = {
    "qwen2": ("qwen2", COMMON),
    "qwen2 with windows": ("qwen2", COMMON | {"num_hidden_layers": 4, "use_sliding_window": True,
                                              "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("qwen3", COMMON | {"head_dim": 8}),
    "llama": ("llama", COMMON),
    "mistral with a short window": ("mistral", COMMON | {"sliding_window": 5}),
    "mistral with a long window": ("mistral", COMMON | {"sliding_window": 4096}),
    "gemma2": ("gemma2", COMMON | {"head_dim": 8, "num_hidden_layers": 4, "sliding_window": 5,
                                   "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0,
                                   "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", COMMON | {"head_dim": 8, "num_hidden_layers": 7,
                                        "sliding_window": 5}),
    "gpt-oss": ("gpt_oss", COMMON | {"head_dim": 8, "num_hidden_layers": 4, "sliding_window": 5,
                                     "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("phi3", COMMON | {"sliding_window": 6}),
    "gpt2": ("gpt2", GPT2),
    "smollm3 (layers without positions)": ("smollm3", COMMON | {"num_hidden_layers": 4}),
    "olmo3 with windows": ("olmo3", COMMON | {"num_hidden_layers": 4, "sliding_window": 5}),
    "deepseek v3 (values of another width)": ("deepseek_v3", COMMON | {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "num_key_value_heads": 4}),
    "opt (learned positions with an offset)": ("opt", {
        "vocab_size": VOCABULARY, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.3,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}),
}  # fmt: skip
FALLBACKS = {
    "bloom (ALiBi)": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2,
                                "n_head": 4, "initializer_range": 0.3}),
    "mpt (ALiBi)": ("mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4,
                            "max_seq_len": 64, "initializer_range": 0.3}),
    "mamba (recurrent)": ("mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4,
                                    "num_hidden_layers": 2, "initializer_range": 0.3}),
    "recurrent gemma (recurrent and attention)": (
        "recurrent_gemma", COMMON | {"num_hidden_layers": 3, "attention_window_size": 5,
                                     "lru_width": 32}),
    "falcon h1 (both in each layer)": (
        "falcon_h1", COMMON | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8,
                               "mamba_d_head": 8, "mamba_chunk_size": 4}),
    "roberta (positions begin behind the padding token)": (
        "roberta", COMMON | {"is_decoder": True}),
    "phimoe (windows only in transformers' mask)": (
        "phimoe", COMMON | {"sliding_window": 5, "num_local_experts": 4}),
}  # fmt: skip

# Sums run in another order than in the model's own attention, and fp32 has a rounding of 6e-8. A
# log-probability is a difference of logits of size 5 or so: 4 units in the last place, 2e-6, per
# layer. Wrong masks or positions change log-probabilities by 0.1 or more.
RTOL, ATOL = 5e-6, 3e-5


def tiny(kind: str, settings: dict, seed: int = 0):
    """A random model with sharp logits in eval mode, with the attention transformers chooses."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    return model


@torch.no_grad()
def full_pass(model, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities behind each token, (T, V), by the model's own attention."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)


def assert_tree_equals_full_passes(model, tree) -> None:
    """Several passes with runs of one and more tokens, under earlier runs and after users left."""
    random = np.random.default_rng(0)
    prompts = [random.integers(1, VOCABULARY, length) for length in (9, 3, 6)]
    first = tree.prefill(prompts).log_softmax(-1)
    assert torch.equal(tree.prompt_logits.log_softmax(-1), first)
    expected = torch.stack([full_pass(model, prompt.tolist())[-1] for prompt in prompts])
    torch.testing.assert_close(first, expected, rtol=RTOL, atol=ATOL)

    passes = [
        ([0, 1, 2, 1], [4, 1, 3, 2], [0, 1, 2]),  # runs 3 to 6
        ([6, 4, 4, 3, 0], [2, 1, 4, 1, 1], [0, 1, 2]),  # runs 7 to 11
        ([3, 5, 10], [1, 3, 1], [0, 2]),  # runs 12 to 14
        ([13, 12], [1, 1], [2]),
    ]
    path: dict[int, tuple[int, list[int]]] = {user: (user, []) for user in range(3)}
    users = [0, 1, 2]
    for parents, lengths, left in passes:
        if left != users:
            tree.retain(torch.tensor(left))
            users = left
        kept = [run for run, parent in enumerate(parents) if path[parent][0] in users]
        parents, lengths = ([values[run] for run in kept] for values in (parents, lengths))
        runs = [random.integers(1, VOCABULARY, length).tolist() for length in lengths]
        logits, numbers = tree.extend(
            torch.tensor(parents), torch.tensor(lengths), torch.tensor(sum(runs, []))
        )
        for rows, parent, run, number in zip(
            logits.log_softmax(-1).split(lengths), parents, runs, numbers.tolist(), strict=True
        ):
            user, above = path[parent]
            path[number] = (user, above + run)
            expected = full_pass(model, prompts[user].tolist() + above + run)[-len(run) :]
            torch.testing.assert_close(rows, expected, rtol=RTOL, atol=ATOL)

    nothing = torch.zeros(0, dtype=torch.int64)
    logits, numbers = tree.extend(nothing, nothing, nothing)
    assert logits.shape == (0, VOCABULARY) and numbers.shape == (0,)


@pytest.mark.parametrize("name", TREES)
def test_trees_equal_full_passes(name):
    model = tiny(*TREES[name])
    tree = CausalLM().prompt_tree(model)
    assert type(tree) is CausalPromptTree
    usual = model.config._attn_implementation
    assert_tree_equals_full_passes(model, tree)
    assert model.config._attn_implementation == usual


@pytest.mark.parametrize("name", FALLBACKS)
def test_other_models_are_searched_over_their_own_cache(name):
    model = tiny(*FALLBACKS[name])
    tree = CausalLM().prompt_tree(model)
    assert type(tree) is CachePromptTree
    assert_tree_equals_full_passes(model, tree)
    keeps_keys_only = "ALiBi" in name or "roberta" in name
    assert bool(tree.stored) is keeps_keys_only  # of the others the prompt is read again


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_fallback_is_right_for_any_model(name):
    model = tiny(*TREES[name])
    tree = CachePromptTree(model)
    assert_tree_equals_full_passes(model, tree)
    assert bool(tree.stored) is (name != "gemma3")  # whose cache forgets what lies before a window


@pytest.mark.parametrize("method", ["beam", "exact"])
@pytest.mark.parametrize("name", ["gemma3", "gpt-oss", "bloom (ALiBi)", "mamba (recurrent)"])
def test_searches_rank_every_item(name, method):
    """A beam as wide as the catalogue finds the ranking of all items, the exact search its top."""
    model = tiny(*(TREES | FALLBACKS)[name])
    items, prompts = random_items(25), random_prompts(3)
    trie = build_trie(items)
    weights = random_weights(trie)
    k = len(items) if method == "beam" else 6
    found = found_lists(model, prompts, trie, weights, k, 0.0, method=method)
    for ranked, prompt in zip(found, prompts, strict=True):
        expected = ranking(model, prompt, items, weight_by_path(trie, weights), 0.0)
        assert_same_lists(ranked, expected[:k])


def test_the_fallback_bounds_the_tokens_of_a_pass(monkeypatch):
    monkeypatch.setattr("igd_ds.backbones.cache_tree.TOKENS_PER_PASS", 12)
    model = tiny(*FALLBACKS["bloom (ALiBi)"])
    assert_tree_equals_full_passes(model, CachePromptTree(model))


def test_the_fallback_takes_part_in_passes_of_other_ranks():
    """Under ZeRO-3 a forward pass is a collective: here another rank makes 5 in each call."""
    model = tiny(*FALLBACKS["mamba (recurrent)"])
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    tree = CachePromptTree(model)
    tree.any_rank = lambda is_pending: is_pending or len(passes) % 5 > 0
    expected = full_pass(model, [3, 4])[-1]
    passes.clear()

    first = tree.prefill([np.array([3]), np.array([3, 4])]).log_softmax(-1)
    assert len(passes) == 5
    torch.testing.assert_close(first[1], expected, rtol=RTOL, atol=ATOL)
    one = torch.ones(1, dtype=torch.int64)
    logits, _ = tree.extend(0 * one, one, 4 * one)
    assert len(passes) == 10
    torch.testing.assert_close(logits[0].log_softmax(-1), expected, rtol=RTOL, atol=ATOL)


def test_a_window_counts_positions_and_not_slots():
    """Two children of one token lie in neighbouring slots and at one position."""
    model = tiny("mistral", COMMON | {"sliding_window": 3})
    tree = CausalLM().prompt_tree(model)
    prompt = [5, 6, 7, 8]
    tree.prefill([np.array(prompt)])
    one = torch.ones(6, dtype=torch.int64)
    siblings = torch.arange(20, 26)
    _, numbers = tree.extend(torch.zeros_like(one), one, siblings)
    logits, _ = tree.extend(numbers, one, siblings + 10)
    for sibling, row in zip(siblings.tolist(), logits.log_softmax(-1), strict=True):
        expected = full_pass(model, [*prompt, sibling, sibling + 10])[-1]
        torch.testing.assert_close(row, expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    ("name", "masks"), [("llama", 1), ("mistral with a long window", 1), ("gemma3", 2)]
)
def test_masks_are_made_once_per_kind_of_layer(name, masks, monkeypatch):
    """A prompt pass without windows has none at all: the kernel is causal by itself."""
    steps = []

    def note(*args, tree, **options):
        steps.append(tree)
        return tree_attention(*args, tree=tree, **options)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "igd_tree", note)
    model = tiny(*TREES[name])
    tree = CausalLM().prompt_tree(model)
    tree.prefill([np.arange(1, 10), np.arange(1, 4)])
    assert len(steps[-1].masks) == masks - 1
    one = torch.ones(2, dtype=torch.int64)
    tree.extend(torch.tensor([0, 1]), one, torch.tensor([3, 4]))
    assert len(steps[-1].masks) == masks
    assert len({id(step) for step in steps}) == 2


@pytest.mark.parametrize("name", ["qwen2", "qwen2 with windows", "gemma2"])
def test_equal_beginnings_of_prompts_are_read_once(name):
    """The linear layers see each different prefix once; logits and later passes stay the same."""
    model = tiny(*TREES[name])
    prompts = [[4, 5, 6, 7], [4, 5, 9], [3, 1], [4, 5, 6, 7], [4, 5]]
    widths: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    tree = CausalLM().prompt_tree(model)
    first = tree.prefill([np.array(prompt) for prompt in prompts]).log_softmax(-1)
    assert widths == [7]  # 4 5 6 7, 9 and 3 1; tokens of all prompts: 15

    one = torch.ones(len(prompts), dtype=torch.int64)
    second, _ = tree.extend(torch.arange(len(prompts)), one, torch.full_like(one, 8))
    for user, prompt in enumerate(prompts):
        expected = full_pass(model, [*prompt, 8])[-2:]
        found = torch.stack([first[user], second.log_softmax(-1)[user]])
        torch.testing.assert_close(found, expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("name", ["llama", "mamba (recurrent)"])
def test_a_prompt_without_tokens_is_refused(name):
    tree = CausalLM().prompt_tree(tiny(*(TREES | FALLBACKS)[name]))
    with pytest.raises(UsageError, match="prompt 1 of the batch has no tokens"):
        tree.prefill([np.array([3]), np.array([], np.int64)])
