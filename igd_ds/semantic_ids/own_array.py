"""Item embeddings from a user's own array: check it and store its rows in the order of the ids.

Letters in shapes: N items, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from igd_ds import distributed
from igd_ds.data.dataset import sha256_of
from igd_ds.errors import UsageError
from igd_ds.items.embeddings import check_vectors, chunks, open_array, write_embeddings


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
        array: a .npy file, one row per item in the order of the ids, or with `item_ids` in any
            order.
        item_ids: a file with the source id of each row, see `read_ids`.

    Returns:
        False if the complete folder exists already and was made from the same files.

    Raises:
        UsageError: the files cannot be read, do not belong together or do not fit the items.
    """
    source = open_array(array)
    digest: str = distributed.on_main(lambda: sha256_of(array))
    record = {**record, "file": array.name, "file_sha256": digest}

    if item_ids is None:
        check_vectors(source, items.num_rows, f"--embeddings {array}")
        rows = np.arange(items.num_rows)
    else:
        record |= {"item_ids": item_ids.name, "item_ids_sha256": sha256_of(item_ids)}
        ids = read_ids(item_ids)
        check_vectors(source, len(source), f"--embeddings {array}")
        rows = rows_of_items(ids, len(source), items, f"--item_ids {item_ids}")

    def fill(vectors: np.ndarray) -> None:
        if distributed.is_main():
            copy_rows(source, rows, vectors)

    dtype = np.float16 if source.dtype == np.float16 else np.float32
    return write_embeddings(output, record, (len(rows), source.shape[1]), dtype, fill)


def read_ids(path: Path) -> list[str]:
    """Return source ids as strings, in file order.

    Args:
        path: a .npy file of integers or strings, or a .parquet file with a column `source_id` or
            with one column only.

    Raises:
        UsageError: the file cannot be read, or holds no such column or array.
    """
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
            f"--item_ids {path}: need a one-dimensional array of integers or strings, found "
            f"{ids.dtype} {ids.shape}"
        )
    return [str(value) for value in ids.tolist()]


def rows_of_items(ids: Sequence[str], num_rows: int, items: pa.Table, what: str) -> np.ndarray:
    """Return which row of an array belongs to each item, int64 (N,).

    Rows whose id is not in the dataset are ignored.

    Args:
        ids: the source id of each row.
        num_rows: rows of the array.
        items: the table of items.parquet.
        what: the name of the ids in error messages, such as "--item_ids FILE.npy".

    Raises:
        UsageError: there are more or fewer ids than rows, an id is repeated, or an item has no row.
    """
    if len(ids) != num_rows:
        raise UsageError(
            f"{what}: {len(ids)} ids for {num_rows} rows of embeddings; need one each, in the same "
            "order"
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
            f"{what}: no row for item {wanted.index(missing[0])} (source id {missing[0]!r}; "
            f"{len(missing)} of {len(wanted)} items lack one); ids must be the dataset's source_id"
        )
    return np.array([row[source_id] for source_id in wanted])


def copy_rows(source: np.ndarray, rows: np.ndarray, target: np.ndarray) -> None:
    """Write source[rows] into `target` (N, D), in chunks."""
    for start, chunk in chunks(target):
        part = slice(start, start + len(chunk))
        # A float64 beyond the range of float32 becomes infinite, and check_vectors reports it.
        with np.errstate(over="ignore"):
            target[part] = source[rows[part]]
