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


# A hole of 64 MiB below a block that lives on: only `return_freed_memory` gives it back.
HOLE = """
import torch
from igd_ds.memory import RETURN_EVERY, keep_freed_memory, return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

keep_freed_memory()
hole, behind = torch.ones(64 << 18), torch.ones(1 << 18)
del hole
kept = resident()
for turn in range(1, RETURN_EVERY):
    return_freed_memory(turn)
still_kept = resident()
return_freed_memory(RETURN_EVERY)
print(kept, still_kept, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_holes_in_the_heap_are_returned_now_and_then():
    kept, still_kept, after = run(HOLE)
    assert abs(still_kept - kept) < 8 and after < kept - 56


def test_nothing_changes_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the C library was loaded"))
    assert not memory.keep_freed_memory()
    memory.return_freed_memory(memory.RETURN_EVERY)


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
    memory.return_freed_memory(memory.RETURN_EVERY)
