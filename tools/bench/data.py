"""Benchmark: raw files to the canonical dataset, against the approach of the published scripts.

    python tools/bench/data.py [--quick] [--reviews 50000000] [--scratch FOLDER]

Recipe: synthetic Amazon 2018 reviews and metadata (`_raw_files.py`, seed 0: about 480 bytes per
review, 0.3 users and 1/17 items per review), protocol d3 with the published title rule, the window
2017-10-01 to 2018-11-01, and 5-core. The window must hold reviews / 500 items, at most the
published 10,000, so that it moves back at small sizes as it does for real categories.

Our side is the code of `igd prepare`, including the sha256 of the sources and the data card. Every
measurement is a new process with its own peak memory, and imports are not timed. Our side reads
uncompressed files and then the same files as gzip (one member, level 1); the table also has the
time that Python's gunzip alone takes. The plain side (`_published_data.py`) reads the uncompressed
files and writes CSV. The rows of both sides are compared in order and name by name (user, history,
target, time), and so are the titles of the items. The dataset from gzip must have the same bytes.

The other formats hold as many reviews in files of their own form. They run with leave-one-out and
5-core, one after the other in one process. Two differ: d3-csv has its own rows (protocol given),
and lcrec-json has no titles (verbatim). Python-dict lines (games of steam, metadata of amazon-2014)
are parsed one by one.
"""

import argparse
import contextlib
import datetime
import gzip
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import finish, peak_bytes, print_table, run_fresh

SPLITS = ("train", "valid", "test")
WINDOW = ("2017-10-01", "2018-11-01")
SIZES, QUICK_SIZES = (200_000, 1_000_000, 5_000_000, 10_000_000), (200_000,)
MOST_PLAIN = 5_000_000  # the plain side needs 2.1 GiB per million reviews
MOST_GZIP = 10_000_000  # making the gzip of 50 million takes longer than all the rest
OTHER_REVIEWS, QUICK_OTHER_REVIEWS = 1_000_000, 20_000
# Form → source; the other forms are called like their sources.
SOURCES = {
    "amazon-2023-csv": "amazon-2023",
    "movielens-1m": "movielens",
    "movielens-25m": "movielens",
}
LEAVE_ONE_OUT = ["--protocol", "leave-one-out", "--k_core", "5"]
OPTIONS = {
    "d3-csv": ["--protocol", "given"],
    "lcrec-json": [*LEAVE_ONE_OUT, "--titles", "verbatim"],
}
# On disk at a time: 560 bytes of raw files, the rest for tables, spilling and the result (assumed).
BYTES_PER_REVIEW = 800
GENERATOR = str(Path(__file__).with_name("_raw_files.py"))
HEADER = ["reviews", "s", "reviews/s", "peak GiB", "gz s", "gunzip s"]
HEADER += ["plain s", "plain GiB", "speed x", "equal rows"]


