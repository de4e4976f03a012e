"""The consistency dial: how stale a gradient may be when it moves the weights.

    async       any staleness; each gradient is applied when it arrives
    bounded:K   at most K versions, in the server's versions; 0 is serial
    sync:N      none: an update is the mean over one group of N batches

`bounded:K` is stricter than the stale synchronous parallel of Ho et al. 2013,
"More Effective Distributed ML via a Stale Synchronous Parallel Parameter
Server", which bounds how far each worker's clock may lag behind the fastest.
Pure values.
"""

from __future__ import annotations

import dataclasses
import re

from headwater.protos.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Dial:
    """One position of the dial; by default async.

    Args:
      bound: K of bounded:K.
      group: N of sync:N, in tickets: batches, or rounds of local steps.
    """

    bound: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, text: str, name: str = "--consistency") -> Dial:
        """Read `async`, `bounded:K` or `sync:N`.

        Raises:
          UsageError: It is none of them; names `name`.
        """
        if text == "async":
            return cls()
        if match := re.fullmatch(r"(bounded|sync):(\d{1,9})", text):
            kind, number = match[1], int(match[2])
            if kind == "bounded":
                return cls(bound=number)
            if number > 0:
                return cls(group=number)
        raise UsageError(
            f"{name} {text!r}: it is async; bounded:K, with a staleness of at most K, from "
            "0 on; or sync:N, with N batches in an update, from 1 on"
        )

    def __str__(self) -> str:
        if self.bound is not None:
            return f"bounded:{self.bound}"
        return "async" if self.group is None else f"sync:{self.group}"
