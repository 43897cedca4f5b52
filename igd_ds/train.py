"""Train a recommender whose loss weighs each item token by how decisive it is. Entry point.

    deepspeed igd_ds/train.py --ds_config ds_configs/zero2.json --dataset DATASET --model_name_or_path Qwen/Qwen2.5-1.5B \
        --weighting igd --igd_beta 0.1 --output_dir RUN

Parse → dataset → catalogue → weights → model → engine → the loop in `fit` → RUN/model.
"""

import dataclasses
import math
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import igd_ds
from igd_ds import distributed
from igd_ds import engine as engines
from igd_ds.backbones import adapter_of, causal_lm, read_model_config
from igd_ds.config import options as configuration
from igd_ds.data.batches import (
    MASKED_ROW,
    Batch,
    Collator,
    deal,
    epoch_batches,
    sample_rows,
    steps_per_epoch,
)
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.distributed import say
from igd_ds.errors import UsageError
from igd_ds.evaluation.validation import VALIDATIONS
from igd_ds.folders import write_json
from igd_ds.items import decisiveness, store
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.loss import at_labels, token_nll, weighted_sums
from igd_ds.objectives import WEIGHTINGS, Weighting, check_flags
from igd_ds.objectives.losses import plain, scaled_nll
from igd_ds.runlog import RunLog, claim_run_folder, peak_memory_gib

EMPTY_WEIGHT = 1e-12  # stands for Ω of a micro-batch without weight: its loss is 0, and no loss scale makes that overflow
# Sums over steps and their target tokens; behind them, per target of the loss: Σ w·loss, Σ w, Σ w·∂loss/∂α', and α' of each step.
SUMS = (
    "objective",
    "steps",
    "nll",
    "tokens",
    "nll_zero",
    "tokens_zero",
    "weight_zero",
    "rows",
    "all_tokens",
)
BY_TARGET = 4


@dataclass(frozen=True)
class Inputs:
    """What a run is given: the prompt's template, the canonical dataset, tokenizer and model configuration.

    `added_ids` are tokens that the model's own tokenizer lacks; `adapter` is the module of igd_ds.backbones for this kind of model.
    """

    template: Template
    dataset: InteractionDataset
    tokenizer: object
    added_ids: range
    model_config: object
    adapter: object


@dataclass(frozen=True)
class Task:
    """What a run trains on, built once: datasets as collators, catalogue, tokenizer, and the text of the prompt."""

    train: Collator
    valid: Collator
    lengths: np.ndarray  # (R,) int64, tokens of each training row, for grouping
    stored: store.StoredCatalogue
    tokenizer: object
    adapter: object  # module of igd_ds.backbones for this kind of model
    weighting: Weighting
    mixing: object  # LearnedMixing or ScheduledMixing of igd_ds.objectives.mixing; None where the loss has one target
    description: dict


def main() -> int:
    """Run a training from the command line; returns the exit code."""
    config = configuration.parse(configuration.TrainConfig, description=__doc__)
    check_flags(config)
    transformers.utils.logging.disable_progress_bar()
    distributed.init()
    ds = engines.resolve_ds_config(config, distributed.world_size())
    inputs = load_inputs(config)
    run = Path(config.output_dir)
    tag, finished = distributed.on_main(lambda: open_run_folder(run, config, ds, inputs))
    if finished:
        say(f"{run} is finished: {finished}")
        return 0
    task = build_task(config, run, inputs)
    with engines.loading_context(
        ds, whole=config.load_in_4bit or bool(config.lora_r and inputs.added_ids)
    ):
        torch.manual_seed(config.seed)  # the same random weights and LoRA matrices on every rank
        model = task.adapter.build(
            config,
            inputs.model_config,
            engines.dtype_of(ds),
            distributed.device(),
            inputs.added_ids,
        )
    engine = engines.initialize(model, config, ds, num_steps(config, len(task.train.split)))
    state = {"step": 0, "validated": 0, "best": None, "best_step": None, "stale": 0, "seconds": 0.0}
    if tag:
        state |= engines.load_checkpoint(engine, run / "checkpoints", tag, config)
        if task.mixing:
            task.mixing.load_state_dict(state["mixing"])
        say(f"resumed {run} from {tag}")
    return fit(engine, task, config, run, state)


