"""Item embeddings from training rows alone: items that users meet together get similar vectors.

Letters in shapes: N items, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from igd_ds import distributed
from igd_ds.data.dataset import Split
from igd_ds.errors import UsageError
from igd_ds.items.embeddings import write_embeddings

NUM_BEFORE = 5  # last items of a history that form a pair with the target (assumed)


def store_cooccurrence(
    output: Path,
    num_items: int,
    record: Mapping[str, Any],
    train: Split,
    width: int,
    seed: int,
) -> bool:
    """Write the folder of `cooccurrence_vectors`; every rank calls this.

    Returns:
        False if the complete folder exists already and was made from the same request.

    Raises:
        UsageError: the width is not below the number of items, or `output` was made from something
            else.
    """
    record = {**record, "cooccurrence": width, "window": NUM_BEFORE, "seed": seed}

    def fill(vectors: np.ndarray) -> None:
        if distributed.is_main():
            vectors[:] = cooccurrence_vectors(train, num_items, width, seed)

    return write_embeddings(output, record, (num_items, width), np.float32, fill)


def cooccurrence_vectors(train: Split, num_items: int, width: int, seed: int) -> np.ndarray:
    """Return vectors float32 (N, D) from how often items occur together.

    A pair is a row's target with one of the NUM_BEFORE last items of its history. The positive
    pointwise mutual information of the symmetric pair counts is factorised: the vectors are U·√S of
    its best approximation of rank D (Levy and Goldberg 2014). An item that is in no pair gets
    zeros.

    Raises:
        UsageError: D is not in [1, N).
    """
    if not 0 < width < num_items:
        raise UsageError(
            f"--cooccurrence {width}: the width must be positive and below the number of items, "
            f"{num_items}"
        )

    # The pairs of all rows: an item of the history, and the row's target.
    ends = train.history_offsets[1:]
    positions = ends[:, None] - 1 - np.arange(NUM_BEFORE)
    inside = positions >= train.history_offsets[:-1, None]
    before = train.history_items[positions[inside]].astype(np.int64)
    target = np.repeat(train.targets.astype(np.int64), inside.sum(1))

    # Symmetric counts, as a sparse matrix.
    pairs, counts = np.unique(
        np.concatenate([before * num_items + target, target * num_items + before]),
        return_counts=True,
    )
    row, column = pairs // num_items, pairs % num_items

    # Pointwise mutual information, the positive part.
    total = np.bincount(row, counts, num_items)
    information = np.log(counts * counts.sum() / (total[row] * total[column]))
    positive = information > 0
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([row[positive], column[positive]])),
        torch.from_numpy(information[positive]),
        (num_items, num_items),
        check_invariants=True,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, strength, _ = torch.svd_lowrank(matrix, q=width, niter=4)
    vectors: np.ndarray = (left * strength.sqrt()).float().numpy()
    return vectors
