"""The canonical dataset: the folder that `igd prepare` writes and all other commands read.

Letters: N items, I interactions, R rows of a split, H items in all histories of a split.

    items.parquet               item_id int32 (dense from 0, ascending), title string,
                                semantic_id list<string>, source_id string, and the columns of
                                METADATA_SCHEMA that the source has
    users.parquet               user_id int64 (ascending), source_id string; the users of the rows
    train|valid|test.parquet    user_id int64, history list<int32> (oldest first), target int32,
                                timestamp int64 (seconds) | null
    dataset.json                name, domain, protocol, parameters, funnel, counts, sources,
                                files (sha256), hygiene, version, repeats
    README.md, *.png            the data card; the fingerprint of the dataset does not cover it

A `source_id` is the name that the source gives to an item or user (an ASIN, a reviewer's id). The
index of a row in its file is its `row_id`. A dataset folder is complete or absent. Equal inputs
give equal bytes; only the figures of the card may differ on another kind of CPU.
"""

import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.constants import HF_HOME

from igd_ds.data.card import write_card
from igd_ds.data.seen_items import MOST_REPEATS, SeenItems
from igd_ds.errors import UsageError
from igd_ds.folders import is_free, new_folder, read_parquet, sha256_of, temporary_name, write_text

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

FunnelStep = dict[str, str | int]
"""One step from the raw files to the rows: `step`, its text, and what it left (users, items, …)."""


@dataclass(frozen=True)
class Interactions:
    """The events of a source in file order: which user met which item, and when.

    Example:
        User 4 meets item 0 and then item 1, a day later.

        >>> Interactions(np.array([4, 4]), np.array([0, 1], np.int32), np.array([0, 86_400]))
    """

    users: np.ndarray
    """int32 or int64 (I,)."""
    items: np.ndarray
    """int32 (I,)."""
    timestamps: np.ndarray | None
    """int64 (I,), seconds since 1970; None if the source has no times."""

    def __len__(self) -> int:
        """Return the number of interactions, I."""
        return len(self.users)

    def take(self, index: np.ndarray) -> "Interactions":
        """Return the interactions at `index` (positions or a bool mask), in that order."""
        times = None if self.timestamps is None else self.timestamps[index]
        return Interactions(self.users[index], self.items[index], times)


@dataclass(frozen=True)
class SourceData:
    """What a source returns: its catalogue and its interactions.

    Example:
        Two items with titles; user 7 meets both, and the source has no times.

        >>> events = Interactions(np.array([7, 7]), np.array([0, 1], np.int32), None)
        >>> SourceData(["Kane & Abel", "Dune"], None, events)
    """

    titles: Sequence[str | None]
    """N titles; None where an item has no title."""
    semantic_ids: Sequence[list[str]] | None
    """N lists of codes, or None if the source has no semantic IDs."""
    interactions: Interactions
    """Item ids lie in [0, N)."""
    item_names: pa.Array | None = None
    """String array (N,): the source's id of each item. None if our ids are the source's ids."""
    user_names: pa.Array | None = None
    """String array (U,): the source's id of each user. None if our ids are the source's ids."""
    metadata: Callable[[np.ndarray], pa.Table] | None = None
    """Maps item ids to a table of some columns of METADATA_SCHEMA, with one row per item."""
    funnel: tuple[FunnelStep, ...] = ()
    """What the source read and what it rejected."""
    splits: Mapping[str, pa.Table] | None = None
    """Rows that the source itself made (tables of ROW_SCHEMA), for the protocol `given`."""


@dataclass(frozen=True)
class Split:
    """The rows of one split, as numpy views of memory-mapped Arrow columns."""

    name: str
    user_ids: np.ndarray
    """int64 (R,)."""
    history_items: np.ndarray
    """int32 (H,), the histories of all rows one after the other, each oldest first."""
    history_offsets: np.ndarray
    """int64 (R + 1,): the history of row r is `history_items[offsets[r] : offsets[r + 1]]`."""
    targets: np.ndarray
    """int32 (R,)."""
    timestamps: np.ndarray | None
    """int64 (R,), seconds since 1970; None if the dataset has no times."""

    def __len__(self) -> int:
        """Return the number of rows, R."""
        return len(self.targets)

    def history(self, row: int) -> np.ndarray:
        """Return the history of a row, int32, oldest first."""
        return self.history_items[self.history_offsets[row] : self.history_offsets[row + 1]]


