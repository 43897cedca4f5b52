"""From raw files to a dataset folder: source, titles, protocol, files and data card.

`igd prepare` is the command of this module. Nothing is ever overwritten or left half written:
`prepare` works in a folder beside the output and renames it when it is complete. If the output
exists already and was made from the same files and options, `prepare` does nothing; otherwise it
refuses.
"""

import glob
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from igd_ds.data.dataset import (
    VERSION,
    FunnelStep,
    SourceData,
    item_table,
    read_info,
    user_table,
    write_dataset,
)
from igd_ds.data.hygiene import clean_titles
from igd_ds.data.protocols import PROTOCOLS, ProtocolOptions, Rows, date, warn_of_losses
from igd_ds.data.raw import RawReader
from igd_ds.data.raw_files import RawRequest
from igd_ds.data.sources import SOURCES, find_files
from igd_ds.errors import UsageError
from igd_ds.folders import differing, forget_lock, is_free, sha256_of
from igd_ds.items.shared_paths import MAX_ITEMS_PER_PATH, SharedPaths

DROPPING = ("drop", "d3")  # the title policies that remove items


@dataclass(frozen=True)
class DatasetRequest:
    """Which dataset to make, and from what.

    Example:
        >>> options = ProtocolOptions(max_history=20, k_core=0)
        >>> prepare(DatasetRequest("synthetic", [], "leave-one-out", options, Path("DATASET"),
        ...                        name="toy", domain="books"))
    """

    source: str
    """A name in igd_ds/data/sources/__init__.py."""
    inputs: Sequence[Path]
    """Files, or folders that hold them."""
    protocol: str
    """A name in PROTOCOLS."""
    options: ProtocolOptions
    output: Path
    """The folder to make."""
    name: str
    """The name of the dataset."""
    domain: str
    """Plural noun for the items in prompts."""
    titles: str = "placeholder"
    """A policy of igd_ds/data/hygiene.py."""
    num_items: int = 0
    """Items of synthetic data; 0 takes the default."""
    max_bad_lines: float = 0.001
    """Share of the lines that may be rejected."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Source csv: field → column, where the names do not tell."""
    time_format: str = ""
    """Source csv: how times are written, as strptime spells it."""
    license: str = ""
    """The licence of the source, such as CC BY 4.0."""
    source_url: str = ""
    """The page of the source."""
    preset: str | None = None
    """The preset that the options come from."""
    preset_url: str = ""
    """The page of the preset's source, which stands in where `source_url` is empty."""
    expected: Mapping[str, int] = field(default_factory=dict)
    """The counts that the preset's paper prints."""


def prepare(wanted: DatasetRequest) -> dict[str, Any]:
    """Make the dataset folder, unless it exists already; return its dataset.json.

    Raises:
        UsageError: bad input, or the output exists and is another dataset.
    """
    if not 0 <= wanted.max_bad_lines < 1:
        raise UsageError(f"--max_bad_lines {wanted.max_bad_lines}: a share, from 0 to below 1")
    files = find_files(wanted.source, wanted.inputs)
    paths = [path for found in files.values() for path in found]
    info = _request_info(wanted)

    with ThreadPoolExecutor(1) as background:
        # Hashing runs beside the reading: it takes as long as the disk needs for the files.
        hashes = background.submit(_hashes, paths)
        if not is_free(wanted.output):
            return _finished(wanted.output, info | {"sources": hashes.result()})

        data, rows, items, title_report = _rows_and_items(wanted, files, paths)
        warn_of_shared_paths(items, title_report)
        users = user_table(rows.splits, data.user_names)

        found = _found_counts(rows)
        catalogue = {"items": len(items), "cold_items": _num_cold_items(rows)}
        info |= {
            "sources": hashes.result(),
            "funnel": [*data.funnel, *_title_steps(title_report), *rows.funnel],
            "counts": rows.counts | {"catalogue": catalogue},
            "expected": {key: [number, found[key]] for key, number in wanted.expected.items()},
            "hygiene": title_report,
        }
        if wanted.preset_url:
            info = {"source_url": wanted.preset_url} | info
        write_dataset(wanted.output, items, users, rows.splits, info)
    return read_info(wanted.output)


