"""What a run shows: its header, durations in words, the end of its bar, and nothing if quiet."""

import importlib
import sys

import pytest

from igd_ds import distributed
from igd_ds.console import TIMED_STEPS, Progress, duration, header, progress_bar


def test_a_header_has_a_line_per_fact():
    assert header({"dataset": "D", "ranks": "2 × CPU"}) == "dataset  D\nranks    2 × CPU"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (99, "99 s"), (101, "2 min"), (5990, "1 h 40 min"), (9000, "2 h 30 min"),
     (48 * 3600, "2 d 0 h"), (200_000, "2 d 8 h")],
)  # fmt: skip
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("patience", "best_step", "end"),
    [(0, None, 100), (0, 30, 100), (1, None, 20), (3, None, 40), (1, 30, 40), (3, 80, 100)],
)
def test_the_bar_ends_where_early_stopping_would(patience, best_step, end):
    progress = Progress(100, 0, steps_per_epoch=10, validate_every=10, patience=patience)
    assert progress.end(best_step) == end


def test_the_bar_shows_epoch_loss_and_time_left(capsys):
    progress = Progress(8, 2, steps_per_epoch=4, validate_every=2, patience=1)
    progress.show_loss(2.5)
    progress.update(3, best_step=2, seconds=1.0)
    progress.close()
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("epoch 0.75 ") and "loss 2.5000" in last
    assert "| 3/4 [" in last  # it began after step 2, and stops at 4 if step 4 is no better


def test_the_duration_is_estimated_once_without_the_first_step(capsys):
    progress = Progress(1000, 10, steps_per_epoch=100, validate_every=100, patience=1)
    for step in range(11, 11 + 2 * TIMED_STEPS):
        progress.update(step, best_step=None, seconds=60.0 if step == 11 else 2.0)
    progress.close()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "a step" in line]
    made = 10 + 1 + TIMED_STEPS
    assert line == (
        f"2 s a step, without validations: {duration(2 * (200 - made))} to step 200, where "
        "training stops if validation does not improve, and at most "
        f"{duration(2 * (1000 - made))} to step 1,000"
    )


def test_a_quiet_run_prints_only_warnings_and_results(capsys, monkeypatch):
    monkeypatch.setattr(distributed, "_quiet", True)
    distributed.say("resumed")
    distributed.say("warning: look", always=True)
    with progress_bar(total=3) as bar:
        bar.update(2)
    printed = capsys.readouterr()
    assert printed.out == "warning: look\n" and printed.err == ""


@pytest.mark.parametrize(
    ("entry", "flags"),
    [
        ("train", "--ds_config c --model_name_or_path m --objective uniform"),
        ("prefer", "--ds_config c --model m"),
        ("baseline", "--recommender popularity"),
        ("eval", "--model m"),
    ],
)
def test_every_entry_heeds_quiet(entry, flags, monkeypatch):
    class Started(Exception):
        pass

    def init(timeout, master_port, quiet=False):
        assert quiet
        raise Started

    monkeypatch.setattr(distributed, "init", init)
    words = [*flags.split(), "--dataset", "d", "--output_dir", "o", "--quiet"]
    monkeypatch.setattr(sys, "argv", [entry, *words])
    with pytest.raises(Started):
        importlib.import_module(f"igd_ds.{entry}").main()


def test_a_notebook_shows_the_bar_every_second(monkeypatch):
    assert progress_bar(total=3).mininterval == 30.0  # a log file
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert progress_bar(total=3).mininterval == 1.0
