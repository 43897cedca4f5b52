"""One optimizer step is the same objective however its rows are dealt over ranks × accumulation.

The reference is plain torch on whole batches of padded rows; 1×4, 2×2 and 4×1 must give its
gradients, with row trees and chains as with rows.
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file

GLOBAL, MICRO, STEPS, RATE = 8, 2, 3, 0.5


def rows_of_step(training, step: int) -> np.ndarray:
    """Return eight rows; the last step has one real row, so that whole micro-batches are masked."""
    rows = training.order.epoch(GLOBAL, seed=1, epoch=0)[step]
    return np.where(np.arange(GLOBAL) == 0, rows, -1) if step == STEPS - 1 else rows


MULTI_TARGET = {"frequency_beta": 0.9, "curriculum_cT": 2.0, "lambda_lr": 0.1}
OPTIONS = {
    "igd": {"igd_beta": 0.1},
    "igd-rows": {"igd_beta": 0.1, "packing": "rows", "batching": "rows"},
    "igd-list": {"igd_beta": 0.1, "prompt": "list"},
    "cft": {"position_floor": 0.3, "cft_lambda": 0.5},
    "multi-target": MULTI_TARGET,
    "multi-target-logits": MULTI_TARGET | {"mixing_form": "logits"},
    "msl": {"msl_tau": 4.5, "igd_beta": 0.3},
    "msl-adaptive": {"msl_tau": "adaptive"},
}


def build(world, name="igd", normalization="global"):
    """Return the configuration, the training and the model of an objective with options.

    The random weights are the same for all.
    """
    from igd_ds import training_inputs
    from igd_ds.config.options import parse
    from igd_ds.generative_training import GenerativeTraining
    from igd_ds.objectives import msl
    from igd_ds.train_config import TrainConfig

    # A model that has learned nothing is far below the least τ: without that bound, τ moves.
    msl.TAU_LEAST = -math.inf

    options = OPTIONS[name]
    if name.startswith("multi-target"):
        vectors = world.folder / "vectors.npy"
        np.save(vectors, np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32))
        options = options | {"item_embeddings": vectors}
    objective = (
        name.removesuffix("-logits")
        .removesuffix("-adaptive")
        .removesuffix("-rows")
        .removesuffix("-list")
    )
    flags = {"igd_beta": None, "objective": objective, "normalization": normalization, **options}
    flags["max_length"] = 512  # no prompt is cut, so users have long chains

    run = world.folder / f"exact-{name}"
    config = parse(TrainConfig, world.train_flags(run, **flags))
    inputs = training_inputs.load_inputs(config)
    if not run.exists():
        training_inputs.build_catalogue(run / "catalogue", config, inputs)
    training = GenerativeTraining(config, run, inputs, MICRO)
    torch.manual_seed(0)
    model = inputs.backbone.build(
        config, inputs.model_config, torch.float32, torch.device("cpu"), inputs.added_ids
    )
    return config, training, model


def state_of(training) -> dict[str, torch.Tensor]:
    """Return the objective's state as tensors: s = log λ of multi-target, τ of msl."""
    state = training.objective.state_dict()
    return {name: torch.tensor(state[name]) for name in ("s", "tau") if name in state}


