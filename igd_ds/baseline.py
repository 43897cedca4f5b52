"""Train a sequential recommender and rank the whole catalogue with it, as a baseline. Entry point.

    deepspeed igd_ds/baseline.py --ds_config ds_configs/zero1-batch64-fp32.json --dataset DATASET --recommender sasrec \
        --output_dir RUN

Parse → dataset → rows chained to sequences → model → engine → the loop in `train` → RUN/model → RUN/eval/valid and test: the
files that train.py and eval.py leave. `popularity` and `last-item-knn` only count, and need no DeepSpeed file.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

import igd_ds
from igd_ds import distributed
from igd_ds import engine as engines
from igd_ds.baselines.leaves import Leaves, build_catalogue, ranges
from igd_ds.baselines.sequences import Chains, SequenceBatch, refuse_empty
from igd_ds.baselines.sequential import (
    CONFIG_FILE,
    COUNTED,
    LOSSES,
    SEQUENTIAL,
    Negatives,
    load_model,
)
from igd_ds.config import options as configuration
from igd_ds.config.options import option, require
from igd_ds.data.batches import deal, epoch_batches, sample_rows, steps_per_epoch
from igd_ds.data.dataset import InteractionDataset, Split
from igd_ds.distributed import say
from igd_ds.errors import UsageError
from igd_ds.evaluation import metrics
from igd_ds.evaluation.results import LIST_SCHEMA, Ranked, write_results
from igd_ds.folders import write_json
from igd_ds.items.store import StoredCatalogue
from igd_ds.runlog import RunLog, claim_run_folder, peak_memory_gib

NEGATIVES_POWER = 0.75  # shared negatives are drawn ∝ training count to this power: `sample_alpha` of GRU4Rec's published code
VALIDATION_METRIC = "ndcg@10"


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """One baseline: a recommender, its training and its evaluation. What is None follows from the recommender's paper.

    Those that only count pass over what concerns the training and has a default, so that a sweep's rows can share it.
    """

    dataset: str = option("canonical dataset folder (igd prepare makes one)")
    output_dir: str = option("run folder; one run each")
    recommender: str = option("see igd_ds/baselines/sequential.py", choices=(*COUNTED, *SEQUENTIAL))
    ds_config: str = option(
        "DeepSpeed JSON: ZeRO stage, offload, precision, micro-batch (for those that are trained)",
        "",
    )
    item_kind: str = option(
        "what items are written as; those written alike count as one in lists",
        "auto",
        ("auto", "text", "semantic-id"),
    )

    loss: str = option(
        "cross-entropy over the whole catalogue, or the loss of SASRec's or GRU4Rec's paper",
        "cross-entropy",
        LOSSES,
    )
    num_negatives: int | None = option(
        "negatives a target (bce) or a micro-batch (bpr-max); the papers': 1 and 2048", None
    )
    hidden_size: int | None = option("width of embeddings and states", None)
    num_layers: int | None = option("layers or blocks", None)
    num_heads: int | None = option("attention heads (sasrec)", None)
    dropout: float | None = option("dropout of embeddings and states, in [0, 1)", None)

    global_batch_size: int | None = option(
        "sequences per optimizer step, over all ranks and accumulation steps", None
    )
    learning_rate: float | None = option("peak learning rate of AdamW", None)
    weight_decay: float | None = option("AdamW's decoupled weight decay", None)
    schedule: str = option(
        "learning rate after the warm-up", "constant", ("cosine", "linear", "constant")
    )
    warmup_ratio: float = option("share of the steps that warm up linearly, in [0, 1)", 0.0)
    max_grad_norm: float = option("clip gradients to this global L2 norm", 5.0)
    epochs: int = option("passes over the training rows at most", 200)
    max_steps: int = option("optimizer steps at most; 0: as many as the epochs have", 0)
    seed: int = option("seeds initial weights, order, dropout and negatives", 0)
    validate_every: int = option(
        "optimizer steps between validations (NDCG@10); 0: once an epoch", 0
    )
    validation_rows: int = option(
        "rows of the validation split to use (a seeded sample); 0: all", 0
    )
    patience: int = option(
        "validations without improvement before training stops; 0: never stop early", 3
    )
    keep_checkpoints: int = option("newest checkpoints to keep", 1)
    resume: str = option(
        "auto: go on from the run folder's newest whole checkpoint", "never", ("never", "auto")
    )
    log_every: int = option("optimizer steps between log lines", 50)

    splits: list[str] = option("splits to evaluate", ["valid", "test"], ("train", "valid", "test"))
    num_beams: int = option("length of each ranked list (the name it has in eval.py)", 20)
    num_rows: int = option("rows of a split to evaluate, a seeded sample; 0: all", 0)
    rows_seed: int = option("seeds that sample, as --seed does in eval.py", 0)
    batch_size: int = option("rows ranked at once", 256)
    save_scores: bool = option(
        "write eval/SPLIT/scores.npy, float32 (rows of the split, items), for eval.py's --guidance",
        False,
    )

    lora_r: ClassVar[int] = 0  # the engine asks for these
    load_in_4bit: ClassVar[bool] = False

    def check(self) -> None:
        """Raise ValueError for values no run can use; checks that need the dataset come later."""
        form = set(SEQUENTIAL[self.recommender].form if self.recommender in SEQUENTIAL else ())
        usable = form | (
            set(SEQUENTIAL[self.recommender].training) | {"num_negatives"} if form else set()
        )
        for field in dataclasses.fields(self):
            if (
                field.default is None
                and field.name not in usable
                and getattr(self, field.name) is not None
            ):
                raise UsageError(
                    f"--{field.name} has no effect on {self.recommender}: leave it out"
                )
        if not form and self.loss != BaselineConfig.loss:
            raise UsageError(f"--loss has no effect on {self.recommender}: leave it out")
        if form and not self.ds_config:
            raise UsageError(
                f"{self.recommender} is trained: give --ds_config, such as ds_configs/zero1-batch64-fp32.json"
            )
        if self.num_negatives is not None and not LOSSES[self.loss].num_negatives:
            raise UsageError(
                f"--num_negatives has no effect on --loss {self.loss}, which takes all items: leave it out"
            )
        if (
            self.loss == "bpr-max" and self.num_negatives == 1
        ):  # it may be a micro-batch's only target
            raise UsageError("--num_negatives of --loss bpr-max must be at least 2, found 1")
        at_least_1 = "num_negatives hidden_size num_layers num_heads global_batch_size epochs keep_checkpoints"
        require(
            self,
            f"{at_least_1} log_every num_beams batch_size",
            lambda value: value >= 1,
            "must be at least 1",
        )
        not_negative = (
            "weight_decay max_steps seed validate_every validation_rows patience num_rows rows_seed"
        )
        require(
            self,
            not_negative,
            lambda value: 0 <= value < math.inf,
            "must not be negative, and finite",
        )
        require(self, "dropout warmup_ratio", lambda value: 0 <= value < 1, "must lie in [0, 1)")
        require(
            self,
            "learning_rate max_grad_norm",
            lambda value: 0 < value < math.inf,
            "must be positive and finite",
        )
        if not self.splits or len(set(self.splits)) != len(self.splits):
            raise UsageError(f"--splits needs at least one and none twice, found {self.splits}")


@dataclass(frozen=True)
class Task:
    """What a run works on, built once. `negatives` is None where nothing is trained."""

    dataset: InteractionDataset
    stored: StoredCatalogue
    leaves: Leaves
    train: Chains
    negatives: Negatives | None


def main() -> int:
    """Run a baseline from the command line; returns the exit code."""
    config = with_preset(configuration.parse(BaselineConfig, description=__doc__))
    distributed.init()
    ds = (
        engines.resolve_ds_config(config, distributed.world_size())
        if config.recommender in SEQUENTIAL
        else {}
    )
    task, run = build_task(config), Path(config.output_dir)
    model = build_model(config, task)
    tag, finished = distributed.on_main(lambda: open_run_folder(run, config, ds, task, model))
    if not finished and (
        code := train(model, task, config, ds, run, tag)
        if ds
        else save_counts(model, task, config, run)
    ):
        return code
    # A ranking takes minutes, so a stopped one begins again.
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(distributed.EXIT_REQUEUE))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    todo = distributed.on_main(
        lambda: [name for name in config.splits if not is_evaluated(run, name, config)]
    )
    for name in todo:
        evaluate(
            load_model(run / "model").to(distributed.device()),
            task,
            config,
            run,
            task.dataset.splits[name],
        )
    say(f"{run} is finished")
    return 0


def with_preset(config: BaselineConfig) -> BaselineConfig:
    """Return the configuration with the recommender's own settings and the loss' number of negatives filled in."""
    if config.recommender in COUNTED:
        return config
    preset = SEQUENTIAL[config.recommender]
    settings = (
        preset.form | preset.training | {"num_negatives": LOSSES[config.loss].num_negatives or None}
    )
    return dataclasses.replace(
        config, **{name: value for name, value in settings.items() if getattr(config, name) is None}
    )


def build_task(config: BaselineConfig) -> Task:
    """Load and check the data, chain the training rows, and number the catalogue's different items."""
    dataset = InteractionDataset.load(config.dataset)
    to_rank = {("valid", config.validation_rows, config.seed)} | {
        (n, config.num_rows, config.rows_seed) for n in config.splits
    }
    for name, number, seed in sorted(to_rank):
        refuse_empty(dataset.splits[name], sample_rows(len(dataset.splits[name]), number, seed))
    stored = build_catalogue(dataset, config.item_kind)
    train, device = Chains.build(dataset.splits["train"]), distributed.device()
    weights = torch.from_numpy(stored.catalogue.counts).to(device, torch.float32) ** NEGATIVES_POWER
    most = {"bpr-max": int((weights > 0).sum()), "bce": dataset.num_items - 1}.get(config.loss, 0)
    if (number := config.num_negatives or 0) > most:
        raise UsageError(
            f"--num_negatives {number} of --loss {config.loss}: the training rows hold {most} items to draw from"
        )
    return Task(
        dataset, stored, Leaves.build(stored.trie, device), train, Negatives(weights, number)
    )


