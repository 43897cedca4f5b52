"""Compare two ways of ranking on the same rows: the difference and how sure it is.

    igd compare RUN/eval/A [RUN/eval/A ...] --against RUN/eval/B [RUN/eval/B ...] --dataset DATASET
        [--alpha ALPHA] [--against_alpha ALPHA] [--common_rows] [--mean_over users] [--json]

Each folder is one evaluation (igd eval). Several on a side are seeds: the first of one side belongs
to the first of the other. For HR@10 and NDCG@10 (item match) it prints the mean of both sides ±
their standard deviation over seeds, the difference of the means, its 95 % interval from a paired
bootstrap over users, and p. With several seeds the values of a row are averaged over them first, so
this interval speaks of other users and of these trainings. A second interval speaks of other
trainings on the same rows: that of Student's t over the differences of the seeds. A user with many
rows can decide a mean over rows; with --mean_over users, every user counts the same.
"""

import argparse
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from igd_ds import distributed
from igd_ds.config.options import FlagParser
from igd_ds.data.dataset import SPLITS, InteractionDataset
from igd_ds.errors import UsageError
from igd_ds.evaluation.metrics import HEADLINE
from igd_ds.folders import read_json_object
from igd_ds.studies.report.dataset_details import target_ranks
from igd_ds.studies.report.run_files import fingerprint_of
from igd_ds.studies.report.study import Ranks
from igd_ds.studies.rounding import mean_sd
from igd_ds.studies.significance import bootstrap_over_users, hit, interval_over_seeds, ndcg

MEASURES = {"hr@10": hit, "ndcg@10": ndcg}
MEAN_OVER = ("rows", "users")

Json = dict[str, Any]


