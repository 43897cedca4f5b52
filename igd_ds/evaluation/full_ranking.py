"""Rank the whole catalogue with a model that scores items, and write what every evaluation leaves.

Letters in shapes: R rows, K length of a list, N items, L leaves of the trie.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import igd_ds
from igd_ds import distributed
from igd_ds.baseline_config import BaselineConfig
from igd_ds.baselines.leaves import Leaves
from igd_ds.baselines.sequences import Chains
from igd_ds.data.batches import length_batches, sample_rows
from igd_ds.data.dataset import InteractionDataset, Split
from igd_ds.data.per_row import SCORES_RECORD, scores_record
from igd_ds.data.seen_items import SeenItems
from igd_ds.errors import UsageError
from igd_ds.evaluation import metrics
from igd_ds.evaluation.results import LIST_SCHEMA, Ranked, item_credit, write_results
from igd_ds.folders import remove_temporaries, write_json
from igd_ds.items.trie import TokenTrie
from igd_ds.memory import return_freed_memory
from igd_ds.search.filters import ItemFilter, ItemRanges, items_under

METHOD = "full ranking"
"""What metrics.json calls the search of a baseline."""


@dataclass(frozen=True)
class SeenFilter:
    """Leaves out of the lists what the users of a split's rows have met before."""

    seen: SeenItems
    ranges: ItemRanges

    @classmethod
    def build(cls, dataset: InteractionDataset, split: str, trie: TokenTrie) -> SeenFilter:
        """Collect the seen items of a split; `trie` is the catalogue's."""
        return cls(dataset.seen_items(split), ItemRanges.build(trie))

    def of(self, rows: np.ndarray) -> ItemFilter:
        """Return the filter of rows (n,).

        Raises:
            UsageError: a user has met every item.
        """
        names = [f"row {row} of {self.seen.split.name}" for row in rows]
        return ItemFilter.build(self.ranges, len(rows), deny=self.seen.of(rows), names=names)


