"""The canonical dataset: the folder that `igd prepare` writes and everything else reads.

Letters: N items, I interactions, R rows of a split, H items in all histories of a split.

    items.parquet               item_id int32 (dense from 0, ascending), title string, semantic_id list<string>, source_id string,
                                and what the source has of METADATA_SCHEMA
    users.parquet               user_id int64 (ascending), source_id string: the users of the rows
    train|valid|test.parquet    user_id int64, history list<int32> (oldest first), target int32, timestamp int64 (seconds) | null
    dataset.json                name, domain, protocol, parameters, funnel, counts, sources, files (sha256), hygiene, version
    README.md, *.png            the data card; not part of the dataset's fingerprint

`source_id` is what the source calls an item or user (an ASIN, a reviewer's id). A row's index in its file is its `row_id`. The
folder is complete or absent, and equal inputs give equal bytes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from igd_ds.data.card import write_card
from igd_ds.errors import UsageError

VERSION = 2
SPLITS = ("train", "valid", "test")
FILES = ("items.parquet", "users.parquet", *(f"{name}.parquet" for name in SPLITS))
INFO_KEYS = {
    "name",
    "domain",
    "protocol",
    "parameters",
    "funnel",
    "counts",
    "sources",
    "files",
    "hygiene",
    "version",
}
ROW_SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("history", pa.list_(pa.int32())),
        ("target", pa.int32()),
        ("timestamp", pa.int64()),
    ]
)
METADATA_SCHEMA = pa.schema(
    [
        ("description", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("brand", pa.string()),
        ("price", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Interactions:
    """Who met what, in file order: `users` int32 or int64 (I,), `items` int32 (I,), `timestamps` int64 (I,), seconds, or None."""

    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray | None

    def __len__(self) -> int:
        """I."""
        return len(self.users)

    def take(self, index: np.ndarray) -> "Interactions":
        """Return the interactions at `index` (positions or a bool mask), in that order."""
        times = None if self.timestamps is None else self.timestamps[index]
        return Interactions(self.users[index], self.items[index], times)


@dataclass(frozen=True)
class SourceData:
    """What a source hands over.

    N `titles`, N `semantic_ids` (or None), interactions with item ids in [0, N). `item_names` (N,) and
    `user_names` (U,) are string arrays with the source's ids at the place of ours; None where ours are the source's. `metadata`
    maps item ids to a table of some columns of METADATA_SCHEMA, one row each. `funnel` says what was read and rejected. `splits`
    are rows that the source itself made (tables of ROW_SCHEMA), for the protocol `given`.
    """

    titles: list[str | None]
    semantic_ids: list[list[str]] | None
    interactions: Interactions
    item_names: pa.Array | None = None
    user_names: pa.Array | None = None
    metadata: Callable[[np.ndarray], pa.Table] | None = None
    funnel: tuple[dict, ...] = ()
    splits: dict[str, pa.Table] | None = None


@dataclass(frozen=True)
class Split:
    """The rows of one split, as numpy views of memory-mapped Arrow columns.

    `user_ids` int64 (R,), `history_items` int32 (H,), `history_offsets` int64 (R+1,), `targets` int32 (R,), `timestamps` int64
    (R,) in seconds, or None. Row r's history is `history_items[history_offsets[r] : history_offsets[r+1]]`, oldest first.
    """

    name: str
    user_ids: np.ndarray
    history_items: np.ndarray
    history_offsets: np.ndarray
    targets: np.ndarray
    timestamps: np.ndarray | None

    def __len__(self) -> int:
        """R."""
        return len(self.targets)

    def history(self, row: int) -> np.ndarray:
        """Return a row's history, int32, oldest first."""
        return self.history_items[self.history_offsets[row] : self.history_offsets[row + 1]]


@dataclass(frozen=True)
class InteractionDataset:
    """A loaded dataset folder. `titles` (N,), `semantic_ids` (N,) or None, `splits` by name, `info` = dataset.json.

    `fingerprint` is the sha256 over the files' hashes: two datasets with one fingerprint hold the same data.
    """

    folder: Path
    info: dict
    titles: list[str | None]
    semantic_ids: list[list[str]] | None
    splits: dict[str, Split]
    fingerprint: str

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.titles)

    @classmethod
    def load(cls, folder: str | Path) -> "InteractionDataset":
        """Read and check a dataset folder.

        Raises ValueError when a file is missing or is not the one dataset.json describes, when item ids are not 0, 1, 2 …,
        when a split is empty or when a row names an item outside the catalogue (the message names split and row).
        """
        folder = Path(folder)
        info = read_info(folder)
        titles, semantic_ids = read_items(folder)
        splits = {name: _read_split(folder, name, info, len(titles)) for name in SPLITS}
        return cls(folder, info, titles, semantic_ids, splits, fingerprint(info))


