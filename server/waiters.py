"""Those who wait on the event loop for something of the run to come about, each with a bound."""

from __future__ import annotations

import asyncio


class Waiters:
    """Readers that wait until a number that only grows has grown so far: the version, the epoch."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], int] = {}

    async def wait(self, number: int, timeout_s: float) -> None:
        """Returns when `wake` was called with the number or a higher one, or after the time."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = number
        try:
            await asyncio.wait({waiter}, timeout=timeout_s)
        finally:
            self._waiting.pop(waiter, None)  # of a run that stands still, nobody is woken

    def wake(self, number: int | None) -> None:
        """It is there; None: the run is over, and it grows no more."""
        if not self._waiting:
            return
        for waiter, wanted in list(self._waiting.items()):
            if number is None or wanted <= number:
                del self._waiting[waiter]
                waiter.set_result(None)
