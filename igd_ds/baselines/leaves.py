"""Whole items as columns of scores: for models that score items and write no tokens. Items written alike share a leaf.

Letters: N items, L leaves, n rows of scores.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from igd_ds.errors import UsageError
from igd_ds.items import decisiveness
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.store import StoredCatalogue
from igd_ds.items.trie import TokenTrie


def build_catalogue(dataset, kind: str) -> StoredCatalogue:
    """Return the catalogue that a generative model of this dataset writes, without a tokenizer.

    A word is a whole title, or a code of a semantic ID, and one token. So who shares a leaf is the same, unless a tokenizer
    normalises Unicode (Qwen's do, to NFC) and two titles differ in nothing else.

    Args:
        dataset: has `titles`, `semantic_ids`, `splits["train"].targets`, `fingerprint`, `num_items`.
        kind: "text", "semantic-id", or "auto": titles where the dataset has them.

    Raises:
        ValueError: an item without title or semantic ID, where these are what items are written as.
    """
    if kind == "auto":
        kind = "text" if any(title is not None for title in dataset.titles) else "semantic-id"
    names = (
        dataset.semantic_ids
        if kind == "semantic-id"
        else [title if title is None else [title] for title in dataset.titles]
    )
    if names is None or None in names:
        raise UsageError(
            f"--item_kind {kind}: item {names.index(None) if names else 0} has no such name; take the other kind"
        )
    numbers = {
        word: number for number, word in enumerate(dict.fromkeys(chain.from_iterable(names)), 1)
    }
    paths = [[*(numbers[word] for word in words), 0] for words in names]  # 0: EOS
    offsets = np.cumsum([0, *map(len, paths)])
    counts = np.bincount(dataset.splits["train"].targets, minlength=dataset.num_items)
    catalogue = Catalogue(
        np.fromiter(chain.from_iterable(paths), np.int32),
        offsets,
        counts,
        0,
        kind,
        "none",
        dataset.fingerprint,
    )
    trie = TokenTrie.build(catalogue.token_ids, offsets, counts)
    return StoredCatalogue(catalogue, trie, decisiveness.information_gain(trie, "prior"), "prior")


@dataclass(frozen=True)
class Leaves:
    """The leaves of the catalogue's trie, L in all, as columns of scores.

    `nodes` int64 (L,); `items` int64 (L,), an item of each. Of the S items that share a leaf: `shared_items` int64 (S,) and
    `shared_by` int64 (S,), which of the `shared` (int64, columns) leaves each belongs to.
    """

    nodes: np.ndarray
    items: torch.Tensor
    shared: torch.Tensor
    shared_items: torch.Tensor
    shared_by: torch.Tensor

    @classmethod
    def build(cls, trie: TokenTrie, device: torch.device) -> "Leaves":
        """Number the leaves in the trie's order."""
        nodes = np.flatnonzero(trie.is_leaf)
        count = trie.num_items[nodes].astype(np.int64)
        shared = np.flatnonzero(count > 1)
        items = trie.item_order[
            ranges(trie.first_item[nodes[shared]].astype(np.int64), count[shared])
        ]
        one_each = trie.item_order[trie.first_item[nodes]]
        arrays = (one_each, shared, items, np.repeat(np.arange(len(shared)), count[shared]))
        return cls(
            nodes, *(torch.from_numpy(array.astype(np.int64)).to(device) for array in arrays)
        )

    def log_probabilities(self, of_items: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities (n, L) of the leaves: items written alike add up. `of_items` (n, N)."""
        of_leaves = of_items[:, self.items]
        if len(self.shared):
            sums = torch.zeros(
                (len(of_items), len(self.shared)), dtype=torch.float64, device=of_items.device
            )
            sums.index_add_(1, self.shared_by, of_items[:, self.shared_items].double().exp())
            of_leaves[:, self.shared] = sums.log().to(of_leaves.dtype)
        return of_leaves


def ranges(begins: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return begins[0], begins[0] + 1, … (count[0] numbers), then begins[1], …: int64 (Σ count,)."""
    ends = np.cumsum(count)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - ends + count, count)
