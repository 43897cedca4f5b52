"""T5 (TIGER): the encoder reads the history and the decoder writes the item."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from igd_ds.backbones.saved import reading_weights, refuse_random_weights
from igd_ds.contracts import IGNORED, Batch, Capabilities, PaddedRows, PromptTree
from igd_ds.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from igd_ds.config.model import ModelOptions, ModelSource


class T5:
    """Backbone of encoder-decoders, of which T5 is known. It implements `contracts.Backbone`."""

    def capabilities(self, model_config: PreTrainedConfig) -> Capabilities:
        """Return what a T5 can do. Its position bias rules flash attention out."""
        return Capabilities(
            packed_training=False, tree_search=True, attention=("sdpa", "eager"), adapters=False
        )

    def fit_model_config(
        self,
        model_config: PreTrainedConfig,
        options: ModelOptions,
        tokenizer: PreTrainedTokenizerBase,
        added_ids: range,
    ) -> None:
        """Check that configuration, options and tokenizer suit each other; complete a new model's.

        A new model (--model_config) gets the tokenizer's size as its vocabulary, whatever the file
        says, the tokenizer's EOS and PAD, and PAD as the decoder's first token. T5 has only
        relative positions, so --max_length has no bound here.

        Raises:
            UsageError: the model is no T5, an option is not for T5, or the tokenizer has tokens
                that a pretrained T5 does not have.
        """
        name = options.model_config or options.model_name_or_path
        can = self.capabilities(model_config)
        if model_config.model_type != "t5":
            raise UsageError(
                f"'{name}' is a model of type {model_config.model_type}: the encoder-decoder known "
                "here is t5"
            )
        if options.lora_r:
            raise UsageError(
                f"--lora_r adapts causal LMs, and '{name}' is a T5: leave it out to train all "
                "weights"
            )
        if options.attn_implementation not in ("auto", *can.attention):
            raise UsageError(
                f"--attn_implementation {options.attn_implementation} has no position bias, which "
                f"T5 needs: give {' or '.join(can.attention)}"
            )

        if options.model_config:
            model_config.vocab_size = len(tokenizer)
            model_config.eos_token_id = tokenizer.eos_token_id
            model_config.pad_token_id = tokenizer.pad_token_id
            model_config.decoder_start_token_id = tokenizer.pad_token_id
        elif added_ids or model_config.vocab_size < len(tokenizer):
            unknown = len(added_ids) or len(tokenizer) - model_config.vocab_size
            raise UsageError(
                f"the tokenizer has {unknown} tokens that the pretrained T5 at '{name}' does not "
                "know: give its own tokenizer, or train a new T5 with --model_config tiger"
            )

    def num_trained_parameters(
        self, model_config: PreTrainedConfig, options: ModelOptions, added_ids: range = range(0)
    ) -> int:
        """Return how many parameters are trained: all, with tied ones counted once."""
        from transformers import T5ForConditionalGeneration

        with torch.device("meta"):
            model = T5ForConditionalGeneration(model_config)
        return sum(parameter.numel() for parameter in model.parameters())

    def build(
        self,
        options: ModelOptions,
        model_config: PreTrainedConfig,
        dtype: torch.dtype,
        device: torch.device,
        added_ids: range = range(0),
        seed: int = 0,
    ) -> torch.nn.Module:
        """Build the T5 that the options describe, with random or pretrained weights.

        The weights stay where they are loaded (on the CPU, or partitioned under ZeRO-3);
        `engine.initialize` moves them to the device.
        """
        from transformers import AutoModelForSeq2SeqLM

        kernel = options.attn_implementation
        if kernel == "auto":
            kernel = self.capabilities(model_config).attention[0]
        settings = {"dtype": dtype, "attn_implementation": kernel}
        if options.model_config:
            model = AutoModelForSeq2SeqLM.from_config(model_config, **settings)
        else:
            name = options.model_name_or_path
            with reading_weights(name):
                model, report = AutoModelForSeq2SeqLM.from_pretrained(
                    name,
                    revision=options.revision or None,
                    output_loading_info=True,
                    **settings,
                )
            refuse_random_weights(name, model, report["missing_keys"])
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        return model

    def load(
        self, source: ModelSource, load_in_4bit: bool, device: torch.device
    ) -> torch.nn.Module:
        """Load the T5 that a training saved, for inference."""
        from transformers import AutoModelForSeq2SeqLM

        assert not load_in_4bit, "fit_model_config lets no T5 be quantised"
        with reading_weights(source.model):
            model, report = AutoModelForSeq2SeqLM.from_pretrained(
                source.model,
                dtype="auto" if source.dtype == "auto" else getattr(torch, source.dtype),
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        refuse_random_weights(source.model, model, report["missing_keys"])
        return model.to(device).eval()

    def label_logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return the logits (n, V) that predict the n labelled tokens, row by row.

        The decoder reads the labels moved one place to the right, behind its start token. Its rows
        hold only items, whose codes have one length, so hardly any logits are made in vain. With no
        labelled token at all, n is 0 and the graph is still there.

        Args:
            model: T5ForConditionalGeneration, or the engine around it.
            batch: its inputs are PaddedRows, `input_ids` the prompts and `labels` the items.
        """
        rows = batch.inputs
        assert isinstance(rows, PaddedRows), "an encoder reads its prompts both ways"
        logits: torch.Tensor = model(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(rows.labels),
            use_cache=False,
        ).logits
        return logits[rows.labels != IGNORED]

    def prompt_tree(
        self, model: PreTrainedModel, output_tokens: np.ndarray | None = None
    ) -> PromptTree:
        """Return an empty tree for one batch of searches."""
        from igd_ds.backbones.encoder_tree import EncoderPromptTree

        return EncoderPromptTree(model, output_tokens)