@dataclass(frozen=True)
class InteractionDataset:
    """A loaded dataset folder.

    Example:
        >>> dataset = InteractionDataset.load("DATASET")
        >>> train = dataset.splits["train"]
        >>> dataset.titles[train.targets[0]], train.history(0)
    """

    folder: Path
    info: dict[str, Any]
    """The object in dataset.json."""
    titles: list[str | None]
    """N titles; None where an item has no title."""
    semantic_ids: list[list[str]] | None
    """N lists of codes, or None if the dataset has no semantic IDs."""
    splits: dict[str, Split]
    fingerprint: str
    """sha256 over the hashes of the files: datasets with equal fingerprints hold equal data."""

    @property
    def num_items(self) -> int:
        """Return the number of items, N."""
        return len(self.titles)

    @functools.cached_property
    def repeat_rate(self) -> float:
        """Return the share of training targets that are seen items (see SeenItems).

        It stands in dataset.json; for datasets prepared before it is counted here.
        """
        rate = self.info.get("repeats", {}).get("training_targets")
        return repeat_rate(self.splits, self.info["protocol"]) if rate is None else rate

    def excludes_seen(self, asked: str) -> bool:
        """Return whether lists leave seen items out.

        Args:
            asked: "yes", "no", or "auto": yes if seen items are rare among the training targets.
        """
        return asked == "yes" or (asked == "auto" and self.repeat_rate <= MOST_REPEATS)

    def describe_exclusion(self, asked: str) -> str:
        """Return a line that says what becomes of seen items, and why (see `excludes_seen`)."""
        what = "left out of the lists" if self.excludes_seen(asked) else "kept in the lists"
        return (
            f"seen items are {what} (--exclude_seen {asked}; {self.repeat_rate:.1%} of the "
            f"training targets are seen items, {MOST_REPEATS:.0%} is the most for auto to leave "
            "them out)"
        )

    def seen_items(self, split: str) -> SeenItems:
        """Return what the users of a split's rows have met before."""
        return SeenItems.build(self.splits, split, self.info["protocol"])

    @classmethod
    def load(cls, folder: str | Path) -> "InteractionDataset":
        """Read and check a dataset folder.

        Raises:
            UsageError: a file is missing or is not the file that dataset.json describes, the item
                ids are not 0, 1, 2 …, a split is empty, or a row names an item outside of the
                catalogue (the message names the split and the row).
        """
        folder = Path(folder)
        info = read_info(folder)
        titles, semantic_ids = read_items(folder)
        splits = {name: _read_split(folder, name, info, len(titles)) for name in SPLITS}
        return cls(folder, info, titles, semantic_ids, splits, fingerprint(info))


