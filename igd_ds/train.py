"""Train a recommender whose loss weighs each item token by how decisive it is. Entry point.

    deepspeed igd_ds/train.py --ds_config ds_configs/zero2.json --dataset DATASET --model_name_or_path Qwen/Qwen2.5-1.5B \
        --weighting igd --igd_beta 0.1 --output_dir RUN

Parse → dataset → catalogue → weights → model → engine → the loop in `fit` → RUN/model.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from tqdm import tqdm

import igd_ds
from igd_ds import config as configuration
from igd_ds import distributed, metrics
from igd_ds import engine as engines
from igd_ds.data.collate import MASKED_ROW, Batch, Collator, deal, epoch_batches, left_padded
from igd_ds.data.dataset import InteractionDataset
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.decoding import beam
from igd_ds.decoding.cache import PromptTree
from igd_ds.items import decisiveness, store
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.loss import at_labels, token_nll, weighted_sums
from igd_ds.models import causal_lm
from igd_ds.runlog import RunLog, write_json, write_text
from igd_ds.weighting import WEIGHTINGS, check_flags

FREE_ON_RESUME = {"resume", "log_every", "keep_checkpoints", "save_every"}  # settings that do not change what a run computes
SUMS = ("weighted", "weight", "nll", "tokens", "nll_zero", "tokens_zero", "weight_zero", "rows", "all_tokens")


@dataclass(frozen=True)
class Task:
    """What a run trains on, built once: datasets as collators, catalogue, tokenizer, and the text of the prompt."""

    train: Collator
    valid: Collator
    lengths: np.ndarray  # (R,) int64, tokens of each training row, for grouping
    stored: store.StoredCatalogue
    tokenizer: object
    description: dict


def main() -> int:
    """Run a training from the command line; returns the exit code."""
    config = configuration.parse(configuration.TrainConfig, description=__doc__)
    check_flags(config)
    transformers.utils.logging.disable_progress_bar()
    distributed.init()
    ds = engines.resolve_ds_config(config, distributed.world_size())
    run = Path(config.output_dir)
    distributed.on_main(lambda: claim_run_folder(run, config, ds))
    if (run / "summary.json").is_file():
        say(f"{run} is finished: {(run / 'summary.json').read_text().strip()}")
        return 0
    tag, torn = engines.newest_checkpoint(run / "checkpoints")
    for name in torn:
        say(f"warning: checkpoint {name} is not whole (cut off while it was written?); passing it over")
    task, model_config = build_task(config, run)
    with engines.loading_context(ds, config.load_in_4bit):
        torch.manual_seed(config.seed)  # the same random weights and LoRA matrices on every rank
        model = causal_lm.build(config, model_config, engines.dtype_of(ds), distributed.device())
    distributed.on_main(lambda: engines.check_disk_space(run, model, config))
    engine = engines.initialize(model, config, ds, num_steps(config, task))
    state = {"step": 0, "best": None, "best_step": None, "stale": 0}
    if tag:
        state = engines.load_checkpoint(engine, run / "checkpoints", tag, config)["run"]
        say(f"resumed {run} from {tag}")
    return fit(engine, task, config, run, state)


def say(message: str) -> None:
    """Print on rank 0."""
    if distributed.is_main():
        print(message, flush=True)


def claim_run_folder(run: Path, config, ds: dict) -> None:
    """Create the run folder, or check that it is this very run being resumed; ValueError otherwise. Rank 0 only."""
    resolved = dataclasses.asdict(config)
    saved = run / "config.yaml"
    if saved.is_file():
        if config.resume != "auto":
            raise ValueError(f"--output_dir {run} holds a run already; give another folder, or --resume auto to go on with it")
        old = yaml.safe_load(saved.read_text()) | {"ds_config (its content)": json.loads((run / "ds_config.json").read_text())}
        new = resolved | {"ds_config (its content)": ds}
        changed = [key for key in new if key not in FREE_ON_RESUME | {"ds_config"} and old.get(key) != new[key]]
        if changed:
            raise ValueError(f"--output_dir {run} belongs to another run; these settings differ: {', '.join(changed)}")
        return
    if run.exists() and any(run.iterdir()):
        raise ValueError(f"--output_dir {run} is not empty and not a run folder; give a new folder")
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_json(run / "ds_config.json", ds)
    write_json(run / "env.json", environment())
    write_text(saved, configuration.dump(config))  # last: a folder with it is a whole claim


def environment() -> dict:
    """Describe where the run happens: versions, git commit, processes, hardware."""
    packages = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "numpy")
    git = subprocess.run(
        ["git", "-C", str(Path(igd_ds.__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    cuda = torch.cuda.is_available()
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()},
        "igd_ds": {"version": igd_ds.__version__, "commit": git.stdout.strip()},
        "world_size": distributed.world_size(),
        "hardware": {
            "cpus": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "machine": platform.machine(),
        },
        "command": sys.argv,
    }


def build_task(config, run: Path) -> tuple[Task, object]:
    """Load and check everything but the weights: dataset, tokenizer, catalogue, prompts, token weights."""
    template = Template.load(config.prompt)
    dataset = InteractionDataset.load(config.dataset)
    tokenizer = causal_lm.load_tokenizer(config.tokenizer or config.model_name_or_path, config.trust_remote_code)
    model_config = causal_lm.load_model_config(
        config.model_config or config.model_name_or_path, tokenizer, config.max_length, config.trust_remote_code
    )
    kind = None if config.item_kind == "auto" else config.item_kind
    distributed.on_main(lambda: build_catalogue(run / "catalogue", dataset, tokenizer, kind, config.entropy))
    stored = store.load_catalogue(run / "catalogue", tokenizer=tokenizer, dataset=dataset)
    catalogue = stored.catalogue
    prompts = PromptBuilder.build(template, tokenizer, dataset, catalogue.kind, config.max_length - catalogue.max_length)
    zero_gain = decisiveness.zero_gain(stored.trie)[stored.trie.path_nodes(catalogue.offsets)]
    weights = WEIGHTINGS[config.weighting].token_weights(stored, config)
    train, valid = (
        Collator(
            dataset.splits[name], prompts, catalogue.token_ids, catalogue.offsets, weights, zero_gain, tokenizer.pad_token_id
        )
        for name in ("train", "valid")
    )
    lengths = prompts.lengths(train.split) + np.diff(catalogue.offsets)[train.split.targets]
    description = {
        "prompt": template.as_dict(),
        "max_length": config.max_length,
        "item_kind": catalogue.kind,
        "entropy": config.entropy,
        "version": igd_ds.__version__,
    }
    return Task(train, valid, lengths, stored, tokenizer, description), model_config


def build_catalogue(folder: Path, dataset, tokenizer, kind: str | None, entropy: str) -> None:
    """Tokenize the items, build the trie and its gain, and store them for all ranks to map. A resumed run has them already."""
    if folder.is_dir():
        return
    catalogue = Catalogue.build(dataset, tokenizer, kind)
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    gain = decisiveness.information_gain(trie, entropy)
    store.save_catalogue(folder, catalogue, trie, gain, entropy)
    zero = decisiveness.zero_gain(trie)[trie.path_nodes(catalogue.offsets)].mean()
    print(
        f"catalogue: {catalogue.num_items} items, {trie.num_nodes} trie nodes, {zero:.1%} of item tokens have zero gain",
        flush=True,
    )


def steps_per_epoch(config, task: Task) -> int:
    """Return the optimizer steps of one pass over the training rows; the last one may be partly masked."""
    return -(-len(task.train.split) // config.global_batch_size)


def num_steps(config, task: Task) -> int:
    """Return the optimizer steps the run has at most."""
    steps = config.epochs * steps_per_epoch(config, task)
    return min(steps, config.max_steps) if config.max_steps else steps


def windows(config, task: Task, first: int, accumulation: int) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of optimizer steps `first`, `first` + 1, …; the next step's are collated meanwhile.

    The rows of a step follow from the step's number alone: that is all a resumed run needs to know of the sampler.
    """
    per_epoch = steps_per_epoch(config, task)
    micro = config.global_batch_size // (accumulation * distributed.world_size())

    def collate(rows: np.ndarray) -> list[Batch]:
        return [task.train(r) for r in deal(rows, distributed.rank(), distributed.world_size(), micro)]

    with ThreadPoolExecutor(1) as pool:
        pending = None
        for step in range(first, num_steps(config, task)):
            if pending is None or step % per_epoch == 0:
                order = epoch_batches(
                    task.lengths, config.global_batch_size, config.seed, step // per_epoch, config.length_grouping
                )
            following = pool.submit(collate, order[step % per_epoch])
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def fit(engine, task: Task, config, run: Path, state: dict) -> int:
    """Train until the last step, early stopping or a signal; leaves the best model in RUN/model. Returns the exit code."""
    stop = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda received, _: stop.append(received))
    log = RunLog(run, distributed.is_main(), resume_step=state["step"])
    total, per_epoch = num_steps(config, task), steps_per_epoch(config, task)
    every = config.validate_every or per_epoch
    stale = config.patience and state["stale"] >= config.patience
    bar = tqdm(total=total, initial=state["step"], disable=not distributed.is_main(), unit="step", mininterval=1.0)
    began, window_sums = time.perf_counter(), np.zeros(len(SUMS))
    for window in windows(config, task, state["step"], engine.gradient_accumulation_steps()) if not stale else ():
        # Dropout follows from the step and the rank, so that a resumed run needs no saved RNG state.
        torch.manual_seed(config.seed + 1_000_003 * state["step"] + 7_919 * distributed.rank())
        learning_rate = engine.get_lr()[0]
        sums, stopped = train_step(engine, window, config.normalization, bool(stop), state["step"] + 1)
        state["step"] += 1
        window_sums += sums
        bar.update()
        if state["step"] % config.log_every == 0 or state["step"] == total:
            seconds = time.perf_counter() - began
            values = step_values(window_sums, seconds) | {
                "train/learning_rate": learning_rate,
                "train/epoch": state["step"] / per_epoch,
                "train/grad_norm": float(engine.get_global_grad_norm() or 0.0),
            }
            log.log(state["step"], values)
            bar.set_postfix(loss=f"{values['train/loss']:.4f}", refresh=False)
            began, window_sums = time.perf_counter(), np.zeros(len(SUMS))
        if state["step"] % every == 0 or state["step"] == total:
            validate(engine, task, config, run, state, log)
            began = time.perf_counter()
            stale = config.patience and state["stale"] >= config.patience
        elif not (stopped or (config.save_every and state["step"] % config.save_every == 0)):
            continue
        engines.save_checkpoint(engine, run / "checkpoints", state["step"], {"run": state}, config)
        if stopped and not stale and state["step"] < total:
            log.close()
            say(f"stopped by a signal after step {state['step']}; saved. Go on with --resume auto")
            return distributed.EXIT_REQUEUE
        if stale:
            say(f"validation has not improved {config.patience} time(s): stopping early at step {state['step']}")
            break
    bar.close()
    log.hparams(dataclasses.asdict(config), {"best_validation": state["best"]})
    log.close()
    summary = {key: state[key] for key in ("step", "best", "best_step")} | {"validation_metric": config.validation_metric}
    distributed.on_main(lambda: write_json(run / "summary.json", summary))
    say(f"done: best {config.validation_metric} {state['best']:.4f} at step {state['best_step']}; model in {run / 'model'}")
    say(f"watch it: tensorboard --logdir {run}")
    return 0


