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
from igd_ds.data.collate import left_padded, sample_rows
from igd_ds.data.dataset import InteractionDataset, Split, sha256_of
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.decoding.beam import SearchTrie, beam_search
from igd_ds.decoding.cache import PromptTree
from igd_ds.decoding.rules import edge_weights
from igd_ds.distributed import say
from igd_ds.items import decisiveness
from igd_ds.items.store import StoredCatalogue, load_catalogue
from igd_ds.models import causal_lm
from igd_ds.runlog import RunLog, write_json

LIST_SCHEMA = pa.schema([
    ("row_id", pa.int64()), ("user_id", pa.int64()), ("alpha", pa.float64()), ("rank", pa.int32()), ("leaf_id", pa.int32()),
    ("item_ids", pa.list_(pa.int32())), ("score", pa.float32()),
])  # fmt: skip
# What the lists depend on. Not the number of ranks, and not where model and data lie: those are recognised by their content.
REQUEST = ("split", "alpha", "num_beams", "length_penalty", "decoding_rule", "batch_size", "num_rows", "seed", "dtype")


@dataclass(frozen=True)
class Task:
    """What an evaluation works on: the split, the ids of the rows to rank for (ascending), their prompts, the catalogue."""

    dataset: InteractionDataset
    split: Split
    rows: np.ndarray
    prompts: PromptBuilder
    stored: StoredCatalogue
    weights: dict[float, np.ndarray]  # α → w_d per edge
    pad_token_id: int
    load_in_4bit: bool  # whether the base weights were quantised in training


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
    num_leaves = int(np.count_nonzero(task.stored.trie.is_leaf))
    if config.num_beams > num_leaves:
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
    description = causal_lm.describe(Path(config.model))
    if config.max_length > description["max_length"]:
        raise ValueError(f"--max_length {config.max_length} exceeds the {description['max_length']} the model was trained with")
    dataset = InteractionDataset.load(config.dataset)
    tokenizer = causal_lm.load_tokenizer(config.model, config.trust_remote_code)
    stored = load_catalogue(Path(config.model) / "catalogue", tokenizer=tokenizer, dataset=dataset)
    weights = {alpha: edge_weights(stored.trie, stored.gain, config.decoding_rule, alpha) for alpha in config.alpha}
    template = Template.from_dict(description["prompt"], f"{config.model}/{causal_lm.DESCRIPTION_FILE}")
    budget = (config.max_length or description["max_length"]) - stored.catalogue.max_length
    prompts = PromptBuilder.build(template, tokenizer, dataset, stored.catalogue.kind, budget)
    split = dataset.splits[config.split]
    rows = sample_rows(len(split), config.num_rows, config.seed)
    check_memory(config, len(tokenizer))
    return Task(dataset, split, rows, prompts, stored, weights, tokenizer.pad_token_id, description["load_in_4bit"])


def check_memory(config, vocabulary: int) -> None:
    """Raise ValueError if the beams' logits and log-probabilities alone (fp32) exceed the memory that is free."""
    needed = 2 * 4 * config.batch_size * config.num_beams * vocabulary
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"--num_beams {config.num_beams} × --batch_size {config.batch_size} × {vocabulary} tokens of logits take "
            f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: lower one of the two"
        )


