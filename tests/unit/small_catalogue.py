"""Small catalogues without a tokenizer, and batches of their tokens."""

from collections.abc import Sequence

import numpy as np
import torch

from igd_ds.contracts import IGNORED, Batch, ObjectiveContext, PaddedRows
from igd_ds.data.batches import TokenColumns
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import edge_gain
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.store import StoredCatalogue
from igd_ds.items.trie import TokenTrie

EOS = 0


def stored_catalogue(paths: Sequence, counts: np.ndarray, entropy: str = "prior"):
    """Return a StoredCatalogue of token paths, each of which ends in EOS."""
    catalogue = Catalogue(
        token_ids=np.concatenate(paths).astype(np.int32),
        offsets=np.cumsum([0, *map(len, paths)]),
        counts=np.asarray(counts),
        eos_token_id=EOS,
        kind="text",
        tokenizer_fingerprint="none",
        dataset_fingerprint="none",
    )
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    return StoredCatalogue.build(catalogue, trie, edge_gain(trie, entropy=entropy), entropy)


def context_of(paths: Sequence, counts: np.ndarray, entropy="prior", dataset=""):
    """Return what an objective may look at, of token paths."""
    stored = stored_catalogue(paths, counts, entropy)
    return ObjectiveContext(stored, SearchTrie.build(stored.trie), str(dataset))


def batch_of_tokens(targets, weights=None, node=None, zero_gain=None) -> Batch:
    """Return a batch that knows its n labelled tokens and has no prompts; each token is a row.

    The weights are the unit matrix (n, n) unless they are given: `loss` then returns the loss of
    each token as a numerator of its own.
    """
    n = len(targets)
    empty = torch.zeros(n, 1, dtype=torch.int64)
    rows = torch.arange(n)
    return Batch(
        inputs=PaddedRows(empty, empty, empty + IGNORED),
        targets=torch.as_tensor(targets),
        weights=torch.eye(n) if weights is None else torch.as_tensor(weights),
        zero_gain=torch.zeros(n, dtype=torch.bool) if zero_gain is None else zero_gain,
        row=rows,
        node=torch.zeros(n, dtype=torch.int64) if node is None else torch.as_tensor(node),
        item_ids=rows,
        row_ids=rows,
    )


def batch_of_items(context: ObjectiveContext, weights: np.ndarray, items: Sequence[int]) -> Batch:
    """Return a batch of all tokens of some items, with the weights (C, K) of an objective."""
    columns = TokenColumns.build(context.stored, weights)
    offsets = columns.offsets
    place = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in items] or [[]])
    place = place.astype(np.int64)
    return batch_of_tokens(
        torch.from_numpy(columns.token_ids[place].astype(np.int64)),
        torch.from_numpy(columns.weights[place]),
        torch.from_numpy(columns.node[place].astype(np.int64)),
        torch.from_numpy(columns.zero_gain[place]),
    )
