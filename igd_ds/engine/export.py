"""The trained weights in the form that `from_pretrained` or PEFT load without DeepSpeed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from igd_ds import distributed
from igd_ds.folders import replaced_folder


def save_model(engine: Any, folder: Path, lora: bool, extras: Callable[[Path], None]) -> None:
    """Save weights or adapter from any ZeRO stage; the folder is replaced in one go.

    Every rank must call it.

    Args:
        engine: DeepSpeed engine.
        folder: RUN/model.
        lora: whether the module is an adapter on frozen weights.
        extras: adds tokenizer, catalogue and description to the unfinished folder, on rank 0.
    """
    module, weights = engine.module, None
    if engine.zero_optimization_stage() == 3:
        # A plain save_pretrained would silently write tensors of shape (0,).
        weights = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=lora)

    # PEFT would add the whole embedding of a base that was resized; the rows of added tokens are in
    # the adapter anyway.
    settings = {"save_embedding_layers": False} if lora else {}

    def save() -> None:
        with replaced_folder(folder) as unfinished:
            module.save_pretrained(unfinished, state_dict=weights, **settings)
            extras(unfinished)

    distributed.on_main(save)
