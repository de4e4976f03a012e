"""When the endings of this machine's workers are the end of their run.

One that failed is missed, and the others go on. With none left nothing would go
on, and nobody would ever say so: the server waits for new workers without end.
Workers that were told to leave have not failed, but do not come back either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from headwater.client.processes import Child, failure
from headwater.protos.errors import HeadwaterError, RunFailed

ALONE_S = 10.0
"""After the last worker has left in order, for the server to say that the run is over."""


class Endings:
    """Of some workers; `look` as often as you like.

    Args:
      workers: Of one run.
      warn: Told once of each that failed.
    """

    def __init__(self, workers: Sequence[Child], warn: Callable[[str], None]) -> None:
        self._workers = workers
        self._warn = warn
        self._left_time: float | None = None
        self._failed: list[Child] = []  # in the order in which it was seen
        self._told = 0  # so many of them

    @property
    def long_alone(self) -> bool:
        """Whether none has been left for so long that a run which just ended would have said so."""
        return self._left_time is not None and time.monotonic() - self._left_time > ALONE_S

    def look(self, *, others: bool = False) -> HeadwaterError | None:
        """The error that the run ends with, unless it is over: none is left.

        It is what the last of those said that failed, or that all were told to leave a
        while ago. At every look from then on: who gets by without them now may not later.

        Args:
          others: Workers of elsewhere train as well.
        """
        is_over = not others and all(child.status is not None for child in self._workers)
        for child in self._workers:
            if child.status not in (None, 0) and child not in self._failed:
                self._failed.append(child)
        if not is_over:
            self.tell("; the others go on")
            self._left_time = None
            return None
        self._left_time = self._left_time or time.monotonic()
        if self._failed:
            return failure(self._failed[-1])
        if self.long_alone:
            return RunFailed("no worker is left: all of them were told to leave the run")
        return None

    def tell(self, more: str = "") -> None:
        """Warn of those that failed and were not told of: the run is over all the same."""
        for child in self._failed[self._told :]:
            self._warn(f"{child.name} {child.ending}{more}")
        self._told = len(self._failed)
