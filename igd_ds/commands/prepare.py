"""igd prepare: make a canonical dataset from raw files (see igd_ds/data/dataset.py).

    igd prepare --source synthetic --protocol leave-one-out --output DATASET
    igd prepare --source sequences --input FOLDER --protocol leave-one-out --output DATASET
    igd prepare --preset games --input Video_Games_5.json.gz meta_Video_Games.json.gz --output GAMES
    igd prepare --source amazon-2018 --help    # which files it reads, from which page, how large

Equal inputs and options give equal bytes (the card's figures: on one kind of CPU). If the output is
complete and was made from the same request, the command does nothing; if it was made from another
request, the command refuses. It never overwrites anything.
"""

import argparse
import errno
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from igd_ds.config.options import FlagParser
from igd_ds.data.hygiene import POLICIES
from igd_ds.data.prepare import DatasetRequest, prepare
from igd_ds.data.presets import PRESETS
from igd_ds.data.protocols import (
    COLD,
    DEFAULTS,
    DUPLICATES,
    LEAST,
    PROTOCOLS,
    ProtocolOptions,
    check_whole,
)
from igd_ds.data.sources import SOURCES, table
from igd_ds.errors import UsageError

# The values of options that neither a flag, nor a preset, nor the protocol's defaults set.
LAST_DEFAULTS: dict[str, str | int | None] = {
    "domain": "items",
    "min_items": 10_000,
    "window_start": None,
    "window_end": None,
    "duplicates": "keep",
    "cold_items": "keep",
    "cold_users": "keep",
    "titles": POLICIES[0],
}
URL = re.compile(r"https?://[^\s<>]+")
# Errors of the operating system that the user can repair, and how.
REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give a file",
    errno.EEXIST: "choose another path",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.EROFS: "choose another --output",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOSPC: "make room on the disk of --output, or choose another --output",
    errno.EDQUOT: "make room on the disk of --output, or choose another --output",
    errno.EIO: "check the disk",
}


def make_parser(about: str) -> argparse.ArgumentParser:
    """Return the parser of the command line; its help ends with `about`."""
    parser = FlagParser(
        prog="igd prepare",
        description="Make a canonical dataset folder from raw files.",
        epilog=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_input_flags(parser)
    _add_protocol_flags(parser)
    _add_other_flags(parser)
    return parser


def _add_input_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="dataset of a paper: sets source, protocol and options; flags override it",
    )
    parser.add_argument(
        "--source",
        choices=SOURCES,
        help="kind of raw files; with --help: which files it reads, from which page",
    )

    # Files.
    parser.add_argument(
        "--input",
        nargs="*",
        type=Path,
        default=[],
        metavar="PATH",
        help="the files, or folders that hold them",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DATASET", help="the folder to make"
    )

    parser.add_argument(
        "--columns",
        nargs="*",
        default=[],
        metavar="FIELD=COLUMN",
        help="source csv: columns by name, or by number from 1 (fields: user, item, timestamp, "
        "title, brand, categories, price, description, semantic_id)",
    )
    parser.add_argument(
        "--time_format",
        default="",
        metavar="FORMAT",
        help="source csv: how times are written, such as %%d.%%m.%%Y (default: numbers, ISO dates)",
    )

    # Words.
    parser.add_argument("--name", help="name of the dataset (default: the name of --output)")
    parser.add_argument(
        "--domain", help="plural noun for the items in prompts, such as books (default: items)"
    )
    parser.add_argument(
        "--license",
        default="",
        metavar="NAME",
        help="licence of the source, such as 'CC BY 4.0': for dataset.json and the data card",
    )
    parser.add_argument(
        "--source_url",
        default="",
        metavar="URL",
        help="page of the source: for dataset.json and the data card (default: the preset's page)",
    )


def _add_protocol_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="how interactions become rows; given: the source has rows already (d3-csv)",
    )
    parser.add_argument(
        "--max_history",
        type=int,
        help="newest items that a history keeps; 0 keeps all (default: leave-one-out 20, d3 10, "
        "given 0)",
    )
    parser.add_argument(
        "--k_core",
        type=int,
        help="least interactions of every user and item; 0 keeps all (default: leave-one-out 0, "
        "d3 5)",
    )

    # The time window.
    parser.add_argument(
        "--from",
        dest="window_start",
        metavar="DATE",
        help="first day (UTC) of the time window; d3 may move it back, a year at a time",
    )
    parser.add_argument(
        "--to",
        dest="window_end",
        metavar="DATE",
        help="end of the time window: the first second of this day (UTC) is the last one used",
    )
    parser.add_argument(
        "--min_items", type=int, help="d3: items that the time window must hold (default: 10000)"
    )

    # What is left out.
    parser.add_argument(
        "--duplicates",
        choices=DUPLICATES,
        help="exact: drop repeats of the same user, item and second; first: keep the first "
        "interaction of each user with an item (default: keep)",
    )
    parser.add_argument(
        "--cold_items",
        choices=COLD,
        help="drop: leave out valid and test rows whose target is no training target "
        "(default: keep)",
    )
    parser.add_argument(
        "--cold_users",
        choices=COLD,
        help="drop: leave out valid and test rows of users without a training row (default: keep)",
    )


