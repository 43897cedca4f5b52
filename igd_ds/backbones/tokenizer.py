"""Tokenizers: loading them, and the tokens that one has beyond the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from igd_ds.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes under which transformers saves a tokenizer that is only a tokenizer.json."""


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub. A missing PAD token is replaced by EOS.

    Raises:
        UsageError: there is no tokenizer at `name`, or it has no EOS token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Where a config.json lies next to the tokenizer, AutoTokenizer takes the tokenizer class of the
    # model's type, which may normalise differently. `igd tokenizer` saves plain backends: they must
    # be loaded as such.
    saved = Path(name) / "tokenizer_config.json"
    is_plain = (
        saved.is_file() and json.loads(saved.read_text()).get("tokenizer_class") in PLAIN_TOKENIZERS
    )
    kind = PreTrainedTokenizerFast if is_plain else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no tokenizer at '{name}': give a folder with tokenizer.json or a hub name in "
            f"--tokenizer ({error})"
        ) from error

    # For a folder with a config.json and no tokenizer files, transformers makes a tokenizer of the
    # model's type that knows only special tokens.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UsageError(
            f"no tokenizer at '{name}': there are weights, but no files of a tokenizer; name one "
            "in --tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer at '{name}' has no EOS token: every item must end in one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def added_token_ids(
    tokenizer: PreTrainedTokenizerBase, model_name: str, trust_remote_code: bool = False
) -> range:
    """Return the ids of the tokens that `tokenizer` has beyond the tokenizer of the model.

    The range is empty where the model comes without a tokenizer: there is nothing to compare with.

    Example:
        >>> added_token_ids(load_tokenizer("qwen-with-codes"), "Qwen/Qwen2.5-0.5B")
        range(151665, 152433)

    Raises:
        UsageError: a token of the model's own tokenizer has another id here, or the added tokens do
            not follow after it without a gap.
    """
    try:
        own = load_tokenizer(model_name, trust_remote_code).get_vocab()
    except UsageError:
        return range(0)
    given = tokenizer.get_vocab()

    moved = next((token for token, index in own.items() if given.get(token) != index), None)
    if moved is not None:
        raise UsageError(
            f"--tokenizer does not belong to {model_name}: that model's token {own[moved]} is "
            f"{moved!r}, this tokenizer has {given.get(moved, 'no such token')}; leave --tokenizer "
            "out, or give the model's own with tokens added"
        )

    added = sorted(given[token] for token in given.keys() - own.keys())
    first = max(own.values()) + 1
    if added != list(range(first, first + len(added))):
        raise UsageError(
            f"--tokenizer has {len(added)} tokens more than {model_name}'s own, with ids "
            f"{added[0]} to {added[-1]}, not from {first} on without a gap: add tokens with "
            "igd tokenizer --add_codes_to"
        )
    return range(first, first + len(added))
