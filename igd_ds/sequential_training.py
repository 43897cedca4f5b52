"""What the loop trains for `igd baseline`: users' sequences, a loss over items, and a validation.

Letters in shapes: S sequences, n targets of a micro-batch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igd_ds import distributed
from igd_ds.baseline_config import BaselineConfig
from igd_ds.baselines.counted import COUNTED
from igd_ds.baselines.leaves import Leaves, build_catalogue
from igd_ds.baselines.losses import LOSSES, Negatives
from igd_ds.baselines.saved import CONFIG_FILE
from igd_ds.baselines.sequences import Chains, SequenceBatch
from igd_ds.baselines.sequential import SEQUENTIAL
from igd_ds.contracts import LossTerms, StepTotals
from igd_ds.data.batches import (
    deal,
    epoch_batches,
    refuse_empty,
    sample_rows,
    steps_per_epoch,
)
from igd_ds.data.dataset import InteractionDataset
from igd_ds.engine.export import save_model
from igd_ds.engine.step import StepSums
from igd_ds.errors import UsageError
from igd_ds.evaluation.full_ranking import Ranker, SeenFilter
from igd_ds.evaluation.results import Ranked
from igd_ds.folders import write_json
from igd_ds.items.store import StoredCatalogue

NEGATIVES_POWER = 0.75
"""Shared negatives are drawn in proportion to the training count to this power: `sample_alpha` of
GRU4Rec's published code."""

VALIDATION_METRIC = "ndcg@10"


@dataclass(frozen=True)
class BaselineData:
    """What a baseline works on, built once."""

    dataset: InteractionDataset
    stored: StoredCatalogue
    leaves: Leaves
    """The catalogue's different items, as columns of scores."""
    train: Chains
    """The training rows as sequences."""
    negatives: Negatives

    @classmethod
    def build(cls, config: BaselineConfig) -> "BaselineData":
        """Load and check the data, chain the training rows, and number the catalogue's items.

        Raises:
            UsageError: a row to rank has an empty history, an item has no name of the kind asked
                for, or there are fewer items than negatives to draw.
        """
        dataset = InteractionDataset.load(config.dataset)
        to_rank = {("valid", config.validation_rows, config.seed)}
        to_rank |= {(name, config.num_rows, config.rows_seed) for name in config.splits}
        for name, number, seed in sorted(to_rank):
            split = dataset.splits[name]
            refuse_empty(split, sample_rows(len(split), number, seed))

        stored = build_catalogue(dataset, config.item_kind)
        device = distributed.device()
        counts = torch.from_numpy(stored.catalogue.counts).to(device, torch.float32)
        negatives = _negatives(config, counts**NEGATIVES_POWER)
        train = Chains.build(dataset.splits["train"])
        return cls(dataset, stored, Leaves.build(stored.trie, device), train, negatives)

    def model_form(self, config: BaselineConfig) -> dict[str, Any]:
        """Return what makes a trained recommender's form: sizes of the dataset and its settings."""
        splits = self.dataset.splits.values()
        longest = max(int(np.diff(split.history_offsets).max()) for split in splits)
        form = {name: getattr(config, name) for name in SEQUENTIAL[config.recommender].form}
        return {"num_items": self.dataset.num_items, "max_history": longest} | form

    def build_model(self, config: BaselineConfig) -> Any:
        """Return the recommender, with its counts or with the same random weights on every rank."""
        if not config.is_trained:
            split = self.train.split
            last = split.history_items[split.history_offsets[1:] - 1]
            counted: Any = COUNTED[config.recommender]
            return counted.count(last, split.targets, self.dataset.num_items, config.seed)
        torch.manual_seed(config.seed)
        return SEQUENTIAL[config.recommender].model(**self.model_form(config))

    def seen_filter(self, split: str, config: BaselineConfig) -> SeenFilter | None:
        """Return what leaves seen items out of a split's lists; None where they stay in."""
        if not self.dataset.excludes_seen(config.exclude_seen):
            return None
        return SeenFilter.build(self.dataset, split, self.stored.trie)

    def write_description(self, folder: Path, config: BaselineConfig) -> None:
        """Put beside the weights what `load_model` needs."""
        description = {
            "recommender": config.recommender,
            "form": self.model_form(config) if config.is_trained else {},
            "dataset": self.dataset.fingerprint,
            "item_kind": self.stored.catalogue.kind,
        }
        write_json(folder / CONFIG_FILE, description)


def _negatives(config: BaselineConfig, weights: torch.Tensor) -> Negatives:
    """Return what draws the negatives that the loss asks for."""
    most = {"bpr-max": int((weights > 0).sum()), "bce": len(weights) - 1}.get(config.loss, 0)
    number = config.num_negatives or 0
    if number > most:
        raise UsageError(
            f"--num_negatives {number} of --loss {config.loss}: the training rows hold {most} "
            "items to draw from"
        )
    return Negatives(weights, number)


