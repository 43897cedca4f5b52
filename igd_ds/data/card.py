"""The data card of a dataset folder: `README.md` and histograms (`*.png`), for people who meet the folder first.

Letters: N items, R rows of a split.

Everything is counted in the tables that are written beside it, so the card holds for any source and protocol; what came before
(funnel, hygiene, sources) is quoted from dataset.json. Equal input gives equal bytes, whatever the user's matplotlib settings.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

WORD = r"[^\s\pZ\x0b\x1c-\x1f\x{85}]+"  # RE2: a run of what Python's str.split() takes for no white space
QUANTILES = {"min": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}
TOP_SHARES = {"1 %": 100, "10 %": 10}  # label: one item in this many
BIN_WIDTHS = {
    "second": 1,
    "minute": 60,
    "hour": 3600,
    "day": 86_400,
    "week": 604_800,
    "30 days": 2_592_000,
    "year": 31_557_600,
}
MAX_TIME_BINS = 120
MAX_LENGTH_BINS = 60
FIRST_DATE, LAST_DATE = (
    np.datetime64("0001-01-01", "s"),
    np.datetime64("9999-12-31", "s"),
)  # what a date axis can show
MAX_CELL = 200  # characters of a quoted name or title
MARKDOWN = re.compile(r"[\\`*\[\]<>|~$&#]|(?<!\w)_|_(?!\w)")
FUNNEL_COLUMNS = ("users", "items", "interactions", "rows")
SPLIT_WORDS = {"train": "training", "valid": "validation", "test": "test"}
PROTOCOL_WORDS = {
    "d3": "one row per interaction from a user's second on, all rows sorted by time and cut 8:1:1",
    "leave-one-out": "a user's last item is the test target and the second-last the validation target; every item before them, "
    "from the second on, is the target of a training row",
    "given": "the rows are the source's own",
}
STYLE = {
    "figure.figsize": (6.4, 4.0),
    "figure.dpi": 100,
    "figure.subplot.left": 0.13,
    "figure.subplot.right": 0.97,
    "figure.subplot.bottom": 0.14,
    "figure.subplot.top": 0.92,
    "figure.subplot.wspace": 0.3,
    "font.size": 10,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#d0d0d0",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
FILLS = {
    "train": "#b5d3ec",
    "valid": "#d95f02",
    "test": "#202020",
}  # light, middle, dark: told apart in grey too
LINES = {"valid": "--", "test": "-"}


@dataclass(frozen=True)
class Measures:
    """What the card counts.

    `users`: number of different users in all splits; `history_lengths` int (R,) and `times` int64 (timestamps that are there, in
    seconds) by split; `popularity` int64 (N,), how often an item is a training target; `title_words`, `title_characters` int
    (items with a title,).
    """

    users: int
    history_lengths: dict[str, np.ndarray]
    times: dict[str, np.ndarray]
    popularity: np.ndarray
    title_words: np.ndarray
    title_characters: np.ndarray

    @classmethod
    def of(cls, items: pa.Table, splits: dict[str, pa.Table]) -> "Measures":
        """Count in an items table and the row tables of all splits."""
        titles = items["title"].drop_null()
        users = pa.chunked_array(
            [chunk for name in SPLIT_WORDS for chunk in splits[name]["user_id"].chunks]
        )
        return cls(
            users=pc.count_distinct(users).as_py(),
            history_lengths={
                name: pc.list_value_length(splits[name]["history"]).to_numpy()
                for name in SPLIT_WORDS
            },
            times={name: splits[name]["timestamp"].drop_null().to_numpy() for name in SPLIT_WORDS},
            popularity=np.bincount(splits["train"]["target"].to_numpy(), minlength=len(items)),
            title_words=pc.count_substring_regex(titles, WORD).to_numpy(),
            title_characters=pc.utf8_length(titles).to_numpy(),
        )

    def top(self, one_in: int) -> tuple[int, float]:
        """Return how many items the most popular N / `one_in` are (rounded up), and the share of training targets they hold."""
        count = -(-len(self.popularity) // one_in)
        return count, np.sort(self.popularity)[-count:].sum() / self.popularity.sum()

    def span(self) -> tuple[np.datetime64, np.datetime64] | None:
        """Return the first and the last time (UTC, seconds), or None without timestamps."""
        times = [found for found in self.times.values() if len(found)]
        if not times:
            return None
        return np.datetime64(int(min(t.min() for t in times)), "s"), np.datetime64(
            int(max(t.max() for t in times)), "s"
        )


def write_card(folder: Path, info: dict, items: pa.Table, splits: dict[str, pa.Table]) -> None:
    """Write `README.md` and its figures (`*.png`) into a dataset folder that is being made.

    Args:
        folder: exists; nothing else of it is read or written.
        info: dataset.json's object. Quoted are name, domain, protocol, parameters, sources and hygiene, and where it has them
            `funnel` (list of {"step": str, column: number}) and `expected` ({what: [expected, found]}, from a preset).
        items: items.parquet's table; columns beyond item_id, title, semantic_id and source_id count as metadata.
        splits: tables of ROW_SCHEMA, none of them empty.
    """
    measures = Measures.of(items, splits)
    figures = _draw_figures(Path(folder), measures)
    sections = [
        f"# {escape(info['name'])}",
        _summary(info, items, measures),
        _splits_table(splits, measures),
        _funnel(info.get("funnel", [])),
        _expected(info.get("expected", {})),
        _hygiene(info["hygiene"]),
        _distributions(measures, splits),
        *(f"![{what}]({name})" for name, what in figures.items()),
        ""
        if "time.png" in figures
        else "No figure over time: there are no timestamps that a calendar could show.",
        "" if "title_length.png" in figures else "No figure of title lengths: no item has a title.",
        _order_and_loading(info["protocol"]),
        _sources(info["sources"]),
    ]
    (Path(folder) / "README.md").write_text(
        "\n\n".join(filter(None, sections)) + "\n", encoding="utf-8"
    )


def escape(text: object) -> str:
    """Return text as one line of Markdown that shows it literally, cut after MAX_CELL characters.

    White space and characters that cannot be printed (newlines, direction marks, unpaired surrogates) become single spaces.
    """
    words = "".join(letter if letter.isprintable() else " " for letter in str(text)).split()
    line = " ".join(words)
    return MARKDOWN.sub(r"\\\g<0>", line if len(line) <= MAX_CELL else line[:MAX_CELL] + "…")


def _number(value: object) -> str:
    """Write a number with thousands separators; None is blank, anything else text."""
    if value is None:
        return ""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4g}"
    return escape(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Return a Markdown table of cells that are escaped already; the first `left` columns are text, the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _date(time: np.datetime64) -> str:
    return str(time.astype("datetime64[D]"))


def _summary(info: dict, items: pa.Table, measures: Measures) -> str:
    """The opening paragraph: what there is, how the rows were made, when, and what is known of the items."""
    rows = [f"{len(measures.history_lengths[name]):,} {SPLIT_WORDS[name]}" for name in SPLIT_WORDS]
    domain = "" if info["domain"] == "items" else f" ({escape(info['domain'])})"
    words = PROTOCOL_WORDS.get(info["protocol"])
    options = ", ".join(
        f"{escape(key)} = {_number(value) or 'none'}" for key, value in info["parameters"].items()
    )
    span = measures.span()
    codes = items["semantic_id"].drop_null()
    levels = pc.min_max(pc.list_value_length(codes)).as_py()
    depth = (
        f"{levels['min']}"
        if levels["min"] == levels["max"]
        else f"{levels['min']} to {levels['max']}"
    )
    known = {"item_id", "title", "semantic_id", "source_id"}
    metadata = [
        f"{escape(name)} ({_percent(1 - items[name].null_count / len(items))} of the items)"
        for name in items.column_names
        if name not in known
    ]
    sentences = [
        f"{len(items):,} items{domain} and {measures.users:,} users, in {rows[0]}, {rows[1]} and {rows[2]} rows.",
        "A row is what a user met before, oldest first (the history), and what came next (the target).",
        f"Protocol {escape(info['protocol'])}" + (f": {words}." if words else "."),
        f"Options: {options}." if options else "",
        f"The targets' times run from {_date(span[0])} to {_date(span[1])} (UTC)."
        if span
        else "There are no timestamps.",
        f"{len(measures.title_words):,} items have a title,",
        f"{len(codes):,} a semantic ID of {depth} codes." if len(codes) else "none a semantic ID.",
        f"Metadata: {', '.join(metadata)}." if metadata else "",
    ]
    return " ".join(filter(None, sentences))


def _splits_table(splits: dict[str, pa.Table], measures: Measures) -> str:
    rows = []
    for name in SPLIT_WORDS:
        users = pc.count_distinct(splits[name]["user_id"]).as_py()
        cold = (measures.popularity[splits[name]["target"].to_numpy()] == 0).mean()
        rows.append([name, f"{splits[name].num_rows:,}", f"{users:,}", _percent(cold)])
        if measures.span():
            times = measures.times[name].astype("datetime64[s]")
            rows[-1] += [_date(times.min()), _date(times.max())] if len(times) else ["", ""]
    header = ["split", "rows", "users", "rows with a cold target", "first target", "last target"]
    return (
        _table(header[: len(rows[0])], rows)
        + "\n\nAn item is cold when it is no training row's target."
    )


def _funnel(steps: list[dict]) -> str:
    """From the source's files to the rows, one line per step; a column that no step fills is left out."""
    keys = dict.fromkeys([*FUNNEL_COLUMNS, *(key for step in steps for key in step)])
    columns = [
        key for key in keys if key != "step" and any(step.get(key) is not None for step in steps)
    ]
    if not columns:
        return ""
    rows = [[escape(step["step"]), *(_number(step.get(key)) for key in columns)] for step in steps]
    return "## From the source to the rows\n\n" + _table(["step", *map(escape, columns)], rows)


