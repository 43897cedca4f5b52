"""The masked softmax loss against plain loops over the trie in float64, and its temperature."""

import json
import math

import numpy as np
import pytest
import torch
from small_catalogue import batch_of_items, batch_of_tokens, context_of

from igd_ds.contracts import Likelihood, Logits, StepTotals
from igd_ds.objectives.gain import IGD, GainOptions
from igd_ds.objectives.msl import MSL, MSLOptions, best_temperature, masked_nll

# Item 3 is cold and a sibling of 1 and 2; items 0 and 4 have one path; 5 to 7 begin alike.
PATHS = [
    [1, 2, 0],
    [1, 3, 4, 0],
    [1, 3, 5, 0],
    [1, 3, 6, 7, 0],
    [1, 2, 0],
    [8, 9, 2, 0],
    [8, 9, 3, 0],
    [8, 9, 0],
    [2, 0],
]
COUNTS = np.array([3, 1, 2, 0, 1, 0, 4, 0, 2])
VOCABULARY = 12
ITEMS = [0, 6, 2, 8, 3, 5, 2]


def make(tau, beta=None) -> MSL:
    return MSL(MSLOptions(msl_tau=str(tau), igd_beta=beta), total_steps=10)


def case(objective, items=ITEMS, seed=0):
    """Return context, batch and logits of all tokens of some items."""
    context = context_of(PATHS, COUNTS)
    batch = batch_of_items(context, objective.weights(context), items)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(batch.targets), VOCABULARY, generator=generator) * 3
    return context, batch, logits


def steps_of(items):
    """Yield (prefix, target, legal next tokens) of each token of some items, item by item."""
    for item in items:
        path = PATHS[item]
        for t, target in enumerate(path):
            prefix = path[:t]
            yield prefix, target, sorted({p[t] for p in PATHS if p[:t] == prefix and len(p) > t})


def count_under(prefix) -> int:
    return int(sum(c for p, c in zip(PATHS, COUNTS, strict=True) if p[: len(prefix)] == prefix))


def brute_force(logits, tau, beta=1.0, items=ITEMS):
    """Return Σ w·loss, Σ w and the NLL of each token, float64, by loops over prefixes."""
    numerator, weight, nlls = torch.zeros((), dtype=torch.float64), 0.0, []
    for row, (prefix, target, legal) in enumerate(steps_of(items)):
        scaled = logits[row].double() / tau
        nll = scaled[legal].exp().sum().log() - scaled[target]
        nlls.append(nll)
        if len(legal) > 1:
            is_zero_gain = count_under([*prefix, target]) == count_under(prefix)
            w = beta if is_zero_gain else 1.0
            numerator, weight = numerator + w * tau * nll, weight + w
    return numerator, weight, torch.stack(nlls)


@pytest.mark.parametrize(("tau", "beta"), [(1, None), (4.5, None), (0.3, None), (2, 0.25), (1, 0)])
def test_loss_and_gradient_equal_a_softmax_over_the_siblings(tau, beta):
    objective = make(tau, beta)
    context, batch, logits = case(objective)
    logits = logits.requires_grad_()
    terms = objective.loss(batch, Logits(logits), context)
    terms.numerators.sum().backward()
    found = logits.grad.clone()

    logits.grad = None
    numerator, weight, nlls = brute_force(logits, tau, 1.0 if beta is None else beta)
    numerator.backward()
    assert terms.numerators.item() == pytest.approx(numerator.item(), rel=1e-6)
    assert terms.normalisers.item() == pytest.approx(weight, rel=1e-6)
    torch.testing.assert_close(terms.nll.double(), nlls.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, logits.grad, rtol=1e-5, atol=1e-6)
    assert not terms.nll.requires_grad

    # Logits of tokens that the trie forbids have no say.
    forbidden = torch.ones_like(found, dtype=torch.bool)
    for row, (_, _, legal) in enumerate(steps_of(ITEMS)):
        forbidden[row, legal] = False
    assert (found[forbidden] == 0).all() and (found[~forbidden] != 0).any()


