"""The catalogue: every item as a path of token ids that ends in EOS (IGD 3.1). N items, T tokens of all paths.

The ids are made once, here. Labels, trie, weights and decoding look them up by item, and no target is ever tokenized a
second time: in many titles the last character and the newline merge into one token, so a second way would drift.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from igd_ds.errors import UsageError

KINDS = ("text", "semantic-id")
TOKENIZE_CHUNK = (
    10_000  # texts per call of the tokenizer: its Python lists of ids stay small (assumed)
)


@dataclass(frozen=True)
class Catalogue:
    """Token paths and training counts of N items, and what they were made from."""

    token_ids: np.ndarray
    """int32 (T,): all paths one after the other, each with EOS as its last token and nowhere else."""
    offsets: np.ndarray
    """int64 (N+1,): item i is token_ids[offsets[i] : offsets[i+1]]."""
    counts: np.ndarray
    """int64 (N,): how often item i is the target of a training row."""
    eos_token_id: int
    kind: str
    """"text": the tokens of title + "\\n"; "semantic-id": one token per code."""
    tokenizer_fingerprint: str
    dataset_fingerprint: str

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.counts)

    @property
    def max_length(self) -> int:
        """Tokens of the longest path, EOS included."""
        return int(np.diff(self.offsets).max())

    def path(self, item: int) -> np.ndarray:
        """Tokens of an item, EOS included: an int32 view."""
        return self.token_ids[self.offsets[item] : self.offsets[item + 1]]

    @classmethod
    def build(cls, dataset, tokenizer, kind: str | None = None) -> Catalogue:
        """Turn a dataset's items into token paths.

        Args:
            dataset: has `titles`, `semantic_ids`, `splits["train"].targets`, `fingerprint`, `num_items`.
            tokenizer: a Hugging Face tokenizer with an EOS token; a fast one tokenizes in batches.
            kind: "text" or "semantic-id"; None takes the titles where the dataset has any.

        Raises:
            ValueError: no EOS token; a missing title or semantic ID; a code that is not exactly one token; an item whose
                tokens hold EOS; unknown kind.
        """
        if tokenizer.eos_token_id is None:
            raise UsageError(
                "the tokenizer has no EOS token, and every item must end in one: set eos_token"
            )
        if kind is None:
            kind = "text" if any(title is not None for title in dataset.titles) else "semantic-id"
        if kind not in KINDS:
            raise UsageError(f"unknown kind of items {kind!r}; known: {', '.join(KINDS)}")
        if kind == "text":
            tokens, lengths = _tokenize_titles(dataset.titles, tokenizer)
        else:
            tokens, lengths = _look_up_codes(dataset.semantic_ids, dataset.num_items, tokenizer)
        _check_no_eos(tokens, lengths, tokenizer, dataset, kind)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths + 1)])
        token_ids = np.full(offsets[-1], tokenizer.eos_token_id, np.int32)
        inside = np.ones(len(token_ids), bool)
        inside[offsets[1:] - 1] = False
        token_ids[inside] = tokens
        return cls(
            token_ids=token_ids,
            offsets=offsets,
            counts=np.bincount(dataset.splits["train"].targets, minlength=dataset.num_items),
            eos_token_id=int(tokenizer.eos_token_id),
            kind=kind,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            dataset_fingerprint=dataset.fingerprint,
        )


def tokenizer_fingerprint(tokenizer) -> str:
    """sha256 (hex) of what decides the token ids: the backend tokenizer's JSON and the EOS id.

    Padding and truncation are left out, because a call of the tokenizer changes them, and so is the PAD token, which
    callers set to EOS: the fingerprint is the same before and after use, and after saving and loading.
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
    texts: Sequence, form: Callable[[object], str], tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of `form(text)` for all texts, int32, one after the other, and their numbers per text, int64; no special tokens.

    Works in chunks: as Python lists the tokens of ten million titles would take gigabytes.
    """
    chunks, lengths = [], []
    for start in range(0, len(texts), TOKENIZE_CHUNK):
        formed = [form(text) for text in texts[start : start + TOKENIZE_CHUNK]]
        encoded = tokenizer(
            formed, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        lengths += map(len, encoded)
        chunks.append(np.fromiter(chain.from_iterable(encoded), np.int32))
    return np.concatenate(chunks), np.array(lengths, np.int64)


def _tokenize_titles(titles: list[str | None], tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all `title + "\\n"`, int32, and their numbers per item, int64 (N,); EOS not included."""
    if None in titles:
        raise UsageError(
            f"item {titles.index(None)} has no title ({titles.count(None)} such items): "
            "prepare the dataset with title hygiene on (igd prepare does it by default)"
        )
    return tokenize(titles, lambda title: title + "\n", tokenizer)


def _look_up_codes(semantic_ids, num_items: int, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all codes, int32, and their numbers per item, int64 (N,); EOS not included."""
    if semantic_ids is None:
        raise UsageError(
            'the dataset has no semantic IDs; take kind "text", or prepare it from a source that has them'
        )
    empty = [item for item in range(num_items) if not semantic_ids[item]]
    if empty:
        raise UsageError(
            f"item {empty[0]} has no semantic ID ({len(empty)} such items): every item needs at least one code"
        )
    known = {}
    for item, codes in enumerate(semantic_ids):
        for code in codes:
            if code not in known:
                ids = tokenizer(code, add_special_tokens=False)["input_ids"]
                if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                    found = f"{len(ids)} tokens" if len(ids) != 1 else "the unknown token"
                    raise UsageError(
                        f"code {code!r} of item {item} is {found}, it must be exactly one: make a tokenizer with "
                        "igd tokenizer --semantic_ids, or add the codes to this one with igd tokenizer --add_codes_to"
                    )
                known[code] = ids[0]
    lengths = np.array([len(codes) for codes in semantic_ids], np.int64)
    return np.fromiter((known[code] for codes in semantic_ids for code in codes), np.int32), lengths


def _check_no_eos(tokens: np.ndarray, lengths: np.ndarray, tokenizer, dataset, kind: str) -> None:
    at = np.flatnonzero(tokens == tokenizer.eos_token_id)
    if at.size:
        item = int(np.searchsorted(np.cumsum(lengths), at[0], side="right"))
        text = dataset.titles[item] if kind == "text" else " ".join(dataset.semantic_ids[item])
        raise UsageError(
            f"item {item} ({text!r}) contains the EOS token {tokenizer.eos_token!r}, which may only end an item: "
            "remove it from the item's text, or use another EOS token"
        )
