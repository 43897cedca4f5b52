"""Search under the softmax masked to the trie: item probabilities, proofs, and what is sent."""

import numpy as np
import oracle
import pytest
import torch
from oracle import (
    EOS,
    VOCABULARY,
    as_lists,
    assert_same_lists,
    build_trie,
    node_paths,
    plain_search,
    random_items,
    random_prompts,
    random_weights,
    run_search,
    scoring_of,
    tiny_model,
    tiny_t5,
    weight_by_path,
)
from peft import LoraConfig, get_peft_model

from igd_ds.backbones import backbone_of
from igd_ds.config.search import Limits
from igd_ds.items.search_trie import SearchTrie
from igd_ds.search import best_first
from igd_ds.search.engine import search, stream
from igd_ds.search.filters import ItemFilter, ItemRanges
from igd_ds.search.frontier import PerUser
from igd_ds.search.likelihood import leaf_logprobs

on_both_devices = pytest.mark.usefixtures("searched_on")


def masked(trie, temperature: float = 1.0, **options):
    """Return a Scoring under which scores are log-probabilities of items."""
    weights = np.ones(trie.num_nodes, np.float32)
    options = {"alphas": (0.0,), "temperature": temperature} | options
    return scoring_of(weights, masked_softmax=True, **options)


@torch.no_grad()
def item_probabilities(model, prompt, items, temperature: float = 1.0) -> dict:
    """Return path → p(item | prompt) in fp64: a pass per item, a softmax of siblings per token."""
    siblings: dict = {}
    for path in items:
        for t, token in enumerate(path):
            siblings.setdefault(path[:t], set()).add(token)
    probabilities = {}
    for path in items:
        logits = logits_behind(model, prompt, path).double() / temperature
        logprob = 0.0
        for t, token in enumerate(path):
            legal = sorted(siblings[path[:t]])
            logprob += logits[t, legal].log_softmax(-1)[legal.index(token)].item()
        probabilities[path] = np.exp(logprob)
    return probabilities


def logits_behind(model, prompt, path) -> torch.Tensor:
    """Return the logits that predict each token of `path`, (tokens, V)."""
    if model.config.is_encoder_decoder:
        decoder = torch.tensor([[model.config.decoder_start_token_id, *path[:-1]]])
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]
    return model(torch.tensor([[*prompt, *path]])).logits[0, len(prompt) - 1 : -1]


