"""Every measure against its definition, in plain Python over lists of items, with math.fsum."""

import math
from itertools import pairwise

import numpy as np
import pytest
from test_trie import CASES, EOS, brute_force, ragged

from igd_ds.errors import UsageError
from igd_ds.items import decisiveness
from igd_ds.items.trie import TokenTrie


class Definitions:
    """The papers' formulas for one catalogue, from its items alone; prefixes are tuples."""

    def __init__(self, paths, counts):
        self.paths, self.counts = paths, [int(c) for c in counts]
        self.prefixes, self.items = brute_force(paths)
        self.total = sum(self.counts)
        self.number = {prefix: n for n, prefix in enumerate(self.prefixes)}

    def mass(self, prefix):
        return sum(self.counts[i] for i in self.items[prefix])

    def leaves(self, prefix):
        """Counts of the distinct paths under a prefix."""
        merged = {}
        for i in self.items[prefix]:
            key = tuple(self.paths[i])
            merged[key] = merged.get(key, 0) + self.counts[i]
        return merged

    def prior(self, prefix):
        return math.fsum(
            -n / self.total * math.log(n / self.total) for n in self.leaves(prefix).values() if n
        )

    def conditional(self, prefix):
        mass = self.mass(prefix)
        return math.fsum(-n / mass * math.log(n / mass) for n in self.leaves(prefix).values() if n)

    def gini(self, prefix):
        mass = self.mass(prefix)
        return 1 - math.fsum((n / mass) ** 2 for n in self.leaves(prefix).values()) if mass else 0.0

    def purity(self, prefix):
        items, mass = self.items[prefix], self.mass(prefix)
        if len(items) == 1:
            return 1.0
        entropy = math.fsum(
            -c / mass * math.log(c / mass) for c in (self.counts[i] for i in items) if c
        )
        return 1 - entropy / math.log(len(items))

    def children(self, prefix):
        return [p for p in self.prefixes if len(p) == len(prefix) + 1 and p[:-1] == prefix]

    def gain_ratio(self, child):
        parent = child[:-1]
        mass = self.mass(parent)
        shares = [self.mass(c) / mass for c in self.children(parent)] if mass else []
        split = math.fsum(-s * math.log(s) for s in shares if s)
        return (self.conditional(parent) - self.conditional(child)) / split if split else 0.0

    def chi_squared(self, child):
        """Sum of (O - E)^2 / E; of a cold child its limit, n_v."""
        parent, mass = child[:-1], self.mass(child)
        if mass == 0:
            return float(self.mass(parent))
        terms = []
        for path, n in self.leaves(parent).items():
            expected = mass * n / self.mass(parent)
            observed = n if path[: len(child)] == child else 0
            if expected:
                terms.append((observed - expected) ** 2 / expected)
        return math.fsum(terms)

    def edges(self, value):
        """Array over nodes of value(child), 0 at the root."""
        return np.array([0.0] + [value(prefix) for prefix in self.prefixes[1:]])


@pytest.fixture(params=CASES)
def case(request):
    paths, counts = CASES[request.param]
    return Definitions(paths, counts), TokenTrie.build(*ragged(paths), counts)


@pytest.mark.parametrize("name", decisiveness.ENTROPIES)
def test_entropy_and_gain(case, name):
    brute, trie = case
    by_prefix = getattr(brute, name)
    np.testing.assert_allclose(
        decisiveness.entropy(trie, name),
        [by_prefix(p) for p in brute.prefixes],
        rtol=1e-12,
        atol=1e-15,
    )

    gain = decisiveness.information_gain(trie, name)
    np.testing.assert_allclose(
        gain, brute.edges(lambda c: by_prefix(c[:-1]) - by_prefix(c)), rtol=1e-11, atol=1e-14
    )

    zero = decisiveness.zero_gain(trie)
    assert zero.tolist() == [False] + [
        brute.mass(c) == brute.mass(c[:-1]) for c in brute.prefixes[1:]
    ]
    assert np.all(gain[zero] == 0.0) and gain[0] == 0.0
    warm = trie.train_count > 0
    assert np.all(gain[1:][~zero[1:] & warm[1:]] != 0.0)

    np.testing.assert_array_equal(
        decisiveness.information_gain(trie, name, np.float32), gain.astype(np.float32)
    )
    if name == "prior":
        assert gain.min() >= 0.0


