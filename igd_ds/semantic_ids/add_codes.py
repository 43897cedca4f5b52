"""Add a dataset's semantic-ID codes to a pretrained model's tokenizer, one token per code.

    igd tokenizer --add_codes_to --dataset DATASET --tokenizer Qwen/Qwen2.5-1.5B --output TOKENIZER

The tokenizer's own tokens keep their ids and the codes follow, sorted: `train.py --model_name_or_path Qwen/Qwen2.5-1.5B
--tokenizer TOKENIZER` gives each code an input and an output row and trains them. A finished output made from the same dataset
and tokenizer is left alone, any other existing folder is refused.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken

from igd_ds.backbones.causal_lm import load_tokenizer
from igd_ds.commands.tokenizer import check_codes_stay_apart, is_made, write_folder
from igd_ds.data.dataset import fingerprint, read_info, read_items
from igd_ds.errors import UsageError
from igd_ds.items.catalogue import tokenizer_fingerprint

RECORD = "codes.json"  # in the folder: what it was made from


def add_codes(tokenizer, codes: Sequence[str], name: str) -> None:
    """Add `codes` to `tokenizer` in place, in this order; ValueError when one is a token of the tokenizer `name` already."""
    own = tokenizer.get_vocab()
    for code in codes:
        ids = tokenizer(code, add_special_tokens=False)["input_ids"]
        if code in own or (len(ids) == 1 and ids[0] != tokenizer.unk_token_id):
            raise UsageError(
                f"code {code!r} is token {own.get(code, ids[0])} of the tokenizer at '{name}' already: rename the codes of the "
                "dataset, or give the tokenizer without them"
            )
    # Not "special": skip_special_tokens would drop the answer. Not normalised, so a code is matched as it is written.
    tokenizer.add_tokens([AddedToken(code, normalized=False, special=False) for code in codes])
    added, first = tokenizer.convert_tokens_to_ids(list(codes)), max(own.values()) + 1
    if added != list(range(first, first + len(codes))):
        raise UsageError(
            f"the tokenizer at '{name}' has unused ids below {first}, which new tokens took: renumber its tokens"
        )


def make_tokenizer(dataset: Path, name: str, output: Path) -> str:
    """Write the tokenizer folder unless it is there; return a line that says what happened. Raises ValueError on bad input."""
    tokenizer = load_tokenizer(name)
    request = {
        "dataset": fingerprint(read_info(dataset)),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    if is_made(output, RECORD, request, "dataset and tokenizer"):
        return (
            f"{output} is complete and was made from the same dataset and tokenizer: nothing to do"
        )
    _, semantic_ids = read_items(dataset)
    if semantic_ids is None:
        raise UsageError(
            f"{dataset} has no semantic IDs, so no codes to add; make some with igd ids"
        )
    codes = sorted({code for item_codes in semantic_ids for code in item_codes})
    add_codes(tokenizer, codes, name)
    check_codes_stay_apart(tokenizer, semantic_ids)
    write_folder(tokenizer, output, RECORD, request)
    return f"{output}: {len(tokenizer)} tokens, the last {len(codes)} of them semantic ID codes"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Add a dataset's semantic-ID codes to a tokenizer."
    )
    parser.add_argument(
        "--dataset", required=True, type=Path, help="canonical dataset folder with semantic IDs"
    )
    parser.add_argument(
        "--tokenizer", required=True, help="the pretrained model's own: folder or hub name"
    )
    parser.add_argument("--output", required=True, type=Path, help="tokenizer folder to make")
    args = parser.parse_args(argv)
    try:
        print(make_tokenizer(args.dataset, args.tokenizer, args.output))
    except (ValueError, OSError) as error:
        print(f"add_codes.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
