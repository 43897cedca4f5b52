"""What all trainings of `igd prefer` have in common: rows, validation and saving."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import igd_ds
from igd_ds import distributed
from igd_ds.backbones.saved import write_manifest
from igd_ds.contracts import ObjectiveContext
from igd_ds.data.batches import Collator, TokenColumns, steps_per_epoch
from igd_ds.data.prompts import PromptBuilder
from igd_ds.engine.ds_config import DsConfig, dtype_of
from igd_ds.engine.export import save_model
from igd_ds.evaluation.model_card import write_model_card
from igd_ds.evaluation.validation import ValidationTask
from igd_ds.generative_training import base_of_run, row_order, save_extras, validated
from igd_ds.items.search_trie import SearchTrie
from igd_ds.objectives.preference import ItemLikelihood
from igd_ds.prefer_config import PreferConfig
from igd_ds.preference.live_search import LiveSearch
from igd_ds.preference.scorer import ItemScorer
from igd_ds.preference.start import Start


class ContinuedTraining:
    """A training that goes on from a trained model: most of contracts.Training.

    A subclass adds the batches, their loss, its log, and what it prepares in `begin`.

    Args:
        config: the run's settings.
        run: the run folder; its catalogue/ is there.
        start: the model to begin with.
        ds: the resolved DeepSpeed configuration.

    Raises:
        UsageError: the longest item leaves no room for a prompt.
    """

    normalization = "global"

    def __init__(self, config: PreferConfig, run: Path, start: Start, ds: DsConfig):
        self.config, self.run, self.start = config, run, start
        self.micro_batch, self.dtype = ds["train_micro_batch_size_per_gpu"], dtype_of(ds)
        self.validation_metric = config.validation_metric
        self.lower_is_better = config.validation_metric == "nll"
        inputs, stored = start.inputs, start.stored
        train, valid = inputs.dataset.splits["train"], inputs.dataset.splits["valid"]
        self.steps_per_epoch = steps_per_epoch(len(train), config.global_batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)

        # What turns rows into batches. Tokens have no weights here.
        catalogue = stored.catalogue
        budget = start.options.max_length - catalogue.max_length
        prompts = PromptBuilder.build(
            inputs.template, inputs.tokenizer, inputs.dataset, catalogue.kind, budget
        )
        columns = TokenColumns.build(stored, np.ones((len(catalogue.token_ids), 1), np.float32))
        pad, encoder_decoder = inputs.tokenizer.pad_token_id, inputs.model_config.is_encoder_decoder
        as_tree = inputs.packing == "tree"
        self.collator = Collator(train, prompts, columns, pad, encoder_decoder, as_tree)
        self.order = row_order(inputs, train, prompts, columns, length_grouping=True)

        # What scores items, searches them and measures both.
        context = ObjectiveContext(
            stored, SearchTrie.build(stored.trie, distributed.device()), config.dataset
        )
        measure = ItemLikelihood(start.likelihood)
        self.scorer = ItemScorer(start, self.collator, measure, context)
        self.live_search = LiveSearch.build(start, self.collator)
        valid_rows = dataclasses.replace(self.collator, split=valid)
        self.validation = ValidationTask(inputs.backbone, measure, context, valid_rows)

    def facts(self) -> dict[str, str]:
        """Return what the header of the run says of model, dataset and rows: name → fact."""
        config, splits = self.config, self.start.inputs.dataset.splits
        return {
            "dataset": f"{config.dataset}: {len(splits['train']):,} training rows, "
            f"{len(splits['valid']):,} validation rows, "
            f"{self.start.stored.catalogue.num_items:,} items",
            "model": config.model,
            "objective": f"{config.objective} under the {self.start.likelihood.softmax} softmax; "
            f"packing: {self.start.inputs.packing}",
        }

    def rows_of(self, epoch: int) -> np.ndarray:
        """Return an epoch's row ids in their order, int64 (steps, G)."""
        return self.order.epoch(self.config.global_batch_size, self.config.seed, epoch)

    def own_parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return this rank's micro-batches of a global batch (G,)."""
        rank, world = distributed.rank(), distributed.world_size()
        return self.order.deal(rows, rank, world, self.micro_batch)

    def load_reference(self) -> torch.nn.Module | None:
        """Load the reference, whole on every rank; None if the adapter is switched off instead."""
        return self.start.load_reference(self.config, self.dtype)

    def validate(self, engine: Any) -> dict[str, float]:
        """Measure the validation metric on a seeded sample of the validation rows."""
        return validated(engine, self.validation, self.validation_metric, self.config)

    def save(self, engine: Any) -> None:
        """Save RUN/model, like a run of igd train."""
        save_model(engine, self.run / "model", bool(self.start.options.lora_r), self._save_extras)

    def _save_extras(self, folder: Path) -> None:
        save_extras(folder, self.run, self.start.inputs.tokenizer, self.description())
        write_model_card(self.run, folder)
        write_manifest(folder)

    def description(self) -> dict[str, Any]:
        """Return what an evaluation needs beside Hugging Face's own files."""
        return dict(self.start.description) | {
            "base": base_of_run(self.run),
            "likelihood": dataclasses.asdict(self.start.likelihood),
            "load_in_4bit": self.start.options.load_in_4bit,
            "version": igd_ds.__version__,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return {}: the loss has no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: the loss has no state."""
