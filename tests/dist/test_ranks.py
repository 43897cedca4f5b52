"""The forked ranks of these tests do not disturb each other."""

import multiprocessing
import os
import signal

import ranks
from tqdm import tqdm


def die_with_the_lock() -> None:
    """End as a rank does that is killed while it draws a progress bar."""
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def draw() -> None:
    list(tqdm(range(3)))


def test_a_rank_killed_while_it_draws_a_bar_stops_no_later_rank(tmp_path, monkeypatch):
    shared = multiprocessing.get_context("fork").RLock()
    monkeypatch.setattr(tqdm, "_lock", shared, raising=False)
    assert ranks.wait(ranks.start(1, tmp_path / "first", die_with_the_lock)) == [-signal.SIGKILL]
    assert ranks.wait(ranks.start(1, tmp_path / "second", draw), timeout=20) == [0]
