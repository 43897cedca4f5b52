"""The data card of a dataset folder: `README.md` and histograms (`*.png`) for a first look.

Letters: N items, R rows of a split.

Everything is counted in the tables that are written beside the card, so the card is right for any
source and protocol. What happened before (funnel, hygiene, sources) is quoted from dataset.json.
Equal input gives equal bytes on one kind of CPU, whatever the user's matplotlib settings are. On
another kind, the drawing of a figure may round differently.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from igd_ds.folders import write_text

if TYPE_CHECKING:  # matplotlib is imported when figures are drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# RE2: a run of characters that are no white space for Python's str.split().
WORD = r"[^\s\pZ\x0b\x1c-\x1f\x{85}]+"
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
# The dates that matplotlib can show on an axis.
FIRST_DATE, LAST_DATE = np.datetime64("0001-01-01", "s"), np.datetime64("9999-12-31", "s")
MAX_CELL = 200  # characters of a quoted name or title
MARKDOWN = re.compile(r"[\\`*\[\]<>|~$&#]|(?<!\w)_|_(?!\w)")
FUNNEL_COLUMNS = ("users", "items", "interactions", "rows")
SPLIT_WORDS = {"train": "training", "valid": "validation", "test": "test"}
PROTOCOL_WORDS = {
    "d3": "each interaction from a user's second on is one row; all rows are sorted by time and "
    "split 8:1:1",
    "leave-one-out": "a user's last item is the test target and the second-last item is the "
    "validation target; every item before them, from the second on, is the target of a training "
    "row",
    "given": "the rows are the source's own",
}
STYLE: dict[str, Any] = {
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
# Light, middle and dark, so that the splits differ in grey too.
FILLS = {"train": "#b5d3ec", "valid": "#d95f02", "test": "#202020"}
LINES = {"valid": "--", "test": "-"}


@dataclass(frozen=True)
class Measures:
    """The numbers that the card shows.

    Example:
        >>> measures = Measures.of(items, splits)
        >>> measures.top(100)  # the most popular 1 % of 250 items hold 40 % of the targets
        (3, 0.4)
    """

    users: int
    """Number of different users in all splits."""
    history_lengths: dict[str, np.ndarray]
    """By split: int (R,)."""
    times: dict[str, np.ndarray]
    """By split: int64, the timestamps that are not null, in seconds since 1970."""
    repeats: dict[str, float]
    """By split: the share of rows whose target is in their history."""
    pairs: int
    """Different pairs of a user and a target, in all splits."""
    popularity: np.ndarray
    """int64 (N,): how often an item is a training target."""
    title_words: np.ndarray
    """int, one per item with a title."""
    title_characters: np.ndarray
    """int, one per item with a title."""

    @classmethod
    def of(cls, items: pa.Table, splits: Mapping[str, pa.Table]) -> "Measures":
        """Count in the table of items and in the tables of rows."""
        titles = items["title"].drop_null()
        user_chunks = [chunk for name in SPLIT_WORDS for chunk in splits[name]["user_id"].chunks]
        lengths = {name: pc.list_value_length(splits[name]["history"]) for name in SPLIT_WORDS}
        times = {name: splits[name]["timestamp"].drop_null() for name in SPLIT_WORDS}
        return cls(
            users=pc.count_distinct(pa.chunked_array(user_chunks)).as_py(),
            history_lengths={name: column.to_numpy() for name, column in lengths.items()},
            times={name: column.to_numpy() for name, column in times.items()},
            repeats={name: _repeat_share(splits[name]) for name in SPLIT_WORDS},
            pairs=_num_pairs(splits),
            popularity=np.bincount(splits["train"]["target"].to_numpy(), minlength=len(items)),
            title_words=pc.count_substring_regex(titles, WORD).to_numpy(),
            title_characters=pc.utf8_length(titles).to_numpy(),
        )

    def top(self, one_in: int) -> tuple[int, float]:
        """Return N / `one_in` (rounded up) and these most popular items' share of the targets."""
        count = -(-len(self.popularity) // one_in)
        return count, np.sort(self.popularity)[-count:].sum() / self.popularity.sum()

    def span(self) -> tuple[int, int] | None:
        """Return the first and the last time in seconds since 1970, or None without timestamps."""
        times = [found for found in self.times.values() if len(found)]
        if not times:
            return None
        return min(int(t.min()) for t in times), max(int(t.max()) for t in times)


def _repeat_share(rows: pa.Table) -> float:
    """Return the share of rows whose target is in their history."""
    repeated = 0
    for batch in rows.select(["history", "target"]).to_batches():
        history, target = batch.columns
        length = pc.list_value_length(history).to_numpy()
        row = np.repeat(np.arange(len(length)), length)
        is_target = history.flatten().to_numpy() == target.to_numpy()[row]
        repeated += len(np.unique(row[is_target]))
    return repeated / max(len(rows), 1)


def _num_pairs(splits: Mapping[str, pa.Table]) -> int:
    """Return how many different pairs of a user and a target all splits have."""
    pairs = pa.concat_tables(splits[name].select(["user_id", "target"]) for name in SPLIT_WORDS)
    return pairs.group_by(["user_id", "target"]).aggregate([]).num_rows


def write_card(
    folder: Path, info: Mapping[str, Any], items: pa.Table, splits: Mapping[str, pa.Table]
) -> None:
    """Write `README.md` and its figures (`*.png`) into a dataset folder that is being made.

    Args:
        folder: exists; nothing else in it is read or written.
        info: the object of dataset.json. The card quotes its name, domain, protocol, parameters,
            sources and hygiene, and if it has them `funnel` (a list of {"step": str, column:
            number}), `expected` ({what: [expected, found]}, from a preset), `source_url` and
            `license`.
        items: the table of items.parquet. Columns other than item_id, title, semantic_id and
            source_id count as metadata.
        splits: tables of ROW_SCHEMA, none of them empty.
    """
    measures = Measures.of(items, splits)
    figures = _draw_figures(Path(folder), measures)

    missing = []
    if "time.png" not in figures:
        missing.append("No figure over time: there are no timestamps that a calendar could show.")
    if "title_length.png" not in figures:
        missing.append("No figure of title lengths: no item has a title.")

    sections = [
        f"# {escape(info['name'])}",
        _summary(info, items, measures),
        _splits_table(splits, measures),
        _repeats(info.get("repeats")),
        _funnel(info.get("funnel", [])),
        _expected(info.get("expected", {})),
        _hygiene(info["hygiene"]),
        _distributions(measures),
        *(f"![{what}]({name})" for name, what in figures.items()),
        *missing,
        _order_and_loading(info["protocol"], measures.span() is not None),
        _sources(info),
    ]
    text = "\n\n".join(section for section in sections if section)
    write_text(Path(folder) / "README.md", text + "\n")


# ---- Markdown


def escape(text: object) -> str:
    """Return text as one line of Markdown that shows it literally, cut after MAX_CELL characters.

    White space and characters that cannot be printed (newlines, direction marks, unpaired
    surrogates) become single spaces.
    """
    words = "".join(letter if letter.isprintable() else " " for letter in str(text)).split()
    line = " ".join(words)
    return MARKDOWN.sub(r"\\\g<0>", line if len(line) <= MAX_CELL else line[:MAX_CELL] + "…")


def _number(value: object) -> str:
    """Return a number with thousands separators, nothing for None, and other values as text."""
    if value is None:
        return ""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        number = float(value)
        return f"{number:,.2f}" if abs(number) >= 1 else f"{number:.4g}"
    return escape(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _density(share: float) -> str:
    """Return a share that is usually far below 1 %, such as 0.027 %."""
    return _percent(share) if share >= 0.01 else f"{100 * share:.2g} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; the first `left` columns are text, the others are numbers.

    The cells are escaped already.
    """
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _date(time: int) -> str:
    """Return the date of a second since 1970 (UTC)."""
    return str(np.datetime64(int(time), "s").astype("datetime64[D]"))


# ---- the sections of the card


def _summary(info: Mapping[str, Any], items: pa.Table, measures: Measures) -> str:
    """Return the first paragraph: how much there is, how the rows were made, what is known."""
    sizes = {name: f"{len(found):,}" for name, found in measures.history_lengths.items()}
    rows = [f"{sizes[name]} {word}" for name, word in SPLIT_WORDS.items()]
    domain = "" if info["domain"] == "items" else f" ({escape(info['domain'])})"
    words = PROTOCOL_WORDS.get(info["protocol"])
    options = ", ".join(
        f"{escape(key)} = {_number(value) or 'none'}" for key, value in info["parameters"].items()
    )

    sentences = [
        f"{len(items):,} items{domain} and {measures.users:,} users, in {rows[0]}, {rows[1]} and "
        f"{rows[2]} rows. Density: {_density(measures.pairs / (measures.users * len(items)))} of "
        "the pairs of a user and an item occur as targets.",
        "A row is what a user met before, oldest first (the history), and what came next (the "
        "target).",
        f"Protocol {escape(info['protocol'])}" + (f": {words}." if words else "."),
    ]
    if options:
        sentences.append(f"Options: {options}.")
    if span := measures.span():
        first, last = map(_date, span)
        sentences.append(f"The times of the targets run from {first} to {last} (UTC).")
    else:
        sentences.append("There are no timestamps.")
    return " ".join([*sentences, *_known_of_items(items, measures)])


def _known_of_items(items: pa.Table, measures: Measures) -> list[str]:
    """Return sentences that count the items with a title, a semantic ID and metadata."""
    codes = items["semantic_id"].drop_null()
    with_title = f"{len(measures.title_words):,} items have a title,"
    if len(codes):
        levels = pc.min_max(pc.list_value_length(codes)).as_py()
        low, high = levels["min"], levels["max"]
        depth = f"{low}" if low == high else f"{low} to {high}"
        sentences = [with_title, f"{len(codes):,} a semantic ID of {depth} codes."]
    else:
        sentences = [with_title, "none a semantic ID."]

    known = {"item_id", "title", "semantic_id", "source_id"}
    metadata = [
        f"{escape(name)} ({_percent(1 - items[name].null_count / len(items))} of the items)"
        for name in items.column_names
        if name not in known
    ]
    if metadata:
        sentences.append(f"Metadata: {', '.join(metadata)}.")
    return sentences


def _splits_table(splits: Mapping[str, pa.Table], measures: Measures) -> str:
    has_times = measures.span() is not None
    rows = []
    for name in SPLIT_WORDS:
        users = pc.count_distinct(splits[name]["user_id"]).as_py()
        cold = (measures.popularity[splits[name]["target"].to_numpy()] == 0).mean()
        row = [name, f"{splits[name].num_rows:,}", f"{users:,}", _percent(cold)]
        row.append(_percent(measures.repeats[name]))
        if has_times:
            times = measures.times[name]
            row += [_date(times.min()), _date(times.max())] if len(times) else ["", ""]
        rows.append(row)

    header = ["split", "rows", "users", "rows with a cold target", "with a repeated target"]
    header += ["first target", "last target"]
    table = _table(header[: len(rows[0])], rows)
    return (
        f"{table}\n\nAn item is cold if it is the target of no training row. A target is repeated "
        "if it is in the row's history."
    )


def _repeats(repeats: Mapping[str, Any] | None) -> str:
    """Return how often training targets are seen items, and what `--exclude_seen auto` means."""
    if repeats is None:
        return ""
    what = {"yes": "leaves seen items out of", "no": "keeps seen items in"}
    return (
        f"{_percent(repeats['training_targets'])} of the training targets are items that the user "
        "had met before, counting what was cut off the history where it is known. So "
        f"`--exclude_seen auto` {what[repeats['exclude_seen']]} the lists of this dataset."
    )


def _funnel(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return a table from the source's files to the rows, with one line per step.

    A column that no step fills is left out.
    """
    keys = dict.fromkeys([*FUNNEL_COLUMNS, *(key for step in steps for key in step)])
    columns = [
        key for key in keys if key != "step" and any(step.get(key) is not None for step in steps)
    ]
    if not columns:
        return ""
    rows = [[escape(step["step"]), *(_number(step.get(key)) for key in columns)] for step in steps]
    return "## From the source to the rows\n\n" + _table(["step", *map(escape, columns)], rows)


def _expected(expected: Mapping[str, Sequence[float]]) -> str:
    """Return a table of the counts that the preset's paper prints and the counts found."""
    rows = []
    for what, (wanted, found) in expected.items():
        difference = found - wanted
        share = f" ({100 * difference / wanted:+.1f} %)" if wanted else ""
        sign = "+" if difference > 0 else ""
        shown = f"{sign}{_number(difference)}{share}"
        rows.append([escape(what), _number(wanted), _number(found), shown])
    if not rows:
        return ""
    header = ["what", "expected", "found", "difference"]
    return "## Counts of the paper and counts found\n\n" + _table(header, rows)


def _hygiene(report: Mapping[str, Any]) -> str:
    """Return a table of the title hygiene, with the first example of each step."""
    rows = []
    for step, found in report.items():
        if isinstance(found, dict):
            example = _example(found.get("examples", []))
            rows.append([escape(step), example, _number(found["count"])])
        else:
            rows.append([escape(step.replace("_", " ")), "", _number(found)])
    if not rows:
        return ""
    return "## Title hygiene\n\n" + _table(["step", "example", "titles"], rows, left=2)


def _example(examples: Sequence[Sequence[Any]]) -> str:
    """Return the first example as "before → after"; nothing if only white space differs."""
    if not examples:
        return ""
    _, *titles = examples[0]
    before, after = ("(none)" if title is None else escape(title) for title in titles)
    return f"{before} → {after}" if before != after else ""


def _distributions(measures: Measures) -> str:
    """Return tables of quantiles and of popularity.

    Each quantile is a value that occurs: the smallest that this share of the values does not
    exceed.
    """
    values = {
        f"history length, {name}": lengths for name, lengths in measures.history_lengths.items()
    }
    values["training rows per item"] = measures.popularity
    if len(measures.title_words):
        values["title words"] = measures.title_words
        values["title characters"] = measures.title_characters

    rows = []
    for what, found in values.items():
        quantiles = np.quantile(found, list(QUANTILES.values()), method="inverted_cdf")
        shown = [f"{quantile:,}" for quantile in quantiles]
        rows.append([what, f"{len(found):,}", f"{found.mean():,.2f}", *shown])
    table = _table(["", "values", "mean", *QUANTILES], rows)

    cold = int(np.count_nonzero(measures.popularity == 0))
    share = cold / len(measures.popularity)
    facts = [["cold items", _number(cold), f"{_percent(share)} of the items"]]
    for label, one_in in TOP_SHARES.items():
        count, share = measures.top(one_in)
        what = f"the most popular {label} of the items"
        facts.append([what, _number(count), f"{_percent(share)} of the training targets"])
    return "\n\n".join(["## Distributions", table, _table(["", "items", "share"], facts)])


def _order_and_loading(protocol: str, has_times: bool) -> str:
    if protocol == "given":
        order = "Rows are in the order of the source's files."
    elif not has_times:
        order = "Interactions are in the order of the source's files: they have no timestamps."
    else:
        order = (
            "Interactions are ordered by time. Interactions of equal time keep the order of the "
            "source's files (file position)."
        )
    return f"""## Order and loading

{order} The index of a row in its file is its `row_id`.

```python
from igd_ds.data.dataset import InteractionDataset

dataset = InteractionDataset.load("DATASET")  # the path of this folder
train = dataset.splits["train"]
print(dataset.num_items, len(train), train.history(0), train.targets[0])
```"""


def _sources(info: Mapping[str, Any]) -> str:
    """Return the table of the source's files and, where they are known, its page and licence."""
    rows = [[escape(source["path"]), f"`{source['sha256']}`"] for source in info["sources"]]
    table = _table(["file", "sha256"], rows, left=2) if rows else "None: the data were generated."
    known = []
    if url := info.get("source_url"):
        known.append(f"Page of the source: <{url}>.")
    if name := info.get("license"):
        known.append(f"Licence of the source: {escape(name)}.")
    return "\n\n".join(filter(None, ["## Source files", " ".join(known), table]))


# ---- the figures of the card


def _draw_figures(folder: Path, measures: Measures) -> dict[str, str]:
    """Write the figures that the data allow; return what each file shows, by file name."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures: dict[str, tuple[str, Callable[[Figure, Measures], None]]] = {
        "history_length.png": ("Histogram of the history lengths of each split", _draw_history),
        "popularity.png": (
            "Training rows per item against the item's rank, both logarithmic",
            _draw_popularity,
        ),
    }
    span = measures.span()
    if (
        span
        and FIRST_DATE <= np.datetime64(span[0], "s") <= np.datetime64(span[1], "s") <= LAST_DATE
    ):
        figures["time.png"] = ("Rows over time, by split", _draw_time)
    if len(measures.title_words):
        figures["title_length.png"] = (
            "Histograms of the title lengths in words and in characters",
            _draw_titles,
        )

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignores the user's matplotlibrc
        matplotlib.rcParams.update(cast(Any, STYLE))
        for name, (_, draw) in figures.items():
            figure = Figure()
            FigureCanvasAgg(figure)
            draw(figure, measures)
            figure.savefig(folder / name, metadata=cast(Any, {"Software": None}))
    return {name: what for name, (what, _) in figures.items()}


def _length_bins(values: np.ndarray) -> np.ndarray:
    """Return the edges of at most MAX_LENGTH_BINS bins of whole numbers.

    A long tail (beyond twice the 99.5 % quantile) has no bins of its own: `_count` adds it to the
    last bin.
    """
    first, last = int(values.min()), int(values.max())
    usual = int(np.quantile(values, 0.995, method="inverted_cdf"))
    if last > 2 * usual:
        last = usual + 1
    width = -(-(last - first + 1) // MAX_LENGTH_BINS)
    return np.arange(first, last + width + 1, width) - 0.5


def _count(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(np.minimum(values, edges[-1]), edges)[0]


def _label_lengths(axes: "Axes", what: str, edges: np.ndarray, longest: int) -> None:
    tail = "" if longest <= edges[-1] else f"\n(last bar: {int(edges[-2] + 0.5):,} to {longest:,})"
    axes.set_xlabel(what + tail)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def _draw_history(figure: "Figure", measures: Measures) -> None:
    axes = figure.subplots()
    everything = np.concatenate(list(measures.history_lengths.values()))
    edges = _length_bins(everything)

    for name, lengths in measures.history_lengths.items():
        share = 100 * _count(lengths, edges) / len(lengths)
        style: dict[str, Any] = (
            {"linestyle": LINES[name], "linewidth": 1.6} if name in LINES else {"fill": True}
        )
        label = f"{name} (n = {len(lengths):,})"
        axes.stairs(share, edges, color=FILLS[name], label=label, **style)

    axes.set_ylabel("rows of the split (%)")
    _label_lengths(axes, "history length (items)", edges, int(everything.max()))
    figure.legend(loc="outside upper center", ncols=len(SPLIT_WORDS))


def _draw_popularity(figure: "Figure", measures: Measures) -> None:
    axes = figure.subplots()
    counts = -np.sort(-measures.popularity)
    warm = int(np.count_nonzero(counts))

    # At most 400 points: the eye could not tell more apart.
    ranks = np.unique(np.geomspace(1, warm, 400).round().astype(np.int64))
    axes.loglog(ranks, counts[ranks - 1], color="#1f5a94", marker=".", markersize=4, linewidth=1)

    # Where both shares are one and the same item, one line is drawn.
    lines = {measures.top(one_in): label for label, one_in in TOP_SHARES.items()}
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


def _draw_time(figure: "Figure", measures: Measures) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    span = measures.span()
    assert span is not None, "drawn only if there are timestamps"
    first, last = span
    unit, width = next(
        (bins for bins in BIN_WIDTHS.items() if (last - first) // bins[1] < MAX_TIME_BINS),
        ("year", BIN_WIDTHS["year"]),
    )
    edges = np.arange(first // width, last // width + 2) * width

    axes = figure.subplots()
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

    # The labels are digits only: names of months depend on the locale.
    locator = AutoDateLocator(tz="UTC", minticks=3, maxticks=6)
    formatter = ConciseDateFormatter(
        locator,
        tz="UTC",
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


def _draw_titles(figure: "Figure", measures: Measures) -> None:
    lengths_by_unit = {"words": measures.title_words, "characters": measures.title_characters}
    for axes, (unit, lengths) in zip(figure.subplots(1, 2), lengths_by_unit.items(), strict=True):
        edges = _length_bins(lengths)
        axes.stairs(_count(lengths, edges), edges, fill=True, color="#1f5a94")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="y", integer=True)
        width = int(edges[1] - edges[0])
        axes.set_ylabel("items" if width == 1 else f"items per {width} {unit}")
        _label_lengths(axes, f"title length ({unit})", edges, int(lengths.max()))
