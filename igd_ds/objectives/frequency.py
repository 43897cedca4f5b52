"""Weights from how often a token is trained on: `frequency` (MTC 4.1.2)."""

import math
from dataclasses import dataclass

import numpy as np

from igd_ds.config.options import option, require
from igd_ds.contracts import ObjectiveContext
from igd_ds.items.store import StoredCatalogue
from igd_ds.objectives.per_item import sum_to_length
from igd_ds.objectives.weighted import TokenWeighting


@dataclass(frozen=True, kw_only=True)
class FrequencyOptions:
    """Flags of `frequency`."""

    frequency_beta: float = option("b of the effective number of a token's occurrences, e.g. 0.99")

    def check(self) -> None:
        """Raise UsageError unless b lies in [0, 1)."""
        require(self, "frequency_beta", lambda value: 0 <= value < 1, "must lie in [0, 1)")


def frequency_weights(stored: StoredCatalogue, b: float) -> np.ndarray:
    """Return w ∝ 1/E_n = (1−b)/(1−bⁿ), per item summing to its number of tokens, EOS 1 (MTC 4.1.2).

    n is how often the token id occurs in the targets of all training rows, at least 1, and E_n is
    the effective number of samples (Cui et al.). b = 0 weighs all tokens alike; b → 1 weighs them
    by 1/n.

    E_n saturates at 1/(1−b): at b = 0.99 it is within 1 % of its limit 100 from n ≈ 500 on, so all
    tokens more frequent than that weigh the same. In a large data set that is most codes of the
    first levels.

    Returns:
        float32 (tokens,).
    """
    token_ids, offsets = stored.catalogue.token_ids, stored.catalogue.offsets
    targets_of_item = np.asarray(stored.trie.item_count, dtype=np.float64)  # exact below 2^53
    targets_of_token = np.repeat(targets_of_item, np.diff(offsets))
    n = np.maximum(np.bincount(token_ids, targets_of_token), 1.0)[token_ids]

    # expm1, because 1 − bⁿ loses all its digits where b is close to 1.
    log_b = math.log(b) if b > 0 else -math.inf
    return sum_to_length((1 - b) / -np.expm1(n * log_b), offsets)


class Frequency(TokenWeighting):
    """Rare tokens weigh more (MTC 4.1.2)."""

    Options = FrequencyOptions

    def weights(self, context: ObjectiveContext) -> np.ndarray:
        """Return `frequency_weights`, float32 (tokens, 1)."""
        return frequency_weights(context.stored, self.options.frequency_beta)[:, None]
