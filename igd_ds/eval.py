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
from igd_ds import config as configuration
from igd_ds import distributed, metrics
from igd_ds.data.collate import sample_rows
from igd_ds.data.dataset import Split, sha256_of
from igd_ds.data.per_row import ItemLists, map_guidance
from igd_ds.decoding.expand import PerUser
from igd_ds.decoding.filters import ItemFilter
from igd_ds.decoding.search import Limits, SearchResult, check_limits
from igd_ds.distributed import say
from igd_ds.items import decisiveness
from igd_ds.models import causal_lm
from igd_ds.recommender import Recommender
from igd_ds.runlog import RunLog, write_json

LIST_SCHEMA = pa.schema([
    ("row_id", pa.int64()), ("user_id", pa.int64()), ("alpha", pa.float64()), ("rank", pa.int32()), ("leaf_id", pa.int32()),
    ("item_ids", pa.list_(pa.int32())), ("score", pa.float32()), ("certified", pa.bool_()),
])  # fmt: skip
PART_SCHEMA = LIST_SCHEMA.append(pa.field("by_beam", pa.bool_()))  # the list that an exact search started from
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
        say(f"warning: --num_beams {config.num_beams}, but the catalogue has {num_leaves} different items: lists are that long")
    count, seconds = search_rows(config, task, output / "parts")
    totals = torch.tensor([count, count / seconds if count else 0.0], dtype=torch.float64, device=distributed.device())
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
        raise ValueError(f"--alpha_from: no finished evaluation at {config.alpha_from} (no metrics.json there)")
    results = json.loads(finished.read_text())
    if results["split"] == config.split:
        raise ValueError(f"--alpha_from {config.alpha_from} evaluated {config.split} itself: α is chosen on another split")
    return dataclasses.replace(config, alpha=sorted({0.0, float(metrics.best_alpha(results))}))


def build_task(config) -> Task:
    """Load and check everything but the weights."""
    recommender = Recommender(config)
    scoring = recommender.scoring(config)
    if config.search == "exact":
        scoring.refuse_exact()
    check_limits(Limits(config.pass_positions, config.row_positions), config.num_beams, config.search)
    check_memory(config, len(recommender.tokenizer))
    split = recommender.dataset.splits[config.split]
    rows = sample_rows(len(split), config.num_rows, config.seed)
    if len(empty := rows[np.diff(split.history_offsets)[rows] == 0]):
        raise ValueError(f"row {empty[0]} of {split.name} has an empty history: leave such rows out of the dataset")
    lists = ItemLists.read(config.item_filter, len(split)) if config.item_filter else None
    guidance = map_guidance(config.guidance, len(split), recommender.dataset.num_items) if config.guidance else None
    task = Task(recommender, split, rows, lists, None if guidance is None else (guidance, config.guidance_weight))
    distributed.on_main(lambda: check_every_row(config, task))
    return task


def check_every_row(config, task: Task) -> None:
    """Raise ValueError for a row whose item lists or guidance are bad or leave it nothing: now rather than hours later."""
    for rows in batches_of(config, task.rows) if task.item_lists or task.guidance else []:
        task.per_user(rows)


def batches_of(config, rows: np.ndarray) -> list[np.ndarray]:
    """Cut `rows` into batches: the same ones whatever the number of ranks."""
    return [rows[begin : begin + config.batch_size] for begin in range(0, len(rows), config.batch_size)]


def check_memory(config, vocabulary: int) -> None:
    """Raise ValueError if one pass's logits and log-probabilities alone (fp32) exceed the memory that is free."""
    flag = max("pass_positions", "batch_size", key=lambda name: getattr(config, name))  # prompts: a position each
    needed = 2 * 4 * getattr(config, flag) * vocabulary
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed > free:
        numbers = f"take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        raise ValueError(f"--{flag} {getattr(config, flag)} × {vocabulary} tokens of logits {numbers}: lower it")


