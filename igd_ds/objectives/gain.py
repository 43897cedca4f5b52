"""Weights from information gain: igd (IGD Eq. 7) and igd-linear (IGD App. G)."""

import numpy as np

from igd_ds.items import decisiveness


def igd(stored, config) -> np.ndarray:
    """Return β for tokens with zero information gain and 1 for all others, float32 (T,) (IGD Eq. 7). β is `config.igd_beta`."""
    zero = decisiveness.zero_gain(stored.trie)[stored.trie.path_nodes(stored.catalogue.offsets)]
    return np.where(zero, config.igd_beta, 1.0).astype(np.float32)


def igd_linear(stored, config) -> np.ndarray:
    """Return β + (1−β)·IG/IG_max, floored at 0, float32 (T,) (IGD App. G).

    IG_max is over edges on training targets (a cold edge's gain is its parent's whole entropy). The floor matters for
    the `conditional` entropy only, whose gain can be negative.
    """
    on_targets = np.asarray(stored.trie.train_count) > 0
    gain = np.asarray(stored.gain, dtype=np.float64)
    largest = gain[on_targets].max(initial=0.0)
    share = gain / largest if largest > 0 else np.zeros_like(gain)
    weights = np.maximum(config.igd_beta + (1 - config.igd_beta) * share, 0.0)
    return weights[stored.trie.path_nodes(stored.catalogue.offsets)].astype(np.float32)
