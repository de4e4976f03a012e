"""How the C library treats the memory of what trains, which it must be told when a process starts.

Every update makes new weights, and every step a new gradient: megabytes that are freed a
moment later and needed again. Left alone, glibc gives such blocks back to the kernel, which
zeroes each page when it is next touched; has 4 KiB pages; and reads what a large copy is to
overwrite. Each of these takes about as long as the update itself.

Source: the GNU C Library manual, "Tunables".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import NoReturn

_TUNABLES = "GLIBC_TUNABLES"
_TRIED = "HEADWATER_TUNED"

KEPT_BYTES = 1 << 30
"""Blocks up to here are kept, and so much at the end of the heap."""

STREAMED_BYTES = 2 << 20
"""Copies from here on go past the cache, which they would only empty. Above a part of a
message, which is read again at once."""

_TUNED = {
    "glibc.malloc.mmap_threshold": KEPT_BYTES,
    "glibc.malloc.trim_threshold": KEPT_BYTES,
    "glibc.malloc.arena_max": 1,
    "glibc.malloc.hugetlb": 1,
    "glibc.cpu.x86_non_temporal_threshold": STREAMED_BYTES,
}


def tuning(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for a process that trains, which `environment` lacks.

    GLIBC_TUNABLES and MALLOC_ variables of the user's own have their way. Of no effect
    where the C library is another.
    """
    is_users = any(name == _TUNABLES or name.startswith("MALLOC_") for name in environment)
    if is_users or sys.platform != "linux":
        return {}
    return {_TUNABLES: ":".join(f"{name}={value}" for name, value in _TUNED.items())}


def tune() -> None:
    """Have this process tuned: it begins once more unless it is. Same pid, same open files."""
    # Once: where Python has capabilities of its own, the loader takes the variable away again.
    if (variables := tuning(os.environ)) and _TRIED not in os.environ:
        _begin_again({**os.environ, **variables, _TRIED: "1"})


def _begin_again(environment: Mapping[str, str]) -> NoReturn:
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606