@dataclass
class Reference:
    """The objectives by their definitions, on whole batches; with the state that they learn."""

    config: Any
    training: Any
    model: Any
    s: torch.Tensor = field(default_factory=lambda: torch.zeros(3, requires_grad=True))
    """log λ of multi-target."""
    tau: float = 1.5
    """τ of msl."""

    def __post_init__(self):
        if self.config.msl_tau not in (None, "adaptive"):
            self.tau = float(self.config.msl_tau)
        self.padded = replace(self.training.collator, as_tree=False)

    def loss(self, rows: np.ndarray, step: int = 0) -> torch.Tensor:
        """Return the loss of rows of the training split, with the graph to the model and to s."""
        backbone, batch = self.training.loss.backbone, self.padded(rows)
        logits = backbone.label_logits(self.model, batch)
        name = self.config.objective
        if name == "msl":
            return self.masked(logits, batch)
        if name == "multi-target":
            return self.mixture(logits, batch, step)

        losses = nll(logits, batch.targets)
        if name == "cft":
            null = backbone.label_logits(self.model, batch.null)[batch.null_index]
            losses = losses + self.config.cft_lambda * nll(logits - null, batch.targets)
        return (batch.weights[:, 0] * losses).sum() / batch.weights.sum()

    def mixture(self, logits, batch, step) -> torch.Tensor:
        """Return the loss of multi-target (MTC 4.2)."""
        c = self.config.curriculum_cT / self.training.total_steps
        decay = math.exp(-c * step)
        scaled = torch.exp(self.s) * torch.tensor([decay, 1 - decay, decay])  # fg, fr, or
        alpha, weights = scaled / scaled.sum(), batch.weights
        in_logits = self.config.mixing_form == "logits"
        total = 0.0
        for j in range(3):
            losses = nll(alpha[j] * logits if in_logits else logits, batch.targets)
            mean = (weights[:, j] * losses).sum() / weights[:, j].sum()
            total = total + (mean if in_logits else alpha[j] * mean)
        return total

    def masked(self, logits, batch) -> torch.Tensor:
        """Return the loss of msl over the siblings of each token, and move an adaptive τ."""
        trie = self.training.loss.context.stored.trie
        tau, beta = self.tau, 1.0 if self.config.igd_beta is None else self.config.igd_beta

        total, weight, of_targets, of_legal = 0.0, 0.0, [], []
        for row, node in enumerate(batch.node.tolist()):
            parent = trie.parent[node]
            siblings = np.arange(trie.child_begin[parent], trie.child_begin[parent + 1])
            legal = logits[row, torch.from_numpy(trie.token[siblings].astype(np.int64))]
            target = logits[row, batch.targets[row]]
            if parent == 0:
                of_targets.append(target.item())
                of_legal += legal.tolist()
            if len(siblings) > 1:
                w = beta if trie.train_count[node] == trie.train_count[parent] else 1.0
                total = total + w * tau * ((legal / tau).logsumexp(0) - target / tau)
                weight += w

        if self.config.msl_tau == "adaptive":
            gap, variance = np.mean(of_targets) - np.mean(of_legal), np.var(of_legal)
            c = math.log(0.25 * trie.child_begin[1] - 0.25 * trie.child_begin[0])
            best = (gap + math.sqrt(max(gap**2 - 2 * c * variance, 0.0))) / (2 * c)
            self.tau = 0.95 * self.tau + 0.05 * min(best, 5.0)
        return total / weight

    def state(self) -> dict[str, torch.Tensor]:
        """Return what `state_of` returns."""
        if self.config.objective == "msl":
            return {"tau": torch.tensor(self.tau)}
        return {"s": self.s.detach()} if self.config.objective == "multi-target" else {}


def nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def reference(world, name, out: Path) -> None:
    """Make three SGD steps on whole batches with plain torch; save gradients and final weights.

    Before them, for igd, the gradient of the mean of the micro-batches' own weighted means, as 2
    ranks × 2 accumulation steps deal them.
    """
    config, training, model = build(world, name)
    model.train()
    plain = Reference(config, training, model)
    if name.startswith("igd"):
        batch, deal = rows_of_step(training, 0), training.order.deal
        dealt_rows = [rows for rank in range(2) for rows in deal(batch, rank, 2, MICRO)]
        torch.stack([plain.loss(rows) for rows in dealt_rows]).mean().backward()
        save_file(gradients(model), out / "reference-per-batch.safetensors")

    adam = torch.optim.Adam([plain.s], lr=MULTI_TARGET["lambda_lr"])
    for step in range(STEPS):
        rows = rows_of_step(training, step)
        model.zero_grad()
        adam.zero_grad()
        plain.loss(rows[rows >= 0], step).backward()
        save_file(gradients(model), out / f"reference-{step}.safetensors")
        if plain.s.grad is not None:
            adam.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
    end = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(end | plain.state(), out / "reference-end.safetensors")


