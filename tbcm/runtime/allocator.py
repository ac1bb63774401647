"""The C library's memory allocator, told to keep what a CPU run frees."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc takes no more


def reuse_freed_memory() -> bool:
    """Makes glibc reuse freed blocks of up to 32 MiB instead of giving them back to the kernel.

    Every operator of a CPU step allocates an output of some MiB; by default each is fresh memory that the kernel has to
    map and clear page by page (docs/performance.md has the measurement). Returns whether it took effect: not on other C
    libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
