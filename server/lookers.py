"""Who watches the run by asking for its status again and again, to let them see how it ends.

Pure: no I/O, no threads; time comes in as an argument.
"""

from __future__ import annotations

RECENT_S = 1.0
"""Who has not asked for so long does not wait for an answer."""


class Lookers:
    """Peers by when they asked last."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}

    def asked(self, peer: str, now: float) -> None:
        self._asked = {p: t for p, t in self._asked.items() if now - t <= RECENT_S}
        self._asked[peer] = now

    def unaware(self, since: float) -> bool:
        """Whether somebody asked shortly before `since`, and not again."""
        return any(since - RECENT_S <= at < since for at in self._asked.values())
