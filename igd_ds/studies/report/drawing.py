"""How the figures of a report are drawn: look, curves and points over seeds, legend, PNG and SVG.

Means over seeds have the standard deviation (n − 1) as a band or a bar, which is missing where
there is one seed. The colours are those of Okabe and Ito. Lines also differ in stroke and marker,
so that grey prints can be read.

Equal studies give equal bytes, whatever the user's matplotlib settings are. Everything that is
drawn has six significant digits, and so have the coordinates in an SVG: the SVG is the same on
every CPU. The pixels of a PNG are the same too, but its compression may differ, because zlib-ng
uses the vector instructions of the CPU.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from igd_ds.studies.report.study import Run
from igd_ds.studies.rounding import DIGITS, mean_sd, significant, significant_array

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Look = dict[str, Any]
"""Keyword arguments of a line: colour, stroke and marker."""

STYLE: dict[Any, Any] = {
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

# The colours of Okabe and Ito, without the yellow, which is hard to see on white paper.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STROKES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

# Attributes of an SVG that hold coordinates, the numbers in them, and the ids that matplotlib
# computes from coordinates.
COORDINATES = re.compile(r'(?<=\s)(d|x|y|transform)="([^"]*)"')
DECIMAL = re.compile(r"-?\d+\.\d+")
COMPUTED_ID = re.compile(r"\b(?:C[0-9a-f]+_[0-9a-f]+_|[a-z])[0-9a-f]{10}\b")


@dataclass(frozen=True)
class Figure:
    """A figure that can be drawn.

    `name` names its files. `draw` fills an empty matplotlib figure of `size` (width and height in
    inches).
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Canvas], None]
    size: tuple[float, float] = (WIDTH, 3.4)

    def render(self, kind: str) -> bytes:
        """Return the figure as "png" (150 dpi) or "svg"."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas

        file = io.BytesIO()
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # the user's matplotlibrc must not matter
            with matplotlib.rc_context(STYLE):
                canvas = Canvas(self.size)
                FigureCanvasAgg(canvas)
                self.draw(canvas)
                unstable = {"png": ("Software",), "svg": ("Date", "Creator")}[kind]
                canvas.savefig(file, format=kind, metadata=dict.fromkeys(unstable))

        drawn = file.getvalue()
        return stable_svg(drawn.decode()).encode() if kind == "svg" else drawn


def stable_svg(drawing: str) -> str:
    """Return an SVG with coordinates of six significant digits and with numbered ids.

    Matplotlib derives ids from coordinates of 17 digits; they are replaced by their order.
    """

    def rounded(attribute: re.Match[str]) -> str:
        name, value = attribute.groups()
        return f'{name}="{DECIMAL.sub(lambda n: f"{float(n[0]):.{DIGITS}g}", value)}"'

    drawing = COORDINATES.sub(rounded, drawing)
    numbers: dict[str, str] = {}
    return COMPUTED_ID.sub(lambda id: numbers.setdefault(id[0], f"i{len(numbers)}"), drawing)


def look(index: int) -> Look:
    """Return colour, stroke and marker of the line with this number; the first 280 differ."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": STROKES[index % len(STROKES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def shade(index: int, count: int) -> Look:
    """Return the look of a line out of `count` ordered lines: from dark to light."""
    import matplotlib

    colour = matplotlib.colormaps["cividis"](0.88 * index / max(count - 1, 1))
    return look(index) | {"color": colour}


class Point(NamedTuple):
    """Mean and standard deviation (n − 1) over seeds, six significant digits."""

    mean: float
    deviation: float


MISSING = Point(math.nan, math.nan)


def spread(values: Sequence[float | None]) -> Point:
    """Return mean and standard deviation of the values that are not None.

    Both are NaN without values; the deviation of one value is 0.
    """
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    mean, deviation = mean_sd(known)
    return Point(significant(mean), significant(deviation or 0.0))


class MeanCurve(NamedTuple):
    """A curve of the log as a mean over seeds; arrays (n,) float64 of six significant digits."""

    steps: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def mean_curve(runs: Sequence[Run], tag: str) -> MeanCurve | None:
    """Return the mean of a curve over runs, up to the last step that all of them reached.

    None where a run lacks the curve.
    """
    curves = [np.array(run.curves.get(tag) or [], dtype=float).reshape(-1, 2) for run in runs]
    curves = [curve[np.isfinite(curve[:, 1])] for curve in curves]
    if not curves or not all(map(len, curves)):
        return None

    steps = min(curves, key=lambda curve: float(curve[-1, 0]))[:, 0]
    values = np.stack([np.interp(steps, *curve.T) for curve in curves])
    deviation = values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
    return MeanCurve(steps, significant_array(values.mean(0)), significant_array(deviation))


def draw_curves(
    axes: Axes, lines: Mapping[str, tuple[Sequence[Run], str]], looks: Sequence[Look]
) -> None:
    """Draw the mean curve and its band for each line's runs and tag, where they have it."""
    for index, (name, (runs, tag)) in enumerate(lines.items()):
        if curve := mean_curve(runs, tag):
            steps, mean, deviation = curve
            # Markers of different lines stand at different positions; a single point has its own.
            every = (index % 5 / 50, 0.1) if len(steps) > 1 else None
            axes.plot(steps, mean, label=name, markevery=every, **looks[index])
            band: Look = {"color": looks[index]["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(steps, mean - deviation, mean + deviation, **band)
    axes.set_xlabel("optimizer step")


def draw_points(
    axes: Axes, positions: Sequence[float], points: Sequence[Point], index: int, **settings: Any
) -> None:
    """Draw means at `positions`, with bars of one deviation where the deviation is not 0."""
    axes.errorbar(
        positions,
        np.array([point.mean for point in points]),
        np.array(bars(points)),
        capsize=2.5,
        **look(index) | settings,
    )


def bars(points: Sequence[Point]) -> list[float]:
    """Return the deviation of each point, NaN where it is 0 so that no bar is drawn."""
    return [point.deviation if point.deviation > 0 else math.nan for point in points]


def columns(entries: Collection[str]) -> int:
    """Return how many columns of a legend with these entries fit into the width."""
    longest = 0.6 + 0.065 * max(
        map(len, entries), default=1
    )  # inches: a stroke, a gap, the letters
    return max(1, min(int(WIDTH / longest), len(entries)))


def legend_height(entries: Collection[str]) -> float:
    """Return the height of a legend with these entries, in inches."""
    return 0.19 * math.ceil(len(entries) / columns(entries))


def legend(figure: Canvas) -> None:
    """Put one legend for all panels below them."""
    lines: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        lines |= dict(zip(names, handles, strict=True))
    figure.legend(
        list(lines.values()),
        list(lines),
        loc="outside lower center",
        ncols=columns(lines),
        handlelength=3.2,
    )
