"""Causal language models (any AutoModelForCausalLM): full fine-tuning, LoRA and 4-bit QLoRA.

A tokenizer may have tokens beyond the model's own (`igd tokenizer --add_codes_to` adds codes of
semantic IDs). They get an input row and an output row each, which are trained fully, under LoRA
too, and are saved with the adapter.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from igd_ds.backbones import lora, vocabulary
from igd_ds.backbones.model_config import read_model_config, text_config_of
from igd_ds.backbones.saved import (
    Origin,
    base_of,
    origin_of,
    reading_weights,
    refuse_random_weights,
)
from igd_ds.contracts import IGNORED, Batch, Capabilities, PromptTree, RowTree
from igd_ds.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from igd_ds.config.model import ModelOptions, ModelSource

TEXT_WEIGHTS = {
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}
"""Names of the text model's weights in a multimodal checkpoint → names in the text model alone."""


def predicting_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return which positions predict a label, bool (B, T): those one before each labelled token.

    `labels` is int64 (B, T), unshifted. As `logits_to_keep` of transformers, the mask gives logits
    (n, V), row by row, in the order of `labels[labels != IGNORED]`.

    Example:
        >>> predicting_positions(torch.tensor([[-100, -100, 3, 1]])).tolist()
        [[False, True, True, False]]
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask


class CausalLM:
    """Backbone of all decoder-only models. It implements `contracts.Backbone`."""

    def capabilities(self, model_config: PreTrainedConfig) -> Capabilities:
        """Return what models of this configuration can do, without loading weights.

        Raises:
            UsageError: transformers has no causal LM for this kind of model.
        """
        from igd_ds.backbones.capabilities import capabilities_of

        return capabilities_of(model_config)

    def fit_model_config(
        self,
        model_config: PreTrainedConfig,
        options: ModelOptions,
        tokenizer: PreTrainedTokenizerBase,
        added_ids: range,
    ) -> None:
        """Check that configuration, options and tokenizer suit each other.

        The tokens `added_ids` need no row in the model yet: `build` makes the rows.

        Raises:
            UsageError: the tokenizer has more tokens than the model has rows, --max_length exceeds
                the context, or the model cannot be trained with the options.
        """
        name = options.model_config or options.model_name_or_path
        can = self.capabilities(model_config)
        if options.attn_implementation not in ("auto", *can.attention):
            raise UsageError(
                f"--attn_implementation {options.attn_implementation}: models of type "
                f"{model_config.model_type} do not have it; give {' or '.join(can.attention)}"
            )
        if options.lora_r and not can.adapters:
            raise UsageError(
                f"--lora_r: '{name}' has no linear layers that LoRA could adapt; leave it out to "
                "train all weights"
            )

        if model_config.vocab_size < len(tokenizer) - len(added_ids):
            raise UsageError(
                f"the tokenizer has {len(tokenizer)} tokens but the model at '{name}' only "
                f"{model_config.vocab_size}: this tokenizer belongs to another model (pretrained "
                "weights take their own with tokens added, if it lies beside them)"
            )
        self._check_context(model_config, options)
        if added_ids and options.lora_r:
            self._check_added_rows(model_config, options)

    def _check_context(self, model_config: PreTrainedConfig, options: ModelOptions) -> None:
        """Raise UsageError where --max_length goes beyond what the model's positions allow."""
        context = getattr(model_config, "max_position_embeddings", None)
        if context and options.max_length > context:
            raise UsageError(
                f"--max_length {options.max_length} exceeds the model's context of {context} tokens"
            )

        # Beyond the original context, these rotary frequencies depend on the longest sequence of
        # the pass, so the score of a hypothesis would depend on its neighbours in the batch.
        rope = getattr(model_config, "rope_parameters", None) or {}
        original = rope.get("original_max_position_embeddings", context)
        if (
            rope.get("rope_type") in ("dynamic", "longrope")
            and original
            and options.max_length > original
        ):
            raise UsageError(
                f"--max_length {options.max_length} exceeds {original} tokens, beyond which the "
                f"model's rotary frequencies ({rope['rope_type']}) change with the batch: lower it"
            )

    def _check_added_rows(self, model_config: PreTrainedConfig, options: ModelOptions) -> None:
        """Raise UsageError where LoRA cannot train the rows of added tokens."""
        from igd_ds.backbones.capabilities import model_without_weights

        model = model_without_weights(model_config)
        for name in vocabulary.vocabulary_names(model):
            if name.rpartition(".")[2] in options.lora_targets.split(","):
                raise UsageError(
                    f"--lora_targets {options.lora_targets}: the rows of added tokens in {name} "
                    "are trained fully; leave it out"
                )
        if model.get_output_embeddings().bias is not None:
            raise UsageError(
                "--lora_r: PEFT cannot train rows of an output layer with a bias; leave it out to "
                "train all weights"
            )

    def num_trained_parameters(
        self, model_config: PreTrainedConfig, options: ModelOptions, added_ids: range = range(0)
    ) -> int:
        """Return how many parameters the options train, from the configuration alone.

        With LoRA, all linear layers are counted, whatever --lora_targets says.
        """
        from igd_ds.backbones.capabilities import model_without_weights

        model = model_without_weights(model_config)
        new_rows = vocabulary.num_row_parameters(model, len(added_ids))
        if not options.lora_r:
            return new_rows + sum(parameter.numel() for parameter in model.parameters())
        return new_rows + sum(
            options.lora_r * (inputs + outputs) for inputs, outputs in lora.adaptable_layers(model)
        )

    def build(
        self,
        options: ModelOptions,
        model_config: PreTrainedConfig,
        dtype: torch.dtype,
        device: torch.device,
        added_ids: range = range(0),
        seed: int = 0,
    ) -> torch.nn.Module:
        """Build the model that the options describe.

        Its weights are random or pretrained, quantised or not, with or without LoRA. Where
        --model_name_or_path names an adapter, that adapter is trained on. The weights stay
        where they are loaded (on the CPU, or partitioned under ZeRO-3); `engine.initialize` moves
        them. Only quantised weights are placed on `device` at once. Tokens `added_ids` get rows of
        their own; together with LoRA, the weights must then be loaded whole, because PEFT reads the
        rows.
        """
        from transformers import AutoModelForCausalLM

        from igd_ds.backbones.tree_attention import attention_in_recomputation

        settings: dict[str, Any] = {
            "attn_implementation": self._kernel(options, model_config),
            "trust_remote_code": options.trust_remote_code,
        }
        origin = None
        if options.model_config:
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, **settings)
        else:
            origin = origin_of(options.model_name_or_path, options.revision)
            settings["revision"] = origin.revision or None
            model = load_weights(origin.name, dtype, options.load_in_4bit, device, **settings)

        if added_ids:
            vocabulary.add_rows(model, added_ids, seed)
        if options.gradient_checkpointing:
            contexts = functools.partial(attention_in_recomputation, model.config)
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts}
            )
            if options.lora_r:
                model.enable_input_require_grads()
        if options.lora_r:
            model = lora.with_lora(model, options, added_ids, origin.revision if origin else "")
        if origin and origin.adapter:
            lora.take_up(model, origin.adapter)
        return model

    def _kernel(self, options: ModelOptions, model_config: PreTrainedConfig) -> str:
        """Return the attention kernel that the options ask for, or the backbone's first choice."""
        if options.attn_implementation != "auto":
            return options.attn_implementation
        return self.capabilities(model_config).attention[0]

    def load(
        self, source: ModelSource, load_in_4bit: bool, device: torch.device
    ) -> torch.nn.Module:
        """Load what a training saved, for inference.

        That is full weights, or an adapter on its base model, which is quantised as in training.
        """
        dtype = "auto" if source.dtype == "auto" else getattr(torch, source.dtype)
        base = base_of(source)
        weights = base or Origin(source.model)
        model_config = read_model_config(weights.name, source.trust_remote_code, weights.revision)
        kernels = self.capabilities(model_config).attention
        model = load_weights(
            weights.name,
            dtype,
            load_in_4bit,
            device,
            attn_implementation="sdpa" if "sdpa" in kernels else "eager",
            trust_remote_code=source.trust_remote_code,
            revision=weights.revision or None,
        )

        if base:
            model = lora.with_adapter(model, Path(source.model))
        return model.eval() if load_in_4bit else model.to(device).eval()

    def label_logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return the logits (n, V) that predict the n labelled tokens, row by row.

        Logits of other positions are not made, unless the model's class makes all of them (xLSTM).
        Training calls this with the engine around the model. With no labelled token at all, n is 0
        and the graph is still there.
        """
        inputs = batch.inputs
        if isinstance(inputs, RowTree):
            return self._tree_logits(model, inputs)
        keep = predicting_positions(inputs.labels)
        return self._logits(
            model, keep, input_ids=inputs.input_ids, attention_mask=inputs.attention_mask
        )

    def _tree_logits(self, model: Any, tree: RowTree) -> torch.Tensor:
        """Return the logits (n, V) of a tree; the output layer reads each predicting node once."""
        from igd_ds.backbones.capabilities import bare
        from igd_ds.backbones.row_tree_attention import ROW_TREE_ATTENTION, RowTreePass
        from igd_ds.backbones.tree_attention import attention_by

        # Where no node predicts two tokens, the nodes are taken in the tokens' order: then no
        # logits need to be copied.
        is_one_each = len(tree.predicting) == len(tree.label_place)
        nodes = tree.predicting[tree.label_place] if is_one_each else tree.predicting
        with attention_by(bare(model).config, ROW_TREE_ATTENTION):
            logits = self._logits(
                model,
                nodes,
                input_ids=tree.token[None],
                position_ids=tree.position[None],
                tree=RowTreePass(tree),
            )[0]
        return logits if is_one_each else logits[tree.label_place]

    def _logits(self, model: Any, keep: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Return the logits of the positions `keep`.

        They are (n, V) if `keep` is bool (B, T), and (B, n, V) if it is int64 (n,).
        """
        from igd_ds.backbones.capabilities import forward_arguments

        selects = "logits_to_keep" in forward_arguments(model)
        selected = {"logits_to_keep": keep} if selects else {}
        logits: torch.Tensor = model(**inputs, use_cache=False, **selected).logits
        if selects:
            return logits
        return logits[keep] if keep.dtype == torch.bool else logits[:, keep]

    def prompt_tree(
        self, model: PreTrainedModel, output_tokens: np.ndarray | None = None
    ) -> PromptTree:
        """Return an empty tree for one batch of searches.

        Models that cannot read trees get the slower tree over their own KV cache.
        """
        from igd_ds.backbones.cache_tree import CachePromptTree
        from igd_ds.backbones.prompt_tree import CausalPromptTree

        if self.capabilities(model.config).tree_search:
            return CausalPromptTree(model, output_tokens)
        return CachePromptTree(model, output_tokens)


def load_weights(
    name: str,
    dtype: torch.dtype | str,
    load_in_4bit: bool,
    device: torch.device,
    trust_remote_code: bool = False,
    revision: str | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Load a pretrained causal LM; of a multimodal checkpoint, its text model.

    Quantised weights are placed on `device` at once, as bitsandbytes requires.

    Raises:
        UsageError: the checkpoint lacks weights of the (text) model, or its files are missing or
            damaged.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = {"trust_remote_code": trust_remote_code, "revision": revision}
    settings |= {"dtype": dtype, **source}
    whole = AutoConfig.from_pretrained(name, **source)
    text = text_config_of(whole)
    if text is not whole:
        settings |= {"config": text, "key_mapping": TEXT_WEIGHTS}
    if load_in_4bit:
        compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        settings |= {
            "quantization_config": lora.quantisation(compute),
            "device_map": {"": device},
        }

    with reading_weights(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, **settings
        )
    refuse_random_weights(name, model, report["missing_keys"])
    if load_in_4bit:
        lora.keep_4bit_trainable(model)
    return model
