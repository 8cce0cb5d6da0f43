"""Let the process keep the memory that it frees, so that a training step finds its activations' memory in place.

The C library hands large blocks back to the system as soon as they are free, and the next step has every page of them
cleared and mapped anew. `python scripts/bench.py choices` measures what that costs.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> bool:
    """From here on; whether this C library can do it."""
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """As glibc does by itself once large blocks have been freed, for comparisons."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_MAX, 65536)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)


def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
