"""Optional per-row inputs that are read from files: allow and deny lists, guidance scores.

Letters: R rows of the split, N items.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from igd_ds.errors import UsageError

LISTS = ("allow", "deny")


@dataclass(frozen=True)
class ItemLists:
    """The item ids that may or may not be recommended to the rows of a split.

    Example:
        >>> lists = ItemLists.read("filter.parquet", num_rows=len(split))
        >>> lists.of(np.array([0, 1]))  # row 1 has no restriction
        {'deny': [array([5, 9]), None]}
    """

    place: np.ndarray
    """int64 (R,): the line of a row in `table`; −1 for a row without restriction."""
    table: pa.Table
    """Some of the columns of LISTS."""

    @classmethod
    def read(cls, path: str, num_rows: int) -> "ItemLists":
        """Read a Parquet file with `row_id` and the list columns `allow`, `deny` or both.

        Each row_id occurs once. A null list means that the row has no restriction.

        Raises:
            UsageError: the file does not exist, it has other columns or types, or it names a row
                that the split (of `num_rows` rows) does not have.
        """
        if not Path(path).is_file():
            raise UsageError(f"--item_filter: no file {path}")
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise UsageError(f"--item_filter {path} is not a Parquet file ({error})") from error
        lists = [name for name in LISTS if name in table.column_names]
        _check_columns(path, table, lists)

        row_ids = table["row_id"].to_numpy()
        unknown = row_ids[(row_ids < 0) | (row_ids >= num_rows)]
        if len(unknown):
            raise UsageError(
                f"--item_filter {path}: the split has no row {unknown[0]}; row ids are 0 to "
                f"{num_rows - 1}"
            )

        place = np.full(num_rows, -1, dtype=np.int64)
        place[row_ids] = np.arange(len(row_ids))
        if np.count_nonzero(place >= 0) < len(row_ids):
            twice = row_ids[np.flatnonzero(place[row_ids] != np.arange(len(row_ids)))[0]]
            raise UsageError(
                f"--item_filter {path}: row {twice} is there more than once; merge its lists"
            )
        return cls(place, table.select(lists).combine_chunks())

    def of(self, rows: np.ndarray) -> dict[str, list[np.ndarray | None]]:
        """Return, by column (`allow`, `deny`), the lists of `rows`; None means no restriction."""
        place = pa.array(self.place[rows], mask=self.place[rows] < 0)
        lists = {
            name: self.table[name].combine_chunks().take(place) for name in self.table.column_names
        }
        return {name: [_ids(entry) for entry in entries] for name, entries in lists.items()}


def _check_columns(path: str, table: pa.Table, lists: list[str]) -> None:
    if not lists or set(table.column_names) != {"row_id", *lists}:
        found = ", ".join(table.column_names)
        raise UsageError(
            f"--item_filter {path} must have the columns row_id and allow, deny or both; found "
            f"{found}"
        )
    if not pa.types.is_integer(table["row_id"].type) or table["row_id"].null_count:
        raise UsageError(
            f"--item_filter {path}: row_id must be whole numbers without nulls, found "
            f"{table['row_id'].type}"
        )
    for name in lists:
        kind = table[name].type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not is_list or not pa.types.is_integer(kind.value_type):
            raise UsageError(
                f"--item_filter {path}: column {name} must hold lists of item ids, whole numbers; "
                f"found {kind}"
            )


def _ids(entry: pa.ListScalar) -> np.ndarray | None:
    return entry.values.to_numpy(zero_copy_only=False) if entry.is_valid else None


def map_guidance(path: str, num_rows: int, num_items: int) -> np.ndarray:
    """Memory-map a .npy file of floats (R, N): row i belongs to row_id i, column j to item j.

    Nothing in the file is ever unpickled.

    Raises:
        UsageError: the file does not exist, or holds something else.
    """
    if not Path(path).is_file():
        raise UsageError(f"--guidance: no file {path}")
    try:
        scores = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UsageError(f"--guidance {path} is not a .npy file of floats ({error})") from error

    wanted = f"--guidance {path} must hold floats of shape ({num_rows}, {num_items}): rows, items"
    if not isinstance(scores, np.ndarray):
        raise UsageError(f"{wanted}; found an archive of several arrays")
    if scores.dtype.kind != "f" or scores.shape != (num_rows, num_items):
        raise UsageError(f"{wanted}; found {scores.dtype} of shape {scores.shape}")
    return scores
