"""Commands that die, are told to stop or meet a full disk somewhere, and then are run once more.

The result is that of an undisturbed run: the same bits, no entry of a log missing or doubled, no
temporary file left. By default a few dozen of the places are tried, with `make faults` many more.
"""

import contextlib
import math
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ranks
import results
from faults_world import ALL
from operations import Fault, install

# Command: at how many places, spread over its file operations, it is killed by default.
KILLS = {
    "full": 4,
    "full-2": 2,
    "lora": 2,
    "qlora": 2,
    "t5": 2,
    "multi-target": 2,
    "baseline": 2,
    "evaluation": 3,
    "prepare": 3,
    "tokenizer": 2,
    "embed": 2,
    "ids": 2,
    "report": 2,
}
MANY = 40
SIGNALS = {"full": 1, "full-2": 1, "lora": 1, "baseline": 1, "evaluation": 1}
FULL_DISKS = {"full": 2, "baseline": 1, "evaluation": 1, "prepare": 1, "ids": 1, "report": 1}

NO_SPACE = re.compile("no space left", re.IGNORECASE)


def places(table: dict[str, int], many: int, start: float) -> list[tuple[str, float]]:
    """Return (command, share of its file operations) for each case.

    `start` in (0, 1) moves the shares of a table within their parts.
    """
    counts = {name: many if ALL else count for name, count in table.items()}
    return [
        (name, (part + start) / count) for name, count in counts.items() for part in range(count)
    ]


def cases(table: dict[str, int], many: int, start: float) -> pytest.MarkDecorator:
    """Return the parameters (name, share) of a test."""
    found = places(table, many, start)
    ids = [f"{name} at {share:.0%}" for name, share in found]
    return pytest.mark.parametrize(("name", "share"), found, ids=ids)


def disturbed(campaign, name: str, share: float, folder: Path, kind: str) -> tuple[list[int], str]:
    """Run a command into folder/output with a fault; return its exit codes and what it printed."""
    count = campaign.undisturbed(name)[1]
    at = max(1, math.ceil(share * count))
    fault = Fault(folder, folder.with_name(f"{folder.name}.journal"), at, kind, torn=at % 2 == 0)
    log = folder.with_name(f"{folder.name}.log")
    codes = campaign.run(name, folder / "output", log, fault)
    return codes, log.read_text()


def check_second_run(campaign, name: str, folder: Path) -> None:
    """Run the command again, undisturbed; check its result."""
    log = folder.with_name(f"{folder.name}.again.log")
    codes = campaign.run(name, folder / "output", log)
    text = log.read_text()
    assert set(codes) == {0}, f"{codes}\n{text[-4000:]}"
    results.check_same(name, folder / "output", campaign.undisturbed(name)[0])


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """Return an empty folder, and remove what was made in it."""
    (tmp_path / "place").mkdir()
    yield tmp_path / "place"
    shutil.rmtree(tmp_path / "place", ignore_errors=True)


@cases(KILLS, MANY, 0.4)
def test_a_killed_command_gives_the_same_when_it_is_run_again(campaign, folder, name, share):
    codes, text = disturbed(campaign, name, share, folder, "kill")
    assert codes[0] == -9, f"{codes}\n{text[-2000:]}"
    check_second_run(campaign, name, folder)


def test_a_death_does_not_get_lost_among_threads(campaign, folder):
    """TensorBoard writes from a thread of its own, at the same time as the command."""
    fault = Fault(folder, folder.with_name("place.journal"), at=5)
    codes = ranks.wait(ranks.start(1, folder.with_name("log"), write_from_threads, fault), 60)
    assert codes == [-9]


def write_from_threads(fault: Fault) -> None:
    """Let eight threads write files; the journal is so slow that they overtake each other."""
    write = os.write

    def slow(descriptor: int, text: bytes) -> int:
        time.sleep(0.02)
        return write(descriptor, text)

    os.write = slow
    install(fault)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: (fault.folder / str(name)).write_text("text"), range(16)))


@pytest.mark.parametrize("kind", ["USR1", "TERM"])
@cases(SIGNALS, MANY // 4, 0.6)
def test_a_stopped_command_goes_on(campaign, folder, name, share, kind):
    codes, text = disturbed(campaign, name, share, folder, kind)
    # 85: it has saved; 143: an evaluation told to end. A signal before the command listens ends it,
    # and one at its end comes too late.
    lost = {1} if {-10, -15} & set(codes) else set()  # a rank whose peer was ended so early
    assert set(codes) <= {85, 143, 0, -10, -15} | lost, f"{codes}\n{text[-2000:]}"
    check_second_run(campaign, name, folder)


@cases(FULL_DISKS, MANY // 2, 0.5)
def test_a_command_goes_on_once_there_is_room_on_the_disk(campaign, folder, name, share):
    codes, text = disturbed(campaign, name, share, folder, "full")
    # What comes last needs no room in some commands.
    assert codes[0] != 0 or share > 0.9, text[-2000:]
    assert NO_SPACE.search(text) or codes[0] == 0, text[-2000:]
    check_second_run(campaign, name, folder)


@pytest.mark.parametrize("name", ["full", "t5", "evaluation"] if ALL else ["full"])
def test_a_file_system_that_fills_up(campaign, folder, name):
    """The disk is really full: somebody else fills a tmpfs while the command writes there."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        filler = threading.Thread(target=fill, args=(folder,))
        filler.start()
        log = folder.with_name("full.log")
        codes = campaign.run(name, folder / "output", log)
        filler.join()
        assert codes[0] not in (0, 85), codes
        assert NO_SPACE.search(log.read_text()), log.read_text()[-3000:]
        (folder / "filler").unlink()
        check_second_run(campaign, name, folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Wait until the command has passed its own check of free space, then fill the file system."""
    deadline = time.monotonic() + 60
    records = ("output/metrics.jsonl", "output/request.json")
    while not any((folder / name).is_file() for name in records):
        assert time.monotonic() < deadline, "the command has not begun"
        time.sleep(0.01)
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
