"""Rank the whole catalogue for every row of a split, and measure the lists. Entry point of `igd
eval`.

    deepspeed igd_ds/eval.py --model RUN/model --dataset DATASET --split test --alpha 0 0.1 0.2 \\
        --output_dir RUN/eval/test

Load → this rank's batches → search → gather by row → metrics.json. A batch's lists are written when
it is done, so a killed evaluation goes on where it was, on any number of ranks.
"""

import dataclasses
import signal
import time
from pathlib import Path

from igd_ds.errors import EXIT_REQUEUE, UsageError, end_without_working_folder

# Before torch is imported, which ends the process in such a folder.
if __name__ == "__main__":
    end_without_working_folder()

import psutil
import torch
import transformers

from igd_ds import distributed, locks
from igd_ds.config.options import parse
from igd_ds.console import progress_bar
from igd_ds.data.batches import refuse_empty, sample_rows
from igd_ds.data.per_row import ItemLists, ItemScores
from igd_ds.distributed import say
from igd_ds.eval_config import EvalConfig
from igd_ds.evaluation import metrics
from igd_ds.evaluation.baseline_recommender import BaselineRecommender, open_recommender
from igd_ds.evaluation.full_ranking import METHOD
from igd_ds.evaluation.parts import (
    RankingTask,
    batches_of,
    claim_output_folder,
    finish,
    part_table,
    write_part,
)
from igd_ds.evaluation.recommender import Recommender
from igd_ds.evaluation.results import PROBABILITY, SCORE
from igd_ds.folders import read_json_object
from igd_ds.search.engine import check_limits


def main() -> int:
    """Run an evaluation from the command line; return the exit code."""
    config = with_chosen_alpha(parse(EvalConfig, description=__doc__))
    # Finished batches lie on the disk, so a stop needs no preparation.
    locks.end_at(signal.SIGUSR1, EXIT_REQUEUE)
    locks.end_at(signal.SIGTERM, 128 + signal.SIGTERM)
    transformers.utils.logging.disable_progress_bar()
    distributed.init(config.timeout, config.master_port, config.quiet)

    # Claim the output folder; a finished evaluation is left as it is.
    task, output = build_task(config), Path(config.output_dir)
    if distributed.on_main(lambda: claim_output_folder(output, config, task)):
        say(f"{output} is finished: {output / 'metrics.json'}")
        return 0
    if config.num_beams > (num_leaves := task.recommender.num_leaves):
        say(
            f"warning: --num_beams {config.num_beams}, but the catalogue has {num_leaves} "
            "different items: lists are that long",
            always=True,
        )

    count, seconds = search_rows(config, task, output / "parts")
    own = [count, count / seconds if count else 0.0]
    totals = torch.tensor(own, dtype=torch.float64, device=distributed.device())
    count, speed = distributed.all_reduce_sum(totals).tolist()  # all ranks are done now
    timing = {
        "world_size": distributed.world_size(),
        "rows_searched": int(count),
        "rows_already_there": len(task.rows) - int(count),
        "rows_per_second": speed,  # all ranks together, without loading, all values of α
        "alphas": len(config.alpha),
    }
    distributed.on_main(lambda: finish(config, task, output, timing))
    return 0


def with_chosen_alpha(config: EvalConfig) -> EvalConfig:
    """Return the configuration with --alpha_from resolved: α = 0 and the α that was best there."""
    if not config.alpha_from:
        return config
    finished = Path(config.alpha_from) / "metrics.json"
    if not finished.is_file():
        raise UsageError(
            f"--alpha_from: no finished evaluation at {config.alpha_from} (no metrics.json there)"
        )
    results = read_json_object(finished, "evaluate that split again, or give --alpha")
    if results.get("split") == config.split:
        raise UsageError(
            f"--alpha_from {config.alpha_from} evaluated {config.split} itself: α is chosen on "
            "another split"
        )
    try:
        chosen = sorted({0.0, float(metrics.best_alpha(results))})
    except UsageError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"--alpha_from: {finished} is damaged or not of an evaluation (it has no figures by α "
            "to choose from): evaluate that split again, or give --alpha"
        ) from error
    return dataclasses.replace(config, alpha=tuple(chosen))


