"""Source `csv`: interactions of your own, as CSV, TSV, Parquet or JSON lines.

    shop.csv     customer_id,sku,ordered_at,product_name,price
                 one line per interaction; the file may name the items too
    items.csv    sku,title,brand,category
                 optional: a second file with a line per item; all of them belong to the catalogue

A file with users and items is taken for interactions, a file with items alone for items. What
the latter does not say of an item is taken from the interactions. There may be several files of
interactions with the same columns, which are read in the order of --input. They are plain or gzip,
UTF-8; ids are texts and stay as they are.

Columns are found by name. Capital letters, spaces and underscores do not matter:

    user         uid; user, customer, reviewer, visitor, client, member, buyer, account, session,
                 each with id before without
    item         parent_asin, asin, sku; item, product, movie, book, article, song, track, business,
                 game, all with id before all without; iid
    timestamp    timestamp, datetime, ts, unix_review_time, created_at; order_time, order_date and
                 such, and those of purchase, invoice, event, review and rating; date, time. Without
                 one, the order of the lines is taken
    title        title; item_title, item_name, and such of the other things; name
    metadata     brand (manufacturer, store), categories (category, genres, genre), price,
                 description (details)
    semantic_id  semantic_id, sid, codes: "<a_12><b_7>", or numbers such as "12 7", which become
                 <a_12> <b_7>

Where several names match, the first one in this list counts. Which columns are taken is printed.
--columns names others: --columns user=kunde item=artikel
timestamp=bestellt_am. In a file without a header a column is named by its number: --columns user=1
item=2 timestamp=4. Amazon's files of ratings alone have no header and are recognised. A line
without user or item, or with nan, null, none, n/a or such there, is left out and counted; there may
be --max_bad_lines of them.

A time is a number (seconds, milliseconds, micro- or nanoseconds since 1970) or a date such as
2024-01-31 or 2024-01-31T18:30:00+01:00 (UTC where it says nothing else). Other dates need
--time_format, for example --time_format %d.%m.%Y.

Without --protocol, the protocol is leave-one-out.
"""

import csv
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from igd_ds.data.dataset import SourceData
from igd_ds.data.hygiene import MISSING_VALUES
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import (
    BYTE_ORDER_MARK,
    FileKind,
    first_line,
    open_raw,
    parse_json,
    sniff,
    sql_name,
    sql_text,
)
from igd_ds.errors import UsageError, did_you_mean

FILES = {"tables": FileKind(any_file=True, many=True)}

PROTOCOL = "leave-one-out"
"""What `igd prepare` takes where --protocol is missing."""

PEOPLE = (
    *("user", "customer", "reviewer", "visitor", "client", "member", "buyer", "account"),
    "session",
)
THINGS = ("item", "product", "movie", "book", "article", "song", "track", "business", "game")
EVENTS = ("order", "purchase", "invoice", "event", "review", "rating")
NAMES = {
    "user": ("uid", *(f"{person}{end}" for person in PEOPLE for end in ("id", ""))),
    "item": ("parentasin", "asin", "sku", *(f"{name}id" for name in THINGS), *THINGS, "iid"),
    "timestamp": (
        *("timestamp", "datetime", "ts", "unixreviewtime", "createdat"),
        *(f"{event}{end}" for event in EVENTS for end in ("timestamp", "time", "date", "edat")),
        *("orderedat", "purchasedat", "invoicedat"),
        *("date", "time"),  # beside a date, a time is that of the day
    ),
    "title": (
        "title",
        *(f"{thing}{end}" for thing in THINGS for end in ("title", "name")),
        "name",
    ),
    "brand": ("brand", "manufacturer", "store"),
    "categories": ("categories", "category", "genres", "genre"),
    "price": ("price", "unitprice"),
    "description": ("description", "details"),
    "semantic_id": ("semanticid", "sid", "codes"),
}
"""Field → names of columns without capitals and punctuation; the first one that is there counts."""

