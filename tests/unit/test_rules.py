"""Decoding weights against Eq. 8 and 9, written as loops over siblings; more about a Scoring."""

import numpy as np
import pytest
from oracle import build_trie, node_paths, random_items

from igd_ds.config.search import ScoringOptions
from igd_ds.contracts import Likelihood
from igd_ds.errors import UsageError
from igd_ds.items.decisiveness import information_gain
from igd_ds.search.scoring import DECODING_RULES, Scoring, edge_weights, popularity_logshare

PER_EDGE = [name for name, rule in DECODING_RULES.items() if not rule.per_step]


def catalogue(seed=1):
    items = random_items(60)
    counts = np.random.default_rng(seed).integers(0, 4, len(items))
    trie = build_trie(items, counts)
    return trie, information_gain(trie, "prior")


@pytest.mark.parametrize("rule", PER_EDGE)
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_weights_of_every_edge(rule, alpha):
    trie, gain = catalogue()
    weights = edge_weights(trie, gain, rule, alpha)
    assert weights.dtype == np.float32 and len(weights) == trie.num_nodes
    assert (trie.train_count[1:] == 0).any()  # cold edges are there
    for node in range(trie.num_nodes):
        children = range(trie.child_begin[node], trie.child_begin[node + 1])
        ranked = [c for c in children if rule == "raw" or trie.train_count[c] > 0]
        for child in children:
            normalised = 0.0
            if child in ranked:
                low, high = min(gain[c] for c in ranked), max(gain[c] for c in ranked)
                if high - low > 1e-12:
                    normalised = (gain[child] - low) / (
                        high - low + (1e-7 if rule == "reference" else 0)
                    )
            assert weights[child] == pytest.approx(1 - alpha * normalised, abs=1e-6)


def test_cold_edges_are_never_favoured_by_default():
    trie, gain = catalogue()
    cold = np.flatnonzero(np.asarray(trie.train_count) == 0)
    cold = cold[cold > 0]
    assert (edge_weights(trie, gain, "per-node", 0.4)[cold] == 1).all()
    assert (edge_weights(trie, gain, "raw", 0.4)[cold] < 1).any()


def test_bad_input_names_what_is_known():
    trie, gain = catalogue()
    with pytest.raises(UsageError, match="per-node"):
        edge_weights(trie, gain, "pernode", 0.1)
    with pytest.raises(UsageError, match=r"alpha must lie in \[0, 1\], found 1.5"):
        edge_weights(trie, gain, "per-node", 1.5)
    with pytest.raises(UsageError, match="'pooled' has no weight per edge"):
        edge_weights(trie, gain, "pooled", 0.1)


@pytest.mark.parametrize("rule", PER_EDGE)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scoring_gives_the_same_weights(rule, dtype):
    """fp32 in the search against fp64 rounded at the end: one unit in the last place of 1."""
    trie, gain = catalogue()
    gain = gain.astype(dtype)
    alphas = (0.0, 0.1, 0.2, 0.3, 0.4, 0.7, 1.0)
    scoring = Scoring.build(trie, gain, ScoringOptions(decoding_rule=rule, alpha=alphas))
    assert (scoring.name, scoring.alphas, scoring.pooled) == (rule, alphas, False)
    scoring.refuse_exact()  # raises nothing
    child = np.tile(np.arange(1, trie.num_nodes), len(alphas))
    alpha = np.repeat(np.array(alphas, np.float32), trie.num_nodes - 1)
    weights = scoring.weights(alpha, child)
    assert weights.dtype == np.float32
    assert (weights >= 0).all() and (weights <= 1).all()
    for alpha, found in zip(alphas, weights.reshape(len(alphas), -1), strict=True):
        expected = edge_weights(trie, gain, rule, alpha)[1:]
        np.testing.assert_allclose(found, expected, rtol=0, atol=np.spacing(np.float32(1)))
        assert (found[expected == 1] == 1).all()  # α = 0 and undecisive edges: log p untouched