def _request_info(wanted: DatasetRequest) -> dict[str, Any]:
    """Return the part of dataset.json that follows from the request alone."""
    start, end = (None if second is None else date(second) for second in wanted.options.window)
    parameters = {
        "source": wanted.source,
        "preset": wanted.preset,
        "titles": wanted.titles,
        "num_items": wanted.num_items,
        "max_bad_lines": wanted.max_bad_lines,
        **({"columns": dict(wanted.columns)} if wanted.columns else {}),
        **({"time_format": wanted.time_format} if wanted.time_format else {}),
        "ties": "file position",
        **vars(wanted.options),
        "window": [start, end],
        "min_items": wanted.options.min_items if wanted.protocol == "d3" else None,
    }
    return {
        "name": wanted.name,
        "domain": wanted.domain,
        "protocol": wanted.protocol,
        "parameters": parameters,
        "version": VERSION,
        **({"license": wanted.license} if wanted.license else {}),
        **({"source_url": wanted.source_url} if wanted.source_url else {}),
    }


def _hashes(paths: Sequence[Path]) -> list[dict[str, str]]:
    return [{"path": path.name, "sha256": sha256_of(path)} for path in paths]


def _rows_and_items(
    wanted: DatasetRequest, files: Mapping[str, list[Path]], paths: Sequence[Path]
) -> tuple[SourceData, Rows, pa.Table, dict[str, Any]]:
    """Read the source and apply titles and protocol.

    Returns:
        The source's data (without interactions), the rows, the table of items.parquet and the
        report on the titles.
    """
    request = RawRequest(
        inputs=tuple(paths),
        seed=wanted.options.seed,
        num_items=wanted.num_items,
        num_users=wanted.options.num_users,
        max_bad_lines=wanted.max_bad_lines,
        columns=wanted.columns,
        time_format=wanted.time_format,
    )
    with _scratch(wanted.output) as scratch, RawReader(request, scratch) as raw:
        data = SOURCES[wanted.source].read(raw, files)
        data, origin, report = apply_titles(data, wanted.titles)
        rows = PROTOCOLS[wanted.protocol](data, wanted.options)

        # Writing needs the memory that the interactions take.
        data = replace(data, interactions=data.interactions.take(np.arange(0)))
        items = _kept_item_table(data, rows, origin)
    return data, rows, items, report


def apply_titles(data: SourceData, policy: str) -> tuple[SourceData, np.ndarray, dict[str, Any]]:
    """Clean the titles and remove the items that the policy drops.

    Returns:
        The data; per item the number that the source's data had for it, int64 (N,); the report for
        dataset.json.

    Raises:
        UsageError: no item has a title and the policy needs one, or the policy removes items of
            rows that must stay as they are.
    """
    origin = np.arange(len(data.titles), dtype=np.int64)
    if all(title is None for title in data.titles):
        if data.semantic_ids is None and policy != "verbatim":
            raise UsageError(
                "no item has a title: give the file of metadata too, or --titles verbatim for a "
                "dataset without titles"
            )
        return data, origin, {"policy": "no titles"}

    titles, report = clean_titles(data.titles, policy)
    usable = np.array([title is not None for title in titles])
    if policy not in DROPPING or usable.all():
        return replace(data, titles=titles), origin, report
    if data.splits is not None:
        raise UsageError(
            f"--titles {policy} removes items, but the source's rows must stay as they are; use "
            "--titles placeholder"
        )

    warn_of_losses({"items": len(usable)}, {"items": int(usable.sum())}, f"--titles {policy}")
    origin = origin[usable]
    kept = data.interactions.take(usable[data.interactions.items])
    numbers = np.cumsum(usable, dtype=np.int32) - 1
    data = replace(
        data,
        titles=[titles[item] for item in origin],
        semantic_ids=_chosen(data.semantic_ids, origin),
        interactions=replace(kept, items=numbers[kept.items]),
    )
    return data, origin, report


