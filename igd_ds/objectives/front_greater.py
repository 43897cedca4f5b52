"""Weights from how far a token narrows down what an item is like: `front-greater` (MTC 4.1.1).

Letters in shapes: N items, T tokens of all paths, D width of an embedding, M trie nodes, L levels,
which is the number of tokens of the longest item without EOS.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from igd_ds import distributed
from igd_ds.config.options import option
from igd_ds.contracts import ObjectiveContext
from igd_ds.errors import UsageError
from igd_ds.items.embeddings import check_vectors, load_embeddings, open_array
from igd_ds.items.ids import ItemIds
from igd_ds.items.ragged import index_within, ragged_arange
from igd_ds.items.trie import TokenTrie
from igd_ds.objectives.per_item import sum_to_length
from igd_ds.objectives.weighted import TokenWeighting

CHUNK_BYTES = 1 << 28
"""Bytes of float64 embeddings, a few of the D dimensions of all items, held at a time (assumed)."""


@dataclass(frozen=True, kw_only=True)
class FrontGreaterOptions:
    """Flags of `front-greater`."""

    item_embeddings: str = option(
        "folder that igd embed made; or a .npy with one row per item, in a dataset that has kept "
        "the source's numbers"
    )

    def check(self) -> None:
        """Raise UsageError if there is nothing at the path."""
        if not Path(self.item_embeddings).exists():
            raise UsageError(
                "--item_embeddings must name an existing .npy with one row per item, or a folder "
                f"that igd embed made, found {self.item_embeddings}"
            )


class FrontGreater(TokenWeighting):
    """A token weighs what its level takes off the dispersion of the item embeddings (MTC 4.1.1)."""

    Options = FrontGreaterOptions

    def weights(self, context: ObjectiveContext) -> np.ndarray:
        """Return `front_greater_weights`, float32 (tokens, 1)."""
        return front_greater_weights(context, self.options.item_embeddings)[:, None]


def front_greater_weights(context: ObjectiveContext, item_embeddings: str) -> np.ndarray:
    """Return w_k ∝ max(μ_{k−1} − μ_k, 0) for an item's k-th token, float32 (T,) (MTC 4.1.1).

    μ_k is the mean over all items, cold ones included, of the mean squared distance V to the
    centroid of the items that share the first k tokens, in the space of the embeddings. An item
    that has ended before level k is alone, with V = 0. Per item the weights sum to its number of
    tokens without EOS, and EOS gets 1. An item none of whose levels reduces the dispersion gets 1
    everywhere.

    All ranks must call it.

    Raises:
        UsageError: the embeddings are missing, of another shape or of other items, not finite, or
            all equal, or nothing says whose order they are in.
    """

    def reductions() -> list[float]:
        vectors = _vectors(context, Path(item_embeddings))
        return dispersion_reductions(context.stored.trie, vectors).tolist()

    # The result is small and takes a lot of reading: one rank computes it for all.
    reduction = np.array(distributed.on_main(reductions))

    offsets = context.stored.catalogue.offsets
    by_level = np.append(reduction, 0.0)  # the last entry is the longest item's EOS
    return sum_to_length(by_level[index_within(offsets)], offsets)


def _vectors(context: ObjectiveContext, path: Path) -> np.ndarray:
    """Map the embeddings, (N, D): a .npy whose row i is item i's, or a folder of igd embed."""
    items = pq.read_table(Path(context.dataset) / "items.parquet", columns=["source_id", "title"])
    if path.is_dir():
        return load_embeddings(path, items).vectors

    remedy = (
        f"give the folder that igd embed --embeddings {path.name} --item_ids FILE makes, where "
        "FILE names the source id of each row"
    )
    ItemIds.of(items).refuse_unnamed(f"--item_embeddings {path}", "row", remedy)
    vectors = open_array(path)
    check_vectors(vectors, context.stored.catalogue.num_items, f"--item_embeddings {path}")
    return vectors


def dispersion_reductions(trie: TokenTrie, vectors: np.ndarray) -> np.ndarray:
    """Return δ_k = μ_{k−1} − μ_k for levels k = 1 … L, float64 (L,), of `vectors` (N, D).

    Splitting a group G into parts P takes Σ_P |P|·‖centroid(P) − centroid(G)‖² off the summed
    squared distances. The function sums that term: it is never negative (MTC Lemma 4.1), it is no
    difference of large numbers, and it is exactly 0 where no group splits. Each item that ends at
    level k has a part of its own.
    """
    splits = list(_splits(trie))
    reduction = np.zeros(len(splits))

    width = max(CHUNK_BYTES // (8 * len(vectors)), 1)
    for begin in range(0, vectors.shape[1], width):
        # Laid out as (D', N), so that sums over a range of items run along memory: measured 4 to 30
        # times as fast.
        part = vectors[:, begin : begin + width].take(trie.item_order, axis=0)
        values = np.ascontiguousarray(part.T, dtype=np.float64)
        for level, split in enumerate(splits):
            reduction[level] += split.reduction(values)
    return reduction / len(vectors)


@dataclass(frozen=True)
class _Split:
    """How G groups of one level split into P parts of the next, without groups that stay whole."""

    items: np.ndarray
    """int64: positions in trie.item_order of all their items, part after part."""
    part_begin: np.ndarray
    """int64 (P,): first entry of `items` of a part."""
    part_size: np.ndarray
    """int64 (P,): items of a part."""
    group_begin: np.ndarray
    """int64 (G,): first part of a group."""

    def reduction(self, values: np.ndarray) -> float:
        """Return Σ over parts of |P|·‖centroid(P) − centroid(G)‖².

        Args:
            values: float64 (D', N), items in trie.item_order's order.
        """
        if not len(self.part_size):
            return 0.0

        sums = np.add.reduceat(values.take(self.items, axis=1), self.part_begin, axis=1)
        group_size = np.add.reduceat(self.part_size, self.group_begin)
        centroid_of_group = np.add.reduceat(sums, self.group_begin, axis=1) / group_size

        parts_of_group = np.diff(self.group_begin, append=len(self.part_size))
        distance = sums / self.part_size
        distance -= np.repeat(centroid_of_group, parts_of_group, axis=1)
        distance *= distance
        return float(distance.sum(0) @ self.part_size)


def _splits(trie: TokenTrie) -> Iterator[_Split]:
    """Yield the splits that token 1, 2, … L make."""
    level_begin, is_leaf = trie.level_begin(), trie.is_leaf
    for depth in range(1, len(level_begin) - 2):  # the last depth holds the longest items' EOS
        nodes = np.arange(level_begin[depth], level_begin[depth + 1])
        parent = trie.parent[nodes] - level_begin[depth - 1]
        # A leaf here is the EOS of shorter items, which may have equal paths: they have ended, so
        # each of them is a part of its own.
        parts = np.where(is_leaf[nodes], trie.num_items[nodes], 1)

        # Decided on integers, so that no rounding error turns a forced token into a gain.
        splits = np.bincount(parent, parts)[parent] > 1
        nodes, parts = nodes[splits], parts[splits]
        parent = np.repeat(parent[splits], parts)

        num_items = trie.num_items[nodes].astype(np.int64)
        part_size = np.repeat(np.where(is_leaf[nodes], 1, num_items), parts)
        yield _Split(
            items=ragged_arange(trie.first_item[nodes], num_items),
            part_begin=np.cumsum(part_size) - part_size,
            part_size=part_size,
            group_begin=np.flatnonzero(np.diff(parent, prepend=-1)),
        )
