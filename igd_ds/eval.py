"""Rank the whole catalogue for every row of a split, and measure the lists. Entry point.

    deepspeed igd_ds/eval.py --model RUN/model --dataset DATASET --split test --alpha 0 0.1 0.2 --output_dir RUN/eval/test

Load → this rank's batches → search → gather by row → metrics.json. A batch's lists are written when it is done, so a killed
evaluation goes on where it was, on any number of ranks.
"""

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import transformers
from tqdm import tqdm

import igd_ds
from igd_ds import distributed
from igd_ds.backbones import causal_lm
from igd_ds.baselines.sequences import refuse_empty
from igd_ds.config import options as configuration
from igd_ds.data.batches import sample_rows
from igd_ds.data.dataset import Split, sha256_of
from igd_ds.data.per_row import ItemLists, map_guidance
from igd_ds.distributed import say
from igd_ds.errors import UsageError
from igd_ds.evaluation import metrics
from igd_ds.evaluation.recommender import Recommender
from igd_ds.evaluation.results import LIST_SCHEMA, Ranked, write_results
from igd_ds.folders import write_json, write_table
from igd_ds.search.engine import Limits, SearchResult, check_limits
from igd_ds.search.filters import ItemFilter
from igd_ds.search.frontier import PerUser

PART_SCHEMA = LIST_SCHEMA.append(
    pa.field("by_beam", pa.bool_())
)  # the list that an exact search started from
# What the lists depend on. Not the number of ranks, and not where model and data lie: those are recognised by their content.
REQUEST = (
    "split", "alpha", "search", "num_beams", "decoding_rule", "length_penalty", "softmax", "temperature", "popularity_prior",
    "guidance_weight", "pass_positions", "row_positions", "batch_size", "num_rows", "seed", "dtype",
)  # fmt: skip
REQUEST_FILES = ("guidance", "item_filter")


@dataclass(frozen=True)
class Task:
    """What an evaluation works on: the ids of the rows to rank for (ascending), and what restricts or guides their lists."""

    recommender: Recommender
    split: Split
    rows: np.ndarray
    item_lists: ItemLists | None
    guidance: tuple[np.ndarray, float] | None

    def per_user(self, rows: np.ndarray) -> PerUser:
        """Return the item filter and the guidance of a batch of rows."""
        labels = [f"row {row} of {self.split.name}" for row in rows]
        lists = self.item_lists.of(rows) if self.item_lists else {}
        guidance = (self.guidance[0][rows], self.guidance[1]) if self.guidance else None
        return self.recommender.per_user(labels, guidance=guidance, **lists)


def main() -> int:
    """Run an evaluation from the command line; returns the exit code."""
    config = with_chosen_alpha(configuration.parse(configuration.EvalConfig, description=__doc__))
    # Batches that are done lie on disk whole, so a stop needs no preparation, and a handler should not print.
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(distributed.EXIT_REQUEUE))
    transformers.utils.logging.disable_progress_bar()
    distributed.init()
    task, output = build_task(config), Path(config.output_dir)
    if distributed.on_main(lambda: claim_output_folder(output, config, task)):
        say(f"{output} is finished: {output / 'metrics.json'}")
        return 0
    if config.num_beams > (num_leaves := task.recommender.num_leaves):
        say(
            f"warning: --num_beams {config.num_beams}, but the catalogue has {num_leaves} different items: lists are that long"
        )
    count, seconds = search_rows(config, task, output / "parts")
    totals = torch.tensor(
        [count, count / seconds if count else 0.0], dtype=torch.float64, device=distributed.device()
    )
    count, speed = distributed.all_reduce_sum(totals).tolist()  # all ranks are done now
    timing = {
        "world_size": distributed.world_size(),
        "rows_searched": int(count),
        "rows_already_there": len(task.rows) - int(count),
        "rows_per_second": speed,  # all ranks together, loading apart, all values of α
        "alphas": len(config.alpha),
    }
    distributed.on_main(lambda: finish(config, task, output, timing))
    return 0


def with_chosen_alpha(config):
    """Return the configuration with --alpha_from resolved: α = 0 and the α that was best in that evaluation."""
    if not config.alpha_from:
        return config
    finished = Path(config.alpha_from) / "metrics.json"
    if not finished.is_file():
        raise UsageError(
            f"--alpha_from: no finished evaluation at {config.alpha_from} (no metrics.json there)"
        )
    results = json.loads(finished.read_text())
    if results["split"] == config.split:
        raise UsageError(
            f"--alpha_from {config.alpha_from} evaluated {config.split} itself: α is chosen on another split"
        )
    return dataclasses.replace(config, alpha=sorted({0.0, float(metrics.best_alpha(results))}))