def fingerprint(info: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) over the sorted file hashes of a dataset.json."""
    return hashlib.sha256("\n".join(sorted(info["files"].values())).encode()).hexdigest()


def repeat_rate(splits: Mapping[str, Split], protocol: str) -> float:
    """Return the share of training targets that are seen items (see SeenItems)."""
    return float(SeenItems.build(splits, "train", protocol).is_repeat().mean())


# ---- reading


def read_info(folder: str | Path) -> dict[str, Any]:
    """Return dataset.json after checking that the folder is complete and its files are unchanged.

    Raises:
        UsageError: the folder is no dataset, a file is missing, or a file has another sha256.
    """
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
    if missing:
        found = f"it lacks {', '.join(sorted(missing))}"
    else:
        found = f"version {info['version']}, files {sorted(info['files'])}"
    if missing or info["version"] != VERSION or set(info["files"]) != set(FILES):
        raise UsageError(
            f"{path}: {found}; need version {VERSION} and the files {', '.join(FILES)}; "
            "prepare the dataset again"
        )

    for name, expected in info["files"].items():
        if not (folder / name).is_file():
            raise UsageError(f"{folder / name} is missing; prepare the dataset again")
        if (sha256 := sha256_of(folder / name)) != expected:
            raise UsageError(
                f"{folder / name} is not the file that dataset.json describes (sha256 "
                f"{sha256[:12]}…, expected {expected[:12]}…); prepare the dataset again"
            )
    return info


def read_items(folder: str | Path) -> tuple[list[str | None], list[list[str]] | None]:
    """Return the titles and the semantic IDs (None if there are none), indexed by item id.

    Raises:
        UsageError: a column is missing, the ids are not dense, or only some items have a
            semantic ID.
    """
    path = Path(folder) / "items.parquet"
    table = read_parquet(path)
    if missing := {"item_id", "title", "semantic_id"} - set(table.column_names):
        raise UsageError(f"{path}: no column {', '.join(sorted(missing))}")

    ids = table["item_id"].to_numpy()
    wrong = np.flatnonzero(ids != np.arange(len(ids)))
    if len(wrong):
        found = ids[wrong[0]]
        twice = found in ids[: wrong[0]]
        reason = "a duplicate" if twice else "ids must be dense from 0 and ascending"
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


def _read_split(folder: Path, name: str, info: Mapping[str, Any], num_items: int) -> Split:
    path = folder / f"{name}.parquet"
    _check_schema(path)
    table = _memory_mapped(path, info["files"][path.name])
    _check_nulls(path, table)
    split = _split_of(name, table)
    _check_item_ids(path, split, num_items)
    return split


def _split_of(name: str, table: pa.Table) -> Split:
    """Return the rows of a table in ROW_SCHEMA."""
    lists = table["history"].chunks
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in lists]
    offsets = np.zeros(len(table) + 1, dtype=np.int64)
    np.cumsum(np.concatenate(lengths), out=offsets[1:])

    return Split(
        name=name,
        user_ids=_numpy(table["user_id"].chunks),
        history_items=_numpy([chunk.flatten() for chunk in lists]),
        history_offsets=offsets,
        targets=_numpy(table["target"].chunks),
        timestamps=None if table["timestamp"].null_count else _numpy(table["timestamp"].chunks),
    )


def _check_schema(path: Path) -> None:
    schema = pq.read_schema(path)
    for field in ROW_SCHEMA:
        if field.name not in schema.names:
            raise UsageError(f"{path}: column {field.name} must be {field.type}, found nothing")
        found = schema.field(field.name).type
        if found != field.type:
            raise UsageError(f"{path}: column {field.name} must be {field.type}, found {found}")
    if pq.read_metadata(path).num_rows == 0:
        raise UsageError(f"{path}: the split is empty")


def _check_nulls(path: Path, table: pa.Table) -> None:
    histories = table["history"]
    nulls = {
        "user_id": table["user_id"].null_count,
        "target": table["target"].null_count,
        "history": histories.null_count
        + sum(chunk.flatten().null_count for chunk in histories.chunks),
        # A source without timestamps has a column of nulls, which is not an error.
        "timestamp": table["timestamp"].null_count % len(table),
    }
    for column, count in nulls.items():
        if count:
            raise UsageError(f"{path}: column {column} holds {count} nulls")


def _check_item_ids(path: Path, split: Split, num_items: int) -> None:
    for what, ids in [("target", split.targets), ("history", split.history_items)]:
        if not len(ids) or (ids.min() >= 0 and ids.max() < num_items):
            continue
        place = int(np.flatnonzero((ids < 0) | (ids >= num_items))[0])
        row = place
        if what == "history":
            row = int(np.searchsorted(split.history_offsets, place, side="right")) - 1
        raise UsageError(
            f"{path}: row {row} of split {split.name}: {what} item {ids[place]} is not in "
            f"[0, {num_items})"
        )


def _memory_mapped(path: Path, digest: str) -> pa.Table:
    """Return a Parquet file as a memory-mapped Arrow table.

    The first process that needs the file converts it to Arrow in `cache_folder()`, under a lock;
    ranks that start together wait for it. The name of the cache folder is the sha256 of the
    file: a file that was rewritten at the same path is never read from an old cache. A damaged
    cache is made anew.

    `datasets.Dataset.from_parquet` would do much the same, but it takes the path as a pattern (with
    `[`, `*`, `?` or `::` in it, other files are read), and importing it takes a second.

    Raises:
        UsageError: the cache cannot be written.
    """
    folder = cache_folder() / "igd_ds" / digest
    arrow = folder / "rows.arrow"
    if not _is_intact(arrow):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_intact(arrow):
                    _convert(path, arrow)
        except OSError as error:
            raise UsageError(
                f"cannot write the cache {folder} ({error.strerror or error}): set "
                "HF_DATASETS_CACHE to a folder that you may write to and that has room"
            ) from error
    return pa.ipc.open_stream(pa.memory_map(str(arrow))).read_all()


def cache_folder() -> Path:
    """Return the folder in which Hugging Face's `datasets` keeps its caches: $HF_DATASETS_CACHE."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")


def _convert(path: Path, arrow: Path) -> None:
    """Write a Parquet file as one Arrow batch, and the sha256 of that file beside it."""
    table = read_parquet(path)
    temporary = temporary_name(arrow)
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table.combine_chunks(), max_chunksize=max(len(table), 1))
    digest = sha256_of(temporary)
    os.replace(temporary, arrow)
    write_text(_checksum(arrow), digest)


def _checksum(arrow: Path) -> Path:
    """Return the file that holds the sha256 of a cached Arrow file."""
    return arrow.with_name(f"{arrow.name}.sha256")