def claim_output_folder(output: Path, config, task: Task) -> bool:
    """Make the output folder ready; return whether its evaluation is finished already. Rank 0 only.

    Raises ValueError for a folder with another evaluation or anything else in it, and for an --alpha_from of another model.
    """
    model = Path(config.model)
    files = sorted(path for path in model.rglob("*") if path.is_file())
    request = {name: getattr(config, name) for name in REQUEST} | {
        "max_length": config.max_length or causal_lm.describe(model)["max_length"],
        "dataset": task.dataset.fingerprint,
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

    Batches are cut from the order of the rows, so they are the same whatever the number of ranks; those that an earlier,
    killed evaluation left to do are dealt in turn.
    """
    cuts = range(0, len(task.rows), config.batch_size)
    batches = {parts / f"batch-{begin:09d}.parquet": task.rows[begin : begin + config.batch_size] for begin in cuts}
    missing = distributed.on_main(lambda: [path for path in batches if not path.is_file()])
    mine = missing[distributed.rank() :: distributed.world_size()]
    if not mine:
        return 0, 0.0
    device = distributed.device()
    model = causal_lm.load_trained(config, task.load_in_4bit, device)
    trie = SearchTrie.build(task.stored.trie, device)
    weights = {alpha: torch.from_numpy(array).to(device) for alpha, array in task.weights.items()}
    count, began = sum(len(batches[path]) for path in mine), time.perf_counter()
    with tqdm(total=count, unit="row", desc="rows of rank 0", disable=not distributed.is_main(), mininterval=1.0) as bar:
        for path in mine:
            rows = batches[path]
            prompts = [task.prompts.encode(task.split.history(row)) for row in rows]
            tree = PromptTree(model)
            tree.prefill(*(tensor.to(device) for tensor in left_padded(prompts, task.pad_token_id)))
            tables = []
            for alpha in config.alpha:  # all from one prefill
                tree.rewind()
                found = beam_search(tree, trie, weights[alpha], config.num_beams, config.length_penalty)
                tables.append(list_table(task, rows, alpha, found.leaves.cpu().numpy(), found.scores.cpu().numpy()))
            temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
            pq.write_table(pa.concat_tables(tables), temporary)
            os.replace(temporary, path)
            bar.update(len(rows))
    return count, time.perf_counter() - began


def list_table(task: Task, rows: np.ndarray, alpha: float, leaves: np.ndarray, scores: np.ndarray) -> pa.Table:
    """Return the lists (B, K) of `rows` (B,) as a table, one line per listed leaf with all items that share it."""
    trie = task.stored.trie
    row, column = np.nonzero(leaves >= 0)
    leaf = leaves[row, column]
    count = trie.num_items[leaf]
    ends = np.cumsum(count)
    position = np.repeat(trie.first_item[leaf] - (ends - count), count) + np.arange(ends[-1])
    items = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]), pa.int32()), pa.array(trie.item_order[position]))
    columns = [rows[row], task.split.user_ids[rows[row]], np.full(len(row), alpha), column + 1, leaf, items, scores[row, column]]
    return pa.table(dict(zip(LIST_SCHEMA.names, columns, strict=True)), schema=LIST_SCHEMA)


def finish(config, task: Task, output: Path, timing: dict) -> None:
    """Gather all lists by row, write predictions and metrics, remove the parts. Rank 0 only; metrics.json comes last."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted((output / "parts").glob("batch-*.parquet")))
    length = min(config.num_beams, int(np.count_nonzero(task.stored.trie.is_leaf)))
    cutoffs = metrics.usable_cutoffs(length)
    results = {name: getattr(config, name) for name in REQUEST} | describe_targets(task, cutoffs)
    results |= {"dataset": task.dataset.info["name"], "entropy": task.stored.entropy, "alpha": {}}
    log = RunLog(output, enabled=True, resume_step=-1)  # from scratch, should an earlier attempt have been killed here
    for alpha in config.alpha:
        lists = table.filter(pc.equal(table["alpha"], alpha)).sort_by([("row_id", "ascending"), ("rank", "ascending")])
        leaves, scores = lists_by_row(lists, task.rows, length)
        values = results["alpha"][str(alpha)] = measure(task, leaves, scores, cutoffs)
        log.log(round(1000 * alpha), {f"eval/{name}": value for name, value in values["token_match"].items()})
        temporary = output / f"predictions.tmp-{os.getpid()}"
        pq.write_table(lists, temporary)
        os.replace(temporary, output / f"predictions-alpha{alpha}.parquet")
        print(f"alpha {alpha}: " + ", ".join(f"{name} {value:.4f}" for name, value in values["token_match"].items()), flush=True)
    log.close()
    write_json(output / "timing.json", timing)
    write_json(output / "metrics.json", results)
    shutil.rmtree(output / "parts")
    print(f"{len(task.rows)} rows of {config.split}: {output / 'metrics.json'}", flush=True)


def lists_by_row(lists: pa.Table, rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return leaves int64 and scores float32, each (R, length), from one α's table sorted by row and rank.

    The search fills every list: with fewer leaves than beams `length` is the number of leaves (see `beam_search`).
    """
    row_ids = lists["row_id"].to_numpy()
    assert np.array_equal(row_ids, np.repeat(rows, length)), "every expected row has one whole list, and no other row has any"
    leaves, scores = (lists[name].to_numpy().reshape(-1, length) for name in ("leaf_id", "score"))
    return leaves.astype(np.int64), scores


def describe_targets(task: Task, cutoffs: list[int]) -> dict:
    """Return what the evaluated targets are like, whatever the model: cold ones, prefix entropy, the popularity baseline.

    A target is cold if training had no target with its token path; a trie of training targets alone could never list it.
    """
    trie = task.stored.trie
    target = trie.leaf_of_item[task.split.targets[task.rows]]
    leaves = np.flatnonzero(trie.is_leaf)
    ahead, tied = metrics.popularity_ranking(trie.train_count[leaves], np.searchsorted(leaves, target))
    return {
        "rows": len(task.rows),
        "leaves": len(leaves),
        "cold_targets": int((trie.train_count[target] == 0).sum()),
        "target_prefix_entropy": entropy_by_step(task, *np.unique(target, return_counts=True)),
        "popularity_baseline": metrics.means(metrics.ranking_sums(ahead, cutoffs, tied), len(target)),
    }


def measure(task: Task, leaves: np.ndarray, scores: np.ndarray, cutoffs: list[int]) -> dict:
    """Return all metrics of one α's lists (R, K). Token match lets a leaf's items share a rank; item match draws one of them."""
    trie = task.stored.trie
    target = trie.leaf_of_item[task.split.targets[task.rows]]
    ahead, cold = metrics.items_ahead(leaves, target), trie.train_count[target] == 0
    listed, index, times = np.unique(leaves[:, :10], return_inverse=True, return_counts=True)
    first_tokens = trie.token[metrics.path_nodes(listed, trie.parent, trie.depth)[:, 0]][index.reshape(leaves[:, :10].shape)]
    repetition, num_lists = metrics.first_token_repetition(first_tokens)
    bits, _ = metrics.score_entropy(scores)
    item_match = metrics.ranking_sums(ahead, cutoffs, credit=1 / trie.num_items[target])
    return {
        "token_match": metrics.means(metrics.ranking_sums(ahead, cutoffs), len(target)),
        "item_match": metrics.means(item_match, len(target)),
        "token_match_warm_targets": metrics.means(metrics.ranking_sums(ahead[~cold], cutoffs), int((~cold).sum())),
        "token_match_cold_targets": metrics.means(metrics.ranking_sums(ahead[cold], cutoffs), int(cold.sum())),
        "first_token_repetition": repetition / num_lists,
        "score_entropy_bits": bits / num_lists,
        "cold_share_of_listed": float((trie.train_count[leaves] == 0).mean()),
        "prefix_entropy": entropy_by_step(task, listed, times),
    }


def entropy_by_step(task: Task, leaves: np.ndarray, times: np.ndarray) -> dict[str, list]:
    """Return the mean entropy of the prefix after each step, in nats, and how many items reach it (IGD Figures 3, 6)."""
    trie = task.stored.trie
    nodes = metrics.path_nodes(leaves, trie.parent, trie.depth)
    sums, counts = metrics.prefix_entropy(nodes, times, decisiveness.entropy(trie, task.stored.entropy))
    return {"nats": (sums / counts).tolist(), "items": counts.tolist()}


if __name__ == "__main__":
    distributed.run(main)
