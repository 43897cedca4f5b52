"""Train a sequential recommender and rank the whole catalogue with it. Entry point of `igd
baseline`.

    deepspeed igd_ds/baseline.py --ds_config ds_configs/zero1-batch64-fp32.json --dataset DATASET \\
        --recommender sasrec --output_dir RUN

Parse → dataset → rows chained to sequences → model → engine → the loop (igd_ds/loop.py) → RUN/model
→ RUN/eval/valid and test: the files that igd train and igd eval leave. `popularity` and
`last-item-knn` only count, and need no DeepSpeed file.
"""

import dataclasses
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from igd_ds.errors import EXIT_REQUEUE, end_without_working_folder

# Before torch is imported, which ends the process in such a folder.
if __name__ == "__main__":
    end_without_working_folder()

from igd_ds import distributed, locks, loop
from igd_ds.baseline_config import BaselineConfig
from igd_ds.baselines.sequential import load_model
from igd_ds.config.options import parse
from igd_ds.distributed import say
from igd_ds.engine.build import initialize, keep_log
from igd_ds.engine.checkpoint import check_disk_space, newest_checkpoint
from igd_ds.engine.ds_config import DsConfig, resolve_ds_config
from igd_ds.evaluation.full_ranking import Ranker, evaluate, is_evaluated, rows_to_rank
from igd_ds.evaluation.results import Ranked
from igd_ds.run_folder import claim_run_folder, read_summary
from igd_ds.runlog import RunLog
from igd_ds.sequential_training import (
    VALIDATION_METRIC,
    BaselineData,
    SequentialTraining,
    validate,
)


def main() -> int:
    """Run a baseline from the command line; return the exit code."""
    config = parse(BaselineConfig, description=__doc__).with_preset()
    distributed.init(config.timeout, config.master_port, config.quiet)
    ds: DsConfig = {}
    if config.is_trained:
        ds = resolve_ds_config(config, distributed.world_size(), load_in_4bit=False)
    data, run = BaselineData.build(config), Path(config.output_dir)
    model = data.build_model(config)
    say(data.dataset.describe_exclusion(config.exclude_seen))

    # Train, unless an earlier start did.
    tag, finished = distributed.on_main(lambda: open_run_folder(run, config, ds, data, model))
    if not finished:
        code = train(model, data, config, ds, run, tag) if ds else count(model, data, config, run)
        if code:
            return code

    # A ranking takes minutes, so a stopped one begins again.
    locks.end_at(signal.SIGUSR1, EXIT_REQUEUE)
    locks.end_at(signal.SIGTERM, 128 + signal.SIGTERM)
    distributed.set_timeout(distributed.LOADING)  # ranks have unequal work again
    missing = [name for name in config.splits if not is_evaluated(run, name, config)]
    for name in distributed.on_main(lambda: missing):
        trained = load_model(run / "model").to(distributed.device())
        ranker = Ranker(trained, data.leaves, config.batch_size)
        split = data.dataset.splits[name]
        rows = rows_to_rank(split, config)
        ranked = Ranked(data.stored, data.dataset, split, rows, config.num_beams, run)
        evaluate(ranker, ranked, data.seen_filter(name, config), run / "eval" / name, config)
    say(f"{run} is finished")
    return 0


def open_run_folder(
    run: Path, config: BaselineConfig, ds: DsConfig, data: BaselineData, model: Any
) -> tuple[str | None, bool]:
    """Claim the run folder. Rank 0 only.

    Returns:
        The checkpoint to go on from, or None, and whether the training is finished.
    """
    claim_run_folder(run, config, ds, distributed.world_size())
    if summary := read_summary(run):
        loop.refuse_other_dataset(run, summary["dataset"], data.dataset.fingerprint)
        return None, True

    tag = newest_checkpoint(run / "checkpoints", config.trust_checkpoint)
    trained = sum(parameter.numel() for parameter in model.parameters())
    check_disk_space(run, trained, config.keep_checkpoints)
    return tag, False


def train(
    model: Any,
    data: BaselineData,
    config: BaselineConfig,
    ds: DsConfig,
    run: Path,
    tag: str | None,
) -> int:
    """Train a recommender with the loop; return the exit code."""
    training = SequentialTraining(config, run, data, ds["train_micro_batch_size_per_gpu"])
    keep_log(run)
    engine = initialize(model, config, ds, training.total_steps)
    loop.say_header(engine, training, config, ds)
    state = loop.resume(engine, training, run, tag, data.dataset.fingerprint, lora=False)

    stop = loop.StopRequest()
    code = loop.fit(engine, training, config, run, state, stop)
    if code == 0 and distributed.any_rank(stop.received):
        return EXIT_REQUEUE  # the evaluation is left to the next start
    return code


def count(model: Any, data: BaselineData, config: BaselineConfig, run: Path) -> int:
    """Save a recommender that only counts, and measure it once; return the exit code."""
    began, state = time.perf_counter(), loop.LoopState(dataset=data.dataset.fingerprint)
    log = RunLog(
        run,
        distributed.is_main(),
        resume_step=-1,
        report_to=config.report_to,
        settings=dataclasses.asdict(config),
    )

    def save() -> None:
        shutil.rmtree(run / "model", ignore_errors=True)  # left by a killed run
        model.save_pretrained(run / "model")
        data.write_description(run / "model", config)

    distributed.on_main(save)
    seen = data.seen_filter("valid", config)
    values = validate(model.to(distributed.device()), config, data, seen)
    log.log(0, values)
    state.note_validation(values[f"valid/{VALIDATION_METRIC}"], lower_is_better=False)
    state.seconds = time.perf_counter() - began
    loop.finish(VALIDATION_METRIC, config, run, state, log)
    return 0


if __name__ == "__main__":
    distributed.run(main)
