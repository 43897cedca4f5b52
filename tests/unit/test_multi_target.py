"""The coefficients of a mixture, their gradient, the drift they are prone to, and a resumed run."""

import json
import math

import numpy as np
import pytest
import torch
from small_catalogue import batch_of_tokens, context_of

from igd_ds.contracts import Logits, StepTotals
from igd_ds.objectives.multi_target import (
    LAMBDA_LR,
    LearnedMixture,
    LogitMixture,
    MultiTarget,
    MultiTargetOptions,
    ScheduledMixture,
)

NEEDED = {"item_embeddings": "unused.npy", "frequency_beta": 0.9}


def build(total_steps=100, **options) -> MultiTarget:
    return MultiTarget(MultiTargetOptions(**NEEDED, **options), total_steps)


def update(mixture, losses, step):
    """Tell a mixture about a step with these losses of the three targets."""
    losses = torch.tensor([float(loss) for loss in losses], dtype=torch.float64)
    return mixture.update(StepTotals(step, losses, torch.ones(3, dtype=torch.float64), {}))


def with_lambda(mixture, values):
    """Return the mixture with given λ."""
    mixture.load_state_dict({"s": [math.log(v) for v in values], "adam": {}})
    return mixture


def expected_alpha(values, c, t):
    """Return α' of MTC 4.2.2, as it is written there."""
    fg, fr, original = values
    scaled = (
        [math.exp(-c * t) * fg, (1 - math.exp(-c * t)) * fr, math.exp(-c * t) * original]
        if c
        else [fg, fr, original]
    )
    return [v / sum(scaled) for v in scaled]


@pytest.mark.parametrize("c", [None, 0.03])
@pytest.mark.parametrize("t", [0, 1, 20, 99])
def test_coefficients(c, t):
    alpha = with_lambda(build(curriculum_c=c), (2.0, 0.5, 3.0)).coefficients(t)
    assert alpha.dtype == torch.float32 and not alpha.requires_grad
    np.testing.assert_allclose(alpha, expected_alpha((2.0, 0.5, 3.0), c, t), rtol=1e-6)


def test_the_ends_of_a_curriculum():
    """α'_fr is exactly 0 at step 0. No c·t is so small or so large that it gives 0/0."""
    assert build(curriculum_c=0.1).coefficients(0).tolist() == [0.5, 0.0, 0.5]
    assert build(curriculum_c=1e-20).coefficients(1)[1] == pytest.approx(0.5e-20)
    assert build(curriculum_c=1e5).coefficients(1).tolist() == [0.0, 1.0, 0.0]
    late = with_lambda(build(curriculum_c=1e5), (1e30, 1e-30, 1e30))
    assert late.coefficients(1).tolist() == [0.0, 1.0, 0.0]
    update(late, [1.0, 2.0, 3.0], 1)
    assert torch.isfinite(late.s).all()


def test_c_times_total_steps():
    assert torch.equal(
        build(200, curriculum_cT=3.0).coefficients(50),
        build(curriculum_c=3.0 / 200).coefficients(50),
    )


@pytest.mark.parametrize("regularizer", [None, "kendall"])
@pytest.mark.parametrize("step", [0, 7])
def test_the_gradient_of_s_is_that_of_the_loss(step, regularizer):
    """It equals finite differences of Σ α'_j L_j (− ½ Σ log α_j) in plain Python.

    Without the term in brackets it is α'_j (L_j − L).
    """
    s, losses, c = [0.3, -0.2, 0.1], [2.0, 5.0, 3.0], 0.05
    mixture = build(curriculum_c=c, mixing_regularizer=regularizer)
    mixture.load_state_dict({"s": s, "adam": {}})
    update(mixture, losses, step)

    def loss(s):
        values = [math.exp(v) for v in s]
        value = sum(a * x for a, x in zip(expected_alpha(values, c, step), losses, strict=True))
        return value - 0.5 * sum(math.log(v / sum(values)) for v in values) * (
            regularizer == "kendall"
        )

    steps = 1e-6 * np.eye(3)
    numeric = [(loss(s + h) - loss(s - h)) / 2e-6 for h in steps]
    np.testing.assert_allclose(mixture.s.grad, numeric, rtol=1e-5, atol=1e-7)
    if regularizer is None:
        alpha = np.array(expected_alpha([math.exp(v) for v in s], c, step))
        np.testing.assert_allclose(
            mixture.s.grad, alpha * (losses - alpha @ losses), rtol=1e-5, atol=1e-7
        )


def test_the_published_objective_drifts_to_the_smallest_loss():
    """∂L/∂s_j = α'_j (L_j − L): with constant losses α' goes to the smallest one.

    Kendall's term stops it where α_j (L_j − L) = ½ (1 − 3 α_j).
    """
    losses = [3.0, 2.5, 2.9]
    free, held = build(lambda_lr=0.05), build(lambda_lr=0.05, mixing_regularizer="kendall")
    shares = []
    for step in range(800):
        shares.append(free.coefficients(step)[1].item())
        update(free, losses, step)
        update(held, losses, step)
    assert all(later > earlier for earlier, later in zip(shares[:200], shares[1:201], strict=True))
    assert shares[0] == pytest.approx(1 / 3) and shares[-1] > 0.99
    alpha = held.coefficients(800).double().numpy()
    np.testing.assert_allclose(alpha * (losses - alpha @ losses), 0.5 * (1 - 3 * alpha), atol=1e-3)
    assert alpha.min() > 0.2 and alpha.argmax() == 1