def build_model(config: BaselineConfig, task: Task):
    """Return the recommender: with random weights, the same on every rank, or with its counts."""
    dataset, split = task.dataset, task.train.split
    if config.recommender in COUNTED:
        last = split.history_items[split.history_offsets[1:] - 1]
        return COUNTED[config.recommender].count(
            last, split.targets, dataset.num_items, config.seed
        )
    torch.manual_seed(config.seed)
    return SEQUENTIAL[config.recommender].model(**model_form(config, dataset))


def model_form(config: BaselineConfig, dataset: InteractionDataset) -> dict:
    """Return what makes the recommender's form: sizes of the dataset and the settings its preset names."""
    longest = max(int(np.diff(split.history_offsets).max()) for split in dataset.splits.values())
    form = {name: getattr(config, name) for name in SEQUENTIAL[config.recommender].form}
    return {"num_items": dataset.num_items, "max_history": longest} | form


def open_run_folder(
    run: Path, config: BaselineConfig, ds: dict, task: Task, model
) -> tuple[str | None, bool]:
    """Claim the run folder; return the checkpoint to go on from (or None) and whether the training is finished. Rank 0 only."""
    claim_run_folder(run, dataclasses.asdict(config), ds, distributed.world_size())
    if (run / "summary.json").is_file():
        refuse_other_dataset(run, json.loads((run / "summary.json").read_text()), task)
        return None, True
    tag = engines.newest_checkpoint(run / "checkpoints")
    engines.check_disk_space(
        run, sum(parameter.numel() for parameter in model.parameters()), config.keep_checkpoints
    )
    return tag, False


