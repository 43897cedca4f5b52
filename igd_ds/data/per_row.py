"""Optional per-row inputs that are read from files: allow and deny lists, guidance scores.

Letters: R rows of the split, N items, B rows of a batch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.id_files import read_ids
from igd_ds.errors import UsageError
from igd_ds.folders import differing
from igd_ds.items.embeddings import items_fingerprint
from igd_ds.items.ids import SOURCE, ItemId, ItemIds

LISTS = ("allow", "deny")


@dataclass(frozen=True)
class ItemLists:
    """The items that may or may not be recommended to the rows of a split.

    Example:
        >>> lists = ItemLists.read("filter.parquet", len(split), ItemIds.read("DATASET"))
        >>> lists.of(np.array([0, 1]))  # row 1 has no restriction
        {'deny': [array([5, 9]), None]}
    """

    place: np.ndarray
    """int64 (R,): the line of a row in `table`; −1 for a row without restriction."""
    table: pa.Table
    """Some of the columns of LISTS, as they stand in the file."""
    path: str
    """Of the file."""
    ids: ItemIds
    """The dataset's."""
    space: str
    """The language of the lists, a name in SPACES."""

    @classmethod
    def read(cls, path: str, num_rows: int, ids: ItemIds, space: str = SOURCE) -> "ItemLists":
        """Read a Parquet file with `row_id` and the list columns `allow`, `deny` or both.

        Each row_id occurs once. A null list means that the row has no restriction. An entry of a
        list is an item's id, text or whole number.

        Args:
            path: of the file.
            num_rows: rows of the split.
            ids: the dataset's.
            space: the language of the lists: "source" or "dense".

        Raises:
            UsageError: the file does not exist, it has other columns or types, or it names a row
                that the split does not have.
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
        return cls(place, table.select(lists).combine_chunks(), path, ids, space)

    def of(self, rows: np.ndarray) -> dict[str, list[np.ndarray | None]]:
        """Return, by column (`allow`, `deny`), the lists of `rows` as dense item ids.

        None means no restriction.

        Raises:
            UsageError: an entry names no item; the message names the row.
        """
        place = pa.array(self.place[rows], mask=self.place[rows] < 0)
        lists = {
            name: self.table[name].combine_chunks().take(place) for name in self.table.column_names
        }
        return {
            name: [
                self._item_ids(entry, f"--item_filter {self.path}: row {row}, column {name}")
                for row, entry in zip(rows, entries, strict=True)
            ]
            for name, entries in lists.items()
        }

    def _item_ids(self, entry: pa.ListScalar, what: str) -> np.ndarray | None:
        """Return one list as dense item ids, int64; None for a null."""
        if not entry.is_valid:
            return None
        values = entry.values
        is_number = pa.types.is_integer(values.type) and not values.null_count
        listed: np.ndarray | list[ItemId] = values.to_numpy() if is_number else values.to_pylist()
        return self.ids.item_ids(listed, what, self.space, "--ids {}")


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
        if not is_list or not _is_id(kind.value_type):
            raise UsageError(
                f"--item_filter {path}: column {name} must hold lists of item ids, texts or whole "
                f"numbers; found {kind}"
            )


def _is_id(kind: pa.DataType) -> bool:
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return is_text or pa.types.is_integer(kind) or pa.types.is_null(kind)


@dataclass(frozen=True)
class ItemScores:
    """A second scorer's item probabilities for the rows of a split, in a file.

    Example:
        >>> scores = ItemScores.read("scores.npy", "", dataset, "test", ItemIds.read("DATASET"))
        >>> scores.of(np.array([0, 5])).shape
        (2, N)
    """

    values: np.ndarray
    """Floats (R, columns), memory-mapped."""
    column: np.ndarray | None
    """int64 (N,): the column of each item; None: column i is item i's."""

    @classmethod
    def read(
        cls, path: str, ids_path: str, dataset: InteractionDataset, split: str, ids: ItemIds
    ) -> "ItemScores":
        """Memory-map a .npy file of floats: row i belongs to row_id i, and a column to an item.

        Which item that is, the file `ids_path` says, or the record that `igd baseline` leaves
        beside its scores. Without either, column j is item j's, if the dataset has kept the
        source's numbers.

        Args:
            path: of the scores.
            ids_path: of a file with the source id of each column, see `read_ids`; "": none.
            dataset: the dataset of the rows.
            split: name of the rows' split.
            ids: the dataset's.

        Raises:
            UsageError: a file does not exist or holds something else, the scores are of other rows
                or items, or nothing says whose order the columns are in.
        """
        num_rows, column = len(dataset.splits[split]), None
        if ids_path:
            values = _map_floats(path, num_rows, None)
            names, what = read_ids(Path(ids_path), "--guidance_ids"), f"--guidance_ids {ids_path}"
            column = ids.places_in(names, values.shape[1], what, "column")
            return cls(values, column)

        record = _read_record(Path(path).with_suffix(SCORES_RECORD))
        if record is not None:
            _check_record(record, path, scores_record(dataset, split))
        else:
            remedy = (
                "give --guidance_ids FILE with the source id of each column (the dataset's "
                "items.parquet where column i is its item_id i)"
            )
            ids.refuse_unnamed(f"--guidance {path}", "column", remedy)
        return cls(_map_floats(path, num_rows, dataset.num_items), None)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return the scores of `rows`, (B, N), column i is item i's."""
        values: np.ndarray = self.values[rows]
        return values if self.column is None else values[:, self.column]


SCORES_RECORD = ".json"
"""Suffix of the record beside a file of scores: scores.json says what scores.npy is of."""


def scores_record(dataset: InteractionDataset, split: str) -> dict[str, Any]:
    """Return what rows and columns of a split's scores are, as JSON values."""
    items = pq.read_table(dataset.folder / "items.parquet", columns=["source_id", "title"])
    return {
        "items": items_fingerprint(items),
        "split": split,
        "rows": dataset.info["files"][f"{split}.parquet"],
    }


def _read_record(path: Path) -> dict[str, Any] | None:
    """Return the record beside some scores; None if there is none, or the file is of another kind.

    Raises:
        UsageError: the file cannot be read as JSON.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{path} is damaged ({error}), and it should say of which items the scores beside it "
            "are; make the scores again with igd baseline --save_scores"
        ) from error
    is_record = isinstance(found, dict) and {"items", "split", "rows"} <= found.keys()
    return found if is_record else None


def _check_record(found: dict[str, Any], path: str, expected: dict[str, Any]) -> None:
    """Raise UsageError unless the record of some scores is that of the rows and items asked for."""
    changed = differing(found, expected)
    if "split" in changed:
        raise UsageError(
            f"--guidance {path} holds scores of the split {found['split']}, not of "
            f"{expected['split']}"
        )
    if changed:
        raise UsageError(
            f"--guidance {path} was made for another dataset (these differ: {', '.join(changed)}); "
            "run igd baseline --save_scores on this one"
        )


def _map_floats(path: str, num_rows: int, num_items: int | None) -> np.ndarray:
    """Memory-map a .npy file of floats; `num_items` None: any number of columns.

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

    columns = "columns" if num_items is None else num_items
    wanted = f"--guidance {path} must hold floats of shape ({num_rows}, {columns}): rows, items"
    if not isinstance(scores, np.ndarray):
        raise UsageError(f"{wanted}; found an archive of several arrays")
    shape = (num_rows, scores.shape[-1] if num_items is None else num_items)
    if scores.dtype.kind != "f" or scores.ndim != 2 or scores.shape != shape:
        raise UsageError(f"{wanted}; found {scores.dtype} of shape {scores.shape}")
    return scores