def claim_output_folder(output: Path, config, task: Task) -> bool:
    """Make the output folder ready; return whether its evaluation is finished already. Rank 0 only.

    Raises ValueError for a folder with another evaluation or anything else in it, and for an --alpha_from of another model.
    """
    model = Path(config.model)
    files = sorted(path for path in model.rglob("*") if path.is_file())
    request = {name: getattr(config, name) for name in REQUEST}
    request |= {name: sha256_of(path) if (path := getattr(config, name)) else None for name in REQUEST_FILES}
    request |= {
        "max_length": config.max_length or task.recommender.description["max_length"],
        "dataset": task.recommender.dataset.fingerprint,
        "model": {str(path.relative_to(model)): sha256_of(path) for path in files},
        "base_model": causal_lm.base_of(config),
        "version": igd_ds.__version__,
    }
    if config.alpha_from:
        chosen_by = json.loads((Path(config.alpha_from) / "request.json").read_text())
        if differing := [key for key in ("model", "base_model", "dataset") if chosen_by[key] != request[key]]:
            raise ValueError(f"--alpha_from {config.alpha_from} evaluated something else; these differ: {', '.join(differing)}")
    saved = output / "request.json"
    if saved.is_file():
        old = json.loads(saved.read_text())
        if changed := [key for key in request if old.get(key) != request[key]]:
            raise ValueError(f"--output_dir {output} belongs to another evaluation; these differ: {', '.join(changed)}")
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"--output_dir {output} is not empty and holds no evaluation; give a new folder")
    output.mkdir(parents=True, exist_ok=True)
    write_json(saved, request)
    finished = (output / "metrics.json").is_file()
    if finished:
        shutil.rmtree(output / "parts", ignore_errors=True)  # a kill between the last two steps of `finish` leaves them
    else:
        (output / "parts").mkdir(exist_ok=True)
    return finished


def search_rows(config, task: Task, parts: Path) -> tuple[int, float]:
    """Search this rank's batches and write each one's lists to `parts`; returns how many rows and how many seconds that were.

    Batches that an earlier, killed evaluation left to do are dealt in turn.
    """
    batches = {parts / f"batch-{number:09d}.parquet": rows for number, rows in enumerate(batches_of(config, task.rows))}
    missing = distributed.on_main(lambda: [path for path in batches if not path.is_file()])
    mine = missing[distributed.rank() :: distributed.world_size()]
    if not mine:
        return 0, 0.0
    recommender, limits = task.recommender, Limits(config.pass_positions, config.row_positions)
    recommender.load_weights()
    scoring = recommender.scoring(config)
    count, began = sum(len(batches[path]) for path in mine), time.perf_counter()
    with tqdm(total=count, unit="row", desc="rows of rank 0", disable=not distributed.is_main(), mininterval=1.0) as bar:
        for path in mine:
            rows = batches[path]
            histories, per_user = [task.split.history(row) for row in rows], task.per_user(rows)
            found = recommender.search(histories, scoring, config.num_beams, config.search, per_user, limits)
            temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
            pq.write_table(part_table(task, rows, config.alpha, found, per_user.item_filter), temporary)
            os.replace(temporary, path)
            bar.update(len(rows))
    return count, time.perf_counter() - began


def part_table(task: Task, rows: np.ndarray, alphas: list[float], found: SearchResult, allowed: ItemFilter | None) -> pa.Table:
    """Return all lists of `rows` (B,), one line per listed leaf with the items there that the row may get; counts as metadata."""
    lists = [(False, found.leaves, found.scores, found.certified)]
    if found.beam_leaves is not None:
        lists.append((True, found.beam_leaves, found.beam_scores, torch.zeros_like(found.certified)))
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
        tables.append(pa.table(dict(zip(PART_SCHEMA.names, columns, strict=True)), schema=PART_SCHEMA))
    counts = {name: int(values.sum()) for name, values in found.counts.items()}
    return pa.concat_tables(tables).replace_schema_metadata({"counts": json.dumps(counts)})


