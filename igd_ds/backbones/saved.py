"""What the folder of a trained model holds beside the files of transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igd_ds.errors import UsageError

if TYPE_CHECKING:
    from igd_ds.config.model import ModelSource

DESCRIPTION_FILE = "igd_ds.json"
"""What a saved model needs beyond transformers' own files: prompt, max_length, quantisation."""


def describe(folder: str | Path) -> dict[str, Any]:
    """Read a saved model's `igd_ds.json`, which a training writes.

    Raises:
        UsageError: the folder has no such file.
    """
    path = Path(folder) / DESCRIPTION_FILE
    if not path.is_file():
        raise UsageError(
            f"--model {folder}: no {DESCRIPTION_FILE} there; give the model/ folder of a run of "
            "train.py"
        )
    description: dict[str, Any] = json.loads(path.read_text())
    return description


def base_of(source: ModelSource) -> str | None:
    """Return the base model of the adapter that `source` names; None if it names full weights."""
    adapter = Path(source.model) / "adapter_config.json"
    if not adapter.is_file():
        return None
    if source.base_model:
        return source.base_model
    return str(json.loads(adapter.read_text())["base_model_name_or_path"])
