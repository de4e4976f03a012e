"""Puts a version's weights together from its parts, and takes nothing on trust."""

from __future__ import annotations

import numpy as np

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import HeadwaterError
from headwater.protos.layout import Bytes, Layout


class Weights:
    """The newest version that came whole, and the one that is coming.

    Args:
      layout: What the weights are.
      reuse: Fill two buffers in turn, so that `leaves` are valid until the next
        version but one is whole; else each version has memory of its own.
    """

    def __init__(self, layout: Layout, *, reuse: bool = True) -> None:
        self.layout = layout
        self._reuse = reuse
        self._whole: Bytes | None = None
        self._coming: Bytes | None = None
        self._spare: Bytes | None = None
        self._received = 0
        self._coming_version = -1
        self.version = -1
        """Complete; -1 before the first."""
        self.leaves: list[np.ndarray] = []
        """Its tensors, in layout order."""

    def add(self, part: pb.WeightsPart, body: memoryview | None) -> None:
        """Take one part in. A first part begins a version anew, whatever came before.

        Raises:
          HeadwaterError: It does not follow on the one before, is of another
            version, or of another size of model.
        """
        data = body if body is not None else memoryview(b"")
        end = part.offset + len(data)
        if part.offset == 0 and self._coming_version != part.version:
            self._received, self._coming_version = 0, part.version
        if (
            part.offset != self._received
            or part.version != self._coming_version
            or part.total_bytes != self.layout.total_bytes
            or end > part.total_bytes
        ):
            begun = "" if self._coming_version < 0 else f" of version {self._coming_version}"
            raise HeadwaterError(
                f"the server sent bytes {part.offset} to {end} of {part.total_bytes} "
                f"of version {part.version}; "
                f"next was byte {self._received} of {self.layout.total_bytes}{begun}"
            )
        if self._coming is None:
            self._coming = self._spare if self._spare is not None else self.layout.empty()
            self._spare = None
        if len(data):
            self._coming[part.offset : end] = np.frombuffer(data, np.uint8)
        self._received = end
        if end == part.total_bytes:
            self._complete(self._coming)

    def use(self, version: int, leaves: list[np.ndarray]) -> None:
        """Have a version that is whole elsewhere: in memory that the server shares."""
        self.version, self.leaves = version, leaves
        self._received, self._coming_version = 0, -1

    def restart(self) -> None:
        """Forget what was coming and what came: the stream has ended."""
        self.version = self._coming_version = -1
        self._received = 0

    def _complete(self, buffer: Bytes) -> None:
        self.version = self._coming_version
        self.leaves = list(self.layout.views(buffer).values())
        if self._reuse:
            self._spare = self._whole  # the one before: JAX may still read the newest
        self._whole, self._coming = buffer, None
        self._received, self._coming_version = 0, -1
