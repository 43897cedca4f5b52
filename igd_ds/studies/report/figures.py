"""The figures of both papers, and the further figures of a report, made from a `Study`.

A figure is made only where its data exist. It shows the complete runs of one dataset and backbone,
as means over seeds. `drawing` holds what all figures share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from igd_ds.evaluation.metrics import HEADLINE
from igd_ds.studies.report.drawing import (
    COLOURS,
    MISSING,
    WIDTH,
    Figure,
    Look,
    Point,
    bars,
    draw_curves,
    draw_points,
    legend,
    legend_height,
    look,
    mean_curve,
    shade,
    spread,
)
from igd_ds.studies.report.layout import unique_names
from igd_ds.studies.report.study import AT_ALPHA, REFERENCE, Json, Run, Study, lines_by
from igd_ds.studies.rounding import significant, significant_array
from igd_ds.studies.significance import Comparison, compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Lines = Mapping[str, Mapping[float, Sequence[Run]]]
"""Line → value of a setting → runs; see `lines_by`."""

SHARES = {"fg": "front-greater", "fr": "frequency", "or": "cross-entropy"}
"""The three losses of MTC, by their name in the log."""
SELECTION = ("hr@10", "ndcg@10")
"""A β is effective where both metrics are above those of the unweighted loss (IGD Appendix H)."""
LEVEL_DRAWN = f"The dashed line and its band show {REFERENCE}; points above the line are filled."
REACHED = 0.01
"""A step is shown if at least this share of the targets still has a token there."""


@dataclass(frozen=True)
class Block:
    """The complete runs that may stand in one figure.

    These are the generative runs of one dataset and backbone, and all baselines of the dataset.
    `comparisons` compare its methods with the reference.
    """

    dataset: str
    backbone: str
    runs: list[Run]
    comparisons: list[Comparison]

    def figure(
        self,
        name: str,
        title: str,
        caption: str,
        draw: Callable[[Canvas], None],
        height: float,
        entries: Collection[str] = (),
    ) -> Figure:
        """Return a figure named after its block; a legend of `entries` adds to its height."""
        block = f"{self.dataset}, {self.backbone}" if self.backbone else self.dataset
        words = f"{self.dataset} {self.backbone} {name}".lower()
        slug = re.sub(r"[^a-z0-9]+", "-", words).strip("-")
        size = (WIDTH, height + legend_height(entries))
        return Figure(slug, f"{title}: {block}", caption, draw, size)

    def tested(self, *keys: str) -> dict[str, list[Run]]:
        """Return the runs with test metrics by method, in the order of the table.

        With `keys`, only the runs whose metrics have them: those of an older version may not.
        """
        return by_method([run for run in self.runs if run.test and chosen(run).keys() >= set(keys)])

    def trained_with(self, objective: str) -> list[Run]:
        """Return the runs of an objective."""
        return [run for run in self.runs if run.objective == objective]

    @property
    def unweighted(self) -> list[Run]:
        """The runs of the unweighted loss, which β and c are compared with."""
        return [run for run in self.runs if run.method == REFERENCE]


def all_figures(study: Study) -> list[Figure]:
    """Return every figure that the study has data for, dataset by dataset."""
    made = [purity(study)] + [make(block) for block in blocks(study) for make in FIGURES]
    figures = [figure for figure in made if figure]
    names = unique_names([figure.name for figure in figures])
    return [replace(figure, name=name) for figure, name in zip(figures, names, strict=True)]


def blocks(study: Study) -> list[Block]:
    """Return a block for each dataset and backbone; a dataset with only baselines is one block."""
    found = []
    for dataset in dict.fromkeys(run.dataset for run in study.runs):
        runs = [run for run in study.runs if run.dataset == dataset and run.is_complete]
        comparisons = compare(study, dataset)
        for backbone in dict.fromkeys(run.backbone for run in runs if not run.is_baseline) or [""]:
            own = [run for run in runs if run.is_baseline or run.backbone == backbone]
            compared = [c for c in comparisons if c.backbone == backbone]
            found.append(Block(dataset, backbone, own, compared))
    return found


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs by method, in their order."""
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