def kinds_of(chains, rows: np.ndarray) -> tuple[bool, bool]:
    """Return whether rows of a micro-batch share tokens, and whether a chain was cut before one."""
    real = rows[rows >= 0]
    is_cut = (chains.before[real] >= 0) & ~np.isin(chains.before[real], real)
    return chains.num_nodes(rows) < chains.tokens[real].sum(), is_cut.any()


def dealt(world, name: str, stage: int, accumulation: int, normalization: str, out: Path) -> None:
    """Make the same steps through `optimizer_step` and a DeepSpeed engine with SGD.

    Rank 0 saves what `reference` saves.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from igd_ds import distributed
    from igd_ds.engine.step import optimizer_step

    distributed.init()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config, training, model = build(world, name, normalization)
    ds = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)
    engine = deepspeed.initialize(model=model, optimizer=sgd, config=ds)[0]

    # Keep the gradients that each update uses.
    step_of_engine, kept = engine.step, []

    def step_and_keep_gradients():
        if engine.is_gradient_accumulation_boundary():
            named = engine.module.named_parameters()
            kept.append({name: safe_get_full_grad(p).clone() for name, p in named})
        step_of_engine()

    engine.step = step_and_keep_gradients
    rank, world_size = distributed.rank(), distributed.world_size()
    masked_batches, kinds = 0, np.zeros(2)
    for step in range(STEPS):
        parts = training.order.deal(rows_of_step(training, step), rank, world_size, MICRO)
        window = [training.collator(rows) for rows in parts]
        if training.collator.as_tree:
            kinds += np.sum([kinds_of(training.order, rows) for rows in parts], axis=0)
        masked_batches += sum(float(batch.weights.sum()) == 0 for batch in window)
        sums, stopped = optimizer_step(engine, window, training.loss, step, config.normalization)
        assert sums.steps == 1 and not stopped
    assert distributed.any_rank(masked_batches > 0)
    if training.collator.as_tree:
        assert all(distributed.any_rank(bool(count)) for count in kinds)

    named = dict(engine.module.named_parameters())
    end = {n: safe_get_full_fp32_param(p) for n, p in named.items()} if stage else named
    if rank == 0:
        for step, gradient in enumerate(kept):
            save_file(gradient, out / f"dealt-{step}.safetensors")
        weights = {name: parameter.detach().clone() for name, parameter in end.items()}
        save_file(weights | state_of(training), out / "dealt-end.safetensors")
    distributed.barrier()


def relative_error(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    squares = sum(((found[n] - expected[n]) ** 2).sum() for n in expected)
    return float((squares / sum((expected[n] ** 2).sum() for n in expected)).sqrt())


@pytest.fixture(scope="module")
def expected(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    ranks.run(1, out / "log", reference, world, "igd", out)
    names = [*range(STEPS), "end", "per-batch"]
    return {name: load_file(out / f"reference-{name}.safetensors") for name in names}


# ranks × accumulation at stage 0, and every other stage on two ranks
@pytest.mark.isa
@pytest.mark.parametrize(
    ("size", "accumulation", "stage"),
    [(1, 4, 0), (2, 2, 0), (4, 1, 0), (2, 2, 1), (2, 2, 2), (2, 2, 3)],
)
def test_gradients_do_not_depend_on_the_deal(world, expected, tmp_path, size, accumulation, stage):
    ranks.run(size, tmp_path / "log", dealt, world, "igd", stage, accumulation, "global", tmp_path)
    for name in [*range(STEPS), "end"]:
        found = load_file(tmp_path / f"dealt-{name}.safetensors")
        assert relative_error(found, expected[name]) <= 1e-6, f"step {name}"


@pytest.mark.parametrize(
    ("name", "stage", "size"),
    [
        ("igd-rows", 0, 2),
        ("igd-list", 1, 2),
        ("cft", 0, 2),
        ("cft", 3, 2),
        ("multi-target", 1, 2),
        ("multi-target", 3, 2),
        ("multi-target-logits", 2, 2),
        ("msl", 1, 2),
        ("msl-adaptive", 0, 1),
        ("msl-adaptive", 0, 4),
        ("msl-adaptive", 3, 2),
    ],
)
def test_every_kind_of_loss_and_its_state_are_exact(world, tmp_path, name, stage, size):
    """Against autograd on whole batches.

    Two forward passes (cft), three targets with learned λ, α' on the logits, a softmax over
    siblings (msl) with a τ that all ranks' first tokens move.
    """
    ranks.run(1, tmp_path / "log-reference", reference, world, name, tmp_path)
    accumulation = GLOBAL // (MICRO * size)
    ranks.run(size, tmp_path / "log", dealt, world, name, stage, accumulation, "global", tmp_path)
    for step in [*range(STEPS), "end"]:
        found = load_file(tmp_path / f"dealt-{step}.safetensors")
        expected = load_file(tmp_path / f"reference-{step}.safetensors")
        if step == "end" and name.startswith("multi-target"):
            # Adam divides differences of losses by their size, which magnifies fp32 rounding of
            # the losses.
            s = expected.pop("s")
            assert (found.pop("s") - s).abs().max() <= 2e-6 and s.abs().max() > 0.05
        if step == "end" and name.startswith("msl"):
            tau = expected.pop("tau").item()
            assert found.pop("tau").item() == pytest.approx(tau, rel=1e-6)
            assert (tau == 4.5) == (name == "msl")
            assert abs(tau - 1.5 * 0.95**STEPS) > 1e-4, "τ* is not 0"
        assert relative_error(found, expected) <= 2e-6, f"step {step}"


def test_per_batch_normalization_is_another_objective(world, expected, tmp_path):
    """The published code's mean of micro-batch means is far from the exact gradient."""
    ranks.run(2, tmp_path / "log", dealt, world, "igd", 0, 2, "per_batch", tmp_path)
    found = load_file(tmp_path / "dealt-0.safetensors")
    assert relative_error(found, expected["per-batch"]) <= 1e-6
    assert relative_error(found, expected[0]) > 0.01


