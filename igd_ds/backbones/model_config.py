"""Model configurations: reading them, and the text model inside a multimodal checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from igd_ds.backbones.saved import offline_hint
from igd_ds.errors import UsageError, did_you_mean
from igd_ds.folders import read_json_object

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
    path = str(shape_file(name))
    return text_config_of(auto_config(path, name, trust_remote_code, revision))


def shape_file(name: str) -> Path:
    """Return the file of a shape that comes with igd_ds; for another name, the name as a path."""
    shape = SHAPES / f"{name}.json"
    return shape if shape.is_file() and not Path(name).exists() else Path(name)


def auto_config(
    path: str | Path, name: str, trust_remote_code: bool = False, revision: str = ""
) -> PreTrainedConfig:
    """Read a configuration with transformers' AutoConfig; `name` is its name in messages.

    Raises:
        UsageError: there is none, its model type is unknown, or a value is of the wrong type.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if file.is_file():
        _refuse_unknown_type(file)
    try:
        return AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, revision=revision or None
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, StrictDataclassError) as e:
        why = " ".join(str(e).split())
        hint = offline_hint(name)
        raise UsageError(f"no model configuration at '{name}'{hint} ({why})") from e


def _refuse_unknown_type(file: Path) -> None:
    """Raise UsageError for a model type that transformers does not know and no code comes with.

    transformers itself answers with several lines about its own installation.
    """
    from transformers import CONFIG_MAPPING

    found = read_json_object(file, "give a model's configuration as transformers writes it")
    kind = found.get("model_type")
    if kind is not None and str(kind) not in CONFIG_MAPPING and "auto_map" not in found:
        near = did_you_mean(str(kind), CONFIG_MAPPING.keys())
        raise UsageError(
            f"no model configuration at '{file}': transformers knows no model_type '{kind}'{near}"
        )


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
