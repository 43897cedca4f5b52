"""The coefficients of a mixture, their gradient, the drift they are prone to, and a resumed run."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from igd_ds.objectives import mixing

OPTIONS = dict.fromkeys(
    ("mixing", "mixing_form", "curriculum_c", "curriculum_cT", "lambda_lr", "mixing_regularizer")
)


def build(total_steps=100, **options):
    return mixing.build(SimpleNamespace(**OPTIONS | options), total_steps)


def with_lambda(mixture, values):
    """The same mixture with given λ."""
    mixture.load_state_dict({"s": [math.log(v) for v in values], "adam": {}})
    return mixture


def expected_alpha(values, c, t):
    """MTC 4.2.2, as written."""
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
    """α'_fr is exactly 0 at step 0; c·t so small that 1 − e^{−ct} cancels, or so large that e^{−ct} underflows, gives no 0/0."""
    assert build(curriculum_c=0.1).coefficients(0).tolist() == [0.5, 0.0, 0.5]
    assert build(curriculum_c=1e-20).coefficients(1)[1] == pytest.approx(0.5e-20)
    assert build(curriculum_c=1e5).coefficients(1).tolist() == [0.0, 1.0, 0.0]
    late = with_lambda(build(curriculum_c=1e5), (1e30, 1e-30, 1e30))
    assert late.coefficients(1).tolist() == [0.0, 1.0, 0.0]
    late.update([1.0, 2.0, 3.0], 1)
    assert torch.isfinite(late.s).all()


def test_c_times_total_steps():
    assert torch.equal(
        build(200, curriculum_cT=3.0).coefficients(50),
        build(curriculum_c=3.0 / 200).coefficients(50),
    )


@pytest.mark.parametrize("regularizer", [None, "kendall"])
@pytest.mark.parametrize("step", [0, 7])
def test_the_gradient_of_s_is_that_of_the_loss(step, regularizer):
    """Σ α'_j L_j (− ½ Σ log α_j) by finite differences of plain Python; without the term it is α'_j (L_j − L)."""
    s, losses, c = [0.3, -0.2, 0.1], [2.0, 5.0, 3.0], 0.05
    mixture = build(curriculum_c=c, mixing_regularizer=regularizer)
    mixture.load_state_dict({"s": s, "adam": {}})
    mixture.update(losses, step)

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
    """METHOD 2: ∂L/∂s_j = α'_j (L_j − L). With constant losses α' goes to the smallest one, whatever it is worth; Kendall's
    term stops it where α_j (L_j − L) = ½ (1 − 3 α_j)."""
    losses = [3.0, 2.5, 2.9]
    free, held = build(lambda_lr=0.05), build(lambda_lr=0.05, mixing_regularizer="kendall")
    shares = []
    for step in range(800):
        shares.append(free.coefficients(step)[1].item())
        free.update(losses, step)
        held.update(losses, step)
    assert all(later > earlier for earlier, later in zip(shares[:200], shares[1:201], strict=True))
    assert shares[0] == pytest.approx(1 / 3) and shares[-1] > 0.99
    alpha = held.coefficients(800).double().numpy()
    np.testing.assert_allclose(alpha * (losses - alpha @ losses), 0.5 * (1 - 3 * alpha), atol=1e-3)
    assert alpha.min() > 0.2 and alpha.argmax() == 1


def test_a_resumed_run_goes_on_to_the_bit():
    losses = np.random.default_rng(0).uniform(1, 5, (40, 3))
    whole, first = build(curriculum_cT=2.0), build(curriculum_cT=2.0)
    for step in range(40):
        whole.update(losses[step], step)
    for step in range(17):
        first.update(torch.from_numpy(losses[step]), step)  # a tensor does as well
    second = build(curriculum_cT=2.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(17, 40):
        assert torch.equal(first.coefficients(step), second.coefficients(step))
        first.update(losses[step], step)
        second.update(losses[step], step)
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
        mixture.update([1.0, 2.0, 3.0], step)
        found = mixture.coefficients(step)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, alpha, atol=1e-6)
    mixture.load_state_dict(json.loads(json.dumps(mixture.state_dict())))


def test_options_reach_the_mixture():
    default, other = build(), build(mixing="learned", mixing_form="logits", lambda_lr=0.5)
    assert (default.form, other.form, build(mixing="fg-ce").form) == ("loss", "logits", "loss")
    default.update([1.0, 2.0, 3.0], 0)
    other.update([1.0, 2.0, 3.0], 0)
    assert default.s[0].item() == pytest.approx(mixing.LAMBDA_LR, rel=1e-4)  # Adam's first step
    assert other.s[0].item() == pytest.approx(0.5, rel=1e-4)
