"""The training loop: steps, validation, checkpoints, stop signals, timing, resume, the log.

An entry gives it a `Training`: the batches, the loss of a step, and a validation. Everything a
resumed run needs is the number of the step (batches, dropout and negatives follow from it) and the
LoopState.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from igd_ds import distributed
from igd_ds.config.training import LoopOptions
from igd_ds.console import Progress, header
from igd_ds.contracts import Training
from igd_ds.distributed import say
from igd_ds.engine.build import LOG, num_parameters
from igd_ds.engine.checkpoint import Manifest, load_checkpoint, save_checkpoint, update_state
from igd_ds.engine.ds_config import DsConfig, dtype_of, zero_stage
from igd_ds.engine.step import StepSums, optimizer_step
from igd_ds.errors import EXIT_REQUEUE, UsageError
from igd_ds.folders import write_json
from igd_ds.memory import return_freed_memory
from igd_ds.runlog import RunLog, peak_memory_gib

# Large primes: seeds of neighbouring steps and ranks do not meet.
SEED_OF_STEP, SEED_OF_RANK = 1_000_003, 7_919

ITEM_MATCH = ("ndcg@10",)
"""Validation metrics in which a hit on a path of n items counts 1/n."""


@dataclass
class LoopState:
    """Progress of a training; saved with every checkpoint."""

    step: int = 0
    """Optimizer steps made."""
    validated: int = 0
    """Step of the last validation. With −1, the model before the first step is validated too."""
    best: float | None = None
    """Best value of the validation metric."""
    best_step: int | None = None
    """Step of the best validation."""
    stale: int = 0
    """Validations since the best one."""
    seconds: float = 0.0
    """Training time so far, validations and saving included."""
    dataset: str = ""
    """Fingerprint of the dataset."""
    objective: dict[str, Any] = field(default_factory=dict)
    """The objective's own state."""
    log: dict[str, Any] = field(default_factory=dict)
    """`RunLog.mark` when the state was saved."""
    sums: dict[str, Any] = field(default_factory=dict)
    """`StepSums.state_dict` of the steps since the last entry of the log."""
    lap: float = 0.0
    """Seconds of these steps."""
    behind: float = 0.0
    """How far the last validation is behind the best, in units of the metric."""

    def note_validation(self, value: float, lower_is_better: bool) -> bool:
        """Record a validation at the present step; return whether it is the best so far."""
        if self.best is None:
            improved = True
        else:
            improved = value < self.best if lower_is_better else value > self.best

        self.validated = self.step
        self.stale = 0 if improved else self.stale + 1
        self.behind = 0.0 if improved or self.best is None else abs(value - self.best)
        if improved:
            self.best = value
            self.best_step = self.step
        return improved


STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""What asks the ranks of a job to save and end."""


class StopRequest:
    """Notes a signal, so that the loop can save before it ends.

    Args:
        signals: the ones to note.
    """

    def __init__(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        self.received = False
        for number in signals:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


class Stopwatch:
    """Seconds since the last lap, without what happens in `paused()`.

    Args:
        seconds: what has passed of the first lap already.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._began = time.perf_counter() - seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block."""
        stopped = time.perf_counter()
        yield
        self._began += time.perf_counter() - stopped

    def elapsed(self) -> float:
        """Return the seconds since the last lap."""
        return time.perf_counter() - self._began

    def lap(self) -> float:
        """Return the seconds since the last lap and start again."""
        seconds = self.elapsed()
        self._began += seconds
        return seconds


def step_seed(seed: int, step: int) -> int:
    """Return the seed of this rank's dropout and negatives in a step: a resumed run has it too."""
    return seed + SEED_OF_STEP * step + SEED_OF_RANK * distributed.rank()


def resume(
    engine: Any, training: Training, run: Path, tag: str | None, dataset: str, lora: bool
) -> LoopState:
    """Return the state to begin with: that of checkpoint `tag`, which is loaded, or a new one.

    Raises:
        UsageError: the run was begun on another dataset than that with the fingerprint `dataset`.
    """
    if tag is None:
        return LoopState(dataset=dataset)
    # Weights of another number of items could not even be loaded.
    refuse_other_dataset(run, Manifest.read(run / "checkpoints" / tag).state["dataset"], dataset)
    state = LoopState(**load_checkpoint(engine, run / "checkpoints", tag, lora))
    training.load_state_dict(state.objective)
    say(f"resumed {run} from {tag}")
    return state


def refuse_other_dataset(run: Path, begun_on: str, dataset: str) -> None:
    """Raise UsageError if two fingerprints differ: only the path of a run's dataset may change."""
    if begun_on != dataset:
        raise UsageError(
            f"--dataset: {run} was trained on another dataset, or another version of it; give a "
            "new --output_dir"
        )


def say_header(engine: Any, training: Training, options: LoopOptions, ds: DsConfig) -> None:
    """Say what is trained, on what, and where. Every rank may call it, rank 0 prints."""
    world, stage = distributed.world_size(), zero_stage(ds)
    total, trained = num_parameters(engine.module)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    micro, accumulation = ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]
    steps, ranks = training.total_steps, "1 rank" if world == 1 else f"{world} ranks"
    precision = str(dtype_of(ds)).removeprefix("torch.")
    facts = training.facts() | {
        "parameters": f"{total:,}, of which {trained:,} are trained",
        "steps": f"{steps:,} at most, {training.steps_per_epoch:,} an epoch; of "
        f"{options.global_batch_size} each = micro-batch {micro} × {accumulation} accumulation "
        f"steps × {ranks}",
        "device": f"{world} × {gpu}, {precision}, ZeRO stage {stage}",
        "run folder": f"{options.output_dir} (DeepSpeed's messages: {LOG})",
    }
    say(header(facts))


