"""The log-probabilities of items behind prompts, by the model in training or by its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from igd_ds import distributed
from igd_ds.contracts import Batch, ObjectiveContext
from igd_ds.data.batches import Collator
from igd_ds.objectives.preference import ItemLikelihood, per_item
from igd_ds.preference.start import Start


@dataclass(frozen=True)
class ItemScorer:
    """The log-probabilities of a batch's tokens under one softmax.

    Letters in shapes: B rows, W items behind each prompt, n labelled tokens.
    """

    start: Start
    collator: Collator
    """Puts items behind the prompts of training rows."""
    measure: ItemLikelihood
    context: ObjectiveContext

    def nll(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return −log p of the labelled tokens, nats, float32 (n,); the batch is on the device."""
        logits = self.start.inputs.backbone.label_logits(model, batch)
        return self.measure.nll(batch, logits, self.context)

    @torch.no_grad()
    def reference_nll(self, engine: Any, reference: Any, batch: Batch) -> torch.Tensor:
        """Return −log p_ref of the labelled tokens, nats, float32 (n,).

        Args:
            engine: DeepSpeed engine around the model in training.
            reference: another model; None for the engine's with its adapter switched off.
            batch: on the device.
        """
        if reference is not None:
            return self.nll(reference, batch)
        engine.eval()
        with engine.module.disable_adapter():
            nll = self.nll(engine, batch)
        engine.train()
        return nll

    @torch.no_grad()
    def logprobs(self, model: Any, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Return log π of the items behind the prompts of rows (B,), float32 (B, W)."""
        batch = self.collator.branches(rows, items).to(distributed.device())
        return -per_item(self.nll(model, batch), batch).view(items.shape).cpu().numpy()
