"""The folder of a baseline's model: its weights or counts, and what `igd baseline` wrote beside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from igd_ds.errors import UsageError
from igd_ds.folders import read_json_object

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(on_cpu, folder / WEIGHTS_FILE)


def is_baseline(folder: str | Path) -> bool:
    """Whether a folder holds a model that `igd baseline` saved."""
    path = Path(folder) / CONFIG_FILE
    return path.is_file() and "recommender" in read_json_object(path, "restore it, or train again")


def read_description(folder: str | Path) -> dict[str, Any]:
    """Return what `igd baseline` wrote beside a model's weights.

    Raises:
        UsageError: there is no such model in the folder.
    """
    if not is_baseline(folder):
        raise UsageError(f"no sequential recommender in {folder}: {CONFIG_FILE} does not name one")
    return read_json_object(Path(folder) / CONFIG_FILE, "restore it, or train again")