def train_step(engine, window: list[Batch], normalization: str, stop: bool, step: int) -> tuple[np.ndarray, bool]:
    """Make one optimizer step of L = (1/Ω) Σ w·NLL (IGD Eq. 6), Ω over all ranks and micro-batches of the step.

    Returns the step's sums over all ranks (float64, named by SUMS) and whether any rank was asked to stop. Raises
    FloatingPointError on every rank, before the update, if the loss is not finite anywhere.
    """
    device, world = distributed.device(), distributed.world_size()
    local = torch.tensor([sum(float(b.token_weights.sum()) for b in window), float(stop)], dtype=torch.float64)
    omega, stopped = distributed.all_reduce_sum(local.to(device)).tolist()
    if omega == 0:
        say(f"warning: step {step}: all target tokens have weight 0 (Ω = 0); no update")
        return np.zeros(len(SUMS)), stopped > 0
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    for index, batch in enumerate(window):
        batch = batch.to(device)
        nll = token_nll(causal_lm.label_logits(engine, batch), at_labels(batch.labels, batch.labels))
        weights, zero = at_labels(batch.token_weights, batch.labels), at_labels(batch.zero_gain, batch.labels)
        weighted, weight = weighted_sums(nll, weights)
        if normalization == "global":
            loss = weighted * (world / omega)  # the engine averages over ranks
        else:
            loss = weighted / (weight.clamp_min(torch.finfo(weight.dtype).tiny) * len(window))
        engine.backward(loss, scale_wrt_gas=False)
        nll = nll.detach()
        sums += torch.stack(
            [
                weighted.detach(),
                weight,
                nll.sum(),
                nll.new_tensor(len(nll)),
                (nll * zero).sum(),
                zero.sum(),
                (weights * zero).sum(),
                (batch.row_ids != MASKED_ROW).sum(),
                batch.attention_mask.sum(),
            ]
        ).double()
        if index == len(window) - 1:
            distributed.all_reduce_sum(sums)
            if not torch.isfinite(sums).all():
                raise FloatingPointError(
                    f"step {step}: the loss is not finite; no weight was updated. Lower --learning_rate, or "
                    "look at the data of this step"
                )
        engine.step()
    return sums.cpu().numpy(), stopped > 0


