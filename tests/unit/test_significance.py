"""Statistics against hand-worked numbers, enumeration and a plain resampling loop."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from igd_ds.studies import significance
from igd_ds.studies.report.study import Ranks, Run, Study
from igd_ds.studies.significance import (
    bootstrap_over_users,
    compare,
    holm,
    interval_over_seeds,
    mann_whitney,
    mean_sd,
    ndcg,
    relative,
)


def test_mean_and_sample_deviation():
    assert mean_sd([2.0, 4.0, 9.0]) == (5.0, pytest.approx(13**0.5))  # (9 + 1 + 16) / 2
    assert mean_sd([2.0]) == (2.0, None)
    assert relative(0.06, 0.05) == pytest.approx(0.2) and relative(0.06, 0.0) is None


def test_ndcg_of_a_rank():
    rank, credit = np.array([0, 1, 3, 10, 11]), np.array([0, 1, 0.5, 1, 1])
    expected = [0, 1, 0.25, 1 / np.log2(11), 0]
    assert ndcg(Ranks(np.arange(5), rank, credit)) == pytest.approx(expected)


def test_the_interval_over_seeds_by_hand():
    """Differences 1, 2, 3: sd 1, t of 2 degrees of freedom 4.3027, so 2 ± 4.3027 / √3."""
    assert interval_over_seeds(np.array([1.0, 2.0, 3.0])) == pytest.approx(
        (-0.48414, 4.48414), abs=1e-5
    )
    assert interval_over_seeds(np.array([0.5, 0.5])) == (0.5, 0.5)
    assert interval_over_seeds(np.array([0.5])) is None


def test_holm_by_hand():
    """0.01·4 = 0.04; 0.02·3 = 0.06; 0.03·2 = 0.06; 0.04·1 is raised to the 0.06 before it."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]


@pytest.mark.parametrize(
    "first",
    [
        [3.0, 5.0, 6.0],
        [7.0, 8.0, 9.0],
        [1.0, 4.5],
        [4.0, 4.0, 5.0],
        [2.0, 2.0],
        [5.0, 5.0, 5.0],
        [4.0] * 4,
    ],
)
def test_mann_whitney_equals_an_enumeration(first):
    """Two-sided p, ties included: twice the smaller share of all permutations with such a U."""
    second = [1.5, 2.0, 4.0]
    pooled = [*first, *second]
    ranks = [
        sum(other < value for other in pooled) + (pooled.count(value) + 1) / 2 for value in pooled
    ]
    sums = [sum(dealt) for dealt in itertools.combinations(ranks, len(first))]
    tails = [
        np.mean([sign * total >= sign * sum(ranks[: len(first)]) for total in sums])
        for sign in (-1, 1)
    ]
    p, smallest = mann_whitney(first, second)
    assert p == pytest.approx(min(1, 2 * min(tails)))
    assert smallest == pytest.approx(2 / len(sums)) and p >= smallest - 1e-12


def test_mann_whitney_is_exact_with_five_seeds_and_a_tie():
    p, smallest = mann_whitney([1.0, 2.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0, 8.0])
    assert p == smallest == pytest.approx(2 / 252)  # the two most extreme of all ways to deal
    assert mann_whitney([1.0, 1.0], [1.0, 1.0]) == (1.0, pytest.approx(1 / 3))


def test_the_standard_error_over_users():
    """One row per user: s / √U. Rows of one user count as one: only their sum matters."""
    values = np.array([1.0, 0.0, 0.5, 0.25])
    by_row = significance.standard_error(values, np.arange(4))
    assert by_row == pytest.approx(values.std(ddof=1) / 2, rel=1e-5)  # six digits are kept
    twice = significance.standard_error(np.repeat(values, 2), np.repeat(np.arange(4), 2))
    assert twice == pytest.approx(by_row, rel=1e-5)

    # Users with different numbers of rows: as the bootstrap over users finds it.
    random = np.random.default_rng(0)
    user = random.integers(0, 200, 1000)
    values = np.clip(random.random(1000) * 0.5 + 0.5 * (user % 2), 0, 1)
    low, high, _ = bootstrap_over_users(values, user)
    error = significance.standard_error(values, user)
    # 9,999 resamples place the ends of the interval within some per cent.
    assert 2 * significance.NORMAL_95 * error == pytest.approx(high - low, rel=0.05)
    assert significance.standard_error(values, np.zeros(1000)) is None