def finish(config, task: Task, output: Path, timing: dict) -> None:
    """Gather all lists by row, write predictions and metrics, remove the parts. Rank 0 only; metrics.json comes last."""
    parts = sorted((output / "parts").glob("batch-*.parquet"))
    table = pa.concat_tables(pq.read_table(path) for path in parts).replace_schema_metadata()
    counts = [json.loads(pq.read_schema(path).metadata[b"counts"]) for path in parts]
    stored, dataset = task.recommender.stored, task.recommender.dataset
    trie, entropy = stored.trie, decisiveness.entropy(stored.trie, stored.entropy)
    target = trie.leaf_of_item[task.split.targets[task.rows]]
    frequency = np.bincount(trie.leaf_of_item[task.split.targets], minlength=trie.num_nodes)
    cutoffs = metrics.usable_cutoffs(min(config.num_beams, task.recommender.num_leaves))
    request = json.loads((output / "request.json").read_text())
    results = {name: request[name] for name in (*REQUEST, *REQUEST_FILES)} | {"rows": len(task.rows)}
    results |= metrics.describe_targets(trie, entropy, frequency, target, cutoffs)
    results |= {"dataset": dataset.info["name"], "entropy": stored.entropy, "alpha": {}}
    results["search_per_row"] = {name: sum(part[name] for part in counts) / len(task.rows) for name in counts[0]}
    log = RunLog(output, enabled=True, resume_step=-1)  # from scratch, should an earlier attempt have been killed here
    for alpha in config.alpha:
        both = table.filter(pc.equal(table["alpha"], alpha)).sort_by([("row_id", "ascending"), ("rank", "ascending")])
        lists = both.filter(pc.invert(both["by_beam"])).select(LIST_SCHEMA.names)
        leaves, scores, certified = lists_by_row(lists, task.rows, config.num_beams)
        values = metrics.describe_lists(trie, entropy, frequency, target, leaves, scores, item_credit(task, lists), cutoffs)
        if stored.catalogue.kind == "semantic-id":  # a title's first tokens say little about what it is
            values["relaxed_match"] = metrics.relaxed_match(trie, target, leaves, cutoffs)
        line = ", ".join(f"{name} {value:.4f}" for name, value in values["token_match"].items())
        if config.search == "exact":
            beam, _, _ = lists_by_row(both.filter(both["by_beam"]), task.rows, config.num_beams)
            values |= metrics.compare_with_beam(leaves, certified, beam, target, cutoffs)
            line += f"; proven for {values['proof_share']:.2%} of rows"
        results["alpha"][str(alpha)] = values
        results["short_lists"] = int((leaves[:, -1] < 0).sum())  # the same for every α
        log.log(round(1000 * alpha), {f"eval/{name}": value for name, value in values["token_match"].items()})
        temporary = output / f"predictions.tmp-{os.getpid()}"
        pq.write_table(lists, temporary)
        os.replace(temporary, output / f"predictions-alpha{alpha}.parquet")
        print(f"alpha {alpha}: {line}", flush=True)
    log.close()
    if (short := results["short_lists"]) and config.num_beams <= task.recommender.num_leaves:
        print(f"warning: {short} lists are shorter than --num_beams, because filter or guidance leaves those rows fewer items")
    write_json(output / "timing.json", timing)
    write_json(output / "metrics.json", results)
    shutil.rmtree(output / "parts")
    print(f"{len(task.rows)} rows of {config.split}: {output / 'metrics.json'}", flush=True)


def lists_by_row(lists: pa.Table, rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return one α's leaves int64, scores float32 and certified bool, each (R, length); −1, −inf, False behind a list's end."""
    row, place, by_row = np.searchsorted(rows, lists["row_id"].to_numpy()), lists["rank"].to_numpy() - 1, []
    for name, nothing in (("leaf_id", np.int64(-1)), ("score", np.float32(-np.inf)), ("certified", False)):
        by_row.append(np.full((len(rows), length), nothing))
        by_row[-1][row, place] = lists[name].to_numpy()
    there = by_row[0] >= 0
    assert np.array_equal(lists["row_id"].to_numpy(), rows[row]) and there[:, 0].all(), "the expected rows, all of them, no other"
    assert there.sum() == len(row) and (there[:, :-1] >= there[:, 1:]).all(), "each has one list, without a hole"
    return tuple(by_row)


def item_credit(task: Task, lists: pa.Table) -> np.ndarray:
    """Return the share of a hit that item match counts, float64 (R,): of the leaf's items that the row may get one is drawn."""
    target = task.split.targets[task.rows]
    row = np.searchsorted(task.rows, lists["row_id"].to_numpy())
    hit = task.recommender.stored.trie.leaf_of_item[target[row]] == lists["leaf_id"].to_numpy()
    row, items = row[hit], lists["item_ids"].filter(pa.array(hit)).combine_chunks()
    count = pc.list_value_length(items).to_numpy()
    owner = np.repeat(row, count)
    credit = np.zeros(len(target))
    credit[row] = np.bincount(owner, items.flatten().to_numpy() == target[owner], len(target))[row] / count
    return credit


if __name__ == "__main__":
    distributed.run(main)