def chosen(run: Run) -> Json:
    """Return the test metrics of a run at the α that it is reported at."""
    metrics: Json = run.test["alpha"][run.alpha] if run.test else {}
    return metrics


def validated(runs: Sequence[Run], metric: str) -> Point:
    """Return mean and deviation over seeds of a validation metric at α = 0."""
    return spread([run.valid["alpha"]["0.0"][HEADLINE].get(metric) for run in runs if run.valid])


def token_losses(
    block: Block,
    name: str,
    title: str,
    methods: Mapping[str, Sequence[Run]],
    looks: Sequence[Look],
) -> Figure | None:
    """Return two panels: the training loss of the tokens without gain and of those with gain."""
    tags = {
        "train/nll_zero_gain": "tokens with zero gain",
        "train/nll_nonzero_gain": "tokens with non-zero gain",
    }
    shown = [
        method for method, runs in methods.items() if all(mean_curve(runs, tag) for tag in tags)
    ]
    if not shown:
        return None

    def draw(figure: Canvas) -> None:
        for axes, (tag, what) in zip(figure.subplots(1, 2), tags.items(), strict=True):
            draw_curves(axes, {method: (methods[method], tag) for method in shown}, looks)
            axes.set_title(what)
            axes.set_ylabel("training loss (nats per token)")
        legend(figure)

    caption = (
        "Unweighted training loss of the target tokens whose information gain is zero, and of the "
        "other target tokens. The two panels have different scales."
    )
    return block.figure(name, title, caption, draw, 3.0, shown)


def improvements(block: Block) -> Figure | None:
    """Return a forest plot: each method's difference from the reference, with its interval."""
    compared = [
        (c, c.low, c.high) for c in block.comparisons if c.low is not None and c.high is not None
    ]
    if not compared:
        return None
    reference = compared[0][0].reference

    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        axes.axvline(0, color="#606060", linewidth=1)
        for position, (c, low, high) in enumerate(reversed(compared)):
            mean = significant(c.mean - c.reference_mean)
            ends = [[mean - significant(low)], [significant(high) - mean]]
            axes.errorbar(
                [mean],
                [position],
                xerr=ends,
                fmt="o",
                color=COLOURS[1],
                markerfacecolor=COLOURS[1] if c.significant else "white",
                capsize=2.5,
            )
        axes.set_yticks(range(len(compared)), [c.method for c, _, _ in reversed(compared)])
        axes.set_ylim(-0.7, len(compared) - 0.3)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"test NDCG@10 minus that of {reference}")

    caption = (
        "Mean over seeds, and the 95 % interval of the paired bootstrap over users. A filled point "
        "has p below 0.05 after Holm's correction over the methods of the dataset. "
        f"{AT_ALPHA}"
    )
    height = 0.8 + 0.25 * len(compared)
    return block.figure("improvements", f"Difference from {reference}", caption, draw, height)


def losses_by_beta(block: Block) -> Figure | None:
    """Return IGD Figures 5 and 7, over the grid of β."""
    by_beta = sorted(block.trained_with("igd"), key=lambda run: float(run.settings["igd_beta"]))
    grid = by_method(by_beta)
    unweighted = by_method(block.trained_with(REFERENCE))
    if len(grid) < 2:
        return None

    looks = [look(0) | {"color": COLOURS[2]}] * len(unweighted)
    looks += [shade(index, len(grid)) for index in range(len(grid))]
    title = "Training loss by β (IGD Figures 5, 7)"
    return token_losses(block, "loss-by-beta", title, unweighted | grid, looks)