def warn_of_shared_paths(items: pa.Table, title_report: Mapping[str, Any]) -> None:
    """Warn where many items have one title or one semantic ID: a model cannot tell them apart.

    Args:
        items: the table of items.parquet.
        title_report: what `clean_titles` reports.
    """
    warnings = []
    if title_report.get("items_sharing_a_title", 0) > MAX_ITEMS_PER_PATH:
        warnings.append(SharedPaths.of_texts(items["title"].to_pylist()).warning("title"))
    if items["semantic_id"].null_count < len(items):
        codes = [
            None if entry is None else " ".join(entry) for entry in items["semantic_id"].to_pylist()
        ]
        warnings.append(SharedPaths.of_texts(codes).warning("semantic ID"))
    for warning in filter(None, warnings):
        print(warning, file=sys.stderr)


def _chosen(
    semantic_ids: Sequence[list[str]] | None, items: np.ndarray
) -> Sequence[list[str]] | None:
    return None if semantic_ids is None else [semantic_ids[item] for item in items]


def _kept_item_table(data: SourceData, rows: Rows, origin: np.ndarray) -> pa.Table:
    """Return the table of items.parquet for the items that the protocol kept."""
    kept = rows.kept_items
    source_items = origin[kept]
    if data.item_names is None:
        names = pa.array(source_items).cast(pa.string())
    else:
        names = data.item_names.take(pa.array(source_items))
    metadata = data.metadata(source_items) if data.metadata else None
    titles = [data.titles[item] for item in kept]
    semantic_ids = _chosen(data.semantic_ids, kept)
    if semantic_ids is not None:
        _refuse_missing_ids(semantic_ids, names)
    return item_table(titles, semantic_ids, names, metadata)


def _refuse_missing_ids(semantic_ids: Sequence[list[str] | None], names: pa.Array) -> None:
    """Raise UsageError if some items have a semantic ID and others do not."""
    named = zip(semantic_ids, names.to_pylist(), strict=True)
    missing = [name for codes, name in named if not codes]
    if missing:
        listed = ", ".join(map(repr, missing[:5]))
        raise UsageError(
            f"{len(missing):,} of {len(semantic_ids):,} items have no semantic ID, such as "
            f"{listed}: give one to every item, or leave the column out"
        )


def _title_steps(report: Mapping[str, Any]) -> list[FunnelStep]:
    unusable = report.get("unusable", {}).get("count", 0)
    if not unusable:
        return []
    what = "left out" if report["policy"] in DROPPING else "given a placeholder"
    return [{"step": f"items without a usable title, {what}", "items": unusable}]


def _num_cold_items(rows: Rows) -> int:
    seen = np.zeros(len(rows.kept_items), dtype=bool)
    seen[rows.splits["train"]["target"].to_numpy()] = True
    return int(np.count_nonzero(~seen))


def _found_counts(rows: Rows) -> FunnelStep:
    """Return the counts by the names that presets use."""
    sizes = [step for step in rows.funnel if "interactions" in step and "users" in step]
    found = dict(sizes[-1]) if sizes else {}
    found |= {name: table.num_rows for name, table in rows.splits.items()}
    found["items"] = len(rows.kept_items)
    return found


def _finished(output: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dataset.json of an existing output if it was made from the same request.

    Raises:
        UsageError: the output is another dataset.
    """
    forget_lock(output)
    info = read_info(output)
    asked = json.loads(json.dumps(asked))
    if different := differing(info, asked):
        detail = "; ".join(
            f"{key}: there {json.dumps(info.get(key))}, asked {json.dumps(asked[key])}"
            for key in different
        )
        raise UsageError(
            f"{output} holds another dataset ({detail}); delete it or choose another --output"
        )
    print(f"{output} is complete and was made from the same input and options: nothing to do")
    return info


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """Yield an empty folder beside the output, which is removed at the end.

    Folders that killed processes left for the same output are removed first.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    for stale in output.parent.glob(f"{glob.escape(output.name)}.*-*"):
        kind, _, process = stale.name.removeprefix(f"{output.name}.").partition("-")
        is_ours = kind in ("scratch", "tmp") and process.isdigit()
        if is_ours and not Path(f"/proc/{process}").exists():
            print(f"removing {stale}, left by a process that was killed", file=sys.stderr)
            shutil.rmtree(stale)

    scratch = output.with_name(f"{output.name}.scratch-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process that had our number
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