def fit(
    engine: Any,
    training: Training,
    options: LoopOptions,
    run: Path,
    state: LoopState,
    stop: StopRequest,
    lora: bool = False,
) -> int:
    """Train until the last step, early stopping or a signal; the best model is left in RUN/model.

    Returns:
        The exit code: 0, or EXIT_REQUEUE if a signal stopped the training and its state is saved.
    """
    distributed.set_timeout(options.timeout)  # all ranks work alike from here on
    engine.train()  # pretrained weights come in eval mode, in which nothing is dropped out
    total = training.total_steps
    every = options.validate_every or training.steps_per_epoch
    log = RunLog(
        run,
        distributed.is_main(),
        state.step,
        state.validated,
        training.tags,
        state.log,
        options.report_to,
        dataclasses.asdict(options),
    )
    steps = training.micro_batches(state.step)
    progress = Progress(total, state.step, training.steps_per_epoch, every, options.patience)
    watch, sums = Stopwatch(state.lap), StepSums.of_state(state.sums)
    started = time.perf_counter() - state.seconds

    def is_due(interval: int) -> bool:
        return state.step % interval == 0 or state.step == total

    while True:
        # Validate. The checkpoint of this step is written already, so a run that is stopped within
        # its validation resumes with it.
        if state.step > state.validated and is_due(every):
            with watch.paused():
                validate(engine, training, state, log)
                state.seconds = time.perf_counter() - started
                if state.step:
                    update_state(run / "checkpoints", dataclasses.asdict(state))
        stopped_early = early_stop(state, options)
        if stopped_early or state.step == total:
            break

        # Make one optimizer step.
        began = time.perf_counter()
        learning_rate = engine.get_lr()[0]
        batches = next(steps)
        # Last, because making the batches may draw numbers too.
        torch.manual_seed(step_seed(options.seed, state.step))
        step_sums, stopped = optimizer_step(
            engine, batches, training.loss, state.step, training.normalization, stop.received
        )
        sums += step_sums
        state.step += 1
        state.seconds = time.perf_counter() - started
        progress.update(state.step, state.best_step, time.perf_counter() - began)
        return_freed_memory()

        # Log.
        if is_due(options.log_every):
            values = training.values(sums, watch.lap()) | {
                "train/learning_rate": learning_rate,
                "train/epoch": state.step / training.steps_per_epoch,
                "train/grad_norm": sums.gradient_norm,
                "speed/memory_gib": peak_memory_gib(),
            }
            log.log(state.step, values)
            progress.show_loss(values["train/loss"])
            sums = StepSums()

        # Save.
        save_due = bool(options.save_every) and state.step % options.save_every == 0
        if stopped or save_due or is_due(every):
            elapsed = watch.elapsed()
            with watch.paused():
                state.objective, state.log = training.state_dict(), log.mark()
                state.sums, state.lap = sums.state_dict(), elapsed
                checkpoints, keep = run / "checkpoints", options.keep_checkpoints
                save_checkpoint(engine, checkpoints, dataclasses.asdict(state), keep, lora)
        if stopped:
            progress.close()
            log.close()
            say(
                f"stopped by a signal after step {state.step}; saved. Go on with --resume auto",
                always=True,
            )
            return EXIT_REQUEUE

    progress.close()
    if stopped_early:
        say(f"{stopped_early}: stopped early at step {state.step}")
    finish(training.validation_metric, options, run, state, log)
    return 0


def early_stop(state: LoopState, options: LoopOptions) -> str:
    """Return why a training stops after its last validation; "" where it goes on."""
    if options.patience and state.stale >= options.patience:
        return f"validation has not improved {options.patience} time(s)"
    if options.stop_margin and state.behind > options.stop_margin:
        return (
            f"validation has fallen {state.behind:.4f} behind its best, more than --stop_margin "
            f"{options.stop_margin}"
        )
    return ""


def validate(engine: Any, training: Training, state: LoopState, log: RunLog) -> None:
    """Measure the validation metric, and keep the model if it is the best so far."""
    values = training.validate(engine)
    log.log(state.step, values)
    value = values[f"valid/{training.validation_metric}"]
    if not math.isfinite(value):
        raise FloatingPointError(
            f"step {state.step}: validation gives {value}, and the checkpoint of this step holds "
            "the weights that gave it. A resumed run would come here again: start a new one with a "
            "lower --learning_rate"
        )

    improved = state.note_validation(value, training.lower_is_better)
    epoch = state.step / training.steps_per_epoch
    shown = ", ".join(f"{tag} {v:.4f}" for tag, v in values.items() if "gain" not in tag)
    if training.validation_metric in ITEM_MATCH:
        shown += ", item match"
    say(f"step {state.step}, epoch {epoch:.2f}: {shown}" + (" (best so far)" if improved else ""))
    if improved:
        training.save(engine)


def finish(metric: str, options: LoopOptions, run: Path, state: LoopState, log: RunLog) -> None:
    """Record that the training is finished: a run is finished when summary.json exists."""
    assert state.best is not None, "the last step is validated"
    log.hparams(dataclasses.asdict(options), {"best_validation": state.best})
    log.close()
    summary = {"validation_metric": metric, **dataclasses.asdict(state)}
    for name in ("log", "sums", "lap"):  # of use to a resumed run alone
        del summary[name]
    distributed.on_main(lambda: write_json(run / "summary.json", summary))
    say(
        f"done: best {metric} {state.best:.4f} at step {state.best_step}; model in {run / 'model'}",
        always=True,
    )
    say(f"watch it: tensorboard --logdir {run}")