def test_the_validation_measures_the_same_softmax():
    objective = make(2.5)
    context, batch, logits = case(objective)
    nll = objective.nll(batch, logits.bfloat16(), context)
    _, _, expected = brute_force(logits.bfloat16(), 2.5)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-6)
    assert objective.likelihood() == Likelihood("masked", 2.5)


def test_probabilities_of_all_items_sum_to_one():
    """The masked softmax is a distribution over the catalogue's different items."""
    different = [item for item in range(len(PATHS)) if item != 4]  # 0 and 4 are one path
    tokens = [(tuple(p), t) for p, t, _ in steps_of(different)]
    states = {prefix: number for number, prefix in enumerate(sorted({p for p, _ in tokens}))}
    context = context_of(PATHS, COUNTS)
    batch = batch_of_items(context, np.ones((sum(map(len, PATHS)), 1), np.float32), different)
    per_state = torch.randn(len(states), VOCABULARY, generator=torch.Generator().manual_seed(1))
    logits = per_state[[states[prefix] for prefix, _ in tokens]] * 4  # a prefix has one prediction

    nll = masked_nll(batch, logits, context.trie, 1.7).split([len(PATHS[i]) for i in different])
    assert sum(math.exp(-part.sum()) for part in nll) == pytest.approx(1, rel=1e-5)


def test_forced_tokens_drop_out():
    """A token without siblings has weight 0, NLL exactly 0 and no gradient, whatever the logits."""
    objective = make(3)
    context, batch, logits = case(objective)
    is_forced = torch.tensor([len(legal) == 1 for _, _, legal in steps_of(ITEMS)])
    assert 0 < is_forced.sum() < len(is_forced)
    assert ((batch.weights[:, 0] == 0) == is_forced).all()

    logits[is_forced] *= 1e4
    logits = logits.requires_grad_()
    terms = objective.loss(batch, Logits(logits), context)
    assert (terms.nll[is_forced] == 0).all() and (terms.nll[~is_forced] > 0).all()
    terms.numerators.sum().backward()
    assert (logits.grad[is_forced] == 0).all()
    assert terms.normalisers.item() == (~is_forced).sum()


def test_large_logits_do_not_overflow():
    context, batch, logits = case(make(1))
    nll = masked_nll(batch, logits * 1e4, context.trie, 0.5)
    _, _, expected = brute_force((logits * 1e4).double() - logits.max() * 1e4, 0.5)
    assert torch.isfinite(nll).all()
    finite = torch.isfinite(expected)
    torch.testing.assert_close(nll.double()[finite], expected[finite], rtol=1e-4, atol=1e-2)


def test_beta_weighs_tokens_whose_siblings_are_all_cold():
    """Token 3 of item 6 takes all the mass of its prefix [8, 9] and has two cold siblings."""
    weights = make(1, beta=0.25).weights(context_of(PATHS, COUNTS))[:, 0]
    begin = np.cumsum([0, *map(len, PATHS)])
    assert weights[begin[6] : begin[7]].tolist() == [1, 0, 0.25, 0]
    assert make(1).weights(context_of(PATHS, COUNTS))[begin[6] + 2, 0] == 1


def test_without_cold_items_the_weights_are_those_of_igd_at_beta_0():
    """Then a token has zero gain exactly where it is forced."""
    context = context_of(PATHS, np.maximum(COUNTS, 1))
    igd = IGD(GainOptions(igd_beta=0.0), total_steps=1)
    np.testing.assert_array_equal(make(1).weights(context), igd.weights(context))


# ---- the adaptive temperature ----


def best_by_the_paper(targets, legal, num_first):
    """Return τ* of MSL: (Δμ + √max(Δμ² − 2Cσ², 0)) / 2C, C = log(n₁/4), clamped to [1.5, 5]."""
    gap = np.mean(targets) - np.mean(legal)
    c = math.log(num_first / 4)
    best = (gap + math.sqrt(max(gap**2 - 2 * c * np.var(legal), 0))) / (2 * c)
    return min(max(best, 1.5), 5.0)


