"""Raw files as people download them become tables in DuckDB, then numbered interactions and titles.

DuckDB reads JSON lines and delimited text with all cores. It spills to a scratch folder beyond
MEMORY_LIMIT and keeps the order of the file: the `rowid` of a table is the position of the row. No
library reads Python-dict lines (the older Amazon and Steam files), so they are turned into JSON
lines first, one by one.

A line that is no object of the expected kind is *rejected*, and so is an interaction without user,
item or time. Rejected lines are left out and counted in the funnel. If their share exceeds
`max_bad_lines`, that is an error.
"""

import csv
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from igd_ds.data.dataset import METADATA_SCHEMA, FunnelStep, Interactions, SourceData
from igd_ds.data.raw_files import (
    BYTE_ORDER_MARK,
    RawRequest,
    first_line,
    has_byte_order_mark,
    is_gzip,
    not_utf8,
    open_raw,
    parse_json,
    parse_python,
    shown,
    sniff,
    sql_name,
    sql_text,
)
from igd_ds.errors import UsageError

# DuckDB's limit; with the arrays of 50 million interactions beside it, 4 GiB suffice (measured).
MEMORY_LIMIT = "1GB"
# The limit once the interactions are read; it suffices for metadata. The protocol gets the rest.
MEMORY_LEFT = "256MB"
THREADS: dict[str, int] = {}  # all cores
FETCH_ROWS = 1 << 20
# Bytes of a line of delimited text (assumed); DuckDB holds buffers of 16 times that.
MAX_LINE = 1 << 22
EARLIEST_MILLISECOND = 10**11  # the year 5138 in seconds, 1973 in milliseconds
LATEST_MILLISECOND = 10**14
MAX_LISTED = 5  # rejected lines that a message names

# SQL: names in sorted order with their place there; DuckDB compares strings byte by byte.
NUMBERED = """
    SELECT name, (row_number() OVER (ORDER BY name) - 1)::INTEGER AS code
    FROM (SELECT DISTINCT * FROM ({names}) t(name))"""
NO_ITEMS = """
    SELECT NULL::VARCHAR AS item, NULL::VARCHAR AS title, 0::BIGINT AS position WHERE false"""
NOT_EMPTY = """coalesce("user", '') <> '' AND coalesce(item, '') <> ''"""
COUNT_INCOMPLETE = """
    SELECT count(*),
        count(*) FILTER (coalesce("user", '') = ''),
        count(*) FILTER (coalesce(item, '') = ''),
        count(*) FILTER ("time" IS NULL),
        count(*) FILTER (NOT ({accepted}))
    FROM interaction"""
TIME_SPAN = """
    SELECT min("time"), max("time"), count(*) FILTER ("time" >= {millisecond}), count("time")
    FROM interaction WHERE {accepted}"""
COUNT_KNOWN = """
    SELECT count(*), count(line.item), min(met.item) FILTER (line.item IS NULL)
    FROM item_met AS met
    LEFT JOIN (SELECT DISTINCT item FROM item_line) AS line ON line.item = met.item"""
CHOOSE_LINES = """
    CREATE TABLE item_chosen AS
    SELECT code, item_code.name AS item, count(*) AS lines, count(DISTINCT title) AS titles,
        coalesce(min(position) FILTER (coalesce(title, '') <> ''), min(position)) AS position
    FROM item_code JOIN item_line ON item_line.item = item_code.name GROUP BY ALL"""
TITLE_OF_NO_LINE = """
    CASE WHEN max({own}) OVER (PARTITION BY item) IS NULL THEN {other} END"""
FILLED_IN = """
    CREATE TABLE item_line AS
    SELECT item, {columns}, coalesce(given_line.position,
        other_line.position + (SELECT count(*) FROM given_line)) AS position
    FROM given_line FULL JOIN other_line USING (item)"""
COUNT_CHOSEN = """
    SELECT count(*), count(*) FILTER (lines > 1), count(*) FILTER (titles > 1) FROM item_chosen"""
