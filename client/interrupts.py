"""Signals that ask for the end, as an exception: at once, but not where it would lose a process."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any


class Stopped(BaseException):
    """A signal asked for the end. Not an Exception, which others may catch."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def heard_in_a_coroutine() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt inside, for what holds up an event loop's thread.

    `asyncio.run` has it cancel a task instead, which is heard when the loop goes on.
    """
    import asyncio

    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before is None or asyncio._get_running_loop() is None:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Interrupts:
    """While entered, any of `numbers` raises Stopped; the handlers of before come back after.

    Only the main thread gets signals, and may say what becomes of them: in another this
    does nothing.
    """

    def __init__(self, *numbers: int) -> None:
        self._numbers: Sequence[int] = numbers
        self._before: dict[int, Any] = {}
        self._holds = 0
        self._held: int | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                if (
                    handler := signal.getsignal(number)
                ) is not None:  # None: C's, not to be had back
                    self._before[number] = handler
                    signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What comes inside is raised at the end of it."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._held is not None and self._holds == 0:
            number, self._held = self._held, None
            raise Stopped(number)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._holds:
            self._held = number
        else:
            raise Stopped(number)
