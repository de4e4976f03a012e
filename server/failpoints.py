"""Places where the tests have the server killed, to see what a crash there leaves.

    HEADWATER_FAILPOINTS=before-apply=100,snapshot-before-rename=2 headwater server …

kills the process, as `kill -9` would, when it gets to the first of these for the
100th time or to the second for the second. Where the variable is not set,
`reach` is an empty function.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable

from headwater.protos.errors import UsageError

ENV = "HEADWATER_FAILPOINTS"

NAMES = (
    "incarnation-persisted",  # it may serve now, and has not begun to
    "before-apply",
    "after-apply",  # the version exists; nobody was told
    "snapshot-half-written",
    "snapshot-before-rename",
    "snapshot-after-rename",  # and before its folder is fsynced
    "log-appended",  # and not fsynced
    "log-synced",  # and not acknowledged
    "end-applied",  # the last batch moved the weights
    "end-durable",  # the final snapshot is on disk
    "end-finished",  # status says so
    "end-bye",  # the workers were told
    "end-evaluated",  # there is nothing left to do but exit
)


def parse(text: str) -> dict[str, int]:
    """`name=count,…` as a dict.

    Raises:
      UsageError: A name is not known, or a count no whole number from 1 on.
    """
    found = {}
    for item in filter(None, text.split(",")):
        name, _, count = item.partition("=")
        if name not in NAMES or not count.isdecimal() or int(count) < 1:
            raise UsageError(f"{ENV}: {item!r} is not NAME=COUNT with one of {', '.join(NAMES)}")
        found[name] = int(count)
    return found


def _killer(limits: dict[str, int]) -> Callable[[str], None]:
    reached: Counter[str] = Counter()

    def reach(name: str) -> None:
        reached[name] += 1
        if reached[name] == limits.get(name):
            os.kill(os.getpid(), signal.SIGKILL)

    return reach


def _nothing(name: str) -> None:
    """Nobody wants to know."""


reach: Callable[[str], None] = _nothing
"""Say that the place called `name` was reached. Use it as `failpoints.reach`."""


def arm(text: str) -> None:
    """Act on the environment variable's text, from now on.

    Raises:
      UsageError: See `parse`.
    """
    global reach  # noqa: PLW0603  (an empty function costs the least)
    reach = _killer(parse(text)) if text else _nothing