def refuse_other_dataset(run: Path, state: dict, task: Task) -> None:
    """Raise ValueError if a run was begun on another dataset: --dataset may move, but not change."""
    if state["dataset"] != task.dataset.fingerprint:
        raise UsageError(
            f"--dataset: {run} was trained on another dataset, or another version of it; give a new --output_dir"
        )


def write_description(folder: Path, config: BaselineConfig, task: Task) -> None:
    """Put beside the weights what load_model needs."""
    form = model_form(config, task.dataset) if config.recommender in SEQUENTIAL else {}
    write_json(
        folder / CONFIG_FILE,
        {"recommender": config.recommender, "form": form, "dataset": task.dataset.fingerprint},
    )


def save_counts(model, task: Task, config: BaselineConfig, run: Path) -> int:
    """Save a recommender that only counts, and measure it once. Returns the exit code."""
    began, state = time.perf_counter(), new_state(task)
    log = RunLog(run, distributed.is_main(), resume_step=-1)

    def save() -> None:
        shutil.rmtree(run / "model", ignore_errors=True)  # what a killed run left
        model.save_pretrained(run / "model")
        write_description(run / "model", config, task)

    distributed.on_main(save)
    validate(model.to(distributed.device()), task, config, state, log)
    state["seconds"] = time.perf_counter() - began
    finish(config, run, state, log)
    return 0


