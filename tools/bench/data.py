"""Benchmark: raw files to the canonical dataset, against the published preprocessing's approach.

    python tools/bench/data.py [--quick] [--reviews 50000000] [--scratch FOLDER]

Recipe: synthetic Amazon 2018 reviews and metadata (`_raw_files.py`, seed 0: about 480 bytes a review, 0.3 users and 1/17 items
per review), protocol d3 with the published title rule, the window 2017-10-01 to 2018-11-01, 5-core; the window must hold
reviews / 500 items, at most the published 10,000, so that it moves back at small sizes as it does for real categories.
Ours is the code of `igd prepare`, sha256 of the sources and data card included; every measurement is a fresh process,
its own peak memory, imports not timed. It reads uncompressed files and then the same files as gzip (one member, level 1); the
time that Python's gunzip alone takes stands beside. The plain side (`_published_data.py`) reads the uncompressed files and
writes CSV. Both sides' rows are compared in order, name by name: user, history, target, time, and the items' titles; ours from
gzip must be the same bytes. The other formats hold as many reviews in files of their own form and run with leave-one-out, 5-core,
one after the other in one process, except that d3-csv brings its rows (protocol given) and lcrec-json has no titles (verbatim).
Python-dict lines (games of steam, metadata of amazon-2014) are parsed one by one.
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

from _common import REPOSITORY, finish, peak_bytes, print_table, run_fresh

SPLITS = ("train", "valid", "test")
WINDOW = ("2017-10-01", "2018-11-01")
SIZES, QUICK_SIZES = (200_000, 1_000_000, 5_000_000, 10_000_000), (200_000,)
MOST_PLAIN = 5_000_000  # 2.1 GiB a million reviews
MOST_GZIP = 10_000_000  # making the gzip of 50 million takes longer than all the rest
OTHER_REVIEWS, QUICK_OTHER_REVIEWS = 1_000_000, 20_000
SOURCES = {
    "amazon-2023-csv": "amazon-2023",
    "movielens-1m": "movielens",
    "movielens-25m": "movielens",
}  # others: the form
LEAVE_ONE_OUT = ["--protocol", "leave-one-out", "--k_core", "5"]
OPTIONS = {
    "d3-csv": ["--protocol", "given"],
    "lcrec-json": [*LEAVE_ONE_OUT, "--titles", "verbatim"],
}
BYTES_PER_REVIEW = (
    800  # on disk at a time: 560 raw, the rest for tables, spilling and the result (assumed)
)
GENERATOR = str(Path(__file__).with_name("_raw_files.py"))


def least_items(num_reviews: int) -> int:
    """Items that the window must hold."""
    return min(10_000, num_reviews // 500)


def prepare(arguments: Sequence[str]) -> dict[str, float]:
    """Run igd prepare in this process; return seconds and the process' peak memory."""
    sys.path.insert(0, str(REPOSITORY / "tools"))
    from prepare_data import main as prepare_data

    said = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = prepare_data(arguments)
    measured = {"seconds": time.perf_counter() - start, "bytes": peak_bytes()}
    if status != 0:
        raise RuntimeError(f"prepare_data.py {' '.join(arguments)} failed: {said.getvalue()}")
    return measured


def plain(reviews: Path, metadata: Path, output: Path, num_reviews: int) -> dict[str, float]:
    """Run the plain side, then keep its rows and titles as Parquet for `compare`."""
    import _published_data as published  # here: not in the processes that measure our memory

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
    pq.write_table(
        pa.table({"item": list(titles), "title": list(titles.values())}), output / "titles.parquet"
    )
    return measured


