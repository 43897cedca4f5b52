"""The sequential recommenders by name: which model, with which settings, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from igd_ds.backbones.saved import reading_weights
from igd_ds.baselines.counted import COUNTED, Popularity
from igd_ds.baselines.models import HSTU, GRU4Rec, LRURec, SASRec, SequentialModel
from igd_ds.baselines.saved import WEIGHTS_FILE, read_description
from igd_ds.errors import UsageError


@dataclass(frozen=True)
class Preset:
    """A model and the settings of its paper, by their names in BaselineConfig."""

    model: Callable[..., SequentialModel]
    form: Mapping[str, Any]
    """Arguments of the model besides `num_items` and `max_history`."""
    training: Mapping[str, Any]


# GRU4Rec: the defaults of the published code, hidasib/GRU4Rec; its learning rate is that of
# Adagrad, and 1e-3 is assumed for AdamW. SASRec: Section IV; dropout 0.5 is for its sparse
# datasets, and 0.2 for ML-1M. LRURec: the published code, yueqirex/LRURec. HSTU: the published code
# for ML-1M, facebookresearch/generative-recommenders, with 2 blocks as SASRec.
SEQUENTIAL = {
    "gru4rec": Preset(
        GRU4Rec,
        {"hidden_size": 100, "num_layers": 1, "dropout": 0.0},
        {"global_batch_size": 32, "learning_rate": 1e-3, "weight_decay": 0.0},
    ),
    "sasrec": Preset(
        SASRec,
        {"hidden_size": 50, "num_layers": 2, "num_heads": 1, "dropout": 0.5},
        {"global_batch_size": 128, "learning_rate": 1e-3, "weight_decay": 0.0},
    ),
    "lrurec": Preset(
        LRURec,
        {"hidden_size": 64, "num_layers": 2, "dropout": 0.2},
        {"global_batch_size": 128, "learning_rate": 1e-3, "weight_decay": 0.01},
    ),
    "hstu": Preset(
        HSTU,
        {"hidden_size": 50, "num_layers": 2, "num_heads": 1, "dropout": 0.2},
        {"global_batch_size": 128, "learning_rate": 1e-3, "weight_decay": 0.0},
    ),
}
"""Recommenders that are trained. A new one is a class and an entry here."""


def load_model(folder: str | Path) -> SequentialModel | Popularity:
    """Load a model that `igd baseline` saved, for inference with `log_probabilities`.

    Raises:
        UsageError: there is no such model in the folder, its weights are damaged, or they are those
            of an earlier form of the recommender.
    """
    description = read_description(folder)
    with reading_weights(str(folder)):
        tensors = load_file(Path(folder) / WEIGHTS_FILE)

    name = description["recommender"]
    try:
        if name in COUNTED:
            return COUNTED[name](**tensors)
        model = SEQUENTIAL[name].model(**description["form"])
        model.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:  # other names, or other shapes
        raise UsageError(
            f"{folder} does not fit {name} as this version of igd_ds builds it ({error}); train it "
            "again"
        ) from error
    return model.eval()
