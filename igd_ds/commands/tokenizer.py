"""Make a tokenizer for a dataset: train a BPE, use its codes alone, or add its codes to another.

    igd tokenizer --dataset DATASET --output TOKENIZER [--vocab_size 8192] [--semantic_ids]
    igd tokenizer --dataset DATASET --output TOKENIZER --codes_only
    igd tokenizer --dataset DATASET --output TOKENIZER --add_codes_to Qwen/Qwen2.5-1.5B

The first trains a small byte-level BPE on the dataset's titles and the prompt templates. With
--semantic_ids every code of the dataset becomes one token behind the BPE's. --codes_only makes a
vocabulary of <pad>, EOS, <unk> and the codes; any text that is no code is read as <unk> (TIGER).
--add_codes_to takes a pretrained model's own tokenizer, whose tokens keep their ids, and adds the
codes: `igd train --model_name_or_path Qwen/Qwen2.5-1.5B --tokenizer TOKENIZER` gives each code an
input and an output row and trains them. Codes are in sorted order.

Equal inputs give equal files. If TOKENIZER is complete and was made from the same request, the
command does nothing. If it was made from another request, the command refuses.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from igd_ds import distributed
from igd_ds.config.options import FlagParser
from igd_ds.semantic_ids.code_tokens import (
    write_codes_tokenizer,
    write_tokenizer_with_codes,
    write_trained_tokenizer,
)

DEFAULT_VOCAB_SIZE = 8192


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a flag that the chosen way does not use is an error."""
    parser = FlagParser(
        prog="igd tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", required=True, type=Path, help="canonical dataset folder")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="TOKENIZER", help="tokenizer folder to make"
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        help="tokens of the BPE, special ones included, codes not included "
        f"(default: {DEFAULT_VOCAB_SIZE})",
    )

    codes = parser.add_mutually_exclusive_group()
    codes.add_argument(
        "--semantic_ids", action="store_true", help="add one token for each semantic-ID code"
    )
    codes.add_argument(
        "--codes_only",
        action="store_true",
        help="make a vocabulary of semantic-ID codes and special tokens, without words (TIGER)",
    )
    codes.add_argument(
        "--add_codes_to",
        metavar="NAME_OR_FOLDER",
        help="add the semantic-ID codes to this tokenizer: a folder or a name on the hub",
    )

    args = parser.parse_args(argv)
    if args.vocab_size is None:
        args.vocab_size = DEFAULT_VOCAB_SIZE
    elif args.codes_only:
        parser.error("--vocab_size counts words, and --codes_only has none: leave one of them out")
    elif args.add_codes_to is not None:
        parser.error("--vocab_size belongs to training, and --add_codes_to trains nothing")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code.

    Raises:
        UsageError: the dataset, a flag or an existing output folder does not fit the request.
    """
    args = parse(argv)
    if args.add_codes_to is not None:
        message = write_tokenizer_with_codes(args.dataset, args.add_codes_to, args.output)
    elif args.codes_only:
        message = write_codes_tokenizer(args.dataset, args.output)
    else:
        message = write_trained_tokenizer(
            args.dataset, args.output, args.vocab_size, args.semantic_ids
        )
    print(message)
    return 0


if __name__ == "__main__":
    distributed.run(main)
