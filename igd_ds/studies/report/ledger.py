"""The ledger: published numbers, numbers that others reproduced, and ours, side by side.

The numbers of others come from a YAML file, `igd report --published FILE`, a list of entries:

    - dataset: beauty-2014          # a dataset's name as in the runs
      method: SASRec                # a method's name as in the ledger
      kind: published               # or: reproduced, by others than the authors
      metrics: {hr@10: 0.0605, ndcg@10: 0.0318}
      source: TIGER, Table 1
      url: https://arxiv.org/abs/2305.05065       # optional: linked in the page and in Markdown
      protocol: leave-one-out, 5-core             # optional text: split, filtering
      note: hidden size 64                        # optional text

A method's name is the one in the other tables, after the model's name for a generative method:
`qwen2-1m, igd β=0.1`. The settings at its end may be left out where only one such method was
tested: `SASRec` for `SASRec dropout=0.2 learning_rate=0.003`. Methods without a run may be the
baselines of `igd baseline`; such a row shows only the numbers of others.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from igd_ds.baselines.counted import COUNTED
from igd_ds.baselines.losses import LOSSES
from igd_ds.baselines.sequential import SEQUENTIAL
from igd_ds.config.yaml_files import read_yaml_file
from igd_ds.errors import UsageError, did_you_mean
from igd_ds.evaluation.metrics import CUTOFFS, HEADLINE
from igd_ds.run_folder import BEFORE_RECORDED
from igd_ds.studies.report.cells import headings, over_seeds, title_of
from igd_ds.studies.report.layout import Cell, Source, Table, formatted
from igd_ds.studies.report.study import (
    AT_ALPHA,
    CROSS_ENTROPY,
    EVALUATION,
    RECOMMENDERS,
    Json,
    Run,
    Study,
    method_of,
)
from igd_ds.studies.rounding import significant

REQUIRED = ("dataset", "method", "kind", "metrics", "source")
OPTIONAL = ("url", "protocol", "note")
KEYS = (*REQUIRED, *OPTIONAL)
PUBLISHED, REPRODUCED = KINDS = ("published", "reproduced")
MEASURES = [f"{name}@{k}" for name in ("ndcg", "hr") for k in CUTOFFS]
"""The measures that metrics.json may have, in the order of the ledger's columns."""
LARGEST_GAP = 0.05
"""A note names each of our means that is further below the published number than this share."""
SEEN = {"no": "kept", "yes": "left out"}
"""What an evaluation did with items that the user had met before, by its `exclude_seen`."""
OF_BASELINES = ("exclude_seen", "search", "num_beams", "rows", "num_rows", "seed", "item_filter")
"""Those of EVALUATION that tell the evaluations of a baseline apart; the others are of a search."""
SHOWN = ("exclude_seen", "search", "num_beams", "rows", "num_rows")
"""Those of EVALUATION that the columns show."""
OURS = "ours"
FIRST_COLUMNS = ["Dataset", "Method", "Numbers of"]
"""The columns before those of the measures."""
LAST_COLUMNS = [
    "Ours / published", "Seeds", "Seen items", "Search", "Rows", "Split", "Loss", "Hours",
]  # fmt: skip
"""The columns after those of the measures."""

Line = dict[str, Cell]
"""A line of the ledger: cells by column. The columns that are left out are empty."""
Evaluation = list[tuple[Run, Json]]
"""The runs of a method's seeds that were evaluated alike, each with that evaluation."""


def read_published(path: Path) -> list[Json]:
    """Read a file of published numbers (see the module's example).

    Returns:
        The entries, each with the keys that the file gives, in the order of KEYS.

    Raises:
        UsageError: names the file, the entry and the key of whatever is wrong.
    """
    if not path.is_file():
        raise UsageError(f"--published: no file {path}")
    found = read_yaml_file(path)
    if not isinstance(found, list) or not found:
        raise UsageError(
            f"{path}: expected a list of entries with the keys {', '.join(KEYS)}, found {found!r}"
        )

    first: dict[tuple[str, ...], int] = {}
    entries = []
    for number, raw in enumerate(found, 1):
        entry = checked_entry(raw, place(path, number))
        identity = tuple(entry[key] for key in ("dataset", "method", "kind", "source"))
        if (earlier := first.setdefault(identity, number)) != number:
            raise UsageError(
                f"{place(path, number)} has the dataset, method, kind and source of entry "
                f"{earlier}: put their metrics into one entry"
            )
        entries.append(entry)
    return entries


