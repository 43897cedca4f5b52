"""Train a small byte-level BPE tokenizer on a dataset's titles and the prompt templates, or make one of semantic ID codes alone.

    igd tokenizer --dataset DATASET --output TOKENIZER [--vocab_size 8192] [--semantic_ids]
    igd tokenizer --dataset DATASET --output TOKENIZER --codes_only

Qwen2's split pattern and NFC; `<|endoftext|>` is EOS and padding. With `--semantic_ids` every code of the dataset becomes one
token, in sorted order after the BPE vocabulary; with `--codes_only` (TIGER) they come after `<pad>`, EOS and `<unk>`, which
stands for any text that is no code. Equal inputs give equal files; a finished output made from the same request is left alone,
any other existing folder is refused.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from igd_ds.data.dataset import fingerprint, read_info, read_items
from igd_ds.data.prompts import TEMPLATE_FOLDER
from igd_ds.errors import UsageError

RECORD = "training.json"  # in the folder: what it was made from
EOS = "<|endoftext|>"
SPECIAL_TOKENS = [EOS, "<|im_start|>", "<|im_end|>"]
PAD, UNKNOWN = "<pad>", "<unk>"  # of a tokenizer of codes alone
DEFAULT_VOCAB_SIZE = 8192
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NUM_BYTES = 256
TEMPLATE_REPEATS = 1000  # a template stands before every row: its words should be whole tokens


def template_texts(domain: str) -> list[str]:
    """Return the texts of all prompt templates, `{domain}` filled in, other placeholders and empty texts left out."""
    texts = [
        text
        for path in sorted(TEMPLATE_FOLDER.glob("*.yaml"))
        for text in yaml.safe_load(path.read_text(encoding="utf-8")).values()
        if isinstance(text, str)
    ]
    words = [re.sub(r"\{\w*\}", "", text.replace("{domain}", domain)) for text in texts]
    return [text for text in words if text]


def train(
    titles: Sequence[str], texts: Sequence[str], vocab_size: int, codes: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Train the tokenizer: BPE over `titles` (each as the line it is in a target) and `texts`, then one token per code."""
    if vocab_size < NUM_BYTES + len(SPECIAL_TOKENS):
        raise UsageError(
            f"--vocab_size {vocab_size}: {NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens must fit"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def lines() -> Iterator[str]:
        yield from (title + "\n" for title in titles)
        for _ in range(TEMPLATE_REPEATS):
            yield from texts

    tokenizer.train_from_iterator(lines(), trainer)
    add_codes(tokenizer, codes)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def of_codes(codes: Sequence[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose vocabulary is PAD, EOS, UNKNOWN and the codes; text between codes is one UNKNOWN."""
    special = (PAD, EOS, UNKNOWN)
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(special)}, unk_token=UNKNOWN)
    )
    tokenizer.decoder = decoders.Fuse()
    add_codes(tokenizer, codes)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def add_codes(tokenizer: Tokenizer, codes: Sequence[str]) -> None:
    """Give every code a new token. Raises ValueError if one has a token already."""
    clash = next((code for code in sorted(codes) if tokenizer.token_to_id(code) is not None), None)
    if clash is not None:
        raise UsageError(
            f"code {clash!r} is also a token of the tokenizer: rename the codes, for example to '<a_12>'"
        )
    # Not "special": skip_special_tokens would drop the answer. Not normalised, so a code is matched as it is written.
    tokenizer.add_tokens(
        [AddedToken(code, normalized=False, special=False) for code in sorted(codes)]
    )


def check_codes_stay_apart(
    tokenizer: PreTrainedTokenizerFast, semantic_ids: Sequence[Sequence[str]]
) -> None:
    """Raise ValueError if an item's codes, written one after the other as prompts write them, are read as other tokens."""
    written = tokenizer(
        ["".join(codes) for codes in semantic_ids],
        add_special_tokens=False,
        return_attention_mask=False,
    )
    for codes, ids in zip(semantic_ids, written["input_ids"], strict=True):
        if (read := tokenizer.convert_ids_to_tokens(ids)) != list(codes):
            raise UsageError(
                f"codes {codes} run into each other: {''.join(codes)!r} reads {read}; write codes as '<a_12>'"
            )


def is_made(output: Path, record: str, request: dict, what: str) -> bool:
    """Whether the tokenizer folder is there, made from this request; ValueError when it was made from another `what`."""
    if not output.exists():
        return False
    path = output / record
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == request:
        return True
    raise UsageError(
        f"{output} exists and was not made from this {what}; delete it or choose another --output"
    )


def write_folder(
    tokenizer: PreTrainedTokenizerFast, output: Path, record: str, request: dict
) -> None:
    """Write a tokenizer folder, whole or not at all, with what it was made from in the file `record`."""
    partial = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run that had our process id
    try:
        tokenizer.save_pretrained(partial)
        (partial / record).write_text(json.dumps(request, indent=1) + "\n", encoding="utf-8")
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_tokenizer(
    dataset: Path, output: Path, vocab_size: int, with_codes: bool, codes_only: bool
) -> str:
    """Write the tokenizer folder unless it is there; return a line that says what happened. Raises ValueError on bad input."""
    info = read_info(dataset)
    texts = template_texts(info["domain"])
    request = {"dataset": fingerprint(info)}
    request |= (
        {"codes_only": True}
        if codes_only
        else {"vocab_size": vocab_size, "semantic_ids": with_codes, "templates": texts}
    )
    if is_made(output, RECORD, request, "dataset with these options"):
        return f"{output} is complete and was made from the same dataset and options: nothing to do"
    titles, semantic_ids = read_items(dataset)
    titles = [title for title in titles if title is not None]
    with_codes |= codes_only
    if with_codes and semantic_ids is None:
        raise UsageError(
            f"{dataset} has no semantic IDs; leave out --{'codes_only' if codes_only else 'semantic_ids'}"
        )
    if not titles and not with_codes:
        raise UsageError(
            f"{dataset} has semantic IDs instead of titles; add --semantic_ids or --codes_only"
        )
    codes = {code for codes in semantic_ids for code in codes} if with_codes else set()
    tokenizer = of_codes(codes) if codes_only else train(titles, texts, vocab_size, codes)
    if with_codes:
        check_codes_stay_apart(tokenizer, semantic_ids)
    write_folder(tokenizer, output, RECORD, request)
    return f"{output}: {len(tokenizer)} tokens, {len(codes)} of them semantic ID codes"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer on a dataset, or make one of its codes."
    )
    parser.add_argument("--dataset", required=True, type=Path, help="canonical dataset folder")
    parser.add_argument("--output", required=True, type=Path, help="tokenizer folder to make")
    parser.add_argument(
        "--vocab_size",
        type=int,
        help=f"BPE tokens, special ones included, codes not ({DEFAULT_VOCAB_SIZE})",
    )
    codes = parser.add_mutually_exclusive_group()
    codes.add_argument(
        "--semantic_ids", action="store_true", help="add one token per semantic ID code"
    )
    codes.add_argument(
        "--codes_only",
        action="store_true",
        help="semantic ID codes and special tokens, no words (TIGER)",
    )
    args = parser.parse_args(argv)
    if args.codes_only and args.vocab_size is not None:
        parser.error("--vocab_size counts words, and --codes_only has none: leave one of them out")
    vocab_size = DEFAULT_VOCAB_SIZE if args.vocab_size is None else args.vocab_size
    try:
        print(
            make_tokenizer(
                args.dataset, args.output, vocab_size, args.semantic_ids, args.codes_only
            )
        )
    except (ValueError, OSError) as error:
        print(f"train_tokenizer.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