class Side(NamedTuple):
    """What is compared of one evaluation."""

    split: str
    ranks: Ranks


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = FlagParser(
        prog="igd compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "first", nargs="+", type=Path, metavar="EVALUATION", help="RUN/eval/NAME, one per seed"
    )
    parser.add_argument(
        "--against", nargs="+", type=Path, metavar="EVALUATION", required=True,
        help="what it is compared with, in the same order of seeds",
    )  # fmt: skip
    parser.add_argument("--dataset", required=True, help="the dataset folder of the evaluations")
    parser.add_argument("--alpha", type=float, help="needed where an evaluation has several α")
    parser.add_argument(
        "--against_alpha", type=float, help="the α of --against, if it is another one"
    )
    parser.add_argument(
        "--common_rows",
        action="store_true",
        help="compare on the rows that all evaluations have, where some ranked a sample",
    )
    parser.add_argument(
        "--mean_over",
        choices=MEAN_OVER,
        default="rows",
        help="what counts the same in a mean: every row, or every user (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    args = parser.parse_args(argv)
    if len(args.first) != len(args.against):
        raise UsageError(
            f"{len(args.first)} evaluations are compared with {len(args.against)} (--against): "
            "give as many, in the same order of seeds"
        )
    return args


def read_metrics(folder: Path) -> Json:
    """Return the metrics.json of an evaluation; raise UsageError if there is none."""
    path = folder / "metrics.json"
    metrics = read_json_object(path, "give the folder of a finished evaluation, RUN/eval/NAME")
    alphas, split = metrics.get("alpha"), metrics.get("split")
    if not isinstance(alphas, dict) or not alphas or split not in SPLITS:
        raise UsageError(f"{path} lacks the split or the α of an evaluation: evaluate again")
    return metrics


def chosen_alpha(folder: Path, metrics: Json, flag: str, alpha: float | None) -> str:
    """Return an α of an evaluation as its files name it.

    Args:
        folder: of the evaluation.
        metrics: its metrics.json.
        flag: what chooses the α.
        alpha: its value; None if it is not given.

    Raises:
        UsageError: it has no such α, or several and none is chosen.
    """
    known = ", ".join(metrics["alpha"])
    if alpha is None:
        if len(metrics["alpha"]) > 1:
            raise UsageError(f"{folder} has the α {known}: choose one with {flag}")
        return str(next(iter(metrics["alpha"])))
    found = [name for name in metrics["alpha"] if name == str(alpha)]
    if not found:
        raise UsageError(f"{flag} {alpha:g}: {folder} has the α {known}")
    return str(found[0])


def check_dataset(folder: Path, metrics: Json, dataset: InteractionDataset) -> None:
    """Raise UsageError unless an evaluation ranked the rows of this dataset."""
    name = dataset.info["name"]
    if metrics.get("dataset") != name:
        raise UsageError(
            f"{folder} is an evaluation on {metrics.get('dataset')!r}, --dataset is {name!r}"
        )
    if fingerprint_of(folder) not in (None, dataset.fingerprint):
        raise UsageError(
            f"{folder} is an evaluation on another dataset that is called {name!r} too: give its "
            f"folder with --dataset, not {dataset.folder}"
        )


def read_ranks(folder: Path, dataset: InteractionDataset, flag: str, alpha: float | None) -> Side:
    """Return the split of an evaluation and where the targets stand in its lists.

    Raises:
        UsageError: it is unfinished, damaged, not of this dataset, or its lists are too short.
    """
    metrics = read_metrics(folder)
    check_dataset(folder, metrics, dataset)
    chosen = chosen_alpha(folder, metrics, flag, alpha)
    path = folder / f"predictions-alpha{chosen}.parquet"
    if not path.is_file():
        raise UsageError(f"{path} is missing: evaluate again")
    try:
        ranks = target_ranks(path, dataset.splits[metrics["split"]].targets)
    except (ValueError, KeyError, IndexError, OSError) as error:  # pyarrow raises any of them
        why = " ".join(str(error).split())
        raise UsageError(f"{path}: cannot be read ({why}): evaluate again") from error

    # The measures must be those that metrics.json has of these lists.
    recorded = metrics["alpha"][chosen].get(HEADLINE, {})
    for name, measure in MEASURES.items():
        if name not in recorded:
            raise UsageError(
                f"{folder} has no {name}, because its lists are shorter: evaluate with "
                "--num_beams 10 or more"
            )
        is_whole = len(ranks.row) == metrics.get("rows")
        if not is_whole or not math.isclose(measure(ranks).mean(), recorded[name], abs_tol=1e-6):
            raise UsageError(f"{path} does not hold the lists of metrics.json: evaluate again")
    return Side(str(metrics["split"]), ranks)


def compare(
    first: Sequence[Path],
    against: Sequence[Path],
    dataset: InteractionDataset,
    alpha: float | None = None,
    against_alpha: float | None = None,
    common_rows: bool = False,
    mean_over: str = "rows",
) -> Json:
    """Compare evaluations of the same rows.

    Args:
        first: folders of one side, one per seed.
        against: folders of the other side, as many.
        dataset: the dataset that both sides ranked.
        alpha: the α to compare at; None: the only one that each evaluation has.
        against_alpha: that of the other side; None: `alpha`.
        common_rows: compare on the rows that all of them ranked.
        mean_over: one of MEAN_OVER; with "users", the values of a user's rows are averaged first.

    Returns:
        The number of `rows`, `users` and `seeds`, `mean_over`, and by name in MEASURES a dictionary
        with `first`, `against` (means over seeds), `first_sd`, `against_sd` (None for one seed),
        `difference`, `low`, `high` (95 % interval over users) and `p`, which are None if all rows
        are of one user, and `seeds_low`, `seeds_high` (95 % interval over seeds), None where each
        side has one evaluation, however often it is named.

    Raises:
        UsageError: an evaluation is unfinished, two are of different rows, or `mean_over` is none
            of MEAN_OVER.
    """
    if mean_over not in MEAN_OVER:
        raise UsageError(f"mean_over {mean_over!r}: give one of {', '.join(MEAN_OVER)}")
    folders = [*first, *against]
    found = [read_ranks(folder, dataset, "--alpha", alpha) for folder in first]
    flag = "--alpha" if against_alpha is None else "--against_alpha"
    other = alpha if against_alpha is None else against_alpha
    found += [read_ranks(folder, dataset, flag, other) for folder in against]
    if common_rows:
        found = on_common_rows(found)
    split, ranks = found[0]
    for folder, (its_split, its_ranks) in zip(folders, found, strict=True):
        if its_split != split or not np.array_equal(its_ranks.row, ranks.row):
            raise UsageError(
                f"{folders[0]} ({split}, {len(ranks.row)} rows) and {folder} ({its_split}, "
                f"{len(its_ranks.row)} rows) ranked different rows: evaluate both with the same "
                "--split, --num_rows and --seed, or add --common_rows"
            )

    users = dataset.splits[split].user_ids[ranks.row]
    result: Json = {
        "rows": len(ranks.row),
        "users": len(np.unique(users)),
        "seeds": len(first),
        "mean_over": mean_over,
    }
    has_seeds = len(set(zip(first, against, strict=True))) > 1  # not one pair, named several times
    for name, measure in MEASURES.items():
        values = np.stack([measure(its_ranks) for _, its_ranks in found])
        owners = users
        if mean_over == "users":
            values, owners = mean_by_user(values, users)
        result[name] = difference(values[: len(first)], values[len(first) :], owners, has_seeds)
    return result


def mean_by_user(values: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of each user's rows (S, U), and these users (U,) in ascending order.

    Args:
        values: (S, R) float64.
        users: (R,) the user of each row.
    """
    unique, index, rows = np.unique(users, return_inverse=True, return_counts=True)
    return np.stack([np.bincount(index, of_seed) / rows for of_seed in values]), unique


def on_common_rows(found: Sequence[Side]) -> list[Side]:
    """Return the evaluations with the rows alone that all of them ranked.

    Raises:
        UsageError: there is no such row, or they are of different splits.
    """
    splits = sorted({split for split, _ in found})
    if len(splits) > 1:
        raise UsageError(f"these evaluations ranked different splits ({', '.join(splits)})")
    rows = functools.reduce(np.intersect1d, [ranks.row for _, ranks in found])
    if not len(rows):
        raise UsageError("--common_rows: no row was ranked by all of these evaluations")
    kept = [np.isin(ranks.row, rows) for _, ranks in found]
    return [
        Side(split, Ranks(*(values[chosen] for values in ranks)))
        for (split, ranks), chosen in zip(found, kept, strict=True)
    ]


def difference(first: np.ndarray, against: np.ndarray, users: np.ndarray, has_seeds: bool) -> Json:
    """Return the entry of one measure.

    Args:
        first: (S, R) float64, a value for each seed and row, or for each seed and user.
        against: (S, R), the other side's.
        users: (R,) the user of each value.
        has_seeds: whether there are several trainings, and so an interval over seeds.
    """
    (mean, sd), (other_mean, other_sd) = (
        mean_sd(values.mean(1).tolist()) for values in (first, against)
    )
    bootstrap = bootstrap_over_users(first.mean(0) - against.mean(0), users)
    over_seeds = interval_over_seeds(first.mean(1) - against.mean(1)) if has_seeds else None
    return {
        "first": mean,
        "first_sd": sd,
        "against": other_mean,
        "against_sd": other_sd,
        "difference": mean - other_mean,
        "low": bootstrap.low if bootstrap else None,
        "high": bootstrap.high if bootstrap else None,
        "p": bootstrap.p if bootstrap else None,
        "seeds_low": over_seeds[0] if over_seeds else None,
        "seeds_high": over_seeds[1] if over_seeds else None,
    }


def print_table(result: Json) -> None:
    """Print the comparison, one line per measure."""
    seeds = result["seeds"]
    plural = "" if seeds == 1 else "s"
    counted = f"{result['rows']:,} rows of {result['users']:,} users"
    print(f"{counted}, mean over {result['mean_over']}, {seeds} evaluation{plural} on each side")
    head = (
        f"{'':<9}{'first':>15}{'against':>17}{'difference':>13}   {'95 % over users':<18}{'p':>10}"
    )
    has_seeds = any(result[name]["seeds_low"] is not None for name in MEASURES)
    print(f"{head}   95 % over seeds" if has_seeds else head)
    for name in MEASURES:
        entry = result[name]
        sides = (with_sd(entry[side], entry[f"{side}_sd"]) for side in ("first", "against"))
        line = f"{name:<9}{next(sides):>15}{next(sides):>17}{entry['difference']:>+13.4f}"
        line += f"   {interval(entry['low'], entry['high']):<18}"
        line += " " * 10 if entry["p"] is None else f"   {entry['p']:7.4f}"
        print(f"{line}   {interval(entry['seeds_low'], entry['seeds_high'])}".rstrip())


def interval(low: float | None, high: float | None) -> str:
    """Return an interval in words, empty if there is none."""
    return "" if low is None else f"{low:+.4f} to {high:+.4f}"


def with_sd(mean: float, sd: float | None) -> str:
    """Return a mean with its standard deviation, if there is one."""
    return f"{mean:.4f}" if sd is None else f"{mean:.4f} ± {sd:.4f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code.

    Raises:
        UsageError: see `compare`.
    """
    args = parse(argv)
    dataset = InteractionDataset.load(args.dataset)
    result = compare(
        args.first,
        args.against,
        dataset,
        args.alpha,
        args.against_alpha,
        args.common_rows,
        args.mean_over,
    )
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


if __name__ == "__main__":
    distributed.run(main)