def new_state(task: Task) -> dict:
    """Return the loop's state before the first step."""
    state = {"step": 0, "validated": 0, "best": None, "best_step": None, "stale": 0, "seconds": 0.0}
    return state | {"dataset": task.dataset.fingerprint}


def train(model, task: Task, config: BaselineConfig, ds: dict, run: Path, tag: str | None) -> int:
    """Train until the last step, early stopping or a signal; leaves the best model in RUN/model. Returns the exit code."""
    stop = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda received, _: stop.append(received))
    per_epoch = steps_per_epoch(len(task.train), config.global_batch_size)
    total = min(config.epochs * per_epoch, config.max_steps or math.inf)
    engine, state = engines.initialize(model, config, ds, total), new_state(task)
    if tag:
        state |= engines.load_checkpoint(engine, run / "checkpoints", tag, config)
        refuse_other_dataset(run, state, task)
        say(f"resumed {run} from {tag}")
    log = RunLog(run, distributed.is_main(), resume_step=state["step"])
    began, sums = time.perf_counter(), np.zeros(2)
    started, every = began - state["seconds"], config.validate_every or per_epoch
    batches = windows(task, config, state["step"], engine.train_micro_batch_size_per_gpu())
    bar = tqdm(
        total=total,
        initial=state["step"],
        disable=not distributed.is_main(),
        unit="step",
        mininterval=1.0,
    )
    while True:
        paused = time.perf_counter()
        if state["step"] > state["validated"] and (
            state["step"] % every == 0 or state["step"] == total
        ):
            if validate(engine.module, task, config, state, log):
                engines.save_model(
                    engine,
                    run / "model",
                    False,
                    lambda folder: write_description(folder, config, task),
                )
            engines.update_state(run / "checkpoints", state)
        state["seconds"] = time.perf_counter() - started
        if (config.patience and state["stale"] >= config.patience) or state["step"] == total:
            break
        began += time.perf_counter() - paused

        # Dropout and negatives follow from the step and the rank, so that a resumed run needs no saved RNG state.
        torch.manual_seed(config.seed + 1_000_003 * state["step"] + 7_919 * distributed.rank())
        learning_rate = engine.get_lr()[0]
        step_sums, stopped = train_step(
            engine, task, config.loss, next(batches), bool(stop), state["step"] + 1
        )
        state["step"] += 1
        sums += step_sums
        bar.update()
        if state["step"] % config.log_every == 0 or state["step"] == total:
            seconds = time.perf_counter() - began
            values = {"train/loss": sums[0] / sums[1], "train/learning_rate": learning_rate}
            values |= {
                "train/epoch": state["step"] / per_epoch,
                "train/grad_norm": float(engine.get_global_grad_norm() or 0.0),
            }
            log.log(
                state["step"],
                values
                | {
                    "speed/rows_per_second": sums[1] / seconds,
                    "speed/memory_gib": peak_memory_gib(),
                },
            )
            began, sums = time.perf_counter(), np.zeros(2)
        if stopped or state["step"] % every == 0 or state["step"] == total:
            paused = time.perf_counter()
            engines.save_checkpoint(engine, run / "checkpoints", state, config)
            began += time.perf_counter() - paused
        if stopped:
            log.close()
            say(f"stopped by a signal after step {state['step']}; saved. Go on with --resume auto")
            return distributed.EXIT_REQUEUE
    bar.close()
    finish(config, run, state, log)
    return (
        distributed.EXIT_REQUEUE if distributed.any_rank(bool(stop)) else 0
    )  # the evaluation is left to the next start