def sha256_of(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(buffer[:read])
    return digest.hexdigest()


def fingerprint(info: dict) -> str:
    """Return the sha256 (hex) over the sorted file hashes of a dataset.json."""
    return hashlib.sha256("\n".join(sorted(info["files"].values())).encode()).hexdigest()


def read_info(folder: str | Path) -> dict:
    """Return dataset.json after checking that the folder is complete and its files are the ones described there."""
    folder = Path(folder)
    path = folder / "dataset.json"
    if not path.is_file():
        raise UsageError(
            f"{folder} is not a dataset: it has no dataset.json; make one with igd prepare"
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({error}); prepare the dataset again") from error
    missing = INFO_KEYS - info.keys() if isinstance(info, dict) else INFO_KEYS
    if missing or info["version"] != VERSION or set(info["files"]) != set(FILES):
        found = (
            f"lacks {', '.join(sorted(missing))}"
            if missing
            else f"version {info['version']}, files {sorted(info['files'])}"
        )
        raise UsageError(
            f"{path}: {found}; need version {VERSION} and the files {', '.join(FILES)}; prepare it again"
        )
    for name, expected in info["files"].items():
        if not (folder / name).is_file():
            raise UsageError(f"{folder / name} is missing; prepare the dataset again")
        if (found := sha256_of(folder / name)) != expected:
            raise UsageError(
                f"{folder / name} is not the file that dataset.json describes (sha256 {found[:12]}…, expected {expected[:12]}…); "
                "prepare the dataset again"
            )
    return info


def read_items(folder: str | Path) -> tuple[list[str | None], list[list[str]] | None]:
    """Return (titles, semantic IDs or None where the dataset has none), indexed by item id."""
    path = Path(folder) / "items.parquet"
    table = pq.read_table(path)
    if missing := {"item_id", "title", "semantic_id"} - set(table.column_names):
        raise UsageError(f"{path}: no column {', '.join(sorted(missing))}")
    ids = table["item_id"].to_numpy()
    wrong = np.flatnonzero(ids != np.arange(len(ids)))
    if len(wrong):
        found = ids[wrong[0]]
        reason = (
            "a duplicate" if found in ids[: wrong[0]] else "ids must be dense from 0 and ascending"
        )
        raise UsageError(f"{path}: row {wrong[0]} has item_id {found}: {reason}")
    codes = table["semantic_id"]
    if codes.null_count == len(codes):
        return table["title"].to_pylist(), None
    semantic_ids = codes.to_pylist()
    for item, path_codes in enumerate(semantic_ids):
        if not path_codes or None in path_codes:
            raise UsageError(
                f"{path}: item {item} has semantic_id {path_codes}, while other items have one"
            )
    return table["title"].to_pylist(), semantic_ids


def item_table(
    titles: Sequence[str | None],
    semantic_ids: Sequence | None,
    names: pa.Array,
    metadata: pa.Table | None = None,
) -> pa.Table:
    """Return items.parquet's table; `names` (N,) are the source's ids, `metadata` N rows of some columns of METADATA_SCHEMA."""
    try:
        title_column = pa.array(titles, pa.string())
    except UnicodeEncodeError as error:  # half an emoji, cut off by the source
        raise UsageError(
            f"title {error.object!r} is not valid Unicode; use --titles placeholder, which repairs it"
        ) from error
    columns = {
        "item_id": pa.array(np.arange(len(titles), dtype=np.int32)),
        "title": title_column,
        "semantic_id": pa.array(semantic_ids or [None] * len(titles), pa.list_(pa.string())),
        "source_id": names.cast(pa.string()),
    }
    return pa.table(
        columns | ({name: metadata[name] for name in metadata.column_names} if metadata else {})
    )


def user_table(splits: dict[str, pa.Table], names: pa.Array | None) -> pa.Table:
    """Return users.parquet's table: the users of all rows with their names, `names[u]` or, with None, the number itself."""
    users = np.unique(np.concatenate([table["user_id"].to_numpy() for table in splits.values()]))
    column = pa.array(users)
    return pa.table(
        {
            "user_id": column,
            "source_id": column.cast(pa.string()) if names is None else names.take(column),
        }
    )


def write_dataset(
    folder: str | Path, items: pa.Table, users: pa.Table, splits: dict[str, pa.Table], info: dict
) -> None:
    """Write a dataset folder with its data card; it appears under its name only when complete.

    `info` is dataset.json without `files` and `version`. Raises ValueError when the folder exists or a split is empty.
    """
    folder = Path(folder)
    if folder.exists():
        raise UsageError(f"{folder} exists already; delete it or choose another output")
    empty = [name for name in SPLITS if splits[name].num_rows == 0]
    if empty:
        rows = ", ".join(f"{name} {splits[name].num_rows}" for name in SPLITS)
        raise UsageError(
            f"empty split: {', '.join(empty)} (rows: {rows}); the source holds too few interactions for this protocol"
        )
    partial = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run that had our process id
    partial.mkdir(parents=True)
    try:
        for name, table in zip(
            FILES, [items, users, *(splits[name].cast(ROW_SCHEMA) for name in SPLITS)], strict=True
        ):
            # One row group makes one Arrow batch, and that a view instead of a copy in _read_split.
            pq.write_table(table, partial / name, compression="zstd", row_group_size=table.num_rows)
        info = info | {
            "files": {name: sha256_of(partial / name) for name in FILES},
            "version": VERSION,
        }
        text = json.dumps(info, indent=1, ensure_ascii=False) + "\n"
        (partial / "dataset.json").write_text(text, encoding="utf-8")
        write_card(partial, info, items, splits)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _memory_mapped(path: Path, digest: str) -> pa.Table:
    """Return a Parquet file as a memory-mapped Arrow table.

    `datasets` converts the file to Arrow in its cache, under a lock, so ranks that start together convert it once. The cache
    folder is named after the file's content: a file rewritten at the same path can never be read from an old cache.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "igd_ds" / digest
    bars_were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        whole = max(pq.read_metadata(path).num_rows, 1)
        table = datasets.Dataset.from_parquet(
            str(path), cache_dir=str(cache), writer_batch_size=whole
        )
    finally:
        if bars_were_on:
            datasets.enable_progress_bars()
    return table.data.table


def _numpy(column: pa.ChunkedArray | list[pa.Array]) -> np.ndarray:
    """Return a null-free integer column: a view where it is one chunk, else a copy."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else column
    return (
        chunks[0].to_numpy()
        if len(chunks) == 1
        else np.concatenate([chunk.to_numpy() for chunk in chunks])
    )


def _read_split(folder: Path, name: str, info: dict, num_items: int) -> Split:
    path = folder / f"{name}.parquet"
    schema = pq.read_schema(path)
    for field in ROW_SCHEMA:
        if field.name not in schema.names or schema.field(field.name).type != field.type:
            found = schema.field(field.name).type if field.name in schema.names else "nothing"
            raise UsageError(f"{path}: column {field.name} must be {field.type}, found {found}")
    if pq.read_metadata(path).num_rows == 0:
        raise UsageError(f"{path}: the split is empty")
    table = _memory_mapped(path, info["files"][path.name])
    lists = table["history"].chunks
    items = [chunk.flatten() for chunk in lists]
    for column, nulls in [
        ("user_id", table["user_id"].null_count),
        ("target", table["target"].null_count),
        ("history", table["history"].null_count + sum(chunk.null_count for chunk in items)),
        (
            "timestamp",
            table["timestamp"].null_count % len(table),
        ),  # all null: a source without timestamps
    ]:
        if nulls:
            raise UsageError(f"{path}: column {column} holds {nulls} nulls")
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in lists]
    offsets = np.zeros(len(table) + 1, dtype=np.int64)
    np.cumsum(np.concatenate(lengths), out=offsets[1:])
    timestamps = None if table["timestamp"].null_count else _numpy(table["timestamp"])
    split = Split(
        name, _numpy(table["user_id"]), _numpy(items), offsets, _numpy(table["target"]), timestamps
    )
    for what, ids in [("target", split.targets), ("history", split.history_items)]:
        if len(ids) and (ids.min() < 0 or ids.max() >= num_items):
            place = int(np.flatnonzero((ids < 0) | (ids >= num_items))[0])
            row = (
                place
                if what == "target"
                else int(np.searchsorted(offsets, place, side="right")) - 1
            )
            raise UsageError(
                f"{path}: row {row} of split {name}: {what} item {ids[place]} is not in [0, {num_items})"
            )
    return split