OF_ITEMS = ("title", "brand", "categories", "price", "description", "semantic_id")
DELIMITERS = ("\t", ";", "|", ",")
ASIN = re.compile(r"B[0-9A-Z]{9}|\d{9}[\dX]")
MAGNITUDES = {10**17: 10**9, 10**14: 10**6}
"""Smallest number of nano- and microseconds since 1973, and how many of them make a second."""
SNIFFED_LINES = 1000
"""JSON lines whose keys are looked at."""
NO_TABLES = {
    b"PK\x03\x04": "an Excel or zip file: save the table as CSV",
    b"BZh": "a bzip2 file: unpack it with bunzip2, or pack it with gzip",
    b"\xfd7zX": "an xz file: unpack it with unxz, or pack it with gzip",
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it with unzstd, or pack it with gzip",
    b"\xff\xfe": "UTF-16 text: iconv -f UTF-16 -t UTF-8 FILE > NEW.csv converts it",
    b"\xfe\xff": "UTF-16 text: iconv -f UTF-16 -t UTF-8 FILE > NEW.csv converts it",
}
"""How files begin that are no table, and what to do."""
LIKE_A_DAY = r"(19|20)\d\d[01]\d[0-3]\d"

# SQL.
CATEGORIES = """
    nullif([trim(part, ' "''') FOR part IN string_split_regex(trim({0}, '[] '),
        CASE WHEN {0}[1] = '[' OR NOT regexp_matches({0}, '[|;>]') THEN ',' ELSE '[|;>]' END)
        IF trim(part, ' "''') <> ''], [])"""
CODE_PARTS = """regexp_extract_all({0}, '<[^<>]+>|[^\\s,<>"\\[\\]]+')"""
SEMANTIC_ID = (
    "CASE WHEN regexp_full_match({0}, '[\\d\\s,\\[\\]\"]+') THEN list_transform({parts}, "
    "lambda part, level: '<' || chr(96 + level::INTEGER) || '_' || part || '>') "
    "ELSE {parts} END"
)
# Of each item the first line with a title.
FIRST_LINES = """
    CREATE TABLE first_lines AS SELECT * FROM events WHERE rowid IN (
        SELECT coalesce(min(rowid) FILTER ({title} <> ''), min(rowid)) FROM events
        GROUP BY {item})"""
# In most tables with tabs a quote is a quote. pandas doubles it and puts quotes around the field.
UNQUOTE = """
    UPDATE {table} SET {column} = replace({column}[2:-2], '""', '"')
    WHERE {column}[1] = '"' AND regexp_full_match({column}, '"([^"]|"")*"')"""
PRICE = "try_cast(regexp_replace({0}, '^[^0-9.-]+', '') AS DOUBLE)"


@dataclass(frozen=True)
class Table:
    """A file of the user's, and where its fields are."""

    path: Path
    form: str
    """"json", "parquet" or "text"."""
    columns: Sequence[str]
    """All of the file, in its order."""
    delimiter: str = ","
    has_header: bool = True
    fields: Mapping[str, str] = field(default_factory=dict)
    """Field (a key of NAMES) → column."""


def read(raw: RawReader, files: Mapping[str, list[Path]]) -> SourceData:
    """Read the files.

    Raises:
        UsageError: no file has users and items, columns cannot be told, or times cannot be read;
            the message names the file, its columns and what to add.
    """
    check_fields(raw.request.columns)
    tables = [open_table(path, raw.request.columns) for path in files["tables"]]
    _check_columns(tables, raw.request.columns)
    for table in tables:
        print(f"{table.path}: {_choice(table)}", file=sys.stderr, flush=True)
    events = [table for table in tables if "user" in table.fields]
    catalogues = [table for table in tables if "user" not in table.fields]
    _check_tables(events, catalogues)

    # Interactions, and what they say of their items.
    known = events[0].fields
    _load(raw, "events", events)
    seconds, position = _times(raw, events[0])
    interactions = (
        f'SELECT {_id(known["user"])} AS "user", {_id(known["item"])} AS item, '
        f'{seconds} AS "time", {position} AS position FROM events'
    )
    items, other_items = _items("events", known), None

    # A file of items comes before that.
    if catalogues:
        _load(raw, "catalogue", catalogues)
        if items:
            item, title = _id(known["item"]), sql_name(known.get("title", known["item"]))
            raw.connection.execute(FIRST_LINES.format(item=item, title=title))
            other_items = _items("first_lines", known)
        items = _items("catalogue", catalogues[0].fields)
    return raw.source_data(
        interactions,
        items,
        other_items,
        whole_catalogue=bool(catalogues),
        timed="timestamp" in known,
    )


