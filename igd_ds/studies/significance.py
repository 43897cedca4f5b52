"""Statistics of a difference between two methods.

Means and standard deviations over seeds, the Mann–Whitney U test and Student's t over seeds, the
paired bootstrap over users, and Holm's correction. Letters in shapes:
R rows, S seeds, U users.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import scipy.stats

from igd_ds.evaluation.metrics import HEADLINE
from igd_ds.studies.report.study import METRIC, Ranks, Run, Study
from igd_ds.studies.rounding import mean_sd, on_grid, significant

LEVEL = 0.05
RESAMPLES = 9999
PERMUTATIONS = 99_999
"""Permutations of the seeds in the U test; up to 9 against 9 seeds these are all of them."""
NORMAL_95 = 1.96
"""Standard errors on each side of the mean that hold 95 % of a normal distribution."""
CUTOFF = 10
"""The k of the NDCG@k that is tested, as METRIC says."""


class Bootstrap(NamedTuple):
    """The 95 % interval of a difference of means, and the two-sided p."""

    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """A method compared with the reference of its dataset and backbone.

    The figure is NDCG@10 (item match) on test at `Run.alpha_of`, over the seeds that both have.

    Attributes:
        relative: improvement of the mean over the reference, 0.1 for 10 %.
        seeds_p: p of the Mann–Whitney U test over seeds; None for one seed.
        seeds_smallest_p: the smallest p that so few seeds can give.
        low, high, users_p: interval and p of the paired bootstrap over users; None where the ranks
            of the rows are unknown or all rows belong to one user.
        seeds_holm, users_holm: the p values corrected over the comparisons of one dataset.
    """

    dataset: str
    backbone: str
    method: str
    reference: str
    seeds: list[int]
    mean: float
    sd: float | None
    reference_mean: float
    reference_sd: float | None
    relative: float | None
    seeds_p: float | None
    seeds_smallest_p: float | None
    low: float | None = None
    high: float | None = None
    users_p: float | None = None
    seeds_holm: float | None = None
    users_holm: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the corrected p of the bootstrap is below LEVEL; tables mark it with a star."""
        return self.users_holm is not None and self.users_holm < LEVEL


def relative(value: float, reference: float) -> float | None:
    """Return value / reference − 1, or None where the reference is 0."""
    return value / reference - 1 if reference else None


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the two-sided p of the Mann–Whitney U test, and the smallest p of such samples.

    The test is exact, ties included: it goes through all ways to distribute the ranks, up to
    PERMUTATIONS of them. Three against three values give 0.1 at best.
    """
    ranks = scipy.stats.rankdata([*first, *second])
    tested = scipy.stats.permutation_test(
        (ranks[: len(first)], ranks[len(first) :]),
        lambda first, second, axis: first.sum(axis),
        permutation_type="independent",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        rng=np.random.default_rng(0),
    )
    return float(tested.pvalue), 2 / math.comb(len(ranks), len(first))


def interval_over_seeds(difference: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean difference of two ways of training, for other seeds.

    It is that of Student's t, which takes the differences for normally distributed. All seeds are
    ranked on the same rows, so it says nothing about other users.

    Args:
        difference: (S,) float64, one for each pair of trainings with the same seed.

    Returns:
        The interval; None for one seed.
    """
    if len(difference) < 2:
        return None
    mean, quantile = difference.mean(), scipy.stats.t.ppf(1 - LEVEL / 2, len(difference) - 1)
    half = quantile * difference.std(ddof=1) / math.sqrt(len(difference))
    return float(mean - half), float(mean + half)


def bootstrap_over_users(difference: np.ndarray, user: np.ndarray) -> Bootstrap | None:
    """Return interval and p of the mean of `difference`, from resamples of the users.

    A user is resampled with all rows, because the rows of a user are not independent. p is twice
    the share of resamples on the other side of 0, and at least 2 / (RESAMPLES + 1). The random
    numbers are seeded. The differences are rounded to 2⁻³², which makes their sums exact: equal
    input gives equal numbers on every CPU, and a resample without a difference counts as 0.

    Args:
        difference: (R,) float64, between −1 and 1.
        user: (R,) the user of each row.

    Returns:
        The percentile interval and p; None if all rows belong to one user.
    """
    users, index = np.unique(user, return_inverse=True)
    if len(users) < 2:
        return None
    difference = on_grid(difference)
    if not difference.any():
        return Bootstrap(0.0, 0.0, 1.0)

    total, count = np.bincount(index, difference), np.bincount(index).astype(float)
    found = scipy.stats.bootstrap(
        (total, count),
        lambda total, count, axis: total.sum(axis) / count.sum(axis),
        n_resamples=RESAMPLES,
        paired=True,
        vectorized=True,
        method="percentile",
        batch=500,
        rng=np.random.default_rng(0),
    )

    means = found.bootstrap_distribution
    other_side = 1 + min(np.sum(means <= 0), np.sum(means >= 0))
    interval = found.confidence_interval
    return Bootstrap(
        float(interval.low), float(interval.high), float(min(1, 2 * other_side / (RESAMPLES + 1)))
    )


