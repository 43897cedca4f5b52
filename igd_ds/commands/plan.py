"""Say whether a training fits on its GPUs, how long it takes, and what would make it fit.

    igd plan --gpu H100 --num_gpus 8 --ds_config zero2 --dataset DATASET \\
        --model_name_or_path Qwen/Qwen2.5-1.5B

It takes the flags of `igd train`, and --gpu, --num_gpus, --utilisation, --num_beams, --json. No
weight is loaded, so `--model_config FILE --tokenizer PATH` plans for pretrained weights too, with
LoRA and in 4 bits. Tokens are counted on a sample of the training batches. The memory is an
estimate: within 15 % of what was measured for small models on a CPU.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from igd_ds import distributed
from igd_ds.config.options import option, parse, require, with_default
from igd_ds.console import duration, header
from igd_ds.data.row_statistics import row_statistics
from igd_ds.engine.ds_config import DsConfig, dtype_of, resolve_ds_config, zero_stage
from igd_ds.errors import UsageError
from igd_ds.folders import read_json_object
from igd_ds.items.catalogue import Catalogue
from igd_ds.planning import (
    GIB,
    GPUS,
    RESERVED,
    Memory,
    MicroBatch,
    Trace,
    cache_bytes_per_token,
    find_gpu,
    flops_per_token,
    memory,
    trace,
)
from igd_ds.train_config import TrainConfig
from igd_ds.training_inputs import Inputs, load_inputs

LORA_RANK = 32
"""Rank of the adapters that are proposed."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """A training, and the GPUs that it is planned for."""

    output_dir: str = with_default(TrainConfig, "output_dir", "")

    gpu: str = option(f"kind of GPU: {', '.join(GPUS)}")
    num_gpus: int = option("GPUs, all nodes together; one rank each", 1)
    utilisation: float = option(
        "share of the GPUs' peak that training reaches; an assumption, measure it on a short run",
        0.35,
    )
    num_beams: int = option("beams of the search, for its cache", 10)
    json: bool = option("print one JSON object instead of the tables", False)

    def check(self) -> None:
        """Raise UsageError for values that no plan can be made of."""
        # A plan loads no weights, so a configuration stands for pretrained ones as well.
        name = self.model_config or self.model_name_or_path
        settings: dict[str, Any] = {"model_name_or_path": name, "model_config": ""}
        if self.objective == TrainConfig.objective and vars(self)["igd_beta"] is None:
            settings["igd_beta"] = 1.0  # it has no effect on a plan
        TrainConfig.check(dataclasses.replace(self, **settings))
        if self.model_config and self.model_name_or_path:
            raise UsageError("give --model_config or --model_name_or_path, not both")
        if self.model_config and not self.tokenizer:
            raise UsageError("--model_config has no tokenizer of its own: give --tokenizer")
        require(self, "num_gpus num_beams", lambda value: value >= 1, "must be at least 1")
        require(self, "utilisation", lambda value: 0 < value <= 1, "must lie in (0, 1]")
        find_gpu(self.gpu)


@dataclass(frozen=True)
class Case:
    """A training with its micro-batch: what is planned, or a variant of it."""

    config: TrainConfig
    ds: DsConfig
    rows: int
    """Rows of a micro-batch."""


def refuse_without_sizes(config: TrainConfig) -> None:
    """Raise UsageError for a configuration file that leaves out width or depth.

    transformers would silently take those of the first model of this type.
    """
    path = Path(config.model_config or config.model_name_or_path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        return
    found = read_json_object(path, "give a model's configuration as transformers writes it")
    text = found.get("text_config", found)
    names = {
        "width": ("hidden_size", "d_model", "n_embd", "dim"),
        "number of layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    }
    for what, keys in names.items():
        if not any(key in text for key in keys):
            raise UsageError(
                f"{path}: the model's {what} is missing ({', '.join(keys)}): add it, or nobody can "
                "say how large the model is"
            )


def micro_batch_of(case: Case, tokens: Mapping[str, Any], is_tree: bool) -> MicroBatch:
    """Return the largest micro-batch, scaled from the one that was counted."""
    most = tokens["most_tree_tokens" if is_tree else "most_padded_tokens"]
    share = case.rows / tokens["micro_batch"]
    return MicroBatch(
        case.rows, round(most * share), max(1, round(tokens["most_label_tokens"] * share))
    )


def variants(case: Case, can_adapt: bool) -> Iterator[tuple[str, Case]]:
    """Yield changes that make a training smaller: single ones, the cheapest first, then several."""
    stage, on_cpu = max(1, zero_stage(case.ds)), ("optimizer", "param")
    least = with_settings(with_rows(case, 1), gradient_checkpointing=True)
    smaller = {
        "micro-batch of half the rows": with_rows(case, max(1, case.rows // 2)),
        "micro-batch of 1 row": with_rows(case, 1),
        "--gradient_checkpointing": with_settings(case, gradient_checkpointing=True),
        "ZeRO stage 2": with_zero(case, 2),
        "ZeRO stage 3": with_zero(case, 3),
        "optimizer in CPU memory": with_zero(case, stage, "optimizer"),
        "ZeRO stage 3, optimizer and weights in CPU memory": with_zero(case, 3, *on_cpu),
    }
    if can_adapt:
        rank = case.config.lora_r or LORA_RANK
        adapted, quantised = {"lora_r": rank}, {"lora_r": rank, "load_in_4bit": True}
        qlora = f"--lora_r {rank} --load_in_4bit"
        smaller |= {
            f"--lora_r {rank}": with_settings(case, **adapted),
            qlora: with_settings(case, **quantised),
            f"{qlora} --gradient_checkpointing, micro-batch of 1 row": with_settings(
                least, **quantised
            ),
        }
    least_3 = "ZeRO stage 3, --gradient_checkpointing, micro-batch of 1 row"
    smaller |= {
        least_3: with_zero(least, 3),
        f"{least_3}, optimizer and weights in CPU memory": with_zero(least, 3, *on_cpu),
    }

    known = [case]
    for name, variant in smaller.items():
        is_higher = zero_stage(variant.ds) >= zero_stage(case.ds)
        cannot = variant.config.load_in_4bit and "offload_param" in variant.ds["zero_optimization"]
        if variant not in known and is_higher and not cannot:
            known.append(variant)
            yield name, variant


def with_rows(case: Case, rows: int) -> Case:
    """Return the case with another micro-batch."""
    return dataclasses.replace(case, rows=rows)


def with_settings(case: Case, **settings: Any) -> Case:
    """Return the case with other settings of the run."""
    return dataclasses.replace(case, config=dataclasses.replace(case.config, **settings))


def with_zero(case: Case, stage: int, *offloaded: str) -> Case:
    """Return the case at another ZeRO stage, with "optimizer" or "param" in CPU memory."""
    ds = copy.deepcopy(case.ds)
    ds["zero_optimization"]["stage"] = stage
    for what in offloaded:
        ds["zero_optimization"][f"offload_{what}"] = {"device": "cpu"}
    return dataclasses.replace(case, ds=ds)


@dataclass(frozen=True)
class Plan:
    """What is found out about a training."""

    config: PlanConfig
    inputs: Inputs
    ds: DsConfig
    tokens: Mapping[str, Any]
    """`row_statistics` of the dataset."""
    traces: dict[tuple[int, bool, int], Trace] = field(default_factory=dict)
    """What is known already, by LoRA rank, quantisation and rows."""

    @classmethod
    def build(cls, config: PlanConfig) -> "Plan":
        """Read dataset, tokenizer and configuration, and count tokens.

        Raises:
            UsageError: what a training would refuse too, or a configuration without sizes.
        """
        refuse_without_sizes(config)
        ds = resolve_ds_config(config, config.num_gpus, config.load_in_4bit, has_gpu=True)
        inputs = load_inputs(config)
        kind = None if config.item_kind == "auto" else config.item_kind
        catalogue = Catalogue.build(inputs.dataset, inputs.tokenizer, kind)
        rows = ds["train_micro_batch_size_per_gpu"]
        tokens = row_statistics(
            inputs.dataset,
            inputs.tokenizer,
            catalogue,
            config.prompt,
            config.max_length,
            rows,
            inputs.batching,
            config.length_grouping,
        )
        return cls(config, inputs, ds, tokens)

    @property
    def case(self) -> Case:
        """The training as it is asked for."""
        return Case(self.config, self.ds, self.ds["train_micro_batch_size_per_gpu"])

    @property
    def available(self) -> float:
        """Bytes of a GPU that a training may use."""
        return find_gpu(self.config.gpu).memory * GIB - RESERVED

    def largest(self, case: Case) -> MicroBatch:
        """Return the largest micro-batch of a case."""
        return micro_batch_of(case, self.tokens, self.inputs.packing == "tree")

    def trace(self, case: Case) -> Trace:
        """Return the trace of the largest micro-batch of a case."""
        config = case.config
        key = (config.lora_r, config.load_in_4bit, case.rows)
        if key not in self.traces:
            batch = self.largest(case)
            self.traces[key] = trace(config, self.inputs, dtype_of(case.ds), batch)
        return self.traces[key]

    def estimate(self, case: Case) -> Memory:
        """Return the memory of a case."""
        return memory(case.config, case.ds, self.config.num_gpus, self.trace(case))

    def epoch_tokens(self) -> dict[str, float]:
        """Return the tokens that the model reads in an epoch, by packing."""
        rows = len(self.inputs.dataset.splits["train"])
        keys = {"rows": "padded_tokens", "tree": "tree_tokens"}
        return {packing: rows * self.tokens[key] for packing, key in keys.items()}

    def epoch_seconds(self) -> float:
        """Return how long an epoch takes at the assumed utilisation."""
        found, batch = self.trace(self.case), self.largest(self.case)
        context = self.tokens["row_tokens"] / 2
        flops = flops_per_token(found, self.config, batch, context)
        speed = find_gpu(self.config.gpu).tflops * 1e12 * self.config.utilisation
        return self.epoch_tokens()[self.inputs.packing] * flops / (speed * self.config.num_gpus)

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values: bytes of one GPU, seconds, tokens."""
        config, case = self.config, self.case
        needed, found, limit = self.estimate(case), self.trace(case), self.available
        plain, checkpointed = (
            self.estimate(with_settings(case, gradient_checkpointing=switch))
            for switch in (False, True)
        )
        per_token = cache_bytes_per_token(self.inputs, dtype_of(self.ds))
        searched = config.max_length + config.num_beams * self.tokens["label_tokens"]
        seconds = self.epoch_seconds()
        can_adapt = not self.inputs.model_config.is_encoder_decoder
        smaller = {}
        if needed.peak > limit:
            smaller = {name: self.estimate(v).peak for name, v in variants(case, can_adapt)}
        return {
            "gpu": config.gpu,
            "num_gpus": config.num_gpus,
            "parameters": found.parameters,
            "trained": found.trained,
            "micro_batch": dataclasses.asdict(self.largest(case)),
            "memory": dataclasses.asdict(needed) | {"peak": needed.peak, "available": limit},
            "activations": {
                "plain": plain.activations + plain.backward,
                "checkpointed": checkpointed.activations + checkpointed.backward,
            },
            "search_cache_per_user": per_token * searched,
            "epoch_tokens": self.epoch_tokens(),
            "packing": self.inputs.packing,
            "epoch_seconds": seconds,
            "seconds": seconds * config.epochs,
            "fits": needed.peak <= limit,
            "smaller": smaller,
        }


