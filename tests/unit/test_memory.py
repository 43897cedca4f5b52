"""Freed memory is kept on a CPU with glibc; elsewhere nothing changes."""

import ctypes
import platform
import subprocess
import sys

import pytest
import torch

from igd_ds import memory

# A block of 64 MiB is made, filled and freed again and again; its pages are counted.
FAULTS = """
import resource, sys
import torch
from igd_ds.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(64 << 18).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
default = faults()
assert keep_freed_memory() and keep_freed_memory()
for _ in range(20):  # small blocks in between can spoil the first few for reuse
    faults()
print(default, sorted(faults() for _ in range(9))[4])
"""


def run(script: str) -> list[int]:
    """Run a script in a process of its own and return the numbers that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_freed_block_is_used_again_without_page_faults():
    default, kept = run(FAULTS)
    assert default > 1000 and kept < 100


# Holes below blocks that live on: only `return_freed_memory` gives their pages back.
HOLES = """
import torch
from igd_ds.memory import keep_freed_memory, return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

def after_a_step(mebibytes):
    hole, behind = torch.ones(mebibytes << 18), torch.ones(1 << 18)
    del hole
    live.append(behind)
    return_freed_memory()
    print(resident())

keep_freed_memory()
live = []
for mebibytes in (64, 64, 1024, 64):
    after_a_step(mebibytes)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_holes_in_the_heap_are_returned_when_the_process_has_grown():
    first, second, grown, after = run(HOLES)
    assert second < first + 80  # nothing is returned: a hole of 64 MiB may be used again or not
    assert grown < first  # with the large hole all holes were returned
    assert after < grown + 80


def test_nothing_changes_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the C library was loaded"))
    assert not memory.keep_freed_memory()
    memory.return_freed_memory()


def test_nothing_changes_without_glibc(monkeypatch):
    class OtherLibrary:
        """A C library that has `mallopt` and is not glibc."""

        def mallopt(self, parameter: int, value: int) -> int:
            pytest.fail("mallopt was called")

        def malloc_trim(self, pad: int) -> int:
            pytest.fail("malloc_trim was called")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: OtherLibrary())
    assert not memory.keep_freed_memory()
    memory.return_freed_memory()