def test_other_measures(case):
    brute, trie = case
    expected = {
        "information-gain": lambda c: brute.prior(c[:-1]) - brute.prior(c),
        "gini": lambda c: brute.gini(c[:-1]) - brute.gini(c),
        "gain-ratio": brute.gain_ratio,
        "chi-squared": brute.chi_squared,
        "purity": lambda c: brute.purity(c) - brute.purity(c[:-1]),
    }
    assert set(expected) == set(decisiveness.MEASURES)
    for name in decisiveness.MEASURES:
        # Numbers of size `scale` cancel, so fp64 rounding (2e-16 a term) is relative to them.
        scale = max(1.0, float(brute.total)) if name == "chi-squared" else 1.0
        found = decisiveness.edge_gain(trie, name)
        np.testing.assert_allclose(
            found, brute.edges(expected[name]), rtol=1e-10, atol=1e-12 * scale, err_msg=name
        )
    zero = decisiveness.zero_gain(trie)
    for name in ("information-gain", "gini", "gain-ratio", "chi-squared"):
        assert np.all(decisiveness.edge_gain(trie, name)[zero] == 0.0), name


def test_only_information_gain_depends_on_the_entropy(case):
    _, trie = case
    for name in decisiveness.MEASURES:
        prior, conditional = (
            decisiveness.edge_gain(trie, name, entropy) for entropy in decisiveness.ENTROPIES
        )
        if name == decisiveness.INFORMATION_GAIN:
            expected = decisiveness.information_gain(trie, "conditional")
            np.testing.assert_array_equal(conditional, expected)
        else:
            np.testing.assert_array_equal(conditional, prior)


def test_what_holds_of_every_measure(case):
    """What the decoding rules and `igd-linear` rely on (see `edge_gain`)."""
    _, trie = case
    cold = np.flatnonzero(trie.train_count == 0)
    cold = cold[cold > 0]
    for name in decisiveness.MEASURES:
        gain = decisiveness.edge_gain(trie, name)
        assert np.isfinite(gain).all() and gain[0] == 0.0
        if name != "gain-ratio":  # there an unbranched parent's cold children have 0
            for node in cold:
                family = np.flatnonzero(trie.parent == trie.parent[node])
                assert gain[node] >= gain[family].max() - 1e-12 * np.abs(gain[family]).max(), name
        normalised = decisiveness.normalised_gain(trie, gain.astype(np.float32))
        assert normalised.min() >= 0.0 and normalised.max() <= 1.0
        assert np.all(normalised[cold] == 0.0)


def test_mean_gain_ratio_of_a_branching_prefix_is_one(case):
    brute, trie = case
    ratio = decisiveness.gain_ratio(trie)
    for prefix in brute.prefixes:
        children = brute.children(prefix)
        if sum(brute.mass(c) > 0 for c in children) > 1:
            mean = math.fsum(
                brute.mass(c) / brute.mass(prefix) * ratio[brute.number[c]] for c in children
            )
            assert mean == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("cold", decisiveness.COLD_EDGES)
@pytest.mark.parametrize("epsilon", [0.0, 1e-7])
@pytest.mark.parametrize("name", decisiveness.ENTROPIES)
def test_normalised_gain(case, cold, epsilon, name):
    brute, trie = case
    gain = decisiveness.information_gain(trie, name)
    expected = np.zeros(trie.num_nodes)
    for prefix in brute.prefixes:
        family = [brute.number[c] for c in brute.children(prefix) if cold == "raw" or brute.mass(c)]
        values = [gain[n] for n in family]
        if values and max(values) - min(values) > 1e-10 * max(map(abs, values)):
            for n in family:
                expected[n] = (gain[n] - min(values)) / (max(values) - min(values) + epsilon)
    found = decisiveness.normalised_gain(trie, gain, cold, epsilon)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    if cold == "zero":
        assert np.all(found[trie.train_count == 0] == 0.0)


