"""Source `sequences`: a folder with `items.jsonl` and `sequences.jsonl`, one JSON object per line.

    items.jsonl       {"item_id": int, "title": str | null, "semantic_id": [str, …]}
                      ids are dense from 0, in any order; all lines have a semantic_id, or none has
    sequences.jsonl   {"user_id": int, "items": [int, …]}
                      items are ordered oldest first, with one line per user

There are no timestamps. Other keys are ignored. The ids are kept as they are.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from igd_ds.data.dataset import Interactions, SourceData
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import (
    FileKind,
    no_value,
    not_utf8,
    open_raw,
    refuse_array,
    shown,
)
from igd_ds.errors import UsageError

MAX_LINE = 1 << 24
"""Bytes of a line at most; longer ones come from a file that is not made of lines."""

FILES = {
    "items": FileKind(names=("items.jsonl",)),
    "sequences": FileKind(names=("sequences.jsonl",)),
}


def read(raw: RawReader | None, files: Mapping[str, list[Path]]) -> SourceData:
    """Read the two files.

    Raises:
        UsageError: a line is not as described above; the message names file and line.
    """
    (items,), (sequences,) = files["items"], files["sequences"]
    titles, semantic_ids = _read_items(items)
    return SourceData(titles, semantic_ids, _read_users(sequences, len(titles)))


def _lines(path: Path, id_key: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (file:line, id, object) per line; the ids are integers and unique."""
    if not path.is_file():
        raise UsageError(f"{path} is missing")

    seen: dict[int, int] = {}
    with open_raw(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            place = f"{path}:{number}"
            if number == 1:
                refuse_array(path, line.strip())
            if len(line) > MAX_LINE:
                raise UsageError(
                    f"{place}: the line is longer than {MAX_LINE >> 20} MiB: write one JSON object "
                    "per line"
                )
            try:
                entry = json.loads(line, parse_constant=no_value)
            except UnicodeDecodeError as error:
                raise UsageError(f"{place}: {not_utf8(line)}") from error
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{place}: not valid JSON: {error}") from error
            key = entry.get(id_key) if isinstance(entry, dict) else None
            if type(key) is not int or not -(2**63) <= key < 2**63:
                raise UsageError(
                    f"{place}: need an object with an integer {id_key}, found {shown(line)}"
                )
            if key in seen:
                raise UsageError(f"{place}: duplicate {id_key} {key}, first on line {seen[key]}")
            seen[key] = number
            yield place, key, entry


def _read_items(path: Path) -> tuple[list[str | None], list[list[str]] | None]:
    """Return titles and semantic IDs (None if there are none), indexed by item id."""
    titles: dict[int, str | None] = {}
    semantic_ids: dict[int, list[str]] = {}
    for place, item, entry in _lines(path, "item_id"):
        title, codes = entry.get("title"), entry.get("semantic_id")
        if title is not None and not isinstance(title, str):
            raise UsageError(f"{place}: title must be a string or null, found {str(title)[:60]}")
        if codes is not None and not (
            isinstance(codes, list) and codes and all(isinstance(c, str) and c for c in codes)
        ):
            raise UsageError(
                f"{place}: semantic_id must be a list of strings, found {str(codes)[:60]}"
            )
        if titles and (codes is None) != (not semantic_ids):
            raise UsageError(
                f"{place}: item {item} {'lacks' if codes is None else 'has'} a semantic_id, unlike "
                "the lines before"
            )
        titles[item] = title
        if codes is not None:
            semantic_ids[item] = codes

    if not titles:
        raise UsageError(f"{path}: no items")
    missing = next((item for item in range(len(titles)) if item not in titles), None)
    if missing is not None:
        raise UsageError(
            f"{path}: {len(titles)} items, but no item_id {missing}: ids must be dense from 0"
        )
    items = range(len(titles))
    codes_in_order = [semantic_ids[item] for item in items] if semantic_ids else None
    return [titles[item] for item in items], codes_in_order


def _read_users(path: Path, num_items: int) -> Interactions:
    users, lengths = [], []
    sequences = [np.empty(0, dtype=np.int32)]
    for place, user, entry in _lines(path, "user_id"):
        items = _item_ids(entry.get("items"))
        if items is None:
            shown = str(entry.get("items"))[:80]
            raise UsageError(f"{place}: items must be a list of item ids, found {shown}")
        if len(items) and (items.min() < 0 or items.max() >= num_items):
            wrong = items[(items < 0) | (items >= num_items)][0]
            raise UsageError(
                f"{place}: item {wrong} of user {user} is not in items.jsonl (ids 0 to "
                f"{num_items - 1})"
            )
        users.append(user)
        lengths.append(len(items))
        sequences.append(items.astype(np.int32))

    user_column = np.repeat(np.asarray(users, dtype=np.int64), lengths)
    return Interactions(user_column, np.concatenate(sequences), None)


def _item_ids(listed: object) -> np.ndarray | None:
    """Return a JSON value as an array of integers, or None if it is no list of integers."""
    if not isinstance(listed, list):
        return None
    if not listed:
        return np.empty(0, dtype=np.int64)
    try:
        items = np.asarray(listed)
    except ValueError:  # a ragged list
        return None
    is_integers = items.ndim == 1 and items.dtype.kind == "i" and bool not in map(type, listed)
    return items if is_integers else None
