"""The loop, its state and its sums, with a small model that needs no DeepSpeed."""

import dataclasses
import json
import math
import signal
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from igd_ds import distributed, loop
from igd_ds.config.training import LoopOptions
from igd_ds.contracts import LossTerms, StepTotals
from igd_ds.engine.step import StepSums, optimizer_step
from igd_ds.errors import EXIT_REQUEUE, UsageError
from igd_ds.loop import SEED_OF_RANK, SEED_OF_STEP, LoopState, StopRequest, Stopwatch, step_seed

# ---- the parts ----


def test_a_state_is_the_same_after_a_trip_through_json():
    state = LoopState(7, 6, 1.5, 3, 1, 12.25, "abc", {"tau": 0.1 + 0.2, "s": [1e-17]})
    assert LoopState(**json.loads(json.dumps(dataclasses.asdict(state)))) == state
    assert LoopState().objective is not LoopState().objective


@pytest.mark.parametrize(("lower", "values"), [(True, [3.0, 2.0, 2.0, 2.5, 1.0]),
                                               (False, [0.1, 0.3, 0.3, 0.2, 0.5])])  # fmt: skip
def test_a_validation_is_noted(lower, values):
    """An equal value is no improvement."""
    state, seen = LoopState(), []
    for step, value in enumerate(values, 1):
        state.step = 10 * step
        improved = state.note_validation(value, lower)
        seen.append((improved, state.best, state.best_step, state.stale, state.validated))
    first, second, last = values[0], values[1], values[4]
    assert seen == [
        (True, first, 10, 0, 10),
        (True, second, 20, 0, 20),
        (False, second, 20, 1, 30),
        (False, second, 20, 2, 40),
        (True, last, 50, 0, 50),
    ]


def test_sums_of_steps_add_up():
    statistics = {"nll": np.array(2.0), "slope": np.array([1.0, 2.0])}
    one = StepSums(1, 0.5, np.array([1.0, 2.0]), np.array([3.0, 4.0]), statistics, {"tau": 1.5})
    both = one + one
    assert (both.steps, both.objective, both.scalars) == (2, 1.0, {"tau": 3.0})
    assert both.numerators.tolist() == [2, 4] and both.normalisers.tolist() == [6, 8]
    assert both.statistics["nll"] == 4 and both.statistics["slope"].tolist() == [2, 4]

    # Nothing added, from either side: the loop begins with StepSums(), of one target.
    for same in (StepSums() + one, one + StepSums()):
        assert same.steps == 1 and same.numerators.tolist() == [1, 2]
        assert same.scalars == {"tau": 1.5} and same.statistics.keys() == statistics.keys()
    assert one.steps == 1 and one.numerators.tolist() == [1, 2], "sums are not changed in place"