def test_equal_siblings_normalise_to_zero_in_any_order():
    """Families with the same counts in another order are equal in theory, not in the last bits."""
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 1000, 3000)
    shuffled = [counts, rng.permutation(counts), rng.permutation(counts)]
    paths = [
        [family, 10 + k // 60, 100 + k % 60, EOS]
        for family in (1, 2, 3)
        for k in range(len(counts))
    ]
    trie = TokenTrie.build(*ragged(paths), np.concatenate(shuffled))

    for name in decisiveness.ENTROPIES:
        gain = decisiveness.information_gain(trie, name)
        assert np.ptp(gain[1:4]) <= 1e-13 * gain[1]
        stored = gain.astype(np.float32)
        rounded_up = np.nextafter(stored, np.float32(9))
        neighbour = np.where(np.arange(len(gain)) % 2, stored, rounded_up)
        for values in (gain, stored, neighbour):
            assert np.all(decisiveness.normalised_gain(trie, values)[1:4] == 0.0)

    uniform = TokenTrie.build(*ragged(paths), np.ones(len(paths), np.int64))
    noise = decisiveness.purity_gain(uniform)  # 0 in theory at the first two levels
    assert np.all(decisiveness.normalised_gain(uniform, noise)[1:4] == 0.0)


def test_small_but_real_differences_are_not_called_equal():
    """Two siblings that differ by one target in 200,000 still span the whole range."""
    paths = [[1, 1, EOS], [1, 2, EOS], [2, 1, EOS], [2, 2, EOS]]
    trie = TokenTrie.build(*ragged(paths), np.array([50_000, 50_000, 50_001, 50_000]))
    gain = decisiveness.information_gain(trie)
    assert sorted(decisiveness.normalised_gain(trie, gain)[1:3].tolist()) == [0.0, 1.0]


def test_filtering_ratio(case):
    brute, trie = case
    depth = max(map(len, brute.prefixes))
    for level, found in enumerate(decisiveness.filtering_ratio(trie), 1):
        edges = [p for p in brute.prefixes if len(p) == level]
        ratio = [1 - len(brute.items[c]) / len(brute.items[c[:-1]]) for c in edges]
        assert found == pytest.approx(math.fsum(ratio) / len(ratio), abs=1e-12)
    assert level == depth


def test_mean_by_token(case):
    brute, trie = case
    values = np.arange(trie.num_nodes, dtype=float)
    tokens, means = decisiveness.mean_by_token(trie, values)
    expected = {}
    for prefix in brute.prefixes[1:]:
        expected.setdefault(prefix[-1], []).append(brute.number[prefix])
    assert all(a < b for a, b in pairwise(tokens)) and set(tokens.tolist()) == set(expected)
    for token, mean in zip(tokens.tolist(), means, strict=True):
        assert mean == pytest.approx(math.fsum(expected[token]) / len(expected[token]))


def test_unknown_names_list_the_known_ones():
    trie = TokenTrie.build(*ragged([[1, EOS]]), np.array([1]))
    with pytest.raises(UsageError, match="prior, conditional"):
        decisiveness.entropy(trie, "shannon")
    with pytest.raises(UsageError, match="prior, conditional"):
        decisiveness.edge_gain(trie, "information-gain", "shannon")
    message = (
        "unknown --decisiveness 'gain_ratio', did you mean 'gain-ratio'. .known: information-gain"
    )
    with pytest.raises(UsageError, match=message):
        decisiveness.edge_gain(trie, "gain_ratio")
    with pytest.raises(UsageError, match="zero, raw"):
        decisiveness.normalised_gain(trie, np.zeros(2), cold="warm")
