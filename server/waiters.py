"""Those who wait on the event loop for something of the run to come about, each with a bound."""

from __future__ import annotations

import asyncio


class VersionWaiters:
    """Readers that wait for a version."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    async def wait(self, version: int, timeout_s: float) -> None:
        """Returns when `wake` was called with the version or a later one, or after the time."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((version, waiter))
        await asyncio.wait({waiter}, timeout=timeout_s)
        waiter.cancel()

    def wake(self, version: int | None) -> None:
        """The version is there; None: the run is over, and no other will come."""
        if not self._waiting:
            return
        kept = []
        for wanted, waiter in self._waiting:
            if waiter.done():
                continue
            if version is None or wanted <= version:
                waiter.set_result(None)
            else:
                kept.append((wanted, waiter))
        self._waiting = kept