def test_a_stopwatch_leaves_out_what_is_paused(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    watch = Stopwatch()
    clock[0] += 3
    with watch.paused():
        clock[0] += 50
    clock[0] += 2
    assert watch.lap() == 5
    clock[0] += 1
    assert watch.lap() == 1


def test_seeds_of_steps_and_ranks_differ_and_a_resumed_run_has_the_same(monkeypatch):
    seeds = set()
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert step_seed(3, 5) == 3 + 5 * SEED_OF_STEP + rank * SEED_OF_RANK
        seeds |= {step_seed(3, step) for step in range(1000)}
    assert len(seeds) == 4000


def test_a_stop_request_notes_both_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        for number in before:
            stop = StopRequest()
            assert not stop.received
            signal.raise_signal(number)
            assert stop.received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- a training without DeepSpeed ----


@dataclasses.dataclass(frozen=True)
class Part:
    """A micro-batch: inputs (n, 2), their targets (n,) and weights (n,)."""

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


class SquaredError:
    """Σ w·(f(x) − y)² over Σ w, and a state that counts the steps (engine.step.StepLoss)."""

    def __init__(self):
        self.updates = 0

    def normalisers(self, batch: Part) -> torch.Tensor:
        return batch.weights.sum(dtype=torch.float64)[None]

    def coefficients(self, step: int) -> torch.Tensor:
        return torch.ones(1)

    def terms(self, engine, batch: Part) -> LossTerms:
        errors = (engine(batch.inputs)[:, 0] - batch.targets) ** 2
        weighted = (batch.weights * errors).sum()[None]
        return LossTerms(weighted, batch.weights.sum()[None], errors.detach())

    def update(self, totals: StepTotals) -> dict[str, float]:
        self.updates += 1
        self.seen = totals
        return {"train/updates": float(self.updates)}


class SmallEngine:
    """What the loop and a step use of a DeepSpeed engine, around a linear model and SGD."""

    def __init__(self, accumulation: int = 2, rate: float = 0.05):
        torch.manual_seed(0)
        self.module = torch.nn.Linear(2, 1).eval()  # as pretrained weights come
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=rate)
        self.torch_autocast_z0_gradscaler = None
        self.accumulation, self.rate, self.micro_steps = accumulation, rate, 0
        self.norm = None

    def __call__(self, inputs):
        return self.module(inputs)

    def train(self):
        self.module.train()

    def backward(self, loss, scale_wrt_gas):
        assert scale_wrt_gas is False, "the loss has its normaliser already"
        loss.backward()

    def step(self):
        self.micro_steps += 1
        if self.micro_steps % self.accumulation == 0:
            self.norm = torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters()])
            self.optimizer.step()
            self.optimizer.zero_grad()

    def fp16_enabled(self) -> bool:
        return False

    def get_global_grad_norm(self):
        return self.norm

    def get_lr(self) -> list[float]:
        return [self.rate]

    def save_checkpoint(self, folder, tag, save_latest, exclude_frozen_parameters):
        (Path(folder) / tag).mkdir(parents=True)
        torch.save(self.module.state_dict(), Path(folder) / tag / "weights.pt")

    def load_checkpoint(self, folder, tag, load_module_strict):
        self.module.load_state_dict(torch.load(Path(folder) / tag / "weights.pt"))
        return tag, {}


class SmallTraining:
    """A training of SmallEngine; validations return the given values one after the other."""

    normalization, validation_metric, lower_is_better = "global", "nll", True
    steps_per_epoch, total_steps = 4, 12
    tags = {"train/updates": "number of updates so far"}

    def __init__(self, values):
        self.loss = SquaredError()
        self.validations = iter(values)
        self.saved, self.first = [], []

    def facts(self) -> dict[str, str]:
        return {"dataset": "small"}

    def micro_batches(self, first: int):
        self.first.append(first)
        for step in range(first, self.total_steps):
            random = torch.Generator().manual_seed(step)
            inputs = torch.randn(2, 4, 2, generator=random)
            yield [Part(x, x.sum(1), torch.tensor([1.0, 0.5, 0.0, 2.0])) for x in inputs]

    def values(self, sums: StepSums, seconds: float) -> dict[str, float]:
        assert seconds > 0
        return {
            "train/loss": sums.objective / sums.steps,
            "train/updates": sums.scalars["train/updates"] / sums.steps,
        }

    def validate(self, engine) -> dict[str, float]:
        return {"valid/nll": next(self.validations)}

    def save(self, engine) -> None:
        self.saved.append(engine.micro_steps // 2)

    def state_dict(self):
        return {"updates": self.loss.updates}

    def load_state_dict(self, state):
        self.loss.updates = state["updates"]


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


def options(run, **settings) -> LoopOptions:
    usual = {"log_every": 2, "patience": 0}
    return LoopOptions(ds_config="", dataset="", output_dir=str(run), **usual | settings)


def fit(run, training, stop, engine=None, tag=None, **settings):
    """Run the loop; return its exit code and its state."""
    run.mkdir(exist_ok=True)
    engine = engine or SmallEngine()
    state = loop.resume(engine, training, run, tag, "the dataset", lora=False)
    return loop.fit(engine, training, options(run, **settings), run, state, stop), state


def logged(run, tag) -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(entry["step"], entry[tag]) for entry in entries if tag in entry]


