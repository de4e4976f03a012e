"""Waiting for a condition, never for luck."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    condition: Callable[[], T],
    what: str,
    timeout_s: float = 30.0,
    state: Callable[[], object] = lambda: "",
) -> T:
    """Ask `condition` until it gives something true, and return that.

    Fails with `what` and, where given, the `state` that things are in by then.
    """
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what}\n{state()}")
        time.sleep(0.02)