def pooled_scoring(sign=1):
    trie, gain = catalogue()
    return (
        trie,
        sign * gain,
        Scoring.build(trie, sign * gain, ScoringOptions(decoding_rule="pooled")),
    )


@pytest.mark.parametrize("sign", [1, -1])  # conditional gains can be negative
def test_pooled_weights_of_three_steps(sign):
    """Pairs with beams at two to four nodes, each at its own α, the edges of all pairs shuffled."""
    trie, gain, scoring = pooled_scoring(sign)
    assert scoring.pooled

    children = [range(trie.child_begin[n], trie.child_begin[n + 1]) for n in range(trie.num_nodes)]
    branching = [n for n in range(trie.num_nodes) if len(children[n]) > 1]
    steps = {0: branching[:4], 2: branching[4:7], 3: branching[1:3]}  # pair 1 has no beam
    alphas = {0: 0.3, 2: 1.0, 3: 0.0}
    edges = [
        (pair, child) for pair, nodes in steps.items() for node in nodes for child in children[node]
    ]
    edges = [edges[i] for i in np.random.default_rng(0).permutation(len(edges))]

    pair, child = np.array(edges).T
    alpha = np.array([alphas[pair] for pair, _ in edges], np.float32)
    weights = scoring.pooled_weights(alpha, child, pair, 5)
    assert weights.dtype == np.float32

    cold = 0
    for (pair, child), found in zip(edges, weights.tolist(), strict=True):
        warm = [gain[c] for other, c in edges if other == pair and trie.train_count[c] > 0]
        normalised = (
            (gain[child] - min(warm)) / (max(warm) - min(warm)) if trie.train_count[child] else 0.0
        )
        assert found == pytest.approx(1 - alphas[pair] * normalised, abs=2e-6)
        assert 0 <= found <= 1
        cold += trie.train_count[child] == 0
    assert cold


def test_pooled_over_the_children_of_one_node_is_per_node():
    trie, gain, scoring = pooled_scoring()
    child, alpha = np.arange(1, trie.num_nodes), np.full(trie.num_nodes - 1, 0.4, np.float32)
    weights = scoring.pooled_weights(alpha, child, trie.parent[1:], trie.num_nodes)
    np.testing.assert_allclose(weights, edge_weights(trie, gain, "per-node", 0.4)[1:], atol=2e-6)


def test_pooled_weighs_equal_gains_and_cold_edges_with_one():
    items = [(1, 2, 0), (1, 3, 0), (4, 2, 0), (4, 3, 0), (5, 2, 0), (5, 3, 0)]
    # 1 and 4 gain the same; 5 and everything below it is cold.
    trie = build_trie(items, [3, 4, 4, 3, 0, 0])

    paths = node_paths(trie)
    gain = information_gain(trie)
    one, four = paths.index((1,)), paths.index((4,))
    # As if the counts had been summed in another order.
    gain[four] = np.nextafter(np.float32(gain[one]), np.float32(np.inf))

    scoring = Scoring.build(trie, gain, ScoringOptions(decoding_rule="pooled", alpha=(1.0,)))
    child = np.array([paths.index(path) for path in [(1,), (4,), (5,), (5, 2), (5, 3)]])
    pair, alpha = np.array([0, 0, 0, 1, 1]), np.ones(5, np.float32)
    assert scoring.pooled_weights(alpha, child, pair, 2).tolist() == [1.0] * 5

    # Against warm edges of another gain the same two edges are decisive, and the cold one is not.
    child = np.array([paths.index(path) for path in [(1,), (4,), (5,), (1, 2)]])
    weights = scoring.pooled_weights(alpha[:4], child, np.zeros(4, np.int64), 1).tolist()
    assert weights[2] == 1 and min(weights) == 0
    assert weights[0] == pytest.approx(weights[1], abs=1e-6)


def test_pooled_cannot_be_proved():
    with pytest.raises(UsageError, match="--decoding_rule pooled"):
        pooled_scoring()[2].refuse_exact()


