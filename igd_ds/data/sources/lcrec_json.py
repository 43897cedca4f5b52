"""Source `lcrec-json`: the JSON files of LC-Rec, LETTER and TIGER's reimplementations.

    NAME.inter.json   {"0": [0, 1, 2, …], …}                 user → items, oldest first
    NAME.index.json   {"0": ["<a_128>", "<b_241>", …], …}    item → semantic ID
    NAME.item.json    {"0": {"title": "…", "description": "…", "brand": "…", "categories": "…"}, …}

Pages: https://github.com/RUCAIBox/LC-Rec (data behind its links) and
https://github.com/HonghuiBao2000/LETTER (folder `data`); some 5 MB per dataset, and some 10 MB for
item.json. They derive from the Amazon and Yelp data, for research. Each file is one JSON object,
plain or gzip.

One of index.json and item.json is enough: without index.json the items have no semantic IDs, and
without item.json they have no titles. Item ids are integers. All items of index.json belong to the
catalogue (of item.json, if there is no index.json); an item that only item.json has is an error.
There are no timestamps, so protocols that split by time refuse this data. These columns are kept
for embeddings: description, brand and categories (a list, or one text with commas).
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from igd_ds.data.dataset import SourceData
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import FileKind, no_value, not_utf8, open_raw
from igd_ds.errors import UsageError

FILES = {
    "inter": FileKind(names=("*.inter.json",)),
    "index": FileKind(names=("*.index.json",), optional=True),
    "item": FileKind(names=("*.item.json",), optional=True),
}
ITEM_COLUMNS = pa.schema(
    [
        ("item", pa.string()),
        ("title", pa.string()),
        ("semantic_id", pa.list_(pa.string())),
        ("description", pa.string()),
        ("brand", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("position", pa.int64()),
    ]
)
INTERACTIONS = """
    SELECT "user", item::VARCHAR AS item, NULL::BIGINT AS "time", position FROM lcrec_inter"""
ITEMS = f"SELECT {', '.join(ITEM_COLUMNS.names)} FROM lcrec_item"


def read(raw: RawReader, files: Mapping[str, list[Path]]) -> SourceData:
    """Read the files.

    Raises:
        UsageError: a file is not as described above; the message names file and user or item.
    """
    (inter,) = files["inter"]
    index, item = (next(iter(files.get(role, [])), None) for role in ("index", "item"))
    catalogue = index or item
    if catalogue is None:
        raise UsageError(
            f"{inter} alone does not say which items there are; give NAME.index.json or "
            "NAME.item.json, too"
        )

    # The items.
    codes = read_index(index) if index else {}
    texts = read_texts(item) if item else {}
    if alone := index and sorted(texts.keys() - codes.keys()):
        raise UsageError(
            f"{item}: {len(alone)} items, such as {alone[0]}, are not in {index}; are both of one "
            "dataset?"
        )
    ids = list(codes or texts)
    rows = [
        {"item": str(number), "semantic_id": codes.get(number), "position": place}
        | texts.get(number, {})
        for place, number in enumerate(ids)
    ]
    raw.add_table("lcrec_item", pa.Table.from_pylist(rows, ITEM_COLUMNS))

    # The interactions.
    interactions = read_users(inter, np.array(ids, dtype=np.int64), catalogue)
    raw.add_table("lcrec_inter", interactions)
    raw.funnel.append({"step": f"read {inter.name}", "rows": len(interactions)})
    return raw.source_data(INTERACTIONS, ITEMS, whole_catalogue=True, timed=False)


def load_object(path: Path) -> dict[str, Any]:
    """Return the JSON object, not empty, that a plain or gzip file holds.

    Raises:
        UsageError: the file holds something else (the message names line and column), or an object
            has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise UsageError(f"key {twice!r} occurs twice in one object")
        return found

    with open_raw(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
        found = json.loads(text, object_pairs_hook=unique, parse_constant=no_value)
        if "\\ud" in text.lower():
            # Arrow cannot hold half a surrogate pair; it becomes the replacement character.
            text = json.dumps(found, ensure_ascii=False)
            found = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start)
        raise UsageError(f"{path}:{number + 1}: {not_utf8(data.splitlines()[number])}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not one JSON object: {error}") from error
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{path}: need a JSON object that is not empty, found {str(found)[:60]}")
    return found


