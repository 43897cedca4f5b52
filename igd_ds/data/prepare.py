"""From raw files to a dataset folder: source → titles → protocol → files and data card (igd prepare is its command).

Nothing is ever overwritten or half-written: work goes on in a folder beside the output, which is renamed when complete. Asked for
an output that exists, `prepare` does nothing if it was made from the same files and options, and refuses otherwise.
"""

import glob
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from igd_ds.data.dataset import (
    VERSION,
    SourceData,
    item_table,
    read_info,
    sha256_of,
    user_table,
    write_dataset,
)
from igd_ds.data.hygiene import clean_titles
from igd_ds.data.protocols import PROTOCOLS, ProtocolOptions, Rows, date
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import RawRequest
from igd_ds.data.sources import SOURCES, find_files
from igd_ds.errors import UsageError

DROPPING = ("drop", "d3")  # title policies that remove items


@dataclass(frozen=True)
class DatasetRequest:
    """What dataset is wanted. `titles`: a policy of igd_ds/data/hygiene.py; `expected`: counts to print beside those found."""

    source: str
    inputs: Sequence[Path]
    protocol: str
    options: ProtocolOptions
    output: Path
    name: str
    domain: str
    titles: str = "placeholder"
    num_items: int = 0
    max_bad_lines: float = 0.001
    preset: str | None = None
    expected: dict[str, int] | None = None


def prepare(wanted: DatasetRequest) -> dict:
    """Make the dataset folder, or find it made already; return its dataset.json. Raises ValueError on bad input."""
    files = find_files(wanted.source, wanted.inputs)
    paths = [path for found in files.values() for path in found]
    start, end = (None if second is None else date(second) for second in wanted.options.window)
    with ThreadPoolExecutor(1) as background:
        hashes = background.submit(
            lambda: [{"path": path.name, "sha256": sha256_of(path)} for path in paths]
        )
        info = {
            "name": wanted.name,
            "domain": wanted.domain,
            "protocol": wanted.protocol,
            "parameters": {
                "source": wanted.source,
                "preset": wanted.preset,
                "titles": wanted.titles,
            }
            | {
                "num_items": wanted.num_items,
                "max_bad_lines": wanted.max_bad_lines,
                "ties": "file position",
            }
            | vars(wanted.options)
            | {
                "window": [start, end],
                "min_items": wanted.options.min_items if wanted.protocol == "d3" else None,
            },
            "version": VERSION,
        }
        if wanted.output.exists():
            return _finished(wanted.output, info | {"sources": hashes.result()})
        source_request = RawRequest(
            tuple(paths),
            wanted.options.seed,
            wanted.num_items,
            wanted.options.num_users,
            wanted.max_bad_lines,
        )
        with _scratch(wanted.output) as scratch, RawReader(source_request, scratch) as raw:
            data = SOURCES[wanted.source].read(raw, files)
            data, origin, report = apply_titles(data, wanted.titles)
            rows = PROTOCOLS[wanted.protocol](data, wanted.options)
            data = replace(
                data, interactions=data.interactions.take(np.arange(0))
            )  # the memory is needed for writing
            items = _items(data, rows, origin)
        users = user_table(rows.splits, data.user_names)
        found = _found(rows)
        counts = rows.counts | {"catalogue": {"items": len(items), "cold_items": _cold_items(rows)}}
        info |= {
            "sources": hashes.result(),
            "funnel": [*data.funnel, *_title_steps(report), *rows.funnel],
            "counts": counts,
            "expected": {
                key: [number, found[key]] for key, number in (wanted.expected or {}).items()
            },
            "hygiene": report,
        }
        write_dataset(wanted.output, items, users, rows.splits, info)
    return read_info(wanted.output)