def compare(ours: Path, plain: Path) -> dict[str, int]:
    """Assert that both sides made the same rows in the same order, and gave the items the same titles; return the rows."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    items, users = (
        pq.read_table(ours / f"{name}.parquet").combine_chunks() for name in ("items", "users")
    )
    item_names, user_names = (table["source_id"].combine_chunks() for table in (items, users))
    number = 0
    for split in SPLITS:
        found, expected = (
            pq.read_table(ours / f"{split}.parquet"),
            pq.read_table(plain / f"{split}.parquet"),
        )
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
    places = pc.index_in(item_names, titles["item"])
    wanted = titles["title"].combine_chunks().take(places)
    different = pc.sum(pc.not_equal(wanted, items["title"].combine_chunks())).as_py()
    assert different == 0, f"{different} of {len(items)} titles differ"
    return {"rows": number}


def gunzip(paths: Sequence[str]) -> dict[str, float]:
    """Time unpacking alone."""
    start = time.perf_counter()
    for path in paths:
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass
    return {"seconds": time.perf_counter() - start}


def other_formats(num_reviews: int, folder: Path) -> dict[str, float]:
    """Return seconds per format; one with JSON and CSV runs first, uncounted, for what is imported late."""
    from _raw_files import FORMS, make_files

    seconds = {}
    forms = [form for form in FORMS if form != "amazon-2018"]
    for place, form in enumerate(["amazon-2023-csv", *forms]):
        here = folder / f"{form}-{place}"
        here.mkdir()
        paths = map(str, make_files(form, num_reviews, here))
        arguments = [
            "--source",
            SOURCES.get(form, form),
            "--input",
            *paths,
            *OPTIONS.get(form, LEAVE_ONE_OUT),
        ]
        seconds[form] = prepare([*arguments, "--output", str(here / "dataset")])["seconds"]
        shutil.rmtree(here)
    return seconds


def measure_size(num_reviews: int, folder: Path) -> dict[str, float]:
    """Make the files of one size, run all sides, compare; return what was measured (seconds, bytes, rows)."""
    folder.mkdir()
    arguments = [
        "--source",
        "amazon-2018",
        "--protocol",
        "d3",
        "--from",
        WINDOW[0],
        "--to",
        WINDOW[1],
        "--titles",
        "d3",
    ]
    arguments += ["--min_items", least_items(num_reviews), "--name", "bench"]
    raw = run_fresh(GENERATOR, "amazon-2018", num_reviews, folder / "raw")["paths"]
    ours = run_fresh(__file__, "prepare", *arguments, "--output", folder / "ours", "--input", *raw)
    result = {"seconds": ours["seconds"], "bytes": ours["bytes"]}
    if num_reviews <= MOST_PLAIN:
        by_plain = run_fresh(__file__, "plain", *raw, folder / "plain", num_reviews)
        result |= {"plain_seconds": by_plain["seconds"], "plain_bytes": by_plain["bytes"]}
        result |= run_fresh(__file__, "compare", folder / "ours", folder / "plain")
    shutil.rmtree(folder / "raw")
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
        result |= {
            "gz_seconds": packed["seconds"],
            "gunzip_seconds": run_fresh(__file__, "gunzip", *raw)["seconds"],
        }
        result["bytes"] = max(result["bytes"], packed["bytes"])
    shutil.rmtree(folder)
    return result


def run_step(step: str, arguments: list[str]) -> None:
    """What a child process does; its last line is the result."""
    if step == "prepare":
        result = prepare(arguments)
    elif step == "plain":
        result = plain(*map(Path, arguments[:3]), int(arguments[3]))
    elif step == "compare":
        result = compare(*map(Path, arguments))
    elif step == "gunzip":
        result = gunzip(arguments)
    else:
        result = other_formats(int(arguments[0]), Path(arguments[1]))
    print(json.dumps(result), flush=True)


def main() -> None:
    """Run all sizes and formats, print the tables and the figures."""
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
    rows, figures = [], {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for size in sizes:
            free, needed = shutil.disk_usage(scratch).free, size * BYTES_PER_REVIEW
            if free < needed:
                print(
                    f"{size:,} reviews skipped: {scratch} needs {needed / 1e9:.0f} GB of free space and has {free / 1e9:.0f}"
                )
                continue
            found = measure_size(size, Path(scratch) / str(size))
            figures |= {
                "reviews_per_s": size / found["seconds"],
                "peak_gib": found["bytes"] / 2**30,
            }
            row = [
                f"{size:,}",
                found["seconds"],
                f"{size / found['seconds']:,.0f}",
                found["bytes"] / 2**30,
            ]
            row += [found.get("gz_seconds", "-"), found.get("gunzip_seconds", "-")]
            if "plain_seconds" in found:
                figures["speedup_vs_plain"] = found["plain_seconds"] / found["seconds"]
                row += [
                    found["plain_seconds"],
                    found["plain_bytes"] / 2**30,
                    figures["speedup_vs_plain"],
                    f"{found['rows']:,}",
                ]
            rows.append(row + ["-"] * (10 - len(row)))
        header = [
            "reviews",
            "s",
            "reviews/s",
            "peak GiB",
            "gz s",
            "gunzip s",
            "plain s",
            "plain GiB",
            "speed x",
            "equal rows",
        ]
        print_table(header, rows)
        size = QUICK_OTHER_REVIEWS if args.quick else OTHER_REVIEWS
        seconds = run_fresh(__file__, "formats", size, scratch)
        print_table(
            [f"{size:,} reviews", "s", "reviews/s"],
            [[form, s, f"{size / s:,.0f}"] for form, s in seconds.items()],
        )
    finish("data", figures, args.quick)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith(
        "-"
    ):  # one step in its own process: STEP ARGUMENTS
        run_step(sys.argv[1], sys.argv[2:])
    else:
        main()
