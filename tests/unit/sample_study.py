"""A study made by hand with the shapes of real ones, for tests of figures and pages."""

import numpy as np

from igd_ds.evaluation import metrics
from igd_ds.studies.report.study import Ranks, Run, Study

STEPS = np.arange(20, 1001, 20)
CUTOFFS = (1, 3, 5, 10)
NUM_ROWS = 300
ROWS = np.arange(NUM_ROWS, dtype=np.int32)
GROUPS = {
    "row": ROWS,
    "user": ROWS.astype(np.int64) // 2,
    "head": (ROWS % 3 > 0).astype(float),
    "cold": ROWS % 5 == 0,
    "history": 1 + ROWS % 10,
}
CATALOGUE = {
    "kind": "text",
    "items": 1234,
    "train_rows": 20_000,
    "valid_rows": 1500,
    "test_rows": 1500,
    "target_tokens": 200_000,
    "zero_ig_tokens": 120_000,
    "zero_ig_share": 0.6,
    "mean_length": 9.1,
    "median_length": 8.0,
    "max_length": 30,
    "nodes": 9000,
    "cold_item_share": 0.1,
    "test_unseen_share": 0.2,
    "forced_share": 0.5,
    "cold_items": 123,
    "mean_ig": 0.1,
    "root_entropy": 6.0,
    "filtering_ratio": [0.99, 0.8, 0.5, 0.2],
    "token_purity_gain": [0.01, 0.2, 0.6, 0.95],
    "purity_gain_by_token": np.geomspace(0.95, 0.001, 100).tolist(),
    "quantizer": None,
}


def matches(random, level: float) -> dict[str, float]:
    values = {}
    for k in CUTOFFS:
        hit = level * (1 + np.log(k)) * random.normal(1, 0.03)
        values |= {f"hr@{k}": float(hit), f"ndcg@{k}": float(hit * (0.5 + 0.5 / k))}
    return values


def results(random, split: str, level: float, alphas=("0.0",)) -> dict:
    """A metrics.json: lists that are less decided than the targets, less so the larger α."""
    steps = np.arange(8)
    items = (NUM_ROWS * np.exp(-steps / 3)).astype(int).tolist()
    target = 4 * np.exp(-steps)
    found = {
        "split": split,
        "dataset": "toys",
        "rows": NUM_ROWS,
        "num_rows": 0,
        "seed": 0,
        "num_beams": 10,
        "length_penalty": 0.0,
        "leaves": 1234,
        "cold_targets": 300,
        "head_targets": 900.0,
        "popularity_baseline": matches(random, 0.02),
        "target_popularity_deciles": [0.4, 0.2, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03, 0.02, 0.02],
        "alpha": {},
        "target_prefix_entropy": {"nats": target.tolist(), "items": items},
    }

    for alpha in alphas:
        shares = np.array(
            [0.55, 0.2, 0.08, 0.05, 0.04, 0.03, 0.02, 0.01, 0.01, 0.01]
        ) * random.normal(1, 0.05, 10)
        best = level * (1 + 0.2 * float(alpha) - 0.6 * float(alpha) ** 2)
        found["alpha"][alpha] = {
            "token_match": matches(random, best),
            "item_match": matches(random, best * 0.98),
            "token_match_warm_targets": matches(random, best * 1.2),
            "token_match_cold_targets": matches(random, best * 0.1),
            "token_match_head_targets": matches(random, best * 1.5),
            "token_match_tail_targets": matches(random, best * 0.4),
            "first_token_repetition": 0.4 - 0.2 * float(alpha),
            "score_entropy_bits": 2.6 + 0.5 * float(alpha),
            "cold_share_of_listed": 0.02,
            "popularity_deciles": (shares / shares.sum()).tolist(),
            "coverage": 0.4,
            "gini_index": 0.8,
            "prefix_entropy": {
                "nats": (target + (0.4 - 0.5 * float(alpha)) * np.exp(-steps / 2)).tolist(),
                "items": items,
            },
        }
    return found


def curve(random, begin: float, end: float, speed: float = 3.0) -> list:
    values = (
        end
        + (begin - end) * np.exp(-speed * STEPS / STEPS[-1])
        + random.normal(0, 0.02 * begin, len(STEPS))
    )
    return [[int(step), float(value)] for step, value in zip(STEPS, values, strict=True)]