def train_step(
    engine, task: Task, loss: str, window: list[SequenceBatch], stop: bool, step: int
) -> tuple[np.ndarray, bool]:
    """Make an optimizer step: the mean loss over the targets of all ranks' micro-batches.

    Returns (sum of losses in nats, targets), float64 over all ranks, and whether any rank was asked to stop. Raises
    FloatingPointError on every rank, before the update, if the loss is not finite anywhere, and after it for the gradient.
    """
    device = distributed.device()
    counted = torch.tensor(
        [sum(len(batch.targets) for batch in window), stop], dtype=torch.float64, device=device
    )
    num_targets, stopped = distributed.all_reduce_sum(counted).tolist()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index, batch in enumerate(window):
        batch = batch.to(device)
        losses = LOSSES[loss].function(
            partial(engine, batch.histories, batch.places), batch.targets, task.negatives
        )
        engine.backward(
            losses.sum() * (distributed.world_size() / num_targets), scale_wrt_gas=False
        )  # it averages over ranks
        total += losses.detach().sum()
        if index == len(window) - 1 and not math.isfinite(distributed.all_reduce_sum(total)):
            raise FloatingPointError(
                f"step {step}: the loss is not finite; no weight was updated. Lower --learning_rate"
            )
        engine.step()
    if not engine.fp16_enabled() and not math.isfinite(
        engine.get_global_grad_norm() or 0.0
    ):  # fp16 skips such a step itself
        raise FloatingPointError(
            f"step {step}: the gradient is not finite; the last checkpoint is still good, see --resume"
        )
    return np.array([total.item(), num_targets]), stopped > 0


def windows(
    task: Task, config: BaselineConfig, first: int, micro: int
) -> Iterator[list[SequenceBatch]]:
    """Yield this rank's micro-batches of optimizer steps `first`, `first` + 1, …: they follow from the step's number alone."""
    per_epoch = steps_per_epoch(len(task.train), config.global_batch_size)
    for step in count(first):
        if step == first or step % per_epoch == 0:
            order = epoch_batches(
                task.train.lengths,
                config.global_batch_size,
                config.seed,
                step // per_epoch,
                group=True,
            )
        sequences = order[step % per_epoch]
        yield [
            task.train.collate(part)
            for part in deal(sequences, distributed.rank(), distributed.world_size(), micro)
        ]


def validate(model, task: Task, config: BaselineConfig, state: dict, log: RunLog) -> bool:
    """Measure NDCG@10, count towards early stopping, and return whether it is the best so far."""
    split = task.dataset.splits["valid"]
    rows = sample_rows(len(split), config.validation_rows, config.seed)
    leaves, _ = rank_rows(model, task, split, rows, 10, config.batch_size)
    target = task.stored.trie.leaf_of_item[split.targets[rows]]
    value = metrics.ranking_sums(metrics.items_ahead(leaves, target), [10])[
        VALIDATION_METRIC
    ] / len(rows)
    log.log(state["step"], {f"valid/{VALIDATION_METRIC}": value})
    improved = state["best"] is None or value > state["best"]
    state["stale"], state["validated"] = 0 if improved else state["stale"] + 1, state["step"]
    if improved:
        state["best"], state["best_step"] = value, state["step"]
    say(
        f"step {state['step']}: {VALIDATION_METRIC} {value:.4f}"
        + (" (best so far)" if improved else "")
    )
    return improved


def finish(config: BaselineConfig, run: Path, state: dict, log: RunLog) -> None:
    """Record that the training is finished."""
    log.hparams(dataclasses.asdict(config), {"best_validation": state["best"]})
    log.close()
    distributed.on_main(
        lambda: write_json(run / "summary.json", {"validation_metric": VALIDATION_METRIC, **state})
    )
    say(
        f"done: best {VALIDATION_METRIC} {state['best']:.4f} at step {state['best_step']}; model in {run / 'model'}"
    )


