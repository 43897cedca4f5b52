"""Weights that depend only on a token's place in its item:

`uniform` (BIGRec, D3) and `position` (CFT).
"""

from dataclasses import dataclass

import numpy as np

from igd_ds.config.options import option, require
from igd_ds.contracts import ObjectiveContext
from igd_ds.items.ragged import index_within
from igd_ds.objectives.weighted import TokenWeighting


class Uniform(TokenWeighting):
    """Plain cross-entropy: every token weighs 1."""

    def weights(self, context: ObjectiveContext) -> np.ndarray:
        """Return 1 for every catalogue token, float32 (tokens, 1)."""
        return np.ones((len(context.stored.catalogue.token_ids), 1), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class PositionOptions:
    """Flags of `position`."""

    position_floor: float = option("b: weight of the last item token, in [0, 1]")

    def check(self) -> None:
        """Raise UsageError unless b lies in [0, 1]."""
        require(self, "position_floor", lambda value: 0 <= value <= 1, "must lie in [0, 1]")


class Position(TokenWeighting):
    """Weights that fall linearly from 1 at an item's first token to b at its last (CFT; IGD App.

    A).
    """

    Options = PositionOptions

    def weights(self, context: ObjectiveContext) -> np.ndarray:
        """Return w_t = 1 − (1 − b)(t − 1)/(m − 1), float32 (tokens, 1).

        t = 1 … m counts the item's tokens, EOS included; w is 1 if m = 1. b is `position_floor`.
        """
        offsets = context.stored.catalogue.offsets
        m = np.repeat(np.diff(offsets), np.diff(offsets))
        t_minus_1 = index_within(offsets)

        falling = (1 - self.options.position_floor) * t_minus_1 / np.maximum(m - 1, 1)
        return (1 - falling).astype(np.float32)[:, None]
