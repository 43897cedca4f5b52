"""Rank the whole catalogue for every row of a split, and measure the lists. Entry point of `igd
eval`.

    deepspeed igd_ds/eval.py --model RUN/model --dataset DATASET --split test --alpha 0 0.1 0.2 \\
        --output_dir RUN/eval/test

Load → this rank's batches → search → gather by row → metrics.json. A batch's lists are written when
it is done, so a killed evaluation goes on where it was, on any number of ranks.
"""

import dataclasses
import importlib.util
import os
import signal
import time
from pathlib import Path
from typing import Any

from igd_ds.errors import EXIT_REQUEUE, UsageError, end_without_working_folder

# Before torch is imported, which ends the process in such a folder.
if __name__ == "__main__":
    end_without_working_folder()

import psutil
import torch
import transformers

from igd_ds import distributed, locks
from igd_ds.config.options import from_arguments, parse
from igd_ds.console import progress_bar
from igd_ds.data.batches import batches_of, refuse_empty, sample_rows
from igd_ds.data.per_row import ItemLists, ItemScores
from igd_ds.distributed import say
from igd_ds.eval_config import EvalConfig
from igd_ds.evaluation import metrics
from igd_ds.evaluation.baseline_recommender import BaselineRecommender, open_recommender
from igd_ds.evaluation.full_ranking import METHOD
from igd_ds.evaluation.parts import (
    RankingTask,
    claim_output_folder,
    finish,
    part_table,
    write_part,
)
from igd_ds.evaluation.recommender import Recommender, dataset_of
from igd_ds.evaluation.results import PROBABILITY, SCORE
from igd_ds.folders import read_json_object
from igd_ds.memory import return_freed_memory
from igd_ds.search.engine import METHODS, check_limits


def main() -> int:
    """Run an evaluation from the command line; return the exit code."""
    config = with_chosen_alpha(parse(EvalConfig, description=__doc__))
    # Finished batches lie on the disk, so a stop needs no preparation.
    locks.end_at(signal.SIGUSR1, EXIT_REQUEUE)
    locks.end_at(signal.SIGTERM, 128 + signal.SIGTERM)
    distributed.init(config.timeout, config.master_port, config.quiet)
    run_evaluation(config)
    return 0


def evaluate(
    run: str | os.PathLike[str],
    split: str = "test",
    output: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Any:
    """Evaluate in this process: `igd eval` for scripts and notebooks, called as `igd_ds.evaluate`.

    A second call with the same arguments reads the metrics of the first.

    Args:
        run: the run folder of `igd_ds.train`, `igd train` or `igd baseline`.
        split: the rows to evaluate: train, valid or test.
        output: the folder for metrics.json and predictions; None: `run`/eval/`split`.
        settings: fields of EvalConfig, which are the flags of `igd eval`. `dataset` is the one that
            the run was trained on, unless it is given.

    Returns:
        A table with one line per α and kind of match: the columns `alpha`, `match`, and the metrics
        of that kind, None or NaN where no row has such a target. `item_match` is the headline, see
        igd_ds/evaluation/metrics.py. It is a pandas DataFrame, or a list of dicts where pandas is
        not installed.

    Raises:
        UsageError: an argument is unknown or has a wrong value, or what `igd eval` refuses.

    Example:
        >>> table = igd_ds.evaluate("RUN", split="valid", alpha=[0, 0.1, 0.2], num_beams=20)
    """
    run = Path(run)
    output = run / "eval" / split if output is None else Path(output)
    named = {"model": run / "model", "split": split, "output_dir": output}
    if "dataset" not in settings:
        settings["dataset"] = dataset_of(run)
    config = with_chosen_alpha(from_arguments(EvalConfig, named, settings, "igd_ds.evaluate"))
    with distributed.called_from_python(config.quiet):
        run_evaluation(config)

    results = read_json_object(output / "metrics.json", "evaluate again into another folder")
    lines = metrics.table_lines(results)
    if importlib.util.find_spec("pandas") is None:
        return lines
    import pandas

    return pandas.DataFrame(lines)


def run_evaluation(config: EvalConfig) -> None:
    """Run an evaluation from its settings."""
    transformers.utils.logging.disable_progress_bar()

    # Claim the output folder; a finished evaluation is left as it is.
    task, output = build_task(config), Path(config.output_dir)
    if distributed.on_main(lambda: claim_output_folder(output, config, task)):
        say(f"{output} is finished: {output / 'metrics.json'}")
        return
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


def with_chosen_alpha(config: EvalConfig) -> EvalConfig:
    """Return the configuration with --alpha_from resolved: α = 0 and the α that was best there.

    `--search auto` becomes the search by which that α was chosen. It depends on the values of α.
    """
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
    search = config.search
    if search == "auto" and results.get("search") in METHODS:  # full rankings have no α
        search = results["search"]
    return dataclasses.replace(config, alpha=tuple(chosen), search=search)


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
    if config.coverage < 1 and not (method == "exact" and is_probability):
        raise UsageError(
            "--coverage has no effect: only an exact search whose scores are item probabilities "
            "(--search exact --softmax masked, α = 0) stops by it; leave it out"
        )
    if config.renormalise and not (scoring.masked_softmax and filters_items(config, recommender)):
        raise UsageError(
            "--renormalise has no effect without --softmax masked and a filter of items "
            "(--item_filter, --exclude_seen yes): leave it out"
        )
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


def filters_items(config: EvalConfig, recommender: Recommender) -> bool:
    """Return whether some items are left out of the lists."""
    return bool(config.item_filter) or recommender.dataset.excludes_seen(config.exclude_seen)


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
        parts / f"part-{number:09d}.parquet": rows
        for number, rows in enumerate(task.batches(config.batch_size))
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
            return_freed_memory()
    return count, time.perf_counter() - began


if __name__ == "__main__":
    distributed.run(main)
