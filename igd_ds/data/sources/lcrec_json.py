"""Source `lcrec-json`: the JSON files of LC-Rec, LETTER and TIGER's reimplementations.

    NAME.inter.json   {"0": [0, 1, 2, …], …}                           user → items, oldest first
    NAME.index.json   {"0": ["<a_128>", "<b_241>", …], …}              item → semantic id
    NAME.item.json    {"0": {"title": "…", "description": "…", "brand": "…", "categories": "…"}, …}

Pages: https://github.com/RUCAIBox/LC-Rec (data behind its links) and https://github.com/HonghuiBao2000/LETTER (folder `data`);
some 5 MB a dataset, item.json some 10 MB. They derive from the Amazon and Yelp data, for research. Plain or gzip, each one JSON
object.

One of index.json and item.json is enough: without the index items have no semantic ids, without item.json no titles. Item ids are
integers. All items of the index (without it, of item.json) belong to the catalogue; items of item.json alone are an error. There
are no timestamps, so protocols that split by time refuse this data. Kept for embeddings: description, brand and categories (a
list, or one text with commas).
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from igd_ds.data.dataset import SourceData
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import FileKind, open_raw
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
INTERACTIONS = (
    'SELECT "user", item::VARCHAR AS item, NULL::BIGINT AS "time", position FROM lcrec_inter'
)


def read(raw: RawReader, files: dict[str, list[Path]]) -> SourceData:
    """Read the files. Raises ValueError naming file and user or item for what is not as described above."""
    inter, index, item = (next(iter(files.get(kind, [])), None) for kind in FILES)
    if not (index or item):
        raise UsageError(
            f"{inter} alone does not say which items there are; give NAME.index.json or NAME.item.json, too"
        )
    codes = read_index(index) if index else {}
    texts = read_texts(item) if item else {}
    if alone := index and sorted(texts.keys() - codes.keys()):
        raise UsageError(
            f"{item}: {len(alone)} items, such as {alone[0]}, are not in {index}; are both of one dataset?"
        )
    ids = list(codes or texts)
    rows = [
        {"item": str(number), "semantic_id": codes.get(number), "position": place}
        | texts.get(number, {})
        for place, number in enumerate(ids)
    ]
    add_table(raw, "lcrec_item", pa.Table.from_pylist(rows, ITEM_COLUMNS))
    interactions = read_users(inter, np.array(ids, dtype=np.int64), index or item)
    add_table(raw, "lcrec_inter", interactions)
    raw.funnel.append({"step": f"read {inter.name}", "rows": len(interactions)})
    return raw.source_data(
        INTERACTIONS, f"SELECT {', '.join(ITEM_COLUMNS.names)} FROM lcrec_item", True, timed=False
    )


def add_table(raw: RawReader, name: str, table: pa.Table) -> None:
    """Copy an Arrow table into the reader's database."""
    raw.connection.register(f"{name}_arrow", table)
    raw.connection.execute(f"CREATE TABLE {name} AS SELECT * FROM {name}_arrow")
    raw.connection.unregister(f"{name}_arrow")


def load_object(path: Path) -> dict:
    """Return the JSON object that a plain or gzip file holds, not empty; ValueError naming line and column, or a repeated key."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise UsageError(
                f"key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} occurs twice in one object"
            )
        return found

    with open_raw(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
        found = json.loads(text, object_pairs_hook=unique)
        if (
            "\\ud" in text.lower()
        ):  # half an emoji, which Arrow cannot hold, becomes the replacement character
            text = json.dumps(found, ensure_ascii=False)
            found = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not one JSON object: {error}") from error
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{path}: need a JSON object that is not empty, found {str(found)[:60]}")
    return found


def item_number(place: Path | str, key: str) -> int:
    """Return an item's number from its key; ValueError if it is not a plain integer from 0."""
    if not (key.isascii() and key.isdecimal() and len(key) < 19 and str(int(key)) == key):
        raise UsageError(f"{place}: item {key!r}: item ids must be integers from 0")
    return int(key)


def read_index(path: Path) -> dict[int, list[str]]:
    """Return item → semantic id of an index file; ValueError naming the item whose codes are not a list of strings."""
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


def read_texts(path: Path) -> dict[int, dict]:
    """Return item → title, description, brand, categories of an item.json; ValueError naming the item that is not so."""
    found = {}
    for key, entry in load_object(path).items():
        if not isinstance(entry, dict):
            raise UsageError(
                f"{path}: item {key!r}: need an object with a title, found {str(entry)[:60]}"
            )
        values = {name: entry.get(name) for name in ("title", "description", "brand", "categories")}
        for name, value in values.items():
            is_list = name in ("description", "categories") and isinstance(value, list)
            if not all(
                isinstance(part, str)
                for part in (value if is_list else [value] if value is not None else [])
            ):
                raise UsageError(
                    f"{path}: item {key!r}: {name} must be a text, found {str(value)[:60]}"
                )
        if isinstance(values["description"], list):
            values["description"] = " ".join(values["description"])
        parts = (
            values["categories"].split(",")
            if isinstance(values["categories"], str)
            else values["categories"] or []
        )
        values["categories"] = [part.strip() for part in parts if part.strip()] or None
        found[item_number(path, key)] = values
    return found


def read_users(path: Path, ids: np.ndarray, catalogue: Path) -> pa.Table:
    """Return the interactions of an inter.json: user string, item int64, position int64; `ids` int64 (N,) are the catalogue's."""
    users, lengths, sequences = [], [], [np.empty(0, dtype=np.int64)]
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
    names = pa.array(users, pa.string()).take(pa.array(np.repeat(np.arange(len(users)), lengths)))
    return pa.table({"user": names, "item": items, "position": np.arange(len(items))})
