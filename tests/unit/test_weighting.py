"""Token weights against plain loops over the items of a small catalogue."""

from types import SimpleNamespace

import numpy as np
import pytest

from igd_ds.items import decisiveness
from igd_ds.items.trie import TokenTrie
from igd_ds.weighting import WEIGHTINGS

# EOS = 0; items share prefixes, one is cold (5 tokens), two share a path
PATHS = [[1, 2, 0], [1, 3, 4, 0], [1, 3, 5, 0], [7, 8, 9, 9, 0], [1, 2, 0], [6, 0], [0]]
COUNTS = np.array([3, 1, 2, 0, 1, 4, 2])


def stored(entropy="prior"):
    token_ids = np.concatenate(PATHS).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in PATHS])])
    trie = TokenTrie.build(token_ids, offsets, COUNTS)
    gain = decisiveness.information_gain(trie, entropy).astype(np.float32)
    return SimpleNamespace(catalogue=SimpleNamespace(token_ids=token_ids, offsets=offsets), trie=trie, gain=gain, entropy=entropy)


def mass(prefix) -> int:
    return sum(int(c) for path, c in zip(PATHS, COUNTS, strict=True) if path[: len(prefix)] == prefix)


def entropy(prefix, kind) -> float:
    leaves = {}
    for path, count in zip(PATHS, COUNTS, strict=True):
        if path[: len(prefix)] == prefix and count:
            leaves[tuple(path)] = leaves.get(tuple(path), 0) + int(count)
    whole = COUNTS.sum() if kind == "prior" else max(mass(prefix), 1)
    return -sum(c / whole * np.log(c / whole) for c in leaves.values())


def gains(path, kind):
    return [entropy(path[:t], kind) - entropy(path[: t + 1], kind) for t in range(len(path))]


def expected(name, kind="prior", beta=0.2, floor=0.3):
    on_targets = {tuple(p[: t + 1]) for p in PATHS for t in range(len(p)) if mass(p[: t + 1]) > 0}
    largest = max(gains(p, kind)[t] for p in PATHS for t in range(len(p)) if tuple(p[: t + 1]) in on_targets)
    for path in PATHS:
        for t in range(len(path)):
            zero = mass(path[: t + 1]) == mass(path[:t])
            yield {
                "uniform": 1.0,
                "igd": beta if zero else 1.0,
                "igd-linear": max(beta + (1 - beta) * (0.0 if zero else gains(path, kind)[t]) / largest, 0.0),
                "position": 1 - (1 - floor) * t / (len(path) - 1) if len(path) > 1 else 1.0,
            }[name]


@pytest.mark.parametrize("kind", ["prior", "conditional"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_match_a_plain_loop(name, kind):
    config = SimpleNamespace(igd_beta=0.2, position_floor=0.3)
    found = WEIGHTINGS[name].token_weights(stored(kind), config)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, list(expected(name, kind)), rtol=1e-6, atol=1e-7)


def test_beta_one_is_uniform():
    config = SimpleNamespace(igd_beta=1.0)
    assert (WEIGHTINGS["igd"].token_weights(stored(), config) == 1).all()


def test_a_catalogue_without_any_gain():
    """One trained item: every token is forced, IG_max is 0, and the linear weight is β everywhere."""
    data = stored()
    trie = TokenTrie.build(np.array([1, 2, 0], dtype=np.int32), np.array([0, 3]), np.array([5]))
    one = SimpleNamespace(catalogue=SimpleNamespace(token_ids=np.array([1, 2, 0]), offsets=np.array([0, 3])), trie=trie,
                          gain=decisiveness.information_gain(trie, "prior"), entropy=data.entropy)  # fmt: skip
    assert WEIGHTINGS["igd-linear"].token_weights(one, SimpleNamespace(igd_beta=0.2)).tolist() == pytest.approx([0.2] * 3)