def test_three_seeds_cannot_reach_the_usual_level():
    assert mann_whitney([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == pytest.approx((0.1, 0.1))


def plain_bootstrap(difference, user, number=4000):
    random, users = np.random.default_rng(7), np.unique(user)
    rows = {u: difference[user == u] for u in users}
    means = [
        np.concatenate([rows[u] for u in random.choice(users, len(users))]).mean()
        for _ in range(number)
    ]
    return *np.percentile(means, [2.5, 97.5]), 2 * min(
        np.mean(np.array(means) <= 0), np.mean(np.array(means) >= 0)
    )


def test_the_bootstrap_equals_a_plain_loop_over_users():
    random = np.random.default_rng(1)
    user = random.integers(0, 40, 90)
    difference = random.normal(0.08, 0.3, 90)
    expected = plain_bootstrap(difference, user)
    low, high, p = bootstrap_over_users(difference, user)
    assert (low, high) == pytest.approx(expected[:2], abs=0.01) and p == pytest.approx(
        expected[2], abs=0.02
    )
    assert 0.001 < p < 0.2 and bootstrap_over_users(difference, user) == (low, high, p)
    reordered = random.permutation(90)
    assert bootstrap_over_users(difference[reordered], user[reordered]) == pytest.approx(
        (low, high, p)
    )


def test_rows_of_one_user_are_no_further_evidence():
    """Rows that are repeated three times leave the interval as wide as it was."""
    random = np.random.default_rng(2)
    user, difference = np.arange(50), random.normal(0.05, 0.3, 50)
    once = bootstrap_over_users(difference, user)
    assert bootstrap_over_users(np.repeat(difference, 3), np.repeat(user, 3)) == pytest.approx(once)
    low, high, _ = bootstrap_over_users(np.repeat(difference, 3), np.arange(150))
    assert high - low < 0.7 * (once[1] - once[0])


def test_a_single_user_tells_nothing_about_others(study):
    assert bootstrap_over_users(np.array([0.1, 0.2, 0.3]), np.zeros(3)) is None
    alone = replace(study, rows={"toy": {"test": {"user": np.zeros(120, np.int64)}}})
    assert [(c.low, c.high, c.users_p, c.users_holm) for c in compare(alone, "toy")] == [
        (None,) * 4
    ] * 2


def test_a_bootstrap_of_no_and_of_a_sure_difference():
    assert bootstrap_over_users(np.zeros(5), np.arange(5)) == (0.0, 0.0, 1.0)
    low, high, p = bootstrap_over_users(np.full(30, 0.5), np.arange(30))
    assert (low, high) == pytest.approx((0.5, 0.5)) and p == pytest.approx(
        2 / (significance.RESAMPLES + 1)
    )


def make_run(method: str, seed: int, rank: np.ndarray, **changes) -> Run:
    """A run whose rows 0, 4, 8, … have a target that shares its path with another item."""
    rows = np.arange(len(rank), dtype=np.int32)
    ranks = Ranks(rows, rank, (rank > 0) * np.where(rows % 4, 1, 0.5))
    value = float(ndcg(ranks).mean())
    results = {"alpha": {"0.0": {"item_match": {"ndcg@10": value}}}}
    run = Run(
        f"{method}-{seed}",
        "toy",
        "q",
        method,
        method,
        seed,
        "finished",
        valid=results,
        test=results,
    )
    return replace(run, ranks={"test": ranks}, **changes)


@pytest.fixture
def study():
    """Three seeds of uniform, of a better method and of an equal one; 60 users with 2 rows each."""
    random, runs = np.random.default_rng(0), []
    for seed in range(3):
        for method, hits in (("uniform", 0.3), ("better", 0.7), ("same", 0.3)):
            listed = random.random(120) < hits
            runs.append(
                make_run(
                    method, seed, np.where(listed, random.integers(1, 11, 120), 0).astype(np.int32)
                )
            )
    return Study("s", "", runs, rows={"toy": {"test": {"user": np.repeat(np.arange(60), 2)}}})


def test_methods_are_compared_over_the_seeds_and_rows_that_both_have(study):
    better, same = compare(study, "toy")
    assert (better.method, better.reference, better.seeds, same.method) == (
        "better",
        "uniform",
        [0, 1, 2],
        "same",
    )

    values = {
        m: [
            run.test["alpha"]["0.0"]["item_match"]["ndcg@10"]
            for run in study.runs
            if run.method == m
        ]
        for m in ("better", "uniform")
    }
    assert better.mean == pytest.approx(np.mean(values["better"])) and better.sd == pytest.approx(
        np.std(values["better"], ddof=1)
    )
    assert better.relative == pytest.approx(
        np.mean(values["better"]) / np.mean(values["uniform"]) - 1
    )

    by_row = {
        m: np.mean([ndcg(run.ranks["test"]) for run in study.runs if run.method == m], axis=0)
        for m in values
    }
    expected = bootstrap_over_users(
        by_row["better"] - by_row["uniform"], np.repeat(np.arange(60), 2)
    )
    assert (
        better.low,
        better.high,
        better.users_p,
    ) == expected and better.low < better.mean - better.reference_mean < better.high
    assert [c.users_holm for c in (better, same)] == holm([better.users_p, same.users_p])
    assert [c.seeds_holm for c in (better, same)] == holm(
        [better.seeds_p, same.seeds_p]
    ) and better.seeds_p == pytest.approx(0.1)
    assert better.significant and not same.significant


def test_exact_lists_are_compared_with_exact_lists(study):
    """On their own rows and at their own α: two seeds have exact lists of the first 40 rows."""
    rows, figures, runs = np.arange(40, dtype=np.int32), {}, []
    for run in study.runs:
        if run.seed < 2 and run.method != "same":
            rank = np.where(rows % 3 == run.seed, 1, 2 if run.method == "better" else 0)
            exact = Ranks(rows, rank.astype(np.int32), np.ones(40))
            figures[run.name] = float(ndcg(exact).mean())
            alphas = {"0.1": {"item_match": {"ndcg@10": figures[run.name]}}}  # α = 0 is not there
            run = replace(run, exact={"alpha": alphas}, ranks=run.ranks | {"exact": exact})
        runs.append(run)
    users = {"test": study.rows["toy"]["test"], "exact": {"user": np.repeat(np.arange(20), 2)}}
    both = replace(study, runs=runs, rows={"toy": users})

    (better,) = compare(both, "toy", "exact")
    assert (better.method, better.seeds) == ("better", [0, 1])
    assert better.mean == pytest.approx(np.mean([figures["better-0"], figures["better-1"]]))
    gained = better.mean - better.reference_mean
    assert gained == pytest.approx(
        1 / np.log2(3) * np.mean(rows % 3 == 2)
        + 0.5 / np.log2(3) * (np.mean(rows % 3 == 0) + np.mean(rows % 3 == 1))
    )
    assert better.low < gained < better.high and better.users_holm == better.users_p
    assert [c.seeds for c in compare(both, "toy")] == [[0, 1, 2]] * 2


def test_a_single_seed_has_no_test_over_seeds_and_unfinished_runs_have_none(study):
    one_seed = replace(
        study, runs=[run for run in study.runs if run.method != "better" or run.seed == 0]
    )
    better = compare(one_seed, "toy")[0]
    assert (better.method, better.seeds) == ("better", [0])
    assert better.seeds_p is None and better.seeds_holm is None and better.sd is None
    assert better.low < better.mean - better.reference_mean < better.high
    unfinished = [
        replace(run, state="unfinished") if (run.method, run.seed) == ("better", 2) else run
        for run in study.runs
    ]
    assert compare(replace(study, runs=unfinished), "toy")[0].seeds == [0, 1]
    assert (
        compare(replace(study, runs=[run for run in study.runs if run.method != "uniform"]), "toy")
        == []
    )
    assert compare(study, "another") == []


def test_without_ranks_there_is_the_test_over_seeds_alone(study):
    runs = [replace(run, ranks={}) if run.method == "better" else run for run in study.runs]
    better, same = compare(replace(study, runs=runs), "toy")
    assert (
        better.users_p is None
        and better.users_holm is None
        and not better.significant
        and better.seeds_holm is not None
    )
    assert same.users_holm == same.users_p  # the only one that is corrected


def test_another_baseline_may_be_named_one_that_does_not_generate_too(study):
    compared = compare(replace(study, reference="better"), "toy")
    assert [(c.method, c.reference) for c in compared] == [
        ("uniform", "better"),
        ("same", "better"),
    ]
    sequential = [
        replace(run, backbone="", method="SASRec", settings={"recommender": "sasrec"})
        for run in study.runs[:3:2]
    ]
    sequential = [replace(run, seed=seed) for seed, run in enumerate(sequential)]
    compared = compare(replace(study, runs=[*study.runs, *sequential], reference="SASRec"), "toy")
    assert [(c.method, c.reference, c.seeds) for c in compared] == [
        (m, "SASRec", [0, 1]) for m in ("uniform", "better", "same")
    ]
    values = [run.test["alpha"]["0.0"]["item_match"]["ndcg@10"] for run in sequential]
    assert compared[0].reference_mean == pytest.approx(np.mean(values))


def test_backbones_are_not_compared_with_each_other(study):
    runs = [replace(run, backbone="other") if run.method == "better" else run for run in study.runs]
    assert [c.method for c in compare(replace(study, runs=runs), "toy")] == ["same"]