WITH_CHOSEN_LINE = """
    LEFT JOIN item_chosen USING (code)
    LEFT JOIN item_line
    ON item_line.position = item_chosen.position AND item_line.item = item_chosen.item"""
ACCEPTED_INTERACTIONS = """
    SELECT position, user_code.code AS user_place, item_code.code AS item_place, "time"
    FROM interaction
    JOIN user_code ON interaction."user" = user_code.name
    JOIN item_code ON interaction.item = item_code.name
    WHERE {accepted}"""
REJECTED_LINES = """
    SELECT line, min(error_type), min(csv_line) FROM reject_errors GROUP BY line ORDER BY line"""


@dataclass
class RawReader:
    """One DuckDB connection over the files of a request; a context manager.

    Example:
        >>> with RawReader(request, scratch) as raw:
        ...     columns = {"user": "VARCHAR", "item": "VARCHAR"}
        ...     raw.read_csv("ratings", [path], columns, delimiter=",")
        ...     data = raw.source_data(
        ...         'SELECT "user", item, NULL::BIGINT AS "time", rowid AS position FROM ratings',
        ...         timed=False,
        ...     )
    """

    request: RawRequest
    scratch: Path
    """An empty folder for temporary files, which the caller removes."""
    funnel: list[FunnelStep] = field(default_factory=list)
    """The rows read and rejected so far."""
    connection: duckdb.DuckDBPyConnection = field(init=False)

    def __enter__(self) -> "RawReader":
        """Open the connection.

        Its tables live in memory, and DuckDB spills what exceeds the limit. That takes half the
        time of a database in a file.
        """
        config: dict[str, Any] = {
            "memory_limit": MEMORY_LIMIT,
            "temp_directory": str(self.scratch / "spill"),
            **THREADS,
        }
        self.connection = duckdb.connect(config=config)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connection.

        Raises:
            UsageError: DuckDB failed on tables that it had read, so memory or disk ran out.
        """
        self.connection.close()
        if isinstance(error, duckdb.Error):
            advice = "check the file's columns and values"
            if "No space left" in str(error) or isinstance(error, duckdb.IOException):
                advice = "make room on the disk of --output, where DuckDB spills"
            elif isinstance(error, duckdb.OutOfMemoryException):
                advice = "some lines are too long, such as metadata of several MB: shorten them"
            raise UsageError(f"{self._inputs()}: {_brief(error)}; {advice}") from error

    def read_json_lines(
        self, table: str, paths: Sequence[Path], columns: Mapping[str, str]
    ) -> None:
        """Make a table of JSON lines or Python-dict lines, in file order.

        A line without any of the columns is rejected.

        Args:
            table: name of the table.
            paths: the files, read one after the other.
            columns: name → DuckDB type. A value that is missing or of another type becomes null.
        """
        read_as = _read_as(columns)
        declared = ", ".join(f"{sql_text(name)}: '{kind}'" for name, kind in read_as.items())
        options = f"format = 'newline_delimited', columns = {{{declared}}}, ignore_errors = true"
        empty = " AND ".join(f"{sql_name(name)} IS NULL" for name in columns)

        self._create(table, columns)
        for path in paths:
            unreadable = sniff(path)[0] == "python" or has_byte_order_mark(path)
            source = self._as_json(path, list(columns)) if unreadable else path
            origin = f"read_json({self._alias(source)}, {options})"
            rows = self._insert(table, path, f"SELECT {_casts(columns)} FROM {origin}")
            if source == path:
                self._mend_surrogates(table, path, rows, columns, empty)
            self._check_share(path, rows, self._empty_lines(table, path, rows, empty))

    def read_csv(
        self,
        table: str,
        paths: Sequence[Path],
        columns: Mapping[str, str],
        *,
        delimiter: str,
        header: bool = True,
        encoding: str = "utf-8",
        quote: str = "",
    ) -> None:
        """Make a table of delimited text, in file order.

        A line with another number of fields is rejected, and so is a line with a value of another
        type.

        Args:
            table: name of the table.
            paths: the files, read one after the other.
            columns: name → DuckDB type. With a header they are found by name; without one they are
                all columns of the file in its order.
            delimiter: the text between two fields.
            header: whether the first line names the columns.
            encoding: of the file.
            quote: the character around fields that hold the delimiter; "" for none, unless the
                header begins with a double quote.
        """
        self._create(table, columns)
        for path in paths:
            own_quote = quote or ('"' if header and first_line(path).startswith(b'"') else "")
            if header:
                names = _header(path, columns, delimiter, encoding, own_quote)
            else:
                names = list(columns)
            declared = ", ".join(f"{sql_text(name)}: 'VARCHAR'" for name in names)
            options = (
                f"auto_detect = false, columns = {{{declared}}}, delim = '{delimiter}', "
                f"header = {header}, quote = '{own_quote}', escape = '{own_quote}', "
                f"encoding = '{encoding}', strict_mode = true, max_line_size = {MAX_LINE}, "
                "store_rejects = true, rejects_limit = 0"
            )
            origin = f"read_csv({self._alias(path)}, {options})"
            rows = self._insert(table, path, f"SELECT {_casts(columns)} FROM {origin}")

            # A line can have several errors, in any order.
            found = self._run(REJECTED_LINES)
            self._run("DROP TABLE reject_errors; DROP TABLE reject_scans")
            rejected = [(line, _why_rejected(error, text)) for line, error, text in found]
            self._check_share(path, rows + len(rejected), rejected)

    def add_table(self, name: str, table: pa.Table) -> None:
        """Copy an Arrow table into the database, for sources that read their files themselves."""
        self.connection.register(f"{name}_arrow", table)
        self._run(f"CREATE TABLE {name} AS SELECT * FROM {name}_arrow")
        self.connection.unregister(f"{name}_arrow")

    def source_data(
        self,
        interactions: str,
        items: str | None = None,
        other_items: str | None = None,
        whole_catalogue: bool = False,
        timed: bool = True,
    ) -> SourceData:
        """Number the users and items of two SELECTs and return the source's data.

        The numbers are a permutation, drawn with the seed, of the names in sorted order. They carry
        no order and depend only on the names and the seed.

        Args:
            interactions: gives "user" VARCHAR, item VARCHAR, "time" BIGINT (seconds or
                milliseconds, null where there is none), position BIGINT (the table's `rowid`, which
                orders equal times).
            items: gives item VARCHAR, title VARCHAR, position BIGINT and any columns of
                METADATA_SCHEMA and semantic_id VARCHAR[]. If an item occurs twice, the first line
                with a title counts.
            other_items: gives the same, one line per item; what `items` leaves open is taken from
                there.
            whole_catalogue: whether items without interactions belong to the catalogue.
            timed: whether the source has times; if so, an interaction without one is rejected.

        Raises:
            UsageError: too many interactions are incomplete, or their times make no sense.
        """
        self._run(f"CREATE VIEW interaction AS {interactions}")
        self._run(f"CREATE VIEW item_line AS {items or NO_ITEMS}")
        accepted = self._reject_incomplete(timed)
        unit = self._time_unit(accepted) if timed else None

        # Names in sorted order, then in the order of the seed.
        user_names = f'SELECT "user" FROM interaction WHERE {accepted}'
        self._run(
            f"CREATE TABLE item_met AS SELECT DISTINCT item FROM interaction WHERE {accepted}"
        )
        self._check_metadata_matches()
        item_names = "SELECT item FROM item_met"
        if whole_catalogue:
            item_names += " UNION SELECT item FROM item_line WHERE coalesce(item, '') <> ''"
        for table, names in [("user_code", user_names), ("item_code", item_names)]:
            self._run(f"CREATE TABLE {table} AS {NUMBERED.format(names=names)}")
        if other_items:
            self._fill_in(other_items)
        self._choose_lines()
        user_order, users = self._shuffled("user_code", salt=0)
        item_order, item_ids = self._shuffled("item_code", salt=1)

        titles, semantic_ids = self._titles(item_order)
        numbered = self._interactions(accepted, unit, _inverse(user_order), _inverse(item_order))
        self._run(f"SET memory_limit = '{MEMORY_LEFT}'")
        return SourceData(
            titles=titles,
            semantic_ids=semantic_ids,
            interactions=numbered,
            item_names=item_ids,
            user_names=users,
            metadata=lambda ids: self._metadata(item_order[ids]),
            funnel=tuple(self.funnel),
        )

    # ---- files into tables

    def _run(self, sql: str) -> list[tuple[Any, ...]]:
        """Execute SQL; return all of its rows."""
        return self.connection.execute(sql).fetchall()

    def _inputs(self) -> str:
        return ", ".join(map(str, self.request.inputs))

    def _alias(self, path: Path) -> str:
        """Return the first arguments that SQL needs for a file.

        The file gets a link as its name, because DuckDB reads `*` and `[` in a path as patterns.
        """
        link = self._new_file("input")
        link.symlink_to(path.resolve())
        compression = "gzip" if is_gzip(path) else "none"
        return f"{sql_text(str(link))}, compression = '{compression}'"

    def _new_file(self, kind: str) -> Path:
        return self.scratch / f"{kind}-{len(list(self.scratch.iterdir()))}"

    def _create(self, table: str, columns: Mapping[str, str]) -> None:
        declared = ", ".join(f"{sql_name(name)} {kind}" for name, kind in columns.items())
        self._run(f"CREATE TABLE {table} ({declared})")

    def _insert(self, table: str, path: Path, select: str) -> int:
        """Append the rows of a file to a table; return their number."""
        begin = time.perf_counter()
        try:
            rows = int(self._run(f"INSERT INTO {table} {select}")[0][0])
        except duckdb.OutOfMemoryException as error:
            raise UsageError(
                f"{path}: a line does not fit into {MEMORY_LIMIT} of memory ({_brief(error)})"
            ) from error
        except duckdb.Error as error:
            if "maximum_object_size" in str(error):
                raise UsageError(f"{path}: a line is longer than 16 MiB: shorten it") from error
            advice = "; is it whole? download it again" if "GZIP" in str(error) else ""
            if "state machine" in str(error):
                advice = (
                    "; some lines seem to end in CR LF or CR and others in LF: sed 's/\\r$//' "
                    f"{path.name} > NEW.csv"
                )
            raise UsageError(f"{path}: cannot be read ({_brief(error)}){advice}") from error
        self.funnel.append({"step": f"read {path.name}", "rows": rows})
        _report(f"read {path}: {rows:,} rows in {time.perf_counter() - begin:.1f} s")
        return rows

    def _as_json(self, path: Path, keys: Sequence[str]) -> Path:
        """Write a file that DuckDB cannot read as JSON lines with these keys.

        A line that is no object becomes `!`, which is no JSON and is rejected later.
        """
        _report(
            f"{path} holds Python-dict lines or a byte order mark: turned into plain JSON lines "
            "first"
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

    def _mend_surrogates(
        self,
        table: str,
        path: Path,
        rows: int,
        columns: Mapping[str, str],
        empty: str,
    ) -> None:
        """Read lines with half a surrogate pair (half an emoji), which DuckDB takes for no JSON.

        The half becomes a question mark. A line that was cut inside an emoji is else a good line.
        """
        mended = []
        first = self._run(f"SELECT count(*) FROM {table}")[0][0] - rows
        for row, _, line in self._null_rows(table, path, rows, empty):
            found = parse_json(line) if b"\\ud" in line.lower() else None
            text = _json_text(found, list(columns))
            if text != "!":
                mended.append(f'{{"igd_row": {first + row}, "igd_line": {text}}}\n')
        if not mended:
            return

        kinds = ", ".join(f'"{name}" {kind}' for name, kind in _read_as(columns).items())
        target = self._new_file("json")
        target.write_text("".join(mended), encoding="utf-8", errors="replace")
        origin = (
            f"read_json('{target}', format = 'newline_delimited', columns = "
            f"{{'igd_row': 'BIGINT', 'igd_line': 'STRUCT({kinds})'}})"
        )
        chosen = ", ".join(f'"{name}" = mended."{name}"' for name in columns)
        self._run(
            f"UPDATE {table} SET {chosen} FROM (SELECT igd_row, {_casts(columns)} FROM "
            f"(SELECT igd_row, unnest(igd_line) FROM {origin})) AS mended "
            f"WHERE {table}.rowid = mended.igd_row"
        )

    def _empty_lines(self, table: str, path: Path, rows: int, empty: str) -> list[tuple[int, str]]:
        """Return (line number, what it holds) for the newest `rows` rows with nulls alone."""
        found = self._null_rows(table, path, rows, empty)
        return [(number, _what_is_wrong(line)) for _, number, line in found]

    def _null_rows(
        self, table: str, path: Path, rows: int, empty: str
    ) -> list[tuple[int, int, bytes]]:
        """Return (row of the file, line number, line) for the newest rows with nulls alone."""
        first = self._run(f"SELECT count(*) FROM {table}")[0][0] - rows
        null_rows = self._run(
            f"SELECT rowid FROM {table} WHERE rowid >= {first} AND {empty} ORDER BY rowid"
        )
        wanted = {row - first for (row,) in null_rows}
        if not wanted:
            return []

        found = []
        with open_raw(path) as lines:
            row = -1
            for number, line in enumerate(lines, start=1):
                if not line.strip():  # DuckDB skips blank lines
                    continue
                row += 1
                if row in wanted:
                    found.append((row, number, line))
        return found

    def _check_share(self, path: Path, rows: int, rejected: list[tuple[int, str]]) -> None:
        """Add rejected lines to the funnel.

        Raises:
            UsageError: there are too many of them.
        """
        if not rejected:
            return
        listed = "; ".join(f"line {number}: {what}" for number, what in rejected[:MAX_LISTED])
        if len(rejected) > self.request.max_bad_lines * rows:
            raise UsageError(
                f"{path}: {len(rejected):,} of {rows:,} lines cannot be used "
                f"({len(rejected) / rows:.2%}, --max_bad_lines allows "
                f"{self.request.max_bad_lines:.2%}): {listed}"
            )
        step = f"broken lines in {path.name}: {listed}"
        self.funnel.append({"step": step, "rows": len(rejected)})

    # ---- tables into numbers

    def _reject_incomplete(self, timed: bool) -> str:
        """Count interactions without user, item or time; return the SQL condition of the others."""
        accepted = NOT_EMPTY + (' AND "time" IS NOT NULL' if timed else "")
        rows, no_user, no_item, no_time, incomplete = self._run(
            COUNT_INCOMPLETE.format(accepted=accepted)
        )[0]
        no_time = no_time if timed else 0
        described = f"without user {no_user:,}, item {no_item:,}, time {no_time:,}"
        if incomplete == rows or incomplete > self.request.max_bad_lines * rows:
            raise UsageError(
                f"{self._inputs()}: {incomplete:,} of {rows:,} interactions cannot be used "
                f"({described}); --max_bad_lines allows {self.request.max_bad_lines:.2%}"
            )
        if incomplete:
            self.funnel.append({"step": f"rejected, {described}", "rows": incomplete})
        return accepted

    def _time_unit(self, accepted: str) -> int:
        """Return how many of the source's units make a second: 1 or 1000."""
        span = TIME_SPAN.format(millisecond=EARLIEST_MILLISECOND, accepted=accepted)
        low, high, fine, timed = self._run(span)[0]
        if low < 0 or high >= LATEST_MILLISECOND or 0 < fine < timed:
            raise UsageError(
                f"{self._inputs()}: timestamps span {low} to {high}; {timed - fine:,} look like "
                f"seconds and {fine:,} like milliseconds since 1970: all must be of one kind, not "
                "negative, and before the year 5138"
            )
        return 1000 if fine else 1

    def _fill_in(self, other_items: str) -> None:
        """Put what `other_items` says of an item into the gaps of item_line."""
        self._run("ALTER VIEW item_line RENAME TO given_line")
        self._run(f"CREATE VIEW other_line AS {other_items}")
        values: dict[str, list[str]] = {}
        for view in ("given_line", "other_line"):
            for name, kind, *_ in self._run(f"DESCRIBE {view}"):
                value = f"{view}.{name}"
                value = f"nullif({value}, '')" if kind == "VARCHAR" else value
                values.setdefault(name, []).append(value)

        own_title, other_title = values["title"]
        values["title"] = [own_title, TITLE_OF_NO_LINE.format(own=own_title, other=other_title)]
        chosen = [
            f"coalesce({', '.join(found)}) AS {name}"
            for name, found in values.items()
            if name not in ("item", "position")
        ]
        self._run(FILLED_IN.format(columns=", ".join(chosen)))

    def _choose_lines(self) -> None:
        """Make the table item_chosen: per item the first metadata line with a title.

        The funnel counts the items without metadata and the items with repeated lines.
        """
        self._run(CHOOSE_LINES)
        found, repeated, differing = self._run(COUNT_CHOSEN)[0]
        missing = self._run("SELECT count(*) FROM item_code")[0][0] - found
        notes = (
            f"{missing:,} without, {repeated:,} on several lines, {differing:,} with several titles"
        )
        self.funnel.append({"step": f"items with metadata ({notes})", "items": found})

    def _check_metadata_matches(self) -> None:
        """Compare the ids of the metadata with those of the interactions.

        A warning is printed if most items with interactions have no metadata.

        Raises:
            UsageError: no item with interactions has metadata, and there are lines of it.
        """
        met, known, item = self._run(COUNT_KNOWN)[0]
        example, lines = self._run("SELECT min(item), count(*) FROM item_line")[0]
        if not lines or 2 * known >= met:
            return

        ids = f"ids there are such as {example!r}, here such as {item!r}"
        if not known:
            raise UsageError(
                f"{self._inputs()}: none of the {lines:,} lines of metadata has the id of an item "
                f"with interactions: {ids}; write both alike, or leave the metadata out"
            )
        _report(f"warning: only {known:,} of {met:,} items with interactions have metadata; {ids}")

    def _shuffled(self, table: str, salt: int) -> tuple[np.ndarray, pa.Array]:
        """Return an order and the names in this order.

        The new number k belongs to the name that sorts `order[k]`-th.
        """
        found = self.connection.sql(f"SELECT name FROM {table} ORDER BY code").to_arrow_table()
        names = found["name"].combine_chunks()
        rng = np.random.default_rng([self.request.seed, salt])
        order = rng.permutation(len(names)).astype(np.int32)
        return order, names.take(pa.array(order))

    def _item_columns(self) -> list[str]:
        return [row[0] for row in self._run("DESCRIBE item_line")]

    def _titles(self, item_order: np.ndarray) -> tuple[list[str | None], list[list[str]] | None]:
        has_column = "semantic_id" in self._item_columns()
        codes = "semantic_id" if has_column else "NULL::VARCHAR[] AS semantic_id"
        found = self.connection.sql(
            f"SELECT title, {codes} FROM item_code {WITH_CHOSEN_LINE} ORDER BY item_code.code"
        ).to_arrow_table()
        table = found.combine_chunks().take(pa.array(item_order))
        has_codes = table["semantic_id"].null_count < len(table)
        return table["title"].to_pylist(), table["semantic_id"].to_pylist() if has_codes else None

    def _metadata(self, codes: np.ndarray) -> pa.Table:
        """Return the metadata columns of items that are given by their place in sorted order."""
        given = self._item_columns()
        names = [name for name in METADATA_SCHEMA.names if name in given]
        wanted = {"code": pa.array(codes), "place": pa.array(np.arange(len(codes)))}
        self.connection.register("wanted", pa.table(wanted))
        found = self.connection.sql(
            f"SELECT {', '.join(['place', *names])} FROM wanted {WITH_CHOSEN_LINE} ORDER BY place"
        ).to_arrow_table()
        self.connection.unregister("wanted")
        return found.select(names).cast(pa.schema([METADATA_SCHEMA.field(name) for name in names]))

    def _interactions(
        self, accepted: str, unit: int | None, user_number: np.ndarray, item_number: np.ndarray
    ) -> Interactions:
        """Fetch the accepted interactions in file order, with new numbers and times in seconds.

        `unit` is the number of the source's time units in a second, or None without times.
        """
        rows = self._run("SELECT max(position) + 1 FROM interaction")[0][0]
        users, items = np.empty(rows, np.int32), np.empty(rows, np.int32)
        times = np.empty(rows, np.int64) if unit else None
        present = np.zeros(rows, bool)

        batches = self.connection.sql(
            ACCEPTED_INTERACTIONS.format(accepted=accepted)
        ).to_arrow_reader(FETCH_ROWS)
        for batch in batches:
            place = batch.column("position").to_numpy()
            users[place] = user_number[batch.column("user_place").to_numpy()]
            items[place] = item_number[batch.column("item_place").to_numpy()]
            present[place] = True
            if times is not None:
                times[place] = batch.column("time").to_numpy()

        interactions = Interactions(users, items, times)
        if not present.all():
            interactions = interactions.take(present)
        if unit == 1000 and interactions.timestamps is not None:
            # Within a second the milliseconds decide the order; from here on the position says it.
            interactions = interactions.take(np.argsort(interactions.timestamps, kind="stable"))
            assert interactions.timestamps is not None
            interactions.timestamps[:] //= 1000
        return interactions