def test_popularity_prior_splits_the_items_shares_over_their_tokens():
    items = random_items(60)
    items += items[:15]  # shared leaves
    counts = np.random.default_rng(2).integers(0, 4, len(items))
    trie = build_trie(items, counts)
    logshare = popularity_logshare(trie)
    assert (logshare <= 0).all() and logshare[0] == 0

    paths = node_paths(trie)
    mass = [
        sum(int(n) + 1 for item, n in zip(items, counts, strict=True) if item[: len(path)] == path)
        for path in paths
    ]
    for node in range(1, trie.num_nodes):
        assert logshare[node] == pytest.approx(
            np.log(mass[node] / mass[trie.parent[node]]), abs=1e-12
        )

    leaf_shares = [
        np.exp(sum(logshare[paths.index(paths[leaf][:t])] for t in range(1, len(paths[leaf]) + 1)))
        for leaf in np.flatnonzero(trie.is_leaf)
    ]
    assert sum(leaf_shares) == pytest.approx(1)

    scoring = Scoring.build(trie, information_gain(trie), ScoringOptions(popularity_prior=0.7))
    assert scoring.prior.dtype == np.float32 and (scoring.prior <= 0).all()
    np.testing.assert_allclose(scoring.prior, 0.7 * logshare, rtol=1e-6)


def test_counts_near_the_largest_int32_do_not_overflow_the_prior():
    trie = build_trie([(1, 0), (2, 0)], [2**31 - 2, 0])
    assert trie.train_count.dtype == np.int32
    np.testing.assert_allclose(
        popularity_logshare(trie)[1:], np.log([1 - 2**-31, 2**-31, 1, 1]), rtol=1e-6, atol=1e-12
    )


def softmax_of(scoring: Scoring) -> tuple[bool, float]:
    return scoring.masked_softmax, scoring.temperature


def test_options_reach_the_search():
    trie, gain = catalogue()
    default = Scoring.build(trie, gain, ScoringOptions())
    assert softmax_of(default) == (False, 1.0)
    assert (default.length_penalty, default.alphas, default.prior) == (0.0, (0.0,), None)
    options = ScoringOptions(softmax="masked", temperature=0.6, length_penalty=1.0)
    other = Scoring.build(trie, gain, options)
    assert softmax_of(other) == (True, 0.6) and other.length_penalty == 1.0


def test_softmax_and_temperature_are_those_of_the_training_unless_given():
    trie, gain = catalogue()
    trained = Likelihood(softmax="masked", temperature=4.5)

    def build(**options):
        return Scoring.build(trie, gain, ScoringOptions(**options), likelihood=trained)

    assert softmax_of(build()) == (True, 4.5)
    assert softmax_of(build(softmax="full")) == (False, 4.5)
    assert softmax_of(build(temperature=1.0)) == (True, 1.0)
    assert softmax_of(build(softmax="masked", temperature=0.5)) == (True, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": (0.1, 1.5)}, r"--alpha must lie in \[0, 1\], found 1.5"),
        ({"alpha": (float("nan"),)}, "--alpha must lie"),
        ({"alpha": ()}, "--alpha needs at least one value"),
        ({"alpha": (0.1, 0.1)}, "--alpha .* none twice"),
        ({"decoding_rule": "pool"}, "unknown --decoding_rule 'pool', did you mean 'pooled'"),
        ({"softmax": "mask"}, "unknown --softmax 'mask', did you mean 'masked'"),
        ({"temperature": 0.0}, "--temperature must be positive"),
        ({"temperature": float("inf")}, "--temperature must be positive and finite"),
        ({"popularity_prior": -0.1}, "--popularity_prior must not be negative"),
        ({"length_penalty": -1.0}, "--length_penalty must not be negative"),
        ({"length_penalty": float("nan")}, "--length_penalty must not be negative"),
    ],
)
def test_bad_options_are_named(options, message):
    trie, gain = catalogue()
    with pytest.raises(UsageError, match=message):
        Scoring.build(trie, gain, ScoringOptions(**options))