def curves(random, settings: dict) -> dict[str, list]:
    beta = settings.get("igd_beta", 1.0)
    found = {
        "train/loss": curve(random, 5, 2),
        "train/nll_zero_gain": curve(random, 3, 0.4 / beta**0.3),
        "train/nll_nonzero_gain": curve(random, 6, 4 + 0.2 * beta),
        "valid/nll": curve(random, 30, 20)[9::10],
        "valid/nll_gain_zero": curve(random, 2, 0.3)[9::10],
        **{
            f"valid/nll_gain_{decile}": curve(random, 3, 0.8 + 0.5 * decile)[9::10]
            for decile in range(10)
        },
    }
    if settings.get("objective") == "multi-target":
        share = STEPS / STEPS[-1] / 2
        found |= {
            "train/alpha_fg": [
                [int(s), float(0.5 - v / 2)] for s, v in zip(STEPS, share, strict=True)
            ],
            "train/alpha_fr": [[int(s), float(v)] for s, v in zip(STEPS, share, strict=True)],
            "train/alpha_or": [
                [int(s), float(0.5 - v / 2)] for s, v in zip(STEPS, share, strict=True)
            ],
        }

    return found


def listed(random, level: float) -> Ranks:
    """Ranks of drawn rows; every fifth hit shares its path with another item."""
    hit, drawn = random.random(NUM_ROWS) < 3 * level, random.integers(1, 11, NUM_ROWS)
    credit = np.where(np.arange(NUM_ROWS) % 5, 1, 0.5)
    return Ranks(ROWS, np.where(hit, drawn, 0).astype(np.int32), hit * credit)


def run(
    random, dataset: str, method: str, settings: dict, seed: int, level: float, **changes
) -> Run:
    """A finished run; `changes` of its fields make it another kind."""
    group, is_baseline = f"{dataset}-{method}".replace(" ", "-"), "recommender" in settings
    valid = results(
        random, "valid", level, ("0.0",) if is_baseline else ("0.0", "0.1", "0.2", "0.3", "0.4")
    )
    test = results(random, "test", level, sorted({"0.0", metrics.best_alpha(valid)}, key=float))
    fields = {
        "name": f"{group}-{seed}",
        "dataset": dataset,
        "backbone": "" if is_baseline else "qwen2 1M",
        "method": method,
        "group": group,
        "seed": seed,
        "state": "finished",
        "settings": settings | {"seed": seed, "dataset": dataset},
        "valid": valid,
        "test": test,
        "curves": {"valid/ndcg@10": curve(random, 0.0, level)[9::10]}
        if is_baseline
        else curves(random, settings),
        "seconds": float(random.uniform(100, 400)),
        "eval_seconds": float(random.uniform(10, 40)),
        "world_size": 1,
        "ranks": {split: listed(random, level) for split in ("valid", "test")},
    }

    return Run(**fields | changes)


def make(seeds: int = 3) -> Study:
    """Return two datasets: one with a grid of β, one with the objectives of semantic IDs."""
    random, runs = np.random.default_rng(0), []

    for seed in range(seeds):
        runs.append(run(random, "books-small", "uniform", {"objective": "uniform"}, seed, 0.03))
        for beta in (0.08, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
            settings = {"objective": "igd", "igd_beta": beta}
            tested = {} if beta == 0.2 else {"state": "no test", "test": None}
            runs.append(
                run(
                    random,
                    "books-small",
                    f"igd β={beta}",
                    settings,
                    seed,
                    0.04 - abs(beta - 0.25) / 30,
                    **tested,
                )
            )
        for method, settings, level in (
            ("igd-linear β=0.4", {"objective": "igd-linear", "igd_beta": 0.4}, 0.035),
            ("position", {"objective": "position"}, 0.031),
            ("cft", {"objective": "cft"}, 0.033),
            ("popularity", {"recommender": "popularity"}, 0.012),
            ("SASRec", {"recommender": "sasrec"}, 0.028),
        ):
            runs.append(run(random, "books-small", method, settings, seed, level))
        for method, settings, level in (
            ("uniform", {"objective": "uniform"}, 0.05),
            ("frequency", {"objective": "frequency"}, 0.052),
            ("multi-target", {"objective": "multi-target"}, 0.053),
            (
                "multi-target + curriculum cT=2",
                {"objective": "multi-target", "curriculum_cT": 2.0},
                0.056,
            ),
            (
                "multi-target + curriculum cT=4",
                {"objective": "multi-target", "curriculum_cT": 4.0},
                0.054,
            ),
            ("LRURec", {"recommender": "lrurec"}, 0.045),
        ):
            runs.append(run(random, "instruments", method, settings, seed, level))
    catalogues = {name: CATALOGUE | {"dataset": name} for name in ("books-small", "instruments")}
    catalogues["instruments"] |= {
        "filtering_ratio": [0.995, 0.9, 0.6, 0.3],
        "purity_gain_by_token": np.linspace(0.9, 0.0, 50).tolist(),
    }
    return Study(
        "a sample study",
        "20 runs of 5 minutes each.",
        runs,
        catalogues,
        rows={name: {"valid": GROUPS, "test": GROUPS} for name in catalogues},
        environment={"torch": "2.9", "python": "3.11", "cpus": "2", "gpu": "None"},
    )
