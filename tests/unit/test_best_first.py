"""The exact search against scoring every item of the catalogue."""

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
    random_items,
    random_prompts,
    random_weights,
    ranking,
    run_search,
    scoring_of,
    tiny_model,
    weight_by_path,
)

from igd_ds.config.search import Limits
from igd_ds.errors import UsageError
from igd_ds.items.search_trie import SearchTrie
from igd_ds.search.engine import search

on_both_devices = pytest.mark.usefixtures("searched_on")


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.0])
def test_gives_the_true_best_items(length_penalty):
    model, items, prompts = tiny_model(), random_items(150), random_prompts(4)
    trie = build_trie(items)
    weights = random_weights(trie)
    for width in (1, 4, 10):
        result = run_search(
            model,
            prompts,
            trie,
            scoring_of(weights, length_penalty, alphas=(0.5, 1.0)),
            width,
            method="exact",
        )
        assert (result.certified == width).all() and (result.missing_bound == -torch.inf).all()

        for index, alpha in enumerate((0.5, 1.0)):
            weight = weight_by_path(trie, 1 - alpha * (1 - weights))
            found = as_lists(trie, result.leaves[index], result.scores[index])
            for user, prompt in enumerate(prompts):
                assert_same_lists(
                    found[user], ranking(model, prompt, items, weight, length_penalty)[:width]
                )


@on_both_devices
def test_beam_lists_come_along_and_are_worse_or_equal():
    model, prompts = tiny_model(), random_prompts(6)
    trie = build_trie(random_items(200))
    scoring = scoring_of(random_weights(trie))
    exact, beam = (
        run_search(model, prompts, trie, scoring, 3, method=method) for method in ("exact", "beam")
    )
    assert torch.equal(exact.beam_leaves, beam.leaves)
    assert torch.equal(exact.beam_scores, beam.scores)
    assert beam.beam_leaves is None
    assert (beam.certified == 0).all() and (beam.missing_bound == torch.inf).all()
    assert (exact.scores >= beam.scores).all() and (exact.scores > beam.scores).any()


@pytest.mark.parametrize("row_positions", [10, 14, 20, 30, 60])
def test_a_position_budget_certifies_what_it_can(row_positions):
    model, items, prompts = tiny_model(), random_items(200), random_prompts(8)
    trie = build_trie(items)
    weights = random_weights(trie)
    limits = Limits(row_positions=row_positions, pass_positions=64)
    result = run_search(
        model, prompts, trie, scoring_of(weights), 10, method="exact", limits=limits
    )

    weight = weight_by_path(trie, weights)
    found = as_lists(trie, result.leaves[0], result.scores[0])
    for user, prompt in enumerate(prompts):
        truth = ranking(model, prompt, items, weight, 0.0)
        certified, bound = result.certified[0, user].item(), result.missing_bound[0, user].item()
        assert_same_lists(found[user][:certified], truth[:certified])
        assert len(set(found[user])) == 10
        listed = {path for _, path in found[user]}
        missed = [score for score, path in truth if path not in listed]
        rounding = SCORE_ATOL + SCORE_RTOL * abs(missed[0])
        assert certified == 10 or missed[0] <= bound + rounding

    if row_positions == 10:
        assert (result.certified < 10).any()


@on_both_devices
def test_a_catalogue_smaller_than_the_list_is_listed_whole():
    trie = build_trie(random_items(6))
    result = run_search(
        tiny_model(), random_prompts(2), trie, scoring_of(random_weights(trie)), 9, method="exact"
    )
    assert (result.certified == 6).all()
    assert (result.leaves[..., 6:] == -1).all() and (result.leaves[..., :6] > 0).all()


@on_both_devices
def test_scores_are_the_beams_to_the_bit_at_any_penalty():
    model, prompts = tiny_model(), random_prompts(5)
    items = [
        (*(int(t) for t in np.random.default_rng(i).integers(1, 7, 1 + i % 19)), EOS)
        for i in range(80)
    ]
    trie = build_trie(sorted(set(items)))
    for length_penalty in (0.3, 0.7, 2.0):
        result = run_search(
            model,
            prompts,
            trie,
            scoring_of(random_weights(trie), length_penalty),
            6,
            method="exact",
        )

        both = result.leaves[0][:, :, None] == result.beam_leaves[0][:, None, :]
        _, place, beam_place = both.nonzero().T
        user = both.nonzero()[:, 0]
        assert len(user) and torch.equal(
            result.scores[0][user, place], result.beam_scores[0][user, beam_place]
        )


