"""One optimizer step is the same objective however it is dealt: 1×4, 2×2, 4×1 (ranks × accumulation) against plain torch."""

import json

import numpy as np
import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file

GLOBAL, MICRO, STEPS, RATE = 8, 2, 3, 0.5


def rows_of_step(step: int) -> np.ndarray:
    """Eight rows; the last step's batch has one real row only, so that whole micro-batches are masked."""
    rows = np.arange(GLOBAL) + GLOBAL * step
    return np.where(np.arange(GLOBAL) == 0, rows, -1) if step == STEPS - 1 else rows


def build(world, weighting="igd"):
    from igd_ds import train
    from igd_ds.config import TrainConfig, parse

    extra = {"igd": {"igd_beta": 0.1}, "uniform": {"igd_beta": None}}[weighting]
    config = parse(TrainConfig, world.train_flags(world.folder / f"exact-{weighting}", weighting=weighting, **extra))
    run, inputs = world.folder / f"exact-{weighting}", train.load_inputs(config)
    if not run.exists():
        train.build_catalogue(run / "catalogue", config, inputs)
    torch.manual_seed(0)
    from igd_ds.models import causal_lm

    model = causal_lm.build(config, inputs.model_config, torch.float32, torch.device("cpu"))
    return train.build_task(config, run, inputs), model


def reference(world, out) -> None:
    """Three SGD steps on whole global batches with plain torch: gradients of L = Σ w·NLL / Σ w and the final weights.

    Before them, the gradient of the mean of the micro-batches' own weighted means, as 2 ranks × 2 accumulation steps deal them.
    """
    from igd_ds.data.collate import deal
    from igd_ds.loss import at_labels, token_nll
    from igd_ds.models.causal_lm import label_logits

    task, model = build(world)
    model.train()

    def weighted_mean(rows):
        batch = task.train(rows)
        nll = token_nll(label_logits(model, batch), at_labels(batch.labels, batch.labels))
        weights = at_labels(batch.token_weights, batch.labels)
        return (weights * nll).sum() / weights.sum()

    micro_batches = [rows for rank in range(2) for rows in deal(rows_of_step(0), rank, 2, MICRO)]
    torch.stack([weighted_mean(rows) for rows in micro_batches]).mean().backward()
    save_file({n: p.grad for n, p in model.named_parameters()}, out / "reference-per-batch.safetensors")
    for step in range(STEPS):
        rows = rows_of_step(step)
        model.zero_grad()
        weighted_mean(rows[rows >= 0]).backward()
        save_file({n: p.grad for n, p in model.named_parameters()}, out / f"reference-{step}.safetensors")
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad
    save_file({n: p.detach() for n, p in model.named_parameters()}, out / "reference-end.safetensors")


def dealt(world, stage: int, accumulation: int, normalization: str, out) -> None:
    """The same three steps through train_step and a DeepSpeed engine with SGD; rank 0 saves what `reference` saves."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from igd_ds import distributed, train
    from igd_ds.data.collate import deal

    distributed.init()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    task, model = build(world)
    ds = {"train_micro_batch_size_per_gpu": MICRO, "gradient_accumulation_steps": accumulation, "gradient_clipping": 0.0,
          "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9}  # fmt: skip
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=RATE), config=ds)[0]
    step_of_engine, gradients = engine.step, []

    def step_and_keep_gradients():
        if engine.is_gradient_accumulation_boundary():
            gradients.append({n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters()})
        step_of_engine()

    engine.step = step_and_keep_gradients
    rank, world_size = distributed.rank(), distributed.world_size()
    masked_batches = 0
    for step in range(STEPS):
        window = [task.train(rows) for rows in deal(rows_of_step(step), rank, world_size, MICRO)]
        masked_batches += sum(float(b.token_weights.sum()) == 0 for b in window)
        train.train_step(engine, window, normalization, False, step)
    end = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()} if stage else dict(
        engine.module.named_parameters())  # fmt: skip
    assert distributed.any_rank(masked_batches > 0)
    if rank == 0:
        for step, gradient in enumerate(gradients):
            save_file(gradient, out / f"dealt-{step}.safetensors")
        save_file({n: p.detach().clone() for n, p in end.items()}, out / "dealt-end.safetensors")
    distributed.barrier()


def relative_error(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    squares = sum(((found[n] - expected[n]) ** 2).sum() for n in expected)
    return float((squares / sum((expected[n] ** 2).sum() for n in expected)).sqrt())


@pytest.fixture(scope="module")
def expected(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    ranks.run(1, out / "log", reference, world, out)
    return {name: load_file(out / f"reference-{name}.safetensors") for name in [*range(STEPS), "end", "per-batch"]}


# ranks × accumulation at stage 0, and every other stage on two ranks
@pytest.mark.parametrize(("size", "accumulation", "stage"), [(1, 4, 0), (2, 2, 0), (4, 1, 0), (2, 2, 1), (2, 2, 2), (2, 2, 3)])
def test_gradients_do_not_depend_on_the_deal(world, expected, tmp_path, size, accumulation, stage):
    ranks.run(size, tmp_path / "log", dealt, world, stage, accumulation, "global", tmp_path)
    for name in [*range(STEPS), "end"]:
        found = load_file(tmp_path / f"dealt-{name}.safetensors")
        assert relative_error(found, expected[name]) <= 1e-6, f"step {name}"


def test_per_batch_normalization_is_another_objective(world, expected, tmp_path):
    """The published code's mean of micro-batch means; kept for parity, and far from the exact gradient."""
    ranks.run(2, tmp_path / "log", dealt, world, 0, 2, "per_batch", tmp_path)
    found = load_file(tmp_path / "dealt-0.safetensors")
    assert relative_error(found, expected["per-batch"]) <= 1e-6
    assert relative_error(found, expected[0]) > 0.01


def flat_loss(world, out) -> None:
    """All weights zero: Ω = 0, so no update and a warning; and a NaN loss that ends the run before the update."""
    from types import SimpleNamespace

    from igd_ds import distributed, train

    distributed.init()
    task, model = build(world)
    batch = task.train(np.arange(2))
    batch.token_weights.zero_()
    untouched = SimpleNamespace(backward=None, step=None)
    sums, stopped = train.train_step(untouched, [batch], "global", True, 7)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    updates = []
    model.backward = lambda loss, scale_wrt_gas: loss.backward()
    model.step = lambda: updates.append(1)
    try:
        train.train_step(model, [task.train(np.arange(2))], "global", False, 8)
        message = "no error"
    except FloatingPointError as error:
        message = str(error)
    if distributed.is_main():
        (out / "result.json").write_text(json.dumps([sums.tolist(), stopped, message, updates]))


def test_no_weight_no_update_and_nan_stops_every_rank(world, expected, tmp_path):
    text = ranks.run(2, tmp_path / "log", flat_loss, world, tmp_path)
    sums, stopped, message, updates = json.loads((tmp_path / "result.json").read_text())
    assert not any(sums) and stopped and updates == []
    assert "step 7: all target tokens have weight 0" in text
    assert "step 8: the loss is not finite; no weight was updated" in message