def _expected(expected: dict) -> str:
    """What the preset's paper reports beside what was found."""
    rows = []
    for what, (wanted, found) in expected.items():
        difference = found - wanted
        share = f" ({100 * difference / wanted:+.1f} %)" if wanted else ""
        sign = "+" if difference > 0 else ""
        rows.append(
            [escape(what), _number(wanted), _number(found), f"{sign}{_number(difference)}{share}"]
        )
    header = ["what", "expected", "found", "difference"]
    return "## Beside the paper's numbers\n\n" + _table(header, rows) if rows else ""


def _hygiene(report: dict) -> str:
    """Counts of the title hygiene, with the first example of each step."""
    rows = []
    for step, found in report.items():
        if not isinstance(found, dict):
            rows.append([escape(step.replace("_", " ")), "", _number(found)])
            continue
        example = ""
        if found.get("examples"):
            _, before, after = found["examples"][0]
            before, after = (
                "(none)" if title is None else escape(title) for title in (before, after)
            )
            example = (
                f"{before} → {after}" if before != after else ""
            )  # else only white space differs, which is not seen here
        rows.append([escape(step), example, _number(found["count"])])
    return (
        "## Title hygiene\n\n" + _table(["step", "example", "titles"], rows, left=2) if rows else ""
    )


def _distributions(measures: Measures, splits: dict[str, pa.Table]) -> str:
    """Quantiles, each a value that occurs: the smallest that this share of the values does not exceed."""
    values = {
        f"history length, {name}": lengths for name, lengths in measures.history_lengths.items()
    }
    values["training rows per item"] = measures.popularity
    if len(measures.title_words):
        values |= {
            "title words": measures.title_words,
            "title characters": measures.title_characters,
        }
    points = list(QUANTILES.values())
    rows = [
        [
            what,
            f"{len(v):,}",
            f"{v.mean():,.2f}",
            *(f"{q:,}" for q in np.quantile(v, points, method="inverted_cdf")),
        ]
        for what, v in values.items()
    ]
    cold = int(np.count_nonzero(measures.popularity == 0))
    facts = [
        ["cold items", _number(cold), _percent(cold / len(measures.popularity)) + " of the items"]
    ]
    for label, one_in in TOP_SHARES.items():
        count, share = measures.top(one_in)
        facts.append(
            [
                f"the most popular {label} of the items",
                _number(count),
                _percent(share) + " of the training targets",
            ]
        )
    table = _table(["", "values", "mean", *QUANTILES], rows)
    return "\n\n".join(["## Distributions", table, _table(["", "items", "share"], facts)])