def load_inputs(config) -> Inputs:
    """Read and check everything that is cheap to read, before a run folder is claimed."""
    template = Template.load(config.prompt)
    dataset = InteractionDataset.load(config.dataset)
    model_name = config.model_config or config.model_name_or_path
    tokenizer = causal_lm.load_tokenizer(config.tokenizer or model_name, config.trust_remote_code)
    added_ids = range(0)
    if config.tokenizer and config.model_name_or_path:
        added_ids = causal_lm.added_token_ids(
            tokenizer, config.model_name_or_path, config.trust_remote_code
        )
    model_config = read_model_config(model_name, config.trust_remote_code)
    adapter_of(model_config).fit_model_config(model_config, config, tokenizer, added_ids)
    return Inputs(template, dataset, tokenizer, added_ids, model_config, adapter_of(model_config))


def open_run_folder(run: Path, config, ds: dict, inputs: Inputs) -> tuple[str | None, str]:
    """Claim the run folder; return the checkpoint to go on from (or None) and, of a finished run, its summary. Rank 0 only."""
    claim_run_folder(run, dataclasses.asdict(config), ds, distributed.world_size())
    if (run / "summary.json").is_file():
        return None, (run / "summary.json").read_text().strip()
    tag = engines.newest_checkpoint(run / "checkpoints")
    trained = inputs.adapter.num_trained_parameters(inputs.model_config, config, inputs.added_ids)
    engines.check_disk_space(run, trained, config.keep_checkpoints)
    if not (run / "catalogue").is_dir():
        build_catalogue(run / "catalogue", config, inputs)
    return tag, ""


def build_catalogue(folder: Path, config, inputs: Inputs) -> None:
    """Tokenize the items, build the trie and its gain, and store them for all ranks to map. Rank 0 only."""
    kind = None if config.item_kind == "auto" else config.item_kind
    catalogue = Catalogue.build(inputs.dataset, inputs.tokenizer, kind)
    if catalogue.max_length >= config.max_length:
        item = int(np.argmax(np.diff(catalogue.offsets)))
        text = inputs.dataset.titles[item] or "".join(inputs.dataset.semantic_ids[item])
        raise UsageError(
            f"item {item} ({text[:80]!r}…) has {catalogue.max_length} tokens, which leaves no prompt within --max_length "
            f"{config.max_length}: raise it, or shorten or drop the item"
        )
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    gain = decisiveness.information_gain(trie, config.entropy)
    store.save_catalogue(folder, catalogue, trie, gain, config.entropy)
    zero = decisiveness.zero_gain(trie)[trie.path_nodes(catalogue.offsets)].mean()
    print(
        f"catalogue: {catalogue.num_items} items, {trie.num_nodes} trie nodes, {zero:.1%} zero-gain tokens",
        flush=True,
    )


def build_task(config, run: Path, inputs: Inputs) -> Task:
    """Map the run's catalogue and build the prompts, the token weights and the collators that gather from them."""
    dataset, tokenizer = inputs.dataset, inputs.tokenizer
    stored = store.load_catalogue(run / "catalogue", tokenizer=tokenizer, dataset=dataset)
    catalogue = stored.catalogue
    prompts = PromptBuilder.build(
        inputs.template,
        tokenizer,
        dataset,
        catalogue.kind,
        config.max_length - catalogue.max_length,
    )
    zero_gain = decisiveness.zero_gain(stored.trie)[stored.trie.path_nodes(catalogue.offsets)]
    weighting = WEIGHTINGS[config.weighting]
    weights = np.stack([target(stored, config) for target in weighting.targets], axis=1)
    paths = (catalogue.token_ids, catalogue.offsets, weights, zero_gain)
    form = (tokenizer.pad_token_id, inputs.model_config.is_encoder_decoder)
    valid = Collator(dataset.splits["valid"], prompts, *paths, *form)
    train = Collator(
        dataset.splits["train"],
        prompts,
        *paths,
        *form,
        prompts.null if weighting.needs_null else None,
    )
    lengths = prompts.lengths(train.split) + np.diff(catalogue.offsets)[train.split.targets]
    description = {
        "prompt": inputs.template.as_dict(),
        "max_length": config.max_length,
        "item_kind": catalogue.kind,
        "entropy": config.entropy,
        "load_in_4bit": config.load_in_4bit,
        "version": igd_ds.__version__,
    }
    mixing = weighting.mixing and weighting.mixing(config, num_steps(config, len(lengths)))
    return Task(
        train, valid, lengths, stored, tokenizer, inputs.adapter, weighting, mixing, description
    )


