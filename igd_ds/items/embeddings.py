"""Item embeddings on disk: a folder with one array and a record of the items.

    embeddings.npy    (N, D) float32 or float16; row i belongs to item i
    embeddings.json   the items' fingerprint, num_items, width, dtype, and the array's origin

Embeddings belong to items, not to a dataset folder: a dataset with the same items in the same order
(after `igd ids` has filled in their semantic IDs, for example) takes the same embeddings. `igd
embed` writes the folder; quantizers and objectives read it.

Letters in shapes: N items, D width of an embedding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from igd_ds import distributed
from igd_ds.errors import UsageError
from igd_ds.folders import is_made, new_folder, read_json_object, reserve, write_text
from igd_ds.items.ids import ItemIds

ARRAY, RECORD = "embeddings.npy", "embeddings.json"
CHUNK_BYTES = 1 << 26  # bytes of an array that pass through memory at a time (assumed)


@dataclass(frozen=True)
class Embeddings:
    """A loaded folder of embeddings."""

    vectors: np.ndarray
    """(N, D) float32 or float16, a read-only memory map."""
    info: dict[str, Any]
    """The content of embeddings.json."""


def items_fingerprint(items: pa.Table) -> str:
    """Return a sha256 (hex) of items.parquet's source ids and titles, in their order."""
    digest = hashlib.sha256()
    for source_id, title in zip(
        items["source_id"].to_pylist(), items["title"].to_pylist(), strict=True
    ):
        digest.update(json.dumps([str(source_id), title]).encode() + b"\n")
    return digest.hexdigest()


def load_embeddings(folder: str | Path, items: pa.Table) -> Embeddings:
    """Map the embeddings of these items (the table of items.parquet) into memory.

    Raises:
        UsageError: the folder holds no embeddings; they belong to other items, or to the same items
            in another order; the folder does not record the order of the rows; there are more or
            fewer rows than items; values are not finite, or all equal.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise UsageError(
            f"{folder} is no folder of embeddings (no {RECORD} there); igd embed makes one"
        )
    info = read_json_object(folder / RECORD, "make the embeddings again with igd embed")

    vectors = open_array(folder / ARRAY)
    check_vectors(vectors, items.num_rows, str(folder / ARRAY))

    if info.get("items") != items_fingerprint(items):
        raise UsageError(
            f"{folder / RECORD}: the embeddings are of other items, or in another order, than the "
            "dataset's; run igd embed on this dataset"
        )

    # Earlier versions took the rows of a user's array in the array's order, without item ids.
    if "file" in info and "item_ids" not in info:
        remedy = "run igd embed again, with --item_ids"
        ItemIds.of(items).refuse_unnamed(f"{folder}, made from {info['file']}", "row", remedy)
    return Embeddings(vectors, info)


def write_embeddings(
    folder: Path,
    record: Mapping[str, Any],
    shape: tuple[int, int],
    dtype: npt.DTypeLike,
    fill: Callable[[np.ndarray], None],
) -> bool:
    """Write a folder of embeddings, which appears when it is complete. Every rank calls this.

    Args:
        folder: the folder to make, on a file system that all ranks share.
        record: what the embeddings are made from, with the items' fingerprint under "items". It is
            written to embeddings.json together with shape and type.
        shape: (N, D).
        dtype: float32 or float16.
        fill: a function that writes this rank's rows into the memory-mapped (N, D) array.

    Returns:
        False if the complete folder exists already and was made from the same `record`.

    Raises:
        UsageError: the folder exists and was made from something else, or the vectors that `fill`
            wrote do not pass `check_vectors`.
    """
    record = {
        **record,
        "num_items": shape[0],
        "width": shape[1],
        "dtype": np.dtype(dtype).name,
    }

    with ExitStack() as unfinished:

        def start() -> str | None:
            if is_made(folder, RECORD, record):
                return None
            partial = unfinished.enter_context(new_folder(folder))
            array = np.lib.format.open_memmap(partial / ARRAY, mode="w+", dtype=dtype, shape=shape)
            array.flush()
            reserve(partial / ARRAY)
            return str(partial)

        def finish(partial: Path) -> None:
            check_vectors(open_array(partial / ARRAY), shape[0], f"--output {folder}")
            text = json.dumps(record, indent=1, ensure_ascii=False)
            write_text(partial / RECORD, text + "\n")
            unfinished.close()  # renames the folder, before the other ranks go on and read it

        # Rank 0 alone makes the folder and checks it; all ranks write their rows into one mapped
        # file.
        name = distributed.on_main(start)
        if name is None:
            return False

        vectors = np.load(Path(name) / ARRAY, mmap_mode="r+")
        fill(vectors)
        vectors.flush()

        distributed.barrier()
        distributed.on_main(lambda: finish(Path(name)))
    return True


def open_array(path: Path) -> np.ndarray:
    """Map a .npy file into memory.

    Raises:
        UsageError: the file is missing, is not a .npy file, or holds Python objects.
    """
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
    """Check that `vectors` is (num_items, D), float, finite, and that its rows are not all equal.

    The array is read in chunks. Rows count as equal within the rounding of their type, because a
    constant that passed through a model differs in the last bits.

    Args:
        vectors: the array to check; may be a memory map.
        num_items: N.
        what: the name of the array in error messages, such as "--embeddings FILE.npy".

    Raises:
        UsageError: the array is not as described; the message starts with `what`.
    """
    if vectors.ndim != 2 or vectors.shape[1] == 0 or vectors.dtype.kind != "f":
        raise UsageError(
            f"{what}: need a float array (items, width), found {vectors.dtype} {vectors.shape}"
        )
    if len(vectors) != num_items:
        raise UsageError(
            f"{what}: {len(vectors)} rows for {num_items} items; need one row per item, in the "
            "order of the ids"
        )

    low, high = np.full(vectors.shape[1], np.inf), np.full(vectors.shape[1], -np.inf)
    for start, chunk in chunks(vectors):
        finite = np.isfinite(chunk).all(1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise UsageError(
                f"{what}: row {row} holds NaN or infinity ({np.count_nonzero(~finite)} such rows "
                f"from {start} to {start + len(chunk) - 1}); repair the array, or embed with "
                "--dtype fp32"
            )
        low, high = np.minimum(low, chunk.min(0)), np.maximum(high, chunk.max(0))

    tolerance = 8 * np.finfo(vectors.dtype).eps * max(np.abs(low).max(), np.abs(high).max())
    if (high - low).max() <= tolerance:
        raise UsageError(
            f"{what}: all {num_items} rows are equal, so nothing tells the items apart; check how "
            "they were made"
        )


def chunks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of the first row, view of the rows) for about CHUNK_BYTES at a time."""
    size = max(CHUNK_BYTES // max(vectors[:1].nbytes, 1), 1)
    for start in range(0, len(vectors), size):
        yield start, vectors[start : start + size]
