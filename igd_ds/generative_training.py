"""What the loop trains for `igd train`: prompts and items, an objective, a validation."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import igd_ds
from igd_ds import distributed
from igd_ds.backbones.saved import (
    BASE_FILE,
    DESCRIPTION_FILE,
    write_manifest,
)
from igd_ds.config.training import LoopOptions
from igd_ds.contracts import (
    MASKED_ROW,
    Backbone,
    Batch,
    Logits,
    LossTerms,
    Objective,
    ObjectiveContext,
    StepTotals,
)
from igd_ds.data.batches import (
    Collator,
    ShuffledRows,
    TokenColumns,
    deal,
    sample_rows,
    steps_per_epoch,
)
from igd_ds.data.chains import RowChains
from igd_ds.data.dataset import Split
from igd_ds.data.prompts import PromptBuilder
from igd_ds.engine.export import save_model
from igd_ds.engine.step import StepSums
from igd_ds.evaluation.model_card import write_model_card
from igd_ds.evaluation.validation import VALIDATIONS, ValidationTask
from igd_ds.folders import read_json_object, write_json
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.store import load_catalogue
from igd_ds.objectives import OBJECTIVES
from igd_ds.train_config import TrainConfig
from igd_ds.training_inputs import Inputs

A = TypeVar("A")
R = TypeVar("R")

OBJECTIVE_FILE = "objective.json"
"""In RUN/model: the objective's state, where it has one (λ of multi-target, τ of msl)."""


@dataclass(frozen=True)
class TokenSums:
    """Sums over micro-batches of what the log reports about tokens; the names of statistics."""

    nll: Any
    """Unweighted NLL of all target tokens, nats."""
    tokens: Any
    """Target tokens."""
    nll_zero: Any
    """Unweighted NLL of the target tokens with zero information gain, nats."""
    tokens_zero: Any
    """Target tokens with zero information gain."""
    weight_zero: Any
    """Weight of these tokens, mean over the targets of the loss."""
    rows: Any
    """Rows."""
    input_tokens: Any
    """Tokens that the model reads, padding excluded."""

    @classmethod
    def of_batch(cls, batch: Batch, nll: torch.Tensor) -> "TokenSums":
        """Return the sums of one micro-batch, scalar tensors; `nll` is float32 (n,)."""
        zero = batch.zero_gain
        return cls(
            nll=nll.sum(),
            tokens=nll.new_tensor(len(nll)),
            nll_zero=(nll * zero).sum(),
            tokens_zero=zero.sum(),
            weight_zero=(batch.weights.mean(1) * zero).sum(),
            rows=(batch.row_ids != MASKED_ROW).sum(),
            input_tokens=batch.inputs.num_tokens(),
        )

    @classmethod
    def of_statistics(cls, statistics: Mapping[str, Any]) -> "TokenSums":
        """Find the sums again in a step's statistics, as floats; 0 where there was no step."""
        names = [entry.name for entry in dataclasses.fields(cls)]
        return cls(**{name: float(statistics.get(name, 0.0)) for name in names})


@dataclass(frozen=True)
class TokenLoss:
    """An objective over a backbone's logits (engine.step.StepLoss)."""

    backbone: Backbone
    objective: Objective
    context: ObjectiveContext

    def normalisers(self, batch: Batch) -> torch.Tensor:
        """Return the objective's."""
        return self.objective.normalisers(batch)

    def coefficients(self, step: int) -> torch.Tensor:
        """Return the objective's."""
        return self.objective.coefficients(step)

    def terms(self, engine: Any, batch: Batch) -> LossTerms:
        """Run the forward passes and return the objective's terms, with TokenSums as statistics."""
        batch = batch.to(distributed.device())
        tokens, null = self.backbone.label_logits(engine, batch), None
        if batch.null is not None:
            null = self.backbone.label_logits(engine, batch.null)[batch.null_index]

        terms = self.objective.loss(batch, Logits(tokens, null), self.context)
        sums = vars(TokenSums.of_batch(batch, terms.nll))
        assert not sums.keys() & terms.statistics.keys(), "these names belong to the log's sums"
        return dataclasses.replace(terms, statistics={**sums, **terms.statistics})

    def update(self, totals: StepTotals) -> Mapping[str, float]:
        """Tell the objective about the step."""
        return self.objective.update(totals)


