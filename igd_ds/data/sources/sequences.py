"""Source `sequences`: a folder with `items.jsonl` and `sequences.jsonl`, one JSON object a line.

    items.jsonl       {"item_id": int, "title": str | null, "semantic_id": [str, …]}    ids dense from 0, in any order;
                                                                                        semantic_id on all lines or on none
    sequences.jsonl   {"user_id": int, "items": [int, …]}                               oldest first, one line per user

There are no timestamps. Other keys are ignored. Ids are kept as they are.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from igd_ds.data.dataset import Interactions, SourceData
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import FileKind, open_raw
from igd_ds.errors import UsageError

FILES = {
    "items": FileKind(names=("items.jsonl",)),
    "sequences": FileKind(names=("sequences.jsonl",)),
}


def read(raw: RawReader, files: dict[str, list[Path]]) -> SourceData:
    """Read the two files. Raises ValueError naming file and line when something is not as described above."""
    (items,), (sequences,) = files["items"], files["sequences"]
    titles, semantic_ids = _read_items(items)
    return SourceData(titles, semantic_ids, _read_users(sequences, len(titles)))


def _lines(path: Path, id_key: str) -> Iterator[tuple[str, int, dict]]:
    """Yield (file:line, id, object) per line; ids are integers and unique."""
    if not path.is_file():
        raise UsageError(f"{path} is missing")
    seen: dict[int, int] = {}
    with open_raw(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{place}: not valid JSON: {error}") from error
            key = entry.get(id_key) if isinstance(entry, dict) else None
            if type(key) is not int or not -(2**63) <= key < 2**63:
                raise UsageError(
                    f"{place}: need an object with an integer {id_key}, found {line[:80]!r}"
                )
            if key in seen:
                raise UsageError(f"{place}: duplicate {id_key} {key}, first on line {seen[key]}")
            seen[key] = number
            yield place, key, entry


def _read_items(path: Path) -> tuple[list[str | None], list[list[str]] | None]:
    found: dict[int, tuple] = {}
    for place, item, entry in _lines(path, "item_id"):
        title, codes = entry.get("title"), entry.get("semantic_id")
        if title is not None and not isinstance(title, str):
            raise UsageError(f"{place}: title must be a string or null, found {title!r}")
        if codes is not None and not (
            isinstance(codes, list) and codes and all(isinstance(c, str) and c for c in codes)
        ):
            raise UsageError(f"{place}: semantic_id must be a list of strings, found {codes!r}")
        if found and (codes is None) != (next(iter(found.values()))[1] is None):
            raise UsageError(
                f"{place}: item {item} {'lacks' if codes is None else 'has'} a semantic_id, unlike the lines before"
            )
        found[item] = (title, codes)
    if not found:
        raise UsageError(f"{path}: no items")
    missing = next((item for item in range(len(found)) if item not in found), None)
    if missing is not None:
        raise UsageError(
            f"{path}: {len(found)} items, but no item_id {missing}: ids must be dense from 0"
        )
    titles, semantic_ids = map(list, zip(*(found[item] for item in range(len(found))), strict=True))
    return titles, None if semantic_ids[0] is None else semantic_ids


def _read_users(path: Path, num_items: int) -> Interactions:
    users, lengths, sequences = [], [], [np.empty(0, dtype=np.int32)]
    for place, user, entry in _lines(path, "user_id"):
        listed = entry.get("items")
        try:
            items = (
                np.asarray(listed)
                if isinstance(listed, list) and listed
                else np.empty(0, dtype=np.int64)
            )
        except ValueError:  # a ragged list
            items = np.asarray("")
        if (
            not isinstance(listed, list)
            or bool in map(type, listed)
            or items.ndim != 1
            or items.dtype.kind != "i"
        ):
            raise UsageError(f"{place}: items must be a list of item ids, found {str(listed)[:80]}")
        if len(items) and (items.min() < 0 or items.max() >= num_items):
            wrong = items[(items < 0) | (items >= num_items)][0]
            raise UsageError(
                f"{place}: item {wrong} of user {user} is not in items.jsonl (ids 0 to {num_items - 1})"
            )
        users.append(user)
        lengths.append(len(items))
        sequences.append(items.astype(np.int32))
    return Interactions(
        np.repeat(np.asarray(users, dtype=np.int64), lengths), np.concatenate(sequences), None
    )