def wide_case(gap, num_first=40, rows=7, seed=0):
    """Return context, batch and logits of one-token items; targets' logits are raised by `gap`."""
    context = context_of([[1 + token, 0] for token in range(num_first)], np.ones(num_first))
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(num_first, (rows,), generator=generator)
    weights = make("adaptive").weights(context)
    batch = batch_of_items(context, weights, items.tolist())
    logits = torch.randn(2 * rows, num_first + 1, generator=generator)
    logits[torch.arange(2 * rows), batch.targets] += gap
    return context, batch, logits


def totals_of(*terms, step=0):
    """Return the sums that the step would make of micro-batches."""
    names = terms[0].statistics
    statistics = {name: sum(t.statistics[name].double() for t in terms) for name in names}
    omega = sum(t.normalisers.double() for t in terms)
    losses = sum(t.numerators.detach().double() for t in terms) / omega
    return StepTotals(step, losses, omega, statistics)


@pytest.mark.parametrize("gap", [-3.0, 0.0, 8.0, 12.0, 40.0])
def test_the_temperature_follows_the_papers_formula(gap):
    objective = make("adaptive")
    context, batch, logits = wide_case(gap)
    terms = objective.loss(batch, Logits(logits), context)
    logged = objective.update(totals_of(terms))

    first = range(0, 14, 2)
    targets = [logits[row, batch.targets[row]].item() for row in first]
    legal = [value for row in first for value in logits[row, 1:].tolist()]
    best = best_by_the_paper(targets, legal, 40)
    assert logged == {"train/msl_tau": 1.5}, "τ of the step that was made"
    assert objective.tau == pytest.approx(0.95 * 1.5 + 0.05 * best, rel=1e-6)
    assert {-3.0: best == 1.5, 0.0: best == 1.5, 40.0: best == 5}.get(gap, 1.5 < best < 5)
    assert objective.likelihood() == Likelihood("masked", objective.tau)


def test_only_first_tokens_count_and_the_deal_does_not_matter():
    """Micro-batches, empty ones too, add up to the statistics of the whole batch."""
    objective = make("adaptive")
    context, batch, logits = wide_case(9.0)
    whole = objective.loss(batch, Logits(logits), context).statistics
    other = logits.clone()
    other[1::2] *= 100
    of_other = objective.loss(batch, Logits(other), context).statistics
    assert all(torch.equal(whole[name], of_other[name]) for name in whole)

    def part(rows):
        tokens = batch_of_tokens(batch.targets[rows], batch.weights[rows], batch.node[rows])
        return objective.loss(tokens, Logits(logits[rows]), context)

    parts = [part(slice(0, 4)), part(slice(0, 0)), part(slice(4, 14))]
    summed = totals_of(*parts).statistics
    for name in whole:
        torch.testing.assert_close(summed[name], whole[name], rtol=1e-12, atol=1e-12)


def test_a_step_without_first_tokens_or_with_few_of_them_in_the_catalogue_changes_nothing():
    objective = make("adaptive")
    context, batch, logits = case(objective)  # the catalogue has 3 first tokens: η·n₁ < 1
    objective.update(totals_of(objective.loss(batch, Logits(logits), context)))
    assert objective.tau == 1.5
    nothing = {"targets": 0.0, "target_sum": 0.0, "legal": 0.0, "legal_sum": 0.0}
    assert best_temperature(nothing | {"legal_squares": 0.0, "first_tokens": 0.0}) is None


def test_a_fixed_temperature_stays():
    objective = make(4.5)
    context, batch, logits = case(objective)
    terms = objective.loss(batch, Logits(logits), context)
    assert terms.statistics == {}
    assert objective.update(totals_of(terms)) == {"train/msl_tau": 4.5}
    assert objective.tau == 4.5 and set(objective.tags) == {"train/msl_tau"}


def test_a_resumed_run_goes_on_to_the_bit():
    def update(objective, step):
        context, batch, logits = wide_case(gap=7 + step % 5, seed=step)
        return objective.update(totals_of(objective.loss(batch, Logits(logits), context)))

    whole, first, second = make("adaptive"), make("adaptive"), make("adaptive")
    logged = [update(whole, step) for step in range(12)]
    for step in range(5):
        update(first, step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [update(second, step) for step in range(5, 12)] == logged[5:]
    assert second.state_dict() == whole.state_dict() and whole.tau > 1.6
