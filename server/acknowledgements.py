"""Which version is durable, and who is still owed the word that its update is.

What is on disk may be ahead of the weights, by an update that was logged and is
just being applied: durable is what is both. Pure: no I/O, no threads, no clock.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Acknowledgements(Generic[T]):
    """Answers that wait for their versions.

    Args:
      version: Of the weights at first; it is durable.
    """

    def __init__(self, version: int) -> None:
        self.durable_version = version
        self._on_disk = version
        self._waiting: deque[tuple[int, T]] = deque()

    def owe(self, version: int, answer: T) -> None:
        """`answer` is to be given once `version`, the newest so far, is durable."""
        self._waiting.append((version, answer))

    def on_disk(self, version: int) -> None:
        """All up to `version` would survive a loss of power."""
        self._on_disk = max(self._on_disk, version)

    def due(self, version: int) -> list[T]:
        """The answers that may be given, in order; `version` is that of the weights."""
        self.durable_version = max(self.durable_version, min(self._on_disk, version))
        found = []
        while self._waiting and self._waiting[0][0] <= self.durable_version:
            found.append(self._waiting.popleft()[1])
        return found