def losses_by_objective(block: Block) -> Figure | None:
    """Return IGD Figure 2, over the objectives that were tested."""
    methods = {method: runs for method, runs in block.tested().items() if not runs[0].is_baseline}
    looks = [look(index) for index in range(len(methods))]
    title = "Training loss by objective (IGD Figure 2)"
    return token_losses(block, "loss-by-objective", title, methods, looks)


def validation_curves(block: Block) -> Figure | None:
    """Return validation NLL and NDCG over the steps."""
    methods = block.tested()
    tags = {
        tag: what
        for tag, what in {"valid/nll": "NLL (nats per item)", "valid/ndcg@10": "NDCG@10"}.items()
        if any(mean_curve(runs, tag) for runs in methods.values())
    }
    if not tags:
        return None
    looks = [look(index) for index in range(len(methods))]

    def draw(figure: Canvas) -> None:
        panels = figure.subplots(1, len(tags), squeeze=False)[0]
        for axes, (tag, what) in zip(panels, tags.items(), strict=True):
            draw_curves(axes, {method: (runs, tag) for method, runs in methods.items()}, looks)
            axes.set_ylabel(f"validation {what}")
        legend(figure)

    caption = (
        "Validation during training, up to the last step that all seeds of a method reached. NLL "
        "is unweighted, so that methods can be compared."
    )
    return block.figure("validation", "Validation over the steps", caption, draw, 3.0, methods)


def entropy_gap(block: Block) -> Figure | None:
    """Return IGD Figures 3, 6 and 8: the entropy gap between predicted and target prefixes."""
    methods = {}
    for objective in (REFERENCE, "igd"):
        runs = [
            run
            for run in block.trained_with(objective)
            if run.valid and "target_prefix_entropy" in run.valid
        ]
        groups = by_method([run for run in runs if run.test] or runs)
        if groups:  # of several β, the one that is best on validation
            best = best_method(groups)
            methods[best] = groups[best]
    if not methods:
        return None
    alphas = sorted(
        {
            alpha
            for runs in methods.values()
            for run in runs
            if run.valid
            for alpha in run.valid["alpha"]
        },
        key=float,
    )

    def draw(figure: Canvas) -> None:
        panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        for axes, (method, runs) in zip(panels, methods.items(), strict=True):
            axes.axhline(0, color="#606060", linewidth=1)
            for index, alpha in enumerate(alphas):
                gap = mean_gap(runs, alpha)
                line = shade(index, len(alphas))
                axes.plot(np.arange(1, len(gap) + 1), gap, label=f"α = {alpha}", **line)
            axes.set_title(method)
            axes.set_xlabel("tokens of the item so far")
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0].set_ylabel("entropy of predicted − of target\nprefixes (nats)")
        legend(figure)

    caption = (
        "Entropy of the items under a prefix: mean over the top 10 lists on validation minus mean "
        "over the targets, by the α of the decoding. Above 0, the lists are less decided than the "
        "targets. Steps that fewer than 1 % of the targets reach are left out."
    )
    title = "Entropy gap of the decoding (IGD Figures 3, 6, 8)"
    return block.figure("entropy-gap", title, caption, draw, 3.0, alphas)


def best_method(groups: Mapping[str, Sequence[Run]]) -> str:
    """Return the method with the best mean NDCG@10 on validation; of equal ones the first."""
    return max(groups, key=lambda method: validated(groups[method], "ndcg@10").mean)


def mean_gap(runs: Sequence[Run], alpha: str) -> np.ndarray:
    """Return the mean over runs of `gap_by_step`, nats, up to the step that all of them have."""
    gaps = [
        gap_by_step(run.valid, alpha) for run in runs if run.valid and alpha in run.valid["alpha"]
    ]
    if not gaps:
        return np.array([])
    steps = min(map(len, gaps))
    return significant_array(np.mean([gap[:steps] for gap in gaps], axis=0))


