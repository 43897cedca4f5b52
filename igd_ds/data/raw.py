"""Raw files as people download them → tables in DuckDB → numbered interactions, titles and metadata.

DuckDB reads JSON lines and delimited text with all cores, spills to a scratch folder beyond MEMORY_LIMIT, and keeps the order of
the file: a table's `rowid` is the row's position. Only Python-dict lines (the older Amazon and Steam files), which no library
reads, are turned into JSON lines first, one by one.

A line that is no object of the expected kind, or an interaction without user, item or time, is *rejected*: left out, counted in
the funnel, an error when there are more than `max_bad_lines` of them.
"""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from igd_ds.data.dataset import METADATA_SCHEMA, Interactions, SourceData
from igd_ds.data.raw_files import (
    BYTE_ORDER_MARK,
    RawRequest,
    first_line,
    has_byte_order_mark,
    is_gzip,
    open_raw,
    parse_json,
    parse_python,
    sniff,
)
from igd_ds.errors import UsageError

MEMORY_LIMIT = "1GB"  # of DuckDB; with the arrays of 50 million interactions beside it 4 GiB are enough (measured)
MEMORY_LEFT = (
    "256MB"  # once interactions are read: enough to fetch metadata, the rest is for the protocol
)
THREADS: dict[str, int] = {}  # all cores
FETCH_ROWS = 1 << 20
MAX_LINE = (
    1 << 22
)  # bytes of a line of delimited text (assumed); DuckDB holds buffers of 16 times that
EARLIEST_MILLISECOND = 10**11  # the year 5138 in seconds, 1973 in milliseconds
LATEST_MILLISECOND = 10**14
MAX_LISTED = 5  # rejected lines named in a message
# Names in sorted order with their place there; DuckDB compares strings byte by byte.
NUMBERED = "SELECT name, (row_number() OVER (ORDER BY name) - 1)::INTEGER AS code FROM (SELECT DISTINCT * FROM ({names}) t(name))"
NO_ITEMS = "SELECT NULL::VARCHAR AS item, NULL::VARCHAR AS title, 0::BIGINT AS position WHERE false"


