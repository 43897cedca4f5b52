"""Figures of a study: plain averages, left out without data, bytes that do not change."""

import dataclasses
import hashlib
import math
import os
import statistics
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import sample_study
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from igd_ds.studies.report import drawing, figures
from igd_ds.studies.report.figures import FIGURES, all_figures, blocks

BOOKS, INSTRUMENTS = "books-small-qwen2-1m-", "instruments-qwen2-1m-"
EVERYWHERE = {
    "improvements",
    "validation",
    "loss-by-objective",
    "probability-by-gain",
    "entropy-gap",
    "popularity",
    "head-tail",
}


@pytest.fixture(scope="module")
def study():
    return sample_study.make()


def by_name(study) -> dict:
    return {figure.name: figure for figure in all_figures(study)}


def drawn(figure) -> Canvas:
    """The figure as matplotlib objects."""
    canvas = Canvas(figure.size)
    FigureCanvasAgg(canvas)
    figure.draw(canvas)
    return canvas


def changed(study, change):
    """The study with `change` applied to the fields of each run."""
    return dataclasses.replace(
        study, runs=[dataclasses.replace(run, **change(run)) for run in study.runs]
    )


def hashes(study) -> list[str]:
    """Of the bytes of some figures, which between them use all that is drawn with."""
    some = [
        figure
        for figure in all_figures(study)
        if figure.name.endswith(("loss-by-beta", "popularity", "head-tail", "beta"))
    ]
    return [
        hashlib.sha256(figure.render(kind)).hexdigest()
        for figure in some
        for kind in ("png", "svg")
    ]


def lines_of(axes, count: int) -> list[np.ndarray]:
    """The heights of the lines that have `count` points."""
    return [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == count]


def test_each_dataset_has_the_figures_it_has_data_for(study):
    names = [figure.name for figure in all_figures(study)]
    assert len(set(names)) == len(names)
    books = EVERYWHERE | {"beta", "loss-by-beta"}
    instruments = EVERYWHERE | {"curriculum", "objective-shares"}
    assert set(names) == {"purity"} | {BOOKS + name for name in books} | {
        INSTRUMENTS + name for name in instruments
    }
    assert len(books | instruments) == len(FIGURES)  # none is never drawn


def test_a_training_of_one_validation_shows_its_point(study):
    runs = [
        dataclasses.replace(run, curves={tag: points[:1] for tag, points in run.curves.items()})
        for run in study.runs
    ]
    drawn = {f.name: f for f in all_figures(dataclasses.replace(study, runs=runs))}
    canvas = Canvas()
    drawn[f"{BOOKS}validation"].draw(canvas)
    for axes in canvas.axes:
        assert axes.lines
        for line in axes.lines:
            assert len(line.get_xdata()) == 1 and line.get_marker() not in ("", "None", None)
            assert line.get_markevery() is None, "every point has its marker"


def test_datasets_whose_names_make_one_file_name_keep_their_figures(study):
    renamed = {"books-small": "книги", "instruments": "ноты"}
    runs = [dataclasses.replace(run, dataset=renamed[run.dataset]) for run in study.runs]
    rows = {renamed[dataset]: splits for dataset, splits in study.rows.items()}
    found = all_figures(dataclasses.replace(study, runs=runs, rows=rows))
    names = [figure.name for figure in found]
    assert len(set(names)) == len(names) == len(all_figures(study))
    assert {"qwen2-1m-improvements", "qwen2-1m-improvements-2"} <= set(names)


@pytest.mark.parametrize(
    "lost, key",
    [
        ("improvements", "ranks"),
        ("validation", "valid/n"),
        ("loss-by-objective", "train/nll_zero_gain"),
        ("loss-by-beta", "train/nll_nonzero_gain"),
        ("probability-by-gain", "valid/nll_gain_"),
        ("objective-shares", "train/alpha_fr"),
        ("popularity", "popularity_deciles"),
        ("head-tail", "token_match_tail_targets"),
        ("entropy-gap", "target_prefix_entropy"),
    ],
)
def test_a_figure_without_its_data_is_left_out_alone(study, lost, key):
    def without(run):
        curves = {tag: points for tag, points in run.curves.items() if not tag.startswith(key)}
        test = run.test and run.test | {
            "alpha": {
                a: {k: v for k, v in e.items() if k != key} for a, e in run.test["alpha"].items()
            }
        }
        valid = {name: value for name, value in run.valid.items() if name != key}
        return {
            "curves": curves,
            "test": test,
            "valid": valid,
            "ranks": {} if key == "ranks" else run.ranks,
        }

    gone = by_name(study).keys() - by_name(changed(study, without)).keys()
    also = (
        {"probability-by-gain"}
        if lost == "validation"
        else {"loss-by-beta", "loss-by-objective"}
        if "loss" in lost
        else set()
    )
    assert {name.removeprefix(BOOKS).removeprefix(INSTRUMENTS) for name in gone} == {lost} | also


