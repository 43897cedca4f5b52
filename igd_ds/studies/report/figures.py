"""A `Study` → figures: both papers' and what a reader asks next, each of them only where its data are there.

A figure shows the whole runs of one dataset and backbone: means over seeds, with their standard deviation (n − 1) as band or
bar, neither where there is one seed. Colours are Okabe and Ito's; lines differ in stroke and marker too, so grey prints are read.
Equal studies give equal bytes, whatever the user's matplotlib settings.
"""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from igd_ds.studies.report.study import AT_ALPHA, BASELINE, Run, Study, lines_by
from igd_ds.studies.significance import Comparison, compare

STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dcdcdc",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "svg.hashsalt": "igd_ds",
    "svg.fonttype": "path",
}
WIDTH = 7.2  # inches
# Okabe and Ito's, without the yellow that white paper swallows.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STROKES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SHARES = {"fg": "front-greater", "fr": "frequency", "or": "cross-entropy"}  # MTC's targets
SELECTION = (
    "hr@10",
    "ndcg@10",
)  # β is effective where both of them are above uniform's (IGD App. H)
LEVEL_DRAWN = f"The dashed line and its band are {BASELINE}'s; points above it are filled."
REACHED = 0.01  # share of the targets that must still have a token at a step for it to be shown


@dataclass(frozen=True)
class Figure:
    """A figure that can be drawn: `name` is its files', `draw` fills an empty matplotlib figure of `size` (inches)."""

    name: str
    title: str
    caption: str
    draw: Callable
    size: tuple[float, float] = (WIDTH, 3.4)

    def render(self, kind: str) -> bytes:
        """Return the figure as "png" (150 dpi) or "svg"."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas

        file = io.BytesIO()
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
            matplotlib.rcParams.update(STYLE)
            canvas = Canvas(self.size)
            FigureCanvasAgg(canvas)
            self.draw(canvas)
            unstable = {"png": ("Software",), "svg": ("Date", "Creator")}[kind]
            canvas.savefig(file, format=kind, metadata=dict.fromkeys(unstable))
        return file.getvalue()


@dataclass(frozen=True)
class Block:
    """The whole runs that may stand in one figure: of one dataset the generative ones of one backbone, and all baselines.

    `comparisons` are those of its methods with their baseline.
    """

    dataset: str
    backbone: str
    runs: list[Run]
    comparisons: list[Comparison]

    def figure(
        self, name: str, title: str, caption: str, draw: Callable, height: float, labels=()
    ) -> Figure:
        """Name a figure after its block; a legend with these labels gets its own height below."""
        place = f"{self.dataset}, {self.backbone}" if self.backbone else self.dataset
        slug = re.sub(r"[^a-z0-9]+", "-", f"{self.dataset} {self.backbone} {name}".lower()).strip(
            "-"
        )
        return Figure(
            slug,
            f"{title}: {place}",
            caption,
            draw,
            (WIDTH, height + 0.19 * math.ceil(len(labels) / columns(labels))),
        )

    def tested(self, *keys: str) -> dict[str, list[Run]]:
        """Return the runs with test metrics by method, in the table's order: what a comparison of methods shows.

        With `keys`, only runs whose test figures have them: an older version's may not.
        """
        return by_method([run for run in self.runs if run.test and chosen(run).keys() >= set(keys)])

    def weighted(self, name: str) -> list[Run]:
        """Return the runs of a weighting."""
        return [run for run in self.runs if run.settings.get("weighting") == name]

    @property
    def unweighted(self) -> list[Run]:
        """The runs that β and c are held against: those of the plain loss."""
        return [run for run in self.runs if run.method == BASELINE]


def all_figures(study: Study) -> list[Figure]:
    """Return every figure that the study has data for, dataset by dataset."""
    figures = [purity(study)] + [make(block) for block in blocks(study) for make in FIGURES]
    return [figure for figure in figures if figure]


def blocks(study: Study) -> list[Block]:
    """Return a block for each dataset and backbone of generative runs; baselines alone are a block too."""
    found = []
    for dataset in dict.fromkeys(run.dataset for run in study.runs):
        runs = [run for run in study.runs if run.dataset == dataset and run.whole]
        comparisons = compare(study, dataset)
        for backbone in dict.fromkeys(run.backbone for run in runs if not run.is_baseline) or [""]:
            own = [run for run in runs if run.is_baseline or run.backbone == backbone]
            found.append(
                Block(dataset, backbone, own, [c for c in comparisons if c.backbone == backbone])
            )
    return found


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """Return the runs by method, in their order."""
    return {
        method: [run for run in runs if run.method == method]
        for method in dict.fromkeys(run.method for run in runs)
    }


def look(index: int) -> dict:
    """Return colour, stroke and marker of the line with this number; no two of the first 280 are alike."""
    names = ("color", "linestyle", "marker")
    return {
        name: table[index % len(table)]
        for name, table in zip(names, (COLOURS, STROKES, MARKERS), strict=True)
    }


def shade(index: int, count: int) -> dict:
    """Return the look of a line out of `count` whose order means something: dark to light, in colour and in grey."""
    import matplotlib

    return look(index) | {
        "color": matplotlib.colormaps["cividis"](0.88 * index / max(count - 1, 1))
    }


def spread(values: list[float]) -> tuple[float, float]:
    """Return mean and standard deviation (n − 1) over seeds; NaN for what is not there, and 0 the deviation of one value."""
    values = [value for value in values if value is not None]
    return (
        (float(np.mean(values)), float(np.std(values, ddof=len(values) > 1)))
        if values
        else (math.nan, math.nan)
    )


def chosen(run: Run) -> dict:
    """Return a run's test figures at the α that it is reported at."""
    return run.test["alpha"][run.alpha]