@dataclass(frozen=True)
class SequenceLoss:
    """The mean loss over the targets of a step (engine.step.StepLoss)."""

    name: str
    """A name in LOSSES."""
    negatives: Negatives

    def normalisers(self, batch: SequenceBatch) -> torch.Tensor:
        """Return the number of targets, float64 (1,)."""
        return torch.tensor([len(batch.targets)], dtype=torch.float64)

    def coefficients(self, step: int) -> torch.Tensor:
        """Return 1: there is one loss."""
        return torch.ones(1)

    def terms(self, engine: Any, batch: SequenceBatch) -> LossTerms:
        """Run the forward pass and return Σ loss and the number of targets."""
        batch = batch.to(distributed.device())
        score = partial(engine, batch.histories, batch.positions)
        losses = LOSSES[self.name].function(score, batch.targets, self.negatives)
        num_targets = losses.new_tensor([len(batch.targets)], dtype=torch.float32)
        return LossTerms(losses.sum()[None], num_targets, losses.detach())

    def update(self, totals: StepTotals) -> Mapping[str, float]:
        """Do nothing: the loss has no state."""
        return {}


class SequentialTraining:
    """One training of a sequential recommender (contracts.Training)."""

    normalization = "global"
    validation_metric = VALIDATION_METRIC
    lower_is_better = False
    tags: Mapping[str, str] = {}

    def __init__(self, config: BaselineConfig, run: Path, data: BaselineData, micro_batch: int):
        self.config, self.run, self.data, self.micro_batch = config, run, data, micro_batch
        self.loss = SequenceLoss(config.loss, data.negatives)
        self.seen = data.seen_filter("valid", config)
        self.steps_per_epoch = steps_per_epoch(len(data.train), config.global_batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)

    def facts(self) -> dict[str, str]:
        """Return what the header of the run says of dataset and recommender: name → fact."""
        config, dataset, train = self.config, self.data.dataset, self.data.train
        return {
            "dataset": f"{config.dataset}: {len(train.split):,} training rows in {len(train):,} "
            f"sequences, {len(dataset.splits['valid']):,} validation rows, "
            f"{dataset.num_items:,} items",
            "objective": f"{config.recommender}, {config.loss}",
        }

    def micro_batches(self, first: int) -> Iterator[list[SequenceBatch]]:
        """Yield this rank's micro-batches of steps `first`, `first` + 1, …

        They follow from the step's number alone. The sequences of a step are drawn at random: its
        loss is a mean over its targets, so a step of short sequences would give their targets more
        weight. Within the step, sequences of similar length share a micro-batch, which saves
        padding.
        """
        config, chains = self.config, self.data.train
        rank, world = distributed.rank(), distributed.world_size()
        lengths = np.append(chains.lengths, 0)  # MASKED_ROW reads this last 0, and comes last
        for step in count(first):
            epoch, place = divmod(step, self.steps_per_epoch)
            if step == first or place == 0:
                order = epoch_batches(
                    chains.lengths, config.global_batch_size, config.seed, epoch, group=False
                )
            sequences = order[place][np.argsort(-lengths[order[place]], kind="stable")]
            yield [chains.collate(part) for part in deal(sequences, rank, world, self.micro_batch)]

    def values(self, sums: StepSums, seconds: float) -> dict[str, float]:
        """Return the mean loss over the logged steps' targets, and the targets per second."""
        loss, num_targets = float(sums.numerators[0]), float(sums.normalisers[0])
        return {
            "train/loss": loss / num_targets if num_targets else 0.0,
            "speed/rows_per_second": num_targets / seconds,
        }

    def validate(self, engine: Any) -> dict[str, float]:
        """Return NDCG@10 of the full ranking."""
        return validate(engine.module, self.config, self.data, self.seen)

    def save(self, engine: Any) -> None:
        """Save RUN/model: weights and description."""

        def describe(folder: Path) -> None:
            self.data.write_description(folder, self.config)

        save_model(engine, self.run / "model", lora=False, extras=describe)

    def state_dict(self) -> dict[str, Any]:
        """Return {}: the loss has no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: the loss has no state."""


def validate(
    model: Any, config: BaselineConfig, data: BaselineData, seen: SeenFilter | None
) -> dict[str, float]:
    """Return NDCG@10 of a full ranking of the validation rows; all ranks call it.

    Args:
        model: the recommender.
        config: the run's settings.
        data: what the run works on.
        seen: leaves seen items out of the lists, as in the evaluation; None keeps them.
    """
    split = data.dataset.splits["valid"]
    rows = sample_rows(len(split), config.validation_rows, config.seed)
    ranked = Ranked(data.stored, data.dataset, split, rows, 10, run=None)
    ranker = Ranker(model, data.leaves, config.batch_size)
    return {f"valid/{VALIDATION_METRIC}": ranker.ndcg(ranked, seen)}
