"""What a causal LM can do, derived from its configuration without loading any weight.

A search over a tree of tokens needs a model in which tokens exchange information only through
transformers' AttentionInterface, by positions that are given to it. `reads_trees` sends a few
tokens through the model on torch's meta device, with an attention function that records how it is
called.
"""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, Cache

from igd_ds.backbones.lora import adaptable_layers
from igd_ds.contracts import Capabilities
from igd_ds.distributed import say
from igd_ds.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


RECORDER = "igd_recorder"
WINDOW_OF_LAYER = {"full_attention": False, "sliding_attention": True}
"""Kinds of layers (`layer_types`) that support trees, and whether they have a sliding window."""

HARMLESS = {
    "dropout", "scaling", "sliding_window", "softcap", "s_aux", "position_ids", "use_cache",
    "cache_position", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", "is_causal",
}  # fmt: skip
"""Arguments of an attention call that a tree honours or may ignore."""

PASSING = {
    "_name_or_path", "architectures", "dtype", "quantization_config", "transformers_version",
    "vocab_size",
}  # fmt: skip
"""Entries of a configuration that change between building and saving, and change no capability."""

_FOUND: dict[tuple[str, str], Capabilities] = {}


def capabilities_of(model_config: PreTrainedConfig) -> Capabilities:
    """Return what causal LMs of this configuration can do. The answer is kept for the next call.

    Raises:
        UsageError: transformers has no causal LM for this kind of model.
    """
    settings = {
        name: value for name, value in model_config.to_dict().items() if name not in PASSING
    }
    key = (str(type(model_config)), json.dumps(settings, default=str, sort_keys=True))
    if key not in _FOUND:
        model = model_without_weights(model_config)
        has_trees = reads_trees(model)
        _FOUND[key] = Capabilities(
            packed_training=has_trees,
            tree_search=has_trees,
            attention=attention_kernels(type(model)),
            adapters=len(adaptable_layers(model)) > 1,  # one is the output layer
        )
    return _FOUND[key]


def attention_kernels(model_class: type[PreTrainedModel]) -> tuple[str, ...]:
    """Return the values of --attn_implementation that models of this class can be trained with."""
    kernels = ["eager"]
    if getattr(model_class, "_supports_sdpa", False):
        kernels.insert(0, "sdpa")
    # Models with attention sinks list the flash kernels that have them.
    listed = getattr(model_class, "_compatible_flash_implementations", None)
    if getattr(model_class, "_supports_flash_attn", False) and (
        listed is None or "flash_attention_2" in listed
    ):
        kernels.append("flash_attention_2")
    return tuple(kernels)


def model_without_weights(model_config: PreTrainedConfig) -> PreTrainedModel:
    """Build a causal LM on the meta device: it has modules and shapes, and takes no memory.

    Raises:
        UsageError: transformers has no causal LM for this kind of model.
    """
    config = copy.deepcopy(model_config)
    config._attn_implementation = "eager"  # every class has it, whatever the training will use
    mapping = AutoModelForCausalLM._model_mapping
    comes_with_code = type(config).__module__.startswith("transformers_modules.")
    if type(config) not in mapping and not comes_with_code:
        raise UsageError(
            f"transformers has no causal LM for models of type '{config.model_type}': name a "
            "causal LM or a T5"
        )

    with torch.device("meta"):
        if comes_with_code:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        # The class itself, not from_config: that one would partition the weights under ZeRO-3.
        model_class = mapping[type(config)]
        return (model_class[0] if isinstance(model_class, tuple) else model_class)(config)


def bare(model: Any) -> Any:
    """Return the language model itself inside of DeepSpeed's engine and PEFT's wrapper."""
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module  # DeepSpeed's engine
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_arguments(model: Any) -> set[str]:
    """Return the names of the arguments that a model takes, looking inside DeepSpeed and PEFT."""
    return set(inspect.signature(bare(model).forward).parameters)


@dataclass
class Recording:
    """The attention calls of one pass: per call the size of the sliding window, or None."""

    windows: list[int | None] = field(default_factory=list)