def test_a_whole_run_validates_logs_and_saves_when_it_is_due(tmp_path, stop):
    training, engine = SmallTraining([3.0, 2.0, 4.0]), SmallEngine()
    code, state = fit(tmp_path / "run", training, stop, engine, keep_checkpoints=2)
    assert code == 0 and training.first == [0]
    assert engine.module.training, "dropout is on, whatever mode the weights came in"
    assert logged(tmp_path / "run", "valid/nll") == [(4, 3.0), (8, 2.0), (12, 4.0)]
    assert [step for step, _ in logged(tmp_path / "run", "train/loss")] == [2, 4, 6, 8, 10, 12]
    assert logged(tmp_path / "run", "train/updates")[:2] == [(2, 1.5), (4, 3.5)], "means"
    assert logged(tmp_path / "run", "train/epoch")[-1] == (12, 3.0)
    assert training.saved == [4, 8], "the best model so far"

    # The last checkpoints, and the summary that makes the run finished.
    folders = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert folders == ["step-00000008", "step-00000012"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.pop("validation_metric") == "nll"
    assert LoopState(**summary, log=state.log, sums=state.sums, lap=state.lap) == state
    assert (state.step, state.best, state.best_step, state.stale) == (12, 2.0, 8, 1)
    assert state.dataset == "the dataset" and state.objective == {"updates": 12}
    losses = [value for _, value in logged(tmp_path / "run", "train/loss")]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("patience", "steps"), [(1, 6), (2, 8), (0, 12)])
def test_a_run_stops_early_when_the_validation_gets_no_better(tmp_path, stop, patience, steps):
    training = SmallTraining([3.0, 2.0, 2.0, 5.0, 2.5, 2.2])
    code, state = fit(tmp_path / "run", training, stop, patience=patience, validate_every=2)
    assert code == 0 and state.step == steps and training.saved == [2, 4]
    assert (state.best, state.best_step, state.stale) == (2.0, 4, steps // 2 - 2)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == steps


@pytest.mark.parametrize(("margin", "steps"), [(0.5, 8), (2.5, 8), (3.5, 12), (0.0, 12)])
def test_a_run_stops_when_a_validation_is_too_far_behind_the_best(tmp_path, stop, margin, steps):
    training = SmallTraining([3.0, 2.0, 2.25, 5.0, 2.5, 2.2])
    code, state = fit(tmp_path / "run", training, stop, stop_margin=margin, validate_every=2)
    assert code == 0 and state.step == steps and training.saved == [2, 4]
    assert (state.best, state.best_step) == (2.0, 4)
    assert state.behind == (3.0 if steps == 8 else pytest.approx(0.2))


def test_the_model_before_the_first_step_may_be_the_best(tmp_path, stop):
    training, run = SmallTraining([1.0, 3.0, 2.0, 1.5]), tmp_path / "run"
    run.mkdir()
    state = LoopState(validated=-1)
    assert loop.fit(SmallEngine(), training, options(run), run, state, stop) == 0
    assert logged(run, "valid/nll") == [(0, 1.0), (4, 3.0), (8, 2.0), (12, 1.5)]
    assert training.saved == [0] and (state.best, state.best_step) == (1.0, 0)


@pytest.mark.parametrize("log_every", [2, 4])
def test_a_stopped_run_saves_and_goes_on_to_the_bit(tmp_path, stop, log_every):
    """Also where it is stopped between two entries of the log."""
    values = [3.0, 2.0, 1.0]
    whole = SmallEngine()
    fit(tmp_path / "whole", SmallTraining(values), stop, whole, log_every=log_every)

    # A signal during step 6: it is finished and saved, and there is no summary yet.
    training, run = SmallTraining(values), tmp_path / "stopped"
    make_step = training.loss.update

    def stop_in_step_6(totals):
        if totals.step == 4:
            signal.raise_signal(signal.SIGUSR1)
        return make_step(totals)

    training.loss.update = stop_in_step_6
    code, state = fit(run, training, stop, log_every=log_every)
    assert code == EXIT_REQUEUE and state.step == 6 and not (run / "summary.json").exists()

    training, engine = SmallTraining(values[1:]), SmallEngine()
    stop.received = False
    code, resumed = fit(run, training, stop, engine, tag="step-00000006", log_every=log_every)
    assert code == 0 and training.first == [6] and training.loss.updates == 12
    assert resumed.seconds > state.seconds > 0
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, engine.module.state_dict()[name])
    for tag in ("train/loss", "valid/nll", "train/grad_norm", "train/updates"):
        assert logged(run, tag) == logged(tmp_path / "whole", tag)


def test_a_run_does_not_go_on_with_another_dataset(tmp_path, stop):
    """It is refused before weights for another number of items are loaded."""
    run = tmp_path / "run"
    fit(run, SmallTraining([3.0, 2.0, 1.0]), stop)
    with pytest.raises(UsageError, match="--dataset: .*run was trained on another dataset"):
        loop.resume(None, SmallTraining([]), run, "step-00000012", "another one", lora=False)


