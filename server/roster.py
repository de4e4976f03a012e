"""The roster: which workers are connected, and what is known of each.

A worker is in it while its stream lives. A process is known by its instance
number; a higher attempt of the same instance fences the older stream at once.
Pure: no I/O, no threads; time comes in as an argument.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused
from headwater.server.metrics import Histogram, Rate, Times

MAX_TEXT = 80
"""Characters kept of a name or a host that a worker gives."""

FIRST_RESERVE = 8
"""Of a worker whose speed is not known yet."""
MAX_RESERVE = 8
"""More would keep batches that were refused from those who have yet to try them."""

KEPT_STEPS = 200
"""Of a worker's last steps, whose times decide how long a ticket may take."""

SORTED_SHARE = 10
"""A worker's times are sorted again when a tenth of them is new."""

_PHASES = {
    pb.PHASE_COMPILING: "compiling",
    pb.PHASE_WAITING: "waiting",
    pb.PHASE_LOADING: "loading",
    pb.PHASE_COMPUTING: "computing",
    pb.PHASE_SENDING: "sending",
}


class StepTimes:
    """Seconds that a worker's last steps took, and how they lie, as of a moment ago."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=KEPT_STEPS)
        self._unsorted = 0
        self.p99 = 0.0
        self.median = 0.0

    def __len__(self) -> int:
        return len(self._last)

    def add(self, *seconds: float) -> None:
        self._last.extend(seconds)
        self._unsorted += len(seconds)
        # Sorting them for each would take longer than issuing the ticket.
        if self._unsorted > len(self._last) // SORTED_SHARE:
            self._sort()

    def add_slowest(self, seconds: float) -> None:
        """Have `p99` be no less than this at once, until as many steps as are kept were added."""
        self._last.extend([seconds] * (1 + KEPT_STEPS // 100))
        self._sort()

    def _sort(self) -> None:
        self._unsorted = 0
        ranked = sorted(self._last)
        self.p99 = ranked[math.ceil(0.99 * len(ranked)) - 1]
        self.median = statistics.median(ranked)


@dataclasses.dataclass(eq=False)
class Member:
    """One connected worker."""

    id: int
    name: str
    hello: pb.Hello
    joined_time: float
    heard_time: float
    ready: bool = False
    leaving: bool = False
    """It was told bye."""
    steps: int = -1
    """Of the last progress message; the same again means that nothing moved."""
    phase: str = "compiling"
    hung: bool = False
    """A ticket expired, and nothing finished since."""
    has_version: int = -1
    """Of the weights it was sent last."""
    staleness: Histogram = dataclasses.field(default_factory=Histogram)
    examples: Rate = dataclasses.field(default_factory=Rate)
    gradients: int = 0
    steps_s: StepTimes = dataclasses.field(default_factory=StepTimes)
    """From ticket to whole gradient, less the time that the one before took."""
    times: Times = dataclasses.field(default_factory=Times)
    transport: str = "grpc"
    """How its tensors travel."""

    def set_phase(self, phase: pb.Phase) -> None:
        self.phase = _PHASES.get(phase, self.phase)

    def deadline_s(self, least_s: float) -> float:
        """Seconds a ticket of this worker may go without progress."""
        return max(least_s, 10 * self.steps_s.p99)

    def came_late(self, push: pb.Push) -> None:
        """Its ticket is out no more: give the next as long as the worker says that it took.

        A deadline that one gradient outlasts would have it computed without end.
        """
        step_s = push.load_s + push.compute_s
        if math.isfinite(step_s) and step_s > self.steps_s.p99:
            self.steps_s.add_slowest(step_s)

    def reserve(self, lease_s: float) -> int:
        """Tickets' worth of batches to reserve for it: what it computes in about `lease_s`."""
        if not self.steps_s:
            return FIRST_RESERVE
        step_s = max(self.steps_s.median, 1e-6)
        return max(1, min(MAX_RESERVE, round(lease_s / step_s)))

    def status(self, now: float, quarantined: bool, leased: int) -> pb.WorkerStatus:
        return pb.WorkerStatus(
            id=self.id,
            name=self.name,
            host=printable(self.hello.host),
            platform=printable(self.hello.platform),
            devices=self.hello.devices,
            pid=self.hello.pid,
            state="quarantined" if quarantined else "hung" if self.hung else self.phase,
            gradients=self.gradients,
            examples_per_second=self.examples.per_second(now),
            staleness_mean=self.staleness.mean,
            compute_s=self.times.median_compute_s,
            connected_s=now - self.joined_time,
            staleness=self.staleness.message(),
            times=self.times.message(),
            leased=leased,
            transport=self.transport,
        )