def with_lora_head():
    """A model whose output layer has an adapter that is not zero."""
    model = get_peft_model(
        tiny_model(tie_word_embeddings=False), LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


MODELS = {
    "qwen2": tiny_model,
    "softcap": lambda: tiny_model(
        "gemma2", attention="eager", final_logit_softcapping=3.0, head_dim=8
    ),
    "lora on the output layer": with_lora_head,
    "no tree attention": lambda: tiny_model("gpt2", n_embd=32, n_layer=2, n_head=4),
    "t5": tiny_t5,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_whole_catalogue_has_probability_one(name, temperature):
    model, items, prompts = MODELS[name](), random_items(30), random_prompts(2)
    trie = build_trie(items)
    result = run_search(model, prompts, trie, masked(trie, temperature), len(items), method="exact")
    assert (result.certified == len(items)).all()
    total = result.scores[0].double().exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-6, atol=0)

    for user, found in enumerate(as_lists(trie, result.leaves[0], result.scores[0])):
        truth = item_probabilities(model, prompts[user], items, temperature)
        assert_same_lists(found, ranked(truth))


def ranked(probabilities: dict) -> list:
    """Return [(log p, path)], best first."""
    return sorted(((float(np.log(p)), path) for path, p in probabilities.items()), reverse=True)


@on_both_devices
@pytest.mark.parametrize("width", [1, 3, 10])
def test_the_exact_list_is_proven_and_reads_only_what_a_proof_needs(width, monkeypatch):
    monkeypatch.setattr(best_first, "EARLY", 1.0)
    model, items, prompts = tiny_model(), random_items(150), random_prompts(4)
    trie = build_trie(items)
    result = run_search(model, prompts, trie, masked(trie), width, method="exact")
    assert (result.certified == width).all() and (result.missing_bound == -torch.inf).all()
    assert result.beam_leaves is None and "token_steps" not in result.counts

    for user, found in enumerate(as_lists(trie, result.leaves[0], result.scores[0])):
        truth = item_probabilities(model, prompts[user], items)
        assert_same_lists(found, ranked(truth)[:width])
        assert result.counts["positions"][user] == needed_positions(items, truth, width)


def test_reading_early_saves_passes_and_finds_the_same_lists(monkeypatch):
    model, prompts, trie = tiny_model(), random_prompts(6), build_trie(random_items(200))
    early = run_search(model, prompts, trie, masked(trie), 10, method="exact")
    monkeypatch.setattr(best_first, "EARLY", 1.0)
    late = run_search(model, prompts, trie, masked(trie), 10, method="exact")
    assert torch.equal(early.leaves, late.leaves) and torch.equal(early.certified, late.certified)
    assert early.counts["passes"].sum() < late.counts["passes"].sum()
    assert late.counts["positions"].sum() <= early.counts["positions"].sum()
    assert early.counts["positions"].sum() <= 1.5 * late.counts["positions"].sum()


def needed_positions(items, probabilities: dict, width: int) -> int:
    """Return how many tokens every proof of the best `width` items has to read.

    These are the prefixes that branch, or lead to one that branches, with more mass than the last
    item of the list. The root is the prompt's.
    """
    last = sorted(probabilities.values(), reverse=True)[width - 1]
    mass: dict = {}
    below: dict = {}
    for path in items:
        for t in range(1, len(path)):
            mass[path[:t]] = mass.get(path[:t], 0.0) + probabilities[path]
            below.setdefault(path[:t], []).append(path)
    needed = set()
    for prefix, paths in below.items():
        has_choice = len({path[len(prefix)] for path in paths}) > 1
        if has_choice and mass[prefix] > last * (1 + 1e-6):
            needed |= {prefix[:t] for t in range(1, len(prefix) + 1)}
    return len(needed)


@on_both_devices
def test_beam_lists_are_those_of_a_plain_search_and_forced_tails_are_not_sent(monkeypatch):
    """Tails of 20 tokens behind each item change neither the lists nor what the model reads."""
    model, items, prompts = tiny_model(), random_items(80), random_prompts(3)
    tail = tuple(range(10, 30))
    longer = [(*path, *tail) for path in items]
    found = {}
    for name, paths in {"short": items, "long": longer}.items():
        trie = build_trie(paths)
        for method in ("beam", "exact"):
            result = run_search(model, prompts, trie, masked(trie), 5, method=method)
            found[name, method] = result
    for method in ("beam", "exact"):
        short, long = found["short", method], found["long", method]
        torch.testing.assert_close(short.scores, long.scores)
    assert torch.equal(short.counts["positions"], long.counts["positions"])
    assert torch.equal(short.counts["passes"], long.counts["passes"])
    # A beam search, which compares token by token, may go on while tails are compared.
    by_beam = found["long", "beam"].counts
    assert (4 * by_beam["positions"] < by_beam["beam_positions"]).all()

    # Behind a prefix the masked softmax gives each child the share of the prefix's mass.
    mass = [prefix_mass(items, item_probabilities(model, prompt, items)) for prompt in prompts]

    def token_logprobs(_, prompt, path):
        of_prompt = mass[prompts.index(prompt)]
        return [np.log(of_prompt[path] / of_prompt[path[:-1]])]

    monkeypatch.setattr(oracle, "token_logprobs", token_logprobs)
    trie, short = build_trie(items), found["short", "beam"]
    weights = dict.fromkeys(node_paths(trie), 1.0)
    lists = as_lists(trie, short.leaves[0], short.scores[0])
    for prompt, listed in zip(prompts, lists, strict=True):
        assert_same_lists(listed, plain_search(model, prompt, items, weights, 5, 0.0))


def prefix_mass(items, probabilities: dict) -> dict:
    """Return the sum of the probabilities of the items under each prefix, items included."""
    mass: dict = {}
    for path in items:
        for t in range(len(path) + 1):
            mass[path[:t]] = mass.get(path[:t], 0.0) + probabilities[path]
    return mass


@on_both_devices
def test_a_filter_keeps_probabilities_or_renormalises_on_request():
    model, items, prompts = tiny_model(), random_items(40), random_prompts(2)
    trie = build_trie(items)
    denied = [[0, 5, 11], list(range(20))]
    per_user = PerUser(ItemFilter.build(ItemRanges.build(trie), 2, deny=denied))
    kept, renormalised = (
        run_search(
            model,
            prompts,
            trie,
            masked(trie, renormalise=renormalise),
            len(items),
            method="exact",
            per_user=per_user,
        )
        for renormalise in (False, True)
    )
    lists = as_lists(trie, kept.leaves[0], kept.scores[0])
    for user, listed in enumerate(lists):
        truth = item_probabilities(model, prompts[user], items)
        allowed = {path: truth[path] for i, path in enumerate(items) if i not in denied[user]}
        assert_same_lists(listed, ranked(allowed))
    total = renormalised.scores[0].double().exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-6, atol=0)


