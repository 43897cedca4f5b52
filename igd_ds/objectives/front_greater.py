"""Weights from how far a token narrows down what an item is like: front-greater (MTC 4.1.1).

Letters in shapes: N items, T tokens of all paths, D width of an embedding, M trie nodes, L levels = tokens of the longest item
without EOS.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from igd_ds import distributed
from igd_ds.items.embeddings import check_vectors, load_embeddings, open_array
from igd_ds.items.trie import TokenTrie
from igd_ds.objectives.per_item import sum_to_length

CHUNK_BYTES = (
    1 << 28
)  # float64 embeddings, a few of D dimensions of all items, held at a time (assumed)


def front_greater(stored, config) -> np.ndarray:
    """Return w_k ∝ max(μ_{k−1} − μ_k, 0) for an item's k-th token, float32 (T,) (MTC 4.1.1).

    μ_k is the mean over all items, cold ones included, of the mean squared distance V to the centroid of the items that share
    the first k tokens, in the space of `config.item_embeddings`; an item that has ended before is alone, with V = 0. Per item
    the weights sum to its number of tokens without EOS, and EOS gets 1; an item none of whose levels reduces the
    dispersion gets 1 everywhere.

    Raises:
        ValueError: the embeddings are missing, of another shape or of other items, not finite, or all equal.
    """
    # Small result of a lot of reading: once, not on every rank.
    reduction = np.array(
        distributed.on_main(
            lambda: dispersion_reductions(stored.trie, _vectors(stored, config)).tolist()
        )
    )
    offsets = stored.catalogue.offsets
    lengths = np.diff(offsets)
    level = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return sum_to_length(
        np.append(reduction, 0.0)[level], offsets
    )  # the entry more is the longest item's EOS


def _vectors(stored, config) -> np.ndarray:
    """Map the embeddings (N, D): a .npy whose row i is item i's, or a folder of igd embed, which knows its items."""
    path = Path(config.item_embeddings)
    if path.is_dir():
        items = pq.read_table(
            Path(config.dataset) / "items.parquet", columns=["source_id", "title"]
        )
        return load_embeddings(path, items).vectors
    vectors = open_array(path)
    check_vectors(vectors, len(stored.catalogue.offsets) - 1, f"--item_embeddings {path}")
    return vectors


def dispersion_reductions(trie: TokenTrie, vectors: np.ndarray) -> np.ndarray:
    """Return δ_k = μ_{k−1} − μ_k for levels k = 1 … L, float64 (L,), of embeddings `vectors` (N, D).

    What a split of a group G into parts P takes off the summed squared distances is Σ_P |P|·‖centroid(P) − centroid(G)‖²,
    and that is what is summed: never negative (MTC Lemma 4.1), no difference of large numbers, and exactly 0 where no
    group splits. Items that end at level k have their parts to themselves, one each.
    """
    splits = list(_splits(trie))
    reduction = np.zeros(len(splits))
    width = max(CHUNK_BYTES // (8 * len(vectors)), 1)
    for begin in range(0, vectors.shape[1], width):
        # (D', N), so that sums over a range of items run along memory: measured 4 to 30 times as fast.
        values = np.ascontiguousarray(
            vectors[:, begin : begin + width].take(trie.item_order, axis=0).T, dtype=np.float64
        )
        for level, split in enumerate(splits):
            reduction[level] += split.reduction(values)
    return reduction / len(vectors)


@dataclass(frozen=True)
class _Split:
    """How the groups of one level (G of them) split into the parts of the next (P), those that stay whole left out."""

    items: np.ndarray
    """int64: positions in trie.item_order of all their items, part after part."""
    part_begin: np.ndarray
    """int64 (P,): first entry of `items` of a part."""
    part_size: np.ndarray
    """int64 (P,): items of a part."""
    group_begin: np.ndarray
    """int64 (G,): first part of a group."""

    def reduction(self, values: np.ndarray) -> float:
        """Σ over parts of |P|·‖centroid(P) − centroid(G)‖², of `values` float64 (D', N) in trie.item_order's order."""
        if not len(self.part_size):
            return 0.0
        sums = np.add.reduceat(values.take(self.items, axis=1), self.part_begin, axis=1)
        centroid = np.add.reduceat(sums, self.group_begin, axis=1) / np.add.reduceat(
            self.part_size, self.group_begin
        )
        sums /= self.part_size
        sums -= np.repeat(centroid, np.diff(self.group_begin, append=len(self.part_size)), axis=1)
        sums *= sums
        return float(sums.sum(0) @ self.part_size)


def _splits(trie: TokenTrie) -> Iterator[_Split]:
    """Yield the splits that token 1, 2, … L make."""
    level_begin, is_leaf = trie.level_begin(), trie.is_leaf
    for depth in range(1, len(level_begin) - 2):  # at the last depth stands the longest items' EOS
        nodes = np.arange(level_begin[depth], level_begin[depth + 1])
        # A leaf here is the EOS of shorter items, equal paths maybe: they have ended, so each is a part of its own.
        parts = np.where(is_leaf[nodes], trie.num_items[nodes], 1)
        parent = trie.parent[nodes] - level_begin[depth - 1]
        splits = (
            np.bincount(parent, parts)[parent] > 1
        )  # decided on integers: no rounding makes a forced token a gain
        nodes, parts, parent = (
            nodes[splits],
            parts[splits],
            np.repeat(parent[splits], parts[splits]),
        )
        num_items = trie.num_items[nodes].astype(np.int64)
        part_size = np.repeat(np.where(is_leaf[nodes], 1, num_items), parts)
        before = np.cumsum(num_items) - num_items
        yield _Split(
            items=np.repeat(trie.first_item[nodes] - before, num_items)
            + np.arange(num_items.sum()),
            part_begin=np.cumsum(part_size) - part_size,
            part_size=part_size,
            group_begin=np.flatnonzero(np.diff(parent, prepend=-1)),
        )