def _add_other_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--titles",
        choices=POLICIES,
        help="repair of titles, and items without one: see igd_ds/data/hygiene.py "
        "(default: placeholder)",
    )
    parser.add_argument(
        "--max_bad_lines",
        type=float,
        default=0.001,
        help="share of the lines that may be broken (default: 0.001)",
    )

    # Samples, and synthetic data.
    parser.add_argument(
        "--num_users",
        type=int,
        default=0,
        help="keep a seeded sample of this many users, and all items; synthetic: make this many "
        "(default: 0, all)",
    )
    parser.add_argument(
        "--num_items", type=int, default=0, help="synthetic: make this many items (default: 600)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the ids, the user sample and synthetic data (default: 0)",
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and fill in the open options.

    An option takes the value of its flag, of the preset, of the protocol's defaults or of
    LAST_DEFAULTS: the first of these that there is.

    Raises:
        UsageError: a flag is missing, or its value cannot work.
    """
    # The help depends on the source, so the source is looked up before the full parser is made.
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--source")
    chosen.add_argument("--preset")
    known, _ = chosen.parse_known_args(argv)
    source = PRESETS[known.preset].source if known.preset in PRESETS else known.source
    about = SOURCES[source].about if source in SOURCES else f"sources: {', '.join(SOURCES)}"
    args = make_parser(about).parse_args(argv)

    _choose_source_and_protocol(args)
    defaults = LAST_DEFAULTS | DEFAULTS[args.protocol]
    if args.preset:
        defaults |= PRESETS[args.preset].options
    for option, value in defaults.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    args.name = args.name or args.output.resolve().name
    args.columns = _columns(args.columns)
    _check_ranges(args)
    if args.source != "csv" and (args.columns or args.time_format):
        flag = "--columns" if args.columns else "--time_format"
        raise UsageError(f"{flag} is for --source csv: the other sources know their files")
    return args


def _columns(pairs: Sequence[str]) -> dict[str, str]:
    """Return --columns FIELD=COLUMN … as a dict.

    Raises:
        UsageError: a pair has no =, its field is unknown, or a field is named twice.
    """
    columns: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not column:
            raise UsageError(f"--columns {pair}: write FIELD=COLUMN, such as user=customer")
        if name in columns:
            raise UsageError(f"--columns names {name} twice: {columns[name]} and {column}")
        columns[name] = column
    table.check_fields(columns)
    return columns


def _choose_source_and_protocol(args: argparse.Namespace) -> None:
    preset = PRESETS.get(args.preset)
    if preset and args.source not in (None, preset.source):
        raise UsageError(
            f"--preset {args.preset} is made of source {preset.source}, not of --source "
            f"{args.source}"
        )
    if preset:
        args.source = preset.source
        args.protocol = args.protocol or preset.options["protocol"]
    if args.source == "csv":
        args.protocol = args.protocol or table.PROTOCOL
    for option in ("source", "protocol"):
        if getattr(args, option) is None:
            raise UsageError(f"--{option} is missing: give it, or a --preset")
    if args.min_items is not None and args.protocol != "d3":
        raise UsageError(
            f"--min_items {args.min_items} is for --protocol d3: no other protocol moves its window"
        )


def _check_ranges(args: argparse.Namespace) -> None:
    for option, least in {**LEAST, "num_items": 0}.items():
        check_whole(option, getattr(args, option), least)
    if args.num_items and args.source != "synthetic":
        raise UsageError(
            "--num_items is for synthetic data; the other sources take every item of their files"
        )
    if args.source_url and not URL.fullmatch(args.source_url):
        raise UsageError(
            f"--source_url {args.source_url}: need an address like https://example.org/data"
        )


def seconds(day: str | None, flag: str) -> int | None:
    """Return the first second of a date such as 2017-10-01 (UTC), in seconds since 1970."""
    if day is None:
        return None
    try:
        return int(datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=timezone.utc).timestamp())
    except ValueError as error:
        raise UsageError(f"{flag} {day}: need a date like 2017-10-01") from error


def request(args: argparse.Namespace) -> DatasetRequest:
    """Return the dataset that the parsed arguments ask for."""
    options = ProtocolOptions(
        max_history=args.max_history,
        k_core=args.k_core,
        min_items=args.min_items,
        window=(seconds(args.window_start, "--from"), seconds(args.window_end, "--to")),
        duplicates=args.duplicates,
        cold_items=args.cold_items,
        cold_users=args.cold_users,
        num_users=args.num_users,
        seed=args.seed,
    )

    return DatasetRequest(
        source=args.source,
        inputs=args.input,
        protocol=args.protocol,
        options=options,
        output=args.output,
        name=args.name,
        domain=args.domain,
        titles=args.titles,
        num_items=args.num_items,
        max_bad_lines=args.max_bad_lines,
        columns=args.columns,
        time_format=args.time_format,
        license=args.license,
        source_url=args.source_url,
        preset=args.preset,
        preset_url=PRESETS[args.preset].page if args.preset else "",
        expected=PRESETS[args.preset].expected if args.preset else {},
    )


def print_summary(info: Mapping[str, Any], output: Path) -> None:
    """Print the funnel, the report on titles and, for a preset, the counts next to the paper's."""
    for step in info["funnel"]:
        counts = [f"{key} {number:,}" for key, number in step.items() if key != "step"]
        print(f"{step['step']:60s}  {'  '.join(counts)}")

    for step, found in info["hygiene"].items():
        shown = f"{found['count']:,}" if isinstance(found, dict) else str(found)
        print(f"titles      {step}: {shown}")

    for key, (expected, found) in info["expected"].items():
        paper = PRESETS[info["parameters"]["preset"]].paper
        gap = found - expected
        print(
            f"expected    {key} {expected:,} ({paper}), found {found:,}: {gap:+,} "
            f"({gap / expected:+.2%})"
        )
    print(f"dataset     {output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the dataset, or find that it is made already; return the exit code.

    Raises:
        UsageError: bad flags, bad input files, or a file or disk that cannot be read or written.
    """
    args = parse(argv)
    try:
        info = prepare(request(args))
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        place = error.filename or args.output
        raise UsageError(f"{place}: {error.strerror}; {REMEDIES[error.errno]}") from error
    print_summary(info, args.output)
    return 0