def test_every_axis_is_labelled_and_every_line_named(study):
    for figure in all_figures(study):
        canvas = drawn(figure)
        assert canvas.axes and figure.caption.endswith(".")
        assert all(axes.get_xlabel() for axes in canvas.axes), figure.name
        assert canvas.axes[0].get_ylabel() or len(canvas.axes[0].get_yticklabels()) > 1, figure.name
        looks = [
            (line.get_color(), line.get_linestyle(), line.get_marker())
            for text in canvas.legends
            for line in text.get_lines()
        ]
        assert len(set(looks)) == len(looks), f"{figure.name}: two lines look alike"


def test_looks_differ_without_colour():
    looks = [drawing.look(index) for index in range(40)]
    assert len({(str(look["linestyle"]), look["marker"]) for look in looks}) == 40
    light = [
        np.dot(drawing.shade(index, 8)["color"][:3], (0.299, 0.587, 0.114)) for index in range(8)
    ]
    assert all(b - a > 0.05 for a, b in pairwise(light)) and light[-1] < 0.85


def test_runs_that_are_not_whole_change_nothing(study):
    wild = [
        dataclasses.replace(
            run,
            name=f"{run.name}-{state}",
            seed=9,
            state=state,
            curves={tag: [[1, 1e9]] for tag in run.curves},
        )
        for run in study.runs[:3]
        for state in ("unfinished", "failed", "not run")
    ]
    before, after = by_name(study), by_name(dataclasses.replace(study, runs=wild + study.runs))
    assert before.keys() == after.keys()
    name = BOOKS + "loss-by-beta"
    assert before[name].render("png") == after[name].render("png")


def test_blocks_hold_one_dataset_and_backbone(study):
    other = [
        dataclasses.replace(run, backbone="llama") for run in study.runs if not run.is_baseline
    ]
    found = blocks(dataclasses.replace(study, runs=study.runs + other))
    assert len(found) == 4
    for block in found:
        assert {run.dataset for run in block.runs} == {block.dataset}
        assert {run.backbone for run in block.runs if not run.is_baseline} == {block.backbone}
        assert any(run.is_baseline for run in block.runs)
    baselines = [run for run in study.runs if run.is_baseline]
    assert [block.backbone for block in blocks(dataclasses.replace(study, runs=baselines))] == [
        "",
        "",
    ]


def test_a_mean_curve_goes_as_far_as_every_seed(study):
    first, second = (
        study.runs[0],
        dataclasses.replace(
            study.runs[1], curves={"train/loss": [[10, 4.0], [30, 2.0], [50, math.nan]]}
        ),
    )
    first = dataclasses.replace(first, curves={"train/loss": [[0, 8.0], [20, 6.0], [40, 0.0]]})
    steps, mean, deviation = drawing.mean_curve([first, second], "train/loss")
    assert steps.tolist() == [10, 30]
    expected = [(7.0, 4.0), (3.0, 2.0)]  # the first seed's values lie between its points
    assert np.allclose(mean, [statistics.mean(pair) for pair in expected])
    assert np.allclose(deviation, [statistics.stdev(pair) for pair in expected])
    assert drawing.mean_curve([first, dataclasses.replace(second, curves={})], "train/loss") is None