def least_items(num_reviews: int) -> int:
    """Return the number of items that the window must hold."""
    return min(10_000, num_reviews // 500)


# ---- the steps of a measurement, each in a process of its own


def prepare(arguments: Sequence[str]) -> dict[str, float]:
    """Run igd prepare in this process; return the seconds and the peak memory of the process."""
    from igd_ds.commands.prepare import main as igd_prepare

    printed = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        igd_prepare(arguments)
    return {"seconds": time.perf_counter() - start, "bytes": peak_bytes()}


def plain(reviews: Path, metadata: Path, output: Path, num_reviews: int) -> dict[str, float]:
    """Run the plain side, then keep its rows and titles as Parquet for `compare`."""
    import _published_data as published  # not in the processes that measure our memory

    dates = [datetime.date.fromisoformat(day) for day in WINDOW]
    start = time.perf_counter()
    rows, titles = published.preprocess(
        [reviews, metadata], output, *dates, least_items(num_reviews)
    )
    measured = {"seconds": time.perf_counter() - start, "bytes": peak_bytes()}

    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in SPLITS:
        users, before, targets = zip(*rows[split], strict=True)
        columns = {
            "user": users,
            "history": [[review["asin"] for review in past] for past in before],
            "target": [review["asin"] for review in targets],
            "timestamp": [review["unixReviewTime"] for review in targets],
        }
        pq.write_table(pa.table(columns), output / f"{split}.parquet")
    items = {"item": list(titles), "title": list(titles.values())}
    pq.write_table(pa.table(items), output / "titles.parquet")
    return measured


def compare(ours: Path, plain: Path) -> dict[str, int]:
    """Check that both sides made the same rows in the same order and the same titles.

    Returns:
        The number of rows.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    items = pq.read_table(ours / "items.parquet").combine_chunks()
    users = pq.read_table(ours / "users.parquet").combine_chunks()
    item_names, user_names = (table["source_id"].combine_chunks() for table in (items, users))

    number = 0
    for split in SPLITS:
        found = pq.read_table(ours / f"{split}.parquet").combine_chunks()
        expected = pq.read_table(plain / f"{split}.parquet").combine_chunks()
        history = found["history"].combine_chunks()
        named = {
            "user": user_names.take(pc.index_in(found["user_id"], users["user_id"])),
            "history": pa.ListArray.from_arrays(history.offsets, item_names.take(history.values)),
            "target": item_names.take(found["target"].combine_chunks()),
            "timestamp": found["timestamp"],
        }
        for name, column in named.items():
            wanted = expected[name].combine_chunks()
            column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            assert column.cast(wanted.type).equals(wanted), f"{split}: column {name} differs"
        number += len(found)

    titles = pq.read_table(plain / "titles.parquet")
    rows = pc.index_in(item_names, titles["item"])
    wanted = titles["title"].combine_chunks().take(rows)
    different = pc.sum(pc.not_equal(wanted, items["title"].combine_chunks())).as_py()
    assert different == 0, f"{different} of {len(items)} titles differ"
    return {"rows": number}


def gunzip(paths: Sequence[str]) -> dict[str, float]:
    """Measure the time of unpacking alone."""
    start = time.perf_counter()
    for path in paths:
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass
    return {"seconds": time.perf_counter() - start}


def other_formats(num_reviews: int, folder: Path) -> dict[str, float]:
    """Return the seconds per format.

    A format with JSON and CSV runs first and does not count, because some imports happen late.
    """
    from _raw_files import FORMS, make_files

    seconds = {}
    forms = [form for form in FORMS if form != "amazon-2018"]
    for number, form in enumerate(["amazon-2023-csv", *forms]):
        here = folder / f"{form}-{number}"
        here.mkdir()
        paths = [str(path) for path in make_files(form, num_reviews, here)]
        arguments = ["--source", SOURCES.get(form, form), "--input", *paths]
        arguments += [*OPTIONS.get(form, LEAVE_ONE_OUT), "--output", str(here / "dataset")]
        seconds[form] = prepare(arguments)["seconds"]
        shutil.rmtree(here)
    return seconds


def run_step(step: str, arguments: list[str]) -> None:
    """Run what a child process does; its last line is the result."""
    result: dict[str, Any]
    if step == "prepare":
        result = prepare(arguments)
    elif step == "plain":
        reviews, metadata, output = map(Path, arguments[:3])
        result = plain(reviews, metadata, output, int(arguments[3]))
    elif step == "compare":
        result = compare(Path(arguments[0]), Path(arguments[1]))
    elif step == "gunzip":
        result = gunzip(arguments)
    else:
        result = other_formats(int(arguments[0]), Path(arguments[1]))
    print(json.dumps(result), flush=True)


# ---- the benchmark


def measure_size(num_reviews: int, folder: Path) -> dict[str, float]:
    """Make the files of one size, run all sides and compare them.

    Returns:
        What was measured: seconds, bytes, rows.
    """
    folder.mkdir()
    arguments = ["--source", "amazon-2018", "--protocol", "d3", "--titles", "d3"]
    arguments += ["--from", WINDOW[0], "--to", WINDOW[1], "--name", "bench"]
    arguments += ["--min_items", str(least_items(num_reviews))]

    # Our side, from uncompressed files.
    raw = run_fresh(GENERATOR, "amazon-2018", num_reviews, folder / "raw")["paths"]
    ours = run_fresh(__file__, "prepare", *arguments, "--output", folder / "ours", "--input", *raw)
    result = {"seconds": ours["seconds"], "bytes": ours["bytes"]}

    # The plain side, and the comparison.
    if num_reviews <= MOST_PLAIN:
        by_plain = run_fresh(__file__, "plain", *raw, folder / "plain", num_reviews)
        result |= {"plain_seconds": by_plain["seconds"], "plain_bytes": by_plain["bytes"]}
        result |= run_fresh(__file__, "compare", folder / "ours", folder / "plain")
    shutil.rmtree(folder / "raw")

    # Our side, from gzip.
    if num_reviews <= MOST_GZIP:
        raw = run_fresh(GENERATOR, "amazon-2018", num_reviews, folder / "gz", "--gz")["paths"]
        packed = run_fresh(
            __file__, "prepare", *arguments, "--output", folder / "ours-gz", "--input", *raw
        )
        hashes = [
            json.loads((folder / name / "dataset.json").read_text())["files"]
            for name in ("ours", "ours-gz")
        ]
        assert hashes[0] == hashes[1], "gzip and plain files gave different datasets"
        result["gz_seconds"] = packed["seconds"]
        result["gunzip_seconds"] = run_fresh(__file__, "gunzip", *raw)["seconds"]
        result["bytes"] = max(result["bytes"], packed["bytes"])

    shutil.rmtree(folder)
    return result


def table_row(size: int, found: dict[str, float]) -> list[Any]:
    """Return the cells of one size, under HEADER."""
    seconds = found["seconds"]
    row: list[Any] = [f"{size:,}", seconds, f"{size / seconds:,.0f}", found["bytes"] / 2**30]
    row += [found.get("gz_seconds", "-"), found.get("gunzip_seconds", "-")]
    if "plain_seconds" in found:
        speedup = found["plain_seconds"] / seconds
        row += [found["plain_seconds"], found["plain_bytes"] / 2**30, speedup]
        row.append(f"{found['rows']:,}")
    return row + ["-"] * (len(HEADER) - len(row))


def main() -> None:
    """Run all sizes and formats; print the tables and the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="200 k reviews only, other formats 20 k; under 50 s"
    )
    parser.add_argument(
        "--reviews", type=int, help="one more, larger size; 50 M reviews need 40 GB of disk"
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for temporary files (default: the system's)"
    )
    args = parser.parse_args()

    sizes = [*(QUICK_SIZES if args.quick else SIZES), *([args.reviews] if args.reviews else [])]
    other_size = QUICK_OTHER_REVIEWS if args.quick else OTHER_REVIEWS
    rows, figures = [], {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for size in sizes:
            free, needed = shutil.disk_usage(scratch).free, size * BYTES_PER_REVIEW
            if free < needed:
                print(
                    f"{size:,} reviews skipped: {scratch} needs {needed / 1e9:.0f} GB of free "
                    f"space and has {free / 1e9:.0f}"
                )
                continue
            found = measure_size(size, Path(scratch) / str(size))
            rows.append(table_row(size, found))
            figures["reviews_per_s"] = size / found["seconds"]
            figures["peak_gib"] = found["bytes"] / 2**30
            if "plain_seconds" in found:
                figures["speedup_vs_plain"] = found["plain_seconds"] / found["seconds"]
        print_table(HEADER, rows)

        seconds = run_fresh(__file__, "formats", other_size, scratch)
        header = [f"{other_size:,} reviews", "s", "reviews/s"]
        print_table(header, [[form, s, f"{other_size / s:,.0f}"] for form, s in seconds.items()])
    finish("data", figures, args.quick)


if __name__ == "__main__":
    # A child process runs one step: STEP ARGUMENTS.
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        run_step(sys.argv[1], sys.argv[2:])
    else:
        main()