def test_a_run_that_is_stopped_within_its_validation_resumes_with_it(tmp_path, stop):
    """The checkpoint of that step is written before the validation."""
    training, run = SmallTraining([]), tmp_path / "run"
    with pytest.raises(StopIteration):
        fit(run, training, stop)
    training = SmallTraining([3.0, 2.0, 1.0])
    code, state = fit(run, training, stop, tag="step-00000004")
    assert code == 0 and training.first == [4] and training.saved[0] == 0
    assert logged(run, "valid/nll") == [(4, 3.0), (8, 2.0), (12, 1.0)]


def test_dropout_does_not_depend_on_how_the_batches_were_made(tmp_path, stop):
    """Making them may draw numbers, in a run that begins and not in one that is resumed."""

    def drawn(run, draws: int) -> list[float]:
        training, numbers = SmallTraining([3.0, 2.0, 1.0]), []
        make, terms = training.micro_batches, training.loss.terms

        def micro_batches(first):
            for batches in make(first):
                torch.rand(draws)
                yield batches

        def noted(*arguments):
            numbers.append(float(torch.rand(())))
            return terms(*arguments)

        training.micro_batches, training.loss.terms = micro_batches, noted
        fit(run, training, stop)
        return numbers

    assert drawn(tmp_path / "some", 3) == drawn(tmp_path / "none", 0)


def test_a_validation_that_is_not_finite_ends_the_run(tmp_path, stop):
    training = SmallTraining([math.nan])
    with pytest.raises(FloatingPointError, match="step 4: validation gives nan"):
        fit(tmp_path / "run", training, stop)
    assert training.saved == []