def build_task(config) -> Task:
    """Load and check everything but the weights."""
    recommender = Recommender(config)
    scoring = recommender.scoring(config)
    if config.search == "exact":
        scoring.refuse_exact()
    check_limits(
        Limits(config.pass_positions, config.row_positions), config.num_beams, config.search
    )
    check_memory(config, len(recommender.tokenizer))
    split = recommender.dataset.splits[config.split]
    rows = sample_rows(len(split), config.num_rows, config.seed)
    refuse_empty(split, rows)
    lists = ItemLists.read(config.item_filter, len(split)) if config.item_filter else None
    guidance = (
        map_guidance(config.guidance, len(split), recommender.dataset.num_items)
        if config.guidance
        else None
    )
    task = Task(
        recommender,
        split,
        rows,
        lists,
        None if guidance is None else (guidance, config.guidance_weight),
    )
    distributed.on_main(lambda: check_every_row(config, task))
    return task


def check_every_row(config, task: Task) -> None:
    """Raise ValueError for a row whose item lists or guidance are bad or leave it nothing: now rather than hours later."""
    for rows in batches_of(config, task.rows) if task.item_lists or task.guidance else []:
        task.per_user(rows)


def batches_of(config, rows: np.ndarray) -> list[np.ndarray]:
    """Cut `rows` into batches: the same ones whatever the number of ranks."""
    return [
        rows[begin : begin + config.batch_size] for begin in range(0, len(rows), config.batch_size)
    ]


def check_memory(config, vocabulary: int) -> None:
    """Raise ValueError if one pass's logits and log-probabilities alone (fp32) exceed the memory that is free."""
    flag = max(
        "pass_positions", "batch_size", key=lambda name: getattr(config, name)
    )  # prompts: a position each
    needed = 2 * 4 * getattr(config, flag) * vocabulary
    free = (
        torch.cuda.mem_get_info()[0]
        if torch.cuda.is_available()
        else psutil.virtual_memory().available
    )
    if needed > free:
        numbers = f"take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        raise UsageError(
            f"--{flag} {getattr(config, flag)} × {vocabulary} tokens of logits {numbers}: lower it"
        )