@pytest.mark.parametrize("row_positions", [10, 20, 60])
def test_a_list_is_full_also_where_the_limit_comes_before_the_tenth_item(row_positions):
    # Every path has choices to its end, and all items are about equally probable.
    items = [(*(1 + token for token in path), EOS) for path in np.ndindex(5, 5, 5, 5)]
    model, prompts, trie = tiny_model(), random_prompts(2), build_trie(items)
    limits = Limits(row_positions=row_positions, pass_positions=64)
    scoring = masked(trie, temperature=50.0)
    result = run_search(model, prompts, trie, scoring, 10, method="exact", limits=limits)

    assert (result.leaves >= 0).all() and (result.certified < 10).any()
    found = as_lists(trie, result.leaves[0], result.scores[0])
    for user, prompt in enumerate(prompts):
        truth = ranked(item_probabilities(model, prompt, items, temperature=50.0))
        certified, bound = result.certified[0, user].item(), result.missing_bound[0, user].item()
        assert_same_lists(found[user][:certified], truth[:certified])
        listed = {path for _, path in found[user]}
        assert len(listed) == 10
        assert max(score for score, path in truth if path not in listed) <= bound + 1e-5


def test_a_search_stops_at_the_wanted_coverage():
    model, items, prompts = tiny_model(), random_items(150), random_prompts(4)
    trie = build_trie(items)
    whole, part = (
        run_search(
            model, prompts, trie, masked(trie), 100, method="exact", limits=Limits(coverage=share)
        )
        for share in (1.0, 0.5)
    )
    assert (part.counts["positions"] < whole.counts["positions"]).all()
    assert (part.scores[0].exp().sum(1) >= 0.5).all()
    for user in range(4):
        certified = part.certified[0, user]
        assert certified < 100
        assert torch.equal(part.leaves[0, user, :certified], whole.leaves[0, user, :certified])
        listed = set(part.leaves[0, user].tolist())
        missed = [p for p, leaf in zip(*whole_list(whole, user), strict=True) if leaf not in listed]
        assert max(missed) <= part.missing_bound[0, user]


def whole_list(result, user):
    """Return the scores and leaves of a user's list."""
    return result.scores[0, user].tolist(), result.leaves[0, user].tolist()


