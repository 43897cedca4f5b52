"""The catalogue: every item as a path of token ids that ends in EOS (IGD 3.1).

Letters in shapes: N items, T tokens of all paths together.

Token ids are made once, here. Training labels, trie, weights and search look them up by item; no
target is tokenized a second time. Tokenizing a target in another context could give other ids: in
many titles the last character and the newline merge into one token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from igd_ds.errors import UsageError, did_you_mean
from igd_ds.items.as_text import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("text", "semantic-id")

# Texts per call of the tokenizer, which returns Python lists of ids. Assumed, not measured.
TOKENIZE_CHUNK = 10_000

Text = TypeVar("Text")


class TargetRows(Protocol):
    """The part of a split that a catalogue reads."""

    @property
    def targets(self) -> np.ndarray:
        """Integers (R,): the target item of each row."""


class ItemDataset(Protocol):
    """The part of a dataset that a catalogue reads; `InteractionDataset` has it."""

    @property
    def titles(self) -> Sequence[str | None]:
        """N titles; None where an item has no title."""

    @property
    def semantic_ids(self) -> Sequence[Sequence[str]] | None:
        """N lists of codes, or None if the dataset has no semantic IDs."""

    @property
    def splits(self) -> Mapping[str, TargetRows]:
        """The splits by name; only `train` is read."""

    @property
    def fingerprint(self) -> str:
        """The hash of the dataset's files."""

    @property
    def num_items(self) -> int:
        """N."""


@dataclass(frozen=True)
class Catalogue:
    """Token paths and training counts of N items, and the fingerprints of what they were made from.

    Example:
        >>> catalogue = Catalogue.build(dataset, tokenizer)
        >>> tokenizer.decode(catalogue.path(3))
        'The Hobbit\\n<|endoftext|>'
    """

    token_ids: np.ndarray
    """int32 (T,): all paths one after the other. Each ends in EOS, which occurs nowhere else."""
    offsets: np.ndarray
    """int64 (N+1,): the path of item i is token_ids[offsets[i] : offsets[i+1]]."""
    counts: np.ndarray
    """int64 (N,): the number of training rows whose target is item i."""
    eos_token_id: int
    """Token id of EOS."""
    kind: str
    """"text": the tokens of title + "\\n". "semantic-id": one token per code."""
    tokenizer_fingerprint: str
    """See `tokenizer_fingerprint`."""
    dataset_fingerprint: str
    """`InteractionDataset.fingerprint`."""

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.counts)

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest path, EOS included."""
        return int(np.diff(self.offsets).max())

    def path(self, item: int) -> np.ndarray:
        """Return the tokens of an item, EOS included: an int32 view."""
        return self.token_ids[self.offsets[item] : self.offsets[item + 1]]

    def check_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, dataset: ItemDataset | None = None
    ) -> None:
        """Raise UsageError unless `tokenizer` writes the items as the catalogue has them.

        A tokenizer with the catalogue's fingerprint does. For any other one, the token ids of all
        items are compared, because only the ids matter: the file may change when another version of
        transformers saves it. Without a dataset, only the fingerprint can be compared.
        """
        if tokenizer.eos_token_id != self.eos_token_id:
            raise UsageError(
                f"items of the catalogue end in token {self.eos_token_id}, but the tokenizer's EOS "
                f"is {tokenizer.eos_token_id} ({tokenizer.eos_token!r}): undo the change of "
                "eos_token, or build the catalogue anew"
            )
        if tokenizer_fingerprint(tokenizer) == self.tokenizer_fingerprint:
            return

        reason = "its fingerprint differs"
        if dataset is not None:
            token_ids, offsets = item_paths(dataset, tokenizer, self.kind)
            other = self._first_difference(token_ids, offsets)
            if other is None:
                return
            before, now = self.path(other), token_ids[offsets[other] : offsets[other + 1]]
            reason = f"item {other} was {before.tolist()} and is {now.tolist()}"
        raise UsageError(
            "the catalogue was made with another tokenizer, so its token ids mean something else "
            f"here ({reason:.300}): give the tokenizer it was made with, or build it anew"
        )

    def _first_difference(self, token_ids: np.ndarray, offsets: np.ndarray) -> int | None:
        """Return the first item whose path differs from the given one; None if all are equal."""
        if np.array_equal(offsets, self.offsets) and np.array_equal(token_ids, self.token_ids):
            return None
        pairs = zip(offsets[:-1], offsets[1:], strict=True)
        return next(
            item
            for item, (begin, end) in enumerate(pairs)
            if not np.array_equal(self.path(item), token_ids[begin:end])
        )

    @classmethod
    def build(
        cls, dataset: ItemDataset, tokenizer: PreTrainedTokenizerBase, kind: str | None = None
    ) -> Catalogue:
        """Turn a dataset's items into token paths.

        Args:
            dataset: its items and the targets of its training rows.
            tokenizer: needs an EOS token. A fast tokenizer tokenizes in batches.
            kind: a name in KINDS; None takes the titles if the dataset has any.

        Raises:
            UsageError: the tokenizer has no EOS token, the kind is unknown, an item has no title or
                no semantic ID, a code is not exactly one token, or an item's tokens contain EOS.
        """
        if kind is None:
            kind = "text" if any(title is not None for title in dataset.titles) else "semantic-id"
        token_ids, offsets = item_paths(dataset, tokenizer, kind)
        return cls(
            token_ids=token_ids,
            offsets=offsets,
            counts=np.bincount(dataset.splits["train"].targets, minlength=dataset.num_items),
            eos_token_id=int(tokenizer.eos_token_id),
            kind=kind,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            dataset_fingerprint=dataset.fingerprint,
        )


def item_paths(
    dataset: ItemDataset, tokenizer: PreTrainedTokenizerBase, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return `Catalogue.token_ids` and `Catalogue.offsets` of a dataset's items.

    Raises:
        UsageError: as `Catalogue.build`.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "the tokenizer has no EOS token, and every item must end in one: set eos_token"
        )
    if kind not in KINDS:
        hint, known = did_you_mean(kind, KINDS), ", ".join(KINDS)
        raise UsageError(f"unknown --item_kind '{kind}'{hint} (known: {known})")

    if kind == "text":
        tokens, lengths = _tokenize_titles(dataset.titles, tokenizer)
    else:
        tokens, lengths = _look_up_codes(dataset.semantic_ids, dataset.num_items, tokenizer)
    _check_no_eos(tokens, lengths, tokenizer, dataset, kind)

    # Write the paths one after the other, with one EOS behind each.
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths + 1)])
    token_ids = np.full(offsets[-1], tokenizer.eos_token_id, np.int32)
    inside = np.ones(len(token_ids), bool)
    inside[offsets[1:] - 1] = False
    token_ids[inside] = tokens
    return token_ids, offsets


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 (hex) of what decides the token ids: the backend's JSON and the EOS id.

    Equal fingerprints mean equal token ids. Different fingerprints do not mean different ids: the
    same tokenizer can be written in several ways. `Catalogue.check_tokenizer` compares the ids.

    Padding and truncation are left out because a call of the tokenizer changes them. The PAD token
    is left out because callers set it to EOS. So the fingerprint is the same before and after use,
    and after saving and loading.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        state = json.loads(backend.to_str())
        state["padding"] = state["truncation"] = None
    state["eos_token_id"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def tokenize(
    texts: Sequence[Text],
    form: Callable[[Text], str],
    tokenizer: PreTrainedTokenizerBase,
    as_text: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize `form(text)` for all texts, without the special tokens around a text.

    With `as_text`, special tokens inside the texts are read as text (see `igd_ds.items.as_text`).

    The tokenizer is called on chunks of the texts. As Python lists, the tokens of ten million
    titles would take gigabytes.

    Returns:
        All tokens one after the other, int32, and the number of tokens of each text, int64.

    Example:
        >>> tokens, lengths = tokenize(["Dune", "Emma"], lambda title: title + "\\n", tokenizer)
    """
    chunks: list[np.ndarray] = []
    lengths: list[int] = []
    for start in range(0, len(texts), TOKENIZE_CHUNK):
        formed = [form(text) for text in texts[start : start + TOKENIZE_CHUNK]]
        encoded = encode(formed, tokenizer, as_text)
        lengths += map(len, encoded)
        chunks.append(np.fromiter(chain.from_iterable(encoded), np.int32))
    return np.concatenate(chunks), np.array(lengths, np.int64)


