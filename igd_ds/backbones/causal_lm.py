"""Causal language models (Qwen2, Qwen3, LLaMA, any AutoModelForCausalLM): full fine-tuning, LoRA and 4-bit QLoRA.

A tokenizer may have tokens beyond the model's own (igd tokenizer --add_codes_to adds semantic-ID codes): they get an input and an output
row each, which are trained fully, under LoRA too, and lie in the adapter.
"""

import json
import math
from pathlib import Path

import torch

from igd_ds.errors import UsageError
from igd_ds.loss import predicting_positions

PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
DESCRIPTION_FILE = "igd_ds.json"  # what a saved model needs beyond HF's own files: prompt, max_length, quantisation
ROW_NOISE = 0.1  # of the old rows' standard deviation: tells new rows apart, and keeps them near the mean (assumed)


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """Load a tokenizer; ValueError if there is none at `name` or it has no EOS. PAD falls back to EOS."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Beside a model's config.json AutoTokenizer takes the class of the model's type, whose normaliser may be another one: a
    # tokenizer saved as a plain backend (igd tokenizer makes such) is loaded as what it is.
    saved = Path(name) / "tokenizer_config.json"
    plain = (
        saved.is_file() and json.loads(saved.read_text()).get("tokenizer_class") in PLAIN_TOKENIZERS
    )
    try:
        kind = PreTrainedTokenizerFast if plain else AutoTokenizer
        tokenizer = kind.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no tokenizer at '{name}': give a folder with tokenizer.json or a hub name in --tokenizer ({error})"
        ) from error
    # Beside a config.json without tokenizer files transformers makes one of the model's type that knows special tokens alone.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UsageError(
            f"no tokenizer at '{name}': there are weights, but no files of a tokenizer; name one in --tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer at '{name}' has no EOS token: every item must end in one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def added_token_ids(tokenizer, model_name: str, trust_remote_code: bool = False) -> range:
    """Return the ids of the tokens `tokenizer` has beyond the model's own one; none where the model comes without a tokenizer.

    Raises ValueError unless every token of the model's own has its id here too, and the others follow after them.
    """
    try:
        own = load_tokenizer(model_name, trust_remote_code).get_vocab()
    except ValueError:
        return range(0)  # weights without a tokenizer: nothing to compare with
    given = tokenizer.get_vocab()
    token = next((token for token, index in own.items() if given.get(token) != index), None)
    if token is not None:
        raise UsageError(
            f"--tokenizer does not belong to {model_name}: that model's token {own[token]} is {token!r}, this tokenizer has "
            f"{given.get(token, 'no such token')}; leave --tokenizer out, or give the model's own with tokens added"
        )
    added = sorted(given[token] for token in given.keys() - own.keys())
    first = max(own.values()) + 1
    if added != list(range(first, first + len(added))):
        raise UsageError(
            f"--tokenizer has {len(added)} tokens more than {model_name}'s own, with ids {added[0]} to {added[-1]}, not from "
            f"{first} on without a gap: add tokens with igd tokenizer --add_codes_to"
        )
    return range(first, first + len(added))


def fit_model_config(model_config, config, tokenizer, added_ids: range) -> None:
    """Check that a model's configuration suits a TrainConfig and a tokenizer, whose `added_ids` need no row: `build` makes it.

    Raises:
        ValueError: more tokens than rows, a --max_length beyond the context, or added tokens whose rows LoRA cannot train.
    """
    name = config.model_config or config.model_name_or_path
    if model_config.vocab_size < len(tokenizer) - len(added_ids):
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens but the model at '{name}' only {model_config.vocab_size}: this "
            "tokenizer belongs to another model (pretrained weights take their own with tokens added, if it lies beside them)"
        )
    context = getattr(model_config, "max_position_embeddings", None)
    if context and config.max_length > context:
        raise UsageError(
            f"--max_length {config.max_length} exceeds the model's context of {context} tokens"
        )
    if added_ids and config.lora_r:
        model = _without_weights(model_config)
        for name in _vocabulary_names(model):
            if name.rpartition(".")[2] in config.lora_targets.split(","):
                raise UsageError(
                    f"--lora_targets {config.lora_targets}: the rows of added tokens in {name} are trained fully; leave it out"
                )
        if model.get_output_embeddings().bias is not None:
            raise UsageError(
                "--lora_r: PEFT cannot train rows of an output layer with a bias; leave it out to train all weights"
            )


def num_trained_parameters(model_config, config, added_ids: range = range(0)) -> int:
    """Return how many parameters a TrainConfig trains, from the model's configuration alone (no weights are made)."""
    model = _without_weights(model_config)
    new_rows = sum(
        len(added_ids) * math.prod(weight.shape[1:]) for weight in _vocabulary_weights(model)
    )
    if not config.lora_r:
        return new_rows + sum(parameter.numel() for parameter in model.parameters())
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return new_rows + sum(
        config.lora_r * (linear.in_features + linear.out_features) for linear in linears
    )


