"""Who may compute what, at which version, and whose gradient moves the weights.

A worker asks; it is given a ticket for one batch at the current version when a
batch is pending and a staging slot is free. A gradient that comes with its
ticket is held, and applied in its turn. Everything a worker did not finish goes
back when it is lost.

Asynchronous training is the only rule so far: every gradient is applied, in
order of arrival, whatever its staleness. The bound of bounded staleness belongs
in `_base_for` and `_next`, which see every base that is out.

A pure state machine: no I/O, no threads; time comes in as an argument.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Collection

from headwater.server.ledger import Ledger, WorkerId
from headwater.server.ranges import Ranges

LEASE_SIZE = 8
"""Batches reserved for a worker, so that it can load their data ahead."""


@dataclasses.dataclass(frozen=True)
class Ticket:
    """The right to one push. `number` counts the tickets of this process from 1."""

    number: int
    worker: WorkerId
    position: int
    base: int


@dataclasses.dataclass(frozen=True)
class Grant:
    """A ticket, and how the leases changed to make it."""

    ticket: Ticket
    leased: tuple[int, ...]
    """Newly reserved for the ticket's worker."""
    withdrawn_from: WorkerId | None = None
    """Who held the ticket's batch in reserve until now."""


@dataclasses.dataclass
class _Out:
    """A ticket whose gradient has not come yet."""

    ticket: Ticket
    deadline_s: float
    last_progress: float


class Admission:
    """Tickets and held gradients over a ledger.

    Args:
      ledger: Moved by this object alone from here on.
      slots: Gradients that staging memory can hold, at least 1: tickets, held
        and applying together never exceed it.
      avoid: The batches that a worker should not be given (see refusals.py).
    """

    def __init__(
        self,
        ledger: Ledger,
        slots: int,
        avoid: Callable[[WorkerId], Collection[int]] = lambda worker: (),
    ) -> None:
        self.ledger = ledger
        self.paused = False
        self._slots = slots
        self._avoid = avoid
        self._waiting: dict[WorkerId, float] = {}  # to the seconds of its deadline, in order
        self._out: dict[int, _Out] = {}
        self._held: deque[Ticket] = deque()
        self._applying: dict[int, Ticket] = {}
        self._issued = 0

    # ------------------------------------------------------------- looking

    @property
    def bases(self) -> list[int]:
        """Of all gradients under way: ticketed, held and applying."""
        return sorted(t.base for t in self._all())

    @property
    def applying_count(self) -> int:
        """Gradients on their way into the weights, which nothing can stop."""
        return len(self._applying)

    @property
    def out_count(self) -> int:
        """Tickets whose gradients have not come yet."""
        return len(self._out)

    def outstanding(self, number: int) -> Ticket | None:
        """The ticket, if its gradient is still awaited."""
        out = self._out.get(number)
        return out.ticket if out else None

    def tickets_of(self, worker: WorkerId) -> list[Ticket]:
        return [o.ticket for o in self._out.values() if o.ticket.worker == worker]

    # -------------------------------------------------------------- moving

    def request(self, worker: WorkerId, deadline_s: float) -> None:
        """The worker is ready for a ticket, which may go `deadline_s` without progress."""
        self._waiting[worker] = deadline_s

    def grants(self, version: int, now: float) -> list[Grant]:
        """Issue what can be issued; workers that asked first come first."""
        found = []
        for worker in list(self._waiting):
            if self.paused or sum(1 for _ in self._all()) >= self._slots:
                break
            grant = self._grant(worker, version, now)
            if grant:
                found.append(grant)
        return found

    def hold(self, number: int) -> Ticket:
        """The whole gradient for this ticket, which must be outstanding, has come."""
        ticket = self._out.pop(number).ticket
        self.ledger.admit(ticket.position)
        self._held.append(ticket)
        return ticket

    def next_to_apply(self) -> Ticket | None:
        """Take the gradient whose turn it is; None when paused or nothing is held."""
        if self.paused or not self._held:
            return None
        ticket = self._next()
        self._applying[ticket.number] = ticket
        return ticket

    def settle(self, ticket: Ticket, applied: Ranges) -> None:
        """The gradient's update, or its being left out, was published."""
        del self._applying[ticket.number]
        self.ledger.settle(ticket.position, applied)

    def refuse(self, ticket: Ticket) -> None:
        """The gradient, awaited or being applied, is not to be used: its batch is pending again."""
        if self._applying.pop(ticket.number, None) is None:
            del self._out[ticket.number]
        self.ledger.give_back(ticket.position)

    def lost(self, worker: WorkerId) -> list[Ticket]:
        """The worker is gone: tickets and leases go back; gradients it finished stay."""
        self._waiting.pop(worker, None)
        self.ledger.release(worker)
        return [self._void(t.number) for t in self.tickets_of(worker)]

    # ---------------------------------------------------------------- time

    def progress(self, worker: WorkerId, now: float) -> None:
        """The worker moved on: its tickets' deadlines begin anew."""
        for out in self._out.values():
            if out.ticket.worker == worker:
                out.last_progress = now

    def expire(self, now: float) -> list[tuple[Ticket, list[int]]]:
        """Take back the tickets past their deadlines, each with its holder's reserved batches."""
        if self.paused:
            return []
        late = [o.ticket for o in self._out.values() if now - o.last_progress > o.deadline_s]
        return [(self._void(t.number), self.ledger.release(t.worker)) for t in late]

    def shift(self, seconds: float, now: float) -> None:
        """Move every deadline on: the time was nobody's fault (a pause, a stopped server)."""
        for out in self._out.values():
            # Progress made in the meantime has moved its deadline already.
            out.last_progress = min(out.last_progress + seconds, now)

    # ------------------------------------------------------------ privately

    def _all(self) -> list[Ticket]:
        out = [o.ticket for o in self._out.values()]
        return [*out, *self._held, *self._applying.values()]

    def _base_for(self, version: int) -> int | None:
        return version

    def _next(self) -> Ticket:
        return self._held.popleft()

    def _grant(self, worker: WorkerId, version: int, now: float) -> Grant | None:
        base = self._base_for(version)
        if base is None:
            return None
        leased: list[int] = []
        reserve = len(self.ledger.leased_to(worker))
        if reserve <= LEASE_SIZE // 2:  # few, larger top-ups: each costs a message field
            leased = self.ledger.lease(worker, LEASE_SIZE - reserve, self._avoid(worker))
        position = self.ledger.take(worker)
        holder = None
        if position is None:
            moved = self.ledger.withdraw(worker, self._avoid(worker))
            if moved is None:
                return None
            holder, position = moved
            leased = [position]
            self.ledger.take(worker)
        self._issued += 1
        ticket = Ticket(self._issued, worker, position, base)
        self._out[ticket.number] = _Out(ticket, self._waiting.pop(worker), now)
        return Grant(ticket, tuple(leased), holder)

    def _void(self, number: int) -> Ticket:
        ticket = self._out.pop(number).ticket
        self.ledger.give_back(ticket.position)
        return ticket