def _tokenize_titles(
    titles: Sequence[str | None], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of all `title + "\\n"`, int32, and their number per item, int64 (N,)."""
    present = [title for title in titles if title is not None]
    if len(present) < len(titles):
        raise UsageError(
            f"item {titles.index(None)} has no title ({len(titles) - len(present)} such items): "
            "prepare the dataset with title hygiene on (igd prepare does it by default)"
        )
    return tokenize(present, lambda title: title + "\n", tokenizer, as_text=True)


def _look_up_codes(
    semantic_ids: Sequence[Sequence[str]] | None,
    num_items: int,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of all codes, int32, and their number per item, int64 (N,)."""
    if semantic_ids is None:
        raise UsageError(
            'the dataset has no semantic IDs: use kind "text", or prepare it from a source that '
            "has them"
        )
    empty = [item for item in range(num_items) if not semantic_ids[item]]
    if empty:
        raise UsageError(
            f"item {empty[0]} has no semantic ID ({len(empty)} such items): every item needs at "
            "least one code"
        )

    known: dict[str, int] = {}
    for item, codes in enumerate(semantic_ids):
        for code in codes:
            if code not in known:
                known[code] = _token_of_code(code, item, tokenizer)

    lengths = np.array([len(codes) for codes in semantic_ids], np.int64)
    return np.fromiter((known[code] for codes in semantic_ids for code in codes), np.int32), lengths


def _token_of_code(code: str, item: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the one token of a code; raise UsageError if it is not one known token."""
    ids = tokenizer(code, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return int(ids[0])

    found = "the unknown token" if len(ids) == 1 else f"{len(ids)} tokens"
    raise UsageError(
        f"code {code!r} of item {item} is {found}, and must be exactly one: make a tokenizer with "
        "igd tokenizer --semantic_ids, or add the codes to this one with "
        "igd tokenizer --add_codes_to"
    )


def _check_no_eos(
    tokens: np.ndarray,
    lengths: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    dataset: ItemDataset,
    kind: str,
) -> None:
    """Raise UsageError naming the first item whose tokens (without the final EOS) contain EOS."""
    at = np.flatnonzero(tokens == tokenizer.eos_token_id)
    if not at.size:
        return

    item = int(np.searchsorted(np.cumsum(lengths), at[0], side="right"))
    if kind == "text" or dataset.semantic_ids is None:
        text = dataset.titles[item]
    else:
        text = " ".join(dataset.semantic_ids[item])
    raise UsageError(
        f"item {item} ({text!r}) contains the EOS token {tokenizer.eos_token!r}, which may only "
        "end an item: remove it from the item's text, or use another EOS token"
    )
