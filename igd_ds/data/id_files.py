"""Files that say which item each row or column of an array belongs to."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from igd_ds.errors import UsageError
from igd_ds.items.embeddings import open_array


def read_ids(path: Path, flag: str) -> list[str]:
    """Return source ids as strings, in file order.

    A dataset's own items.parquet is such a file: it names the order of the dense item ids.

    Args:
        path: a .npy file of integers or strings, or a .parquet file with a column `source_id` or
            with one column only.
        flag: the option that names the file, such as "--item_ids".

    Raises:
        UsageError: the file cannot be read, or holds no such column or array.
    """
    if path.suffix == ".parquet":
        return _read_column(path, f"{flag} {path}")

    ids = open_array(path)
    if ids.ndim != 1 or ids.dtype.kind not in "iuU":
        raise UsageError(
            f"{flag} {path}: need a one-dimensional array of integers or strings, found "
            f"{ids.dtype} {ids.shape}"
        )
    return [str(value) for value in ids.tolist()]


def _read_column(path: Path, what: str) -> list[str]:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{what}: not a readable Parquet file ({error})") from error
    if "source_id" not in table.column_names and table.num_columns != 1:
        raise UsageError(f"{what}: need a column source_id, found {', '.join(table.column_names)}")

    column = table["source_id"] if "source_id" in table.column_names else table.column(0)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_id = pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not is_id or column.null_count:
        raise UsageError(
            f"{what}: ids are texts or whole numbers without nulls, found {column.type} with "
            f"{column.null_count} nulls"
        )
    return [str(value) for value in column.to_pylist()]
