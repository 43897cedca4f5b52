"""Logits of some tokens alone: the rows of the output layer that belong to a catalogue.

A softmax over the trie's next tokens needs the logits of the catalogue's tokens only. A catalogue
of 4,000 titles uses about as many tokens, a vocabulary has 50,000 to 250,000.

Letters in shapes: V wanted tokens, H width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

COLUMNS_AT_ONCE = 256
"""How many columns of a wrapped output layer are read at once; it bounds the memory."""


class OutputRows:
    """The rows of a model's output layer for some tokens.

    While `alone` lasts, the output layer computes these rows and no others. What the model does
    with its logits afterwards (a scale, a cap) is done with them. The rows are copied in the first
    pass, when ZeRO-3 has gathered the layer; they are those of the weights at that time.

    Args:
        model: a language model with an output layer, which may be wrapped by PEFT or quantised.
        tokens: int64 (V,), ascending; None: all tokens, and nothing changes.
    """

    def __init__(self, model: Any, tokens: np.ndarray | None):
        self.tokens = None if tokens is None else torch.from_numpy(tokens).to(model.device)
        self.layer: Any = None if tokens is None else model.get_output_embeddings()
        self.weight: torch.Tensor | None = None  # (V, H)
        self.bias: torch.Tensor | None = None  # (V,)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Compute only these rows while it lasts."""
        if self.layer is None:
            yield
            return
        self.layer.forward = self._forward  # hides the method of its class
        try:
            yield
        finally:
            del self.layer.forward

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits (…, V) of these tokens, from what the model has returned.

        A model that shows no output layer has computed all of them.
        """
        if self.tokens is None or self.layer is not None:
            return logits
        return logits[..., self.tokens]

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (…, V) of hidden states (…, H)."""
        if self.weight is None:
            self._read(hidden)
        assert self.weight is not None
        return F.linear(hidden, self.weight, self.bias)

    def _read(self, hidden: torch.Tensor) -> None:
        """Copy the rows out of the layer, for hidden states like these."""
        layer = self.layer
        if type(layer) is torch.nn.Linear:
            self.weight = layer.weight[self.tokens]
            self.bias = None if layer.bias is None else layer.bias[self.tokens]
            return

        # With adapters or in 4 bits, the layer is asked itself. It is linear, so the images of the
        # unit vectors are its columns.
        compute = type(layer).forward
        width = hidden.shape[-1]
        self.bias = compute(layer, hidden.new_zeros(1, width))[0, self.tokens]
        unit = torch.eye(width, dtype=hidden.dtype, device=hidden.device)
        columns = [compute(layer, some)[:, self.tokens] for some in unit.split(COLUMNS_AT_ONCE)]
        self.weight = (torch.cat(columns) - self.bias).T.contiguous()
