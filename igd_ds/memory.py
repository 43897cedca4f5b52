"""The C library's memory settings for training and evaluation on a CPU."""

import ctypes

import torch

# Parameter numbers of mallopt(3), from glibc's <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Keep the memory that a training step frees, so that the next step need not ask for it again.

    By default, glibc returns large freed blocks to the operating system at once, and the free end
    of its heap too. The next step then asks for the same memory, and the kernel has to clear it
    page by page. With these settings, all blocks come from the heap, which never shrinks. A step
    takes less time, and the process holds its peak memory until it ends.

    The function changes nothing where a GPU does the work, or where the C library is not glibc.
    Calling it twice is the same as calling it once. `tools/bench/memory.py` measures its effect.

    Returns:
        Whether the settings hold now.
    """
    if torch.cuda.is_available():
        return False

    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  raises AttributeError if this is not glibc
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError):  # musl; macOS; Windows
        return False

    no_mapped_blocks = mallopt(_M_MMAP_MAX, 0)
    never_trim = mallopt(_M_TRIM_THRESHOLD, -1)
    return bool(no_mapped_blocks and never_trim)
