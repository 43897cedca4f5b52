"""The items of each training row, chosen and rejected, and the reference's log-probabilities.

They are made once (with `beam` negatives once an epoch) by all ranks together and stored in parts,
so that a stopped run goes on where it was, on any number of ranks.

Letters in shapes: R rows of the training split, B rows of a part, J rejected items.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from igd_ds import distributed
from igd_ds.contracts import MASKED_ROW
from igd_ds.data.batches import batches_of
from igd_ds.data.negatives import BEAM, NEGATIVES
from igd_ds.errors import UsageError
from igd_ds.evaluation.parts import read_part, remove_damaged, write_part
from igd_ds.folders import differing, read_json_object, remove_temporaries, write_json
from igd_ds.prefer_config import PreferConfig
from igd_ds.preference.live_search import LiveSearch
from igd_ds.preference.scorer import ItemScorer
from igd_ds.preference.start import Start

PART_ROWS = 256
"""Rows of a part: what a killed run makes again at most. Assumed."""

REQUEST = ("negatives", "num_negatives", "seed", "global_batch_size", "epochs", "max_steps")
"""Settings that the pairs depend on."""


@dataclass(frozen=True)
class Pairs:
    """The items behind the prompts of training rows; rows that the run does not need have none."""

    items: np.ndarray
    """int32 (R, 1 + J), the target first; MASKED_ROW where a row is not needed."""
    reference: np.ndarray | None
    """float32 (R, 1 + J), log π_ref of these items, nats; None where the adapter is switched off
    instead."""


@dataclass(frozen=True)
class PairMaker:
    """Makes the pairs of training rows, with all ranks, and stores them in RUN/pairs."""

    config: PreferConfig
    folder: Path
    """RUN/pairs."""
    start: Start
    scorer: ItemScorer
    live_search: LiveSearch
    micro_batch: int
    """Rows that go through a model at once."""
    dtype: torch.dtype
    """Of the reference's weights: the training's, so that both models are rounded alike."""

    def claim(self, is_begun: bool) -> None:
        """Check that what is stored belongs to this run, and discard what no run has used. Rank 0.

        Args:
            is_begun: whether the run has a checkpoint.

        Raises:
            UsageError: the stored log-probabilities are those of another model.
        """
        record, request = self.folder / "request.json", self._request()
        before = read_json_object(record, f"remove {self.folder}") if record.is_file() else request
        changed = differing(before, request)
        if changed and is_begun:
            raise UsageError(
                f"{self.folder} holds pairs and log-probabilities that do not belong to this "
                f"training; these differ: {', '.join(changed)}. Restore them, or start a new run"
            )
        if changed:
            shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        write_json(record, request)

    def _request(self) -> dict[str, Any]:
        """Return everything that the pairs depend on, as JSON values."""
        return {
            **{name: getattr(self.config, name) for name in REQUEST},
            **self.start.identity(),
            "dataset": self.start.inputs.dataset.fingerprint,
            "likelihood": dataclasses.asdict(self.start.likelihood),
            "dtype": str(self.dtype),
        }

    def make(self, engine: Any, epoch: int, rows: np.ndarray) -> Pairs:
        """Return the pairs of `rows`; parts that are stored already are read. All ranks call it.

        Args:
            engine: DeepSpeed engine around the model in training, which finds `beam` negatives.
            epoch: whose negatives are made.
            rows: int64, ascending: row ids of the training split.

        Raises:
            UsageError: a stored part holds a negative that equals its target.
        """
        folder = self.folder / f"epoch-{epoch:04d}"
        parts = np.array_split(rows, -(-len(rows) // PART_ROWS))
        paths = [folder / f"part-{number:09d}.parquet" for number in range(len(parts))]
        missing = distributed.on_main(lambda: _missing(folder, paths))

        reference = self.start.load_reference(self.config, self.dtype) if missing else None
        world, rank = distributed.world_size(), distributed.rank()
        for turn in range(0, len(missing), world):
            # All ranks search together: one that is left without a part repeats the last one.
            number = missing[min(turn + rank, len(missing) - 1)]
            seed = [self.config.seed, epoch, number]
            items = self._items(engine, parts[number], len(parts[0]), seed)
            if turn + rank < len(missing):
                write_part(paths[number], self._part(parts[number], items, reference))
        distributed.barrier()
        return self._read(paths)

    def _items(self, engine: Any, rows: np.ndarray, size: int, seed: list[int]) -> np.ndarray:
        """Return the target and the negatives of rows (B,), int32 (B, 1 + J).

        Args:
            engine: around the model in training.
            rows: of a part.
            size: rows of the largest part.
            seed: of what is drawn.
        """
        leaves, number = self.start.leaves, self.config.num_negatives
        targets = self.scorer.collator.split.targets[rows]
        if self.config.negatives == BEAM:
            # Ranks that search together need parts of one size; these differ by one row at most.
            filled = np.append(rows, rows[-1:])[:size]
            found = self.live_search.leaves(engine, filled, 1 + number)[: len(rows)]
            negatives = without_target(found, targets, self.start)
        else:
            generator = np.random.default_rng(seed)
            draw = NEGATIVES[self.config.negatives]
            negatives = leaves.item[draw(leaves, targets, number, generator)]
        return np.concatenate([targets[:, None], negatives], axis=1).astype(np.int32)

    def _part(self, rows: np.ndarray, items: np.ndarray, reference: Any) -> pa.Table:
        """Return the stored form of a part; `reference` is a model, or None."""
        columns = {"row_id": rows, "items": _lists(items, pa.int32())}
        if reference is not None:
            places = batches_of(np.arange(len(rows)), self.micro_batch)
            logprobs = [self.scorer.logprobs(reference, rows[at], items[at]) for at in places]
            columns["reference"] = _lists(np.concatenate(logprobs), pa.float32())
        return pa.table(columns).replace_schema_metadata({"counts": json.dumps({})})

    def _read(self, paths: Iterable[Path]) -> Pairs:
        """Return what is stored in the parts."""
        trie, split = self.start.stored.trie, self.scorer.collator.split
        shape = len(split), 1 + self.config.num_negatives
        items = np.full(shape, MASKED_ROW, np.int32)
        reference = None if self.start.reference is None else np.zeros(shape, np.float32)
        for path in paths:
            table, _ = read_part(path)
            rows, of_part = table["row_id"].to_numpy(), _matrix(table["items"], shape[1])
            leaf = trie.leaf_of_item[of_part]
            equal = np.flatnonzero((leaf[:, 1:] == leaf[:, :1]).any(1))
            if len(equal) or not np.array_equal(of_part[:, 0], split.targets[rows]):
                row = rows[equal[0]] if len(equal) else rows[0]
                raise UsageError(
                    f"{path}: row {row} has a negative that equals its target, or another target: "
                    "the file was changed; remove it, and it is made again"
                )
            items[rows] = of_part
            if reference is not None:
                reference[rows] = _matrix(table["reference"], shape[1])
        return Pairs(items, reference)


def without_target(leaves: np.ndarray, targets: np.ndarray, start: Start) -> np.ndarray:
    """Return the items of ranked leaves without the target's, in their order, int64 (B, J).

    Args:
        leaves: integers (B, 1 + J), different leaves.
        targets: items (B,).
        start: knows the trie.
    """
    trie = start.stored.trie
    is_target = leaves == trie.leaf_of_item[targets][:, None]
    order = np.argsort(is_target, axis=1, kind="stable")[:, :-1]
    others = np.take_along_axis(leaves, order, axis=1)
    return trie.item_order[trie.first_item[others]].astype(np.int64)


def _missing(folder: Path, paths: list[Path]) -> list[int]:
    """Return the numbers of the parts that are not there, or damaged. Rank 0 only."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(folder)
    remove_damaged(folder, "part-*.parquet")
    return [number for number, path in enumerate(paths) if not path.is_file()]


def _lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return a matrix as a column of lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), kind), values.shape[1])


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Undo `_lists`."""
    return column.combine_chunks().flatten().to_numpy().reshape(-1, width)
