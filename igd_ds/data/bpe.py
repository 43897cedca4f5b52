"""Train a small byte-level BPE on a dataset's titles and the prompt templates.

The split pattern and the normalisation (NFC) are those of Qwen2. `<|endoftext|>` is EOS and
padding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import yaml
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from igd_ds.data.prompts import TEMPLATE_FOLDER
from igd_ds.errors import UsageError

EOS = "<|endoftext|>"
SPECIAL_TOKENS = [EOS, "<|im_start|>", "<|im_end|>"]
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_BYTES = 256
TEMPLATE_REPEATS = 1000  # a template stands in every prompt, so its words should be whole tokens


def template_texts(domain: str) -> list[str]:
    """Return the texts of all prompt templates with `{domain}` filled in.

    Other placeholders are removed, and texts that are empty then are left out.
    """
    texts = [
        text
        for path in sorted(TEMPLATE_FOLDER.glob("*.yaml"))
        for text in yaml.safe_load(path.read_text(encoding="utf-8")).values()
        if isinstance(text, str)
    ]
    words = [re.sub(r"\{\w*\}", "", text.replace("{domain}", domain)) for text in texts]
    return [text for text in words if text]


def train_bpe(titles: Sequence[str], texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; equal inputs give equal tokenizers.

    Args:
        titles: the items' titles; each is trained as the line that a target is.
        texts: the texts of the prompt templates, see `template_texts`.
        vocab_size: tokens of the vocabulary at most, bytes and special tokens included.

    Raises:
        UsageError: the vocabulary is too small for all bytes and special tokens.

    Example:
        >>> train_bpe(["Super Mario"], template_texts("games"), vocab_size=8192)
    """
    if vocab_size < NUM_BYTES + len(SPECIAL_TOKENS):
        raise UsageError(
            f"--vocab_size {vocab_size}: {NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} special "
            "tokens must fit"
        )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()

    def lines() -> Iterator[str]:
        yield from (title + "\n" for title in titles)
        for _ in range(TEMPLATE_REPEATS):
            yield from texts

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(), trainer)
    return tokenizer
