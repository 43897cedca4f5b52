"""Flags of the commands that describe a catalogue: which dataset, tokenizer and definitions."""

import argparse

from igd_ds.items.catalogue import KINDS
from igd_ds.items.decisiveness import ENTROPIES


def add_catalogue_flags(parser: argparse.ArgumentParser) -> None:
    """Add --dataset, --tokenizer, --item_kind and --entropy to a parser."""
    parser.add_argument("--dataset", required=True, help="canonical dataset folder")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder or name on the hub")
    parser.add_argument(
        "--item_kind",
        choices=KINDS,
        help="what items are written as: titles or codes (default: titles if the dataset has any)",
    )
    parser.add_argument(
        "--entropy",
        choices=ENTROPIES,
        default=ENTROPIES[0],
        help=f"definition of the entropy (default: {ENTROPIES[0]})",
    )
