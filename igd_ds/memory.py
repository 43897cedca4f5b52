"""The C library's memory settings for training and evaluation on a CPU."""

from __future__ import annotations

import ctypes

import torch

# Parameter numbers of mallopt(3), from glibc's <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

RETURN_EVERY = 4
"""Optimizer steps, or batches, after which freed memory is returned."""


def keep_freed_memory() -> bool:
    """Keep the memory that a training step frees, so that the next step need not ask for it again.

    By default, glibc returns large freed blocks to the operating system at once, and the free end
    of its heap too. The next step then asks for the same memory, and the kernel has to clear it
    page by page. With these settings, all blocks come from the heap, which shrinks only in
    `return_freed_memory`. A step takes less time.

    The function changes nothing where a GPU does the work, or where the C library is not glibc.
    Calling it twice is the same as calling it once. `tools/bench/memory.py` measures its effect.

    Returns:
        Whether the settings hold now.
    """
    library = _glibc()
    if library is None:
        return False
    no_mapped_blocks = library.mallopt(_M_MMAP_MAX, 0)
    never_trim = library.mallopt(_M_TRIM_THRESHOLD, -1)
    return bool(no_mapped_blocks and never_trim)


def return_freed_memory(turn: int) -> None:
    """Return the pages of the heap that no block uses to the operating system, now and then.

    glibc (seen with 2.36) seldom finds a freed block for an aligned one of the same size, and all
    of torch's blocks are aligned. Where the sizes change from step to step, holes remain, and a
    heap that never shrinks grows with every step: SmolLM2-135M by 0.12 GB a step. To do this
    in one of RETURN_EVERY steps bounds that growth and takes little of the gain.

    Args:
        turn: the step or batch that has ended, counted from 1.
    """
    if turn % RETURN_EVERY == 0 and (library := _glibc()):
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library; None where a GPU does the work, or where it is not glibc."""
    if torch.cuda.is_available():
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  raises AttributeError if this is not glibc
    except (AttributeError, OSError, TypeError):  # musl; macOS; Windows
        return None
    return library