def rank_rows(
    model,
    task: Task,
    split: Split,
    rows: np.ndarray,
    length: int,
    batch_size: int,
    scores: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best leaves of the whole catalogue for rows (R,), and their log-probabilities: (R, K), on every rank.

    K is `length` or, if that is less, the number of leaves. Batches are the same on any number of ranks and dealt in turn; all
    ranks make equally many, because with ZeRO-3 each is a collective. `scores` (rows of the split, N) takes up the items'
    probabilities.
    """
    device, length = distributed.device(), min(length, len(task.leaves.nodes))
    leaves = torch.zeros((len(rows), length), dtype=torch.int64, device=device)
    log_p = torch.zeros((len(rows), length), dtype=torch.float32, device=device)
    batches, world, was_training = (
        -(-len(rows) // batch_size),
        distributed.world_size(),
        model.training,
    )
    model.eval()
    for number in range(distributed.rank(), -(-batches // world) * world, world):
        place = slice(
            min(number, batches - 1) * batch_size, (min(number, batches - 1) + 1) * batch_size
        )
        batch = Chains.of_rows(split, rows[place]).collate(np.arange(len(rows[place]))).to(device)
        of_items = model.log_probabilities(batch.histories, batch.places)
        if number < batches:
            values, columns = task.leaves.log_probabilities(of_items).topk(length)
            leaves[place], log_p[place] = columns, values.float()
            if scores is not None:
                scores[rows[place]] = of_items.exp().float().cpu().numpy()
    model.train(was_training)
    leaves, log_p = (distributed.all_reduce_sum(tensor).cpu().numpy() for tensor in (leaves, log_p))
    return task.leaves.nodes[leaves], log_p


def is_evaluated(run: Path, name: str, config: BaselineConfig) -> bool:
    """Whether a split's evaluation is there, with the scores where they are asked for."""
    folder = run / "eval" / name
    return (folder / "metrics.json").is_file() and (
        not config.save_scores or (folder / "scores.npy").is_file()
    )


def evaluate(model, task: Task, config: BaselineConfig, run: Path, split: Split) -> None:
    """Rank the catalogue for the split's rows and write RUN/eval/SPLIT, on all ranks."""
    rows, output = (
        sample_rows(len(split), config.num_rows, config.rows_seed),
        run / "eval" / split.name,
    )
    scores, temporary = None, output / "scores.tmp.npy"
    distributed.on_main(lambda: output.mkdir(parents=True, exist_ok=True))
    if config.save_scores:
        shape = (len(split), task.dataset.num_items)
        distributed.on_main(lambda: new_scores(temporary, shape))
        scores = np.load(temporary, mmap_mode="r+")
    began = time.perf_counter()
    leaves, log_p = rank_rows(model, task, split, rows, config.num_beams, config.batch_size, scores)
    seconds = time.perf_counter() - began  # all ranks are done now
    if scores is not None:
        scores.flush()
        distributed.barrier()
    timing = {
        "world_size": distributed.world_size(),
        "rows_searched": len(rows),
        "rows_already_there": 0,
    }
    timing |= {"rows_per_second": len(rows) / seconds, "alphas": 1}
    settings = {
        "split": split.name,
        "search": "full ranking",
        "num_beams": config.num_beams,
        "length_penalty": 0.0,
    }
    settings |= {
        "num_rows": config.num_rows,
        "seed": config.rows_seed,
        "dataset": task.dataset.info["name"],
    }
    ranked = Ranked(task.stored, task.dataset, split, rows, config.num_beams, run)

    def write() -> None:
        if scores is not None:
            os.replace(temporary, output / "scores.npy")
        write_json(
            output / "request.json",
            settings | {"dataset": task.dataset.fingerprint, "version": igd_ds.__version__},
        )
        write_results(
            output, ranked, settings, [(0.0, list_table(ranked, leaves, log_p), None)], timing
        )

    distributed.on_main(write)


def new_scores(path: Path, shape: tuple[int, int]) -> None:
    """Make a .npy file of zeros, float32; rows that are not sampled take no space. ValueError if the disk is too small."""
    path.unlink(missing_ok=True)  # what a killed evaluation left
    needed, free = 4 * shape[0] * shape[1], shutil.disk_usage(path.parent).free
    if needed > free:
        raise UsageError(
            f"--save_scores: {path.parent} has {free / 2**30:.1f} GiB free, the scores take {needed / 2**30:.1f}"
        )
    np.lib.format.open_memmap(path, "w+", np.float32, shape)


def list_table(ranked: Ranked, leaves: np.ndarray, log_p: np.ndarray) -> pa.Table:
    """Return lists (R, K) in LIST_SCHEMA, sorted by row and rank."""
    (num_rows, length), trie, flat = leaves.shape, ranked.stored.trie, leaves.ravel()
    number = trie.num_items[flat].astype(np.int64)
    items = trie.item_order[ranges(trie.first_item[flat].astype(np.int64), number)]
    row_ids = np.repeat(ranked.rows, length)
    columns = [
        row_ids, ranked.split.user_ids[row_ids], np.zeros(len(flat)), np.tile(np.arange(1, length + 1), num_rows), flat,
        pa.ListArray.from_arrays(pa.array(np.append(0, number.cumsum()), pa.int32()), pa.array(items)), log_p.ravel(),
        np.ones(len(flat), bool),  # every item was scored
    ]  # fmt: skip
    return pa.table(dict(zip(LIST_SCHEMA.names, columns, strict=True)), schema=LIST_SCHEMA)


if __name__ == "__main__":
    distributed.run(main)