def test_beta_is_drawn_and_judged_as_averaged_by_hand(study):
    values = {}
    for run in (
        run
        for run in study.runs
        if run.dataset == "books-small" and run.settings.get("objective") in ("igd", "uniform")
    ):
        entry = run.valid["alpha"]["0.0"]["item_match"]
        values.setdefault(run.settings.get("igd_beta"), []).append(
            (entry["hr@10"], entry["ndcg@10"])
        )
    means = {
        beta: [statistics.mean(column) for column in zip(*found, strict=True)]
        for beta, found in values.items()
    }
    uniform, grid = means.pop(None), sorted(means)
    figure = by_name(study)[BOOKS + "beta"]
    for column, axes in enumerate(drawn(figure).axes):
        assert any(
            np.allclose(line, [means[beta][column] for beta in grid])
            for line in lines_of(axes, len(grid))
        )
        assert any(np.allclose(line, uniform[column]) for line in lines_of(axes, 2))
        [filled] = [
            list(line.get_xdata()) for line in axes.lines if line.get_label() == "_igd above"
        ]
        assert filled == [
            place for place, beta in enumerate(grid) if means[beta][column] > uniform[column]
        ]
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            f"{beta:g}" for beta in grid
        ]
    effective = [
        f"{beta:g}"
        for beta in grid
        if all(a > b for a, b in zip(means[beta], uniform, strict=True))
    ]
    assert (
        0 < len(effective) < len(grid)
        and f"igd is effective at β = {', '.join(effective)} (" in figure.caption
    )

    without = dataclasses.replace(
        study, runs=[run for run in study.runs if run.method != "uniform"]
    )
    assert "is unknown" in by_name(without)[BOOKS + "beta"].caption


@pytest.mark.parametrize(
    ("dataset", "name"),
    [("books-small", BOOKS + "beta"), ("instruments", INSTRUMENTS + "curriculum")],
)
def test_nothing_but_seeds_is_averaged_in_a_sensitivity(study, dataset, name):
    """Runs that differ in another setting too, uniform ones included, are a line of their own."""

    def worse(run):
        settings, method = run.settings | {"epochs": 9}, f"{run.method} epochs=9"
        entries = {
            a: e | {"item_match": {k: v / 2 for k, v in e["item_match"].items()}}
            for a, e in run.valid["alpha"].items()
        }
        return dataclasses.replace(
            run, settings=settings, method=method, valid=run.valid | {"alpha": entries}
        )

    other = [
        worse(run) for run in study.runs if run.dataset == dataset and "objective" in run.settings
    ]
    both = by_name(dataclasses.replace(study, runs=[*study.runs, *other]))[name]
    for alone, axes in zip(drawn(by_name(study)[name]).axes, drawn(both).axes, strict=True):
        lines = [[list(line.get_ydata()) for line in panel.lines] for panel in (alone, axes)]
        assert len(lines[1]) > len(lines[0]) and all(line in lines[1] for line in lines[0])
        [container] = [c for c in axes.containers if c.get_label().endswith("epochs=9")]
        [whole] = alone.containers
        assert np.allclose(container[0].get_ydata(), whole[0].get_ydata() / 2)


def test_the_entropy_gap_is_listed_minus_target(study):
    runs = [run for run in study.runs if run.dataset == "books-small" and run.method == "igd β=0.2"]
    target = runs[0].valid["target_prefix_entropy"]
    steps = sum(items >= 0.01 * target["items"][0] for items in target["items"])
    panel = drawn(by_name(study)[BOOKS + "entropy-gap"]).axes[1]
    assert panel.get_title() == "igd β=0.2"

    for alpha, line in zip(runs[0].valid["alpha"], lines_of(panel, steps), strict=True):
        seeds = [
            [
                a - b
                for a, b in zip(
                    run.valid["alpha"][alpha]["prefix_entropy"]["nats"], target["nats"], strict=True
                )
            ]
            for run in runs
        ]
        assert np.allclose(line, np.mean(seeds, axis=0)[:steps])
    rare = changed(
        study,
        lambda run: {
            "valid": run.valid
            | {"target_prefix_entropy": target | {"items": [1000, 10, 9, 0, 0, 0, 0, 0]}}
        },
    )
    assert len(lines_of(drawn(by_name(rare)[BOOKS + "entropy-gap"]).axes[0], 2)) > 5


