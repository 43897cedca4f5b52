"""The lists of an evaluation on their way from batches to metrics.json.

Letters in shapes: B rows of a batch.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

import igd_ds
from igd_ds.backbones.saved import hashes_of
from igd_ds.data.batches import length_batches
from igd_ds.data.dataset import Split
from igd_ds.data.per_row import ItemLists, ItemScores
from igd_ds.data.seen_items import SeenItems, with_seen
from igd_ds.errors import UsageError
from igd_ds.eval_config import EvalConfig
from igd_ds.evaluation.full_ranking import METHOD
from igd_ds.evaluation.recommender import Recommender
from igd_ds.evaluation.results import LIST_SCHEMA, Ranked, write_results
from igd_ds.folders import claim, differing, new_file, remove_temporaries, sha256_of, write_json
from igd_ds.run_folder import BEFORE_RECORDED
from igd_ds.search.engine import SearchResult
from igd_ds.search.filters import ItemFilter, items_under
from igd_ds.search.frontier import PerUser

# Until 2026-11 parts were called batch-*.parquet and held rows in the order of the file. Such parts
# of an interrupted evaluation are left unread.
PARTS = "part-*.parquet"

PART_SCHEMA = LIST_SCHEMA.append(pa.field("by_beam", pa.bool_()))
"""by_beam: the line belongs to the list that an exact search started from."""

# What the lists depend on. Not the number of ranks, and not the paths of model and data: those are
# recognised by their content.
REQUEST = (
    "split", "alpha", "search", "num_beams", "decoding_rule", "length_penalty", "softmax",
    "temperature", "renormalise", "popularity_prior", "guidance_weight", "pass_positions",
    "row_positions", "coverage", "batch_size", "num_rows", "seed", "dtype", "exclude_seen",
)  # fmt: skip
REQUEST_FILES = ("guidance", "item_filter")


@dataclass(frozen=True)
class RankingTask:
    """What an evaluation works on."""

    recommender: Recommender
    split: Split
    rows: np.ndarray
    """int64, ascending: the rows to rank for."""
    item_lists: ItemLists | None
    """Items that rows may or may not get."""
    guidance: tuple[ItemScores, float] | None
    """A second scorer's item probabilities and their weight."""
    seen: SeenItems | None
    """What the users have met before, if the lists leave it out."""
    search: str
    """A method of `igd_ds.search.engine`, or METHOD of a baseline."""
    scores: str
    """What the lists' scores are, PROBABILITY or SCORE."""

    def batches(self, batch_size: int) -> list[np.ndarray]:
        """Return the rows in `length_batches` of their histories, for any number of ranks."""
        lengths = np.diff(self.split.history_offsets)[self.rows]
        return [self.rows[places] for places in length_batches(lengths, batch_size)]

    def target_leaves(self, rows: np.ndarray) -> np.ndarray:
        """Return the trie leaf of each row's target, int (B,)."""
        leaves: np.ndarray = self.recommender.stored.trie.leaf_of_item[self.split.targets[rows]]
        return leaves

    def per_user(self, rows: np.ndarray) -> PerUser:
        """Return the item filter and the guidance of a batch of rows (B,)."""
        labels = [f"row {row} of {self.split.name}" for row in rows]
        lists = self.item_lists.of(rows) if self.item_lists else {}
        if self.seen:
            lists["deny"] = with_seen(lists.get("deny"), self.seen.of(rows))
        guidance = (self.guidance[0].of(rows), self.guidance[1]) if self.guidance else None
        return self.recommender.per_user(labels, guidance=guidance, **lists)