class GenerativeTraining:
    """One training of a language model on token paths of items (contracts.Training).

    Args:
        config: the run's settings.
        run: the run folder; its catalogue/ is there.
        inputs: what the run is given.
        micro_batch: rows of a rank's micro-batch.

    Raises:
        UsageError: the catalogue, the tokenizer and the dataset do not belong together, or the
            longest item leaves no room for a prompt.
    """

    def __init__(self, config: TrainConfig, run: Path, inputs: Inputs, micro_batch: int):
        self.config, self.run, self.inputs, self.micro_batch = config, run, inputs, micro_batch
        dataset, tokenizer, backbone = inputs.dataset, inputs.tokenizer, inputs.backbone
        stored = load_catalogue(run / "catalogue", tokenizer=tokenizer, dataset=dataset)
        catalogue = stored.catalogue
        budget = config.max_length - catalogue.max_length
        prompts = PromptBuilder.build(inputs.template, tokenizer, dataset, catalogue.kind, budget)

        train, valid = dataset.splits["train"], dataset.splits["valid"]
        for split in (train, valid):
            prompts.refuse_empty_prompts(split)

        # The objective and its weights, one per catalogue token.
        self.steps_per_epoch = steps_per_epoch(len(train), config.global_batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.objective = OBJECTIVES[config.objective](config.objective_options(), self.total_steps)
        context = ObjectiveContext(
            stored, SearchTrie.build(stored.trie, distributed.device()), config.dataset
        )
        columns = TokenColumns.build(stored, self.objective.weights(context))

        # What turns row ids into batches.
        null_prompt = prompts.null if self.objective.needs_null else None
        pad, encoder_decoder = tokenizer.pad_token_id, inputs.model_config.is_encoder_decoder
        as_tree = inputs.packing == "tree"
        self.collator = Collator(
            train, prompts, columns, pad, encoder_decoder, as_tree, null_prompt
        )
        valid_rows = dataclasses.replace(self.collator, split=valid, null_prompt=None)
        self.order = row_order(inputs, train, prompts, columns, config.length_grouping)

        self.loss = TokenLoss(backbone, self.objective, context)
        self.validation = ValidationTask(backbone, self.objective, context, valid_rows)
        self.prompts, self.stored = prompts, stored
        self.normalization = config.normalization
        self.validation_metric = config.validation_metric
        self.lower_is_better = config.validation_metric == "nll"
        self.tags = dict(self.objective.tags)
        if len(self.objective.targets) > 1:
            for name in self.objective.targets:
                self.tags[f"train/loss_{name}"] = f"nats per unit of weight: target {name}"

    def facts(self) -> dict[str, str]:
        """Return what the header of the run says of dataset, catalogue and rows: name → fact."""
        config, splits, stored = self.config, self.inputs.dataset.splits, self.stored
        train, longest_item = splits["train"], stored.catalogue.max_length
        return {
            "dataset": f"{config.dataset}: {len(train):,} training rows, {len(splits['valid']):,} "
            f"validation rows, {stored.catalogue.num_items:,} items",
            "catalogue": f"{stored.trie.num_nodes:,} trie nodes, {stored.zero_gain.mean():.1%} "
            "zero-gain tokens",
            "prompts": self.prompts.describe_cuts(train, longest_item),
            "model": (config.model_name_or_path or config.model_config)
            + (f", LoRA of rank {config.lora_r}" if config.lora_r else "")
            + (" on 4-bit weights" if config.load_in_4bit else ""),
            "objective": f"{config.objective}; packing: {self.inputs.packing}, batching: "
            f"{self.inputs.batching}",
        }

    def micro_batches(self, first: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of steps `first`, `first` + 1, …; the next is made
        meanwhile.

        The rows of a step follow from the step's number alone: that is all a resumed run needs to
        know.
        """
        yield from one_ahead(self._collate, self._rows(first))

    def _rows(self, first: int) -> Iterator[np.ndarray]:
        """Yield the rows of steps `first`, `first` + 1, …"""
        for step in range(first, self.total_steps):
            if step == first or step % self.steps_per_epoch == 0:
                order = self._order(step // self.steps_per_epoch)
            yield order[step % self.steps_per_epoch]

    def _order(self, epoch: int) -> np.ndarray:
        return self.order.epoch(self.config.global_batch_size, self.config.seed, epoch)

    def _collate(self, rows: np.ndarray) -> list[Batch]:
        rank, world = distributed.rank(), distributed.world_size()
        parts = self.order.deal(rows, rank, world, self.micro_batch)
        return [self.collator(part) for part in parts]

    def values(self, sums: StepSums, seconds: float) -> dict[str, float]:
        """Return the log's scalars: sums first, one division last."""
        tokens = TokenSums.of_statistics(sums.statistics)
        values = {"train/loss": ratio(sums.objective, sums.steps)}
        values |= {tag: ratio(value, sums.steps) for tag, value in sums.scalars.items()}
        if len(self.objective.targets) > 1:
            by_target = zip(self.objective.targets, sums.numerators, sums.normalisers, strict=True)
            values |= {f"train/loss_{name}": ratio(n, omega) for name, n, omega in by_target}
        return values | {
            "train/nll": ratio(tokens.nll, tokens.tokens),
            "train/nll_zero_gain": ratio(tokens.nll_zero, tokens.tokens_zero),
            "train/nll_nonzero_gain": ratio(
                tokens.nll - tokens.nll_zero, tokens.tokens - tokens.tokens_zero
            ),
            "train/zero_gain_weight_share": ratio(tokens.weight_zero, sums.normalisers.mean()),
            "speed/target_tokens_per_second": tokens.tokens / seconds,
            "speed/tokens_per_second": tokens.input_tokens / seconds,
            "speed/rows_per_second": tokens.rows / seconds,
        }

    def validate(self, engine: Any) -> dict[str, float]:
        """Measure the validation metric on a seeded sample of the validation rows."""
        return validated(engine, self.validation, self.config.validation_metric, self.config)

    def save(self, engine: Any) -> None:
        """Save RUN/model: weights or adapter, tokenizer, catalogue, description."""
        save_model(engine, self.run / "model", bool(self.config.lora_r), self._save_extras)

    def _save_extras(self, folder: Path) -> None:
        save_extras(folder, self.run, self.inputs.tokenizer, self.description())
        if state := self.objective.state_dict():
            write_json(folder / OBJECTIVE_FILE, state)
        write_model_card(self.run, folder)
        write_manifest(folder)

    def description(self) -> dict[str, Any]:
        """Return what an evaluation needs beside Hugging Face's own files."""
        return {
            "base": base_of_run(self.run),
            "prompt": self.inputs.template.as_dict(),
            "max_length": self.config.max_length,
            "max_title_tokens": self.config.max_title_tokens,
            "item_kind": self.stored.catalogue.kind,
            "entropy": self.config.entropy,
            "likelihood": dataclasses.asdict(self.objective.likelihood()),
            "load_in_4bit": self.config.load_in_4bit,
            "version": igd_ds.__version__,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the objective's state."""
        return self.objective.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the objective's state."""
        if state:
            self.objective.load_state_dict(state)


def row_order(
    inputs: Inputs,
    split: Split,
    prompts: PromptBuilder,
    columns: TokenColumns,
    length_grouping: bool,
) -> ShuffledRows | RowChains:
    """Return the order in which a training meets the rows of a split."""
    if inputs.batching == "chains":
        return RowChains.build(split, prompts, columns)
    lengths = prompts.lengths(split) + np.diff(columns.offsets)[split.targets]
    return ShuffledRows(lengths, length_grouping)


def one_ahead(make: Callable[[A], R], arguments: Iterable[A]) -> Iterator[R]:
    """Yield make(argument) of each argument; the next is made meanwhile, in a thread."""
    with ThreadPoolExecutor(1) as pool:
        pending: Future[R] | None = None
        for argument in arguments:
            following = pool.submit(make, argument)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def validated(
    engine: Any, task: ValidationTask, metric: str, options: LoopOptions
) -> dict[str, float]:
    """Measure a metric of VALIDATIONS on a seeded sample of the validation rows; all ranks."""
    world, micro = distributed.world_size(), engine.train_micro_batch_size_per_gpu()
    split = task.rows.split
    rows = sample_rows(len(split), options.validation_rows, options.seed)
    if not task.rows.as_tree:
        # Rows of similar length share a batch, which saves padding.
        rows = rows[np.argsort(-task.rows.prompts.lengths(split)[rows], kind="stable")]
    rows = np.concatenate([rows, np.full(-len(rows) % (micro * world), MASKED_ROW)])
    batches = deal(rows, distributed.rank(), world, micro)

    engine.eval()
    with torch.no_grad():
        values = VALIDATIONS[metric](engine, task, batches)
    engine.train()
    return values


def save_extras(folder: Path, run: Path, tokenizer: Any, description: Mapping[str, Any]) -> None:
    """Put tokenizer, catalogue and description beside saved weights."""
    tokenizer.save_pretrained(folder)
    shutil.copytree(run / "catalogue", folder / "catalogue")
    write_json(folder / DESCRIPTION_FILE, description)


def base_of_run(run: Path) -> dict[str, Any] | None:
    """Return the record of the pretrained weights that a run began with; None for random ones."""
    if not (run / BASE_FILE).is_file():
        return None
    return read_json_object(run / BASE_FILE, "restore it, or start a new run")


def ratio(numerator: float, denominator: float) -> float:
    """Return numerator / denominator, and 0 where the denominator is 0."""
    return float(numerator / denominator) if denominator else 0.0