def validated(runs: list[Run], metric: str) -> tuple[float, float]:
    """Return mean and deviation over seeds of a validation metric at α = 0."""
    return spread([run.valid["alpha"]["0.0"]["token_match"].get(metric) for run in runs])


def mean_curve(runs: list[Run], tag: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return steps, mean and deviation (n,) over the seeds of a curve, as far as all of them went; None where one lacks it."""
    curves = [np.array(run.curves.get(tag) or [], dtype=float).reshape(-1, 2) for run in runs]
    curves = [curve[np.isfinite(curve[:, 1])] for curve in curves]
    if not curves or not all(map(len, curves)):
        return None
    steps = min(curves, key=lambda curve: curve[-1, 0])[:, 0]
    values = np.stack([np.interp(steps, *curve.T) for curve in curves])
    return steps, values.mean(0), values.std(0, ddof=len(curves) > 1)


def draw_curves(axes, lines: dict[str, tuple[list[Run], str]], looks: list[dict]) -> None:
    """Draw the mean curve of each line's runs and tag, with its band; a line whose runs lack it is left out."""
    for index, (label, (runs, tag)) in enumerate(lines.items()):
        if curve := mean_curve(runs, tag):
            steps, mean, deviation = curve
            axes.plot(steps, mean, label=label, markevery=(index % 5 / 50, 0.1), **looks[index])
            band = {"color": looks[index]["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(steps, mean - deviation, mean + deviation, **band)
    axes.set_xlabel("optimizer step")


def draw_points(
    axes, places: np.ndarray, points: list[tuple[float, float]], index: int, **settings
) -> None:
    """Draw means with bars of one deviation, `points` being (mean, deviation) at `places`; no bar where the deviation is 0."""
    mean, deviation = np.array(points).T
    axes.errorbar(
        places,
        mean,
        np.where(deviation > 0, deviation, math.nan),
        capsize=2.5,
        **look(index) | settings,
    )


def columns(labels) -> int:
    """Return how many columns of a legend with these labels fit the width."""
    longest = 0.6 + 0.065 * max(
        map(len, labels), default=1
    )  # inches: a stroke, a gap and the letters
    return max(1, min(int(WIDTH / longest), len(labels)))


def legend(figure) -> None:
    """Put one legend for all panels below them."""
    lines = {}
    for axes in figure.axes:
        lines |= {
            label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    figure.legend(
        lines.values(),
        lines.keys(),
        loc="outside lower center",
        ncols=columns(lines),
        handlelength=3.2,
    )


def token_losses(
    block: Block, name: str, title: str, methods: dict[str, list[Run]], looks: list[dict]
) -> Figure | None:
    """Two panels: the training loss of tokens without gain and of those with gain."""
    tags = {
        "train/nll_zero_gain": "tokens with zero gain",
        "train/nll_nonzero_gain": "tokens with non-zero gain",
    }
    shown = [
        method for method, runs in methods.items() if all(mean_curve(runs, tag) for tag in tags)
    ]
    if not shown:
        return None

    def draw(figure):
        for axes, (tag, what) in zip(figure.subplots(1, 2), tags.items(), strict=True):
            draw_curves(axes, {method: (methods[method], tag) for method in shown}, looks)
            axes.set_title(what)
            axes.set_ylabel("training loss (nats per token)")
        legend(figure)

    caption = "Unweighted training loss of target tokens whose information gain is zero, and of the others. Mind the two scales."
    return block.figure(name, title, caption, draw, 3.0, shown)


def improvements(block: Block) -> Figure | None:
    """A forest plot: each method's difference from its baseline, with the interval of the bootstrap over users."""
    compared = [comparison for comparison in block.comparisons if comparison.low is not None]
    if not compared:
        return None

    def draw(figure):
        axes = figure.subplots()
        axes.axvline(0, color="#606060", linewidth=1)
        for place, c in enumerate(reversed(compared)):
            mean = c.mean - c.baseline_mean
            fill = COLOURS[1] if c.significant else "white"
            ends = [[mean - c.low], [c.high - mean]]
            axes.errorbar(
                [mean],
                [place],
                xerr=ends,
                fmt="o",
                color=COLOURS[1],
                markerfacecolor=fill,
                capsize=2.5,
            )
        axes.set_yticks(range(len(compared)), [c.method for c in reversed(compared)])
        axes.set_ylim(-0.7, len(compared) - 0.3)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"test NDCG@10 minus that of {compared[0].baseline}")

    caption = (
        "Mean over seeds, and the 95 % interval of the paired bootstrap over users. Filled: its p is below 0.05 after Holm's "
        f"correction over the methods of the dataset. {AT_ALPHA}"
    )
    return block.figure(
        "improvements",
        f"Difference from {compared[0].baseline}",
        caption,
        draw,
        0.8 + 0.25 * len(compared),
    )


def losses_by_beta(block: Block) -> Figure | None:
    """IGD Figures 5 and 7, over the β grid."""
    grid = by_method(sorted(block.weighted("igd"), key=lambda run: run.settings["igd_beta"]))
    plain = by_method(block.weighted("uniform"))
    if len(grid) < 2:
        return None
    looks = [look(0) | {"color": COLOURS[2]}] * len(plain) + [
        shade(index, len(grid)) for index in range(len(grid))
    ]
    return token_losses(
        block, "loss-by-beta", "Training loss by β (IGD Figures 5, 7)", plain | grid, looks
    )


def losses_by_weighting(block: Block) -> Figure | None:
    """IGD Figure 2, over the weightings that came to the test."""
    methods = {method: runs for method, runs in block.tested().items() if not runs[0].is_baseline}
    looks = [look(index) for index in range(len(methods))]
    return token_losses(
        block, "loss-by-weighting", "Training loss by weighting (IGD Figure 2)", methods, looks
    )


def validation_curves(block: Block) -> Figure | None:
    """Validation NLL and NDCG over the steps."""
    tags = {"valid/nll": "NLL (nats per item)", "valid/ndcg@10": "NDCG@10"}
    methods = block.tested()
    tags = {
        tag: what
        for tag, what in tags.items()
        if any(mean_curve(runs, tag) for runs in methods.values())
    }
    looks = [look(index) for index in range(len(methods))]
    if not tags:
        return None

    def draw(figure):
        for axes, (tag, what) in zip(
            figure.subplots(1, len(tags), squeeze=False)[0], tags.items(), strict=True
        ):
            draw_curves(axes, {method: (runs, tag) for method, runs in methods.items()}, looks)
            axes.set_ylabel(f"validation {what}")
        legend(figure)

    caption = "Validation during training, as far as all seeds of a method went. NLL is unweighted, so methods can be compared."
    return block.figure("validation", "Validation over the steps", caption, draw, 3.0, methods)


def entropy_gap(block: Block) -> Figure | None:
    """IGD Figures 3, 6 and 8: how much less decided the listed items' prefixes are than the targets'."""
    methods = {}
    for weighting in ("uniform", "igd"):
        runs = [run for run in block.weighted(weighting) if "target_prefix_entropy" in run.valid]
        groups = by_method([run for run in runs if run.test] or runs)
        if groups:  # of several β the one that validation prefers
            best = max(groups, key=lambda method: validated(groups[method], "ndcg@10")[0])
            methods[best] = groups[best]
    if not methods:
        return None
    alphas = sorted(
        {alpha for runs in methods.values() for run in runs for alpha in run.valid["alpha"]},
        key=float,
    )

    def draw(figure):
        panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        for axes, (method, runs) in zip(panels, methods.items(), strict=True):
            axes.axhline(0, color="#606060", linewidth=1)
            for index, alpha in enumerate(alphas):
                gaps = [
                    gap_by_step(run.valid, alpha) for run in runs if alpha in run.valid["alpha"]
                ]
                gap = (
                    np.mean([gap[: min(map(len, gaps))] for gap in gaps], axis=0)
                    if gaps
                    else np.array([])
                )
                axes.plot(
                    np.arange(1, len(gap) + 1),
                    gap,
                    label=f"α = {alpha}",
                    **shade(index, len(alphas)),
                )
            axes.set_title(method)
            axes.set_xlabel("tokens of the item so far")
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0].set_ylabel("entropy of predicted − of target\nprefixes (nats)")
        legend(figure)

    caption = (
        "Entropy of the items under a prefix: mean over the top 10 lists on validation minus mean over the targets, by α of the "
        "decoding. Above 0 the lists are less decided than the truth. Steps that less than 1 % of the targets reach are left out."
    )
    return block.figure(
        "entropy-gap",
        "Entropy gap of the decoding (IGD Figures 3, 6, 8)",
        caption,
        draw,
        3.0,
        alphas,
    )


def gap_by_step(results: dict, alpha: str) -> np.ndarray:
    """Return the entropy of listed minus that of target prefixes by step, nats, float64 (steps that enough targets reach,)."""
    listed, target = (
        results["alpha"][alpha]["prefix_entropy"]["nats"],
        results["target_prefix_entropy"],
    )
    items = np.array(target["items"])
    steps = min(int(np.sum(items >= REACHED * items[0])), len(listed))
    return np.array(listed[:steps]) - target["nats"][:steps]


def probability_by_gain(block: Block) -> Figure | None:
    """IGD Figure 4: the targets' log-probability against their information gain."""
    tags = {"zero": "valid/nll_gain_zero"} | {
        str(decile + 1): f"valid/nll_gain_{decile}" for decile in range(10)
    }
    methods = {}
    for (
        method,
        runs,
    ) in block.tested().items():  # deciles are missing where many tokens have the same gain
        known = [tag for tag in tags.values() if all(run.curves.get(tag) for run in runs)]
        if known:
            last = {tag: spread([-run.curves[tag][-1][1] for run in runs]) for tag in known}
            methods[method] = [last.get(tag, (math.nan, math.nan)) for tag in tags.values()]
    if not methods:
        return None

    def draw(figure):
        axes = figure.subplots()
        for index, (method, points) in enumerate(methods.items()):
            draw_points(axes, np.arange(len(tags)), points, index, label=method)
        axes.set_xticks(range(len(tags)), tags)
        axes.set_xlabel(
            "information gain of the token: zero, or decile of the non-zero gains (10: most decisive)"
        )
        axes.set_ylabel("log-probability of the\ntarget token (nats)")
        legend(figure)

    caption = "Mean log-probability of the validation targets' tokens at the last validation, by their information gain."
    return block.figure(
        "probability-by-gain",
        "Log-probability against information gain (IGD Figure 4)",
        caption,
        draw,
        3.0,
        methods,
    )


def sensitivity(axes, block: Block, lines: dict[str, dict[float, list[Run]]], metric: str) -> None:
    """Draw each line's validation figures against a setting's values, the baseline's as a band; what is above it is filled."""
    values = sorted({value for by_value in lines.values() for value in by_value})
    level, deviation = validated(block.unweighted, metric)
    if math.isfinite(level):
        axes.axhline(level, color=COLOURS[0], linestyle="--", label=BASELINE)
        axes.axhspan(
            level - deviation, level + deviation, color=COLOURS[0], alpha=0.12, linewidth=0
        )
    for index, (line, by_value) in enumerate(lines.items(), 1):
        points = [validated(runs, metric) for runs in by_value.values()]
        draw_points(
            axes,
            [values.index(value) for value in by_value],
            points,
            index,
            markerfacecolor="white",
            label=line,
        )
        above = {
            values.index(value): mean
            for value, (mean, _) in zip(by_value, points, strict=True)
            if mean > level
        }
        axes.plot(
            above.keys(),
            above.values(),
            **look(index) | {"linestyle": "none"},
            zorder=3,
            label=f"_{line} above",
        )
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.margins(x=0.08)
    axes.set_ylabel(f"validation {metric.upper()}, α = 0")


def beta_sensitivity(block: Block) -> Figure | None:
    """IGD App. H: validation against β, and where it is effective."""
    lines = lines_by(block.weighted("igd"), "igd_beta")
    if not lines:
        return None

    def draw(figure):
        for axes, metric in zip(figure.subplots(1, 2), SELECTION, strict=True):
            sensitivity(axes, block, lines, metric)
            axes.set_xlabel("β, weight of tokens with zero gain")
        legend(figure)

    if block.unweighted:
        caption = f"{effective_range(block, lines)} (mean HR@10 and NDCG@10 above {BASELINE}'s). {LEVEL_DRAWN}"
    else:
        caption = (
            f"There are no {BASELINE} runs to compare with, so the effective range is not known."
        )
    return block.figure(
        "beta", "Sensitivity to β (IGD Appendix H)", caption, draw, 3.0, [BASELINE, *lines]
    )


def effective_range(block: Block, lines: dict[str, dict[float, list[Run]]]) -> str:
    """Say at which β each line is above the baseline in both metrics of SELECTION."""
    levels = {metric: validated(block.unweighted, metric)[0] for metric in SELECTION}
    verdicts = []
    for line, by_beta in lines.items():
        effective = [
            f"{beta:g}"
            for beta, runs in by_beta.items()
            if all(validated(runs, metric)[0] > level for metric, level in levels.items())
        ]
        verdicts.append(
            f"{line} is "
            + (
                f"effective at β = {', '.join(effective)}"
                if effective
                else "not effective at any β tried"
            )
        )
    return "; ".join(verdicts)


def curriculum_sensitivity(block: Block) -> Figure | None:
    """MTC Figure 4: validation against the curriculum's speed c."""
    axes_labels = {
        "curriculum_cT": "c·T, T optimizer steps in all",
        "curriculum_c": "c, per optimizer step",
    }
    found = {
        label: lines_by(block.weighted("multi-target"), setting)
        for setting, label in axes_labels.items()
    }
    label = max(found, key=lambda label: sum(map(len, found[label].values())))
    lines = found[label]
    if not lines:
        return None

    def draw(figure):
        for axes, metric in zip(figure.subplots(1, 2), ("ndcg@5", "ndcg@10"), strict=True):
            sensitivity(axes, block, lines, metric)
            axes.set_xlabel(label)
        legend(figure)

    caption = f"Multi-target by the speed of its curriculum.{f' {LEVEL_DRAWN}' if block.unweighted else ''}"
    return block.figure(
        "curriculum",
        "Sensitivity to the curriculum (MTC Figure 4)",
        caption,
        draw,
        3.0,
        [BASELINE, *lines],
    )


def objective_shares(block: Block) -> Figure | None:
    """MTC Figure 5: the objective's weights over the steps."""
    tags = {f"train/alpha_{name}": what for name, what in SHARES.items()}
    runs = by_method(block.weighted("multi-target"))
    methods = [method for method in runs if all(mean_curve(runs[method], tag) for tag in tags)]
    looks = [look(index) for index in range(len(tags))]
    if not methods:
        return None
    rows = math.ceil(len(methods) / 2)

    def draw(figure):
        panels = list(figure.subplots(rows, 2, squeeze=False, sharey=True).flat)
        for axes, method in zip(panels, methods, strict=False):
            draw_curves(axes, {what: (runs[method], tag) for tag, what in tags.items()}, looks)
            axes.set_title(method)
            axes.set_ylabel("share α′ of the loss")
        for axes in panels[len(methods) :]:
            axes.remove()
        legend(figure)

    caption = "Shares α′ of multi-target's three objectives in the loss, 0 to 1, over the training."
    return block.figure(
        "objective-shares",
        "Weights of the objectives (MTC Figure 5)",
        caption,
        draw,
        2.5 * rows,
        SHARES.values(),
    )


def popularity(block: Block) -> Figure | None:
    """MTC Figure 2: what is listed and what is wanted, by popularity."""
    methods = block.tested("popularity_deciles")
    if not methods:
        return None

    def draw(figure):
        axes = figure.subplots()
        places = np.arange(1, 11)
        targets = next(iter(methods.values()))[0].test["target_popularity_deciles"]
        axes.bar(
            places,
            100 * np.array(targets),
            color="#dcdcdc",
            edgecolor="#909090",
            label="targets",
            width=0.8,
        )
        for index, (method, runs) in enumerate(methods.items()):
            shares = zip(*[chosen(run)["popularity_deciles"] for run in runs], strict=True)
            points = [spread([100 * share for share in decile]) for decile in shares]
            beside = places + 0.7 * (index - (len(methods) - 1) / 2) / len(methods)
            draw_points(axes, beside, points, index, label=method, linestyle="none")
        axes.set_xticks(places)
        axes.set_xlabel("decile of the catalogue by training popularity (1: most popular)")
        axes.set_ylabel("share (%)")
        legend(figure)

    caption = (
        "Shares of the test targets (bars) and of the entries of the top 10 lists (points) in each tenth of the catalogue. "
        f"{AT_ALPHA}"
    )
    return block.figure(
        "popularity",
        "Popularity of targets and lists (MTC Figure 2)",
        caption,
        draw,
        3.3,
        ["targets", *methods],
    )


def head_tail(block: Block) -> Figure | None:
    """MTC Figure 3: NDCG@10 on head and tail targets."""
    halves = {"head": "token_match_head_targets", "tail": "token_match_tail_targets"}
    methods = block.tested(*halves.values())
    if not methods:
        return None

    def draw(figure):
        places = np.arange(len(methods))[::-1]
        for axes, (half, key) in zip(
            figure.subplots(1, 2, sharey=True), halves.items(), strict=True
        ):
            points = [
                spread([chosen(run)[key].get("ndcg@10") for run in runs])
                for runs in methods.values()
            ]
            mean, deviation = np.array(points).T
            axes.barh(
                places,
                mean,
                color="#cfe3f1",
                edgecolor=COLOURS[1],
                height=0.62,
                hatch="" if half == "head" else "///",
            )
            axes.errorbar(
                mean,
                places,
                xerr=np.where(deviation > 0, deviation, math.nan),
                fmt="none",
                color="#000000",
                capsize=2.5,
            )
            axes.set_yticks(places, methods)
            axes.grid(axis="y", visible=False)
            axes.set_title(f"{half} targets")
            axes.set_xlabel("test NDCG@10")

    caption = (
        "Head: the more frequent half of the items that occur as test targets; tail: the other half. Mind the two scales. "
        f"{AT_ALPHA}"
    )
    return block.figure(
        "head-tail", "Head and tail (MTC Figure 3)", caption, draw, 0.9 + 0.25 * len(methods)
    )


def purity(study: Study) -> Figure | None:
    """MTC Figure 1 and Table 1: what the tokens of each dataset decide."""
    catalogues = study.catalogues
    if not catalogues:
        return None

    def draw(figure):
        gains, ratios = figure.subplots(1, 2)
        for index, (dataset, numbers) in enumerate(catalogues.items()):
            gain, ratio = numbers["purity_gain_by_token"], np.array(numbers["filtering_ratio"])
            gains.plot(
                np.linspace(0, 100, len(gain)), gain, label=dataset, markevery=0.1, **look(index)
            )
            ratios.plot(np.arange(1, len(ratio) + 1), 100 * ratio, label=dataset, **look(index))
        gains.set_xlabel("tokens, the most decisive first (%)")
        gains.set_ylabel("mean purity gain of the token (0 to 1)")
        ratios.set_xlabel("token of the item")
        ratios.xaxis.get_major_locator().set_params(integer=True)
        ratios.set_ylabel("items left that it rules out (%)")
        legend(figure)

    caption = (
        "Left: purity gain of each token, a mean over its places in the catalogue. Right: share of the items still possible that "
        "one more token rules out, a mean over the trie's edges of that level."
    )
    size = (WIDTH, 3.0 + 0.19 * math.ceil(len(catalogues) / columns(catalogues)))
    return Figure("purity", "What a token decides (MTC Figure 1, Table 1)", caption, draw, size)


# In the order of the report; each takes a block and returns its figure, or None where the block has no data for it.
FIGURES = (
    improvements,
    beta_sensitivity,
    validation_curves,
    losses_by_weighting,
    losses_by_beta,
    probability_by_gain,
    entropy_gap,
    popularity,
    head_tail,
    curriculum_sensitivity,
    objective_shares,
)