def print_plan(plan: Plan, found: Mapping[str, Any]) -> None:
    """Print what `as_json` returned, for people."""
    config, ds, gpu = plan.config, plan.ds, find_gpu(plan.config.gpu)
    batch, needed = found["micro_batch"], found["memory"]
    precision = str(dtype_of(ds)).removeprefix("torch.")
    tokens = ", ".join(f"{count:,.0f} as {kind}" for kind, count in found["epoch_tokens"].items())
    facts = {
        "model": f"{found['parameters']:,} parameters, of which {found['trained']:,} are trained",
        "GPUs": f"{config.num_gpus} × {config.gpu}: {gpu.memory} GiB, {gpu.tflops} TFLOP/s each",
        "training": f"ZeRO stage {zero_stage(ds)}, {precision}, micro-batch {batch['rows']} × "
        f"{ds['gradient_accumulation_steps']} accumulation steps × {config.num_gpus} ranks",
        "micro-batch": f"at most {batch['tokens']:,} tokens, {batch['labels']:,} of them labelled",
        "tokens": f"{tokens}, an epoch (packing: {found['packing']})",
    }
    print(header(facts))

    names = [part.name for part in dataclasses.fields(Memory) if part.name != "host"]
    table = {f"  {name}": gib(needed[name]) for name in names if needed[name]}
    limit = f"{gib(needed['available'])}, {gib(RESERVED)} kept free"
    table["  peak"] = f"{gib(needed['peak'])} of {limit}"
    print(f"\nGiB of one GPU\n{header(table)}")
    print(
        "  peak = weights + gradients + optimizer + buffers + the larger of update and\n"
        "         activations + the larger of logits and backward\n"
    )

    kinds, seconds = found["activations"], found["epoch_seconds"]
    more = {
        "activations": f"{gib(kinds['plain'])} GiB, {gib(kinds['checkpointed'])} with "
        "--gradient_checkpointing",
        "search": f"{gib(found['search_cache_per_user'])} GiB of cache per user, "
        f"{config.num_beams} beams",
        "CPU memory": f"{gib(needed['host'])} GiB per rank",
        "time": f"{duration(seconds)} an epoch, {duration(found['seconds'])} for {config.epochs} "
        f"epochs at {config.utilisation:.0%} of the peak; validation is not counted",
    }
    if not needed["host"]:
        del more["CPU memory"]
    print(header(more))

    if found["fits"]:
        print("\nIt fits.")
        return
    missing = gib(needed["peak"] - needed["available"])
    print(f"\nIt does not fit: {missing} GiB are missing. What each change would need:")
    for name, peak in found["smaller"].items():
        verdict = "fits" if peak <= needed["available"] else "does not fit"
        print(f"  {gib(peak):>9} GiB  {verdict:<12}  {name}")


def gib(size: float) -> str:
    """Return bytes in GiB with three significant digits."""
    return f"{size / GIB:,.3g}" if size < 1000 * GIB else f"{size / GIB:,.0f}"


def main() -> int:
    """Run the command and return the exit code.

    Raises:
        UsageError: bad flags, files that do not fit each other, a batch that does not divide.
    """
    config = parse(PlanConfig, description=__doc__)
    plan = Plan.build(config)
    found = plan.as_json()
    if config.json:
        print(json.dumps(found))
    else:
        print_plan(plan, found)
    return 0


if __name__ == "__main__":
    distributed.run(main)
