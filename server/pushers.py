"""Programs that push without tickets: who is heard of, and what they have under way.

Known while they are heard of, and a while longer; what their pushes did to the weights
is in push_sessions.py, for ever. No I/O, no threads; time comes in as an argument.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused
from headwater.server.metrics import Histogram, Rate
from headwater.server.push_sessions import MAX_SESSIONS, PushId
from headwater.server.roster import printable

SHOWN_S = 30.0
"""After its last call, in status."""

KEPT_S = 3600.0
"""After its last call: far longer than a network holds back what it was given."""


@dataclasses.dataclass(eq=False)
class Pusher:
    """One session, as it is seen in this life of the server."""

    id: int
    session: int
    name: str
    host: str
    pid: int
    joined_time: float
    heard_time: float
    attempt: int = 0
    """The highest that was seen."""
    under_way: int = 0
    """Calls that have not been answered."""
    gradients: int = 0
    staleness: Histogram = dataclasses.field(default_factory=Histogram)
    examples: Rate = dataclasses.field(default_factory=Rate)

    @property
    def history_name(self) -> str:
        """As the history knows it, through all incarnations."""
        return f"session {self.session:016x}"

    def applied(self, staleness: int, examples: int, now: float) -> None:
        self.gradients += 1
        self.staleness.add(staleness)
        self.examples.add(examples, now)

    def status(self, now: float) -> pb.WorkerStatus:
        return pb.WorkerStatus(
            id=self.id,
            name=self.name,
            host=self.host,
            pid=self.pid,
            state="pushing" if self.under_way else "session",
            gradients=self.gradients,
            examples_per_second=self.examples.per_second(now),
            staleness_mean=self.staleness.mean,
            staleness=self.staleness.message(),
            connected_s=now - self.joined_time,
            transport="grpc",
        )


@dataclasses.dataclass(eq=False)
class SessionPush:
    """A gradient that came whole, until it is known what became of it."""

    id: PushId
    pusher: Pusher
    loss: float | None
    examples: int
    answer: asyncio.Future[pb.SessionReply | Refused]

    def tell(self, answer: pb.SessionReply | Refused) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)


def disk_failed() -> Refused:
    """What was pushed may be on the disk all the same: the next server knows."""
    return Refused(Reason.SERVER_ENDED, "the server's disk failed")


def forgotten() -> Refused:
    return Refused(
        Reason.SESSION_FORGOTTEN,
        "the server does not know this session any more: too many others have pushed since. "
        "Whether its last push was applied cannot be told; open a new session",
    )


class Pushers:
    """All that are known, by their sessions."""

    def __init__(self) -> None:
        self._known: dict[int, Pusher] = {}  # the one that was heard longest ago comes first

    def heard(self, head: pb.SessionPush, new_id: Callable[[], int], now: float) -> Pusher:
        """Note a call.

        Args:
          head: The call.
          new_id: For one that is new.
          now: Seconds.

        Raises:
          Refused: FENCED; a later call of the session was here already.
        """
        pusher = self._known.pop(head.session, None)
        if pusher is None:
            number = new_id()
            name = printable(head.name) or f"session-{number}"
            host = printable(head.host)
            pusher = Pusher(number, head.session, name, host, head.pid, now, now)
        self._known[head.session] = pusher
        if head.attempt <= pusher.attempt:
            raise Refused(Reason.FENCED, f"call {head.attempt} of this session is not its newest")
        pusher.attempt, pusher.heard_time = head.attempt, now
        self._forget(now)
        return pusher

    def shown(self, now: float) -> list[Pusher]:
        """Those that were heard of lately, in the order they came."""
        found = [p for p in self._known.values() if p.under_way or now - p.heard_time < SHOWN_S]
        return sorted(found, key=lambda pusher: pusher.id)

    def _forget(self, now: float) -> None:
        while self._known:
            oldest = next(iter(self._known.values()))
            is_old = now - oldest.heard_time > KEPT_S or len(self._known) > MAX_SESSIONS
            if oldest.under_way or not is_old:
                return
            del self._known[oldest.session]
