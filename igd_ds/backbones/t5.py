"""TIGER: a T5 whose encoder reads the history and whose decoder writes the item, from random or from pretrained weights.

The same functions as `causal_lm`, for the models that `igd_ds.backbones.adapter_of` sends here.
"""

import torch

from igd_ds.errors import UsageError
from igd_ds.loss import IGNORED


def fit_model_config(model_config, config, tokenizer, added_ids: range) -> None:
    """Check that a model's configuration suits a TrainConfig and a tokenizer; fit that of a new model to the tokenizer.

    A new model (--model_config) gets the tokenizer's size as its vocabulary, whatever the file says, its EOS and PAD, and PAD as
    the decoder's first token. T5 knows relative positions alone, so --max_length has no bound here.

    Raises:
        ValueError: no T5, options T5 has not, or a tokenizer with tokens that a pretrained T5 has not.
    """
    name = config.model_config or config.model_name_or_path
    if model_config.model_type != "t5":
        raise UsageError(
            f"'{name}' is a model of type {model_config.model_type}: the encoder-decoder known here is t5"
        )
    if config.lora_r:
        raise UsageError(
            f"--lora_r adapts causal LMs, and '{name}' is a T5: leave it out to train all weights"
        )
    if config.attn_implementation == "flash_attention_2":
        raise UsageError(
            "--attn_implementation flash_attention_2 has no position bias, which T5 needs: take sdpa or eager"
        )
    if config.model_config:
        model_config.vocab_size = len(tokenizer)
        model_config.eos_token_id = tokenizer.eos_token_id
        model_config.pad_token_id = model_config.decoder_start_token_id = tokenizer.pad_token_id
    elif added_ids or model_config.vocab_size < len(tokenizer):
        raise UsageError(
            f"the tokenizer has {len(added_ids) or len(tokenizer) - model_config.vocab_size} tokens that the pretrained T5 at "
            f"'{name}' does not know: give its own tokenizer, or train a new T5 with --model_config tools/models/tiger.json"
        )


def num_trained_parameters(model_config, config, added_ids: range = range(0)) -> int:
    """Return how many parameters a TrainConfig trains: all, tied ones once. No weights are made."""
    from transformers import AutoModelForSeq2SeqLM

    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(model_config)
    return sum(parameter.numel() for parameter in model.parameters())


def build(
    config, model_config, dtype: torch.dtype, device: torch.device, added_ids: range = range(0)
):
    """Build the T5 a TrainConfig describes, random or pretrained.

    Weights stay where they are loaded (CPU, or partitioned under ZeRO-3); `engine.initialize` moves them to `device`.
    """
    from transformers import AutoModelForSeq2SeqLM

    settings = {"dtype": dtype, "attn_implementation": config.attn_implementation}
    if config.model_config:
        model = AutoModelForSeq2SeqLM.from_config(model_config, **settings)
    else:
        model = AutoModelForSeq2SeqLM.from_pretrained(config.model_name_or_path, **settings)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def label_logits(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the logits (n, V) that predict the n labelled tokens, row by row, in the order of `labels[labels != IGNORED]`.

    The decoder reads the labels moved one place to the right, its start token first. Its rows hold items alone, and codes are of
    one length: hardly any logits are made in vain. With no labelled token at all, n is 0 and the graph is still there.

    Args:
        model: T5ForConditionalGeneration, or the engine around it.
        input_ids, attention_mask: (B, S) int64, the prompts.
        labels: (B, T) int64, the items, IGNORED where nothing is predicted.
    """
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
        use_cache=False,
    ).logits
    return logits[labels != IGNORED]


def load_trained(config, load_in_4bit: bool, device: torch.device):
    """Load the T5 that train.py saved, for inference."""
    from transformers import AutoModelForSeq2SeqLM

    assert not load_in_4bit, "fit_model_config lets no T5 be quantised"
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    return (
        AutoModelForSeq2SeqLM.from_pretrained(config.model, dtype=dtype, attn_implementation="sdpa")
        .to(device)
        .eval()
    )
