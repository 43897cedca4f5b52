"""Tree cache and beam search against a plain search: one user, one beam, one full forward pass at a time."""

import itertools

import numpy as np
import pytest
import torch
import transformers

from igd_ds.decoding.beam import SearchTrie, beam_search, longest_item
from igd_ds.decoding.cache import PromptTree
from igd_ds.items.trie import TokenTrie

EOS, VOCABULARY = 0, 48


def tiny_model(kind: str = "qwen2", seed: int = 0, attention: str = "sdpa"):
    """Random causal LM with sharp logits, so that scores are far apart; float32, eval mode."""
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
                "attn_implementation": attention}  # fmt: skip
    if kind == "qwen3":
        settings["head_dim"] = 8
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings)).eval()


def random_items(num_items: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Distinct token paths with shared prefixes and forced runs; lengths 2 to 8 with EOS."""
    random = np.random.default_rng(seed)
    items = {(1, EOS), (1, 2, EOS), (1, 2, 3, 4, 5, 6, 7, EOS)}
    while len(items) < num_items:
        length = random.integers(1, 7)
        items.add((*(int(t) for t in random.integers(1, 7, size=length)), EOS))
    return sorted(items, key=lambda path: random.random())


def build_trie(items, counts=None) -> TokenTrie:
    """TokenTrie of token paths."""
    offsets = np.concatenate([[0], np.cumsum([len(path) for path in items])]).astype(np.int64)
    counts = np.ones(len(items), np.int64) if counts is None else np.asarray(counts, np.int64)
    return TokenTrie.build(np.concatenate(items).astype(np.int32), offsets, counts)


def node_paths(trie) -> list[tuple[int, ...]]:
    """The token path of every trie node."""
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
    return [[int(t) for t in random.integers(1, VOCABULARY, size=random.integers(3, 13))] for _ in range(num_users)]


def left_pad(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[EOS] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@torch.no_grad()
def token_logprobs(model, prompt, path) -> list[float]:
    """log p of each token of `path` after `prompt`, from one full forward pass without any cache."""
    logits = model(torch.tensor([[*prompt, *path]])).logits[0].float().log_softmax(-1)
    return [logits[len(prompt) - 1 + t, token].item() for t, token in enumerate(path)]


def plain_search(model, prompt, items, weight, num_beams, length_penalty):
    """METHOD's beam rule, written for one user with lists and tuples: [(score, path)], best first."""
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
                    candidates.append((score + weight[path] * token_logprobs(model, prompt, path)[-1], path))
        candidates = sorted(candidates, reverse=True)[: 2 * num_beams]
        done += [(s / len(p) ** length_penalty, p) for s, p in candidates[:num_beams] if p in finished_paths]
        done = sorted(done, reverse=True)[:num_beams]
        live = [(s, p) for s, p in candidates if p not in finished_paths][:num_beams]
        if len(done) == num_beams and all(s / longest[p] ** length_penalty <= done[-1][0] for s, p in live):
            break
    return done


def search(model, prompts, trie, weights, num_beams, length_penalty, **options):
    """Our search: per user [(score, path)]."""
    tree = PromptTree(model)
    tree.prefill(*left_pad(prompts))
    result = beam_search(tree, SearchTrie.build(trie), torch.from_numpy(weights), num_beams, length_penalty, **options)
    paths = node_paths(trie)
    return [[(s, paths[leaf]) for s, leaf in zip(scores, leaves, strict=True) if leaf >= 0]
            for scores, leaves in zip(result.scores.tolist(), result.leaves.tolist(), strict=True)]  # fmt: skip


def assert_same_lists(found, expected):
    assert [path for _, path in found] == [path for _, path in expected]
    np.testing.assert_allclose([s for s, _ in found], [s for s, _ in expected], atol=2e-5)


def weight_by_path(trie, weights) -> dict:
    return {path: float(w) for path, w in zip(node_paths(trie), weights, strict=True)}


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_equals_the_plain_search(kind, length_penalty):
    model, items, prompts = tiny_model(kind), random_items(60), random_prompts(4)
    trie = build_trie(items)
    weights = random_weights(trie)
    for num_beams in (1, 3, 10):
        found = search(model, prompts, trie, weights, num_beams, length_penalty)
        for user, prompt in enumerate(prompts):
            expected = plain_search(model, prompt, items, weight_by_path(trie, weights), num_beams, length_penalty)
            assert_same_lists(found[user], expected)


def test_equals_the_plain_search_with_qwen3_and_lora():
    import peft

    torch.manual_seed(0)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("qwen3"), lora).eval()
    items, prompts = random_items(40), random_prompts(3)
    trie = build_trie(items)
    weights = random_weights(trie)
    found = search(model, prompts, trie, weights, 5, 0.0)
    for user, prompt in enumerate(prompts):
        assert_same_lists(found[user], plain_search(model, prompt, items, weight_by_path(trie, weights), 5, 0.0))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("extra", [0, 7])
