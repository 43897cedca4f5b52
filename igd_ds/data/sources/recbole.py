"""Source `recbole`: RecBole's atomic files.

    NAME.inter   user_id:token TAB item_id:token TAB rating:float TAB timestamp:float …
                 a header with types, then one line per interaction
    NAME.item    item_id:token TAB title:token_seq TAB categories:token_seq …
                 optional; without it, or without a title in it, the items have no titles

Page: https://recbole.io/dataset_list.html (ready-made files of some 40 datasets, from a kB to
several GB; each keeps its own licence), or your own files, made with RecSysDatasets' conversion
tools. The files are plain or gzip, UTF-8.

Columns are found by the names that RecBole's tools give them. The first name of a list that the
header has is taken:

    user        user_id, visitor_id, customer_id
    item        item_id, business_id, product_id, venue_id, id
    timestamp   timestamp, date (in seconds; with neither there are no timestamps)
    title       item_name, title, movie_title, movie_name, app_name, name
    categories  categories, category, genres, genre, class, type
    others      brand, price, description

The parts of a sequence are separated by spaces, or by commas or quotes if a value has them, because
the tools wrote Yelp's and Amazon's categories so. A field in double quotes loses them, as it does
in RecBole itself; a field with a tab or a line break inside is rejected. Items of NAME.item without
interactions are left out.

The benchmark files NAME.train.inter, NAME.valid.inter and NAME.test.inter are read one after the
other, in this order, and make one set of interactions, which the protocol splits again. Files whose
lines hold whole histories (`item_id_list:token_seq`) are refused.
"""

from collections.abc import Mapping
from pathlib import Path

from igd_ds.data.dataset import SourceData
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import FileKind, first_line, parts_in_order, shown, sniff, sql_name
from igd_ds.errors import UsageError

FILES = {
    "interactions": FileKind(names=("*.inter",), many=True),
    "items": FileKind(names=("*.item",), optional=True),
}
USER = ("user_id", "visitor_id", "customer_id")
ITEM = ("item_id", "business_id", "product_id", "venue_id", "id")
TIME = ("timestamp", "date")
TITLE = ("item_name", "title", "movie_title", "movie_name", "app_name", "name")
CATEGORIES = ("categories", "category", "genres", "genre", "class", "type")
# SQL for a field without the double quotes around it, and for the parts of a sequence.
UNQUOTED = """
    CASE WHEN {0} LIKE '"%"' AND length({0}) > 1 THEN replace({0}[2:-2], '""', '"')
        ELSE {0} END"""
SEQUENCE = """
    nullif([trim(part, ' ''"') FOR part IN CASE
        WHEN {0}[1] IN ('''', '"') THEN regexp_extract_all({0}, '''[^'']*''|"[^"]*"')
        ELSE string_split({0}, CASE WHEN contains({0}, ',') THEN ',' ELSE ' ' END) END
        IF trim(part, ' ''"') <> ''], [])"""
INTERACTIONS = """
    SELECT {user} AS "user", {item} AS item, {seconds} AS "time", {position} AS position
    FROM recbole_inter"""


def read(raw: RawReader, files: Mapping[str, list[Path]]) -> SourceData:
    """Read the files.

    Raises:
        UsageError: a file is not as described above; the message names file and line.
    """
    paths = parts_in_order(files["interactions"], ".inter")
    names = typed_header(paths[0])
    if lists := [name for name in names if name.endswith("_list")]:
        raise UsageError(
            f"{paths[0]}: column {lists[0]} holds a history; give interaction files, with one item "
            "on a line"
        )
    user, item, time = (first_of(names, wanted) for wanted in (USER, ITEM, TIME))
    if not (user and item):
        missing = " or ".join(ITEM if user else USER)
        raise UsageError(
            f"{paths[0]}: no column {missing}; the header has {', '.join(names.values())}"
        )

    columns = {user: "VARCHAR", item: "VARCHAR"}
    seconds, position = "NULL::BIGINT", "rowid"
    if time:
        columns[time] = "DOUBLE"
        seconds = f"try_cast(floor({sql_name(time)}) AS BIGINT)"
        # Within a second the fraction decides the order; from here on the position says it.
        position = f"row_number() OVER (ORDER BY {sql_name(time)}, rowid) - 1"
    raw.read_csv("recbole_inter", paths, columns, delimiter="\t")
    interactions = INTERACTIONS.format(
        user=unquoted(user), item=unquoted(item), seconds=seconds, position=position
    )

    items = None
    if "items" in files:
        items = read_items(raw, files["items"][0], item.partition(":")[0])
    return raw.source_data(interactions, items, timed=time is not None)


def read_items(raw: RawReader, path: Path, item_name: str) -> str:
    """Read NAME.item and return the SELECT of its items.

    Its id column is `item_name` or another name of ITEM.

    Raises:
        UsageError: there is no column of ids.
    """
    names = typed_header(path)
    item, title = first_of(names, (item_name, *ITEM)), first_of(names, TITLE)
    if not item:
        missing = " or ".join(ITEM)
        raise UsageError(f"{path}: no column {missing}; the header has {', '.join(names.values())}")

    # Alias → column, for texts; then the columns that need a conversion.
    texts = {"item": item} | ({"title": title} if title else {})
    texts |= {name: names[name] for name in ("brand", "description") if name in names}
    chosen = [f"{unquoted(column)} AS {name}" for name, column in texts.items()]
    if not title:
        chosen.append("NULL::VARCHAR AS title")
    columns = list(texts.values())
    if categories := first_of(names, CATEGORIES):
        chosen.append(f"{SEQUENCE.format(unquoted(categories))} AS categories")
        columns.append(categories)
    if price := names.get("price"):
        chosen.append(f"try_cast({sql_name(price)} AS DOUBLE) AS price")
        columns.append(price)

    raw.read_csv("recbole_item", [path], dict.fromkeys(columns, "VARCHAR"), delimiter="\t")
    return f"SELECT {', '.join(chosen)}, rowid AS position FROM recbole_item"


def typed_header(path: Path) -> dict[str, str]:
    """Return the columns of the header, name → "name:type".

    Raises:
        UsageError: a column has no type or occurs twice, or there are no tabs between the columns.
    """
    columns = sniff(path)[1]
    if len(columns) > 1 and b"\t" not in first_line(path):
        raise UsageError(
            f"{path}: the fields of atomic files are separated by tabs; its header is "
            f"{shown(first_line(path))}"
        )
    if untyped := [column for column in columns if ":" not in column]:
        raise UsageError(
            f"{path}: column {untyped[0]!r} of the header has no type; atomic files say name:type, "
            "e.g. item_id:token"
        )
    names = {column.partition(":")[0]: column for column in columns}
    if len(names) < len(columns):
        raise UsageError(f"{path}: the header names a column twice: {', '.join(columns)}")
    return names


def first_of(names: Mapping[str, str], wanted: tuple[str, ...]) -> str | None:
    """Return the header's column with the first of these names, or None."""
    return next((names[name] for name in wanted if name in names), None)


def unquoted(column: str) -> str:
    """Return the SQL for a field without the double quotes that pandas put around it."""
    return UNQUOTED.format(sql_name(column))