def request_of(config: EvalConfig, task: RankingTask) -> dict[str, Any]:
    """Return everything that the lists depend on, as JSON values."""
    recommender = task.recommender
    scoring = recommender.scoring(config.scoring_options())
    request = {name: getattr(config, name) for name in REQUEST}
    for name in REQUEST_FILES:
        path = getattr(config, name)
        request[name] = sha256_of(path) if path else None
    # These say how a file is read. Without that file they do not stand in the request.
    if config.item_filter:
        request["ids"] = config.ids
    if config.guidance_ids:
        request["guidance_ids"] = sha256_of(Path(config.guidance_ids))
    return request | {
        "alpha": list(config.alpha),
        "exclude_seen": "yes" if task.seen else "no",
        "search": task.search,
        "softmax": "masked" if scoring.masked_softmax else "full",
        "temperature": scoring.temperature,
        "max_length": recommender.max_length,
        "dataset": recommender.dataset.fingerprint,
        "model": hashes_of(Path(config.model)),
        "base_weights": recommender.base_weights,
        "version": igd_ds.__version__,
    }


def claim_output_folder(output: Path, config: EvalConfig, task: RankingTask) -> bool:
    """Make the output folder ready; return whether its evaluation is finished already. Rank 0 only.

    Raises:
        UsageError: the folder holds another evaluation or anything else, or --alpha_from is an
            evaluation of another model.
    """
    request = request_of(config, task)
    if config.alpha_from:
        chosen_by = _read_request(Path(config.alpha_from) / "request.json")
        same = {key: request[key] for key in ("model", "base_weights", "dataset")}
        if changed := differing(chosen_by, same, but=_unrecorded(chosen_by)):
            raise UsageError(
                f"--alpha_from {config.alpha_from} evaluated something else; these differ: "
                f"{', '.join(changed)}"
            )

    saved = output / "request.json"
    is_claimed = claim(output, saved.name, "--output_dir", "evaluation")
    before = _read_request(saved) if is_claimed else request
    changed = differing(before, request, but=_unrecorded(before))
    if changed:
        raise UsageError(
            f"--output_dir {output} belongs to another evaluation; these differ: "
            f"{', '.join(changed)}"
        )
    write_json(saved, request)

    finished = (output / "metrics.json").is_file()
    if finished:
        # A kill between the last two steps of `finish` leaves the parts.
        shutil.rmtree(output / "parts", ignore_errors=True)
    else:
        (output / "parts").mkdir(exist_ok=True)
        remove_temporaries(output / "parts")
        remove_damaged(output / "parts", PARTS)
    return finished