def _read_as(columns: Mapping[str, str]) -> dict[str, str]:
    """Return the types as which columns of JSON lines are read before they are cast."""
    nested = {name: "[" in kind or kind == "JSON" for name, kind in columns.items()}
    return {name: "JSON" if is_nested else "VARCHAR" for name, is_nested in nested.items()}


def _casts(columns: Mapping[str, str]) -> str:
    """Return the SQL that casts text columns to their types; what cannot be cast becomes null."""
    return ", ".join(
        f"try_cast({sql_name(name)} AS {kind}) AS {sql_name(name)}"
        for name, kind in columns.items()
    )


def _why_rejected(error: str, line: str) -> str:
    """Return why DuckDB rejects a line of delimited text, and its beginning."""
    if "UNICODE" in error or "ENCOD" in error:
        return not_utf8(line.encode())
    return f"{error.lower()}: {shown(line.encode())}"


def _what_is_wrong(line: bytes) -> str:
    """Return why a line is rejected, and its beginning."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return not_utf8(line)
    return f"no such object: {shown(line)}"


def _header(
    path: Path, columns: Iterable[str], delimiter: str, encoding: str, quote: str
) -> list[str]:
    """Return the columns that the first line of a file names.

    Raises:
        UsageError: the line is blank, lacks one of `columns`, or names a column twice.
    """
    with open_raw(path) as lines:
        if not lines.readline().strip():
            raise UsageError(f"{path}: the first line is blank, and should be the header")
    text = first_line(path).decode(encoding, "replace").removeprefix("\ufeff")
    if quote and len(delimiter) == 1:
        names = [name.strip() for name in next(csv.reader([text], delimiter=delimiter))]
    else:
        names = [name.strip() for name in text.split(delimiter)]
    # pandas writes its index under no name.
    names = [name or f"column {place + 1}" for place, name in enumerate(names)]
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


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:300]


def _json_text(found: Mapping[Any, Any] | None, keys: Sequence[str]) -> str:
    """Return these keys of an object as JSON, or `!` if that is impossible or empty."""
    kept = {key: found[key] for key in keys if key in found} if found else None
    try:
        return json.dumps(kept, ensure_ascii=False) if kept else "!"
    except (TypeError, ValueError, RecursionError):
        return "!"


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