def gap_by_step(results: Json, alpha: str) -> np.ndarray:
    """Return the entropy of listed minus that of target prefixes by step, nats, float64.

    Its length is the number of steps that enough targets reach (REACHED).
    """
    listed = results["alpha"][alpha]["prefix_entropy"]["nats"]
    target = results["target_prefix_entropy"]
    items = np.array(target["items"])
    steps = min(int(np.sum(items >= REACHED * items[0])), len(listed))
    gap: np.ndarray = np.array(listed[:steps]) - np.array(target["nats"][:steps])
    return gap


def probability_by_gain(block: Block) -> Figure | None:
    """Return IGD Figure 4: log-probability of the target tokens against their information gain."""
    tags = {"zero": "valid/nll_gain_zero"} | {
        str(decile + 1): f"valid/nll_gain_{decile}" for decile in range(10)
    }
    methods = {}
    for method, runs in block.tested().items():
        # Deciles are missing where many tokens have the same gain.
        known = [tag for tag in tags.values() if all(run.curves.get(tag) for run in runs)]
        if known:
            last = {tag: spread([-run.curves[tag][-1][1] for run in runs]) for tag in known}
            methods[method] = [last.get(tag, MISSING) for tag in tags.values()]
    if not methods:
        return None

    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        for index, (method, points) in enumerate(methods.items()):
            draw_points(axes, range(len(tags)), points, index, label=method)
        axes.set_xticks(range(len(tags)), list(tags))
        axes.set_xlabel(
            "information gain of the token: zero, or decile of the non-zero gains "
            "(10: most decisive)"
        )
        axes.set_ylabel("log-probability of the\ntarget token (nats)")
        legend(figure)

    caption = (
        "Mean log-probability of the tokens of the validation targets at the last validation, by "
        "their information gain."
    )
    title = "Log-probability against information gain (IGD Figure 4)"
    return block.figure("probability-by-gain", title, caption, draw, 3.0, methods)


def sensitivity(axes: Axes, block: Block, lines: Lines, metric: str) -> None:
    """Draw a validation metric against the values of a setting.

    The unweighted loss is a dashed line with a band. Points above it are filled.
    """
    values = sorted({value for by_value in lines.values() for value in by_value})
    level, deviation = validated(block.unweighted, metric)
    if math.isfinite(level):
        axes.axhline(level, color=COLOURS[0], linestyle="--", label=REFERENCE)
        band: Look = {"color": COLOURS[0], "alpha": 0.12, "linewidth": 0}
        axes.axhspan(level - deviation, level + deviation, **band)

    for index, (line, by_value) in enumerate(lines.items(), 1):
        points = [validated(runs, metric) for runs in by_value.values()]
        positions = [values.index(value) for value in by_value]
        draw_points(axes, positions, points, index, markerfacecolor="white", label=line)
        above = {
            position: point.mean
            for position, point in zip(positions, points, strict=True)
            if point.mean > level
        }
        filled = look(index) | {"linestyle": "none", "label": f"_{line} above"}
        axes.plot(list(above), list(above.values()), zorder=3, **filled)

    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.margins(x=0.08)
    axes.set_ylabel(f"validation {metric.upper()}, α = 0")


def beta_sensitivity(block: Block) -> Figure | None:
    """Return IGD Appendix H: validation against β, and which β are effective."""
    lines = lines_by(block.trained_with("igd"), "igd_beta")
    if not lines:
        return None

    def draw(figure: Canvas) -> None:
        for axes, metric in zip(figure.subplots(1, 2), SELECTION, strict=True):
            sensitivity(axes, block, lines, metric)
            axes.set_xlabel("β, weight of tokens with zero gain")
        legend(figure)

    caption = f"The effective range of β is unknown, because there are no {REFERENCE} runs."
    if block.unweighted:
        caption = (
            f"{effective_range(block, lines)} (mean HR@10 and NDCG@10 above {REFERENCE}'s). "
            f"{LEVEL_DRAWN}"
        )
    title = "Sensitivity to β (IGD Appendix H)"
    return block.figure("beta", title, caption, draw, 3.0, [REFERENCE, *lines])