def _read_request(path: Path) -> dict[str, Any]:
    """Return what an evaluation was asked for.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        request = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{path} is damaged ({error}): delete the folder and evaluate again"
        ) from None
    if not isinstance(request, dict):
        raise UsageError(f"{path} is damaged: delete the folder and evaluate again")
    return BEFORE_RECORDED | request


def write_part(path: Path, table: pa.Table) -> None:
    """Write a finished part of the work atomically, with checksums that `read_part` checks."""
    with new_file(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def read_part(path: Path) -> tuple[pa.Table, dict[str, float]]:
    """Return a part and the counts in its metadata.

    Raises:
        OSError or ValueError: the file is damaged.
    """
    with open(path, "rb") as file:
        table = pq.ParquetFile(file, page_checksum_verification=True).read()
    counts = (table.schema.metadata or {}).get(b"counts", b"")
    return table.replace_schema_metadata(), json.loads(counts)


def remove_damaged(parts: Path, pattern: str) -> None:
    """Remove the parts of a finished work whose bytes have changed, with a warning.

    These parts are made again.
    """
    for path in sorted(parts.glob(pattern)):
        try:
            read_part(path)
        except (OSError, ValueError) as error:
            why = str(error).partition("\n")[0]
            print(f"warning: {path} is damaged ({why}): it is made again", flush=True)
            path.unlink()


def _unrecorded(request: dict[str, Any]) -> set[str]:
    """Return what cannot be compared with a request: earlier versions recorded no base weights."""
    return {"base_weights"} - request.keys()


def part_table(
    task: RankingTask,
    rows: np.ndarray,
    alphas: Sequence[float],
    found: SearchResult,
    allowed: ItemFilter | None,
) -> pa.Table:
    """Return all lists of `rows` (B,): one line per listed leaf, with the items that the row may
    get.

    The search's counts, summed over the rows, are the table's metadata.
    """
    final = found.leaves, found.scores, found.certified
    tables = [_lists_table(task, rows, alphas, *final, allowed)]
    if found.beam_leaves is not None:
        assert found.beam_scores is not None, "the beam's leaves come with their scores"
        unproven = torch.zeros_like(found.certified)
        beam = found.beam_leaves, found.beam_scores, unproven
        tables.append(_lists_table(task, rows, alphas, *beam, allowed, by_beam=True))

    counts: dict[str, float] = {name: int(n.sum()) for name, n in found.counts.items()}
    assert found.target_logprobs is not None, "asked for"
    counts["target_nll"] = -float(found.target_logprobs.double().sum())
    return pa.concat_tables(tables).replace_schema_metadata({"counts": json.dumps(counts)})


def _lists_table(
    task: RankingTask,
    rows: np.ndarray,
    alphas: Sequence[float],
    leaves: torch.Tensor,
    scores: torch.Tensor,
    certified: torch.Tensor,
    allowed: ItemFilter | None,
    by_beam: bool = False,
) -> pa.Table:
    """Return lists of shape (values of α, B, K) in PART_SCHEMA; `certified` is (values of α, B)."""
    leaf, score = leaves.cpu().numpy(), scores.cpu().numpy()
    grid, row, place = np.nonzero(leaf >= 0)
    listed = leaf[grid, row, place]
    items, count = items_under(task.recommender.stored.trie, listed, row, allowed)
    ends = pa.array(np.concatenate([[0], count.cumsum()]), pa.int32())

    columns = {
        "row_id": rows[row],
        "user_id": task.split.user_ids[rows[row]],
        "alpha": np.array(alphas)[grid],
        "rank": place + 1,
        "leaf_id": listed,
        "item_ids": pa.ListArray.from_arrays(ends, pa.array(items)),
        "score": score[grid, row, place],
        "certified": place < certified.cpu().numpy()[grid, row],
        "by_beam": np.full(len(row), by_beam),
    }
    return pa.table(columns, schema=PART_SCHEMA)


def finish(config: EvalConfig, task: RankingTask, output: Path, timing: dict[str, Any]) -> None:
    """Gather all lists by row, write predictions and metrics, remove the parts. Rank 0 only.

    metrics.json comes last: with it the evaluation is complete.
    """
    parts = sorted((output / "parts").glob(PARTS))
    tables, counts = zip(*(read_part(path) for path in parts), strict=True)
    table = pa.concat_tables(tables)

    recommender = task.recommender
    request = json.loads((output / "request.json").read_text())
    settings = {name: request[name] for name in (*REQUEST, *REQUEST_FILES)}
    settings["dataset"] = recommender.dataset.info["name"]
    settings["scores"] = task.scores
    per_row = {name: sum(part[name] for part in counts) / len(task.rows) for name in counts[0]}
    nll = per_row.pop("target_nll")
    settings["search_per_row"] = per_row
    settings["target_nll"] = nll
    if task.search != METHOD:  # a baseline writes no tokens
        depth = recommender.stored.trie.depth[task.target_leaves(task.rows)]
        settings["target_perplexity_per_token"] = float(np.exp(nll / depth.mean()))

    def lists_by_alpha() -> Iterator[tuple[float, pa.Table, pa.Table | None]]:
        for alpha in config.alpha:
            both = table.filter(pc.equal(table["alpha"], alpha))
            both = both.sort_by([("row_id", "ascending"), ("rank", "ascending")])
            lists = both.filter(pc.invert(both["by_beam"])).select(LIST_SCHEMA.names)
            by_beam = both.filter(both["by_beam"])
            yield alpha, lists, by_beam if len(by_beam) else None

    run = Path(config.model).resolve().parent
    ranked = Ranked(
        recommender.stored,
        recommender.dataset,
        task.split,
        task.rows,
        config.num_beams,
        run if (run / "config.yaml").is_file() else None,
    )
    chosen_alpha = max(config.alpha) if config.alpha_from else None
    write_results(output, ranked, settings, lists_by_alpha(), timing, chosen_alpha)
    shutil.rmtree(output / "parts")