def record_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    tree: Recording,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Note an attention call and return values of the right shape; registered with transformers.

    Raises:
        NotImplementedError: the call asks for something that a tree does not support.
    """
    unknown = [
        name
        for name, value in options.items()
        if name not in HARMLESS and value is not None and value is not False
    ]
    if attention_mask is not None:
        unknown.append("attention_mask")  # a model that puts a bias of its own into the mask
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        unknown.append("is_causal=False")
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    if query.shape[0] != 1 or key.shape[:1] != query.shape[:1]:
        raise NotImplementedError("attention over rows that the model formed itself")

    tree.windows.append(options.get("sliding_window"))
    return value.new_empty((1, query.shape[2], query.shape[1], value.shape[3])), None


AttentionInterface.register(RECORDER, record_attention)


class RecordingCache(Cache):
    """A cache that hands every layer's keys and values back and notes the layer's number."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.updated: list[int] = []

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: object,
        **__: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the layer."""
        self.updated.append(layer_idx)
        return key_states, value_states

    def get_seq_length(self, *_: object) -> int:
        """Return 0: positions are given to the model."""
        return 0


def reads_trees(model: PreTrainedModel) -> bool:
    """Whether a tree of tokens can go through the model (on the meta device) in one packed pass."""
    reason = _why_not(model)
    if reason:
        say(
            f"warning: no tree search over {type(model).__name__}: {reason}. Its search runs over "
            "the model's own KV cache: the lists are the same, but it is slower",
            always=True,
        )
    return not reason


def _why_not(model: PreTrainedModel) -> str:
    """Return the reason why tree search is impossible; "" if it is possible."""
    config = model.config
    kinds = getattr(config, "layer_types", None)
    if not getattr(model, "_supports_attention_backend", False):
        return "it does not attend through AttentionInterface"
    if getattr(model, "_is_stateful", False):
        return "it has a recurrent state"
    if kinds is not None and not set(kinds) <= WINDOW_OF_LAYER.keys():
        return f"layers of kind {sorted(set(kinds) - WINDOW_OF_LAYER.keys())}"
    if "position_ids" not in forward_arguments(model):
        return "positions cannot be given to it"
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv1d):
            return "tokens are mixed outside of attention"
        if (
            isinstance(module, torch.nn.Embedding)
            and "position" in name
            and module.padding_idx is not None
        ):
            return "its positions do not begin at 0"  # RoBERTa's begin behind the padding token's

    recording, cache = Recording(), RecordingCache()
    try:
        _record_pass(model.eval(), recording, cache)
    except Exception as error:  # whatever the model's own code raises: then it cannot
        return f"{type(error).__name__}: {error}"

    num_layers = config.num_hidden_layers
    if sorted(cache.updated) != list(range(num_layers)) or len(recording.windows) != num_layers:
        return f"{len(recording.windows)} attentions in {num_layers} layers"
    if [window is not None for window in recording.windows] != _has_window(config):
        return "its attention layers do not pass on their sliding windows"
    return ""


def _has_window(config: PreTrainedConfig) -> list[bool]:
    """Return whether each layer has a sliding window, as the configuration says."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return [WINDOW_OF_LAYER[kind] for kind in kinds]
    is_used = getattr(config, "use_sliding_window", True)
    has_window = is_used and getattr(config, "sliding_window", None) is not None
    return [has_window] * config.num_hidden_layers


def _record_pass(model: PreTrainedModel, recording: Recording, cache: RecordingCache) -> None:
    """Send three tokens through a model on the meta device."""
    model.config._attn_implementation = RECORDER
    model.config.pad_token_id = None  # or some models look for padding among the tokens
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")  # the one without data-dependent shapes
    for module in model.modules():
        # Rotary frequencies that depend on the longest position look at values, which the meta
        # device does not have.
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            module.rope_type = dict.fromkeys(kind, "default")
        elif kind is not None:
            module.rope_type = "default"

    tokens = torch.zeros((1, 3), dtype=torch.int64, device="meta")
    with torch.no_grad():
        model(
            input_ids=tokens,
            position_ids=tokens,
            past_key_values=cache,
            use_cache=True,
            tree=recording,
        )
