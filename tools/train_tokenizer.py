"""Train a small byte-level BPE tokenizer on a dataset's titles and the prompt templates.

    python tools/train_tokenizer.py --dataset DATASET --output TOKENIZER [--vocab_size 8192] [--semantic_ids]

Qwen2's split pattern and NFC; `<|endoftext|>` is EOS and padding. With `--semantic_ids` every code of the dataset becomes one
token, in sorted order after the BPE vocabulary. Equal inputs give equal files; a finished output made from the same request is
left alone, any other existing folder is refused.
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
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from igd_ds.data.dataset import fingerprint, read_info, read_items
from igd_ds.data.prompts import TEMPLATE_FOLDER

EOS = "<|endoftext|>"
SPECIAL_TOKENS = [EOS, "<|im_start|>", "<|im_end|>"]
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NUM_BYTES = 256
TEMPLATE_REPEATS = 1000  # a template stands before every row: its words should be whole tokens


def template_texts(domain: str) -> list[str]:
    """Return the texts of all prompt templates, `{domain}` filled in and other placeholders left out."""
    texts = [
        text
        for path in sorted(TEMPLATE_FOLDER.glob("*.yaml"))
        for text in yaml.safe_load(path.read_text(encoding="utf-8")).values()
        if isinstance(text, str)
    ]
    return [re.sub(r"\{\w*\}", "", text.replace("{domain}", domain)) for text in texts]


def train(titles: Sequence[str], texts: Sequence[str], vocab_size: int, codes: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer: BPE over `titles` (each as the line it is in a target) and `texts`, then one token per code."""
    if vocab_size < NUM_BYTES + len(SPECIAL_TOKENS):
        raise ValueError(f"--vocab_size {vocab_size}: {NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} special tokens must fit")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
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
    # Not "special": skip_special_tokens would drop the answer. Not normalised, so a code is matched as it is written.
    tokenizer.add_tokens([AddedToken(code, normalized=False, special=False) for code in sorted(codes)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False)


def make_tokenizer(dataset: Path, output: Path, vocab_size: int, with_codes: bool) -> str:
    """Write the tokenizer folder unless it is there; return a line that says what happened. Raises ValueError on bad input."""
    info = read_info(dataset)
    texts = template_texts(info["domain"])
    request = {"dataset": fingerprint(info), "vocab_size": vocab_size, "semantic_ids": with_codes, "templates": texts}
    record = output / "training.json"
    if output.exists():
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == request:
            return f"{output} is complete and was made from the same dataset and options: nothing to do"
        raise ValueError(
            f"{output} exists and was not made from this dataset with these options; delete it or choose another --output"
        )
    titles, semantic_ids = read_items(dataset)
    titles = [title for title in titles if title is not None]
    if with_codes and semantic_ids is None:
        raise ValueError(f"{dataset} has no semantic IDs; leave out --semantic_ids")
    if not titles and not with_codes:
        raise ValueError(f"{dataset} has semantic IDs instead of titles; add --semantic_ids")
    codes = {code for codes in semantic_ids for code in codes} if with_codes else set()
    tokenizer = train(titles, texts, vocab_size, codes)
    partial = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run that had our process id
    try:
        tokenizer.save_pretrained(partial)
        (partial / record.name).write_text(json.dumps(request, indent=1) + "\n", encoding="utf-8")
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{output}: {len(tokenizer)} tokens, {len(codes)} of them semantic ID codes"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on a dataset.")
    parser.add_argument("--dataset", required=True, type=Path, help="canonical dataset folder")
    parser.add_argument("--output", required=True, type=Path, help="tokenizer folder to make")
    parser.add_argument("--vocab_size", type=int, default=8192, help="BPE tokens, special ones included, codes not")
    parser.add_argument("--semantic_ids", action="store_true", help="add one token per semantic ID code")
    args = parser.parse_args(argv)
    try:
        print(make_tokenizer(args.dataset, args.output, args.vocab_size, args.semantic_ids))
    except (ValueError, OSError) as error:
        print(f"train_tokenizer.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
