"""Source `d3-csv`: rows as the code of D3 (DecodingMatters), MiniOneRec and their successors writes them, already split.

    train/NAME.csv, valid/NAME.csv, test/NAME.csv   or train.csv, valid.csv, test.csv: one row a target, with its history
    info/NAME.txt                                   or info.txt: one line an item
    index.json                                      or NAME.index.json, optional: {"0": ["<a_236>", "<b_231>", "<c_226>"], …}

    D3          user_id,item_asins,item_asin,history_item_id,item_id,…,timestamp         info: title TAB item_id
    MiniOneRec  user_id,…,history_item_id,item_id,history_item_sid,item_sid (no times)   info: SID TAB title TAB item_id

Pages: https://github.com/SAI990323/DecodingMatters (its process.py makes them of Amazon 2018 reviews) and
https://github.com/AkaliKong/MiniOneRec (folder `data/Amazon`, some 30 MB a category); they derive from the Amazon review data,
for research. Plain or gzip. Where a folder holds several categories, name the files of one.

Only user_id, history_item_id, item_id and D3's timestamp are read of the rows: titles come from the info file, semantic ids from
index.json or else from the info file's first column, split at "><". All items of the info file belong to the catalogue, and its
ids are their source ids. The rows stay as they are: `--protocol given`.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from igd_ds.data.dataset import ROW_SCHEMA, SPLITS, SourceData
from igd_ds.data.raw import EARLIEST_MILLISECOND, RawReader
from igd_ds.data.raw_files import FileKind, open_raw, sniff
from igd_ds.data.sources.lcrec_json import ITEM_COLUMNS, add_table, item_number, read_index
from igd_ds.errors import UsageError

FILES = {name: FileKind(names=(f"{name}.csv", f"{name}/*.csv")) for name in SPLITS} | {
    "info": FileKind(names=("info.txt", "info/*.txt")),
    "index": FileKind(names=("index.json", "*.index.json"), optional=True),
}
ITEMS = "SELECT item, title, semantic_id, position FROM d3_item"
INTEGER, LIST = (
    r"\d{1,18}",
    r"\[ *''?\d{1,18}''?( *, *''?\d{1,18}''?)* *\]",
)  # '' is one quote in SQL


def read(raw: RawReader, files: dict[str, list[Path]]) -> SourceData:
    """Read the files. Raises ValueError naming file and row or line for what is not as described above."""
    (info,), index = files["info"], files.get("index")
    titles, codes = read_info(info)
    if index:
        codes = read_index(index[0])
        if without := sorted(titles.keys() - codes.keys()):
            raise UsageError(
                f"{index[0]}: {len(without)} items of {info}, such as {without[0]}, have no semantic id"
            )
    rows = [
        {
            "item": str(item),
            "title": title or None,
            "semantic_id": codes.get(item),
            "position": place,
        }
        for place, (item, title) in enumerate(titles.items())
    ]
    add_table(raw, "d3_item", pa.Table.from_pylist(rows, ITEM_COLUMNS))
    ids = np.array(list(titles), dtype=np.int64)
    tables = {name: read_rows(raw, name, files[name][0], ids, info) for name in SPLITS}
    timed = {name: not table["timestamp"].null_count for name, table in tables.items()}
    if len(set(timed.values())) > 1:
        without = ", ".join(str(files[name][0]) for name in SPLITS if not timed[name])
        raise UsageError(
            f"{without}: no column timestamp, which the other files have; take all three from one place"
        )
    add_table(
        raw, "d3_row", pa.concat_tables(table.drop_columns("history") for table in tables.values())
    )
    data = raw.source_data(
        'SELECT user_id AS "user", item_id::VARCHAR AS item, "timestamp" AS "time", rowid AS position FROM d3_row',
        ITEMS,
        whole_catalogue=True,
        timed=timed["train"],
    )
    return replace(data, splits={name: renumbered(table, data) for name, table in tables.items()})


def read_info(path: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Return (item → title, item → semantic id, empty for D3's form) of an info file, whose first line tells the form."""
    titles, codes, with_codes = {}, {}, None
    first_line: dict[int, int] = {}
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
        sid, tab, title = head.partition("\t")
        if with_codes is None:
            with_codes = bool(tab) and re.fullmatch(r"(<[^<>]+>)+", sid) is not None
        if with_codes and not re.fullmatch(r"(<[^<>]+>)+", sid):
            raise UsageError(
                f"{place}: need a semantic id such as <a_1><b_2> first, as on the lines before, found {sid[:60]!r}"
            )
        if with_codes:
            codes[item] = [f"<{code}>" for code in sid[1:-1].split("><")]
        titles[item], first_line[item] = title if with_codes else head, number
    if not titles:
        raise UsageError(f"{path}: no items")
    return titles, codes


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of the lines that are not blank; ValueError where one is not UTF-8."""
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
    """Return one file's rows: user_id string, history list<int64>, item_id int64, timestamp int64 | null.

    `ids` int64 (N,) are the items of the file `info`. ValueError names the first row with a broken cell or an unknown item.
    """
    columns = ["user_id", "history_item_id", "item_id"] + ["timestamp"] * (
        "timestamp" in sniff(path)[1]
    )
    table = f"d3_{name}"
    raw.read_csv(
        table, [path], dict.fromkeys(columns, "VARCHAR"), delimiter=",", header=True, quote='"'
    )
    wrong = (
        ["coalesce(user_id, '') = ''"]
        + [
            f"NOT coalesce(regexp_full_match({column}, '{INTEGER}'), false)"
            for column in columns[2:]
        ]
        + [f"NOT coalesce(regexp_full_match(history_item_id, '{LIST}'), false)"]
    )
    broken = raw.connection.sql(
        f"SELECT rowid + 1, {', '.join(columns)} FROM {table} WHERE {' OR '.join(wrong)} ORDER BY rowid LIMIT 1"
    ).fetchall()
    if broken:
        row, *cells = broken[0]
        values = ", ".join(
            f"{column} {str(cell)[:60]!r}" for column, cell in zip(columns, cells, strict=True)
        )
        raise UsageError(
            f"{path}: row {row}: need a user, integers and a list such as [3, 14], found {values}"
        )
    times = '"timestamp"::BIGINT' if "timestamp" in columns else "NULL::BIGINT"
    found = raw.connection.sql(
        f'SELECT user_id, history_item_id::BIGINT[] AS history, item_id::BIGINT AS item_id, {times} AS "timestamp" FROM {table}'
    ).to_arrow_table()
    if not len(found):
        raise UsageError(f"{path}: no rows")
    histories = found["history"].combine_chunks()
    for items, row_of in [
        (found["item_id"].to_numpy(), lambda place: place),
        (
            histories.flatten().to_numpy(),
            lambda place: np.searchsorted(histories.offsets, place, side="right") - 1,
        ),
    ]:
        if len(unknown := np.flatnonzero(~np.isin(items, ids))):
            raise UsageError(
                f"{path}: row {row_of(unknown[0]) + 1}: item {items[unknown[0]]} is not in {info}"
            )
    return found


def renumbered(table: pa.Table, data: SourceData) -> pa.Table:
    """Return a split's rows, a table of ROW_SCHEMA, with the numbers that users and items got in `data` and times in seconds."""
    names = pc.cast(data.item_names, pa.int64()).to_numpy()
    order = np.argsort(names)

    def numbers(ids: np.ndarray) -> np.ndarray:
        return order[np.searchsorted(names, ids, sorter=order)].astype(np.int32)

    history = table["history"].combine_chunks()
    times = table["timestamp"]
    if not times.null_count and pc.max(times).as_py() >= EARLIEST_MILLISECOND:
        times = pc.divide(times, 1000)
    columns = [
        pc.index_in(table["user_id"], data.user_names),
        pa.ListArray.from_arrays(history.offsets, pa.array(numbers(history.values.to_numpy()))),
        pa.array(numbers(table["item_id"].to_numpy())),
        times,
    ]
    return pa.table(columns, names=ROW_SCHEMA.names).cast(ROW_SCHEMA)
