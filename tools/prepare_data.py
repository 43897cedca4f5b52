"""Make a canonical dataset: source → title hygiene → protocol → DATASET/ (see igd_ds/data/dataset.py).

    python tools/prepare_data.py --source sequences --input FOLDER --protocol leave-one-out --output DATASET
    python tools/prepare_data.py --source synthetic --num_items 600 --num_users 1500 --protocol d3 --output DATASET

Equal inputs and options give equal bytes. Run again on a finished output with the same request, it does nothing; with another
request it refuses. Nothing is ever overwritten.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from igd_ds.data.dataset import VERSION, SourceData, item_table, read_info, sha256_of, write_dataset
from igd_ds.data.hygiene import POLICIES, clean_titles
from igd_ds.data.protocols import DEFAULTS, PROTOCOLS, ProtocolOptions
from igd_ds.data.sources import SOURCES


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and fill in the protocol's defaults."""
    parser = argparse.ArgumentParser(description="Make a canonical dataset folder.")
    parser.add_argument("--source", required=True, choices=sorted(SOURCES))
    parser.add_argument("--input", nargs="*", type=Path, default=[], metavar="PATH", help="what the source reads")
    parser.add_argument("--protocol", required=True, choices=sorted(PROTOCOLS))
    parser.add_argument("--output", required=True, type=Path, metavar="DATASET", help="folder to make")
    parser.add_argument("--name", help="the dataset's name (default: the output folder's)")
    parser.add_argument("--domain", default="items", help="plural noun for the items in prompts, e.g. books")
    parser.add_argument("--max_history", type=int, help="items per history, the last ones (leave-one-out 20, d3 10)")
    parser.add_argument("--k_core", type=int, help="least interactions per user and item; 0 keeps all (leave-one-out 0, d3 5)")
    parser.add_argument("--min_items", type=int, default=10_000, help="d3: items the time window must hold")
    parser.add_argument(
        "--num_users", type=int, default=0, help="keep a seeded sample of users, all items stay; synthetic: make N"
    )
    parser.add_argument("--num_items", type=int, default=0, help="synthetic: items to make")
    parser.add_argument("--seed", type=int, default=0, help="of the user sample and of synthetic data")
    parser.add_argument(
        "--untitled", choices=POLICIES, default=POLICIES[0], help="items without a usable title: igd_ds/data/hygiene.py"
    )
    parser.add_argument("--no_hygiene", action="store_true", help="keep titles verbatim")
    args = parser.parse_args(argv)
    args.name = args.name or args.output.resolve().name
    for option, value in DEFAULTS[args.protocol].items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    for option, least in [("max_history", 1), ("k_core", 0), ("min_items", 1), ("num_users", 0), ("num_items", 0), ("seed", 0)]:
        if getattr(args, option) < least:
            parser.error(f"--{option} {getattr(args, option)}: must be at least {least}")
    return args


def apply_hygiene(data: SourceData, policy: str) -> tuple[SourceData, np.ndarray, dict]:
    """Clean the titles; return (data, int64 source id per item, report for dataset.json)."""
    source_ids = np.arange(len(data.titles), dtype=np.int64)
    if policy == "off" or all(title is None for title in data.titles):  # a catalogue of semantic IDs has no titles to clean
        return data, source_ids, {"policy": policy if policy == "off" else "no titles"}
    titles, report = clean_titles(data.titles, policy)
    usable = np.array([title is not None for title in titles])
    source_ids = source_ids[usable]
    kept = data.interactions.take(usable[data.interactions.items])
    interactions = replace(kept, items=np.searchsorted(source_ids, kept.items).astype(np.int32))
    titles = [titles[i] for i in source_ids]
    semantic_ids = data.semantic_ids and [data.semantic_ids[i] for i in source_ids]
    return SourceData(titles, semantic_ids, interactions, data.files), source_ids, report


def renumber(table: pa.Table, kept_items: np.ndarray) -> pa.Table:
    """Replace the item ids of a split's table by their rank in `kept_items`."""

    def ranks(ids: pa.Array) -> pa.Array:
        return pa.array(np.searchsorted(kept_items, ids.to_numpy()).astype(np.int32))

    histories = [pa.ListArray.from_arrays(chunk.offsets, ranks(chunk.values)) for chunk in table["history"].chunks]
    targets = ranks(table["target"].combine_chunks())
    columns = [table["user_id"], pa.chunked_array(histories), targets, table["timestamp"]]
    return pa.table(columns, names=table.column_names)


def prepare(args: argparse.Namespace) -> dict:
    """Make the dataset folder, or find it made already; return its dataset.json. Raises ValueError on bad input."""
    data = SOURCES[args.source](args.input, args.num_items, args.num_users, args.seed)
    policy = "off" if args.no_hygiene else args.untitled
    parameters = {key: getattr(args, key) for key in ("source", "max_history", "k_core", "num_users", "num_items", "seed")}
    if args.protocol == "d3":
        parameters["min_items"] = args.min_items
    request = {
        "name": args.name,
        "domain": args.domain,
        "protocol": args.protocol,
        "parameters": parameters | {"hygiene": policy},
        "sources": [{"path": path.name, "sha256": sha256_of(path)} for path in data.files],
        "version": VERSION,
    }
    if args.output.exists():
        return finished(args.output, request)
    data, source_ids, report = apply_hygiene(data, policy)
    options = ProtocolOptions(args.max_history, args.k_core, args.min_items, args.num_users, args.seed)
    rows = PROTOCOLS[args.protocol](data.interactions, len(data.titles), options)
    kept = rows.kept_items
    semantic_ids = data.semantic_ids and [data.semantic_ids[i] for i in kept]
    items = item_table([data.titles[i] for i in kept], semantic_ids, source_ids[kept])
    splits = {name: renumber(table, kept) for name, table in rows.splits.items()}
    seen = np.zeros(len(kept), dtype=bool)
    seen[splits["train"]["target"].to_numpy()] = True
    counts = rows.counts | {"catalogue": {"items": len(kept), "cold_items": int(np.count_nonzero(~seen))}}
    write_dataset(args.output, items, splits, request | {"counts": counts, "hygiene": report})
    return read_info(args.output)


def finished(output: Path, request: dict) -> dict:
    """Return the dataset.json of an existing output that was made from the same request, else raise ValueError."""
    info = read_info(output)
    different = [key for key in request if request[key] != info[key]]
    if different:
        detail = "; ".join(f"{key}: there {json.dumps(info[key])}, asked {json.dumps(request[key])}" for key in different)
        raise ValueError(f"{output} holds another dataset ({detail}); delete it or choose another --output")
    print(f"{output} is complete and was made from the same input and options: nothing to do")
    return info


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = parse(argv)
    try:
        info = prepare(args)
    except (ValueError, OSError) as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr)
        return 2
    for stage, numbers in info["counts"].items():
        print(f"{stage:12s}" + "  ".join(f"{key} {number:,}" for key, number in numbers.items()))
    for step, found in info["hygiene"].items():
        print(f"hygiene     {step}: " + (f"{found['count']} titles" if isinstance(found, dict) else str(found)))
    print(f"dataset     {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
