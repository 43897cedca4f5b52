"""What a difference between two methods is worth: mean ± sd over seeds, Mann–Whitney U over seeds, bootstrap over users, Holm.

Letters in shapes: R rows, U users.
"""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import scipy.stats

from igd_ds.studies.report.study import METRIC, Run, Study

LEVEL = 0.05
RESAMPLES = 9999
PERMUTATIONS = 99_999  # of seeds; all of them up to 9 against 9
CUTOFF = 10  # of the NDCG that is tested, as METRIC says


@dataclass(frozen=True)
class Comparison:
    """A method against the baseline of its dataset and backbone: NDCG@10 on test at `Run.alpha`, over the seeds both have.

    `relative` is the improvement of the mean. `seeds_p` is of Mann–Whitney's U over seeds, `seeds_smallest_p` the smallest one
    that so few seeds can give. `low`, `high` and `users_p` are of the paired bootstrap over users: the difference's 95 % interval
    and p; None where the rows' ranks are not known or of one user. `*_holm` are corrected over the comparisons of one dataset.
    """

    dataset: str
    backbone: str
    method: str
    baseline: str
    seeds: list[int]
    mean: float
    sd: float
    baseline_mean: float
    baseline_sd: float
    relative: float | None
    seeds_p: float
    seeds_smallest_p: float
    low: float | None = None
    high: float | None = None
    users_p: float | None = None
    seeds_holm: float | None = None
    users_holm: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the corrected p of the bootstrap over users is below LEVEL: what a table's star says."""
        return self.users_holm is not None and self.users_holm < LEVEL


def mean_sd(values: list[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation (n − 1); None for the latter of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def relative(value: float, baseline: float) -> float | None:
    """Return value / baseline − 1, None where the baseline is 0."""
    return value / baseline - 1 if baseline else None


def mann_whitney(first: list[float], second: list[float]) -> tuple[float, float]:
    """Return the two-sided p of Mann–Whitney's U, and the smallest p that samples of these sizes can give.

    Exact, ties included: over all ways to deal the ranks, up to PERMUTATIONS. Three against three give 0.1 at best.
    """
    ranks = scipy.stats.rankdata([*first, *second])
    p = scipy.stats.permutation_test(
        (ranks[: len(first)], ranks[len(first) :]), lambda first, second, axis: first.sum(axis), permutation_type="independent",
        vectorized=True, n_resamples=PERMUTATIONS, rng=np.random.default_rng(0),
    ).pvalue  # fmt: skip
    return float(p), 2 / math.comb(len(ranks), len(first))


def bootstrap_over_users(
    difference: np.ndarray, user: np.ndarray
) -> tuple[float, float, float] | None:
    """Return (low, high, p) of the mean of `difference` (R,): the 95 % percentile interval and a two-sided p.

    Users are resampled, each with all its rows, as a user's rows are not independent. p is twice the share of resamples on the
    other side of 0, at least 2 / (RESAMPLES + 1). Seeded: equal input gives equal numbers. None of a single user, who tells
    nothing about others.
    """
    users, index = np.unique(user, return_inverse=True)
    if len(users) < 2:
        return None
    total, count = np.bincount(index, difference), np.bincount(index).astype(float)
    if not difference.any():
        return 0.0, 0.0, 1.0
    found = scipy.stats.bootstrap(
        (total, count), lambda total, count, axis: total.sum(axis) / count.sum(axis), n_resamples=RESAMPLES, paired=True,
        vectorized=True, method="percentile", batch=500, rng=np.random.default_rng(0),
    )  # fmt: skip
    means = found.bootstrap_distribution
    other_side = 1 + min(np.sum(means <= 0), np.sum(means >= 0))
    return (
        float(found.confidence_interval.low),
        float(found.confidence_interval.high),
        float(min(1, 2 * other_side / (RESAMPLES + 1))),
    )


def holm(p: list[float]) -> list[float]:
    """Return Holm's step-down correction: the k-th smallest of m p times m − k + 1, at least the one before it, at most 1."""
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(np.asarray(p, dtype=float)[order] * np.arange(len(p), 0, -1))
    return np.minimum(corrected, 1)[np.argsort(order, kind="stable")].tolist()


def ndcg(rank: np.ndarray) -> np.ndarray:
    """Return each row's NDCG@10 (R,) from its target's rank, 0 where it is not listed."""
    listed = (rank > 0) & (rank <= CUTOFF)
    return np.where(listed, 1 / np.log2(np.where(listed, rank, 1) + 1), 0.0)


@functools.lru_cache(maxsize=64)  # tables and figures ask for the same ones
def compare(study: Study, dataset: str) -> list[Comparison]:
    """Return each tested method of a dataset against the study's baseline on the same rows and seeds, corrected over all of them.

    The baseline is of the method's own backbone, or a recommender that does not generate. A method with one seed in common with
    it is left out: there is no test of one run against one.
    """
    found, tested = (
        [],
        [run for run in study.runs if (run.dataset, run.state) == (dataset, "finished")],
    )
    for backbone in dict.fromkeys(run.backbone for run in tested if not run.is_baseline):
        comparable = [run for run in tested if run.is_baseline or run.backbone == backbone]
        baseline = {run.seed: run for run in comparable if run.method == study.baseline}
        by_method = {}
        for run in comparable:
            if not run.is_baseline and run.method != study.baseline:
                by_method.setdefault(run.method, {})[run.seed] = run
        for by_seed in by_method.values():
            seeds = sorted(by_seed.keys() & baseline.keys())
            if len(seeds) > 1:
                users = study.rows.get(dataset, {}).get("test", {}).get("user")
                found.append(
                    compare_runs([by_seed[s] for s in seeds], [baseline[s] for s in seeds], users)
                )
    seeds = holm([c.seeds_p for c in found])
    users = iter(holm([c.users_p for c in found if c.users_p is not None]))
    return [
        replace(c, seeds_holm=p, users_holm=None if c.users_p is None else next(users))
        for c, p in zip(found, seeds, strict=True)
    ]


def compare_runs(runs: list[Run], baseline: list[Run], users: np.ndarray | None) -> Comparison:
    """Return the comparison of one method's runs with the baseline's of the same seeds; `users` (R,) are those of the rows."""
    values, others = (
        [run.test["alpha"][run.alpha]["token_match"][METRIC] for run in side]
        for side in (runs, baseline)
    )
    (mean, sd), (baseline_mean, baseline_sd) = mean_sd(values), mean_sd(others)
    low, high, users_p = None, None, None
    if users is not None and all("test" in run.ranks for run in (*runs, *baseline)):
        by_row = [
            np.mean([ndcg(run.ranks["test"][1]) for run in side], axis=0)
            for side in (runs, baseline)
        ]
        low, high, users_p = bootstrap_over_users(by_row[0] - by_row[1], users) or (
            None,
            None,
            None,
        )
    return Comparison(
        runs[0].dataset, runs[0].backbone, runs[0].method, baseline[0].method, [run.seed for run in runs], mean, sd,
        baseline_mean, baseline_sd, relative(mean, baseline_mean), *mann_whitney(values, others), low, high, users_p,
    )  # fmt: skip
