"""Scoring options and item filters in both searches, against a score of every item by hand."""

import numpy as np
import pytest
import torch
from oracle import (
    as_lists,
    assert_same_lists,
    build_trie,
    node_paths,
    random_items,
    random_prompts,
    random_weights,
    run_search,
    scoring_of,
    tiny_model,
    weight_by_path,
)

from igd_ds.config.search import ScoringOptions
from igd_ds.contracts import Likelihood
from igd_ds.items.decisiveness import information_gain
from igd_ds.search.filters import Guidance, ItemFilter, ItemRanges
from igd_ds.search.frontier import PerUser
from igd_ds.search.scoring import Scoring

pytestmark = pytest.mark.usefixtures("searched_on")

ITEMS = random_items(60)
COUNTS = np.random.default_rng(1).integers(0, 5, len(ITEMS))
TRIE = build_trie(ITEMS, COUNTS)
PATHS = node_paths(TRIE)
PROMPTS = random_prompts(3)
METHODS = [("beam", len(ITEMS)), ("exact", 7)]  # a beam as wide as the catalogue loses nothing


@torch.no_grad()
def logits_along(model, prompt, path) -> torch.Tensor:
    return model(torch.tensor([[*prompt, *path]])).logits[0, len(prompt) - 1 : -1].float()


def children_of(path):
    return [other[-1] for other in PATHS if len(other) == len(path) + 1 and other[:-1] == path]


def full_logprob(logits, path, t):
    return logits[t].log_softmax(-1)[path[t]].item()


def check(scoring, increment, items=ITEMS, **per_user):
    """Assert that both searches list the best of `items`.

    `items` are those of every user, or a function of the user. Edge t of a path adds
    increment(user, logits, path, t) to its score.
    """
    model = tiny_model()
    for method, width in METHODS:
        result = run_search(
            model, PROMPTS, TRIE, scoring, width, method=method, per_user=PerUser(**per_user)
        )
        assert method == "beam" or (result.certified[0] == (result.leaves[0] >= 0).sum(1)).all()
        for user, found in enumerate(as_lists(TRIE, result.leaves[0], result.scores[0])):
            scores = []
            for path in items(user) if callable(items) else items:
                logits = logits_along(model, PROMPTS[user], path)
                score = sum(increment(user, logits, path, t) for t in range(len(path)))
                scores.append((score, path))
            assert_same_lists(found, sorted(scores, reverse=True)[:width])


def test_temperature_divides_the_logits():
    weights = random_weights(TRIE)
    weight = weight_by_path(TRIE, weights)
    scoring = scoring_of(weights, temperature=2.5)
    check(
        scoring,
        lambda _, logits, path, t: weight[path[: t + 1]] * full_logprob(logits / 2.5, path, t),
    )


def test_masked_softmax_is_over_the_children_alone():
    weights = random_weights(TRIE)
    weight = weight_by_path(TRIE, weights)

    def increment(_, logits, path, t):
        wanted = children_of(path[:t])
        logprob = logits[t][wanted].log_softmax(-1)[wanted.index(path[t])].item()
        return weight[path[: t + 1]] * logprob

    check(scoring_of(weights, masked_softmax=True), increment)


def test_a_model_is_searched_with_the_likelihood_that_it_was_trained_with():
    """`msl` trains the masked softmax of logits / τ; no option has to repeat that."""
    scoring = Scoring.build(
        TRIE,
        information_gain(TRIE, "prior"),
        ScoringOptions(),
        likelihood=Likelihood(softmax="masked", temperature=2.5),
    )

    def increment(_, logits, path, t):
        wanted = children_of(path[:t])
        return (logits[t][wanted] / 2.5).log_softmax(-1)[wanted.index(path[t])].item()

    check(scoring, increment)


def test_popularity_prior_adds_the_leafs_share_of_all_targets():
    options = ScoringOptions(alpha=(0.0,), popularity_prior=0.5)
    scoring = Scoring.build(TRIE, information_gain(TRIE, "prior"), options)
    share = {
        path: 0.5 * np.log((count + 1) / (COUNTS.sum() + len(ITEMS)))
        for path, count in zip(ITEMS, COUNTS, strict=True)
    }
    check(
        scoring, lambda _, logits, path, t: full_logprob(logits, path, t) + share[path] / len(path)
    )


def test_guidance_adds_the_second_scorers_probability_of_the_item():
    q = np.random.default_rng(2).gamma(0.3, size=(len(PROMPTS), len(ITEMS)))
    q[1, :30] = 0  # items without guidance mass cannot be listed
    q /= q.sum(1, keepdims=True)
    guidance = Guidance.build(ItemRanges.build(TRIE), q, weight=1.5)
    item = {path: index for index, path in enumerate(ITEMS)}

    def increment(user, logits, path, t):
        return full_logprob(logits, path, t) + 1.5 * np.log(q[user, item[path]]) / len(path)

    def possible(user):
        return [path for path in ITEMS if q[user, item[path]] > 0]

    check(scoring_of(np.ones(TRIE.num_nodes, np.float32)), increment, possible, guidance=guidance)


def test_filters_leave_out_what_a_user_may_not_get_and_change_nothing_else():
    weights = random_weights(TRIE)
    weight = weight_by_path(TRIE, weights)
    allow, deny = [[3, 9, 11, 40], None, None], [None, list(range(0, 60, 2)), None]
    item_filter = ItemFilter.build(ItemRanges.build(TRIE), 3, allow, deny)
    allowed = [[ITEMS[item] for item in allow[0]], ITEMS[1::2], ITEMS]

    def increment(_, logits, path, t):
        return weight[path[: t + 1]] * full_logprob(logits, path, t)

    check(scoring_of(weights), increment, lambda user: allowed[user], item_filter=item_filter)


@pytest.mark.parametrize("num_beams", [2, 5])
def test_pooled_normalises_over_all_children_of_a_steps_beams(num_beams):
    gain = information_gain(TRIE, "prior")
    scoring = Scoring.build(TRIE, gain, ScoringOptions(decoding_rule="pooled", alpha=(0.5,)))
    gain_of = dict(zip(PATHS, gain, strict=True))
    warm = dict(zip(PATHS, TRIE.train_count > 0, strict=True))

    model = tiny_model()
    result = run_search(model, PROMPTS, TRIE, scoring, num_beams)
    for prompt, found in zip(
        PROMPTS, as_lists(TRIE, result.leaves[0], result.scores[0]), strict=True
    ):
        live, done = [(0.0, ())], []
        while live:
            edges = [
                (score, (*prefix, token)) for score, prefix in live for token in children_of(prefix)
            ]
            gains = [gain_of[path] for _, path in edges if warm[path]]
            low, high = min(gains, default=0), max(gains, default=0)

            candidates = []
            for score, path in edges:
                normalised = (
                    (gain_of[path] - low) / (high - low) if warm[path] and high > low else 0
                )
                logprob = full_logprob(logits_along(model, prompt, path), path, len(path) - 1)
                candidates.append((score + (1 - 0.5 * normalised) * logprob, path))

            candidates = sorted(candidates, reverse=True)[: 2 * num_beams]
            done = sorted(
                done + [c for c in candidates[:num_beams] if c[1] in ITEMS], reverse=True
            )[:num_beams]
            live = [c for c in candidates if c[1] not in ITEMS][:num_beams]
            if len(done) == num_beams and all(score <= done[-1][0] for score, _ in live):
                break
        assert_same_lists(found, done)
