"""A rank that has stopped answering is noticed and named.

Each rank counts up a number in the process group's store, and watches the number of the next rank.
A rank that is stopped, swapped out or cut off the network no longer counts. Without this, the
others would wait for it in a collective, whose error does not say for whom it waited.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping

from torch.distributed.distributed_c10d import Store

from igd_ds import locks
from igd_ds.errors import EXIT_FAILURE
from igd_ds.process import Process

INTERVAL = 10.0
"""Seconds between two beats at most."""


def interval(limit: float) -> float:
    """Return the seconds between two beats, if a rank may be silent for `limit` seconds."""
    return min(INTERVAL, limit / 5)


def patience(limit: float) -> float:
    """Return the seconds that a collective has to wait so that the heartbeat names a rank before.

    A beat is heard of up to an interval late, the silence is judged once per interval, and a busy
    machine takes longer for both.

    Example:
        >>> patience(3.0), patience(600.0)
        (6.0, 650.0)
    """
    return limit + 5 * interval(limit)


class Heartbeat:
    """Beats for this rank, watches the next one, and ends this process if that one is silent.

    Args:
        store: the process group's store; only the clone that this class makes is used.
        rank: of this process.
        world_size: number of ranks, at least 2.
        processes: rank → process, for rank 0 and the next rank.
        limit: seconds of silence after which this process gives up; may be changed later.
        in_launcher: whether the launcher holds the store, rather than rank 0.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        processes: Mapping[int, Process],
        limit: float,
        in_launcher: bool,
    ) -> None:
        self.store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        self.rank, self.watched = rank, (rank + 1) % world_size
        self.processes, self.limit, self.in_launcher = processes, limit, in_launcher
        self.store_answers = True
        self.news = time.monotonic()  # when the watched rank was heard of last
        for work in (self._beat, self._judge):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def _beat(self) -> None:
        """Count up, and see whether the watched rank has counted. A silent store blocks this."""
        count, seen = 0, b""
        while True:
            count += 1
            with contextlib.suppress(RuntimeError):  # the store is gone; `_judge` notices it
                self.store_answers = False
                self.store.set(f"beat/{self.rank}", str(count))
                keys = [f"beat/{self.watched}"]
                found = self.store.get(keys[0]) if self.store.check(keys) else seen
                self.store_answers = True
                if found != seen:
                    seen, self.news = found, time.monotonic()
            time.sleep(interval(self.limit))

    def _judge(self) -> None:
        """End this process when the watched rank has been silent for too long."""
        before = time.monotonic()
        while True:
            time.sleep(interval(self.limit))
            now = time.monotonic()
            if now - before > 3 * interval(self.limit):
                self.news = now  # this process itself was stopped, and with it perhaps the others
            before = now
            if now - self.news > self.limit:
                self._give_up()

    def _give_up(self) -> None:
        """Print who does not answer and end this process."""
        silent = self.watched if self.store_answers else 0
        process = self.processes[silent]
        who = f"rank {silent} (process {process.pid} on {process.host})"
        if not self.store_answers and self.in_launcher:
            who = "the launcher"
        long = f"{self.limit / 60:g} minutes" if self.limit >= 60 else f"{self.limit:g} seconds"
        print(
            f"error: {who} has not answered for {long} (--timeout): it hangs, or its machine or "
            "network is gone. The job ends; start it again with --resume auto",
            file=sys.stderr,
            flush=True,
        )
        locks.release_all()
        os._exit(EXIT_FAILURE)