def claim_output_folder(output: Path, config, task: Task) -> bool:
    """Make the output folder ready; return whether its evaluation is finished already. Rank 0 only.

    Raises ValueError for a folder with another evaluation or anything else in it, and for an --alpha_from of another model.
    """
    model = Path(config.model)
    files = sorted(path for path in model.rglob("*") if path.is_file())
    request = {name: getattr(config, name) for name in REQUEST}
    request |= {
        name: sha256_of(path) if (path := getattr(config, name)) else None for name in REQUEST_FILES
    }
    request |= {
        "max_length": config.max_length or task.recommender.description["max_length"],
        "dataset": task.recommender.dataset.fingerprint,
        "model": {str(path.relative_to(model)): sha256_of(path) for path in files},
        "base_model": causal_lm.base_of(config),
        "version": igd_ds.__version__,
    }
    if config.alpha_from:
        chosen_by = json.loads((Path(config.alpha_from) / "request.json").read_text())
        if differing := [
            key for key in ("model", "base_model", "dataset") if chosen_by[key] != request[key]
        ]:
            raise UsageError(
                f"--alpha_from {config.alpha_from} evaluated something else; these differ: {', '.join(differing)}"
            )
    saved = output / "request.json"
    if saved.is_file():
        old = json.loads(saved.read_text())
        if changed := [key for key in request if old.get(key) != request[key]]:
            raise UsageError(
                f"--output_dir {output} belongs to another evaluation; these differ: {', '.join(changed)}"
            )
    elif output.exists() and any(output.iterdir()):
        raise UsageError(
            f"--output_dir {output} is not empty and holds no evaluation; give a new folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_json(saved, request)
    finished = (output / "metrics.json").is_file()
    if finished:
        shutil.rmtree(
            output / "parts", ignore_errors=True
        )  # a kill between the last two steps of `finish` leaves them
    else:
        (output / "parts").mkdir(exist_ok=True)
    return finished


def search_rows(config, task: Task, parts: Path) -> tuple[int, float]:
    """Search this rank's batches and write each one's lists to `parts`; returns how many rows and how many seconds that were.

    Batches that an earlier, killed evaluation left to do are dealt in turn.
    """
    batches = {
        parts / f"batch-{number:09d}.parquet": rows
        for number, rows in enumerate(batches_of(config, task.rows))
    }
    missing = distributed.on_main(lambda: [path for path in batches if not path.is_file()])
    mine = missing[distributed.rank() :: distributed.world_size()]
    if not mine:
        return 0, 0.0
    recommender, limits = task.recommender, Limits(config.pass_positions, config.row_positions)
    recommender.load_weights()
    scoring = recommender.scoring(config)
    count, began = sum(len(batches[path]) for path in mine), time.perf_counter()
    with tqdm(
        total=count,
        unit="row",
        desc="rows of rank 0",
        disable=not distributed.is_main(),
        mininterval=1.0,
    ) as bar:
        for path in mine:
            rows = batches[path]
            histories, per_user = [task.split.history(row) for row in rows], task.per_user(rows)
            found = recommender.search(
                histories, scoring, config.num_beams, config.search, per_user, limits
            )
            write_table(path, part_table(task, rows, config.alpha, found, per_user.item_filter))
            bar.update(len(rows))
    return count, time.perf_counter() - began


def part_table(
    task: Task,
    rows: np.ndarray,
    alphas: list[float],
    found: SearchResult,
    allowed: ItemFilter | None,
) -> pa.Table:
    """Return all lists of `rows` (B,), one line per listed leaf with the items there that the row may get; counts as metadata."""
    lists = [(False, found.leaves, found.scores, found.certified)]
    if found.beam_leaves is not None:
        lists.append(
            (True, found.beam_leaves, found.beam_scores, torch.zeros_like(found.certified))
        )
    tables = []
    for by_beam, *tensors in lists:
        leaves, scores, certified = (tensor.cpu().numpy() for tensor in tensors)
        listed = np.nonzero(leaves >= 0)
        grid, row, place = listed
        items, count = task.recommender.items_under(leaves[listed], row, allowed)
        ends = np.concatenate([[0], count.cumsum()])
        columns = [
            rows[row], task.split.user_ids[rows[row]], np.array(alphas)[grid], place + 1, leaves[listed],
            pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(items)), scores[listed], place < certified[grid, row],
            np.full(len(row), by_beam),
        ]  # fmt: skip
        tables.append(
            pa.table(dict(zip(PART_SCHEMA.names, columns, strict=True)), schema=PART_SCHEMA)
        )
    counts = {name: int(values.sum()) for name, values in found.counts.items()}
    return pa.concat_tables(tables).replace_schema_metadata({"counts": json.dumps(counts)})


def finish(config, task: Task, output: Path, timing: dict) -> None:
    """Gather all lists by row, write predictions and metrics, remove the parts. Rank 0 only; metrics.json comes last."""
    parts = sorted((output / "parts").glob("batch-*.parquet"))
    table = pa.concat_tables(pq.read_table(path) for path in parts).replace_schema_metadata()
    counts = [json.loads(pq.read_schema(path).metadata[b"counts"]) for path in parts]
    request = json.loads((output / "request.json").read_text())
    settings = {name: request[name] for name in (*REQUEST, *REQUEST_FILES)} | {
        "dataset": task.recommender.dataset.info["name"]
    }
    settings["search_per_row"] = {
        name: sum(part[name] for part in counts) / len(task.rows) for name in counts[0]
    }

    def lists_by_alpha() -> Iterator[tuple[float, pa.Table, pa.Table | None]]:
        for alpha in config.alpha:
            both = table.filter(pc.equal(table["alpha"], alpha)).sort_by(
                [("row_id", "ascending"), ("rank", "ascending")]
            )
            lists = both.filter(pc.invert(both["by_beam"])).select(LIST_SCHEMA.names)
            yield alpha, lists, both.filter(both["by_beam"]) if config.search == "exact" else None

    run = Path(config.model).resolve().parent
    run = run if (run / "config.yaml").is_file() else None
    ranked = Ranked(
        task.recommender.stored,
        task.recommender.dataset,
        task.split,
        task.rows,
        config.num_beams,
        run,
    )
    write_results(
        output,
        ranked,
        settings,
        lists_by_alpha(),
        timing,
        max(config.alpha) if config.alpha_from else None,
    )
    shutil.rmtree(output / "parts")


if __name__ == "__main__":
    distributed.run(main)
