"""Weights from how often a token is trained on: frequency (MTC 4.1.2)."""

import math

import numpy as np

from igd_ds.objectives.per_item import sum_to_length


def frequency(stored, config) -> np.ndarray:
    """Return w ∝ 1/E_n = (1−b)/(1−bⁿ), per item summing to its number of tokens, EOS 1, float32 (T,) (MTC 4.1.2).

    n is how often the token id occurs in the targets of all training rows, at least 1, and E_n the effective number of
    samples (Cui et al.). b is `config.frequency_beta`: 0 weighs all tokens alike, b → 1 weighs them by 1/n.

    E_n saturates at 1/(1−b): at b = 0.99 it is within 1 % of its limit 100 from n ≈ 500 on, so all tokens more frequent than
    that weigh the same. In a large data set that is most codes of the first levels.
    """
    token_ids, offsets = stored.catalogue.token_ids, stored.catalogue.offsets
    targets_of_token = np.repeat(
        np.asarray(stored.trie.item_count, dtype=np.float64), np.diff(offsets)
    )  # exact below 2^53
    n = np.maximum(np.bincount(token_ids, targets_of_token), 1.0)[token_ids]
    b = config.frequency_beta
    log_b = math.log(b) if b > 0 else -math.inf
    # expm1, since 1 − bⁿ loses all its digits where b is close to 1.
    return sum_to_length((1 - b) / -np.expm1(n * log_b), offsets)