def _choice(table: Table) -> str:
    """Return which columns of a file are taken, and which others have a name of the same field."""
    chosen = []
    for name, column in table.fields.items():
        names = NAMES[name]
        rivals = [other for other in table.columns if other != column and _plain(other) in names]
        also = f" (not {', '.join(rivals)})" if rivals and name not in OF_ITEMS else ""
        chosen.append(f"{name} = {column}{also}")
    header = ""
    if not table.has_header:
        header = f"; no header: the first line ({', '.join(_first_cells(table))}) is taken for data"
    return ", ".join(chosen) + header


def _first_cells(table: Table) -> list[str]:
    """Return the cells of the first line of a delimited file, as they can be shown."""
    text = first_line(table.path).decode("utf-8", "replace").removeprefix("\ufeff")
    cells = split_line(table.path, text, table.delimiter)
    return ["".join(c if c.isprintable() else "?" for c in cell[:60]) for cell in cells]


def check_fields(given: Mapping[str, str]) -> None:
    """Check what --columns names.

    Raises:
        UsageError: a field is unknown, a column is no text, or two fields have one column.
    """
    for name, column in given.items():
        if name not in NAMES:
            raise UsageError(
                f"--columns {name}={column}: unknown field {name}{did_you_mean(name, NAMES)} "
                f"(fields: {', '.join(NAMES)})"
            )
        if not isinstance(column, str) or not column:
            raise UsageError(
                f"--columns {name}={column}: give a column's name, or its number from 1 as text"
            )
    if "user" in given and given["user"] == given.get("item"):
        raise UsageError(f"--columns: user and item are both {given['user']}")


def open_table(path: Path, given: Mapping[str, str]) -> Table:
    """Find out the form of a file, and the columns of its fields.

    Args:
        path: the file.
        given: --columns, field → column; a number counts columns from 1.

    Raises:
        UsageError: the file is empty or broken, or has no column of items.
    """
    table = _form_of(path, given)
    fields = _named_fields(table, given)
    if not table.has_header and not fields:
        fields = _fields_of_ratings(table)
    if "item" not in fields:
        names = table.columns if table.has_header else _first_cells(table)
        raise UsageError(
            f"{path}: no column of items among {', '.join(names)}: name it, for example "
            "--columns user=COLUMN item=COLUMN timestamp=COLUMN"
            + ("" if table.has_header else "; where this is no header, COLUMN is a number from 1")
        )
    return replace(table, fields=fields)


