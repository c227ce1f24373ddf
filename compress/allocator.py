"""The C library's allocator while a model trains on a CPU: what a step frees stays with the process for the next.

glibc hands a large tensor's memory back to the system when it is freed, so each step takes about a gigabyte anew, page
by page, zeroed: a tenth and more of its time (benchmarks/distill_step.py). A GPU's caching allocator does the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

import torch

# Of malloc.h, with what they are in the block and after it.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}
# The first three: where glibc's own adjustment ends, which no call can turn on again.
_USUAL = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10, _MMAP_MAX: 65536}


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory until the block ends, then hand all of it back; nothing with a GPU or another C library.

    Settings of the same things in GLIBC_TUNABLES are the user's, and stay.
    """
    theirs = any(word in os.environ.get("GLIBC_TUNABLES", "") for word in ("mmap_", "trim_", "top_pad"))
    if theirs or torch.cuda.is_available() or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    for key, value in _KEEPING.items():
        libc.mallopt(key, value)
    try:
        yield
    finally:
        for key, value in _USUAL.items():
            libc.mallopt(key, value)
        libc.malloc_trim(0)
