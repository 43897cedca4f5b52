"""Item embeddings from a user's own array: check it and store its rows in the order of the ids.

Letters in shapes: N items, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from igd_ds import distributed
from igd_ds.data.id_files import read_ids
from igd_ds.folders import sha256_of
from igd_ds.items.embeddings import check_vectors, chunks, open_array, write_embeddings
from igd_ds.items.ids import ItemIds


def store_own_array(
    output: Path,
    items: pa.Table,
    record: Mapping[str, Any],
    array: Path,
    item_ids: Path | None,
) -> bool:
    """Write the folder of embeddings from a .npy file; every rank calls this.

    Args:
        output: the folder of embeddings to make.
        items: the table of items.parquet.
        record: what embeddings.json shall say about items and dataset.
        array: a .npy file, one row per item.
        item_ids: a file with the source id of each row, see `read_ids`. None: the rows are in the
            order of the item ids, which must be the source's own numbers.

    Returns:
        False if the complete folder exists already and was made from the same files.

    Raises:
        UsageError: the files cannot be read, do not belong together or do not fit the items, or
            nothing says whose order the rows are in.
    """
    source_ids = ItemIds.of(items)
    if item_ids is None:
        remedy = (
            "give --item_ids FILE with the source id of each row: numpy.arange(ROWS), saved, where "
            "row i is the source's item i; the dataset's items.parquet where row i is its item_id i"
        )
        source_ids.refuse_unnamed(f"--embeddings {array}", "row", remedy)

    source = open_array(array)
    digest: str = distributed.on_main(lambda: sha256_of(array))
    record = {**record, "file": array.name, "file_sha256": digest}

    if item_ids is None:
        check_vectors(source, items.num_rows, f"--embeddings {array}")
        rows = np.arange(items.num_rows)
    else:
        record |= {"item_ids": item_ids.name, "item_ids_sha256": sha256_of(item_ids)}
        ids = read_ids(item_ids, "--item_ids")
        check_vectors(source, len(source), f"--embeddings {array}")
        rows = source_ids.places_in(ids, len(source), f"--item_ids {item_ids}")

    def fill(vectors: np.ndarray) -> None:
        if distributed.is_main():
            copy_rows(source, rows, vectors)

    dtype = np.float16 if source.dtype == np.float16 else np.float32
    return write_embeddings(output, record, (len(rows), source.shape[1]), dtype, fill)


def copy_rows(source: np.ndarray, rows: np.ndarray, target: np.ndarray) -> None:
    """Write source[rows] into `target` (N, D), in chunks."""
    for start, chunk in chunks(target):
        part = slice(start, start + len(chunk))
        # A float64 beyond the range of float32 becomes infinite, and check_vectors reports it.
        with np.errstate(over="ignore"):
            target[part] = source[rows[part]]