@on_both_devices
def test_ties_do_not_end_the_search_early():
    model = tiny_model()
    # Every token has the same probability, so scores depend on the length alone.
    torch.nn.init.zeros_(model.lm_head.weight)
    items = [(a, EOS) for a in range(1, 9)] + [(9, b, EOS) for b in range(1, 4)]
    trie = build_trie(items)
    result = run_search(
        model,
        random_prompts(2),
        trie,
        scoring_of(np.ones(trie.num_nodes, np.float32)),
        5,
        method="exact",
    )
    assert (result.certified == 5).all()
    for ranked in as_lists(trie, result.leaves[0], result.scores[0]):
        assert all(len(path) == 2 for _, path in ranked)


def test_what_no_prefix_can_bound_is_refused_by_name():
    trie = build_trie(random_items(20))
    scoring = scoring_of(random_weights(trie), name="pooled", pooled=True)
    with pytest.raises(UsageError, match="--decoding_rule pooled depends on which beams are alive"):
        run_search(tiny_model(), random_prompts(1), trie, scoring, 3, method="exact")


class TableTree:
    """A PromptTree of one user whose next-token probabilities are a table over paths."""

    def __init__(self, tokens, probabilities):
        self.tokens, self.probabilities, self.output_tokens = tokens, probabilities, None
        self.prefill([np.array([0])])

    def prefill(self, prompts):
        assert len(prompts) == 1
        self.paths, self.sent = [()], []
        self.prompt_logits = self.logits(())[None]
        return self.prompt_logits

    def logits(self, path):
        row = torch.full((len(self.tokens),), 1e-9)
        for token, probability in self.probabilities.get(path, {}).items():
            row[self.tokens.index(token)] = probability
        return row.log()

    def extend(self, parent, length, ids, keep=None):
        self.sent.append(len(ids))
        rows, at = [], 0
        for above, count in zip(parent.tolist(), length.tolist(), strict=True):
            path = self.paths[above]
            for token in ids[at : at + count].tolist():
                path = (*path, self.tokens[token])
                rows.append(self.logits(path))
            self.paths.append(path)
            at += count
        logits = torch.stack(rows)
        logits = logits if keep is None else logits[keep]
        return logits, torch.arange(len(self.paths) - len(parent), len(self.paths))

    def retain(self, users):
        assert users.tolist() == [0]


def test_the_worked_example_of_the_documentation():
    words = "EOS Super Zelda The Mario Smash Breath Tears Witness Odyssey Bros"
    tokens = words.split()
    probabilities = {
        (): {"Super": 0.40, "Zelda": 0.35, "The": 0.25},
        ("Super",): {"Mario": 0.52, "Smash": 0.48},
        ("Zelda",): {"Breath": 0.5, "Tears": 0.5},
        ("The",): {"Witness": 1.0},
    }
    titles = [
        "Super Mario Odyssey",
        "Super Smash Bros",
        "Zelda Breath",
        "Zelda Tears",
        "The Witness",
    ]
    for title in titles:  # every token that has no choice is certain
        words = [*title.split(), "EOS"]
        for t in range(1, len(words)):
            probabilities.setdefault(tuple(words[:t]), {words[t]: 1.0})
    trie = build_trie(
        [tuple(tokens.index(word) for word in [*title.split(), "EOS"]) for title in titles]
    )
    scoring = scoring_of(np.ones(trie.num_nodes, np.float32))

    def run(method):
        tree = TableTree(tokens, probabilities)
        result = search(tree, SearchTrie.build(trie), scoring, 2, method=method)
        titles_of = {
            int(leaf): title for leaf, title in zip(trie.leaf_of_item, titles, strict=True)
        }
        listed = [titles_of[leaf] for leaf in result.leaves[0, 0].tolist()]
        return listed, result.scores[0, 0].exp().tolist(), tree.sent

    listed, shares, sent = run("beam")
    assert listed == ["Super Mario Odyssey", "Super Smash Bros"]
    assert shares == pytest.approx([0.208, 0.192], rel=1e-5)
    assert sent == [2, 4]  # Super, Zelda; then Mario Odyssey, Smash Bros in one pass

    listed, shares, sent = run("exact")
    assert listed == ["The Witness", "Super Mario Odyssey"]
    assert shares == pytest.approx([0.25, 0.208], rel=1e-5)
    assert sent == [2, 4, 2]  # and The Witness, the only open prefix above 0.192
