"""What the loop trains for `igd prefer`: chosen and rejected items as branches behind one prompt.

Letters in shapes: B rows of a micro-batch, J rejected items of a row, n labelled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igd_ds import distributed
from igd_ds.contracts import MASKED_ROW, Batch, LossTerms, StepTotals
from igd_ds.data.negatives import BEAM
from igd_ds.engine.ds_config import DsConfig
from igd_ds.engine.step import StepSums
from igd_ds.generative_training import one_ahead, ratio
from igd_ds.objectives.preference import PREFERENCES, choice_kl, per_item
from igd_ds.prefer_config import PreferConfig
from igd_ds.preference.continued import ContinuedTraining
from igd_ds.preference.pairs import PairMaker, Pairs
from igd_ds.preference.scorer import ItemScorer
from igd_ds.preference.start import Start

TARGETS = ("preference", "sft")

TAGS = {
    "train/loss_preference": "nats per row: the loss of --objective",
    "train/loss_sft": "nats per row: NLL of the chosen item, which --sft_weight weighs",
    "train/margin": "mean of β(Δ₊ − Δ_j) over pairs; Δ = log π − log π_ref of an item",
    "train/preference_accuracy": "share of pairs with a positive margin, 0 to 1",
    "train/logratio_chosen": "nats: mean Δ of the chosen items",
    "train/logratio_rejected": "nats: mean Δ of the rejected items",
    "train/kl": "nats: mean KL(π ‖ π_ref) over the items of a row, both renormalised over these",
}


@dataclass(frozen=True)
class PreferenceBatch:
    """A micro-batch: the items of each row behind its prompt, and the reference's view of them."""

    branches: Batch
    """B · (1 + J) rows, one per item; the target comes first."""
    reference: torch.Tensor | None
    """float32 (B, 1 + J), log π_ref; None where the adapter is switched off instead."""
    is_row: torch.Tensor
    """bool (B,): whether a row is real, and does not only fill the batch."""

    def to(self, device: torch.device) -> PreferenceBatch:
        """Return the batch on `device`."""
        reference = None if self.reference is None else self.reference.to(device)
        return PreferenceBatch(self.branches.to(device), reference, self.is_row.to(device))


@dataclass(frozen=True)
class PreferenceLoss:
    """Mean over rows of a loss in PREFERENCES, and of the chosen items' NLL (step.StepLoss)."""

    scorer: ItemScorer
    objective: str
    beta: float
    sft_weight: float

    def normalisers(self, batch: PreferenceBatch) -> torch.Tensor:
        """Return the number of rows, for both targets, float64 (2,)."""
        return batch.is_row.sum().double().repeat(len(TARGETS))

    def coefficients(self, step: int) -> torch.Tensor:
        """Return 1 and the weight of the NLL."""
        return torch.tensor([1.0, self.sft_weight])

    def terms(self, engine: Any, batch: PreferenceBatch) -> LossTerms:
        """Run the forward passes and return both losses, with sums for the log as statistics."""
        batch = batch.to(distributed.device())
        reference = batch.reference
        if reference is None:
            nll = self.scorer.reference_nll(engine, None, batch.branches)
            reference = -per_item(nll, batch.branches).view(len(batch.is_row), -1)

        # Masked rows have log-probability 0 under both models.
        nll = self.scorer.nll(engine, batch.branches)
        policy = -per_item(nll, batch.branches).view(reference.shape)
        log_ratio = policy - reference
        margins = self.beta * (log_ratio[:, :1] - log_ratio[:, 1:])
        is_row = batch.is_row.float()
        numerators = torch.stack([
            (PREFERENCES[self.objective](margins) * is_row).sum(),
            -(policy[:, 0] * is_row).sum(),
        ])  # fmt: skip

        with torch.no_grad():
            wins = (margins > 0).float() * is_row[:, None]
            statistics = {
                "margin": (margins.mean(1) * is_row).sum(),
                "wins": wins.mean(1).sum(),
                "chosen": (log_ratio[:, 0] * is_row).sum(),
                "rejected": (log_ratio[:, 1:].mean(1) * is_row).sum(),
                "kl": (choice_kl(policy, reference) * is_row).sum(),
                "tokens": nll.new_tensor(len(nll)),
                "input_tokens": batch.branches.inputs.num_tokens(),
            }
        return LossTerms(numerators, is_row.sum().repeat(len(TARGETS)), nll.detach(), statistics)

    def update(self, totals: StepTotals) -> Mapping[str, float]:
        """Do nothing: the loss has no state."""
        return {}


