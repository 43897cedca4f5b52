"""Datasets from Python: tables in memory (pandas, polars, Arrow) or files (`igd prepare`)."""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.prepare import DatasetRequest
from igd_ds.data.prepare import prepare as prepare_dataset
from igd_ds.data.protocols import DEFAULTS, PROTOCOLS, ProtocolOptions
from igd_ds.errors import UsageError, did_you_mean


def prepare(
    interactions: Any,
    output: str | os.PathLike[str],
    *,
    items: Any = None,
    columns: Mapping[str, str] | None = None,
    time_format: str = "",
    protocol: str = "leave-one-out",
    domain: str = "items",
    titles: str = "placeholder",
    max_bad_lines: float = 0.001,
    license: str = "",
    source_url: str = "",
    **options: Any,
) -> InteractionDataset:
    """Make a dataset folder from a table of interactions, and open it.

    The columns are found by the names that `igd prepare --source csv --help` lists. A second call
    with the same tables and options opens the folder that the first one made.

    Args:
        interactions: a table with users, items and, where they are known, times and titles: a
            pandas or polars DataFrame, an Arrow table, or the path of a CSV, TSV, Parquet or JSON
            lines file.
        output: the folder to make.
        items: a table with one line per item, if there is one; all its items belong to the
            catalogue.
        columns: field → column, where the names do not tell: {"user": "kunde"}.
        time_format: how times are written, as strptime spells it; "" recognises numbers and ISO
            dates.
        protocol: how interactions become rows, a name in PROTOCOLS.
        domain: plural noun for the items in prompts.
        titles: policy for titles, see igd_ds/data/hygiene.py.
        max_bad_lines: share of the lines, 0 to 1, that may be left out because they have no user,
            item or time that can be read.
        license: licence of the source, for dataset.json and the data card.
        source_url: page of the source, for dataset.json and the data card.
        options: fields of ProtocolOptions, such as max_history=20 or k_core=5.

    Raises:
        UsageError: columns or times cannot be told, an option is unknown, or `output` holds
            something else.

    Example:
        >>> import igd_ds, pandas
        >>> dataset = igd_ds.prepare(pandas.read_csv("shop.csv"), "DATASET", domain="products")
        >>> len(dataset.splits["test"])
    """
    if protocol not in PROTOCOLS:
        raise UsageError(
            f"protocol {protocol!r}{did_you_mean(protocol, PROTOCOLS)}: must be one of "
            f"{', '.join(PROTOCOLS)}"
        )
    known = ProtocolOptions.__dataclass_fields__
    for name in options:
        if name not in known:
            raise UsageError(
                f"unknown option {name}{did_you_mean(name, known)} (options: {', '.join(known)})"
            )

    output = Path(output)
    tables = {"interactions": interactions} | ({} if items is None else {"items": items})
    with tempfile.TemporaryDirectory() as folder:
        inputs = [_as_file(table, Path(folder), name) for name, table in tables.items()]
        request = DatasetRequest(
            source="csv",
            inputs=inputs,
            protocol=protocol,
            options=ProtocolOptions(**DEFAULTS[protocol] | options),
            output=output,
            name=output.resolve().name,
            domain=domain,
            titles=titles,
            max_bad_lines=max_bad_lines,
            columns=columns or {},
            time_format=time_format,
            license=license,
            source_url=source_url,
        )
        with _naming_tables(Path(folder)):
            prepare_dataset(request)
    return InteractionDataset.load(output)


@contextmanager
def _naming_tables(folder: Path) -> Iterator[None]:
    """Let a UsageError name a table in memory as the argument that it is."""
    try:
        yield
    except UsageError as error:
        path = rf"{re.escape(str(folder))}/(\w+)\.parquet"
        raise UsageError(re.sub(path, r"\1", str(error))) from error


def _as_file(table: Any, folder: Path, name: str) -> Path:
    """Return the path of a table: its own, or that of a Parquet file made of it."""
    if isinstance(table, str | os.PathLike):
        return Path(table)
    try:
        arrow = pa.table(table)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise UsageError(
            f"{name}: a {type(table).__name__} is no table ({error}): give a DataFrame of pandas "
            "or polars, an Arrow table or the path of a file"
        ) from error
    path = folder / f"{name}.parquet"
    pq.write_table(arrow, path)
    return path