def num_steps(config, num_rows: int) -> int:
    """Return the optimizer steps the run has at most."""
    steps = config.epochs * steps_per_epoch(num_rows, config.global_batch_size)
    return min(steps, config.max_steps) if config.max_steps else steps


def windows(config, task: Task, first: int, accumulation: int) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of optimizer steps `first`, `first` + 1, …; the next step's are collated meanwhile.

    The rows of a step follow from the step's number alone: that is all a resumed run needs to know of the sampler.
    """
    per_epoch = steps_per_epoch(len(task.lengths), config.global_batch_size)
    micro = config.global_batch_size // (accumulation * distributed.world_size())

    def collate(rows: np.ndarray) -> list[Batch]:
        return [
            task.train(r) for r in deal(rows, distributed.rank(), distributed.world_size(), micro)
        ]

    with ThreadPoolExecutor(1) as pool:
        pending = None
        for step in range(first, num_steps(config, len(task.lengths))):
            if pending is None or step % per_epoch == 0:
                order = epoch_batches(
                    task.lengths,
                    config.global_batch_size,
                    config.seed,
                    step // per_epoch,
                    config.length_grouping,
                )
            following = pool.submit(collate, order[step % per_epoch])
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def fit(engine, task: Task, config, run: Path, state: dict) -> int:
    """Train until the last step, early stopping or a signal; leaves the best model in RUN/model. Returns the exit code.

    Where a validation is due, the checkpoint comes first: a run stopped within the validation resumes with it.
    """
    stop = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda received, _: stop.append(received))
    log = RunLog(run, distributed.is_main(), resume_step=state["step"])
    total, per_epoch = (
        num_steps(config, len(task.lengths)),
        steps_per_epoch(len(task.lengths), config.global_batch_size),
    )
    every = config.validate_every or per_epoch
    batches = windows(config, task, state["step"], engine.gradient_accumulation_steps())
    bar = tqdm(
        total=total,
        initial=state["step"],
        disable=not distributed.is_main(),
        unit="step",
        mininterval=1.0,
    )
    began, window_sums = time.perf_counter(), 0
    started = began - state["seconds"]
    while True:
        paused = time.perf_counter()
        if state["step"] > state["validated"] and (
            state["step"] % every == 0 or state["step"] == total
        ):
            validate(engine, task, config, run, state, log)
            engines.update_state(run / "checkpoints", state)
        state["seconds"] = time.perf_counter() - started
        stale = config.patience and state["stale"] >= config.patience
        if stale or state["step"] == total:
            break
        began += time.perf_counter() - paused

        # Dropout follows from the step and the rank, so that a resumed run needs no saved RNG state.
        torch.manual_seed(config.seed + 1_000_003 * state["step"] + 7_919 * distributed.rank())
        learning_rate = engine.get_lr()[0]
        sums, stopped = train_step(
            engine, task, config, next(batches), bool(stop), state["step"] + 1
        )
        state["step"] += 1
        window_sums = window_sums + sums
        bar.update()
        if state["step"] % config.log_every == 0 or state["step"] == total:
            values = step_values(window_sums, time.perf_counter() - began, task.mixing)
            values |= {
                "train/learning_rate": learning_rate,
                "train/epoch": state["step"] / per_epoch,
            }
            log.log(
                state["step"],
                values | {"train/grad_norm": float(engine.get_global_grad_norm() or 0.0)},
            )
            bar.set_postfix(loss=f"{values['train/loss']:.4f}", refresh=False)
            began, window_sums = time.perf_counter(), 0
        due = state["step"] % every == 0 or state["step"] == total
        if due or stopped or (config.save_every and state["step"] % config.save_every == 0):
            paused = time.perf_counter()
            state["mixing"] = task.mixing.state_dict() if task.mixing else None
            engines.save_checkpoint(engine, run / "checkpoints", state, config)
            began += time.perf_counter() - paused
        if stopped:
            log.close()
            say(f"stopped by a signal after step {state['step']}; saved. Go on with --resume auto")
            return distributed.EXIT_REQUEUE
    bar.close()
    if stale:
        say(
            f"validation has not improved {config.patience} time(s): stopped early at step {state['step']}"
        )
    log.hparams(dataclasses.asdict(config), {"best_validation": state["best"]})
    log.close()
    distributed.on_main(
        lambda: write_json(
            run / "summary.json", {"validation_metric": config.validation_metric, **state}
        )
    )
    say(
        f"done: best {config.validation_metric} {state['best']:.4f} at step {state['best_step']}; model in {run / 'model'}"
    )
    say(f"watch it: tensorboard --logdir {run}")
    return 0


def train_step(
    engine, task: Task, config, window: list[Batch], stop: bool, step: int
) -> tuple[np.ndarray, bool]:
    """Make one optimizer step of L = Σ_j α'_j L_j, L_j = (1/Ω_j) Σ w_j·loss (IGD Eq. 6), Ω over all ranks and micro-batches.

    With one target α' is 1. Returns the step's sums over all ranks (float64, see SUMS) and whether any rank was asked to stop.
    Raises FloatingPointError on every rank, before the update, if the loss is not finite anywhere.
    """
    device, world = distributed.device(), distributed.world_size()
    local = torch.cat(
        [
            sum(b.token_weights.sum((0, 1), dtype=torch.float64) for b in window),
            torch.tensor([float(stop)]),
        ]
    )
    *omega, stopped = distributed.all_reduce_sum(local.to(device)).tolist()
    if not any(omega):
        say(f"warning: step {step}: all target tokens have weight 0 (Ω = 0); no update")
        return np.zeros(len(SUMS) + BY_TARGET * len(omega)), stopped > 0
    omega = torch.tensor(
        [o or 1.0 for o in omega], device=device
    )  # without weight a target's sum is 0 too
    alpha = (
        task.mixing.coefficients(step - 1).to(device)
        if task.mixing
        else torch.ones(1, device=device)
    )
    sums = torch.zeros(len(SUMS) + BY_TARGET * len(omega), dtype=torch.float64, device=device)
    for index, batch in enumerate(window):
        batch = batch.to(device)
        nll, losses, slopes = token_losses(engine, task, config, batch, alpha)
        weights = at_labels(batch.token_weights, batch.labels)
        weighted, weight = weighted_sums(losses, weights)
        if config.normalization == "global":
            targets = weighted * (world / omega)  # the engine averages over ranks
        else:
            targets = weighted / (weight.clamp_min(EMPTY_WEIGHT) * len(window))
        engine.backward(
            (alpha * targets).sum() if slopes is None else targets.sum(), scale_wrt_gas=False
        )
        slope = torch.zeros_like(weight) if slopes is None else (weights * slopes).sum(0)
        sums += step_sums(
            batch,
            nll.detach(),
            weights,
            [weighted.detach(), weight, slope, torch.zeros_like(alpha)],
        )
        if index == len(window) - 1:
            distributed.all_reduce_sum(sums)
            if not torch.isfinite(sums).all():
                raise FloatingPointError(
                    f"step {step}: the loss is not finite; no weight was updated. Lower --learning_rate, or "
                    "look at the data of this step"
                )
        engine.step()
    if not engine.fp16_enabled() and not math.isfinite(
        engine.get_global_grad_norm() or 0.0
    ):  # fp16 skips such a step itself
        raise FloatingPointError(
            f"step {step}: the gradient is not finite; the last checkpoint is still good, see --resume"
        )
    by_target = sums[len(SUMS) :].view(BY_TARGET, -1)
    target_losses, by_target[3] = by_target[0] / omega, alpha
    sums[0], sums[1] = (alpha * target_losses if slopes is None else target_losses).sum(), 1
    if task.mixing:
        task.mixing.update(
            (target_losses if slopes is None else by_target[2] / omega).tolist(), step - 1
        )
    return sums.cpu().numpy(), stopped > 0


def token_losses(
    engine, task: Task, config, batch: Batch, alpha: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return, of the n labelled tokens, the plain NLL (n,), the loss that the weights multiply (n,) or (n, K), in nats.

    And, where α' scales the logits, the loss' derivative by α' (n, K), else None.
    """
    logits = task.adapter.label_logits(engine, batch.input_ids, batch.attention_mask, batch.labels)
    targets = at_labels(batch.labels, batch.labels)
    in_logits, null_logits = task.mixing and task.mixing.form == "logits", None
    with torch.set_grad_enabled(
        task.weighting.token_loss is plain and not in_logits
    ):  # else it is but logged
        nll = token_nll(logits, targets)
    if in_logits:
        return nll, *scaled_nll(logits, targets, alpha)
    if task.weighting.token_loss is plain:
        return nll, nll, None
    if task.weighting.needs_null:
        null = task.adapter.label_logits(
            engine, batch.null_input_ids, batch.null_attention_mask, batch.null_labels
        )
        null_logits = null[batch.null_index]
    return nll, task.weighting.token_loss(logits, targets, null_logits, config), None


