"""Prompt tree and beam search against the plain search of oracle.py."""

import itertools

import numpy as np
import pytest
import torch
from oracle import (
    EOS,
    SCORE_ATOL,
    SCORE_RTOL,
    as_lists,
    assert_same_lists,
    build_trie,
    found_lists,
    node_paths,
    plain_search,
    random_items,
    random_prompts,
    random_weights,
    ranking,
    run_search,
    scoring_of,
    tiny_model,
    token_logprobs,
    weight_by_path,
)

from igd_ds.backbones import CausalLM, backbone_of
from igd_ds.config.model import ModelSource
from igd_ds.config.search import Limits
from igd_ds.errors import UsageError
from igd_ds.items.search_trie import SearchTrie, longest_item
from igd_ds.search.ranking import best_per_group

pytestmark = pytest.mark.usefixtures("searched_on")


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_equals_the_plain_search(kind, length_penalty):
    model, items, prompts = tiny_model(kind), random_items(60), random_prompts(4)
    trie = build_trie(items)
    weights = random_weights(trie)
    for num_beams in (1, 3, 10):
        found = found_lists(model, prompts, trie, weights, num_beams, length_penalty)
        for user, prompt in enumerate(prompts):
            expected = plain_search(
                model, prompt, items, weight_by_path(trie, weights), num_beams, length_penalty
            )
            assert_same_lists(found[user], expected)


def test_equals_the_plain_search_with_qwen3_and_lora():
    import peft

    torch.manual_seed(0)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
    )
    model = peft.get_peft_model(tiny_model("qwen3"), lora).eval()
    items, prompts = random_items(40), random_prompts(3)
    trie = build_trie(items)
    weights = random_weights(trie)
    found = found_lists(model, prompts, trie, weights, 5, 0.0)
    for user, prompt in enumerate(prompts):
        assert_same_lists(
            found[user], plain_search(model, prompt, items, weight_by_path(trie, weights), 5, 0.0)
        )


def test_equals_the_plain_search_on_a_4_bit_base(tmp_path, searched_on):
    if searched_on == "pretend":
        pytest.skip("bitsandbytes computes on the devices that it knows")
    tiny_model().save_pretrained(tmp_path)
    source = ModelSource(model=str(tmp_path), dataset="", dtype="float32")
    model = CausalLM().load(source, load_in_4bit=True, device=torch.device("cpu"))
    items, prompts = random_items(40), random_prompts(3)
    trie = build_trie(items)
    weights = random_weights(trie)
    found = found_lists(model, prompts, trie, weights, 5, 0.0)
    for user, prompt in enumerate(prompts):
        assert_same_lists(
            found[user], plain_search(model, prompt, items, weight_by_path(trie, weights), 5, 0.0)
        )


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("extra", [0, 7])
def test_a_beam_as_wide_as_the_catalogue_ranks_every_item(length_penalty, extra):
    model, items, prompts = tiny_model(), random_items(50), random_prompts(3)
    trie = build_trie(items)
    weights = random_weights(trie)
    weight = weight_by_path(trie, weights)
    found = found_lists(model, prompts, trie, weights, len(items) + extra, length_penalty)
    for user, prompt in enumerate(prompts):
        assert_same_lists(found[user], ranking(model, prompt, items, weight, length_penalty))


def test_places_beyond_the_catalogue_are_flagged():
    trie = build_trie(random_items(5))
    result = run_search(
        tiny_model(),
        random_prompts(2),
        trie,
        scoring_of(np.ones(trie.num_nodes, np.float32)),
        num_beams=8,
    )
    assert result.leaves.dtype == torch.int32 and result.scores.dtype == torch.float32
    for leaves, scores in zip(result.leaves[0], result.scores[0], strict=True):
        assert sorted(leaves[:5].tolist()) == sorted(int(leaf) for leaf in trie.leaf_of_item)
        assert (
            (leaves[5:] == -1).all()
            and (scores[5:] == -torch.inf).all()
            and scores[:5].isfinite().all()
        )


@pytest.mark.parametrize("seed", range(4))
def test_every_list_is_full(seed):
    items = random_items(14, seed)
    trie = build_trie(items)
    for num_beams in range(1, 15):
        for ranked in found_lists(
            tiny_model(seed=seed),
            random_prompts(5, seed),
            trie,
            random_weights(trie),
            num_beams,
            0.5,
        ):
            assert len({path for _, path in ranked}) == num_beams


def test_a_list_does_not_depend_on_the_rest_of_the_batch():
    model, trie, prompts = tiny_model(), build_trie(random_items(60)), random_prompts(6)
    weights = random_weights(trie)
    together = found_lists(model, prompts, trie, weights, 6, 1.0)
    for user, prompt in enumerate(prompts):
        assert_same_lists(found_lists(model, [prompt], trie, weights, 6, 1.0)[0], together[user])