def build_task(config: EvalConfig) -> RankingTask:
    """Load and check everything but the weights.

    Raises:
        UsageError: what does not fit together, or a row that cannot be ranked.
    """
    recommender = open_recommender(config)
    method, scores = chosen_search(config, recommender)

    split = recommender.dataset.splits[config.split]
    rows = sample_rows(len(split), config.num_rows, config.seed)
    refuse_empty(split, rows)
    lists, guidance, ids = None, None, recommender.ids
    if config.item_filter:
        lists = ItemLists.read(config.item_filter, len(split), ids, config.ids)
    if config.guidance:
        names, dataset = config.guidance_ids, recommender.dataset
        guide = ItemScores.read(config.guidance, names, dataset, config.split, ids)
        guidance = guide, config.guidance_weight
    dataset, seen = recommender.dataset, None
    if dataset.excludes_seen(config.exclude_seen):
        seen = dataset.seen_items(config.split)
    say(dataset.describe_exclusion(config.exclude_seen))
    task = RankingTask(recommender, split, rows, lists, guidance, seen, method, scores)
    distributed.on_main(lambda: check_every_row(config, task))
    return task


def chosen_search(config: EvalConfig, recommender: Recommender) -> tuple[str, str]:
    """Return the method that ranks the catalogue, and what its scores are (PROBABILITY or SCORE).

    Raises:
        UsageError: the search cannot be made.
    """
    if isinstance(recommender, BaselineRecommender):
        return METHOD, SCORE
    scoring = recommender.scoring(config.scoring_options())
    is_probability = scoring.is_probability and not config.guidance
    method = scoring.method(config.search, guided=bool(config.guidance))
    if method == "exact":
        scoring.refuse_exact()
    check_limits(config, config.num_beams, method)
    check_memory(config, len(recommender.tokenizer))
    if scoring.masked_softmax and recommender.likelihood.softmax == "full":
        say(
            "note: the model was trained under the softmax over the vocabulary: its probabilities "
            "are renormalised over the trie's next tokens"
        )
    meaning = PROBABILITY if is_probability else SCORE
    say(f"search: {method}; a list's scores: {meaning} of the item")
    return method, meaning


def check_every_row(config: EvalConfig, task: RankingTask) -> None:
    """Raise UsageError for a row with bad item lists or guidance: now rather than hours later."""
    if task.item_lists or task.guidance:
        for rows in batches_of(task.rows, config.batch_size):
            task.per_user(rows)


def check_memory(config: EvalConfig, vocabulary: int) -> None:
    """Raise UsageError if one pass's logits and log-probabilities (fp32) exceed the free memory."""
    # In the prompt pass each prompt has one position with logits.
    flag, positions = max(
        ("pass_positions", config.pass_positions),
        ("batch_size", config.batch_size),
        key=lambda pair: pair[1],
    )
    needed = 2 * 4 * positions * vocabulary
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise UsageError(
            f"--{flag} {positions} × {vocabulary} tokens of logits take {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free: lower it"
        )


def search_rows(config: EvalConfig, task: RankingTask, parts: Path) -> tuple[int, float]:
    """Search this rank's batches and write each one's lists to `parts`.

    Batches that an earlier, killed evaluation left to do are dealt in turn.

    Returns:
        The number of rows searched and the seconds that took.
    """
    batches = {
        parts / f"batch-{number:09d}.parquet": rows
        for number, rows in enumerate(batches_of(task.rows, config.batch_size))
    }
    missing = distributed.on_main(lambda: [path for path in batches if not path.is_file()])
    mine = missing[distributed.rank() :: distributed.world_size()]
    if not mine:
        return 0, 0.0

    recommender = task.recommender
    recommender.load_weights()
    scoring = recommender.scoring(config.scoring_options())
    count, began = sum(len(batches[path]) for path in mine), time.perf_counter()
    with progress_bar(total=count, unit="row", desc="rows of rank 0") as bar:
        for path in mine:
            rows = batches[path]
            histories, per_user = [task.split.history(row) for row in rows], task.per_user(rows)
            found = recommender.search(
                histories,
                scoring,
                config.num_beams,
                task.search,
                per_user,
                config,
                targets=task.target_leaves(rows),
            )
            write_part(path, part_table(task, rows, config.alpha, found, per_user.item_filter))
            bar.update(len(rows))
    return count, time.perf_counter() - began


if __name__ == "__main__":
    distributed.run(main)
