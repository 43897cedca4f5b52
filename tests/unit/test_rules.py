"""Decoding weights w_d against Eq. 8 and 9 written with a loop over siblings."""

import numpy as np
import pytest
from test_beam import build_trie, random_items

from igd_ds.decoding.rules import DECODING_RULES, edge_weights
from igd_ds.items.decisiveness import information_gain


def catalogue(seed=1):
    items = random_items(60)
    counts = np.random.default_rng(seed).integers(0, 4, len(items))
    trie = build_trie(items, counts)
    return trie, information_gain(trie, "prior")


@pytest.mark.parametrize("rule", DECODING_RULES)
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
                    normalised = (gain[child] - low) / (high - low + (1e-7 if rule == "reference" else 0))
            assert weights[child] == pytest.approx(1 - alpha * normalised, abs=1e-6)


def test_cold_edges_are_never_favoured_by_default():
    trie, gain = catalogue()
    cold = np.flatnonzero(np.asarray(trie.train_count) == 0)
    cold = cold[cold > 0]
    assert (edge_weights(trie, gain, "per-node", 0.4)[cold] == 1).all()
    assert (edge_weights(trie, gain, "raw", 0.4)[cold] < 1).any()


def test_bad_input_names_what_is_known():
    trie, gain = catalogue()
    with pytest.raises(ValueError, match="per-node"):
        edge_weights(trie, gain, "pernode", 0.1)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], found 1.5"):
        edge_weights(trie, gain, "per-node", 1.5)
