"""Item embeddings on disk: a folder with one array, and a record of the items that its rows belong to.

    embeddings.npy    (N, D) float32 or float16, row i belongs to item i
    embeddings.json   items (fingerprint), num_items, width, dtype, and where they come from (model and settings, or a file)

Embeddings belong to items, not to a dataset folder: a folder with the same items in the same order (with semantic IDs
filled in, say) takes the same embeddings. igd embed makes the folder; quantizers and weightings read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from igd_ds.errors import UsageError

ARRAY, RECORD = "embeddings.npy", "embeddings.json"
CHUNK_BYTES = 1 << 26  # of an array that passes through memory at a time (assumed)


@dataclass(frozen=True)
class Embeddings:
    """`vectors` (N, D) float32 or float16, a read-only memory map; `info` = embeddings.json."""

    vectors: np.ndarray
    info: dict


def items_fingerprint(items: pa.Table) -> str:
    """sha256 (hex) of which items these are and in what order: source ids and titles of items.parquet's table."""
    digest = hashlib.sha256()
    for source_id, title in zip(
        items["source_id"].to_pylist(), items["title"].to_pylist(), strict=True
    ):
        digest.update(json.dumps([str(source_id), title]).encode() + b"\n")
    return digest.hexdigest()


def load_embeddings(folder: str | Path, items: pa.Table) -> Embeddings:
    """Map the embeddings of these items (items.parquet's table).

    Raises:
        ValueError: not a folder of embeddings; they are of other items, or of the same in another order; another count;
            values that are not finite, or all equal.
    """
    folder = Path(folder)
    try:
        info = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} is no folder of embeddings ({error}); make one with igd embed"
        ) from error
    vectors = open_array(folder / ARRAY)
    check_vectors(vectors, items.num_rows, str(folder / ARRAY))
    if info.get("items") != items_fingerprint(items):
        raise UsageError(
            f"{folder / RECORD}: the embeddings are of other items, or in another order, than the dataset's; "
            "run igd embed on this dataset"
        )
    return Embeddings(vectors, info)


def open_array(path: Path) -> np.ndarray:
    """Map a .npy file into memory; ValueError when it is none, or holds Python objects."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(
            f"{path}: not a readable .npy file of numbers ({error}); save it with numpy.save"
        ) from error
    if not isinstance(array, np.ndarray):
        raise UsageError(
            f"{path}: an archive of several arrays; save the one array with numpy.save"
        )
    return array


def check_vectors(vectors: np.ndarray, num_items: int, what: str) -> None:
    """Raise ValueError unless `vectors` is (num_items, D) floats, all finite and not all rows equal. Reads it in chunks.

    Rows count as equal within rounding of their type: a constant that passed through a model differs in the last bits.
    """
    if vectors.ndim != 2 or vectors.shape[1] == 0 or vectors.dtype.kind != "f":
        raise UsageError(
            f"{what}: need a float array (items, width), found {vectors.dtype} {vectors.shape}"
        )
    if len(vectors) != num_items:
        raise UsageError(
            f"{what}: {len(vectors)} rows for {num_items} items; need one row per item, in the order of the ids"
        )
    low, high = np.full(vectors.shape[1], np.inf), np.full(vectors.shape[1], -np.inf)
    for start, chunk in chunks(vectors):
        finite = np.isfinite(chunk).all(1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise UsageError(
                f"{what}: row {row} holds NaN or infinity ({np.count_nonzero(~finite)} such rows from {start} to "
                f"{start + len(chunk) - 1}); repair the array, or embed with --dtype fp32"
            )
        low, high = np.minimum(low, chunk.min(0)), np.maximum(high, chunk.max(0))
    tolerance = 8 * np.finfo(vectors.dtype).eps * max(np.abs(low).max(), np.abs(high).max())
    if (high - low).max() <= tolerance:
        raise UsageError(
            f"{what}: all {num_items} rows are equal, so nothing tells the items apart; check how they were made"
        )


def chunks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, view of the rows) for about CHUNK_BYTES at a time."""
    size = max(CHUNK_BYTES // max(vectors[:1].nbytes, 1), 1)
    for start in range(0, len(vectors), size):
        yield start, vectors[start : start + size]
