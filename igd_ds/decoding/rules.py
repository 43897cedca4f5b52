"""How information gains become weights of log-probabilities in decoding (IGD Eq. 8, 9): the table `DECODING_RULES`."""

import difflib

import numpy as np

from igd_ds.items.decisiveness import normalised_gain


def per_node(trie, gain: np.ndarray) -> np.ndarray:
    """Min-max over the siblings that training has seen; cold siblings get 0, as do siblings that all gain the same (Eq. 8)."""
    return normalised_gain(trie, gain, cold="zero")


def raw(trie, gain: np.ndarray) -> np.ndarray:
    """Min-max over all siblings. A cold child has the largest gain of all, so α favours cold branches: for comparison only."""
    return normalised_gain(trie, gain, cold="raw")


def reference(trie, gain: np.ndarray) -> np.ndarray:
    """As `per-node` with the published code's 1e-7 in the denominator, which shrinks ĨG where siblings differ by as little."""
    return normalised_gain(trie, gain, cold="zero", epsilon=1e-7)


# name -> function(trie, gain float64 (M,)) -> normalised gain ĨG in [0, 1], float64 (M,), indexed by child node.
DECODING_RULES = {"per-node": per_node, "raw": raw, "reference": reference}


def edge_weights(trie, gain: np.ndarray, rule: str, alpha: float) -> np.ndarray:
    """Return w_d = 1 − α·ĨG of every trie edge (Eq. 9).

    Args:
        trie: TokenTrie with M nodes; edge e is its child node e, entry 0 is unused.
        gain: information gain per edge in nats, (M,).
        rule: name in DECODING_RULES.
        alpha: α in [0, 1]; 0 gives plain beam search (all weights 1).

    Returns:
        float32 (M,), each in [0, 1].

    Raises:
        ValueError: unknown rule, or α outside [0, 1].
    """
    if rule not in DECODING_RULES:
        near = difflib.get_close_matches(rule, DECODING_RULES, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"unknown decoding rule '{rule}': known are {', '.join(DECODING_RULES)}.{hint}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], found {alpha}")
    if alpha == 0:
        return np.ones(len(gain), np.float32)
    return (1 - alpha * DECODING_RULES[rule](trie, gain)).astype(np.float32)