def best_leaves(
    leaves: Leaves, of_items: torch.Tensor, length: int, item_filter: ItemFilter | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities, float32, and columns of the best leaves, best first.

    Args:
        leaves: the catalogue's leaves.
        of_items: (n, N), log-probabilities of the items.
        length: K, at most the number of leaves.
        item_filter: the items that each of the n users may get; None: all.

    Returns:
        (n, K) each. The log-probability is −inf where nothing is left that the user may get.
    """
    if item_filter is not None:
        of_items = of_items.masked_fill(~item_filter.mask().to(of_items.device), -torch.inf)
    values, columns = leaves.log_probabilities(of_items).topk(length)
    return values.float(), columns


@dataclass(frozen=True)
class Ranker:
    """Ranks all items for rows of a split. Every method must be called on all ranks.

    A batch holds histories of similar length, which saves padding. Batches are the same on any
    number of ranks and are dealt in turn; all ranks make equally many, because under ZeRO-3 each is
    a collective.
    """

    model: Any
    """Has `log_probabilities(histories, places)` → (rows, N)."""
    leaves: Leaves
    batch_size: int
    """Rows ranked at once."""

    def rank(
        self, ranked: Ranked, seen: SeenFilter | None, scores: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the best leaves of the catalogue for R rows, and their log-probabilities.

        Args:
            ranked: the rows. K is its `length`; the lists are shorter if the catalogue has fewer
                leaves.
            seen: leaves seen items out of the lists; None keeps them.
            scores: array (rows of the split, N) that takes up the probabilities of all items.

        Returns:
            Trie nodes int64 and nats float32, each (R, K), on every rank; −1 and −inf behind the
            end of a list.
        """
        split, rows, length = ranked.split, ranked.rows, ranked.length
        device, length = distributed.device(), min(length, len(self.leaves.nodes))
        leaves = torch.zeros((len(rows), length), dtype=torch.int64, device=device)
        log_p = torch.zeros((len(rows), length), dtype=torch.float32, device=device)
        batches = length_batches(np.diff(split.history_offsets)[rows], self.batch_size)
        rank, world = distributed.rank(), distributed.world_size()
        was_training = self.model.training

        self.model.eval()
        for number in range(rank, -(-len(batches) // world) * world, world):
            # A rank without a batch of its own repeats the last one, and drops the result.
            at = batches[min(number, len(batches) - 1)]
            chains = Chains.of_rows(split, rows[at])
            batch = chains.collate(np.arange(len(at))).to(device)
            of_items = self.model.log_probabilities(batch.histories, batch.positions)
            if number < len(batches):
                item_filter = seen.of(rows[at]) if seen else None
                log_p[at], leaves[at] = best_leaves(self.leaves, of_items, length, item_filter)
                if scores is not None:
                    scores[rows[at]] = of_items.exp().float().cpu().numpy()
            return_freed_memory()
        self.model.train(was_training)

        # Each row was ranked on one rank and is 0 on the others.
        columns_of_rows = distributed.all_reduce_sum(leaves).cpu().numpy()
        log_p_of_rows = distributed.all_reduce_sum(log_p).cpu().numpy()
        nodes = self.leaves.nodes[columns_of_rows]
        return np.where(np.isneginf(log_p_of_rows), -1, nodes), log_p_of_rows

    def ndcg(self, ranked: Ranked, seen: SeenFilter | None) -> float:
        """Return NDCG@K (item match) of the lists of length K; see `rank`."""
        leaves, log_p = self.rank(ranked, seen)
        target = ranked.stored.trie.leaf_of_item[ranked.targets]
        credit = item_credit(ranked, list_table(ranked, leaves, log_p, seen))
        sums = metrics.ranking_sums(
            metrics.items_ahead(leaves, target), [ranked.length], credit=credit
        )
        return sums[f"ndcg@{ranked.length}"] / len(ranked.rows)


def is_evaluated(run: Path, name: str, config: BaselineConfig) -> bool:
    """Whether a split's evaluation is there, with the scores if they are asked for."""
    folder = run / "eval" / name
    has_scores = not config.save_scores or (folder / "scores.npy").is_file()
    return (folder / "metrics.json").is_file() and has_scores


def evaluate(
    ranker: Ranker,
    ranked: Ranked,
    seen: SeenFilter | None,
    output: Path,
    config: BaselineConfig,
) -> None:
    """Rank the catalogue for the rows of `ranked` and write `output`, on all ranks.

    Args:
        ranker, ranked: see Ranker.
        seen: leaves seen items out of the lists; None keeps them.
        output: folder of the evaluation.
        config: the run's settings.

    Raises:
        UsageError: --save_scores, and the disk is too small for the scores.
    """
    split, rows, num_items = ranked.split, ranked.rows, ranked.dataset.num_items
    distributed.on_main(lambda: make_folder(output))

    # Scores are filled into a mapped file by all ranks.
    scores, unfinished = None, output / "scores.tmp.npy"
    if config.save_scores:
        distributed.on_main(lambda: new_scores(unfinished, (len(split), num_items)))
        scores = np.load(unfinished, mmap_mode="r+")

    began = time.perf_counter()
    leaves, log_p = ranker.rank(ranked, seen, scores)
    seconds = time.perf_counter() - began  # all ranks are done now
    if scores is not None:
        scores.flush()
        distributed.barrier()

    timing = {
        "world_size": distributed.world_size(),
        "rows_searched": len(rows),
        "rows_already_there": 0,
        "rows_per_second": len(rows) / seconds,
        "alphas": 1,
    }
    settings = {
        "split": split.name,
        "search": METHOD,
        "num_beams": config.num_beams,
        "length_penalty": 0.0,
        "num_rows": config.num_rows,
        "seed": config.rows_seed,
        "exclude_seen": "yes" if seen else "no",
        "dataset": ranked.dataset.info["name"],
    }

    def write() -> None:
        if scores is not None:
            # The record first: scores without it may be taken for those of other items.
            record = (output / "scores.npy").with_suffix(SCORES_RECORD)
            write_json(record, scores_record(ranked.dataset, split.name))
            os.replace(unfinished, output / "scores.npy")
        request = {"dataset": ranked.dataset.fingerprint, "version": igd_ds.__version__}
        write_json(output / "request.json", settings | request)
        lists = list_table(ranked, leaves, log_p, seen)
        write_results(output, ranked, settings, [(0.0, lists, None)], timing)

    distributed.on_main(write)


def make_folder(output: Path) -> None:
    """Make the folder of an evaluation without what a killed one left. We hold the run's lock."""
    output.mkdir(parents=True, exist_ok=True)
    remove_temporaries(output)


def rows_to_rank(split: Split, config: BaselineConfig) -> np.ndarray:
    """Return the rows of a split that the configuration evaluates, int64 (R,) ascending."""
    return sample_rows(len(split), config.num_rows, config.rows_seed)


def new_scores(path: Path, shape: tuple[int, int]) -> None:
    """Make a .npy file of zeros, float32; rows that are not sampled take no space on the disk.

    Raises:
        UsageError: the disk is too small.
    """
    path.unlink(missing_ok=True)  # left by a killed evaluation
    needed, free = 4 * shape[0] * shape[1], shutil.disk_usage(path.parent).free
    if needed > free:
        raise UsageError(
            f"--save_scores: {path.parent} has {free / 2**30:.1f} GiB free, the scores take "
            f"{needed / 2**30:.1f}"
        )
    np.lib.format.open_memmap(path, "w+", np.float32, shape)


def list_table(
    ranked: Ranked, leaves: np.ndarray, log_p: np.ndarray, seen: SeenFilter | None
) -> pa.Table:
    """Return lists (R, K) in LIST_SCHEMA, sorted by row and rank; −1 stands behind a list's end."""
    row, place = np.nonzero(leaves >= 0)
    listed = leaves[row, place]
    item_filter = seen.of(ranked.rows) if seen else None
    items, count = items_under(ranked.stored.trie, listed, row, item_filter)
    ends = pa.array(np.append(0, count.cumsum()), pa.int32())
    row_ids = ranked.rows[row]

    columns = {
        "row_id": row_ids,
        "user_id": ranked.split.user_ids[row_ids],
        "alpha": np.zeros(len(listed)),
        "rank": place + 1,
        "leaf_id": listed,
        "item_ids": pa.ListArray.from_arrays(ends, pa.array(items)),
        "score": log_p[row, place],
        "certified": np.ones(len(listed), bool),  # every item was scored
    }
    return pa.table(columns, schema=LIST_SCHEMA)