def step_values(sums: np.ndarray, seconds: float) -> dict[str, float]:
    """Turn sums over some steps into the scalars of the run log: numerators and denominators first, one division last."""
    s = dict(zip(SUMS, sums.tolist(), strict=True))

    def ratio(numerator: float, denominator: float) -> float:
        return numerator / denominator if denominator else 0.0

    cuda = torch.cuda.is_available()
    memory = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "train/loss": ratio(s["weighted"], s["weight"]),
        "train/nll": ratio(s["nll"], s["tokens"]),
        "train/nll_zero_gain": ratio(s["nll_zero"], s["tokens_zero"]),
        "train/nll_nonzero_gain": ratio(s["nll"] - s["nll_zero"], s["tokens"] - s["tokens_zero"]),
        "train/zero_gain_weight_share": ratio(s["weight_zero"], s["weight"]),
        "speed/target_tokens_per_second": s["tokens"] / seconds,
        "speed/tokens_per_second": s["all_tokens"] / seconds,
        "speed/rows_per_second": s["rows"] / seconds,
        "speed/memory_gib": memory / 2**30,
    }


def validate(engine, task: Task, config, run: Path, state: dict, log: RunLog) -> None:
    """Measure the validation metric, keep the model if it is the best so far, and count towards early stopping."""
    rows = np.arange(len(task.valid.split))
    if config.validation_rows and config.validation_rows < len(rows):
        rows = np.sort(np.random.default_rng(config.seed).choice(rows, config.validation_rows, replace=False))
    step = engine.train_micro_batch_size_per_gpu() * distributed.world_size()
    rows = np.concatenate([rows, np.full(-len(rows) % step, MASKED_ROW)])
    engine.eval()
    with torch.no_grad():
        measure = {"nll": validation_nll, "ndcg@10": validation_ndcg}[config.validation_metric]
        values = measure(engine, task, deal(rows, distributed.rank(), distributed.world_size(), step // distributed.world_size()))
    engine.train()
    log.log(state["step"], values)
    value = values[f"valid/{config.validation_metric}"]
    lower_is_better = config.validation_metric == "nll"
    improved = state["best"] is None or (value < state["best"] if lower_is_better else value > state["best"])
    state["stale"] = 0 if improved else state["stale"] + 1
    say(f"step {state['step']}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()) + (" (best so far)" if improved else ""))
    if improved:
        state["best"], state["best_step"] = value, state["step"]
        engines.save_model(engine, run / "model", bool(config.lora_r), lambda folder: save_extras(folder, task, run))


def save_extras(folder: Path, task: Task, run: Path) -> None:
    """Put beside the weights what eval.py needs: tokenizer, catalogue, prompt."""
    task.tokenizer.save_pretrained(folder)
    shutil.copytree(run / "catalogue", folder / "catalogue")
    write_json(folder / causal_lm.DESCRIPTION_FILE, task.description)


def validation_nll(engine, task: Task, batches: list[np.ndarray]) -> dict[str, float]:
    """Return the unweighted NLL per item and per token over all ranks' batches, in nats."""
    sums = torch.zeros(3, dtype=torch.float64, device=distributed.device())
    for rows in batches:
        batch = task.valid(rows).to(distributed.device())
        nll = token_nll(causal_lm.label_logits(engine, batch), at_labels(batch.labels, batch.labels))
        sums += torch.stack([nll.double().sum(), (batch.row_ids != MASKED_ROW).sum().double(), sums.new_tensor(len(nll))])
    nll, items, tokens = distributed.all_reduce_sum(sums).tolist()
    return {"valid/nll": nll / items, "valid/nll_per_token": nll / tokens}


def validation_ndcg(engine, task: Task, batches: list[np.ndarray]) -> dict[str, float]:
    """Return NDCG@10 (token match) of a beam search with 10 beams, α = 0, over all ranks' batches."""
    device, trie = distributed.device(), task.stored.trie
    search_trie = beam.SearchTrie.build(trie, device)
    weights = torch.ones(trie.num_nodes, device=device)
    # Under ZeRO-3 every forward pass is a collective: ranks go on together until the last one's search ends.
    any_rank = distributed.any_rank if engine.zero_optimization_stage() == 3 else bool
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for rows in batches:
        prompts = [task.valid.prompts.encode(task.valid.split.history(max(row, 0))) for row in rows]
        tree = PromptTree(engine.module)
        tree.prefill(*(t.to(device) for t in left_padded(prompts, task.tokenizer.pad_token_id)))
        leaves = beam.beam_search(tree, search_trie, weights, num_beams=10, any_rank=any_rank).leaves.cpu().numpy()
        real = rows != MASKED_ROW
        targets = trie.leaf_of_item[task.valid.split.targets[rows[real]]]
        ndcg = metrics.ranking_sums(metrics.items_ahead(leaves[real], targets), [10])["ndcg@10"]
        sums += torch.tensor([ndcg, real.sum()], dtype=torch.float64, device=device)
    total, count = distributed.all_reduce_sum(sums).tolist()
    return {"valid/ndcg@10": total / count}


if __name__ == "__main__":
    distributed.run(main)