def test_a_beam_as_wide_as_the_catalogue_ranks_every_item(length_penalty, extra):
    model, items, prompts = tiny_model(), random_items(50), random_prompts(3)
    trie = build_trie(items)
    weights = random_weights(trie)
    weight = weight_by_path(trie, weights)
    found = search(model, prompts, trie, weights, len(items) + extra, length_penalty)
    for user, prompt in enumerate(prompts):
        scores = {}
        for path in items:
            edges = [weight[path[: t + 1]] for t in range(len(path))]
            scores[path] = float(np.dot(edges, token_logprobs(model, prompt, path))) / len(path) ** length_penalty
        expected = sorted(((s, p) for p, s in scores.items()), reverse=True)
        assert_same_lists(found[user], expected)


def test_places_beyond_the_catalogue_are_flagged():
    trie = build_trie(random_items(5))
    tree = PromptTree(tiny_model())
    tree.prefill(*left_pad(random_prompts(2)))
    result = beam_search(tree, SearchTrie.build(trie), torch.ones(trie.num_nodes), num_beams=8)
    assert result.leaves.dtype == torch.int32 and result.scores.dtype == torch.float32
    for leaves, scores in zip(result.leaves, result.scores, strict=True):
        assert sorted(leaves[:5].tolist()) == sorted(int(leaf) for leaf in trie.leaf_of_item)
        assert (leaves[5:] == -1).all() and (scores[5:] == -torch.inf).all() and scores[:5].isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_every_list_is_full(seed):
    items = random_items(14, seed)
    trie = build_trie(items)
    for num_beams in range(1, 15):
        for ranked in search(tiny_model(seed=seed), random_prompts(5, seed), trie, random_weights(trie), num_beams, 0.5):
            assert len({path for _, path in ranked}) == num_beams


def test_a_list_does_not_depend_on_the_rest_of_the_batch():
    model, trie, prompts = tiny_model(), build_trie(random_items(60)), random_prompts(6)
    weights = random_weights(trie)
    together = search(model, prompts, trie, weights, 6, 1.0)
    for user, prompt in enumerate(prompts):
        assert_same_lists(search(model, [prompt], trie, weights, 6, 1.0)[0], together[user])


