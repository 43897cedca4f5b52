"""Source `d3-csv`: rows that are split already, as D3 (DecodingMatters) and MiniOneRec write them.

    train/NAME.csv, valid/NAME.csv, test/NAME.csv   or train.csv, valid.csv, test.csv:
                                                    one row per target, with its history
    info/NAME.txt                                   or info.txt: one line per item
    index.json                                      or NAME.index.json, optional:
                                                    {"0": ["<a_236>", "<b_231>", "<c_226>"], …}

    D3          rows: user_id,item_asins,item_asin,history_item_id,item_id,…,timestamp
                info: title TAB item_id
    MiniOneRec  rows: user_id,…,history_item_id,item_id,history_item_sid,item_sid (no times)
                info: SID TAB title TAB item_id

Pages: https://github.com/SAI990323/DecodingMatters (its process.py makes the files from Amazon 2018
reviews) and https://github.com/AkaliKong/MiniOneRec (folder `data/Amazon`, some 30 MB per
category). They derive from the Amazon review data, for research. The files are plain or gzip. If a
folder holds several categories, name the files of one.

Only user_id, history_item_id, item_id and D3's timestamp are read from the rows. Titles come from
the info file. Semantic IDs come from index.json, or else from the first column of the info file,
split at "><". All items of the info file belong to the catalogue, and their ids there are the
source ids. The rows stay as they are: use `--protocol given`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from igd_ds.data.dataset import ROW_SCHEMA, SPLITS, SourceData
from igd_ds.data.raw import EARLIEST_MILLISECOND, RawReader
from igd_ds.data.raw_files import FileKind, open_raw, sniff
from igd_ds.data.sources.lcrec_json import ITEM_COLUMNS, item_number, read_index
from igd_ds.errors import UsageError

FILES = {name: FileKind(names=(f"{name}.csv", f"{name}/*.csv")) for name in SPLITS} | {
    "info": FileKind(names=("info.txt", "info/*.txt")),
    "index": FileKind(names=("index.json", "*.index.json"), optional=True),
}
ITEMS = "SELECT item, title, semantic_id, position FROM d3_item"
INTERACTIONS = """
    SELECT user_id AS "user", item_id::VARCHAR AS item, "timestamp" AS "time", rowid AS position
    FROM d3_row"""
ROWS = """
    SELECT user_id, history_item_id::BIGINT[] AS history, item_id::BIGINT AS item_id,
        {times} AS "timestamp"
    FROM {table}"""
# SQL patterns; '' is one quote there.
INTEGER = r"\d{1,18}"
LIST = r"\[ *''?\d{1,18}''?( *, *''?\d{1,18}''?)* *\]"
SEMANTIC_ID = re.compile(r"(<[^<>]+>)+")


def read(raw: RawReader, files: Mapping[str, list[Path]]) -> SourceData:
    """Read the files.

    Raises:
        UsageError: a file is not as described above; the message names file and row or line.
    """
    (info,), index = files["info"], files.get("index")
    paths = {name: files[name][0] for name in SPLITS}

    # The items.
    titles, codes = read_info(info)
    if index:
        codes = read_index(index[0])
        if without := sorted(titles.keys() - codes.keys()):
            raise UsageError(
                f"{index[0]}: {len(without)} items of {info}, such as {without[0]}, have no "
                "semantic id"
            )
    items = [
        {
            "item": str(item),
            "title": title or None,
            "semantic_id": codes.get(item),
            "position": place,
        }
        for place, (item, title) in enumerate(titles.items())
    ]
    raw.add_table("d3_item", pa.Table.from_pylist(items, ITEM_COLUMNS))

    # The rows.
    ids = np.array(list(titles), dtype=np.int64)
    tables = {name: read_rows(raw, name, paths[name], ids, info) for name in SPLITS}
    timed = {name: not table["timestamp"].null_count for name, table in tables.items()}
    if len(set(timed.values())) > 1:
        without_times = ", ".join(str(paths[name]) for name in SPLITS if not timed[name])
        raise UsageError(
            f"{without_times}: no column timestamp, which the other files have; take all three "
            "from one place"
        )
    targets = pa.concat_tables(table.drop_columns("history") for table in tables.values())
    raw.add_table("d3_row", targets)

    data = raw.source_data(INTERACTIONS, ITEMS, whole_catalogue=True, timed=timed["train"])
    return replace(data, splits={name: renumbered(table, data) for name, table in tables.items()})


def read_info(path: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Return item → title and item → semantic ID of an info file.

    The first line tells the form. D3's form has no semantic IDs.

    Raises:
        UsageError: a line is not of this form, an item occurs twice, or there are no items.
    """
    titles: dict[int, str] = {}
    codes: dict[int, list[str]] = {}
    first_line: dict[int, int] = {}
    with_codes: bool | None = None

    for number, line in numbered_lines(path):
        place = f"{path}:{number}"
        head, tab, key = line.rpartition("\t")
        if not tab:
            raise UsageError(
                f"{place}: need title TAB item_id or SID TAB title TAB item_id, found {line[:60]!r}"
            )
        item = item_number(place, key)
        if item in titles:
            raise UsageError(
                f"{place}: item {item} is there twice, first on line {first_line[item]}"
            )
        first_line[item] = number

        sid, tab, title = head.partition("\t")
        is_semantic_id = SEMANTIC_ID.fullmatch(sid) is not None
        if with_codes is None:
            with_codes = bool(tab) and is_semantic_id
        if not with_codes:
            titles[item] = head
            continue
        if not is_semantic_id:
            raise UsageError(
                f"{place}: need a semantic id such as <a_1><b_2> first, as on the lines before, "
                f"found {sid[:60]!r}"
            )
        titles[item] = title
        codes[item] = [f"<{code}>" for code in sid[1:-1].split("><")]

    if not titles:
        raise UsageError(f"{path}: no items")
    return titles, codes


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of the lines that are not blank.

    Raises:
        UsageError: a line is not UTF-8.
    """
    with open_raw(path) as file:
        lines = file.read().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}:{number}: not UTF-8: {error}") from error
        if text:
            yield number, text


def read_rows(raw: RawReader, name: str, path: Path, ids: np.ndarray, info: Path) -> pa.Table:
    """Return the rows of one file.

    Args:
        raw: the reader.
        name: of the split.
        path: of the rows.
        ids: int64 (N,), the items of the info file.
        info: the info file, for error messages.

    Returns:
        user_id string, history list<int64>, item_id int64, timestamp int64 | null.

    Raises:
        UsageError: there are no rows, or a row has a broken cell or an unknown item; the message
            names the first such row.
    """
    has_times = "timestamp" in sniff(path)[1]
    columns = ["user_id", "history_item_id", "item_id"] + ["timestamp"] * has_times
    table = f"d3_{name}"
    raw.read_csv(table, [path], dict.fromkeys(columns, "VARCHAR"), delimiter=",", quote='"')
    _check_cells(raw, table, path, columns)

    times = '"timestamp"::BIGINT' if has_times else "NULL::BIGINT"
    found = raw.connection.sql(ROWS.format(times=times, table=table)).to_arrow_table()
    if not len(found):
        raise UsageError(f"{path}: no rows")

    targets = found["item_id"].to_numpy()
    if len(unknown := np.flatnonzero(~np.isin(targets, ids))):
        row, item = unknown[0], targets[unknown[0]]
        raise UsageError(f"{path}: row {row + 1}: item {item} is not in {info}")
    histories = found["history"].combine_chunks()
    history_items = histories.flatten().to_numpy()
    if len(unknown := np.flatnonzero(~np.isin(history_items, ids))):
        row = np.searchsorted(histories.offsets, unknown[0], side="right") - 1
        item = history_items[unknown[0]]
        raise UsageError(f"{path}: row {row + 1}: item {item} is not in {info}")
    return found


def _check_cells(raw: RawReader, table: str, path: Path, columns: list[str]) -> None:
    """Raise UsageError for the first row with a user, integer or list that is none."""
    wrong = ["coalesce(user_id, '') = ''"]
    for column in columns[2:]:
        wrong.append(f"NOT coalesce(regexp_full_match({column}, '{INTEGER}'), false)")
    wrong.append(f"NOT coalesce(regexp_full_match(history_item_id, '{LIST}'), false)")
    broken = raw.connection.sql(
        f"SELECT rowid + 1, {', '.join(columns)} FROM {table} WHERE {' OR '.join(wrong)} "
        "ORDER BY rowid LIMIT 1"
    ).fetchall()
    if broken:
        row, *cells = broken[0]
        values = ", ".join(
            f"{column} {str(cell)[:60]!r}" for column, cell in zip(columns, cells, strict=True)
        )
        raise UsageError(
            f"{path}: row {row}: need a user, integers and a list such as [3, 14], found {values}"
        )


def renumbered(table: pa.Table, data: SourceData) -> pa.Table:
    """Return the rows of a split as a table of ROW_SCHEMA.

    Users and items get the numbers that they have in `data`, and times are in seconds.
    """
    names = pc.cast(data.item_names, pa.int64()).to_numpy()
    order = np.argsort(names)

    def numbers(ids: np.ndarray) -> np.ndarray:
        return order[np.searchsorted(names, ids, sorter=order)].astype(np.int32)

    history = table["history"].combine_chunks()
    history_numbers = pa.array(numbers(history.values.to_numpy()))
    times = table["timestamp"]
    if not times.null_count and pc.max(times).as_py() >= EARLIEST_MILLISECOND:
        times = pc.divide(times, 1000)
    columns = [
        pc.index_in(table["user_id"], data.user_names),
        pa.ListArray.from_arrays(history.offsets, history_numbers),
        pa.array(numbers(table["item_id"].to_numpy())),
        times,
    ]
    return pa.table(columns, names=ROW_SCHEMA.names).cast(ROW_SCHEMA)
