"""Tokenizers: loading them, and the tokens that one has beyond the model's own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from igd_ds.backbones.saved import offline_hint
from igd_ds.distributed import say
from igd_ds.errors import UsageError
from igd_ds.folders import read_json_object
from igd_ds.items.catalogue import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes under which transformers saves a tokenizer that is only a tokenizer.json."""

DAMAGED = "copy the tokenizer again, or give another in --tokenizer"
"""What to do with a damaged tokenizer."""

MAX_SAVINGS = 3
"""How often a tokenizer may change when it is saved. LLaMA's changes once."""


def load_tokenizer(
    name: str, trust_remote_code: bool = False, revision: str = ""
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub. A missing PAD token is replaced by EOS.

    Raises:
        UsageError: there is no tokenizer at `name`, it is damaged, or it has no EOS token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(name)
    if folder.is_file():
        raise UsageError(
            f"no tokenizer at '{name}': this is a file; give the folder, {folder.parent}, in "
            "--tokenizer"
        )

    # Where a config.json lies next to the tokenizer, AutoTokenizer takes the tokenizer class of the
    # model's type, which may normalise differently. `igd tokenizer` saves plain backends: they must
    # be loaded as such.
    saved = folder / "tokenizer_config.json"
    settings = read_json_object(saved, DAMAGED) if saved.is_file() else {}
    is_plain = settings.get("tokenizer_class") in PLAIN_TOKENIZERS
    kind = PreTrainedTokenizerFast if is_plain else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(
            name, trust_remote_code=trust_remote_code, revision=revision or None
        )
    except Exception as error:  # the package tokenizers raises nothing more special
        _refuse_damaged(folder)
        if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
            raise UsageError(
                f"{folder / 'tokenizer.model'} needs the package sentencepiece: pip install "
                "sentencepiece, or give a folder with tokenizer.json in --tokenizer"
            ) from error
        why = " ".join(str(error).split())
        raise UsageError(
            f"no tokenizer at '{name}'{offline_hint(name)}: give a folder with tokenizer.json or a "
            f"hub name in --tokenizer ({why})"
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


def _refuse_damaged(folder: Path) -> None:
    """Raise UsageError if one of a tokenizer's JSON files is damaged; the message names it."""
    for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
        path = folder / name
        if not path.is_file():
            continue
        content = read_json_object(path, DAMAGED)
        if name == "tokenizer.json" and not isinstance(content.get("model"), dict):
            raise UsageError(f"{path} describes no tokenizer (it has no 'model'): {DAMAGED}")


def as_saved(
    tokenizer: PreTrainedTokenizerBase,
    model_config: PreTrainedConfig | None,
    texts: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Return the tokenizer as it is after saving and loading, so that nothing changes it later.

    transformers drops some settings when it saves a tokenizer ("legacy" of LLaMA's), and what it
    loads again may be another one. A training uses what its evaluations will load.

    Args:
        tokenizer: as `load_tokenizer` returns it.
        model_config: of the model that is saved beside it, on which the tokenizer's class can
            depend; None for an adapter, which is saved without.
        texts: some of these are tokenized before and after; a difference gives a warning.
        trust_remote_code: see `load_tokenizer`.

    Raises:
        UsageError: the tokenizer changes with every saving.
    """
    given = tokenizer
    for _ in range(MAX_SAVINGS):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            if model_config is not None:
                model_config.save_pretrained(folder)
            again = load_tokenizer(folder, trust_remote_code)
        if tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer):
            break
        tokenizer = again
    else:
        raise UsageError(
            f"the tokenizer {given.name_or_path} changes whenever it is saved: save it once with "
            "save_pretrained of your version of transformers, and give that folder in --tokenizer"
        )

    for text in texts:
        before, after = (each(text, add_special_tokens=False).input_ids for each in (given, again))
        if before != after:
            say(
                f"warning: the tokenizer {given.name_or_path} is another one after saving and "
                f"loading: {text!r:.80} was {before[:20]} and is {after[:20]}; the latter is used",
                always=True,
            )
            break
    return again


def added_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    trust_remote_code: bool = False,
    revision: str = "",
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
        own = load_tokenizer(model_name, trust_remote_code, revision).get_vocab()
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
