"""Model configurations: reading them, and the text model inside a multimodal checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from igd_ds.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHAPES = Path(__file__).parent / "shapes"
"""Configurations of small models that come with igd_ds."""


def read_model_config(
    name: str, trust_remote_code: bool = False, revision: str = ""
) -> PreTrainedConfig:
    """Read a model's configuration from a JSON file, a folder or the hub (at a revision of it).

    `name` may also be a shape that comes with igd_ds, such as `tiger` or `qwen2-1m`.
    Of a multimodal checkpoint (Gemma 3 from 4B on) the configuration of its text model is returned.

    Example:
        >>> read_model_config("google/gemma-3-4b-it").model_type
        'gemma3_text'

    Raises:
        UsageError: there is no model configuration at `name`.
    """
    from transformers import AutoConfig

    shape = SHAPES / f"{name}.json"
    path = str(shape) if shape.is_file() and not Path(name).exists() else name
    try:
        found = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, revision=revision or None
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"no model configuration at '{name}' ({error})") from error
    return text_config_of(found)


def text_config_of(model_config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the text model's configuration inside a multimodal one, else `model_config` itself."""
    from transformers import AutoModelForCausalLM

    if model_config.is_encoder_decoder or "text_config" not in model_config.sub_configs:
        return model_config
    text = model_config.get_text_config()
    if type(text) not in AutoModelForCausalLM._model_mapping:
        return model_config

    text = copy.deepcopy(text)
    quantisation = getattr(model_config, "quantization_config", None)
    if quantisation is not None:
        text.quantization_config = quantisation
    return text