def place(path: Path, number: int) -> str:
    """Return where an entry stands, for messages; `number` counts from 1."""
    return f"{path}: entry {number}"


def checked_entry(entry: Any, where: str) -> Json:
    """Return an entry of the file with its keys in order; raise UsageError for a bad one."""
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: expected 'key: value' lines, found {entry!r}")
    for key in entry:
        if key not in KEYS:
            raise UsageError(f"{where}: {unknown('key', key, KEYS)}")
    for key in REQUIRED:
        if key not in entry:
            raise UsageError(f"{where}: {key} is missing; an entry needs {', '.join(REQUIRED)}")
    for key, value in entry.items():
        if key != "metrics" and not (isinstance(value, str) and value.strip()):
            raise UsageError(f"{where}: {key}: expected a text, found {value!r}")

    if entry["kind"] not in KINDS:
        raise UsageError(f"{where}: {unknown('kind', entry['kind'], KINDS)}")
    url = entry.get("url", "https://")
    if not url.startswith(("http://", "https://")) or set(url) & set(" \n\t<>"):
        raise UsageError(f"{where}: url: expected an address that begins with https://, not {url}")
    return {key: entry[key] for key in KEYS if key in entry} | {
        "metrics": checked_metrics(entry["metrics"], f"{where}: metrics")
    }