def step_sums(
    batch: Batch, nll: torch.Tensor, weights: torch.Tensor, by_target: list[torch.Tensor]
) -> torch.Tensor:
    """Return a micro-batch's part of the sums, float64: SUMS, then `by_target`'s (K,) tensors."""
    zero = at_labels(batch.zero_gain, batch.labels)
    tokens = [
        nll.sum(),
        nll.new_tensor(len(nll)),
        (nll * zero).sum(),
        zero.sum(),
        (weights.mean(1) * zero).sum(),
    ]
    rows = [(batch.row_ids != MASKED_ROW).sum(), batch.attention_mask.sum()]
    return torch.cat(
        [nll.new_zeros(2).double(), torch.stack([*tokens, *rows]).double(), *by_target]
    )


def step_values(sums: np.ndarray, seconds: float, mixing) -> dict[str, float]:
    """Turn sums over some steps into the scalars of the run log: numerators and denominators first, one division last."""
    s = dict(zip(SUMS, sums.tolist(), strict=False))
    weighted, weight, _, alpha = sums[len(SUMS) :].reshape(BY_TARGET, -1)

    def ratio(numerator: float, denominator: float) -> float:
        return float(numerator / denominator) if denominator else 0.0

    values = {"train/loss": ratio(s["objective"], s["steps"])}
    for j, name in enumerate(mixing.names if mixing else ()):
        values |= {
            f"train/loss_{name}": ratio(weighted[j], weight[j]),
            f"train/alpha_{name}": ratio(alpha[j], s["steps"]),
        }
    return values | {
        "train/nll": ratio(s["nll"], s["tokens"]),
        "train/nll_zero_gain": ratio(s["nll_zero"], s["tokens_zero"]),
        "train/nll_nonzero_gain": ratio(s["nll"] - s["nll_zero"], s["tokens"] - s["tokens_zero"]),
        "train/zero_gain_weight_share": ratio(s["weight_zero"], weight.mean()),
        "speed/target_tokens_per_second": s["tokens"] / seconds,
        "speed/tokens_per_second": s["all_tokens"] / seconds,
        "speed/rows_per_second": s["rows"] / seconds,
        "speed/memory_gib": peak_memory_gib(),
    }


