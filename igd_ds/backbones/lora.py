"""LoRA adapters and 4-bit base weights (QLoRA), by PEFT and bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from igd_ds.backbones.vocabulary import resize, vocabulary_names
from igd_ds.errors import UsageError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from igd_ds.config.model import ModelOptions


def adaptable_layers(model: torch.nn.Module) -> list[tuple[int, int]]:
    """Return (input width, output width) of every linear layer. GPT-2 calls its layers Conv1D."""
    from transformers.pytorch_utils import Conv1D

    shapes = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            shapes.append((module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            shapes.append((module.weight.shape[0], module.weight.shape[1]))
    return shapes


def with_lora(
    model: PreTrainedModel, options: ModelOptions, added_ids: range, revision: str = ""
) -> PeftModel:
    """Return the model with LoRA matrices. The rows of `added_ids` are trained fully beside them.

    `revision` is the hub commit of the model's weights, which the adapter's own file records.

    Raises:
        UsageError: PEFT does not find or does not know the modules that --lora_targets names.
    """
    import peft

    targets = options.lora_targets
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        trainable_token_indices={name: list(added_ids) for name in vocabulary_names(model)}
        if added_ids
        else None,
    )
    if options.load_in_4bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    try:
        # The DeepSpeed file sets the precision of the adapter too: the optimizer keeps the fp32
        # master copy, so PEFT must not cast the adapter to fp32.
        return peft.get_peft_model(
            model, lora, autocast_adapter_dtype=False, revision=revision or None
        )
    except ValueError as error:
        raise UsageError(f"--lora_targets {targets}: {error}") from error


def take_up(model: PeftModel, folder: Path) -> None:
    """Set the LoRA matrices, and the rows of added tokens, to those of the adapter in `folder`.

    Raises:
        UsageError: the adapter adapts other modules or other tokens than `model` does.
    """
    import peft

    weights = peft.load_peft_weights(str(folder), device="cpu")
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes, fitting = ({k: v.shape for k, v in each.items()} for each in (weights, expected))
    if differing := sorted(k for k in shapes | fitting if shapes.get(k) != fitting.get(k)):
        raise UsageError(
            f"--lora_targets: the adapter in {folder} adapts other modules than this training "
            f"would, such as {differing[0]}: give the --lora_targets and the --tokenizer that it "
            "was trained with"
        )
    peft.set_peft_model_state_dict(model, weights)


def with_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Return the base model with the adapter in `folder`, including the rows of added tokens."""
    import peft

    description = json.loads((folder / "adapter_config.json").read_text())
    rows_of = description.get("trainable_token_indices") or {}
    if rows_of:
        resize(model, 1 + max(max(rows) for rows in rows_of.values()))

    model = peft.PeftModel.from_pretrained(model, folder)
    for module in model.modules():
        if isinstance(module, peft.tuners.trainable_tokens.TrainableTokensLayer):
            # Without merging, each forward pass copies the whole weight to put the rows in.
            module.merge()
    return model


def merged(model: PeftModel) -> PreTrainedModel:
    """Return the base model with the LoRA matrices added to its weights."""
    whole: PreTrainedModel = model.merge_and_unload()
    return whole


def quantisation(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return QLoRA's quantisation: NF4 with double quantisation, computing in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_4bit_trainable(model: torch.nn.Module) -> None:
    """Turn off a weight layout of bitsandbytes that breaks training on CPUs with avx512_bf16.

    There, a forward pass in eval mode repacks the weights in place, and any training after it is
    silently wrong.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
