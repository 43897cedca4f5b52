"""Run configuration: defaults < YAML file < command-line flags, strict at every step.

A field is declared once, with its type, default and help text; the flag, the YAML key and the dumped `config.yaml` follow from
it. A key nobody knows is an error that names the nearest known one.
"""

import argparse
import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path

import yaml

from igd_ds.errors import UsageError


def option(help: str, default=MISSING, choices: Sequence[str] = ()):
    """Declare one setting: help text, default (none: required) and the allowed values, where there is a list of them."""
    metadata = {"help": help, "choices": tuple(choices)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(config, names: str, holds: Callable[[float], bool], says: str) -> None:
    """Raise ValueError naming the flag if one of the settings `names` (words) is given, and `holds` is not true of it."""
    for name in names.split():
        if (value := getattr(config, name)) is not None and not holds(value):
            raise UsageError(f"--{name} {says}, found {value}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run owns. ZeRO stage, offload, precision and micro-batch belong to `ds_config` (see `engine.py`)."""

    ds_config: str = option("DeepSpeed JSON: ZeRO stage, offload, precision, micro-batch")
    dataset: str = option("canonical dataset folder (igd prepare makes one)")
    output_dir: str = option("run folder; one run each")
    model_name_or_path: str = option("pretrained causal LM: folder or hub name", "")
    model_config: str = option(
        "model config (JSON file or folder) to train from random weights instead", ""
    )
    tokenizer: str = option("tokenizer folder or hub name; default: model_name_or_path", "")
    trust_remote_code: bool = option("run Python code that comes with the model", False)
    attn_implementation: str = option(
        "attention kernel", "sdpa", ("sdpa", "eager", "flash_attention_2")
    )
    gradient_checkpointing: bool = option(
        "recompute activations in the backward pass to save memory", False
    )

    prompt: str = option("prompt template: a name in igd_ds/data/templates or a YAML file", "short")
    item_kind: str = option(
        "what items are written as; auto: titles where the dataset has them",
        "auto",
        ("auto", "text", "semantic-id"),
    )
    max_length: int = option(
        "tokens of prompt + target; the history is cut oldest-first to fit", 512
    )

    weighting: str = option("token weighting of the loss, see igd_ds/weighting", "igd")
    igd_beta: float | None = option(
        "β: weight of zero-gain tokens, in [0, 1] (igd, igd-linear)", None
    )
    position_floor: float | None = option(
        "b: weight of the last item token, in [0, 1] (position, cft)", None
    )
    cft_lambda: float | None = option(
        "λ: weight of the loss of what the history adds, at least 0 (cft)", None
    )
    rank_tau: float | None = option("τ: the logits are divided by it, e.g. 0.8 (rank)", None)
    item_embeddings: str | None = option(
        ".npy or folder of igd embed (front-greater, multi-target)", None
    )
    frequency_beta: float | None = option(
        "b of the effective number of a token's occurrences, e.g. 0.99 (frequency, multi-target)",
        None,
    )
    mixing: str | None = option(
        "α' learned, or a schedule of MTC Table 4 (multi-target)",
        None,
        ("learned", "fg-ce", "fg-ce-fr"),
    )
    mixing_form: str | None = option(
        "α' multiplies the losses, or the logits (multi-target)", None, ("loss", "logits")
    )
    curriculum_c: float | None = option(
        "c of the curriculum e^(−ct), per optimizer step (multi-target)", None
    )
    curriculum_cT: float | None = option(
        "the same times the steps of the whole run (multi-target)", None
    )
    lambda_lr: float | None = option("learning rate of log λ, default 1e-3 (multi-target)", None)
    mixing_regularizer: str | None = option(
        "kendall: a term against the drift of λ (multi-target)", None, ("kendall",)
    )
    entropy: str = option(
        "entropy definition behind the information gain", "prior", ("prior", "conditional")
    )
    normalization: str = option(
        "Ω over the whole optimizer step, or per micro-batch as the reference code does",
        "global",
        ("global", "per_batch"),
    )

    global_batch_size: int = option(
        "rows per optimizer step, over all ranks and accumulation steps", 64
    )
    learning_rate: float = option("peak learning rate of AdamW", 1e-4)
    weight_decay: float = option("AdamW's decoupled weight decay", 0.0)
    schedule: str = option(
        "learning rate after the warm-up", "cosine", ("cosine", "linear", "constant")
    )
    warmup_ratio: float = option("share of the steps that warm up linearly, in [0, 1)", 0.03)
    max_grad_norm: float = option("clip gradients to this global L2 norm", 1.0)
    epochs: int = option("passes over the training rows at most", 3)
    max_steps: int = option("optimizer steps at most; 0: as many as the epochs have", 0)
    seed: int = option("seeds initial weights, row order and dropout", 0)
    length_grouping: bool = option(
        "batch rows of similar length (less padding; batch composition differs)", True
    )

    lora_r: int = option("LoRA rank; 0: train all weights", 0)
    lora_alpha: int = option("LoRA scale numerator", 64)
    lora_dropout: float = option("dropout before the LoRA matrices", 0.05)
    lora_targets: str = option("comma-separated module names, or all-linear", "all-linear")
    load_in_4bit: bool = option(
        "NF4 base weights with double quantisation (QLoRA; needs lora_r)", False
    )

    validation_metric: str = option(
        "what early stopping watches: unweighted NLL per item, or NDCG@10 of a beam search",
        "nll",
        ("nll", "ndcg@10"),
    )
    validate_every: int = option("optimizer steps between validations; 0: once an epoch", 0)
    validation_rows: int = option(
        "rows of the validation split to use (a seeded sample); 0: all", 0
    )
    patience: int = option(
        "validations without improvement before training stops; 0: never stop early", 1
    )
    save_every: int = option("optimizer steps between checkpoints; 0: after each validation", 0)
    keep_checkpoints: int = option("newest checkpoints to keep", 2)
    resume: str = option(
        "auto: go on from the run folder's newest whole checkpoint", "never", ("never", "auto")
    )
    log_every: int = option("optimizer steps between log lines", 10)

    def check(self) -> None:
        """Raise ValueError for values no run can use; checks that need files come later, from those who read them."""
        if bool(self.model_name_or_path) == bool(self.model_config):
            raise UsageError(
                "give exactly one of --model_name_or_path (pretrained) and --model_config (random weights)"
            )
        if self.model_config and not self.tokenizer:
            raise UsageError("--model_config has no tokenizer of its own: give --tokenizer")
        at_least_1 = "global_batch_size max_length epochs log_every keep_checkpoints"
        require(self, at_least_1, lambda value: value >= 1, "must be at least 1")
        not_negative = (
            "max_steps validate_every validation_rows patience save_every lora_r seed weight_decay"
        )
        require(self, not_negative, lambda value: value >= 0, "must not be negative")
        if not 0 <= self.lora_dropout < 1 or self.lora_alpha < 1:
            raise UsageError(
                f"--lora_dropout must lie in [0, 1) and --lora_alpha be 1 or more, found {self.lora_dropout}, {self.lora_alpha}"
            )
        changed = [
            name
            for name in ("lora_alpha", "lora_dropout", "lora_targets")
            if getattr(self, name) != getattr(TrainConfig, name)
        ]
        if changed and not self.lora_r:
            raise UsageError(f"--{changed[0]} has no effect without --lora_r")
        if not 0 <= self.warmup_ratio < 1:
            raise UsageError(f"--warmup_ratio must lie in [0, 1), found {self.warmup_ratio}")
        if self.learning_rate <= 0 or self.max_grad_norm <= 0:
            raise UsageError("--learning_rate and --max_grad_norm must be positive")
        if self.validation_metric == "ndcg@10" and self.attn_implementation != "sdpa":
            raise UsageError(
                "--validation_metric ndcg@10 searches with a mask per token: it needs --attn_implementation sdpa"
            )
        if self.lora_r and self.model_config:
            raise UsageError(
                "--lora_r adapts pretrained weights: give --model_name_or_path, not --model_config"
            )
        if self.load_in_4bit and not self.lora_r:
            raise UsageError("--load_in_4bit trains adapters on a frozen base: give --lora_r too")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation: a trained model, the rows to rank the catalogue for, and the search that does it."""

    model: str = option(
        "RUN/model: model or adapter, tokenizer and catalogue, as train.py saves them"
    )
    dataset: str = option("canonical dataset folder")
    output_dir: str = option(
        "folder for metrics.json, timing.json and predictions; one evaluation each"
    )
    split: str = option("rows to evaluate", "test", ("train", "valid", "test"))
    alpha: list[float] = option(
        "α: strength of decisiveness calibration (Eq. 9), each in [0, 1]; 0 is plain beam search",
        [0.0],
    )
    alpha_from: str = option(
        "folder of a finished evaluation: take α = 0 and the α that was best there, in place of --alpha",
        "",
    )
    num_beams: int = option("length of each ranked list, and beams", 10)
    search: str = option(
        "beam search, or exact: best-first until the list is proven", "beam", ("beam", "exact")
    )
    decoding_rule: str = option(
        "how gains are normalised among siblings, see igd_ds/search/scoring.py", "per-node"
    )
    length_penalty: float = option("p in score / length^p: 0 as D3, 1 as BIGRec", 0.0)
    softmax: str = option(
        "log p over the full vocabulary, or masked: over the trie's next tokens alone",
        "full",
        ("full", "masked"),
    )
    temperature: float = option("T in log softmax(logits / T)", 1.0)
    popularity_prior: float = option(
        "γ: weight of the items' training popularity, added to the scores", 0.0
    )
    guidance: str = option(
        ".npy of floats (rows of the split, items): a second scorer's item probabilities", ""
    )
    guidance_weight: float = option(
        "weight of the second scorer's log-probabilities (with --guidance)", 0.0
    )
    item_filter: str = option(
        "Parquet with row_id and lists of item ids, allow and/or deny; null: no restriction", ""
    )
    pass_positions: int = option(
        "tokens sent through the model at once while searching, which bounds its memory", 512
    )
    row_positions: int = option(
        "tokens the exact search may send through the model per row, all α together", 4096
    )
    batch_size: int = option("rows searched at once", 16)
    num_rows: int = option("rows to evaluate, a seeded sample; 0: all", 0)
    seed: int = option("seeds the sample of rows", 0)
    dtype: str = option(
        "model precision; auto: as saved", "auto", ("auto", "float32", "bfloat16", "float16")
    )
    max_length: int = option("tokens of prompt + longest item; 0: as trained", 0)
    base_model: str = option("base weights of an adapter, where they moved since training", "")
    trust_remote_code: bool = option("run Python code that comes with the model", False)

    def check(self) -> None:
        """Raise ValueError for values no evaluation can use."""
        for value in self.alpha:
            if not 0 <= value <= 1:
                raise UsageError(f"--alpha must lie in [0, 1], found {value}")
        if not self.alpha or len(set(self.alpha)) != len(self.alpha):
            raise UsageError(f"--alpha needs at least one value and none twice, found {self.alpha}")
        if self.alpha_from and self.alpha != [0.0]:
            raise UsageError("give --alpha or --alpha_from, not both")
        require(self, "num_beams batch_size", lambda value: value >= 1, "must be at least 1")
        not_negative = "length_penalty popularity_prior guidance_weight"
        require(
            self,
            not_negative,
            lambda value: 0 <= value < math.inf,
            "must not be negative, and finite",
        )
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"--temperature must be positive and finite, found {self.temperature}")
        if bool(self.guidance) != (self.guidance_weight > 0):
            raise UsageError(
                "--guidance and --guidance_weight, larger than 0, go together: give both or neither"
            )
        if self.num_rows < 0 or self.max_length < 0 or self.seed < 0:
            raise UsageError("--num_rows, --max_length and --seed must not be negative")


def _type_of(annotation) -> tuple[type, bool]:
    """Return (element type, is a list) of a field's annotation: `float`, `float | None` and `list[float]` all give float."""
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation, False


def _parser(cls, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", help="YAML file with any of the settings below; flags win over it"
    )
    # The deepspeed launcher passes it; rank and device come from the environment (distributed.py).
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    for f in dataclasses.fields(cls):
        kind, many = _type_of(f.type)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        help = f.metadata["help"] + (
            " (required)" if default is MISSING else f" (default: {default})"
        )
        choices = f.metadata["choices"] or None
        if kind is bool:
            parser.add_argument(
                f"--{f.name}",
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=help,
            )
        else:
            extra = {"nargs": "+"} if many else {}
            parser.add_argument(
                f"--{f.name}",
                type=kind,
                choices=choices,
                default=argparse.SUPPRESS,
                help=help,
                **extra,
            )
    return parser


def checked(cls, key: str, value, source: str):
    """Return `value` as the type of field `key`, or raise ValueError that names the file, the key and what it takes."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if key not in fields:
        near = difflib.get_close_matches(key, fields, n=1)
        raise UsageError(
            f"{source}: unknown setting '{key}'" + (f", did you mean '{near[0]}'?" if near else "")
        )
    kind, many = _type_of(fields[key].type)
    if value is None and "None" in str(fields[key].type):
        return None
    values = value if isinstance(value, list) and many else [value]
    for i, v in enumerate(values):
        if kind is float and type(v) is int:
            values[i] = v = float(v)
        if type(v) is not kind:
            hint = (
                " (YAML reads 1e-4 as text: write 1.0e-4)"
                if (kind, type(v)) == (float, str)
                else ""
            )
            raise UsageError(f"{source}: '{key}' takes {kind.__name__}, found {v!r}{hint}")
        if fields[key].metadata["choices"] and v not in fields[key].metadata["choices"]:
            raise UsageError(
                f"{source}: '{key}' is one of {', '.join(fields[key].metadata['choices'])}; found {v!r}"
            )
    return values if many else values[0]


def parse(cls, argv: Sequence[str] | None = None, description: str | None = None):
    """Build a `cls` (TrainConfig, EvalConfig) from `argv`. Raises ValueError for a bad YAML file or bad values."""
    flags = vars(_parser(cls, description).parse_args(sys.argv[1:] if argv is None else argv))
    flags.pop("local_rank")
    path = flags.pop("config")
    values = {}
    if path:
        if not Path(path).is_file():
            raise UsageError(f"--config: no file {path}")
        loaded = yaml.safe_load(Path(path).read_text()) or {}
        if not isinstance(loaded, dict):
            raise UsageError(
                f"{path}: expected 'setting: value' lines, found a {type(loaded).__name__}"
            )
        values = {key: checked(cls, key, value, path) for key, value in loaded.items()}
    values.update(flags)
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    if missing:
        raise UsageError(
            "required settings are missing: " + ", ".join(f"--{name}" for name in missing)
        )
    config = cls(**values)
    config.check()
    return config
