"""How the C library keeps memory that is freed and needed again a moment later.

Every update makes new weights, and every step a new gradient. glibc gives blocks that
large back to the kernel at once, which zeroes each page again when it is next touched:
that takes longer than the update itself.

Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

KEPT_BYTES = 1 << 30
"""Blocks up to here are kept, and so much at the end of the heap."""


def keep_freed_memory() -> None:
    """Have this process keep large blocks for the next ones. Without effect but on glibc.

    MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ in the environment have their way.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