def _order_and_loading(protocol: str) -> str:
    order = (
        "Rows are in the order of the source's files."
        if protocol == "given"
        else "Interactions are ordered by time. Equal times keep the order of the source's files (file position), and data "
        "without timestamps are in that order throughout."
    )
    return f"""## Order and loading

{order} A row's index in its file is its `row_id`.

```python
from igd_ds.data.dataset import InteractionDataset

dataset = InteractionDataset.load("DATASET")  # the path of this folder
train = dataset.splits["train"]
print(dataset.num_items, len(train), train.history(0), train.targets[0])
```"""


def _sources(sources: list[dict]) -> str:
    rows = [[escape(source["path"]), f"`{source['sha256']}`"] for source in sources]
    table = _table(["file", "sha256"], rows, left=2) if rows else "None: the data were generated."
    return "## Source files\n\n" + table


def _draw_figures(folder: Path, measures: Measures) -> dict[str, str]:
    """Write the figures that the data allow; return {file name: what it shows}."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures: dict[str, tuple[str, Callable]] = {
        "history_length.png": ("Histogram of the history lengths of each split", _draw_history),
        "popularity.png": (
            "Training rows per item against the item's rank, both logarithmic",
            _draw_popularity,
        ),
    }
    span = measures.span()
    if span and span[0] >= FIRST_DATE and span[1] <= LAST_DATE:
        figures["time.png"] = ("Rows over time, by split", _draw_time)
    if len(measures.title_words):
        figures["title_length.png"] = (
            "Histograms of the title lengths in words and in characters",
            _draw_titles,
        )
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        for name, (_, draw) in figures.items():
            figure = Figure()
            FigureCanvasAgg(figure)
            draw(figure, measures)
            figure.savefig(folder / name, metadata={"Software": None})
    return {name: what for name, (what, _) in figures.items()}


def _length_bins(values: np.ndarray) -> np.ndarray:
    """Return the edges of at most MAX_LENGTH_BINS bins of whole numbers.

    A long tail (beyond twice the 99.5 % quantile) has no bins of its own: `_count` adds it to the last one.
    """
    first, last = int(values.min()), int(values.max())
    usual = int(np.quantile(values, 0.995, method="inverted_cdf"))
    if last > 2 * usual:
        last = usual + 1
    width = -(-(last - first + 1) // MAX_LENGTH_BINS)
    return np.arange(first, last + width + 1, width) - 0.5


def _count(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(np.minimum(values, edges[-1]), edges)[0]


def _label_lengths(axes, what: str, edges: np.ndarray, longest: int) -> None:
    tail = "" if longest <= edges[-1] else f"\n(last bar: {int(edges[-2] + 0.5):,} to {longest:,})"
    axes.set_xlabel(what + tail)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def _draw_history(figure, measures: Measures) -> None:
    axes = figure.subplots()
    everything = np.concatenate(list(measures.history_lengths.values()))
    edges = _length_bins(everything)
    for name, lengths in measures.history_lengths.items():
        share = 100 * _count(lengths, edges) / len(lengths)
        style = {"fill": True} if name == "train" else {"linestyle": LINES[name], "linewidth": 1.6}
        axes.stairs(
            share, edges, color=FILLS[name], label=f"{name} (n = {len(lengths):,})", **style
        )
    axes.set_ylabel("rows of the split (%)")
    _label_lengths(axes, "history length (items)", edges, int(everything.max()))
    figure.legend(loc="outside upper center", ncols=len(SPLIT_WORDS))


def _draw_popularity(figure, measures: Measures) -> None:
    axes = figure.subplots()
    counts = -np.sort(-measures.popularity)
    warm = int(np.count_nonzero(counts))
    ranks = np.unique(
        np.geomspace(1, warm, 400).round().astype(np.int64)
    )  # more points would not be seen
    axes.loglog(ranks, counts[ranks - 1], color="#1f5a94", marker=".", markersize=4, linewidth=1)
    lines = {
        measures.top(one_in): label for label, one_in in TOP_SHARES.items()
    }  # one line where both are one item
    for (count, share), label in lines.items():
        axes.axvline(count, color="#606060", linestyle="--", linewidth=1)
        text = f" top {label}:\n {_percent(share)} of\n targets"
        axes.text(count, 0.98, text, transform=axes.get_xaxis_transform(), va="top", fontsize=8.5)
    axes.set_xlim(0.8, 1.25 * len(counts))
    axes.set_ylim(0.8, 1.6 * counts[0])
    axes.grid(axis="x")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_formatter("")
    axes.set_xlabel(
        f"rank of the item ({warm:,} items; {len(counts) - warm:,} cold ones not shown)"
    )
    axes.set_ylabel("training rows with this target")


def _draw_time(figure, measures: Measures) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    axes = figure.subplots()
    first, last = (int(time.astype(np.int64)) for time in measures.span())
    unit, width = next(
        (u for u in BIN_WIDTHS.items() if (last - first) // u[1] < MAX_TIME_BINS),
        ("year", BIN_WIDTHS["year"]),
    )
    edges = np.arange(first // width, last // width + 2) * width
    below = np.zeros(len(edges) - 1)
    for name, times in measures.times.items():
        rows = np.histogram(times, edges)[0]
        axes.stairs(
            below + rows,
            edges.astype("datetime64[s]"),
            baseline=below,
            fill=True,
            color=FILLS[name],
            label=name,
        )
        below = below + rows
    locator = AutoDateLocator(tz="UTC", minticks=3, maxticks=6)
    formatter = ConciseDateFormatter(
        locator,
        tz="UTC",  # digits only: names of months depend on the locale
        formats=["%Y", "%Y-%m", "%Y-%m-%d", "%H:%M", "%H:%M", "%H:%M:%S"],
        zero_formats=["", "%Y-%m", "%Y-%m-%d", "%Y-%m-%d", "%H:%M", "%H:%M:%S"],
        offset_formats=["", "", "", "%Y-%m-%d", "%Y-%m-%d", "%Y-%m-%d"],
    )
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(formatter)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="y", integer=True)
    axes.set_xlabel("time of the target (UTC)")
    axes.set_ylabel(f"rows per {unit}, stacked")
    figure.legend(loc="outside upper center", ncols=len(SPLIT_WORDS))


def _draw_titles(figure, measures: Measures) -> None:
    lengths_by_unit = {"words": measures.title_words, "characters": measures.title_characters}
    for axes, (unit, lengths) in zip(figure.subplots(1, 2), lengths_by_unit.items(), strict=True):
        edges = _length_bins(lengths)
        axes.stairs(_count(lengths, edges), edges, fill=True, color="#1f5a94")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="y", integer=True)
        width = int(edges[1] - edges[0])
        axes.set_ylabel("items" if width == 1 else f"items per {width} {unit}")
        _label_lengths(axes, f"title length ({unit})", edges, int(lengths.max()))