def validate(engine, task: Task, config, run: Path, state: dict, log: RunLog) -> None:
    """Measure the validation metric, keep the model if it is the best so far, and count towards early stopping."""
    rows = sample_rows(len(task.valid.split), config.validation_rows, config.seed)
    step = engine.train_micro_batch_size_per_gpu() * distributed.world_size()
    rows = np.concatenate([rows, np.full(-len(rows) % step, MASKED_ROW)])
    engine.eval()
    with torch.no_grad():
        batches = deal(
            rows, distributed.rank(), distributed.world_size(), step // distributed.world_size()
        )
        values = VALIDATIONS[config.validation_metric](
            engine, task.adapter, task.valid, task.stored, batches
        )
    engine.train()
    log.log(state["step"], values)
    value = values[f"valid/{config.validation_metric}"]
    lower_is_better = config.validation_metric == "nll"
    if not math.isfinite(value):
        raise FloatingPointError(
            f"step {state['step']}: validation gives {value}; lower --learning_rate"
        )
    improved = state["best"] is None or (
        value < state["best"] if lower_is_better else value > state["best"]
    )
    state["stale"], state["validated"] = 0 if improved else state["stale"] + 1, state["step"]
    shown = ", ".join(f"{tag} {number:.4f}" for tag, number in values.items() if "gain" not in tag)
    say(f"step {state['step']}: {shown}" + (" (best so far)" if improved else ""))
    if improved:
        state["best"], state["best_step"] = value, state["step"]
        engines.save_model(
            engine,
            run / "model",
            bool(config.lora_r),
            lambda folder: save_extras(folder, task, run),
        )


def save_extras(folder: Path, task: Task, run: Path) -> None:
    """Put beside the weights what eval.py needs: tokenizer, catalogue, prompt."""
    task.tokenizer.save_pretrained(folder)
    shutil.copytree(run / "catalogue", folder / "catalogue")
    write_json(folder / causal_lm.DESCRIPTION_FILE, task.description)
    if task.mixing:
        write_json(folder / "mixing.json", task.mixing.state_dict())


if __name__ == "__main__":
    distributed.run(main)