@dataclass
class RawReader:
    """One DuckDB connection over the files of a request; a context manager.

    `scratch` is an empty folder that the caller removes; `funnel` collects the steps: rows read and rejected.
    """

    request: RawRequest
    scratch: Path
    funnel: list[dict] = field(default_factory=list)

    def __enter__(self) -> "RawReader":
        """Open the connection: tables in memory, of which DuckDB spills what goes beyond the limit (half the time of a file)."""
        config = {
            "memory_limit": MEMORY_LIMIT,
            "temp_directory": str(self.scratch / "spill"),
            **THREADS,
        }
        self.connection = duckdb.connect(config=config)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Close the connection. What DuckDB could not do with tables it has read is a matter of memory or disk: ValueError."""
        self.connection.close()
        if isinstance(error, duckdb.Error):
            where = "make room on the disk of --output, where DuckDB spills"
            raise UsageError(f"{self._inputs()}: {_brief(error)}; {where}") from error

    def read_json_lines(self, table: str, paths: Sequence[Path], columns: dict[str, str]) -> None:
        """Make a table of JSON lines or Python-dict lines, in file order; a line without any of the columns is rejected.

        Args:
            columns: name → DuckDB type. A missing value, or one of another type, becomes null.
        """
        nested = {name: "[" in kind or kind == "JSON" for name, kind in columns.items()}
        declared = ", ".join(
            f"'{name}': '{'JSON' if nested[name] else 'VARCHAR'}'" for name in columns
        )
        values = ", ".join(
            f'try_cast("{name}" AS {kind}) AS "{name}"' for name, kind in columns.items()
        )
        empty = " AND ".join(f'"{name}" IS NULL' for name in columns)
        self._create(table, columns)
        for path in paths:
            unreadable = sniff(path)[0] == "python" or has_byte_order_mark(path)
            source = self._as_json(path, list(columns)) if unreadable else path
            options = (
                f"format = 'newline_delimited', columns = {{{declared}}}, ignore_errors = true"
            )
            rows = self._insert(
                table, path, f"SELECT {values} FROM read_json({self._alias(source)}, {options})"
            )
            self._check_share(path, rows, self._empty_lines(table, path, rows, empty))

    def read_csv(
        self,
        table: str,
        paths: Sequence[Path],
        columns: dict[str, str],
        *,
        delimiter: str,
        header: bool = True,
        encoding: str = "utf-8",
        quote: str = "",
    ) -> None:
        """Make a table of delimited text, in file order; a line with another number of fields is rejected.

        Args:
            columns: name → DuckDB type, found by name where there is a header; else all columns of the file in its order. A
                line with a value of another type is rejected.
        """
        values = ", ".join(
            f'try_cast("{name}" AS {kind}) AS "{name}"' for name, kind in columns.items()
        )
        self._create(table, columns)
        for path in paths:
            names = _header(path, columns, delimiter, encoding, quote) if header else list(columns)
            declared = ", ".join(f"{_quoted(name)}: 'VARCHAR'" for name in names)
            options = (
                f"auto_detect = false, columns = {{{declared}}}, delim = '{delimiter}', header = {header}, quote = '{quote}', "
                f"escape = '{quote}', encoding = '{encoding}', strict_mode = true, max_line_size = {MAX_LINE}, "
                "store_rejects = true, rejects_limit = 0"
            )
            rows = self._insert(
                table, path, f"SELECT {values} FROM read_csv({self._alias(path)}, {options})"
            )
            # A line can have several errors, in any order.
            found = self._run(
                "SELECT line, min(error_type), min(csv_line) FROM reject_errors GROUP BY line ORDER BY line"
            )
            self._run("DROP TABLE reject_errors; DROP TABLE reject_scans")
            self._check_share(
                path,
                rows + len(found),
                [(line, f"{error.lower()}: {text!r}") for line, error, text in found],
            )

    def source_data(
        self,
        interactions: str,
        items: str | None = None,
        whole_catalogue: bool = False,
        timed: bool = True,
    ) -> SourceData:
        """Number the users and items of two SELECTs and return the source's data.

        Numbers are a permutation, drawn with the seed, of the names in sorted order: they carry no order, and depend on nothing
        but names and seed.

        Args:
            interactions: gives "user" VARCHAR, item VARCHAR, "time" BIGINT (seconds or milliseconds, null where there is none),
                position BIGINT (the table's `rowid`, for ties).
            items: gives item VARCHAR, title VARCHAR, position BIGINT and any columns of METADATA_SCHEMA and semantic_id
                VARCHAR[]. Where an item occurs twice the first line with a title counts.
            whole_catalogue: items without interaction belong to the catalogue.
            timed: the source has times; an interaction without is rejected.
        """
        self._run(f"CREATE VIEW interaction AS {interactions}")
        self._run(f"CREATE VIEW item_line AS {items or NO_ITEMS}")
        accepted = self._reject_incomplete(timed)
        unit = self._time_unit(accepted) if timed else 0
        more = (
            "UNION SELECT item FROM item_line WHERE coalesce(item, '') <> ''"
            if whole_catalogue
            else ""
        )
        for table, names in [
            ("user_code", f'SELECT "user" FROM interaction WHERE {accepted}'),
            ("item_code", f"SELECT item FROM interaction WHERE {accepted} {more}"),
        ]:
            self._run(f"CREATE TABLE {table} AS {NUMBERED.format(names=names)}")
        self._choose_lines()
        user_order, user_names = self._shuffled("user_code", salt=0)
        item_order, item_names = self._shuffled("item_code", salt=1)
        titles, semantic_ids = self._titles(item_order)
        interactions_read = self._interactions(
            accepted, unit, _inverse(user_order), _inverse(item_order)
        )
        self._run(f"SET memory_limit = '{MEMORY_LEFT}'")
        return SourceData(
            titles=titles,
            semantic_ids=semantic_ids,
            interactions=interactions_read,
            item_names=item_names,
            user_names=user_names,
            metadata=lambda ids: self._metadata(item_order[ids]),
            funnel=tuple(self.funnel),
        )

    def _run(self, sql: str) -> list[tuple]:
        """Execute SQL; return all of its rows."""
        return self.connection.execute(sql).fetchall()

    def _inputs(self) -> str:
        return ", ".join(map(str, self.request.inputs))

    def _alias(self, path: Path) -> str:
        """Return a file's first arguments for SQL, under a link's name: DuckDB reads `*` and `[` in a path as patterns."""
        link = self._new_file("input")
        link.symlink_to(path.resolve())
        return f"{_quoted(str(link))}, compression = '{'gzip' if is_gzip(path) else 'none'}'"

    def _new_file(self, kind: str) -> Path:
        return self.scratch / f"{kind}-{len(list(self.scratch.iterdir()))}"

    def _create(self, table: str, columns: dict[str, str]) -> None:
        declared = ", ".join(f'"{name}" {kind}' for name, kind in columns.items())
        self._run(f"CREATE TABLE {table} ({declared})")

    def _insert(self, table: str, path: Path, select: str) -> int:
        """Append a file's rows to a table; return their number."""
        begin = time.perf_counter()
        try:
            rows = self._run(f"INSERT INTO {table} {select}")[0][0]
        except duckdb.OutOfMemoryException as error:
            raise UsageError(
                f"{path}: a line does not fit into {MEMORY_LIMIT} of memory ({_brief(error)})"
            ) from error
        except duckdb.Error as error:
            advice = "; is it whole? download it again" if "GZIP" in str(error) else ""
            raise UsageError(f"{path}: cannot be read ({_brief(error)}){advice}") from error
        self.funnel.append({"step": f"read {path.name}", "rows": rows})
        _say(f"read {path}: {rows:,} rows in {time.perf_counter() - begin:.1f} s")
        return rows

    def _as_json(self, path: Path, keys: Sequence[str]) -> Path:
        """Write a file that DuckDB cannot read as JSON lines with these keys; what is no object becomes `!`, which is no JSON."""
        _say(
            f"{path} holds Python-dict lines or a byte order mark: turned into plain JSON lines first"
        )
        target = self._new_file("json")
        with (
            open_raw(path) as lines,
            open(target, "w", encoding="utf-8", errors="replace") as output,
        ):
            for line in lines:
                line = line.removeprefix(BYTE_ORDER_MARK).strip()
                found = parse_json(line) or parse_python(line)
                output.write((_json_text(found, keys) if line else "") + "\n")
        return target

    def _empty_lines(self, table: str, path: Path, rows: int, empty: str) -> list[tuple[int, str]]:
        """Return (line number, what it holds) for the newest `rows` rows in which every column is null."""
        first = self._run(f"SELECT count(*) FROM {table}")[0][0] - rows
        null_rows = self._run(
            f"SELECT rowid FROM {table} WHERE rowid >= {first} AND {empty} ORDER BY rowid"
        )
        wanted = {row - first for (row,) in null_rows}
        found: list[tuple[int, str]] = []
        if wanted:
            with open_raw(path) as lines:
                filled = (
                    (number, line) for number, line in enumerate(lines, start=1) if line.strip()
                )  # DuckDB skips the blank
                found = [
                    (number, f"no such object: {line[:60]!r}")
                    for row, (number, line) in enumerate(filled)
                    if row in wanted
                ]
        return found

    def _check_share(self, path: Path, rows: int, rejected: list[tuple[int, str]]) -> None:
        """Note rejected lines in the funnel; ValueError when there are too many."""
        if not rejected:
            return
        listed = "; ".join(f"line {number}: {what}" for number, what in rejected[:MAX_LISTED])
        if len(rejected) > self.request.max_bad_lines * rows:
            raise UsageError(
                f"{path}: {len(rejected):,} of {rows:,} lines cannot be used ({len(rejected) / rows:.2%}, --max_bad_lines allows "
                f"{self.request.max_bad_lines:.2%}): {listed}"
            )
        self.funnel.append(
            {"step": f"broken lines in {path.name}: {listed}", "rows": len(rejected)}
        )

    def _reject_incomplete(self, timed: bool) -> str:
        """Count interactions without user, item or time; return the SQL condition of the others."""
        accepted = """coalesce("user", '') <> '' AND coalesce(item, '') <> ''""" + (
            ' AND "time" IS NOT NULL' if timed else ""
        )
        rows, *without = self._run(
            """SELECT count(*), count(*) FILTER (coalesce("user", '') = ''), count(*) FILTER (coalesce(item, '') = ''), """
            f'count(*) FILTER ("time" IS NULL), count(*) FILTER (NOT ({accepted})) FROM interaction'
        )[0]
        described = (
            f"without user {without[0]:,}, item {without[1]:,}, time {without[2] if timed else 0:,}"
        )
        if without[3] == rows or without[3] > self.request.max_bad_lines * rows:
            raise UsageError(
                f"{self._inputs()}: {without[3]:,} of {rows:,} interactions cannot be used ({described}); "
                f"--max_bad_lines allows {self.request.max_bad_lines:.2%}"
            )
        if without[3]:
            self.funnel.append({"step": f"rejected, {described}", "rows": without[3]})
        return accepted

    def _time_unit(self, accepted: str) -> int:
        """Return how many of the source's units make a second: 1 or 1000."""
        low, high, fine, timed = self._run(
            f'SELECT min("time"), max("time"), count(*) FILTER ("time" >= {EARLIEST_MILLISECOND}), count("time") '
            f"FROM interaction WHERE {accepted}"
        )[0]
        if low < 0 or high >= LATEST_MILLISECOND or 0 < fine < timed:
            raise UsageError(
                f"{self._inputs()}: timestamps span {low} to {high}; {timed - fine:,} look like seconds and {fine:,} like "
                "milliseconds since 1970: all must be of one kind, not negative, and before the year 5138"
            )
        return 1000 if fine else 1

    def _choose_lines(self) -> None:
        """Make the table item_chosen: per item the first metadata line with a title; count what is missing or repeated."""
        self._run(
            "CREATE TABLE item_chosen AS "
            "SELECT code, item_code.name AS item, count(*) AS lines, count(DISTINCT title) AS titles, "
            "coalesce(min(position) FILTER (coalesce(title, '') <> ''), min(position)) AS position "
            "FROM item_code JOIN item_line ON item_line.item = item_code.name GROUP BY ALL"
        )
        found, repeated, differing = self._run(
            "SELECT count(*), count(*) FILTER (lines > 1), count(*) FILTER (titles > 1) FROM item_chosen"
        )[0]
        missing = self._run("SELECT count(*) FROM item_code")[0][0] - found
        notes = (
            f"{missing:,} without, {repeated:,} on several lines, {differing:,} with several titles"
        )
        self.funnel.append({"step": f"items with metadata ({notes})", "items": found})

    def _shuffled(self, table: str, salt: int) -> tuple[np.ndarray, pa.Array]:
        """Return (order, names): the names in their new order, new number k being the name that sorts `order[k]`-th."""
        names = (
            self.connection.sql(f"SELECT name FROM {table} ORDER BY code")
            .to_arrow_table()["name"]
            .combine_chunks()
        )
        order = (
            np.random.default_rng([self.request.seed, salt])
            .permutation(len(names))
            .astype(np.int32)
        )
        return order, names.take(pa.array(order))

    def _item_columns(self) -> list[str]:
        return [row[0] for row in self._run("DESCRIBE item_line")]

    def _titles(self, item_order: np.ndarray) -> tuple[list[str | None], list[list[str]] | None]:
        codes = (
            "semantic_id"
            if "semantic_id" in self._item_columns()
            else "NULL::VARCHAR[] AS semantic_id"
        )
        table = self.connection.sql(
            f"SELECT title, {codes} FROM item_code LEFT JOIN item_chosen USING (code) LEFT JOIN item_line "
            "ON item_line.position = item_chosen.position AND item_line.item = item_chosen.item ORDER BY item_code.code"
        ).to_arrow_table()
        table = table.combine_chunks().take(pa.array(item_order))
        has_codes = table["semantic_id"].null_count < len(table)
        return table["title"].to_pylist(), table["semantic_id"].to_pylist() if has_codes else None

    def _metadata(self, codes: np.ndarray) -> pa.Table:
        """Return the metadata columns of items given by their place in sorted order."""
        given = self._item_columns()
        names = [name for name in METADATA_SCHEMA.names if name in given]
        self.connection.register(
            "wanted", pa.table({"code": pa.array(codes), "place": pa.array(np.arange(len(codes)))})
        )
        found = self.connection.sql(
            f"SELECT {', '.join(['place', *names])} FROM wanted LEFT JOIN item_chosen USING (code) LEFT JOIN item_line "
            "ON item_line.position = item_chosen.position AND item_line.item = item_chosen.item ORDER BY place"
        ).to_arrow_table()
        self.connection.unregister("wanted")
        return found.select(names).cast(pa.schema([METADATA_SCHEMA.field(name) for name in names]))

    def _interactions(
        self, accepted: str, unit: int, user_number: np.ndarray, item_number: np.ndarray
    ) -> Interactions:
        """Fetch the accepted interactions in file order, with new numbers and times in seconds."""
        rows = self._run("SELECT max(position) + 1 FROM interaction")[0][0]
        users, items, present = (
            np.empty(rows, np.int32),
            np.empty(rows, np.int32),
            np.zeros(rows, bool),
        )
        times = np.empty(rows, np.int64) if unit else None
        batches = self.connection.sql(
            'SELECT position, user_code.code AS user_place, item_code.code AS item_place, "time" FROM interaction '
            'JOIN user_code ON interaction."user" = user_code.name JOIN item_code ON interaction.item = item_code.name '
            f"WHERE {accepted}"
        ).to_arrow_reader(FETCH_ROWS)
        for batch in batches:
            place, user, item = (
                batch.column(name).to_numpy() for name in ("position", "user_place", "item_place")
            )
            users[place], items[place], present[place] = user_number[user], item_number[item], True
            if times is not None:
                times[place] = batch.column("time").to_numpy()
        interactions = Interactions(users, items, times)
        if not present.all():
            interactions = interactions.take(present)
        if (
            unit == 1000
        ):  # within a second milliseconds decide the order: from here on the position says it
            interactions = interactions.take(np.argsort(interactions.timestamps, kind="stable"))
            interactions.timestamps[:] //= 1000
        return interactions


def _header(
    path: Path, columns: Iterable[str], delimiter: str, encoding: str, quote: str
) -> list[str]:
    with open_raw(path) as lines:
        if not lines.readline().strip():
            raise UsageError(f"{path}: the first line is blank, and should be the header")
    text = first_line(path).decode(encoding, "replace").removeprefix("\ufeff")
    names = [name.strip().strip(quote or None) for name in text.split(delimiter)]
    if missing := [name for name in columns if name not in names]:
        raise UsageError(
            f"{path}: no column {', '.join(missing)}; its header has {', '.join(names)}"
        )
    if len({name.lower() for name in names}) < len(names):
        raise UsageError(f"{path}: the header names a column twice: {', '.join(names)}")
    return names


def _inverse(order: np.ndarray) -> np.ndarray:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order), dtype=order.dtype)
    return inverse


def _quoted(text: str) -> str:
    """Return a text as SQL spells it."""
    return "'" + text.replace("'", "''") + "'"


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:300]


def _json_text(found: dict | None, keys: Sequence[str]) -> str:
    """Return these keys of an object as JSON; `!`, which is none, where there is nothing, or something that JSON has not."""
    kept = {key: found[key] for key in keys if key in found} if found else None
    try:
        return json.dumps(kept, ensure_ascii=False) if kept else "!"
    except (TypeError, ValueError, RecursionError):
        return "!"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
