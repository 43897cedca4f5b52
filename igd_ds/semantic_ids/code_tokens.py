"""Codes as tokens: tokenizers in which each code of a dataset's semantic IDs is exactly one token.

There are three ways to make one: train a BPE on the dataset's titles and add the codes to it; make
a tokenizer of the codes alone (as TIGER does); add the codes to the tokenizer of a pretrained
model. In all of them the codes come last in the vocabulary, sorted.

A tokenizer folder holds what `save_pretrained` writes and a record of what it was made from:
training.json, or codes.json where codes were added to a pretrained tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from igd_ds.backbones.tokenizer import load_tokenizer
from igd_ds.data.bpe import EOS, template_texts, train_bpe
from igd_ds.data.dataset import fingerprint, read_info, read_items
from igd_ds.errors import UsageError
from igd_ds.folders import is_made, new_folder, write_text
from igd_ds.items.catalogue import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINING_RECORD = "training.json"
"""Record of a tokenizer that was trained, or made of codes alone."""
CODES_RECORD = "codes.json"
"""Record of a pretrained tokenizer with codes added."""
PAD, UNKNOWN = "<pad>", "<unk>"
"""Special tokens of a tokenizer of codes alone, besides EOS."""


def write_trained_tokenizer(
    dataset: Path, output: Path, vocab_size: int, with_codes: bool = False
) -> str:
    """Train a BPE on a dataset's titles and write the tokenizer folder.

    Args:
        dataset: canonical dataset folder.
        output: the tokenizer folder to make; nothing happens if it was made from the same request.
        vocab_size: tokens of the BPE, special ones included, codes not included.
        with_codes: whether to add a token for each code of the dataset's semantic IDs.

    Returns:
        A line that says what happened.

    Raises:
        UsageError: the dataset has no titles, or no semantic IDs for `with_codes`; `vocab_size` is
            too small; a code is a token already, or codes merge with each other; `output` was made
            from another request.
    """
    info = read_info(dataset)
    texts = template_texts(info["domain"])
    request = {
        "dataset": fingerprint(info),
        "vocab_size": vocab_size,
        "semantic_ids": with_codes,
        "templates": texts,
    }
    if is_made(output, TRAINING_RECORD, request):
        return _nothing_to_do(output)

    all_titles, semantic_ids = read_items(dataset)
    titles = [title for title in all_titles if title is not None]
    if with_codes and semantic_ids is None:
        raise UsageError(f"{dataset} has no semantic IDs; leave out --semantic_ids")
    if not titles and not with_codes:
        raise UsageError(
            f"{dataset} has semantic IDs and no titles; add --semantic_ids or --codes_only"
        )

    paths = semantic_ids if with_codes and semantic_ids is not None else []
    codes = codes_of(paths)
    tokenizer = bpe_with_codes(titles, texts, vocab_size, codes)
    check_codes_stay_apart(tokenizer, paths)
    write_folder(tokenizer, output, TRAINING_RECORD, request)
    return f"{output}: {len(tokenizer)} tokens, {len(codes)} of them semantic ID codes"


def write_codes_tokenizer(dataset: Path, output: Path) -> str:
    """Write the folder of a tokenizer that knows a dataset's codes and special tokens alone.

    Args:
        dataset: canonical dataset folder with semantic IDs.
        output: the tokenizer folder to make; nothing happens if it was made from the same dataset.

    Returns:
        A line that says what happened.

    Raises:
        UsageError: the dataset has no semantic IDs; a code is a special token; codes merge with
            each other; `output` was made from another request.
    """
    request = {"dataset": fingerprint(read_info(dataset)), "codes_only": True}
    if is_made(output, TRAINING_RECORD, request):
        return _nothing_to_do(output)

    _, semantic_ids = read_items(dataset)
    if semantic_ids is None:
        raise UsageError(f"{dataset} has no semantic IDs; leave out --codes_only")

    codes = codes_of(semantic_ids)
    tokenizer = tokenizer_of_codes(codes)
    check_codes_stay_apart(tokenizer, semantic_ids)
    write_folder(tokenizer, output, TRAINING_RECORD, request)
    return f"{output}: {len(tokenizer)} tokens, {len(codes)} of them semantic ID codes"


def write_tokenizer_with_codes(dataset: Path, name: str, output: Path) -> str:
    """Add a dataset's codes to the tokenizer of a pretrained model and write the tokenizer folder.

    Args:
        dataset: canonical dataset folder with semantic IDs.
        name: the pretrained model's own tokenizer, a folder or a name on the Hugging Face hub.
        output: the tokenizer folder to make; nothing happens if it was made from the same dataset
            and tokenizer.

    Returns:
        A line that says what happened.

    Raises:
        UsageError: there is no such tokenizer; the dataset has no semantic IDs; a code is a token
            already, or codes merge with each other; `output` was made from another request.
    """
    tokenizer = load_tokenizer(name)
    request = {
        "dataset": fingerprint(read_info(dataset)),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    if is_made(output, CODES_RECORD, request):
        return _nothing_to_do(output)

    _, semantic_ids = read_items(dataset)
    if semantic_ids is None:
        raise UsageError(
            f"{dataset} has no semantic IDs, so there are no codes to add; igd ids makes some"
        )

    codes = codes_of(semantic_ids)
    add_to_pretrained(tokenizer, codes, name)
    check_codes_stay_apart(tokenizer, semantic_ids)
    write_folder(tokenizer, output, CODES_RECORD, request)
    return f"{output}: {len(tokenizer)} tokens, the last {len(codes)} of them semantic ID codes"


def codes_of(semantic_ids: Iterable[Sequence[str]]) -> list[str]:
    """Return the different codes of all items, sorted.

    Example:
        >>> codes_of([["<a_1>", "<b_0>"], ["<a_0>", "<b_0>"]])
        ['<a_0>', '<a_1>', '<b_0>']
    """
    return sorted({code for codes in semantic_ids for code in codes})


def bpe_with_codes(
    titles: Sequence[str], texts: Sequence[str], vocab_size: int, codes: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a BPE trained on `titles` and `texts`, and one token for each code.

    Raises:
        UsageError: see `train_bpe` and `add_codes`.
    """
    tokenizer = train_bpe(titles, texts, vocab_size)
    add_codes(tokenizer, codes)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def tokenizer_of_codes(codes: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose vocabulary is PAD, EOS, UNKNOWN and the codes.

    Any text between codes becomes one UNKNOWN token.

    Raises:
        UsageError: see `add_codes`.
    """
    special = {token: index for index, token in enumerate((PAD, EOS, UNKNOWN))}
    tokenizer = Tokenizer(models.WordLevel(special, unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    add_codes(tokenizer, codes)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def add_codes(tokenizer: Tokenizer, codes: Iterable[str]) -> None:
    """Give every code a new token, in sorted order, in place.

    Raises:
        UsageError: a code is a token already.
    """
    codes = sorted(codes)
    clash = next((code for code in codes if tokenizer.token_to_id(code) is not None), None)
    if clash is not None:
        raise UsageError(
            f"code {clash!r} is also a token of the tokenizer: rename the codes, for example to "
            "'<a_12>'"
        )
    tokenizer.add_tokens([_code_token(code) for code in codes])


def add_to_pretrained(tokenizer: PreTrainedTokenizerBase, codes: Sequence[str], name: str) -> None:
    """Give every code a new token behind the tokenizer's own ones, in this order, in place.

    The tokenizer's own tokens keep their ids.

    Args:
        tokenizer: the tokenizer of a pretrained model.
        codes: the codes to add.
        name: what the tokenizer is called in error messages.

    Raises:
        UsageError: a code is a token already, or the tokenizer has unused ids that new tokens would
            take.
    """
    own = tokenizer.get_vocab()
    for code in codes:
        ids = tokenizer(code, add_special_tokens=False)["input_ids"]
        if code in own or (len(ids) == 1 and ids[0] != tokenizer.unk_token_id):
            raise UsageError(
                f"code {code!r} is token {own.get(code, ids[0])} of the tokenizer at '{name}' "
                "already: rename the codes of the dataset, or give the tokenizer without them"
            )

    tokenizer.add_tokens([_code_token(code) for code in codes])

    added, first = tokenizer.convert_tokens_to_ids(list(codes)), max(own.values()) + 1
    if added != list(range(first, first + len(codes))):
        raise UsageError(
            f"the tokenizer at '{name}' has unused ids below {first}, which new tokens took: "
            "renumber its tokens"
        )


def _code_token(code: str) -> AddedToken:
    """Return the token of a code.

    It is not "special", because skip_special_tokens would drop the model's answer. It is not
    normalised, so that a code is matched as it is written.
    """
    return AddedToken(code, normalized=False, special=False)


def check_codes_stay_apart(
    tokenizer: PreTrainedTokenizerBase, semantic_ids: Sequence[Sequence[str]]
) -> None:
    """Check that the codes of an item, written without spaces, are read as the same codes.

    Prompts write them without spaces.

    Raises:
        UsageError: the codes of an item are read as other tokens.
    """
    if not semantic_ids:
        return
    written = tokenizer(
        ["".join(codes) for codes in semantic_ids],
        add_special_tokens=False,
        return_attention_mask=False,
    )
    for codes, ids in zip(semantic_ids, written["input_ids"], strict=True):
        read = tokenizer.convert_ids_to_tokens(ids)
        if read != list(codes):
            raise UsageError(
                f"codes {codes} merge with each other: {''.join(codes)!r} is read as {read}; write "
                "codes as '<a_12>'"
            )


def write_folder(
    tokenizer: PreTrainedTokenizerBase, output: Path, record: str, request: Mapping[str, Any]
) -> None:
    """Write a tokenizer folder, which appears only when it is complete.

    Args:
        tokenizer: what to save.
        output: the folder to make.
        record: the name of the file that holds the request.
        request: what the tokenizer was made from.
    """
    with new_folder(output) as unfinished:
        tokenizer.save_pretrained(unfinished)
        write_text(unfinished / record, json.dumps(request, indent=1) + "\n")


def _nothing_to_do(output: Path) -> str:
    return f"{output} is complete and was made by the same request: nothing to do"