def _form_of(path: Path, given: Mapping[str, str]) -> Table:
    """Return a file's form and columns; its fields are still open."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        with reading_parquet(path):
            return Table(path, "parquet", pq.read_schema(path).names)
    for start, what in NO_TABLES.items():
        if magic.startswith(start):
            raise UsageError(f"{path}: {what}")
    form, _ = sniff(path)
    if form == "json":
        return Table(path, form, _keys_of(path))
    if form == "python":
        raise UsageError(f"{path}: Python dicts, one per line: write them as JSON lines")

    text = first_line(path).decode("utf-8", "replace").removeprefix("\ufeff")
    delimiter = max(DELIMITERS, key=text.count)
    cells = split_line(path, text, delimiter)
    known = {name for names in NAMES.values() for name in names} | {*map(_plain, given.values())}
    has_header = any(_plain(cell) in known for cell in cells) and not any(map(_is_number, cells))
    names = cells if has_header else [""] * len(cells)
    columns = [name or f"column {place}" for place, name in enumerate(names, 1)]
    return Table(path, "text", columns, delimiter, has_header)


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Turn Arrow's errors into a UsageError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: no whole Parquet file ({reason})") from error


def split_line(path: Path, text: str, delimiter: str) -> list[str]:
    """Return the cells of a line of delimited text, without the spaces around them.

    Raises:
        UsageError: the line has line ends inside, as old Macs write them.
    """
    try:
        cells = next(csv.reader([text], delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise UsageError(
            f"{path}: the first line cannot be read ({error}); lines must end with LF or CR LF: "
            f"tr '\\r' '\\n' < {path.name} > NEW.csv"
        ) from error
    return [cell.strip() for cell in cells]


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"-?\d+([.,]\d+)?", cell) is not None


def _keys_of(path: Path) -> list[str]:
    """Return the keys that the first objects of a file of JSON lines have, in order."""
    keys: dict[str, None] = {}
    with open_raw(path) as lines:
        for line in itertools.islice(lines, SNIFFED_LINES):
            keys |= dict.fromkeys(map(str, parse_json(line.removeprefix(BYTE_ORDER_MARK)) or ()))
    return list(keys)


def _plain(name: str) -> str:
    """Return a name without capitals, spaces and punctuation."""
    return re.sub(r"[\W_]", "", name.lower())


def _named_fields(table: Table, given: Mapping[str, str]) -> dict[str, str]:
    """Return field → column: as --columns says where the file has that column, else by its name."""
    plain = {_plain(column): column for column in reversed(table.columns)}
    found = {
        key: plain[next(name for name in names if name in plain)]
        for key, names in NAMES.items()
        if any(name in plain for name in names)
    }
    for name, column in given.items():
        if column in table.columns:
            found[name] = column
        elif column.isdigit() and 0 < int(column) <= len(table.columns):
            found[name] = table.columns[int(column) - 1]
    return found


def _fields_of_ratings(table: Table) -> dict[str, str]:
    """Return the fields of Amazon's ratings: user, item (or the other way round), stars, time.

    Files of 2014 begin with the user, those of 2018 with the item.
    """
    values = _first_cells(table)
    is_rating = len(values) == 4 and values[3].isdigit()
    places = [place for place in (0, 1) if is_rating and ASIN.fullmatch(values[place])]
    if len(places) != 1:
        return {}
    item = places[0]
    return {
        "user": table.columns[1 - item],
        "item": table.columns[item],
        "timestamp": table.columns[3],
    }


def _check_columns(tables: Sequence[Table], given: Mapping[str, str]) -> None:
    """Raise UsageError for a column of --columns that no file has."""
    for name, column in given.items():
        number = int(column) if column.isdigit() else 0
        if not any(column in t.columns or 0 < number <= len(t.columns) for t in tables):
            columns = [column for table in tables for column in table.columns]
            raise UsageError(
                f"--columns {name}={column}: no such column{did_you_mean(column, columns)} "
                f"(columns: {', '.join(columns)})"
            )


def _check_tables(events: Sequence[Table], catalogues: Sequence[Table]) -> None:
    """Raise UsageError unless there are interactions, and files of one kind have one form."""
    if not events:
        table = catalogues[0]
        raise UsageError(
            f"{table.path}: no column of users among {', '.join(table.columns)}: name it, for "
            "example --columns user=COLUMN item=COLUMN, or give the file of interactions too"
        )
    for tables in (events, catalogues):
        for table in tables[1:]:
            first = tables[0]
            if (table.form, table.fields) != (first.form, first.fields):
                raise UsageError(
                    f"{first.path} and {table.path} have other forms or columns "
                    f"({', '.join(first.columns)}; {', '.join(table.columns)}): give files that "
                    "are alike"
                )


def _load(raw: RawReader, name: str, tables: Sequence[Table]) -> None:
    """Make a table of texts of the files' columns that are used."""
    first, paths = tables[0], [table.path for table in tables]
    used = dict.fromkeys(first.fields.values(), "VARCHAR")
    if first.form == "parquet":
        for number, path in enumerate(paths):
            _load_parquet(raw, f"{name}_{number}", path, list(used))
        together = " UNION ALL ".join(f"FROM {name}_{number}" for number in range(len(paths)))
        raw.connection.execute(f"CREATE TABLE {name} AS {together}")
    elif first.form == "json":
        raw.read_json_lines(name, paths, used)
    else:
        columns = used if first.has_header else dict.fromkeys(first.columns, "VARCHAR")
        raw.read_csv(
            name,
            paths,
            columns,
            delimiter=first.delimiter,
            header=first.has_header,
            quote="" if first.delimiter == "\t" else '"',
        )
        starts = [first_line(path)[:1] for path in paths]
        has_quotes = first.has_header and b'"' in starts
        if first.delimiter == "\t" and not has_quotes:  # else they are read as quotes already
            for column in map(sql_name, used):
                raw.connection.execute(UNQUOTE.format(table=name, column=column))