def apply_titles(data: SourceData, policy: str) -> tuple[SourceData, np.ndarray, dict]:
    """Clean the titles; return (data, per item which of the source's it was, int64 (N,), report for dataset.json).

    Raises ValueError when no item has a title and the policy needs one, or when a policy removes items of rows that are given.
    """
    origin = np.arange(len(data.titles), dtype=np.int64)
    if all(title is None for title in data.titles):
        if data.semantic_ids is None and policy != "verbatim":
            raise UsageError(
                "no item has a title: give the file of metadata too, or --titles verbatim for a dataset without"
            )
        return data, origin, {"policy": "no titles"}
    titles, report = clean_titles(data.titles, policy)
    if policy not in DROPPING:
        return replace(data, titles=titles), origin, report
    usable = np.array([title is not None for title in titles])
    if usable.all():
        return replace(data, titles=titles), origin, report
    if data.splits is not None:
        raise UsageError(
            f"--titles {policy} removes items, and the source's rows are to stay as they are; use placeholder"
        )
    origin = origin[usable]
    kept = data.interactions.take(usable[data.interactions.items])
    numbers = np.cumsum(usable, dtype=np.int32) - 1
    semantic_ids = data.semantic_ids and [data.semantic_ids[i] for i in origin]
    interactions = replace(kept, items=numbers[kept.items])
    titles = [titles[i] for i in origin]
    return (
        replace(data, titles=titles, semantic_ids=semantic_ids, interactions=interactions),
        origin,
        report,
    )


def _items(data: SourceData, rows: Rows, origin: np.ndarray) -> pa.Table:
    """Return items.parquet's table for the items that the protocol kept."""
    kept = rows.kept_items
    semantic_ids = data.semantic_ids and [data.semantic_ids[i] for i in kept]
    source = origin[kept]
    names = (
        pa.array(source).cast(pa.string())
        if data.item_names is None
        else data.item_names.take(pa.array(source))
    )
    metadata = data.metadata(source) if data.metadata else None
    return item_table([data.titles[i] for i in kept], semantic_ids, names, metadata)


def _title_steps(report: dict) -> list[dict]:
    unusable = report.get("unusable", {}).get("count", 0)
    what = "left out" if report["policy"] in DROPPING else "given a placeholder"
    return (
        [{"step": f"items without a usable title, {what}", "items": unusable}] if unusable else []
    )


def _cold_items(rows: Rows) -> int:
    seen = np.zeros(len(rows.kept_items), dtype=bool)
    seen[rows.splits["train"]["target"].to_numpy()] = True
    return int(np.count_nonzero(~seen))


def _found(rows: Rows) -> dict[str, int]:
    """Counts by the names that presets use."""
    sizes = [step for step in rows.funnel if "interactions" in step and "users" in step]
    splits = {name: table.num_rows for name, table in rows.splits.items()}
    return (sizes[-1] if sizes else {}) | splits | {"items": len(rows.kept_items)}


def _finished(output: Path, asked: dict) -> dict:
    """Return the dataset.json of an existing output that was made from the same request, else raise ValueError."""
    info = read_info(output)
    asked = json.loads(json.dumps(asked))
    different = [key for key in asked if asked[key] != info[key]]
    if different:
        detail = "; ".join(
            f"{key}: there {json.dumps(info[key])}, asked {json.dumps(asked[key])}"
            for key in different
        )
        raise UsageError(
            f"{output} holds another dataset ({detail}); delete it or choose another --output"
        )
    print(f"{output} is complete and was made from the same input and options: nothing to do")
    return info


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """Yield an empty folder beside the output, removed in the end; remove those that killed runs left."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for stale in output.parent.glob(f"{glob.escape(output.name)}.*-*"):
        kind, _, process = stale.name.removeprefix(f"{output.name}.").partition("-")
        if (
            kind in ("scratch", "tmp")
            and process.isdigit()
            and not Path(f"/proc/{process}").exists()
        ):
            print(f"removing {stale}, left by a run that was killed", file=sys.stderr)
            shutil.rmtree(stale)
    scratch = output.with_name(f"{output.name}.scratch-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed run that had our process id
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
