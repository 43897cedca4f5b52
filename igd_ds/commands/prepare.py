"""Make a canonical dataset: raw files → titles → protocol → DATASET/ (see igd_ds/data/dataset.py).

    igd prepare --preset games --input Video_Games_5.json.gz meta_Video_Games.json.gz --output DATASET
    igd prepare --source sequences --input FOLDER --protocol leave-one-out --output DATASET
    igd prepare --source amazon-2018 --help      # which files, from which page, how large

Equal inputs and options give equal bytes. Run again on a finished output with the same request, it does nothing; with another
request it refuses. Nothing is ever overwritten.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from igd_ds.data.hygiene import POLICIES
from igd_ds.data.prepare import DatasetRequest, prepare
from igd_ds.data.presets import PRESETS
from igd_ds.data.protocols import COLD, DEFAULTS, DUPLICATES, PROTOCOLS, ProtocolOptions
from igd_ds.data.sources import SOURCES
from igd_ds.errors import UsageError

# What neither flags, nor a preset, nor the protocol's defaults set.
LAST_DEFAULTS = {
    "domain": "items",
    "min_items": 10_000,
    "window_start": None,
    "window_end": None,
    "duplicates": "keep",
    "cold_items": "keep",
    "cold_users": "keep",
    "titles": POLICIES[0],
}


def make_parser(about: str) -> argparse.ArgumentParser:
    """Return the parser; `about` ends its help."""
    parser = argparse.ArgumentParser(
        description="Make a canonical dataset folder.",
        epilog=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="a paper's dataset: source, protocol and options; flags go before it",
    )
    parser.add_argument(
        "--source", choices=SOURCES, help="with --help: which files it reads, from which page"
    )
    parser.add_argument(
        "--input",
        nargs="*",
        type=Path,
        default=[],
        metavar="PATH",
        help="files, or folders to find them in",
    )
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, help="given: rows that the source brings (d3-csv)"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DATASET", help="folder to make"
    )
    parser.add_argument("--name", help="the dataset's name (default: the output folder's)")
    parser.add_argument(
        "--domain", help="plural noun for the items in prompts, e.g. books (default: items)"
    )
    parser.add_argument(
        "--max_history",
        type=int,
        help="items per history, the last ones; 0 all (leave-one-out 20, d3 10, given as they are)",
    )
    parser.add_argument(
        "--k_core",
        type=int,
        help="least interactions per user and item; 0 keeps all (leave-one-out 0, d3 5)",
    )
    parser.add_argument(
        "--from",
        dest="window_start",
        metavar="DATE",
        help="first day, UTC, of what is used; d3 moves it back a year at a time",
    )
    parser.add_argument(
        "--to",
        dest="window_end",
        metavar="DATE",
        help="end: the first second of this day is the last used",
    )
    parser.add_argument(
        "--min_items", type=int, help="d3: items the time window must hold (default: 10000)"
    )
    parser.add_argument(
        "--duplicates",
        choices=DUPLICATES,
        help="exact: equal user, item and second once; first: an item once per user (default: keep)",
    )
    parser.add_argument(
        "--cold_items",
        choices=COLD,
        help="drop: no valid or test row whose target is no training target",
    )
    parser.add_argument(
        "--cold_users",
        choices=COLD,
        help="drop: no valid or test row of a user without training row",
    )
    parser.add_argument(
        "--titles",
        choices=POLICIES,
        help="repair and missing titles: igd_ds/data/hygiene.py (default: placeholder)",
    )
    parser.add_argument(
        "--max_bad_lines",
        type=float,
        default=0.001,
        help="share of broken lines to pass over (default: 0.001)",
    )
    parser.add_argument(
        "--num_users",
        type=int,
        default=0,
        help="keep a seeded sample of users, all items stay; synthetic: make N",
    )
    parser.add_argument("--num_items", type=int, default=0, help="synthetic: items to make")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the ids, the user sample and synthetic data"
    )
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; open options take the preset's value, then the protocol's."""
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--source")
    chosen.add_argument("--preset")
    known, _ = chosen.parse_known_args(argv)
    source = PRESETS[known.preset].source if known.preset in PRESETS else known.source
    about = SOURCES[source].about if source in SOURCES else f"sources: {', '.join(SOURCES)}"
    parser = make_parser(about)
    args = parser.parse_args(argv)
    preset = PRESETS.get(args.preset)
    if preset and args.source not in (None, preset.source):
        parser.error(
            f"--preset {args.preset} is made of source {preset.source}, not of --source {args.source}"
        )
    args.source = preset.source if preset else args.source
    args.protocol = args.protocol or (preset.options["protocol"] if preset else None)
    for option in ("source", "protocol"):
        if getattr(args, option) is None:
            parser.error(f"--{option} is missing, or a --preset")
    if args.min_items is not None and args.protocol != "d3":
        parser.error(
            f"--min_items {args.min_items} is for --protocol d3: no other moves its window"
        )
    for option, value in {
        **LAST_DEFAULTS,
        **DEFAULTS[args.protocol],
        **(preset.options if preset else {}),
    }.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    args.name = args.name or args.output.resolve().name
    for option, least in [
        ("max_history", 0),
        ("k_core", 0),
        ("min_items", 1),
        ("num_users", 0),
        ("num_items", 0),
        ("seed", 0),
    ]:
        if not least <= getattr(args, option) < 2**31:
            parser.error(
                f"--{option} {getattr(args, option)}: must be at least {least}, and below 2^31"
            )
    if args.num_items and args.source != "synthetic":
        parser.error(
            "--num_items is for synthetic data; the other sources take every item of their files"
        )
    if not 0 <= args.max_bad_lines < 1:
        parser.error(f"--max_bad_lines {args.max_bad_lines}: a share, from 0 to below 1")
    return args


def seconds(day: str | None, flag: str) -> int | None:
    """Return the first second of a date like 2017-10-01, UTC."""
    if day is None:
        return None
    try:
        return int(datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=timezone.utc).timestamp())
    except ValueError as error:
        raise UsageError(f"{flag} {day}: need a date like 2017-10-01") from error


def request(args: argparse.Namespace) -> DatasetRequest:
    """Return what the arguments ask for."""
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
    same = (
        "source",
        "protocol",
        "output",
        "name",
        "domain",
        "titles",
        "num_items",
        "max_bad_lines",
        "preset",
    )
    expected = PRESETS[args.preset].expected if args.preset else {}
    return DatasetRequest(
        inputs=args.input,
        options=options,
        expected=expected,
        **{key: getattr(args, key) for key in same},
    )


def print_summary(info: dict, output: Path) -> None:
    """Print the funnel, the hygiene report and, for a preset, what was found beside what the paper prints."""
    for step in info["funnel"]:
        print(
            f"{step['step']:60s}  "
            + "  ".join(f"{key} {number:,}" for key, number in step.items() if key != "step")
        )
    for step, found in info["hygiene"].items():
        print(
            f"titles      {step}: "
            + (f"{found['count']:,}" if isinstance(found, dict) else str(found))
        )
    for key, (expected, found) in info["expected"].items():
        paper = PRESETS[info["parameters"]["preset"]].paper
        gap = found - expected
        print(
            f"expected    {key} {expected:,} ({paper}), found {found:,}: {gap:+,} ({gap / expected:+.2%})"
        )
    print(f"dataset     {output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = parse(argv)
    try:
        info = prepare(request(args))
    except (ValueError, OSError) as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr)
        return 2
    print_summary(info, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
