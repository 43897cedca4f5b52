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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_freed_block_is_used_again_without_page_faults():
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    default, kept = map(int, done.stdout.split())
    assert default > 1000 and kept < 100


def test_nothing_changes_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the C library was loaded"))
    assert not memory.keep_freed_memory()


def test_nothing_changes_without_glibc(monkeypatch):
    class OtherLibrary:
        """A C library that has `mallopt` and is not glibc."""

        def mallopt(self, parameter: int, value: int) -> int:
            pytest.fail("mallopt was called")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: OtherLibrary())
    assert not memory.keep_freed_memory()