def standard_error(values: np.ndarray, user: np.ndarray) -> float | None:
    """Return the standard error of the mean of `values`, as an estimate for other users.

    The rows of a user are not independent, so the error is that of a ratio of two sums over users:
    the values and the number of rows. With one row per user it is s / √U. All sums are exact.

    Args:
        values: (R,) float64.
        user: (R,) the user of each row.

    Returns:
        The standard error with six significant digits; None if all rows belong to one user.
    """
    users, index = np.unique(user, return_inverse=True)
    if len(users) < 2:
        return None
    values = on_grid(values)
    residual = np.bincount(index, values) - np.bincount(index) * math.fsum(values) / len(values)
    variance = math.fsum(residual**2) * len(users) / (len(users) - 1)
    return significant(math.sqrt(variance) / len(values))


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's step-down correction of some p values, in their order.

    The k-th smallest of m values is multiplied by m − k + 1; the result is at least the one before
    it and at most 1.

    Example:
        >>> holm([0.01, 0.04])
        [0.02, 0.04]
    """
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(np.asarray(p, dtype=float)[order] * np.arange(len(p), 0, -1))
    restored: list[float] = np.minimum(corrected, 1)[np.argsort(order, kind="stable")].tolist()
    return restored


def holm_of_known(p: Sequence[float | None]) -> list[float | None]:
    """Return Holm's correction of the p values that there are; None stays None."""
    corrected = iter(holm([value for value in p if value is not None]))
    return [None if value is None else next(corrected) for value in p]


def hit(ranks: Ranks) -> np.ndarray:
    """Return the HR@10 (item match) of each row (R,), float64; 0 where no hit is listed."""
    return np.where((ranks.rank > 0) & (ranks.rank <= CUTOFF), ranks.credit, 0.0)


def ndcg(ranks: Ranks) -> np.ndarray:
    """Return the NDCG@10 (item match) of each row (R,), float64; 0 where no hit is listed."""
    return hit(ranks) / np.log2(np.maximum(ranks.rank, 1) + 1)


@functools.lru_cache(maxsize=64)  # tables and figures ask for the same ones
def compare(study: Study, dataset: str, lists: str = "test") -> list[Comparison]:
    """Compare each tested method of a dataset with the reference on the same rows and seeds.

    The reference is the one of the method's own backbone, or a baseline. With one seed in common
    there is no test over seeds; the bootstrap over users then speaks of these two trainings. The p
    values are corrected over all comparisons of the dataset.

    Args:
        study: the runs.
        dataset: its name.
        lists: "test", or "exact" for the exact lists of test.
    """
    found: list[Comparison] = []
    tested = [
        run
        for run in study.runs
        if (run.dataset, run.state) == (dataset, "finished") and getattr(run, lists)
    ]
    users = study.rows.get(dataset, {}).get(lists, {}).get("user")

    for backbone in dict.fromkeys(run.backbone for run in tested if not run.is_baseline):
        comparable = [run for run in tested if run.is_baseline or run.backbone == backbone]
        reference = {run.seed: run for run in comparable if run.method == study.reference}
        by_method: dict[str, dict[int, Run]] = {}
        for run in comparable:
            if not run.is_baseline and run.method != study.reference:
                by_method.setdefault(run.method, {})[run.seed] = run
        for by_seed in by_method.values():
            seeds = sorted(by_seed.keys() & reference.keys())
            if seeds:
                pairs = [by_seed[seed] for seed in seeds], [reference[seed] for seed in seeds]
                found.append(compare_runs(*pairs, users, lists))

    seeds_holm = holm_of_known([c.seeds_p for c in found])
    users_holm = holm_of_known([c.users_p for c in found])
    return [
        replace(c, seeds_holm=of_seeds, users_holm=of_users)
        for c, of_seeds, of_users in zip(found, seeds_holm, users_holm, strict=True)
    ]


def compare_runs(
    runs: Sequence[Run], reference: Sequence[Run], users: np.ndarray | None, lists: str
) -> Comparison:
    """Compare the runs of one method with the reference's runs of the same seeds.

    Args:
        runs: the method's runs.
        reference: the reference's runs, in the same order of seeds.
        users: (R,) the user of each row of test; None where they are unknown.
        lists: "test" or "exact".
    """
    values, others = tested_figures(runs, lists), tested_figures(reference, lists)
    (mean, sd), (reference_mean, reference_sd) = mean_sd(values), mean_sd(others)
    seeds_p, seeds_smallest_p = mann_whitney(values, others) if len(runs) > 1 else (None, None)

    bootstrap = None
    if users is not None and all(lists in run.ranks for run in (*runs, *reference)):
        difference = mean_by_row(runs, lists) - mean_by_row(reference, lists)
        bootstrap = bootstrap_over_users(difference, users)

    return Comparison(
        dataset=runs[0].dataset,
        backbone=runs[0].backbone,
        method=runs[0].method,
        reference=reference[0].method,
        seeds=[run.seed for run in runs],
        mean=mean,
        sd=sd,
        reference_mean=reference_mean,
        reference_sd=reference_sd,
        relative=relative(mean, reference_mean),
        seeds_p=seeds_p,
        seeds_smallest_p=seeds_smallest_p,
        low=bootstrap.low if bootstrap else None,
        high=bootstrap.high if bootstrap else None,
        users_p=bootstrap.p if bootstrap else None,
    )


def tested_figures(runs: Sequence[Run], lists: str) -> list[float]:
    """Return METRIC of the lists of each run, at the α that they are reported at."""
    return [getattr(run, lists)["alpha"][run.alpha_of(lists)][HEADLINE][METRIC] for run in runs]


def mean_by_row(runs: Sequence[Run], lists: str) -> np.ndarray:
    """Return the NDCG@10 (item match) of each test row (R,), float64, as a mean over the runs."""
    mean: np.ndarray = np.mean([ndcg(run.ranks[lists]) for run in runs], axis=0)
    return mean