def _load_parquet(raw: RawReader, name: str, path: Path, columns: Sequence[str]) -> None:
    """Make a table of texts of a Parquet file's columns; whole floats become integers.

    pandas turns a column of integer ids into floats where one is missing.
    """
    with reading_parquet(path):
        table = pq.read_table(path, columns=columns)
    raw.add_table(f"{name}_typed", table)
    chosen = []
    for column in columns:
        text = f"{sql_name(column)}::VARCHAR"
        if pa.types.is_floating(table.schema.field(column).type):
            whole = f"try_cast({sql_name(column)} AS BIGINT)"
            text = f"CASE WHEN {sql_name(column)} = {whole} THEN {whole}::VARCHAR ELSE {text} END"
        chosen.append(f"{text} AS {sql_name(column)}")
    raw.connection.execute(f"CREATE TABLE {name} AS SELECT {', '.join(chosen)} FROM {name}_typed")
    raw.connection.execute(f"DROP TABLE {name}_typed")
    raw.funnel.append({"step": f"read {path.name}", "rows": len(table)})


def _times(raw: RawReader, table: Table) -> tuple[str, str]:
    """Return the SQL of an interaction's time in whole seconds or milliseconds, and its place.

    Raises:
        UsageError: most times cannot be read, or look like 20240131.
    """
    if "timestamp" not in table.fields:
        return "NULL::BIGINT", "rowid"
    raw.connection.execute("SET TimeZone = 'UTC'")
    text, form = sql_name(table.fields["timestamp"]), raw.request.time_format
    exact = f"coalesce(try_cast({text} AS DOUBLE), epoch(try_cast({text} AS TIMESTAMPTZ)))"
    if form:
        exact = f"epoch(try_strptime({text}, {sql_text(form)}))"
    # NaN, infinity and what lies before 1970 are no times of an interaction.
    exact = f"CASE WHEN isfinite({exact}) AND {exact} >= 0 THEN {exact} END"

    where = f"{table.path}: column {table.fields['timestamp']}"
    try:
        count, unreadable, days, example, least, largest = raw.connection.execute(
            f"SELECT count(*), count(*) FILTER ({text} <> '' AND {exact} IS NULL), "
            f"count(*) FILTER (regexp_full_match({text}, '{LIKE_A_DAY}')), "
            f"min({text}) FILTER ({text} <> '' AND {exact} IS NULL), min({exact}), max({exact}) "
            "FROM events"
        ).fetchall()[0]
    except duckdb.Error as error:
        raise UsageError(f"--time_format {form}: {str(error).splitlines()[0]}") from error
    if not count:
        raise UsageError(f"{table.path}: no line behind the header")
    if not form and count == days:
        raise UsageError(f"{where} holds days such as 20240131: add --time_format %Y%m%d")
    if unreadable > raw.request.max_bad_lines * count:
        raise UsageError(
            f"{where}: {unreadable:,} of {count:,} times cannot be read or lie before 1970, such "
            f"as {example!r}: say how they are written, for example --time_format %d.%m.%Y"
        )

    # Within a second the fraction decides the order; from here on the position says it.
    smallest, unit = next(
        (pair for pair in MAGNITUDES.items() if (largest or 0) >= pair[0]), (None, 1)
    )
    if smallest and least < smallest:
        raise UsageError(
            f"{where}: times span {least:.0f} to {largest:.0f}: some are seconds or milliseconds, "
            "others micro- or nanoseconds; all must be of one kind"
        )
    seconds = f"try_cast(floor({exact} / {unit}) AS BIGINT)"
    return seconds, f"row_number() OVER (ORDER BY {exact}, rowid) - 1"


def _items(table: str, fields: Mapping[str, str]) -> str | None:
    """Return the SELECT of the items that a table describes, or None if it does not."""
    described = [name for name in OF_ITEMS if name in fields]
    if not described:
        return None

    chosen = [f"{_id(fields['item'])} AS item"]
    if "title" not in fields:
        chosen.append("NULL::VARCHAR AS title")
    for name in described:
        text = sql_name(fields[name])
        value = {
            "categories": CATEGORIES.format(text),
            "price": PRICE.format(text),
            "semantic_id": SEMANTIC_ID.format(text, parts=CODE_PARTS.format(text)),
        }.get(name, text)
        chosen.append(f"{value} AS {name}")
    return f"SELECT {', '.join(chosen)}, rowid AS position FROM {table}"


def _id(name: str) -> str:
    """Return the SQL of an id: without spaces around it, null where it spells a missing value."""
    text, missing = f"trim({sql_name(name)})", ", ".join(map(sql_text, sorted(MISSING_VALUES)))
    return f"CASE WHEN lower({text}) IN ({missing}) THEN NULL ELSE {text} END"