def test_an_alpha_grid_gives_the_lists_of_each_alpha_and_shares_what_they_need():
    model, trie, prompts = tiny_model(), build_trie(random_items(60)), random_prompts(4)
    weights, alphas = random_weights(trie), (0.0, 0.3, 1.0)
    grid = run_search(model, prompts, trie, scoring_of(weights, alphas=alphas), 5)
    alone = [
        run_search(model, prompts, trie, scoring_of(weights, alphas=(alpha,)), 5)
        for alpha in alphas
    ]
    for index, result in enumerate(alone):
        lists = (grid.leaves[index], grid.scores[index]), (result.leaves[0], result.scores[0])
        for found, expected in zip(*(as_lists(trie, *pair) for pair in lists), strict=True):
            assert_same_lists(found, expected)
    for name in ("token_steps", "beam_positions"):
        assert torch.equal(grid.counts[name], sum(result.counts[name] for result in alone))
    assert (grid.counts["positions"] < sum(result.counts["positions"] for result in alone)).all()


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_packed_runs_of_any_user_and_depth_equal_full_passes(kind):
    model, prompts = tiny_model(kind), random_prompts(3)
    tree = backbone_of(model.config).prompt_tree(model)
    first = tree.prefill([np.array(prompt) for prompt in prompts])

    passes = [
        ([0, 1, 0, 1], [[7], [8], [9, 10, 11], [12]]),
        ([4, 3, 5, 2], [[13, 14], [15], [16, 17], [18, 19, 20]]),
    ]
    path = {run: ([], run) for run in range(3)}  # run → tokens behind the prompt, user
    for (parents, runs), left in zip(passes, [None, [1, 2]], strict=True):
        if left:  # user 0 has ended: the others' keys move up
            tree.retain(torch.tensor(left))
            parents, runs = zip(
                *[(p, r) for p, r in zip(parents, runs, strict=True) if path[p][1] in left],
                strict=True,
            )

        lengths = torch.tensor([len(run) for run in runs])
        logits, numbers = tree.extend(
            torch.tensor(parents), lengths, torch.tensor([token for run in runs for token in run])
        )

        rows = iter(logits)
        for parent, run, number in zip(parents, runs, numbers.tolist(), strict=True):
            above, user = path[parent]
            path[number] = (above + run, user)
            for end in range(1, len(run) + 1):
                expected = full_pass(model, prompts[user] + above + run[:end])
                torch.testing.assert_close(next(rows), expected, atol=SCORE_ATOL, rtol=SCORE_RTOL)

    expected = torch.stack([full_pass(model, prompt) for prompt in prompts])
    torch.testing.assert_close(first, expected, atol=SCORE_ATOL, rtol=SCORE_RTOL)


@torch.no_grad()
def full_pass(model, tokens):
    return model(torch.tensor([tokens])).logits[0, -1]


def test_the_model_attends_as_before_after_a_search():
    model, prompt = tiny_model(), random_prompts(1)[0]
    before = full_pass(model, prompt)
    trie = build_trie(random_items(30))
    found_lists(model, [prompt], trie, random_weights(trie), 4, 0.0)
    assert model.config._attn_implementation == "sdpa" and torch.equal(
        full_pass(model, prompt), before
    )


@pytest.mark.parametrize("window", [2, 5, 14])
def test_windows_shorter_than_prompt_or_path(window):
    model, prompts = tiny_model("mistral", sliding_window=window), random_prompts(3)
    items = random_items(30)
    trie = build_trie(items)
    weights = random_weights(trie)
    found = found_lists(model, prompts, trie, weights, 4, 0.0)
    for user, prompt in enumerate(prompts):
        assert_same_lists(
            found[user], plain_search(model, prompt, items, weight_by_path(trie, weights), 4, 0.0)
        )


def test_a_small_pass_budget_changes_no_list():
    model, trie, prompts = tiny_model(), build_trie(random_items(60)), random_prompts(5)
    scoring = scoring_of(random_weights(trie), alphas=(0.0, 1.0))
    large = run_search(model, prompts, trie, scoring, 4)
    small = run_search(model, prompts, trie, scoring, 4, limits=Limits(pass_positions=4))
    assert torch.equal(large.leaves, small.leaves) and torch.equal(
        large.counts["positions"], small.counts["positions"]
    )
    assert small.counts["passes"].sum() > large.counts["passes"].sum()


