"""Settings of models: what a training builds, and which trained model an evaluation loads."""

from dataclasses import dataclass

from igd_ds.config.options import option, require
from igd_ds.errors import UsageError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """How a model's weights are trained: attention kernel, memory, adapter."""

    trust_remote_code: bool = option("run Python code that comes with the model", False)
    attn_implementation: str = option(
        "attention kernel; auto: sdpa if the model has it, else eager",
        "auto",
        ("auto", "sdpa", "eager", "flash_attention_2"),
    )
    gradient_checkpointing: bool = option(
        "recompute activations in the backward pass to save memory", False
    )

    lora_r: int = option("LoRA rank; 0: train all weights", 0)
    lora_alpha: int = option("LoRA scale numerator", 64)
    lora_dropout: float = option("dropout before the LoRA matrices", 0.05)
    lora_targets: str = option("comma-separated module names, or all-linear", "all-linear")
    load_in_4bit: bool = option(
        "NF4 base weights with double quantisation (QLoRA; needs lora_r)", False
    )

    def check(self) -> None:
        """Raise UsageError for values that no model can be trained with."""
        require(self, "lora_alpha", lambda value: value >= 1, "must be at least 1")
        require(self, "lora_r", lambda value: value >= 0, "must not be negative")
        require(self, "lora_dropout", lambda value: 0 <= value < 1, "must lie in [0, 1)")
        for name in ("lora_alpha", "lora_dropout", "lora_targets"):
            if getattr(self, name) != getattr(TuningOptions, name) and not self.lora_r:
                raise UsageError(f"--{name} has no effect without --lora_r")
        if self.load_in_4bit and not self.lora_r:
            raise UsageError("--load_in_4bit trains adapters on a frozen base: give --lora_r too")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(TuningOptions):
    """The generative model that a training starts from."""

    model_name_or_path: str = option(
        "pretrained causal LM or T5: folder or hub name; or RUN/model of a LoRA run, to go on "
        "training its adapter",
        "",
    )
    revision: str = option("branch, tag or commit of a hub model; default: the newest", "")
    model_config: str = option(
        "model config (JSON file or folder) to train from random weights instead", ""
    )
    tokenizer: str = option("tokenizer folder or hub name; default: model_name_or_path", "")
    max_length: int = option(
        "tokens of prompt + target; the history is cut oldest-first to fit", 512
    )

    def check(self) -> None:
        """Raise UsageError for values that no model can be built from."""
        if bool(self.model_name_or_path) == bool(self.model_config):
            raise UsageError(
                "give exactly one of --model_name_or_path (pretrained) and --model_config (random "
                "weights)"
            )
        if self.revision and self.model_config:
            raise UsageError("--revision has no effect with --model_config: leave it out")
        if self.model_config and not self.tokenizer:
            raise UsageError("--model_config has no tokenizer of its own: give --tokenizer")
        require(self, "max_length", lambda value: value >= 1, "must be at least 1")
        TuningOptions.check(self)
        if self.lora_r and self.model_config:
            raise UsageError(
                "--lora_r adapts pretrained weights: give --model_name_or_path, not --model_config"
            )


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A trained model and its dataset, and how they are loaded."""

    model: str = option(
        "RUN/model: model or adapter, tokenizer and catalogue, as igd train saves them, or a "
        "model of igd baseline"
    )
    dataset: str = option("canonical dataset folder")
    dtype: str = option("model precision; auto: as saved", "auto", DTYPES)
    max_length: int = option("tokens of prompt + longest item; 0: as trained", 0)
    base_model: str = option("base weights of an adapter, where they moved since training", "")
    trust_remote_code: bool = option("run Python code that comes with the model", False)

    def check(self) -> None:
        """Raise UsageError for values that no model can be loaded with."""
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is one of {', '.join(DTYPES)}, found '{self.dtype}'")
        require(self, "max_length", lambda value: value >= 0, "must not be negative")
