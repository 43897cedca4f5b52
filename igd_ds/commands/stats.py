"""Print statistics of a catalogue and its trie: Table 1 of IGD and of MTC, and more.

    igd stats --dataset DATASET --tokenizer PATH [--json] [--item_kind text|semantic-id]
        [--entropy prior|conditional] [--prompt NAME [--max_length N] [--micro_batch N]]

`KEYS` in igd_ds/data/statistics.py explains every key of the --json object. The table prints the
same values with their meaning. With --prompt it also counts the tokens of the training rows: as
rows, padded, and as row trees (`ROW_KEYS` in igd_ds/data/row_statistics.py).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from igd_ds import distributed
from igd_ds.backbones.tokenizer import load_tokenizer
from igd_ds.commands.catalogue_flags import add_catalogue_flags
from igd_ds.config.options import FlagParser
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.row_statistics import ROW_KEYS, row_statistics
from igd_ds.data.statistics import KEYS, catalogue_statistics
from igd_ds.errors import UsageError
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.trie import TokenTrie


def shown(key: str, value: Any) -> str:
    """Return a value of `catalogue_statistics` as the table prints it."""
    if isinstance(value, list):
        first = " ".join(f"{number:.4f}" for number in value[:4])
        return first + (" ..." if len(value) > 4 else "")
    if key.endswith("_share"):
        return f"{value:.2%}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def print_table(statistics: Mapping[str, Any]) -> None:
    """Print key, value and meaning, one line each."""
    for key, value in statistics.items():
        print(f"{key:<28}{shown(key, value):>31}  {(KEYS | ROW_KEYS)[key]}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = FlagParser(
        prog="igd stats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_catalogue_flags(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )
    parser.add_argument("--prompt", help="prompt template: count the tokens of the training rows")
    parser.add_argument(
        "--max_length", type=int, default=512, help="tokens of prompt + target (default: 512)"
    )
    parser.add_argument(
        "--micro_batch", type=int, default=16, help="rows of a micro-batch (default: 16)"
    )
    args = parser.parse_args(argv)
    for name in ("max_length", "micro_batch"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, found {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code.

    Raises:
        UsageError: there is no such dataset or tokenizer, or they do not fit.
    """
    args = parse(argv)
    dataset = InteractionDataset.load(args.dataset)
    tokenizer = load_tokenizer(args.tokenizer)
    catalogue = Catalogue.build(dataset, tokenizer, args.item_kind)
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)

    statistics = catalogue_statistics(dataset, catalogue, trie, args.entropy)
    if args.prompt:
        sizes = (args.max_length, args.micro_batch)
        statistics |= row_statistics(dataset, tokenizer, catalogue, args.prompt, *sizes)
    if args.json:
        print(json.dumps(statistics))
    else:
        print_table(statistics)
    return 0


if __name__ == "__main__":
    distributed.run(main)