def test_rewind_keeps_the_prompts_for_the_next_alpha():
    model, trie = tiny_model(), build_trie(random_items(60))
    tree, search_trie = PromptTree(model), SearchTrie.build(trie)
    tree.prefill(*left_pad(random_prompts(3)))
    plain, weighted = torch.ones(trie.num_nodes), torch.from_numpy(random_weights(trie))
    first = beam_search(tree, search_trie, plain, 5)
    tree.rewind()
    other = beam_search(tree, search_trie, weighted, 5)
    tree.rewind()
    again = beam_search(tree, search_trie, plain, 5)
    assert torch.equal(first.leaves, again.leaves) and torch.equal(first.scores, again.scores)
    assert not torch.equal(first.scores, other.scores)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_tree_rows_equal_full_passes_also_with_whole_chains_in_one_pass(kind):
    model, prompts = tiny_model(kind), random_prompts(2)
    tree = PromptTree(model)
    tree.prefill(*left_pad(prompts))
    # Slots 0, 1 branch off the prompt; the second pass appends a chain 2-3-4 under slot 1 and, for user 0 only, 5 under 0.
    tree.extend(torch.tensor([[7, 8], [9, 10]]), torch.full((2, 2), -1), torch.ones(2, 2, dtype=torch.bool))
    valid = torch.tensor([[True] * 4, [True] * 3 + [False]])
    logits = tree.extend(torch.tensor([[11, 12, 13, 14]] * 2), torch.tensor([[1, 2, 3, 0]] * 2), valid)
    paths = [[(0, [8, 11]), (0, [8, 11, 12]), (0, [8, 11, 12, 13]), (0, [7, 14])],
             [(1, [10, 11]), (1, [10, 11, 12]), (1, [10, 11, 12, 13])]]  # fmt: skip
    for row, (user, path) in zip(logits, itertools.chain(*paths), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompts[user] + path])).logits[0, -1]
        torch.testing.assert_close(row, expected, atol=2e-5, rtol=0)


def test_ranks_that_are_done_keep_making_passes_while_another_goes_on():
    model, trie = tiny_model(), build_trie(random_items(30))
    weights = random_weights(trie)
    own, answers = [], itertools.chain([True] * 12, itertools.repeat(False))

    def any_rank(flag: bool) -> bool:
        own.append(flag)
        return next(answers) or flag

    alone = search(model, random_prompts(2), trie, weights, 4, 0.0)
    assert search(model, random_prompts(2), trie, weights, 4, 0.0, any_rank=any_rank) == alone
    assert len(own) == 13 and own[0] and not any(own[8:])  # the longest item has 8 tokens


def test_ties_follow_the_order_of_tokens():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)  # every token has the same probability
    items = [(5, EOS), (4, EOS), (3, EOS), (2, 9, EOS), (2, 8, EOS)]
    found = search(model, random_prompts(2), build_trie(items), np.ones(12, np.float32), 5, 0.0)
    assert [path for _, path in found[0]] == [(3, EOS), (4, EOS), (5, EOS), (2, 8, EOS), (2, 9, EOS)]
    assert [path for _, path in found[1]] == [path for _, path in found[0]]


def test_bf16_models_get_fp32_scores():
    model, prompts, items = tiny_model().bfloat16(), random_prompts(2), random_items(12)
    trie = build_trie(items)
    weights = random_weights(trie)
    for user, ranked in enumerate(search(model, prompts, trie, weights, 12, 0.0)):
        for score, path in ranked:
            weight = [weight_by_path(trie, weights)[path[: t + 1]] for t in range(len(path))]
            # The same bf16 arithmetic in another order differs by some bf16 steps, no more.
            assert score == pytest.approx(np.dot(weight, token_logprobs(model, prompts[user], path)), rel=0.02, abs=0.2)


def test_bad_input_is_refused():
    trie = build_trie(random_items(20))
    model = tiny_model()
    with pytest.raises(ValueError, match="length_penalty"):
        search(model, random_prompts(1), trie, random_weights(trie), 3, -1.0)
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        search(model, random_prompts(1), trie, random_weights(trie), 3, 0.0)
    with pytest.raises(ValueError, match="sdpa"):
        PromptTree(tiny_model(attention="eager"))


def test_longest_item_under_each_node():
    items = random_items(80, seed=3)
    trie = build_trie(items)
    expected = [max(len(item) for item in items if item[: len(path)] == path) for path in node_paths(trie)]
    assert longest_item(trie).tolist() == expected