def effective_range(block: Block, lines: Lines) -> str:
    """Return as text at which β each line beats the unweighted loss in both metrics (SELECTION)."""
    levels = {metric: validated(block.unweighted, metric).mean for metric in SELECTION}
    verdicts = []
    for line, by_beta in lines.items():
        effective = [
            f"{beta:g}"
            for beta, runs in by_beta.items()
            if all(validated(runs, metric).mean > level for metric, level in levels.items())
        ]
        verdict = f"effective at β = {', '.join(effective)}"
        verdicts.append(f"{line} is {verdict if effective else 'not effective at any β tried'}")
    return "; ".join(verdicts)


def curriculum_sensitivity(block: Block) -> Figure | None:
    """Return MTC Figure 4: validation against the curriculum's speed c."""
    axis_titles = {
        "curriculum_cT": "c·T, T optimizer steps in all",
        "curriculum_c": "c, per optimizer step",
    }
    runs = block.trained_with("multi-target")
    found = {title: lines_by(runs, setting) for setting, title in axis_titles.items()}
    axis_title = max(found, key=lambda title: sum(map(len, found[title].values())))
    lines = found[axis_title]
    if not lines:
        return None

    def draw(figure: Canvas) -> None:
        for axes, metric in zip(figure.subplots(1, 2), ("ndcg@5", "ndcg@10"), strict=True):
            sensitivity(axes, block, lines, metric)
            axes.set_xlabel(axis_title)
        legend(figure)

    caption = "Multi-target by the speed of its curriculum."
    if block.unweighted:
        caption += f" {LEVEL_DRAWN}"
    title = "Sensitivity to the curriculum (MTC Figure 4)"
    return block.figure("curriculum", title, caption, draw, 3.0, [REFERENCE, *lines])


def objective_shares(block: Block) -> Figure | None:
    """Return MTC Figure 5: the shares of multi-target's losses over the steps."""
    tags = {f"train/alpha_{name}": what for name, what in SHARES.items()}
    runs = by_method(block.trained_with("multi-target"))
    methods = [method for method in runs if all(mean_curve(runs[method], tag) for tag in tags)]
    if not methods:
        return None
    looks = [look(index) for index in range(len(tags))]
    rows = math.ceil(len(methods) / 2)

    def draw(figure: Canvas) -> None:
        panels = list(figure.subplots(rows, 2, squeeze=False, sharey=True).flat)
        for axes, method in zip(panels, methods, strict=False):
            draw_curves(axes, {what: (runs[method], tag) for tag, what in tags.items()}, looks)
            axes.set_title(method)
            axes.set_ylabel("share α′ of the loss")
        for axes in panels[len(methods) :]:
            axes.remove()
        legend(figure)

    caption = "Shares α′ of multi-target's three losses, from 0 to 1, during training."
    title = "Weights of the objectives (MTC Figure 5)"
    return block.figure("objective-shares", title, caption, draw, 2.5 * rows, list(SHARES.values()))


def popularity(block: Block) -> Figure | None:
    """Return MTC Figure 2: the targets and the listed items by popularity."""
    methods = block.tested("popularity_deciles")
    if not methods:
        return None

    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        positions = np.arange(1, 11)
        first = next(iter(methods.values()))[0]
        targets = np.array(
            first.test["target_popularity_deciles"] if first.test else [math.nan] * 10
        )
        grey: Look = {"color": "#dcdcdc", "edgecolor": "#909090"}
        axes.bar(positions, significant_array(100 * targets), label="targets", width=0.8, **grey)
        for index, (method, runs) in enumerate(methods.items()):
            deciles = zip(*[chosen(run)["popularity_deciles"] for run in runs], strict=True)
            points = [spread([100 * share for share in decile]) for decile in deciles]
            beside = positions + 0.7 * (index - (len(methods) - 1) / 2) / len(methods)
            draw_points(axes, beside.tolist(), points, index, label=method, linestyle="none")
        axes.set_xticks(positions)
        axes.set_xlabel("decile of the catalogue by training popularity (1: most popular)")
        axes.set_ylabel("share (%)")
        legend(figure)

    caption = (
        "Share of the test targets (bars) and of the entries of the top 10 lists (points) in each "
        f"tenth of the catalogue. {AT_ALPHA}"
    )
    title = "Popularity of targets and lists (MTC Figure 2)"
    return block.figure("popularity", title, caption, draw, 3.3, ["targets", *methods])


