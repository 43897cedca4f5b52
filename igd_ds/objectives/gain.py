"""Weights from information gain: `igd` (IGD Eq. 7) and `igd-linear` (IGD App. G)."""

from dataclasses import dataclass

import numpy as np

from igd_ds.config.options import option, require
from igd_ds.contracts import ObjectiveContext
from igd_ds.objectives.weighted import TokenWeighting

BETA_HELP = "β: weight of tokens with zero information gain, in [0, 1]"


@dataclass(frozen=True, kw_only=True)
class GainOptions:
    """Flags of `igd` and `igd-linear`."""

    igd_beta: float = option(BETA_HELP)

    def check(self) -> None:
        """Raise UsageError unless β lies in [0, 1]."""
        require(self, "igd_beta", lambda value: 0 <= value <= 1, "must lie in [0, 1]")


class IGD(TokenWeighting):
    """Tokens with zero information gain weigh β, all others 1 (IGD Eq. 7)."""

    Options = GainOptions

    def weights(self, context: ObjectiveContext) -> np.ndarray:
        """Return β or 1 for each catalogue token, float32 (tokens, 1). β is `igd_beta`."""
        weights = np.where(context.stored.zero_gain, self.options.igd_beta, 1.0)
        return weights.astype(np.float32)[:, None]


class IGDLinear(TokenWeighting):
    """Weights that rise linearly with information gain, from β to 1 (IGD App. G)."""

    Options = GainOptions

    def weights(self, context: ObjectiveContext) -> np.ndarray:
        """Return β + (1 − β)·IG/IG_max, at least 0, float32 (tokens, 1).

        IG_max is taken over edges on training targets, because a cold edge's gain is its parent's
        whole entropy. The floor at 0 matters only for gains that can be negative, such as those of
        the `conditional` entropy.
        """
        stored, beta = context.stored, self.options.igd_beta
        on_targets = np.asarray(stored.trie.train_count) > 0
        gain = np.asarray(stored.gain, dtype=np.float64)

        largest = gain[on_targets].max(initial=0.0)
        share = gain / largest if largest > 0 else np.zeros_like(gain)
        weights = np.maximum(beta + (1 - beta) * share, 0.0)
        return weights[stored.token_node].astype(np.float32)[:, None]
