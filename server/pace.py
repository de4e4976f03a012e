"""How far a run may go, and who hears how far it went: for a program that leads it by epochs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

Tallies = Sequence[float]
"""What a task adds up over the examples of a push."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """Kept by an embedded server, from `Server(..., pace=...)` on."""

    epochs: int
    """How many may be begun at first; `Server.allow_epochs` lets the run go on."""

    on_batch: Callable[[int, Tallies | None], None]
    """(epoch, tallies): a push of this epoch was applied and is published; None: it was left
    out. Called on the server's event loop, so it must return at once."""

    tally_count: int
    """Of every push. A worker that sends another number has another task than this program."""