def test_test_figures_are_drawn_at_the_chosen_alpha(study):
    runs = [run for run in study.runs if run.dataset == "books-small" and run.method == "igd β=0.2"]
    assert any(run.alpha != "0.0" for run in runs)
    entries = [run.test["alpha"][run.alpha] for run in runs]
    shares = 100 * np.mean([entry["popularity_deciles"] for entry in entries], axis=0)
    assert any(
        np.allclose(line, shares)
        for line in lines_of(drawn(by_name(study)[BOOKS + "popularity"]).axes[0], 10)
    )
    for axes, half in zip(
        drawn(by_name(study)[BOOKS + "head-tail"]).axes, ("head", "tail"), strict=True
    ):
        mean = statistics.mean(entry[f"token_match_{half}_targets"]["ndcg@10"] for entry in entries)
        assert any(math.isclose(bar.get_width(), mean, rel_tol=1e-5) for bar in axes.patches)


def test_log_probability_is_of_the_last_validation(study):
    runs = [run for run in study.runs if run.dataset == "books-small" and run.method == "cft"]
    tags = ["valid/nll_gain_zero", *(f"valid/nll_gain_{decile}" for decile in range(10))]
    expected = [-statistics.mean(run.curves[tag][-1][1] for run in runs) for tag in tags]
    assert any(
        np.allclose(line, expected)
        for line in lines_of(drawn(by_name(study)[BOOKS + "probability-by-gain"]).axes[0], 11)
    )


def test_a_decile_that_no_token_is_in_leaves_a_gap(study):
    """Many equal gains make deciles empty: the others are drawn all the same."""
    study = changed(
        study,
        lambda run: {
            "curves": {t: points for t, points in run.curves.items() if t != "valid/nll_gain_7"}
        },
    )
    axes = drawn(by_name(study)[BOOKS + "probability-by-gain"]).axes[0]
    lines = [line for line in lines_of(axes, 11) if np.isfinite(line).any()]
    assert lines and all(np.flatnonzero(~np.isfinite(line)).tolist() == [8] for line in lines)


def test_improvements_show_the_comparisons(study):
    [block] = [block for block in blocks(study) if block.dataset == "books-small"]
    assert {c.method for c in block.comparisons} == {
        "igd β=0.2",
        "igd-linear β=0.4",
        "position",
        "cft",
    }
    axes = drawn(figures.improvements(block)).axes[0]
    points = [
        line.get_xdata()[0]
        for line in axes.lines
        if len(line.get_xdata()) == 1 and line.get_marker() == "o"
    ]
    assert np.allclose(points, [c.mean - c.reference_mean for c in reversed(block.comparisons)])
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        c.method for c in reversed(block.comparisons)
    ]


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_and_nan_draw_without_a_warning(seeds):
    study = changed(
        sample_study.make(seeds),
        lambda run: {"curves": {t: [[1, math.nan], *p] for t, p in run.curves.items()}},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = by_name(study)
        assert all(drawn(figure).axes for figure in found.values())
        assert found[BOOKS + "beta"].render("svg").startswith(b"<?xml")
    assert BOOKS + "improvements" in found, "one seed has the test over users"


def test_nothing_whole_draws_nothing(study):
    assert all_figures(dataclasses.replace(study, runs=[], catalogues={})) == []
    assert by_name(changed(study, lambda run: {"state": "unfinished"})).keys() == {"purity"}


def test_bytes_do_not_depend_on_process_or_settings(study, tmp_path):
    (tmp_path / "matplotlibrc").write_text(
        "lines.linewidth: 9\nsvg.fonttype: none\nfont.family: serif\n"
    )
    code = (
        "import sample_study; from test_figures import hashes; print(hashes(sample_study.make()))"
    )
    environment = os.environ | {
        "MPLCONFIGDIR": str(tmp_path),
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    environment |= {
        "LC_ALL": "C",
        "TZ": "Asia/Tokyo",
        "SOURCE_DATE_EPOCH": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(hashes(study))


def test_drawing_leaves_matplotlib_as_it_was(study):
    before = dict(matplotlib.rcParams)
    by_name(study)["purity"].render("png")
    assert dict(matplotlib.rcParams) == before


def test_a_png_has_150_dots_per_inch(study):
    figure = by_name(study)["purity"]
    width, height = (int.from_bytes(figure.render("png")[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == tuple(int(150 * inches) for inches in figure.size)
