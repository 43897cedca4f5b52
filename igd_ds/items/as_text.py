"""Titles as token ids without control tokens, however a title is spelled.

A title may hold the text of a special token: `<s>` is HTML's strike-through and LLaMA-2's BOS.
Inside a title it is text. Tokens that were added without the mark "special", such as the codes of
semantic IDs, stay tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, as_text: bool
) -> list[list[int]]:
    """Return the token ids of each text, without what the tokenizer puts around a text.

    Args:
        texts: at least one.
        tokenizer: a Hugging Face tokenizer.
        as_text: whether special tokens within a text are read as plain text.

    Example:
        >>> encode(["<s>$20 mug"], tokenizer, as_text=True)  # no BOS: "<", "s", ">", "$", …
    """
    options: dict[str, Any] = {"split_special_tokens": True} if as_text else {}
    encoded: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
        **options,
    )["input_ids"]
    if not as_text:
        return encoded

    # A Unigram vocabulary holds the special tokens as ordinary pieces too, so it can still produce
    # them.
    control = {index: name for name, index in control_tokens(tokenizer).items()}
    for number, ids in enumerate(encoded):
        if not control.keys().isdisjoint(ids):
            names = [control[index] for index in sorted(control.keys() & set(ids))]
            encoded[number] = _encode_apart(texts[number], names, tokenizer)
    return encoded


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the special tokens of a tokenizer, text → id, without the one for unknown text."""
    added = tokenizer.added_tokens_decoder.items()
    found = {str(token.content): int(index) for index, token in added if token.special}
    found |= zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {name: index for name, index in found.items() if index != tokenizer.unk_token_id}


def _encode_apart(text: str, names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a text, cut behind the first letter of each control token in it."""
    found = re.finditer("|".join(map(re.escape, names)), text)
    cuts = [0, *(match.start() + 1 for match in found), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(cuts) if begin < end]
    encoded = tokenizer(pieces, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [token for ids in encoded for token in ids]