def checked_metrics(values: Any, where: str) -> dict[str, float]:
    """Return the metrics of an entry in the order of MEASURES; raise UsageError for bad ones."""
    if not isinstance(values, dict) or not values:
        raise UsageError(f"{where}: expected values such as {{hr@10: 0.06}}, found {values!r}")
    for name, value in values.items():
        if name not in MEASURES:
            raise UsageError(f"{where}: {unknown('metric', name, MEASURES)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= 1:
            raise UsageError(f"{where}: {name}: expected a number from 0 to 1, found {value!r}")
    return {name: float(values[name]) for name in MEASURES if name in values}


def unknown(what: str, name: Any, known: Iterable[str]) -> str:
    """Return a message about a name that is not one of `known`."""
    known = list(known)
    return f"unknown {what} {name!r}{did_you_mean(str(name), known)}; known: {'; '.join(known)}"


def check_known(published: Sequence[Json], study: Study, path: Path) -> None:
    """Check the datasets and methods of published numbers against a study.

    Args:
        published: as `read_published` returns them.
        study: the runs that they stand beside.
        path: the file, for messages.

    Raises:
        UsageError: names the entry and an unknown dataset or method, or a method's name that stands
            for several tested methods.
    """
    datasets = list(dict.fromkeys(run.dataset for run in study.runs))
    baselines = [
        name if loss == CROSS_ENTROPY else f"{name}, {loss}"
        for recommender, name in RECOMMENDERS.items()
        for loss in ([CROSS_ENTROPY] if recommender in COUNTED else LOSSES)
    ]
    of_runs = {name for run in study.runs if run.method for name in names_of(run)}
    known = list(dict.fromkeys([*sorted(of_runs), *baselines]))
    for number, entry in enumerate(published, 1):
        where, method = place(path, number), entry["method"]
        if entry["dataset"] not in datasets:
            raise UsageError(f"{where}: {unknown('dataset', entry['dataset'], datasets)}")
        if method not in known:
            raise UsageError(f"{where}: {unknown('method', method, known)}")

        tested = runs_on_test(study, entry["dataset"])
        meant = {names_of(run)[0] for run in tested if method in names_of(run)}
        if len(meant) > 1 and method not in meant:
            raise UsageError(
                f"{where}: method: {method!r} may be any of {', '.join(sorted(meant))} on "
                f"{entry['dataset']}; name one of them"
            )


def ledger(study: Study) -> list[Table]:
    """Return the ledger; [] without published numbers.

    For each dataset and method it has a line per entry of the file, then a line per way in which
    our runs were evaluated. Each measure of the file has a column.
    """
    if not study.published:
        return []
    measures = [m for m in MEASURES if any(m in entry["metrics"] for entry in study.published)]
    lines: list[Line] = []
    sources: list[Source] = []
    commands: dict[str, str] = {}
    gaps: list[str] = []
    notes: list[str] = []
    for dataset in dict.fromkeys(run.dataset for run in study.runs):
        for method, (entries, runs) in methods_of(study, dataset).items():
            name = f"{dataset}, {method}"
            sources += [source_of(entry, name) for entry in entries]
            if runs and runs[0].command:
                commands[name] = runs[0].command
            notes += left_out(runs)

            named = {"Dataset": Cell(dataset), "Method": Cell(method)}
            lines += [named | line_of_others(entry) for entry in entries]
            tested = evaluations(runs)
            for evaluation in tested:
                line = named | our_line(evaluation, measures, differing(tested))
                ratios = ratios_of(line, entries)
                lines.append(line | {"Ours / published": Cell(lowest(ratios))})
                gaps += gap_of(ratios, line)

    if gaps:
        far = f"More than {LARGEST_GAP:.0%} below the published number"
        notes = [f"{far}: {'; '.join(gaps)}.", *notes]
    caption = (
        "Test results. Numbers of: published numbers, numbers that others than the authors "
        "reproduced, or ours: item match, mean ± standard deviation over seeds. Ours / published: "
        "our mean divided by the largest published number, for the measure where that is lowest. "
        "Seen items: whether our lists keep items that the user had met before. Search: the method "
        "and the number of items in a list. Rows: evaluated test rows. Split: for numbers of "
        "others, the protocol as their source states it. Hours: wall time of the training, mean "
        f"over seeds. {AT_ALPHA}"
    )
    title = "Ledger: published, reproduced, ours"
    columns = [*FIRST_COLUMNS, *headings(measures), *LAST_COLUMNS]
    rows = [[line.get(column, Cell("")) for column in columns] for line in lines]
    return [Table("ledger", title, caption, columns, rows, notes, sources, commands)]


def runs_on_test(study: Study, dataset: str) -> list[Run]:
    """Return the complete runs of a dataset that were evaluated on test."""
    return [run for run in study.runs if run.dataset == dataset and run.is_complete and run.test]


def names_of(run: Run) -> list[str]:
    """Return a run's method with its model as the tables call it, and without settings at its end.

    The names are equal where there are no such settings.
    """
    model = "" if run.is_baseline else run.backbone
    names = [title_of(model, run.method)]
    with contextlib.suppress(KeyError):  # a row of a sweep that was never started
        names.append(title_of(model, method_of(run.settings)))
    return names


def methods_of(study: Study, dataset: str) -> dict[str, tuple[list[Json], list[Run]]]:
    """Return by method of a dataset the published entries and the tested runs.

    The methods of the file come first, in its order. A method is called without the settings at its
    end where no other one is called so.
    """
    runs: dict[str, list[Run]] = {}
    for run in runs_on_test(study, dataset):
        runs.setdefault(names_of(run)[0], []).append(run)
    short = {name: names_of(its[0])[-1] for name, its in runs.items()}
    shown = {name: s if list(short.values()).count(s) == 1 else name for name, s in short.items()}

    found: dict[str, tuple[list[Json], list[Run]]] = {}
    for entry in (entry for entry in study.published if entry["dataset"] == dataset):
        named: str = entry["method"]
        found.setdefault(shown.get(named, named), ([], []))[0].append(entry)
    for name, its in runs.items():
        found.setdefault(shown[name], ([], []))[1].extend(its)
    return found


def usable_results(run: Run) -> Iterator[Json]:
    """Yield the usable evaluations of a run's test rows, the one of the other tables first."""
    for results in (run.test, run.exact, *run.other_tests.values()):
        if results and "problem" not in results and run.alpha in results["alpha"]:
            yield {**BEFORE_RECORDED, **results}


def evaluations(runs: Sequence[Run]) -> list[Evaluation]:
    """Return the evaluations of a method's runs, those that are alike in EVALUATION together.

    Of two evaluations of a run that are alike, the first one is taken.
    """
    found: dict[str, dict[str, tuple[Run, Json]]] = {}
    for run in runs:
        for results in usable_results(run):
            key = repr(settings_of(run, results))
            found.setdefault(key, {}).setdefault(run.name, (run, results))
    return [list(by_run.values()) for by_run in found.values()]


def settings_of(run: Run, results: Json) -> Json:
    """Return what tells an evaluation from others of the same run, by entry of metrics.json."""
    return {key: results.get(key) for key in (OF_BASELINES if run.is_baseline else EVALUATION)}


def differing(tested: Sequence[Evaluation]) -> list[str]:
    """Return the settings without a column in which the evaluations of a method differ."""
    many = [settings_of(*evaluation[0]) for evaluation in tested]
    names = [name for name in EVALUATION if name not in SHOWN]
    return [name for name in names if len({repr(one.get(name)) for one in many}) > 1]


def left_out(runs: Sequence[Run]) -> list[str]:
    """Return notes on evaluations of test rows that the ledger cannot use."""
    notes = []
    for run in runs:
        for name, results in {"test-exact": run.exact or {}, **run.other_tests}.items():
            problem = results.get("problem", "")
            if results and not problem and run.alpha not in results["alpha"]:
                problem = f"it lacks α = {run.alpha}, at which the run is reported"
            if problem:
                notes.append(f"Left out: eval/{name} of {run.name}: {problem}.")
    return notes


def line_of_others(entry: Json) -> Line:
    """Return the cells of an entry's line behind its method."""
    return {
        "Numbers of": Cell(f"{entry['kind']}: {entry['source']}"),
        **{heading(measure): Cell(value) for measure, value in entry["metrics"].items()},
        "Split": Cell(entry.get("protocol", "")),
    }


def our_line(evaluation: Evaluation, measures: Sequence[str], shown: Sequence[str]) -> Line:
    """Return the cells of a line of ours behind its method, without the ratio.

    Args:
        evaluation: our runs of the line.
        measures: the measures that have a column.
        shown: settings of the evaluation that stand beside the search.
    """
    run, results = evaluation[0]
    search = f"{results.get('search', 'beam')}, {results.get('num_beams', 'unknown')}"
    search = ", ".join([search, *(f"{name}={results.get(name)}" for name in shown)])
    trained = [None if r.seconds is None else r.seconds / 3600 for r, _ in evaluation]
    means = {
        measure: over_seeds(
            [found["alpha"][r.alpha][HEADLINE].get(measure) for r, found in evaluation]
        )
        for measure in measures
    }
    return {
        "Numbers of": Cell(OURS),
        **{heading(measure): mean for measure, mean in means.items()},
        "Seeds": Cell(len(evaluation), form="d"),
        "Seen items": Cell(SEEN.get(results["exclude_seen"], "")),
        "Search": Cell(search),
        "Rows": Cell(results["rows"], form=",d"),
        "Split": Cell(run.protocol),
        "Loss": Cell(loss_of(run)),
        "Hours": Cell(over_seeds(trained).value, form=".2f"),
    }


def heading(measure: str) -> str:
    """Return the heading of a measure's column."""
    return headings([measure])[0]


def ratios_of(line: Line, entries: Sequence[Json]) -> dict[str, float]:
    """Return our mean divided by the largest published number, by heading of a measure."""
    largest: dict[str, float] = {}
    for entry in entries:
        if entry["kind"] == PUBLISHED:
            for measure, value in entry["metrics"].items():
                largest[heading(measure)] = max(value, largest.get(heading(measure), 0.0))
    ours = {name: line[name].number for name in largest}
    return {
        name: significant(mean / largest[name])
        for name, mean in ours.items()
        if mean is not None and largest[name]
    }


def lowest(ratios: Mapping[str, float]) -> str:
    """Return the lowest ratio with its measure as text, or no text.

    Example:
        >>> lowest({"HR@10": 0.96, "NDCG@10": 1.2}), lowest({})
        ('0.960 (HR@10)', '')
    """
    if not ratios:
        return ""
    name = min(ratios, key=lambda name: ratios[name])
    return f"{formatted(ratios[name], '.3f')} ({name})"


def gap_of(ratios: Mapping[str, float], line: Line) -> list[str]:
    """Return the measures of a line of ours whose ratio is more than LARGEST_GAP below 1.

    Returns:
        One text, or none.
    """
    far = [
        f"{name} −{formatted(significant(1 - ratio), '.1%')}"
        for name, ratio in ratios.items()
        if ratio < 1 - LARGEST_GAP
    ]
    place = ("Dataset", "Method", "Search")
    where = [*(line[name].text for name in place), f"seen items {line['Seen items'].text}"]
    return [f"{', '.join(where)}, {line['Rows'].text} rows: {', '.join(far)}"] if far else []


def loss_of(run: Run) -> str:
    """Return the loss that a run was trained with: a baseline's, or the objective."""
    if not run.is_baseline:
        return run.objective or ""
    is_trained = run.settings["recommender"] in SEQUENTIAL
    return str(run.settings.get("loss", CROSS_ENTROPY)) if is_trained else "none"


def source_of(entry: Mapping[str, Any], name: str) -> Source:
    """Return where the numbers of an entry come from; `name` is its dataset and method."""
    remark = "; ".join(entry[key] for key in ("protocol", "note") if key in entry)
    return Source(f"{name}, {entry['kind']}", entry["source"], entry.get("url", ""), remark)
