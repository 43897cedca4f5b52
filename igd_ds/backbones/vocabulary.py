"""Weights with a row per token, and the new rows of tokens that are added to a pretrained model.

Letters in shapes: V vocabulary, D width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROW_NOISE = 0.1
"""Noise of new rows, as a share of the old rows' standard deviation. It tells the new rows apart
and keeps them near the mean (an assumption: no paper names a value)."""


def vocabulary_names(model: PreTrainedModel) -> tuple[str, str]:
    """Return the names of the modules with a row per token: input embeddings and output layer."""
    names = {module: name for name, module in model.named_modules()}
    return names[model.get_input_embeddings()], names[model.get_output_embeddings()]


def vocabulary_weights(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the parameters with a row per token, (V, D) or (V,); tied ones once."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = (weight for module in modules for weight in module.parameters(recurse=False))
    return list({id(weight): weight for weight in weights}.values())


def num_row_parameters(model: PreTrainedModel, num_rows: int) -> int:
    """Return how many parameters `num_rows` tokens have in the vocabulary weights."""
    return sum(num_rows * math.prod(weight.shape[1:]) for weight in vocabulary_weights(model))


def resize(model: PreTrainedModel, num_rows: int) -> None:
    """Give vocabulary weights at least `num_rows` rows. The caller sets the values of new rows."""
    # transformers does all its work under ZeRO-3 even where the number of rows stays the same:
    # afterwards the weights are whole on all ranks, which the callers need.
    model.resize_token_embeddings(
        max(model.get_input_embeddings().num_embeddings, num_rows), mean_resizing=False
    )


def add_rows(model: PreTrainedModel, added_ids: range, seed: int) -> None:
    """Start the rows of `added_ids` near the mean of all rows before them.

    So the model first reads and predicts the new tokens as average tokens. A model may have more
    rows than its tokenizer has tokens (padding). Added tokens take those rows first; they are
    untrained.
    """
    resize(model, added_ids.stop)
    # A generator of its own gives every rank the same rows, whatever was drawn before.
    generator = torch.Generator().manual_seed(seed)
    for weight in vocabulary_weights(model):
        old = weight.data[: added_ids.start]
        new = weight.data[added_ids.start : added_ids.stop]
        noise = torch.randn(new.shape, generator=generator).to(weight.device)
        new.copy_(old.mean(0, dtype=torch.float32) + ROW_NOISE * old.std(0) * noise)