def head_tail(block: Block) -> Figure | None:
    """Return MTC Figure 3: NDCG@10 on head and tail targets."""
    halves = {"head": "token_match_head_targets", "tail": "token_match_tail_targets"}
    methods = block.tested(*halves.values())
    if not methods:
        return None

    def draw(figure: Canvas) -> None:
        positions = np.arange(len(methods))[::-1]
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (half, key) in zip(panels, halves.items(), strict=True):
            points = [
                spread([chosen(run)[key].get("ndcg@10") for run in runs])
                for runs in methods.values()
            ]
            means = [point.mean for point in points]
            filling: Look = {"color": "#cfe3f1", "edgecolor": COLOURS[1], "height": 0.62}
            axes.barh(positions, means, hatch="" if half == "head" else "///", **filling)
            black: Look = {"fmt": "none", "color": "#000000", "capsize": 2.5}
            axes.errorbar(means, positions, xerr=bars(points), **black)
            axes.set_yticks(positions, list(methods))
            axes.grid(axis="y", visible=False)
            axes.set_title(f"{half} targets")
            axes.set_xlabel("test NDCG@10")

    caption = (
        "Token match. Head: the more frequent half of the items that occur as test targets. Tail: "
        f"the other half. The two panels have different scales. {AT_ALPHA}"
    )
    height = 0.9 + 0.25 * len(methods)
    return block.figure("head-tail", "Head and tail (MTC Figure 3)", caption, draw, height)


def purity(study: Study) -> Figure | None:
    """Return MTC Figure 1 and Table 1: how decisive the tokens of each dataset are."""
    catalogues = {
        dataset: numbers
        for dataset, numbers in study.catalogues.items()
        if "purity_gain_by_token" in numbers
    }
    if not catalogues:
        return None

    def draw(figure: Canvas) -> None:
        gains, ratios = figure.subplots(1, 2)
        for index, (dataset, numbers) in enumerate(catalogues.items()):
            gain = significant_array(numbers["purity_gain_by_token"])
            ratio = significant_array(100 * np.array(numbers["filtering_ratio"]))
            positions = np.linspace(0, 100, len(gain))
            gains.plot(positions, gain, label=dataset, markevery=0.1, **look(index))
            ratios.plot(np.arange(1, len(ratio) + 1), ratio, label=dataset, **look(index))
        gains.set_xlabel("tokens, the most decisive first (%)")
        gains.set_ylabel("mean purity gain of the token (0 to 1)")
        ratios.set_xlabel("token of the item")
        ratios.xaxis.get_major_locator().set_params(integer=True)
        ratios.set_ylabel("remaining items that it rules out (%)")
        legend(figure)

    caption = (
        "Left: purity gain of each token, a mean over the edges of the trie with this token. "
        "Right: share of the remaining items that one more token rules out, a mean over the edges "
        "of the trie at that level."
    )
    size = (WIDTH, 3.0 + legend_height(catalogues))
    return Figure("purity", "What a token decides (MTC Figure 1, Table 1)", caption, draw, size)


# In the order of the report. Each takes a block and returns its figure, or None without data.
FIGURES = (
    improvements,
    beta_sensitivity,
    validation_curves,
    losses_by_objective,
    losses_by_beta,
    probability_by_gain,
    entropy_gap,
    popularity,
    head_tail,
    curriculum_sensitivity,
    objective_shares,
)
