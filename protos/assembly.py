"""Puts a version's weights together from its parts, and takes nothing on trust."""

from __future__ import annotations

from collections import deque

import numpy as np

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import HeadwaterError
from headwater.protos.layout import Bytes, Layout

REUSED = 2
"""Buffers filled in turn: JAX may still use the older one where it lies."""


class Weights:
    """The newest version that came whole, and the one that is coming.

    Args:
      layout: What the weights are.
      reuse: Fill two buffers in turn, so that `leaves` are valid until two
        versions later; else each version has memory of its own.
    """

    def __init__(self, layout: Layout, *, reuse: bool = True) -> None:
        self.layout = layout
        self._reuse = reuse
        self._used: deque[Bytes] = deque()
        self._buffer: Bytes | None = None
        self._received = 0
        self.version = -1
        """Complete; -1 before the first."""
        self.leaves: list[np.ndarray] = []
        """Its tensors, in layout order."""

    def add(self, part: pb.WeightsPart, body: memoryview | None) -> None:
        """Take one part in.

        Raises:
          HeadwaterError: It does not follow on the one before, or is of another size of model.
        """
        data = body if body is not None else memoryview(b"")
        end = part.offset + len(data)
        if part.offset == 0:
            self._buffer, self._received = self._next_buffer(), 0
        if (
            self._buffer is None
            or part.offset != self._received
            or part.total_bytes != self.layout.total_bytes
            or end > part.total_bytes
        ):
            raise HeadwaterError(
                f"the server sent bytes {part.offset} to {end} of {part.total_bytes} of version "
                f"{part.version}; byte {self._received} of {self.layout.total_bytes} was next"
            )
        if len(data):
            self._buffer[part.offset : end] = np.frombuffer(data, np.uint8)
        self._received = end
        if end == part.total_bytes:
            self.version = part.version
            self.leaves = list(self.layout.views(self._buffer).values())

    def _next_buffer(self) -> Bytes:
        if not self._reuse or len(self._used) < REUSED:
            self._used.append(self.layout.empty())
        else:
            self._used.rotate(-1)
        if not self._reuse:
            return self._used.popleft()
        return self._used[-1]