def test_a_resumed_run_goes_on_to_the_bit():
    losses = np.random.default_rng(0).uniform(1, 5, (40, 3))
    whole, first = build(curriculum_cT=2.0), build(curriculum_cT=2.0)
    for step in range(40):
        update(whole, losses[step], step)
    for step in range(17):
        update(first, losses[step], step)
    second = build(curriculum_cT=2.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(17, 40):
        assert torch.equal(first.coefficients(step), second.coefficients(step))
        update(first, losses[step], step)
        update(second, losses[step], step)
    assert whole.state_dict() == second.state_dict()
    assert torch.equal(whole.coefficients(40), second.coefficients(40))
    untouched = build()
    untouched.load_state_dict(
        json.loads(json.dumps(build().state_dict()))
    )  # before the first update
    assert untouched.coefficients(0).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("fg-ce", {0: [1, 0, 0], 25: [0.5, 0, 0.5], 50: [0, 0, 1], 99: [0, 0, 1]}),
        (
            "fg-ce-fr",
            {0: [1, 0, 0], 25: [0.5, 0, 0.5], 50: [0, 0, 1], 75: [0, 0.5, 0.5], 100: [0, 1, 0]},
        ),
    ],
)
def test_schedules(name, at):
    mixture = build(100, mixing=name)
    for step, alpha in at.items():
        update(mixture, [1.0, 2.0, 3.0], step)
        found = mixture.coefficients(step)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, alpha, atol=1e-6)
    mixture.load_state_dict(json.loads(json.dumps(mixture.state_dict())))


def test_options_reach_the_mixture():
    default, other = build(), build(mixing="learned", mixing_form="logits", lambda_lr=0.5)
    kinds = [type(mixture) for mixture in (default, other, build(mixing="fg-ce"))]
    assert kinds == [LearnedMixture, LogitMixture, ScheduledMixture]
    assert default.targets == ("fg", "fr", "or") and len(default.coefficients(0)) == 3
    update(default, [1.0, 2.0, 3.0], 0)
    slope, ones = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
    other.update(StepTotals(0, ones, ones, {"slope": slope}))
    assert default.s[0].item() == pytest.approx(LAMBDA_LR, rel=1e-4)  # Adam's first step
    assert other.s[0].item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"mixing": "fg-ce"}, {"mixing_form": "logits"}])
def test_the_logged_coefficients_are_those_that_the_step_used(options):
    mixture = build(10, **options)
    used = mixture.coefficients(3) if not options.get("mixing_form") else torch.full((3,), 1 / 3)
    ones = torch.ones(3, dtype=torch.float64)
    logged = mixture.update(StepTotals(3, 2 * ones, ones, {"slope": ones}))
    assert set(logged) == set(mixture.tags) == {f"train/alpha_{name}" for name in mixture.targets}
    assert list(logged.values()) == pytest.approx(used.tolist())


def test_alpha_on_the_logits_is_learned_from_the_slope_of_the_whole_step():
    """∂L/∂s by autograd of Σ_j (1/Ω_j) Σ w_j·CE(α_j·logits) over two micro-batches."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, generator=generator) * 3
    targets = torch.randint(5, (2, 4), generator=generator)
    weights = torch.rand(2, 4, 3, generator=generator)

    # The objective: two micro-batches, whose sums the step adds.
    mixture, context = build(mixing_form="logits", curriculum_c=0.1), context_of([[0]], [1])
    mixture.load_state_dict({"s": [0.3, -0.2, 0.1], "adam": {}})
    assert mixture.coefficients(5).tolist() == [1, 1, 1]
    parts = [
        mixture.loss(batch_of_tokens(targets[i], weights[i]), Logits(logits[i]), context)
        for i in range(2)
    ]
    omega = sum(part.normalisers for part in parts).double()
    losses = sum(part.numerators for part in parts).double() / omega
    slope = sum(part.statistics["slope"] for part in parts).double()
    mixture.update(StepTotals(5, losses, omega, {"slope": slope}))

    # Autograd on the definition.
    s = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    decay = math.exp(-0.1 * 5)
    scaled = s.exp() * torch.tensor([decay, 1 - decay, decay])
    alpha = scaled / scaled.sum()
    flat, total = logits.flatten(0, 1).double(), 0.0
    for j in range(3):
        w = weights[..., j].flatten().double()
        nll = torch.nn.functional.cross_entropy(
            alpha[j] * flat, targets.flatten(), reduction="none"
        )
        total = total + (w * nll).sum() / w.sum()
    total.backward()
    torch.testing.assert_close(losses.sum(), total.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(mixture.s.grad.double(), s.grad, rtol=1e-5, atol=1e-7)