class Roster:
    """The connected workers by id, and the instances that may not come back."""

    def __init__(self) -> None:
        self.members: dict[int, Member] = {}
        self._evicted: set[int] = set()
        self._attempts: dict[int, int] = {}
        self._joined = 0

    def check(self, hello: pb.Hello) -> None:
        """Whether `join` would take the worker in.

        Raises:
          Refused: EVICTED, or FENCED when a newer attempt was here already.
        """
        if hello.instance in self._evicted:
            raise Refused(
                Reason.EVICTED, "this worker was evicted; start a new one to take part again"
            )
        if hello.attempt <= self._attempts.get(hello.instance, 0):
            raise Refused(
                Reason.FENCED, f"attempt {hello.attempt} of this worker is not its newest"
            )

    def join(self, hello: pb.Hello, now: float) -> tuple[Member, Member | None]:
        """Take a worker in; also returns the older stream's member that it fences, if any.

        Raises:
          Refused: As `check`.
        """
        self.check(hello)
        self._attempts[hello.instance] = hello.attempt
        old = next((m for m in self.members.values() if m.hello.instance == hello.instance), None)
        if old:
            del self.members[old.id]
        member = Member(self.next_id(), "", hello, now, now)
        member.name = self._unique(printable(hello.name) or f"worker-{member.id}")
        self.members[member.id] = member
        return member, old

    def next_id(self) -> int:
        """A number that nobody in this incarnation has had."""
        self._joined += 1
        return self._joined

    def leave(self, member: Member) -> bool:
        """Whether it was still here."""
        return self.members.pop(member.id, None) is not None

    def evict(self, who: str) -> Member:
        """Bar a worker, by its name or id, from this incarnation.

        Raises:
          Refused: UNKNOWN_WORKER.
        """
        by_name = [m for m in self.members.values() if m.name == who]
        for member in by_name or [m for m in self.members.values() if str(m.id) == who]:
            self._evicted.add(member.hello.instance)
            return member
        names = ", ".join(m.name for m in self.members.values()) or "no one"
        raise Refused(
            Reason.UNKNOWN_WORKER, f"no worker is called {printable(who)!r}; connected: {names}"
        )

    def silent(self, now: float, timeout_s: float) -> list[Member]:
        """Those not heard of for `timeout_s` seconds."""
        return [m for m in self.members.values() if now - m.heard_time > timeout_s]

    def listening(self) -> list[Member]:
        """Those that wait for a word of the server, or will once their gradient has left.

        One that computes reads nothing meanwhile, and must not be sent what would
        pile up.
        """
        return [m for m in self.members.values() if m.phase in ("waiting", "sending")]

    def shift(self, seconds: float) -> None:
        """Silence while the server itself was stopped counts for nothing."""
        for member in self.members.values():
            member.heard_time += seconds
            member.joined_time += seconds

    def _unique(self, name: str) -> str:
        taken = {m.name for m in self.members.values()}
        if name not in taken:
            return name
        return next(n for k in range(2, len(taken) + 3) if (n := f"{name}-{k}") not in taken)


def printable(text: str, limit: int = MAX_TEXT) -> str:
    """A peer's text, safe and short enough to show."""
    return "".join(c for c in text if c.isprintable()).strip()[:limit]
