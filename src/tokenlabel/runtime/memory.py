"""How this process asks its operating system for memory; no torch."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@cache
def keep_freed_memory() -> bool:
    """Let the allocator keep what is freed for the next tensors, where that is glibc's; return whether it does.

    By default glibc gives blocks of more than 32 MiB back to the kernel as soon as they are free. The activations of a
    batch are such blocks, so a network on a CPU waits for new pages, filled with zeros, at every layer. The process
    stays as large as it was at its largest. An allocator put in glibc's place (LD_PRELOAD) goes its own way.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Not `all`: a threshold that an older glibc refuses must not keep the other from being set.
    return mallopt(_M_MMAP_THRESHOLD, 1 << 30) + mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1) == 2