@pytest.mark.parametrize(("alpha", "penalty"), [(0.5, 0.0), (0.0, 0.7)])
def test_weighted_scores_are_no_probabilities_and_still_proven(alpha, penalty):
    model, items, prompts = tiny_model(), random_items(150), random_prompts(3)
    trie = build_trie(items)
    weights = random_weights(trie)
    scoring = scoring_of(weights, penalty, alphas=(alpha,), masked_softmax=True)
    assert not scoring.is_probability
    result = run_search(model, prompts, trie, scoring, 5, method="exact")
    assert (result.certified == 5).all() and result.beam_leaves is not None

    weight = weight_by_path(trie, 1 - alpha * (1 - weights))
    for user, found in enumerate(as_lists(trie, result.leaves[0], result.scores[0])):
        mass = prefix_mass(items, item_probabilities(model, prompts[user], items))
        scores = {
            path: sum(
                weight[path[:t]] * np.log(mass[path[:t]] / mass[path[: t - 1]])
                for t in range(1, len(path) + 1)
            )
            / len(path) ** penalty
            for path in items
        }
        assert_same_lists(found, sorted(((s, p) for p, s in scores.items()), reverse=True)[:5])


def test_a_stream_yields_the_catalogue_in_order_and_reads_as_little_as_the_list():
    model, items, (prompt,) = tiny_model(), random_items(60), random_prompts(1)
    trie = build_trie(items)
    search_trie, scoring = SearchTrie.build(trie), masked(trie)
    tree = backbone_of(model.config).prompt_tree(model, scoring.output_tokens(search_trie))
    tree.prefill([np.array(prompt)])
    found = [leaf for proven in stream(tree, search_trie, scoring) for leaf in proven]
    paths = node_paths(trie)
    truth = ranked(item_probabilities(model, prompt, items))
    assert_same_lists([(leaf.score, paths[leaf.leaf]) for leaf in found], truth)


def test_only_the_catalogues_rows_of_the_output_layer_are_multiplied():
    model, prompts = tiny_model(), random_prompts(2)
    items = [(path[0], 30, 31, *path[1:]) for path in random_items(40)]
    trie = build_trie(items)
    search_trie, scoring = SearchTrie.build(trie), masked(trie)
    tokens = scoring.output_tokens(search_trie)
    assert tokens.tolist() == sorted({token for path in items for token in path})
    tree = backbone_of(model.config).prompt_tree(model, tokens)
    widths = []
    model.lm_head.register_forward_hook(lambda *call: widths.append(call[2].shape))
    assert tree.prefill([np.array(prompt) for prompt in prompts]).shape == (2, len(tokens))
    result = search(tree, search_trie, scoring, 5, "exact")
    assert {shape[-1] for shape in widths} == {len(tokens)} and len(tokens) < VOCABULARY

    # Logits are computed behind branching tokens alone, and the layer is whole afterwards.
    rows = sum(shape[-2] for shape in widths[1:])
    assert rows < result.counts["positions"].sum()
    assert model(torch.tensor([[1, 2]])).logits.shape[-1] == VOCABULARY


@pytest.mark.parametrize("pass_positions", [1, 20, 512])
def test_the_likelihood_of_given_items_keeps_to_the_bound_of_a_pass(pass_positions):
    model, items, prompts = tiny_model(), random_items(40), random_prompts(5)
    trie = build_trie(items)
    search_trie, targets = SearchTrie.build(trie), np.array([3, 0, 17, 39, 8])
    sent = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: sent.append(given["input_ids"].numel()), with_kwargs=True
    )
    for scoring in (masked(trie), scoring_of(np.ones(trie.num_nodes, np.float32))):
        tree = backbone_of(model.config).prompt_tree(model, scoring.output_tokens(search_trie))
        tree.prefill([np.array(prompt) for prompt in prompts])
        sent.clear()
        leaves = trie.leaf_of_item[targets]
        found = leaf_logprobs(tree, search_trie, scoring, leaves, pass_positions)
        assert max(sent) <= max(pass_positions, max(map(len, items)))
        assert (len(sent) > 1) == (pass_positions < 512)

        for value, prompt, target in zip(found.tolist(), prompts, targets, strict=True):
            if scoring.masked_softmax:
                expected = np.log(item_probabilities(model, prompt, items)[items[target]])
            else:
                expected = sum(oracle.token_logprobs(model, prompt, items[target]))
            assert value == pytest.approx(expected, rel=oracle.SCORE_RTOL, abs=oracle.SCORE_ATOL)