def item_number(place: Path | str, key: str) -> int:
    """Return the number of an item from its key.

    Raises:
        UsageError: the key is no plain integer from 0.
    """
    if not (key.isascii() and key.isdecimal() and len(key) < 19 and str(int(key)) == key):
        raise UsageError(f"{place}: item {key!r}: item ids must be integers from 0")
    return int(key)


def read_index(path: Path) -> dict[int, list[str]]:
    """Return item → semantic ID of an index.json.

    Raises:
        UsageError: the codes of an item are no list of strings; the message names the item.
    """
    found = {}
    for key, codes in load_object(path).items():
        if not (
            isinstance(codes, list)
            and codes
            and all(isinstance(code, str) and code for code in codes)
        ):
            raise UsageError(f"{path}: item {key!r}: need a list of codes, found {str(codes)[:60]}")
        found[item_number(path, key)] = codes
    return found


def read_texts(path: Path) -> dict[int, dict[str, Any]]:
    """Return item → title, description, brand and categories of an item.json.

    Raises:
        UsageError: an item is no such object; the message names the item.
    """
    found = {}
    for key, entry in load_object(path).items():
        if not isinstance(entry, dict):
            raise UsageError(
                f"{path}: item {key!r}: need an object with a title, found {str(entry)[:60]}"
            )
        values = {name: entry.get(name) for name in ("title", "description", "brand", "categories")}
        for name, value in values.items():
            if not _is_text(value, may_be_list=name in ("description", "categories")):
                raise UsageError(
                    f"{path}: item {key!r}: {name} must be a text, found {str(value)[:60]}"
                )

        if isinstance(values["description"], list):
            values["description"] = " ".join(values["description"])
        categories = values["categories"] or []
        parts = categories.split(",") if isinstance(categories, str) else categories
        values["categories"] = [part.strip() for part in parts if part.strip()] or None
        found[item_number(path, key)] = values
    return found


def _is_text(value: object, may_be_list: bool) -> bool:
    if isinstance(value, list):
        return may_be_list and all(isinstance(part, str) for part in value)
    return value is None or isinstance(value, str)


def read_users(path: Path, ids: np.ndarray, catalogue: Path) -> pa.Table:
    """Return the interactions of an inter.json: user string, item int64, position int64.

    Args:
        path: the inter.json.
        ids: int64 (N,), the items of the catalogue.
        catalogue: the file that lists them, for error messages.

    Raises:
        UsageError: a user has no list of item ids, or an item that the catalogue lacks.
    """
    users, lengths = [], []
    sequences = [np.empty(0, dtype=np.int64)]
    for user, listed in load_object(path).items():
        if not (
            isinstance(listed, list)
            and all(type(item) is int and 0 <= item < 2**63 for item in listed)
        ):
            raise UsageError(
                f"{path}: user {user!r}: need a list of item ids, found {str(listed)[:60]}"
            )
        users.append(user)
        lengths.append(len(listed))
        sequences.append(np.array(listed, dtype=np.int64))

    items = np.concatenate(sequences)
    if len(unknown := np.flatnonzero(~np.isin(items, ids))):
        user = users[int(np.searchsorted(np.cumsum(lengths), unknown[0], side="right"))]
        raise UsageError(f"{path}: user {user!r}: item {items[unknown[0]]} is not in {catalogue}")
    owner = np.repeat(np.arange(len(users)), lengths)
    names = pa.array(users, pa.string()).take(pa.array(owner))
    return pa.table({"user": names, "item": items, "position": np.arange(len(items))})