class PreferenceTraining(ContinuedTraining):
    """One preference training of a trained model (contracts.Training).

    Call `begin` once, when the engine is there and a checkpoint is loaded.
    """

    tags: Mapping[str, str] = TAGS

    def __init__(self, config: PreferConfig, run: Path, start: Start, ds: DsConfig):
        super().__init__(config, run, start, ds)
        self.pair_maker = PairMaker(
            config,
            run / "pairs",
            start,
            self.scorer,
            self.live_search,
            self.micro_batch,
            self.dtype,
        )
        self.loss = PreferenceLoss(
            self.scorer, config.objective, config.strength(), config.sft_weight
        )
        self.engine: Any = None
        self.pairs: Pairs
        self.pairs_of: int | None = None

    def claim(self, is_begun: bool) -> None:
        """Check what the run folder keeps of an earlier start, see `PairMaker.claim`. Rank 0."""
        self.pair_maker.claim(is_begun)

    def begin(self, engine: Any, step: int) -> None:
        """Take note of the engine and make the pairs of step `step`; all ranks call it."""
        self.engine = engine
        self._make_pairs(min(step, self.total_steps - 1) // self.steps_per_epoch)

    def _make_pairs(self, epoch: int) -> None:
        """Make the pairs of an epoch, unless they are there; only `beam` has its own each epoch."""
        made_in = epoch if self.config.negatives == BEAM else 0
        if self.pairs_of == made_in:
            return
        rows = np.unique(self.rows_of(made_in)[: self.total_steps - made_in * self.steps_per_epoch])
        self.pairs = self.pair_maker.make(self.engine, made_in, rows[rows != MASKED_ROW])
        self.pairs_of = made_in

    def micro_batches(self, first: int) -> Iterator[list[PreferenceBatch]]:
        """Yield this rank's micro-batches of steps `first`, `first` + 1, …

        Within an epoch the next is made meanwhile. The rows of a step follow from its number alone.
        """
        step = first
        while step < self.total_steps:
            epoch = step // self.steps_per_epoch
            self._make_pairs(epoch)
            begin = epoch * self.steps_per_epoch
            end = min(begin + self.steps_per_epoch, self.total_steps)
            yield from one_ahead(self._collate, self.rows_of(epoch)[step - begin : end - begin])
            step = end

    def _collate(self, rows: np.ndarray) -> list[PreferenceBatch]:
        """Return this rank's micro-batches of a global batch (G,)."""
        return [self._batch(part) for part in self.own_parts(rows)]

    def _batch(self, rows: np.ndarray) -> PreferenceBatch:
        real, is_row = np.maximum(rows, 0), rows != MASKED_ROW
        reference = None
        if self.pairs.reference is not None:
            logprobs = np.where(is_row[:, None], self.pairs.reference[real], 0)
            reference = torch.from_numpy(logprobs.astype(np.float32))
        branches = self.collator.branches(rows, self.pairs.items[real])
        return PreferenceBatch(branches, reference, torch.from_numpy(is_row))

    def values(self, sums: StepSums, seconds: float) -> dict[str, float]:
        """Return the log's scalars: sums first, one division last."""
        found = {name: float(value) for name, value in sums.statistics.items()}
        rows = float(sums.normalisers[0])
        by_target = zip(TARGETS, sums.numerators.tolist(), strict=True)
        values = {"train/loss": ratio(sums.objective, sums.steps)}
        values |= {f"train/loss_{name}": ratio(value, rows) for name, value in by_target}
        return values | {
            "train/margin": ratio(found["margin"], rows),
            "train/preference_accuracy": ratio(found["wins"], rows),
            "train/logratio_chosen": ratio(found["chosen"], rows),
            "train/logratio_rejected": ratio(found["rejected"], rows),
            "train/kl": ratio(found["kl"], rows),
            "speed/target_tokens_per_second": found["tokens"] / seconds,
            "speed/tokens_per_second": found["input_tokens"] / seconds,
            "speed/rows_per_second": rows / seconds,
        }
