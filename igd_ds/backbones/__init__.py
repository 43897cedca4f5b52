"""Backbones: how each kind of model is built, loaded and asked for the logits of labelled positions.

`causal_lm` and `tiger` are adapters: modules with the same functions, of which `adapter_of` names the one for a model.
"""

from types import ModuleType

from igd_ds.backbones import causal_lm
from igd_ds.backbones import t5 as tiger
from igd_ds.errors import UsageError


def read_model_config(name: str, trust_remote_code: bool = False):
    """Read a model's configuration from a JSON file, a folder or the hub; ValueError if there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UsageError(f"no model configuration at '{name}' ({error})") from error


def adapter_of(model_config) -> ModuleType:
    """Return the module for models of this configuration: `tiger` for encoder-decoders, else `causal_lm`."""
    return tiger if model_config.is_encoder_decoder else causal_lm