def _is_intact(arrow: Path) -> bool:
    """Whether a cached Arrow file is there and unchanged since it was written."""
    checksum = _checksum(arrow)
    return (
        arrow.is_file()
        and checksum.is_file()
        and checksum.read_bytes() == sha256_of(arrow).encode()
    )


def _numpy(chunks: Sequence[pa.Array]) -> np.ndarray:
    """Return a null-free integer column: a view if it is one chunk, otherwise a copy."""
    arrays = [chunk.to_numpy() for chunk in chunks]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


# ---- writing


def item_table(
    titles: Sequence[str | None],
    semantic_ids: Sequence[Sequence[str] | None] | None,
    names: pa.Array,
    metadata: pa.Table | None = None,
) -> pa.Table:
    """Return the table of items.parquet.

    Args:
        titles: N titles, None where an item has no title.
        semantic_ids: N lists of codes, or None.
        names: (N,), the source's ids.
        metadata: N rows of some columns of METADATA_SCHEMA.

    Raises:
        UsageError: a title is not valid Unicode.
    """
    try:
        title_column = pa.array(titles, pa.string())
    except UnicodeEncodeError as error:  # the source cut a title inside of a surrogate pair
        raise UsageError(
            f"title {error.object!r} is not valid Unicode; use --titles placeholder, which "
            "repairs it"
        ) from error

    codes = semantic_ids or [None] * len(titles)
    columns = {
        "item_id": pa.array(np.arange(len(titles), dtype=np.int32)),
        "title": title_column,
        "semantic_id": pa.array(codes, pa.list_(pa.string())),
        "source_id": names.cast(pa.string()),
    }
    if metadata:
        columns |= {name: metadata[name] for name in metadata.column_names}
    return pa.table(columns)


def user_table(splits: Mapping[str, pa.Table], names: pa.Array | None) -> pa.Table:
    """Return the table of users.parquet: the users of all rows and their names.

    The name of user u is `names[u]`; without `names` it is the number itself.
    """
    users = np.unique(np.concatenate([table["user_id"].to_numpy() for table in splits.values()]))
    column = pa.array(users)
    source_ids = column.cast(pa.string()) if names is None else names.take(column)
    return pa.table({"user_id": column, "source_id": source_ids})


def write_dataset(
    folder: str | Path,
    items: pa.Table,
    users: pa.Table,
    splits: Mapping[str, pa.Table],
    info: Mapping[str, Any],
) -> None:
    """Write a dataset folder with its data card; the folder appears only when it is complete.

    Args:
        folder: the folder to make.
        items: the table of `item_table`.
        users: the table of `user_table`.
        splits: tables that can be cast to ROW_SCHEMA, by the names of SPLITS.
        info: dataset.json without `files` and `version`.

    Raises:
        UsageError: the folder exists, or a split is empty.
    """
    folder = Path(folder)
    if not is_free(folder):
        raise UsageError(f"{folder} exists already; delete it or choose another output")
    empty = [name for name in SPLITS if splits[name].num_rows == 0]
    if empty:
        rows = ", ".join(f"{name} {splits[name].num_rows}" for name in SPLITS)
        raise UsageError(
            f"empty split: {', '.join(empty)} (rows: {rows}); the source holds too few "
            "interactions for this protocol"
        )

    splits = {name: splits[name].cast(ROW_SCHEMA) for name in SPLITS}
    tables = [items, users, *splits.values()]
    with new_folder(folder) as unfinished:
        for name, table in zip(FILES, tables, strict=True):
            # One row group becomes one Arrow batch, of which `_read_split` can return views.
            path, rows_per_group = unfinished / name, table.num_rows
            pq.write_table(table, path, compression="zstd", row_group_size=rows_per_group)

        hashes = {name: sha256_of(unfinished / name) for name in FILES}
        repeats = _repeats(splits, info["protocol"])
        complete = {**info, "repeats": repeats, "files": hashes, "version": VERSION}
        text = json.dumps(complete, indent=1, ensure_ascii=False) + "\n"
        write_text(unfinished / "dataset.json", text)
        write_card(unfinished, complete, items, splits)


def _repeats(tables: Mapping[str, pa.Table], protocol: str) -> dict[str, Any]:
    """Return what dataset.json says of seen items: how often they recur, what `auto` means here."""
    splits = {name: _split_of(name, table) for name, table in tables.items()}
    rate = repeat_rate(splits, protocol)
    return {"training_targets": rate, "exclude_seen": "yes" if rate <= MOST_REPEATS else "no"}
