"""Memory that gradients are received into, used again and again."""

from __future__ import annotations

from headwater.protos.layout import Bytes, Layout


class Staging:
    """At most `slots` buffers of a gradient's size; made when first needed.

    How many are out at once is bounded by the tickets that admission issues;
    this class only keeps the memory.
    """

    def __init__(self, layout: Layout, max_bytes: int) -> None:
        self.slots = max(1, max_bytes // max(1, layout.total_bytes))
        self._layout = layout
        self._free: list[Bytes] = []

    def take(self) -> Bytes:
        """A buffer of `layout.total_bytes`. Its old contents may still be in it."""
        return self._free.pop() if self._free else self._layout.empty()

    def give_back(self, buffer: Bytes) -> None:
        """The buffer is no longer read by anyone."""
        if len(self._free) < min(self.slots, 8):
            self._free.append(buffer)