def test_forced_chains_take_fewer_passes_than_tokens():
    items = [(a, *range(10, 14), b, EOS) for a in (1, 2) for b in (3, 4)]
    result = run_search(
        tiny_model(), random_prompts(2), build_trie(items), scoring_of(np.ones(19, np.float32)), 4
    )
    # First a with its forced tokens, then b. The EOS behind b needs no pass of its own.
    assert result.counts["passes"].tolist() == [2, 2]
    assert result.counts["positions"].tolist() == [2 * 5 + 4] * 2
    assert result.counts["token_steps"].tolist() == [6, 6]


def test_ranks_that_have_ended_keep_making_passes_while_another_goes_on():
    model, trie = tiny_model(), build_trie(random_items(30))
    weights = random_weights(trie)
    own, answers = [], itertools.chain([True] * 12, itertools.repeat(False))

    def any_rank(flag: bool) -> bool:
        own.append(flag)
        return next(answers) or flag

    alone = found_lists(model, random_prompts(2), trie, weights, 4, 0.0)
    assert found_lists(model, random_prompts(2), trie, weights, 4, 0.0, any_rank=any_rank) == alone
    assert len(own) == 13 and own[0] and not any(own[8:])  # the longest item has 8 tokens


def test_ties_follow_the_order_of_tokens():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)  # every token has the same probability
    items = [(5, EOS), (4, EOS), (3, EOS), (2, 9, EOS), (2, 8, EOS)]
    found = found_lists(
        model, random_prompts(2), build_trie(items), np.ones(12, np.float32), 5, 0.0
    )
    expected = [(3, EOS), (4, EOS), (5, EOS), (2, 8, EOS), (2, 9, EOS)]
    for ranked in found:
        assert [path for _, path in ranked] == expected


def test_bf16_models_get_fp32_scores():
    model, prompts, items = tiny_model().bfloat16(), random_prompts(2), random_items(12)
    trie = build_trie(items)
    weights = random_weights(trie)
    for user, ranked in enumerate(found_lists(model, prompts, trie, weights, 12, 0.0)):
        for score, path in ranked:
            weight = [weight_by_path(trie, weights)[path[: t + 1]] for t in range(len(path))]
            # The same bf16 arithmetic in another order differs by some bf16 steps (0.4 % each).
            assert score == pytest.approx(
                np.dot(weight, token_logprobs(model, prompts[user], path)), rel=0.02, abs=0.2
            )


def test_bad_input_is_refused():
    trie = build_trie(random_items(20))
    model = tiny_model()
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(UsageError, match="NaN"):
        found_lists(model, random_prompts(1), trie, random_weights(trie), 3, 0.0)

    with pytest.raises(UsageError, match="prompt 1 of the batch has no tokens"):
        found_lists(tiny_model(), [[1], []], trie, random_weights(trie), 3, 0.0)

    with pytest.raises(UsageError, match="--pass_positions 2 is less than"):
        run_search(
            tiny_model(),
            random_prompts(1),
            trie,
            scoring_of(random_weights(trie)),
            3,
            limits=Limits(pass_positions=2),
        )

    with pytest.raises(UsageError, match="unknown search 'greedy'; known: beam, exact"):
        run_search(
            tiny_model(),
            random_prompts(1),
            trie,
            scoring_of(random_weights(trie)),
            3,
            method="greedy",
        )


def test_longest_item_under_each_node():
    items = random_items(80, seed=3)
    trie = build_trie(items)
    expected = [
        max(len(item) for item in items if item[: len(path)] == path) for path in node_paths(trie)
    ]
    assert longest_item(trie).tolist() == expected


def test_forced_nodes_follow_without_a_choice():
    items = random_items(80, seed=3)
    trie = build_trie(items)
    paths = node_paths(trie)
    children = {path: [other for other in paths if other[:-1] == path and other] for path in paths}

    def forced(path):
        only = children[path][0] if len(children[path]) == 1 else None
        return 1 + forced(only) if only and children[only] else 0

    search_trie = SearchTrie.build(trie)
    assert (
        search_trie.forced.tolist() == [forced(path) for path in paths]
        and search_trie.forced.max() > 1
    )
    assert search_trie.token.dtype == torch.uint8 and search_trie.child_begin.dtype == torch.int16


def test_best_per_group_ranks_groups_of_all_sizes_with_ties_in_order():
    random = np.random.default_rng(0)
    for limit in (1, 3, 20):
        sizes = random.permutation([0, 1, 2, 3, 5, 20, 21, 64, 65, 1000])
        group = np.repeat(np.arange(10), sizes)
        score = random.integers(0, 30, len(group)).astype(np.float32)  # many ties
        best = best_per_group(group, score, 10, limit)
        for number in range(10):
            own = sorted(
                np.flatnonzero(group == number).tolist(),
                key=lambda index: (-score[index], index),
            )[:limit]
            assert best[number].tolist() == own + [-1] * (limit - len(own))
