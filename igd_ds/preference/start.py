"""What a preference training begins with: a trained model, its catalogue, and a reference."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igd_ds import distributed
from igd_ds.backbones import backbone_of, read_model_config
from igd_ds.backbones.saved import (
    ADAPTER_FILE,
    DESCRIPTION_FILE,
    Origin,
    check_model,
    describe,
    hashes_of,
    likelihood_of,
    origin_of,
)
from igd_ds.backbones.tokenizer import added_token_ids, load_tokenizer
from igd_ds.config.model import ModelOptions, ModelSource, TuningOptions
from igd_ds.contracts import Likelihood
from igd_ds.data.cut_titles import with_cut_titles
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.negatives import LeafTable, check_group, check_negatives
from igd_ds.data.prompts import Template
from igd_ds.distributed import say
from igd_ds.errors import UsageError
from igd_ds.folders import read_json_object
from igd_ds.items.store import StoredCatalogue, load_catalogue
from igd_ds.prefer_config import ADAPTER_OFF, AUTO, GRPO, PreferConfig, model_folder
from igd_ds.preference.rewards import Reward
from igd_ds.training_inputs import Inputs, packing_of

AS_TRAINED = ("prompt", "max_length", "max_title_tokens", "item_kind")
"""What a model and its reference have in common, in their descriptions."""


@dataclass(frozen=True)
class Start:
    """A trained model that is trained further, read and checked before a run folder is claimed."""

    folder: Path
    """RUN/model."""
    description: Mapping[str, Any]
    """Its igd_ds.json."""
    options: ModelOptions
    """How the model is built for training."""
    inputs: Inputs
    stored: StoredCatalogue
    leaves: LeafTable
    likelihood: Likelihood
    """The softmax of the item probabilities, in training, validation and search."""
    reference: Path | None
    """RUN/model of the reference; None: the model with its adapter switched off."""
    reward: Reward | None = None
    """The reward of `grpo`; None for preferences."""

    def identity(self) -> dict[str, Any]:
        """Return which weights the training depends on, as JSON values: sha256 by file."""
        reference = self.reference
        return {
            "model": hashes_of(self.folder),
            "reference": "adapter off" if reference is None else hashes_of(reference),
        }

    def load_reference(self, config: PreferConfig, dtype: torch.dtype) -> torch.nn.Module | None:
        """Load the reference, whole on every rank; None if the adapter is switched off instead.

        Args:
            config: names the dataset.
            dtype: the training's, so that both models are rounded alike.
        """
        if self.reference is None:
            return None
        source = ModelSource(
            model=str(self.reference),
            dataset=config.dataset,
            dtype=str(dtype).removeprefix("torch."),
            trust_remote_code=config.trust_remote_code,
        )
        load_in_4bit = describe(self.reference)["load_in_4bit"]
        return self.inputs.backbone.load(source, load_in_4bit, distributed.device())


def load_start(config: PreferConfig) -> Start:
    """Read and check everything but the weights.

    Raises:
        UsageError: there is no trained model; model, dataset and reference do not belong together;
            the options do not suit the model; the catalogue has too few items; or there is no such
            reward.
    """
    folder = model_folder(config.model, "model")
    description, origin = describe(folder), origin_of(str(folder))
    options = _options(config, folder, origin, description)

    # What the model reads and writes, as it was trained.
    whole = InteractionDataset.load(config.dataset)
    tokenizer = load_tokenizer(str(folder), config.trust_remote_code)
    dataset = with_cut_titles(whole, tokenizer, description.get("max_title_tokens", 0))
    stored = load_catalogue(folder / "catalogue", tokenizer, dataset)
    template = Template.from_dict(description["prompt"], f"{folder}/{DESCRIPTION_FILE}")
    leaves = LeafTable.build(stored.trie)
    if config.objective == GRPO:
        check_group(leaves, config.group_size)
    else:
        check_negatives(leaves, config.negatives, config.num_negatives)

    # The model.
    model_config = read_model_config(origin.name, config.trust_remote_code, origin.revision)
    added_ids = range(0)
    if origin.adapter:
        added_ids = added_token_ids(
            tokenizer, origin.name, config.trust_remote_code, origin.revision
        )
    backbone = backbone_of(model_config)
    backbone.fit_model_config(model_config, options, tokenizer, added_ids)
    packing = packing_of(config, backbone, model_config)
    batching = "chains" if packing == "tree" else "rows"
    inputs = Inputs(
        template, dataset, tokenizer, added_ids, model_config, backbone, origin, packing, batching
    )

    likelihood = likelihood_of(description).with_asked(config.softmax, None)
    start = Start(
        folder, description, options, inputs, stored, leaves, likelihood, reference=folder
    )
    reference = _reference(config, start)
    name = reference or "the model with its adapter switched off"
    say(f"packing: {packing}, softmax: {likelihood.softmax}, reference: {name}")
    reward = None
    if config.objective == GRPO:
        reward = Reward.load(config.reward, config.dataset, dataset.splits["train"])
    return dataclasses.replace(start, reference=reference, reward=reward)


def _options(
    config: PreferConfig, folder: Path, origin: Origin, description: Mapping[str, Any]
) -> ModelOptions:
    """Return how the model is built. An adapter is trained further as it is.

    Raises:
        UsageError: the model is an adapter, and a LoRA option is given.
    """
    tuning = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(TuningOptions)
    }
    if origin.adapter:
        if config.lora_r:
            raise UsageError(
                f"--lora_r {config.lora_r}: {folder} is an adapter already, which is trained "
                "further as it is: leave the LoRA options out"
            )
        settings = read_json_object(folder / ADAPTER_FILE, "the adapter is damaged; restore it")
        targets = settings["target_modules"]
        tuning |= {
            "lora_r": settings["r"],
            "lora_alpha": settings["lora_alpha"],
            "lora_dropout": settings["lora_dropout"],
            "lora_targets": targets if isinstance(targets, str) else ",".join(sorted(targets)),
            "load_in_4bit": description["load_in_4bit"],
        }
    return ModelOptions(
        model_name_or_path=str(folder), max_length=description["max_length"], **tuning
    )


def _reference(config: PreferConfig, start: Start) -> Path | None:
    """Return the folder of the reference; None for the model with its adapter switched off.

    Raises:
        UsageError: there is no adapter to switch off, or the reference does not belong to the
            model.
    """
    is_new_adapter = bool(config.lora_r)
    if config.reference == AUTO:
        return None if is_new_adapter else start.folder
    if config.reference == ADAPTER_OFF:
        if not start.options.lora_r:
            raise UsageError(
                f"--reference {ADAPTER_OFF}: all weights of {start.folder} are trained, so there "
                "is no adapter to switch off: give --lora_r, or leave --reference out"
            )
        return None

    reference = model_folder(config.reference, "reference")
    problem = f"--reference {reference} does not belong to --model {start.folder}"
    try:
        stored = load_catalogue(
            reference / "catalogue", start.inputs.tokenizer, start.inputs.dataset
        )
    except UsageError as error:
        raise UsageError(f"{problem}: {error}") from error
    description = describe(reference)
    different = [
        name for name in AS_TRAINED if description.get(name) != start.description.get(name)
    ]
    if likelihood_of(description) != likelihood_of(start.description):
        different.append("likelihood")
    if not np.array_equal(stored.catalogue.token_ids, start.stored.catalogue.token_ids):
        different.append("catalogue")
    if different:
        raise UsageError(
            f"{problem}; these differ: {', '.join(different)}. Give a model that was trained alike"
        )
    source = ModelSource(model=str(reference), dataset=config.dataset)
    distributed.on_main(lambda: check_model(source))
    return reference
