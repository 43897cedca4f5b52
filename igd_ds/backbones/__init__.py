"""Backbones: how each kind of language model is checked, built, loaded, trained and searched.

`backbone_of` names the backbone of a model's configuration. To add a kind of model, write a class
that implements `igd_ds.contracts.Backbone`, and return it there.
"""

from typing import Any

from igd_ds.backbones.causal_lm import CausalLM
from igd_ds.backbones.model_config import read_model_config
from igd_ds.backbones.t5 import T5
from igd_ds.contracts import Backbone

__all__ = ["CausalLM", "T5", "backbone_of", "read_model_config"]


def backbone_of(model_config: Any) -> Backbone:
    """Return the backbone for models of this configuration: T5 for encoder-decoders, else CausalLM.

    Example:
        >>> backbone_of(read_model_config("Qwen/Qwen2.5-0.5B")).capabilities(...).tree_search
        True
    """
    return T5() if model_config.is_encoder_decoder else CausalLM()
