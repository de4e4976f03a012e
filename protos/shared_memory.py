"""Memory that two processes of one user on one machine share: sealed memfds. Linux alone has them.

It has no name and belongs to nobody's /dev/shm: what is passed is a descriptor, so
that nothing is left behind by a process that was killed. It cannot shrink, and its
pages are there before it is used, so that nobody dies of touching it.

Source: memfd_create(2), fcntl(2) on file sealing.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from headwater.protos.errors import HeadwaterError
from headwater.protos.layout import Bytes

_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEAL_SHRINK, _SEAL_GROW, _SEAL_FUTURE_WRITE = 2, 4, 16

COPY_ALONE_BYTES = 4 << 20
"""Up to here one thread copies; a second one costs more than it gains."""

IS_AVAILABLE = sys.platform == "linux" and hasattr(os, "memfd_create")


class SharedMemory:
    """Memory of this process's making. Ends with the last process that maps it.

    Args:
      size: Bytes.
      read_only: Others cannot write it. Kernels before 5.1 leave that to their manners.

    Raises:
      OSError: There is not so much memory.
    """

    def __init__(self, size: int, *, read_only: bool) -> None:
        self.descriptor = os.memfd_create("headwater", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.descriptor, 0, max(1, size))
            fcntl.fcntl(self.descriptor, _F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW)
            self.array: Bytes = _map(self.descriptor, size, mmap.PROT_READ | mmap.PROT_WRITE)
            if read_only:
                with contextlib.suppress(OSError):
                    fcntl.fcntl(self.descriptor, _F_ADD_SEALS, _SEAL_FUTURE_WRITE)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give it to nobody any more. Who has mapped it, keeps it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()


def attach(descriptor: int, size: int, *, writable: bool) -> Bytes:
    """Map memory that another process made, and close the descriptor.

    Raises:
      HeadwaterError: It is smaller, or could become so.
      OSError: It cannot be mapped.
    """
    try:
        seals = fcntl.fcntl(descriptor, _F_GET_SEALS)
        found = os.fstat(descriptor).st_size
        if not seals & _SEAL_SHRINK or found < size:
            raise HeadwaterError(
                f"the server shared {found} bytes of memory, "
                f"{'sealed' if seals & _SEAL_SHRINK else 'not sealed'}; {size} are needed"
            )
        return _map(descriptor, size, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
    finally:
        os.close(descriptor)


def _map(descriptor: int, size: int, protection: int) -> Bytes:
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    return np.frombuffer(mmap.mmap(descriptor, max(1, size), flags, protection), np.uint8)[:size]


_helper = ThreadPoolExecutor(1, "headwater-copy")


def copy(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Copy each source to its destination, by two threads where it is much.

    Args:
      pairs: (destination, source), both flat, of uint8 and of the same length.
    """
    total = sum(source.nbytes for _, source in pairs)
    if total <= COPY_ALONE_BYTES:
        _copy(pairs)
        return
    ours: list[tuple[np.ndarray, np.ndarray]] = []
    theirs: list[tuple[np.ndarray, np.ndarray]] = []
    left = total // 2
    for destination, source in pairs:
        cut = max(0, min(left, len(source)))
        left -= cut
        ours.append((destination[:cut], source[:cut]))
        theirs.append((destination[cut:], source[cut:]))
    other = _helper.submit(_copy, theirs)
    _copy(ours)
    other.result()


def _copy(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for destination, source in pairs:
        np.copyto(destination, source)