def test_save_every_adds_checkpoints(tmp_path, stop):
    fit(tmp_path / "run", SmallTraining([1.0] * 3), stop, save_every=3, keep_checkpoints=9)
    steps = [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert steps == [f"step-{step:08d}" for step in (3, 4, 6, 8, 9, 12)]


# ---- one step ----


def test_a_step_is_the_gradient_step_of_the_weighted_mean_over_its_window():
    """Σ w·loss / Σ w over both micro-batches, by autograd on all of their rows."""
    (window,) = list(SmallTraining([]).micro_batches(11))
    engine, loss = SmallEngine(), SquaredError()
    before = [p.detach().clone().requires_grad_() for p in engine.module.parameters()]
    sums, stopped = optimizer_step(engine, window, loss, 11)

    x = torch.cat([part.inputs for part in window])
    y = torch.cat([part.targets for part in window])
    w = torch.cat([part.weights for part in window])
    total = (w * ((x @ before[0].T)[:, 0] + before[1] - y) ** 2).sum() / w.sum()
    total.backward()
    for parameter, old in zip(engine.module.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old.detach() - engine.rate * old.grad)

    assert not stopped and (sums.steps, loss.seen.step) == (1, 11)
    assert sums.objective == pytest.approx(total.item(), rel=1e-6)
    assert sums.normalisers.tolist() == [7.0] == loss.seen.normalisers.tolist()
    assert loss.seen.losses.item() == pytest.approx(total.item(), rel=1e-6)
    assert sums.scalars == {"train/updates": 1.0}


def test_per_batch_is_the_mean_of_the_micro_batches_own_means():
    (window,) = list(SmallTraining([]).micro_batches(11))
    window[1] = dataclasses.replace(window[1], weights=torch.tensor([0.0, 0.0, 0.0, 1.0]))
    engine = SmallEngine()
    before = [p.detach().clone().requires_grad_() for p in engine.module.parameters()]
    sums, _ = optimizer_step(engine, window, SquaredError(), 11, "per_batch")

    means = []
    for part in window:
        errors = ((part.inputs @ before[0].T)[:, 0] + before[1] - part.targets) ** 2
        means.append((part.weights * errors).sum() / part.weights.sum())
    torch.stack(means).mean().backward()
    assert sums.objective == pytest.approx(float(torch.stack(means).mean())), "what is minimised"
    for parameter, old in zip(engine.module.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old.detach() - engine.rate * old.grad)


def test_no_update_without_weight(capsys):
    (window,) = list(SmallTraining([]).micro_batches(11))
    window = [dataclasses.replace(part, weights=torch.zeros(4)) for part in window]
    engine, loss = SmallEngine(), SquaredError()
    before = [p.detach().clone() for p in engine.module.parameters()]
    sums, stopped = optimizer_step(engine, window, loss, 6, stop=True)
    assert stopped and engine.micro_steps == 0 and loss.updates == 0
    assert all(map(torch.equal, before, engine.module.parameters()))
    assert "step 7: all target tokens have weight 0" in capsys.readouterr().out

    # Such a step adds nothing to the sums of others.
    assert (sums.steps, sums.objective, sums.scalars) == (0, 0.0, {})
    assert (sums + StepSums(1, 2.0)).objective == 2.0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_the_update(accumulation):
    (window,) = list(SmallTraining([]).micro_batches(11))
    engine, loss = SmallEngine(accumulation), SquaredError()
    bad = window[accumulation - 1]
    window = [*window[: accumulation - 1], dataclasses.replace(bad, targets=bad.targets * math.inf)]
    before = [p.detach().clone() for p in engine.module.parameters()]
    with pytest.raises(FloatingPointError, match="step 8: the loss is not finite; no weight was"):
        optimizer_step(engine, window, loss, 7)
    assert all(map(torch.equal, before, engine.module.parameters())) and loss.updates == 0


def test_a_gradient_that_is_not_finite_is_reported():
    (window,) = list(SmallTraining([]).micro_batches(11))
    engine = SmallEngine()
    own = engine.optimizer
    engine.optimizer = types.SimpleNamespace(step=own.step, zero_grad=own.zero_grad)
    engine.get_global_grad_norm = partial(float, "nan")
    with pytest.raises(FloatingPointError, match="step 8: the gradient is not finite, and so the"):
        optimizer_step(engine, window, SquaredError(), 7)


def test_deepspeeds_optimizers_are_told_from_torchs():
    """They measure the norm themselves, and only after their update it is that of all ranks."""
    for wrapper in (
        BF16_Optimizer,
        FP16_Optimizer,
        FP16_UnfusedOptimizer,
        DeepSpeedZeroOptimizer,
        DeepSpeedZeroOptimizer_Stage3,
    ):
        assert not issubclass(wrapper, torch.optim.Optimizer)
    for plain in (FusedAdam, DeepSpeedCPUAdam):
        assert issubclass(plain, torch.optim.Optimizer)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_where_deepspeed_measures_no_gradient_it_is_checked_before_the_update(value):
    """At stage 0 in float32 the optimizer is torch's own."""
    (window,) = list(SmallTraining([]).micro_batches(11))
    engine = SmallEngine()
    engine.module.weight.register_hook(lambda gradient: gradient * float(value))
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    with pytest.raises(FloatingPointError, match="step 8: .*; no weight was updated"):
        optimizer_step(engine, window, SquaredError(), 7)
    assert all(map(torch.equal, before, engine.module.parameters()))

    sums, _ = optimizer_step(SmallEngine(), window, SquaredError(), 7)
    assert sums.gradient_norm > 0


class ScaledEngine(SmallEngine):
    """A SmallEngine as DeepSpeed's with torch_autocast in float16 at stage 0."""

    def __init__(self):
        super().__init__()
        self.torch_autocast_z0_gradscaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def backward(self, loss, scale_wrt_gas):
        super().backward(self.torch_autocast_z0_gradscaler.scale(loss), scale_wrt_gas)

    def step(self):
        self.micro_steps += 1
        if self.micro_steps % self.accumulation == 0:
            self.torch_autocast_z0_gradscaler.step(self.optimizer)
            self.torch_autocast_z0_gradscaler.update()
            self.optimizer.zero_grad()

    def get_global_grad_norm(self):
        return None  # torch's own optimizer knows of none


def test_a_scaled_gradient_is_measured_without_its_scale():
    (window,) = list(SmallTraining([]).micro_batches(11))
    plain, scaled, overflowing = SmallEngine(), ScaledEngine(), ScaledEngine()
    norms = [
        optimizer_step(engine, window, SquaredError(), 0)[0].gradient_norm
        for engine in (plain, scaled)
    ]
    assert norms[1] == pytest.approx(norms[0]) and norms[0] > 0
    assert torch.allclose(plain.module.weight, scaled.module.weight)

    overflowing.module.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = overflowing.module.weight.detach().clone()
    sums, _ = optimizer_step(overflowing, window, SquaredError(), 0)
    assert sums.gradient_norm == 0 and torch.equal(before, overflowing.module.weight)