def _without_weights(model_config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config)


def _vocabulary_names(model) -> tuple[str, str]:
    """Names of the modules with a row per token: input embeddings, output layer."""
    names = {module: name for name, module in model.named_modules()}
    return names[model.get_input_embeddings()], names[model.get_output_embeddings()]


def _vocabulary_weights(model) -> list[torch.nn.Parameter]:
    """Parameters with a row per token: input embeddings, output layer with its bias, if any; tied ones once."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return list(
        {
            id(weight): weight for module in modules for weight in module.parameters(recurse=False)
        }.values()
    )


def _quantization(dtype: torch.dtype):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _load_weights(
    name: str, dtype: torch.dtype | str, load_in_4bit: bool, device: torch.device, **settings
):
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


def build(
    config, model_config, dtype: torch.dtype, device: torch.device, added_ids: range = range(0)
):
    """Build the model a TrainConfig describes: random or pretrained weights, quantised or not, with or without LoRA.

    Weights stay where they are loaded (CPU, or partitioned under ZeRO-3); `engine.initialize` moves them. Tokens `added_ids` get
    rows of their own. With LoRA too, weights must then be loaded whole (PEFT reads the rows).
    """
    from transformers import AutoModelForCausalLM

    settings = {
        "attn_implementation": config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.model_config:
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, **settings)
    else:
        model = _load_weights(
            config.model_name_or_path, dtype, config.load_in_4bit, device, **settings
        )
    if added_ids:
        _add_rows(model, added_ids, config.seed)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora_r:
            model.enable_input_require_grads()
    if config.lora_r:
        model = _with_lora(model, config, added_ids)
    return model


def _resize(model, num_rows: int) -> None:
    """Make sure of at least `num_rows` rows per vocabulary weight; the values of new rows are the caller's to set."""
    # transformers goes the whole way under ZeRO-3 even where the number stays: the weights are whole on all ranks after it.
    model.resize_token_embeddings(
        max(model.get_input_embeddings().num_embeddings, num_rows), mean_resizing=False
    )


def _add_rows(model, added_ids: range, seed: int) -> None:
    """Start the rows of `added_ids` near the mean of all rows before them: at first they are average tokens, read and predicted.

    A model may have more rows than its tokenizer has tokens (padding): added tokens take those first, untrained as they are.
    """
    _resize(model, added_ids.stop)
    generator = torch.Generator().manual_seed(
        seed
    )  # the same rows on every rank, whatever was drawn before
    for weight in _vocabulary_weights(model):
        old, new = weight.data[: added_ids.start], weight.data[added_ids.start : added_ids.stop]
        noise = torch.randn(new.shape, generator=generator).to(weight.device)
        new.copy_(old.mean(0, dtype=torch.float32) + ROW_NOISE * old.std(0) * noise)


def _with_lora(model, config, added_ids: range):
    import peft

    targets = config.lora_targets
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        trainable_token_indices={name: list(added_ids) for name in _vocabulary_names(model)}
        if added_ids
        else None,
    )
    if config.load_in_4bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        # The DeepSpeed file owns the precision, of the adapter too (its fp32 master copy lies in the optimizer).
        return peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UsageError(f"--lora_targets {targets}: {error}") from error


def label_logits(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the logits (n, V) that predict the n labelled tokens of rows (B, T), row by row; never (B, T, V).

    Called with the engine-wrapped model in training. With no labelled token at all, n is 0 and the graph is still there.
    """
    keep = predicting_positions(labels)
    return model(
        input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=keep, use_cache=False
    ).logits


def describe(folder: Path) -> dict:
    """Read a saved model's `igd_ds.json` (written by train.py); ValueError if the folder is not one."""
    path = Path(folder) / DESCRIPTION_FILE
    if not path.is_file():
        raise UsageError(
            f"--model {folder}: no {DESCRIPTION_FILE} there; give the model/ folder of a run of train.py"
        )
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
        model = _with_adapter(model, Path(config.model))
    return model.eval() if load_in_4bit else model.to(device).eval()


def _with_adapter(model, folder: Path):
    """Put the adapter in `folder` on its base model, rows of added tokens included."""
    import peft

    rows_of = (
        json.loads((folder / "adapter_config.json").read_text()).get("trainable_token_indices")
        or {}
    )
    if rows_of:
        _resize(model, 1 + max(max(rows) for rows in rows_of.values()))
    model = peft.PeftModel.from_pretrained(model, folder)
    for module in model.modules():
        if isinstance(module, peft.tuners.trainable_tokens.TrainableTokensLayer):
            module.merge()  # or each forward pass would copy the whole weight to put the rows in
    return model
