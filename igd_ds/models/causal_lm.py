"""Causal language models (Qwen2, Qwen3, LLaMA, any AutoModelForCausalLM): full fine-tuning, LoRA and 4-bit QLoRA."""

import json
from pathlib import Path

import torch

from igd_ds.loss import predicting_positions

PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
DESCRIPTION_FILE = "igd_ds.json"  # what a saved model needs beyond HF's own files: prompt, max_length, quantisation


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """Load a tokenizer; ValueError if there is none at `name` or it has no EOS. PAD falls back to EOS."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Beside a model's config.json AutoTokenizer takes the class of the model's type, whose normaliser may be another one: a
    # tokenizer saved as a plain backend (tools/train_tokenizer.py makes such) is loaded as what it is.
    saved = Path(name) / "tokenizer_config.json"
    plain = saved.is_file() and json.loads(saved.read_text()).get("tokenizer_class") in PLAIN_TOKENIZERS
    try:
        kind = PreTrainedTokenizerFast if plain else AutoTokenizer
        tokenizer = kind.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer at '{name}': give a folder with tokenizer.json or a hub name in --tokenizer ({error})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer at '{name}' has no EOS token: every item must end in one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer_belongs(tokenizer, model_name: str, trust_remote_code: bool = False) -> None:
    """Raise ValueError unless `tokenizer` gives every token of the model's own tokenizer its own id; it may have more tokens."""
    try:
        own = load_tokenizer(model_name, trust_remote_code).get_vocab()
    except ValueError:
        return  # weights without a tokenizer: nothing to compare with
    given = tokenizer.get_vocab()
    token = next((token for token, index in own.items() if given.get(token) != index), None)
    if token is not None:
        raise ValueError(
            f"--tokenizer does not belong to {model_name}: that model's token {own[token]} is {token!r}, this tokenizer has "
            f"{given.get(token, 'no such token')}; leave --tokenizer out, or give the model's own with tokens added"
        )


def load_model_config(name: str, tokenizer, max_length: int, trust_remote_code: bool = False):
    """Load a model's configuration (JSON file, folder or hub name) and check that tokenizer and context length fit it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"no model configuration at '{name}' ({error})") from error
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the model at '{name}' only {config.vocab_size}: "
            "this tokenizer belongs to another model"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context and max_length > context:
        raise ValueError(f"--max_length {max_length} exceeds the model's context of {context} tokens")
    return config


def num_trained_parameters(model_config, config) -> int:
    """Return how many parameters a TrainConfig trains, from the model's configuration alone (no weights are made)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    if not config.lora_r:
        return sum(parameter.numel() for parameter in model.parameters())
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return sum(config.lora_r * (linear.in_features + linear.out_features) for linear in linears)


def _quantization(dtype: torch.dtype):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _load_weights(name: str, dtype: torch.dtype | str, load_in_4bit: bool, device: torch.device, **settings):
    """Load a pretrained causal LM. Quantised weights are placed on `device` at once, as bitsandbytes requires."""
    from transformers import AutoModelForCausalLM

    if load_in_4bit:
        compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        settings |= {"quantization_config": _quantization(compute), "device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **settings)
    if load_in_4bit:
        import bitsandbytes

        # On CPUs with avx512_bf16 an eval forward repacks the weights in place, and training after it is silently wrong.
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
    return model


def build(config, model_config, dtype: torch.dtype, device: torch.device):
    """Build the model a TrainConfig describes: random or pretrained weights, quantised or not, with or without LoRA.

    Weights stay where they are loaded (CPU, or partitioned under ZeRO-3); `engine.initialize` moves them.
    """
    from transformers import AutoModelForCausalLM

    settings = {"attn_implementation": config.attn_implementation, "trust_remote_code": config.trust_remote_code}
    if config.model_config:
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, **settings)
    else:
        model = _load_weights(config.model_name_or_path, dtype, config.load_in_4bit, device, **settings)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora_r:
            model.enable_input_require_grads()
    if config.lora_r:
        model = _with_lora(model, config)
    return model


def _with_lora(model, config):
    import peft

    targets = config.lora_targets
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if targets == "all-linear" else targets.split(","),
    )
    if config.load_in_4bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        # The DeepSpeed file owns the precision, of the adapter too (its fp32 master copy lies in the optimizer).
        return peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ValueError(f"--lora_targets {targets}: {error}") from error


def label_logits(model, batch) -> torch.Tensor:
    """Return the logits (n, V) that predict the batch's n labelled tokens, row by row; never (B, T, V).

    Called with the engine-wrapped model in training. With no labelled token at all, n is 0 and the graph is still there.
    """
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=predicting_positions(batch.labels),
        use_cache=False,
    ).logits


def describe(folder: Path) -> dict:
    """Read a saved model's `igd_ds.json` (written by train.py); ValueError if the folder is not one."""
    path = Path(folder) / DESCRIPTION_FILE
    if not path.is_file():
        raise ValueError(f"--model {folder}: no {DESCRIPTION_FILE} there; give the model/ folder of a run of train.py")
    return json.loads(path.read_text())


def base_of(config) -> str | None:
    """Return the base model of the adapter an EvalConfig names, or None if it names full weights."""
    adapter = Path(config.model) / "adapter_config.json"
    if not adapter.is_file():
        return None
    return config.base_model or json.loads(adapter.read_text())["base_model_name_or_path"]


def load_trained(config, load_in_4bit: bool, device: torch.device):
    """Load what train.py saved, for inference: full weights, or an adapter on its base model, quantised as in training."""
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    settings = {"attn_implementation": "sdpa", "trust_remote_code": config.trust_remote_code}
    base = base_of(config)
    model = _load_weights(base or config.model, dtype, load_in_4bit, device, **settings)
    if base:
        import peft

        model = peft.PeftModel.from_pretrained(model, config.model)
    return model.eval() if load_in_4bit else model.to(device).eval()
