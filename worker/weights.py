"""Puts a version's weights together from its parts, and takes nothing on trust."""

from __future__ import annotations

import itertools

import numpy as np

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import HeadwaterError
from headwater.protos.layout import Bytes, Layout


class Weights:
    """One version of the weights, put together from its parts."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        # Two in turn: JAX may still use the older one where it lies.
        self._buffers: itertools.cycle[Bytes] = itertools.cycle([layout.empty(), layout.empty()])
        self._buffer = next(self._buffers)
        self._received = 0
        self.version = -1
        """Complete; -1 before the first."""
        self.leaves: list[np.ndarray] = []

    def add(self, part: pb.WeightsPart, body: memoryview | None) -> None:
        """Take one part in.

        Raises:
          HeadwaterError: It does not follow on the one before, or is of another size of model.
        """
        data = body if body is not None else memoryview(b"")
        end = part.offset + len(data)
        if part.offset == 0:
            self._buffer, self._received = next(self._buffers), 0
        if (
            part.offset != self._received
            or part.total_bytes != self._layout.total_bytes
            or end > part.total_bytes
        ):
            raise HeadwaterError(
                f"the server sent bytes {part.offset} to {end} of {part.total_bytes} of version "
                f"{part.version}; byte {self._received} of {self._layout.total_bytes} was next"
            )
        if len(data):
            self._buffer[part.offset : end] = np.frombuffer(data, np.uint8)
        self._received = end
        if end == part.total_bytes:
            self.version = part.version
            self.leaves = list(self._layout.views(self._buffer).values())
