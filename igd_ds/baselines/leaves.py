"""Items as columns of scores, for models that score complete items and generate no tokens.

Items with the same text or semantic ID share a leaf of the trie, and so a column.

Letters in shapes: N items, L leaves, n rows of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from igd_ds.errors import UsageError
from igd_ds.items.catalogue import Catalogue, ItemDataset
from igd_ds.items.decisiveness import information_gain
from igd_ds.items.ragged import ragged_arange
from igd_ds.items.store import StoredCatalogue
from igd_ds.items.trie import TokenTrie

EOS = 0
"""Token id of EOS in the catalogue of `build_catalogue`; words are numbered from 1 on."""


def build_catalogue(dataset: ItemDataset, kind: str) -> StoredCatalogue:
    """Return the catalogue of a dataset without a tokenizer: each word is one token.

    A word is a complete title, or one code of a semantic ID. The same items share a leaf as in the
    catalogue of a generative model, with one exception: a tokenizer may normalise Unicode (Qwen's
    does, to NFC) and so give two titles the same tokens.

    Args:
        dataset: the items and the targets of the training rows.
        kind: "text", "semantic-id", or "auto", which takes titles if the dataset has any.

    Raises:
        UsageError: an item has no title or no semantic ID, whichever `kind` asks for.
    """
    if kind == "auto":
        kind = "text" if any(title is not None for title in dataset.titles) else "semantic-id"
    words = _words(dataset, kind)

    different = dict.fromkeys(chain.from_iterable(words))
    token_of = {word: number for number, word in enumerate(different, EOS + 1)}
    paths = [[*(token_of[word] for word in item_words), EOS] for item_words in words]
    offsets = np.cumsum([0, *map(len, paths)])
    counts = np.bincount(dataset.splits["train"].targets, minlength=dataset.num_items)

    catalogue = Catalogue(
        token_ids=np.fromiter(chain.from_iterable(paths), np.int32),
        offsets=offsets,
        counts=counts,
        eos_token_id=EOS,
        kind=kind,
        tokenizer_fingerprint="none",
        dataset_fingerprint=dataset.fingerprint,
    )
    trie = TokenTrie.build(catalogue.token_ids, offsets, counts)
    return StoredCatalogue.build(catalogue, trie, information_gain(trie, "prior"), "prior")


def _words(dataset: ItemDataset, kind: str) -> list[Sequence[str]]:
    """Return the words of each item.

    Raises:
        UsageError: an item has none.
    """
    words: list[Sequence[str] | None] = [None] * dataset.num_items
    if kind == "semantic-id":
        if dataset.semantic_ids is not None:
            words = list(dataset.semantic_ids)
    else:
        words = [None if title is None else [title] for title in dataset.titles]

    found = [item_words for item_words in words if item_words is not None]
    if len(found) < len(words):
        what = "semantic ID" if kind == "semantic-id" else "title"
        raise UsageError(
            f"--item_kind {kind}: item {words.index(None)} has no {what}; give the other kind"
        )
    return found


@dataclass(frozen=True)
class Leaves:
    """The L leaves of a catalogue's trie as columns of scores.

    S items in all share a leaf with another item; `shared` lists these leaves.
    """

    nodes: np.ndarray
    """int64 (L,), the trie node of each column."""
    items: torch.Tensor
    """int64 (L,), one item of each leaf."""
    shared: torch.Tensor
    """int64, the columns of leaves with more than one item."""
    shared_items: torch.Tensor
    """int64 (S,), the items of these leaves."""
    shared_by: torch.Tensor
    """int64 (S,), the index in `shared` of the leaf of each of these items."""

    @classmethod
    def build(cls, trie: TokenTrie, device: torch.device) -> Leaves:
        """Number the leaves in the order of the trie's nodes."""
        nodes = np.flatnonzero(trie.is_leaf)
        first = trie.first_item[nodes].astype(np.int64)
        count = trie.num_items[nodes].astype(np.int64)
        shared = np.flatnonzero(count > 1)

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array.astype(np.int64)).to(device)

        return cls(
            nodes=nodes,
            items=on_device(trie.item_order[first]),
            shared=on_device(shared),
            shared_items=on_device(trie.item_order[ragged_arange(first[shared], count[shared])]),
            shared_by=on_device(np.repeat(np.arange(len(shared)), count[shared])),
        )

    def log_probabilities(self, of_items: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of the leaves: the sum over the items of a leaf.

        Args:
            of_items: (n, N), log-probabilities of the items.

        Returns:
            (n, L), in the same dtype.
        """
        of_leaves = of_items[:, self.items]
        if len(self.shared):
            shape = (len(of_items), len(self.shared))
            sums = torch.zeros(shape, dtype=torch.float64, device=of_items.device)
            sums.index_add_(1, self.shared_by, of_items[:, self.shared_items].double().exp())
            of_leaves[:, self.shared] = sums.log().to(of_leaves.dtype)
        return of_leaves
