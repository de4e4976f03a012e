"""Memory that gradients are received into, used again and again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from headwater.protos.layout import Bytes, Layout


@dataclasses.dataclass(frozen=True, eq=False)
class Staged:
    """A gradient's memory."""

    buffer: Bytes
    """Of `layout.total_bytes`."""
    give_back: Callable[[], None]
    """Nobody reads it any more."""
    is_shared: bool = False
    """Whether the worker can still write it."""


class Staging:
    """At most `slots` buffers of a gradient's size; made when first needed.

    How many are out at once is bounded by the tickets that admission issues;
    this class only keeps the memory.
    """

    def __init__(self, layout: Layout, max_bytes: int) -> None:
        self.slots = max(1, max_bytes // max(1, layout.total_bytes))
        self._layout = layout
        self._free: list[Bytes] = []

    def take(self) -> Staged:
        """A buffer; its old contents may still be in it."""
        buffer = self._free.pop() if self._free else self._layout.empty()
        return Staged(buffer, lambda: self._give_back(buffer))

    def _give_back(self, buffer: Bytes) -> None:
        if len(self._free) < min(self.slots, 8):
            self._free.append(buffer)