def flat_loss(world, out: Path) -> None:
    """Make a step whose weights are all 0, and one whose loss is NaN."""
    from igd_ds import distributed
    from igd_ds.engine.step import optimizer_step

    distributed.init()
    _, training, model = build(world)
    batch = training.collator(np.arange(2))

    # Without weight there is no forward pass, no backward pass and no update: no engine is needed.
    weightless = replace(batch, weights=torch.zeros_like(batch.weights))
    sums, stopped = optimizer_step(None, [weightless], training.loss, 6, stop=True)

    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    updates = []
    model.backward = lambda loss, scale_wrt_gas: loss.backward()
    model.step = lambda: updates.append(1)
    try:
        optimizer_step(model, [batch], training.loss, 7)
        message = "no error"
    except FloatingPointError as error:
        message = str(error)
    if distributed.is_main():
        result = {
            "steps": sums.steps,
            "sums": [sums.objective, *sums.numerators, *sums.normalisers],
            "named": [dict(sums.statistics), dict(sums.scalars)],
            "stopped": stopped,
            "message": message,
            "updates": updates,
        }
        (out / "result.json").write_text(json.dumps(result))


def test_no_weight_no_update_and_nan_stops_every_rank(world, expected, tmp_path):
    text = ranks.run(2, tmp_path / "log", flat_loss, world, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 0 and not any(result["sums"]) and result["named"] == [{}, {}]
    assert result["stopped"] and result["updates"] == []
    assert "step 7: all target tokens have weight 0" in text
    assert "step 8: the loss is not finite; no weight was updated" in result["message"]
