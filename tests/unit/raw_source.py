"""For tests of the sources: read raw files, and name what was read as the source does."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from igd_ds.data.dataset import METADATA_SCHEMA, SourceData
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import RawRequest
from igd_ds.data.sources import SOURCES, find_files
from igd_ds.errors import UsageError


@contextmanager
def reading(name: str, inputs: Sequence[Path], **options) -> Iterator[SourceData]:
    """Yield the data that source `name` reads from `inputs`.

    Its metadata needs the reader, so the data can be used inside of the `with` block only.
    """
    files = find_files(name, inputs)
    request = RawRequest(tuple(path for paths in files.values() for path in paths), **options)
    with tempfile.TemporaryDirectory() as scratch, RawReader(request, Path(scratch)) as raw:
        yield SOURCES[name].read(raw, files)


def events_of(data: SourceData) -> list[tuple]:
    """Return (user, item, time or None) in the data's order, by the source's names."""
    users, items = data.user_names.to_pylist(), data.item_names.to_pylist()
    found = data.interactions
    times = [None] * len(found) if found.timestamps is None else found.timestamps.tolist()
    return [
        (users[u], items[i], t)
        for u, i, t in zip(found.users.tolist(), found.items.tolist(), times, strict=True)
    ]


def items_of(data: SourceData) -> dict[str, tuple]:
    """Return source id → (title, semantic ID, description, categories, brand, price).

    What an item does not have is None.
    """
    table = data.metadata(np.arange(len(data.titles)))
    nothing = [None] * len(data.titles)
    columns = [
        table[name].to_pylist() if name in table.column_names else nothing
        for name in METADATA_SCHEMA.names
    ]
    codes = data.semantic_ids or nothing
    return dict(
        zip(
            data.item_names.to_pylist(), zip(data.titles, codes, *columns, strict=True), strict=True
        )
    )


def refused_or_read(name: str, inputs: Sequence[Path]) -> None:
    """Check that files give consistent data, or a UsageError that names one of them (for fuzz)."""
    try:
        with reading(name, inputs) as data:
            events, items = events_of(data), items_of(data)
    except UsageError as error:
        assert any(path.name in str(error) for path in inputs), error
    else:
        assert events and {item for _, item, _ in events} <= items.keys()
