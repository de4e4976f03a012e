"""Who may compute what, at which version, and whose gradient moves the weights.

A worker asks; it is given a ticket for one batch when a batch is pending, a
staging slot is free, and the dial allows it. One that asks again before its gradient
is here gets a second ticket, if that takes nothing from those who have none. A
gradient that comes with its ticket is held, and applied in its turn. Everything a
worker did not finish goes back when it is lost.

With a bound K, a ticket is granted only if, once it is out, all gradients under
way could still be applied without one being older than K:

    ok(V, bases): V + i <= b + K for the i-th smallest base b

and the fast are held back rather than the slow refused: a gradient is applied,
the oldest base first, only if ok holds for the others afterwards. The one with
the smallest base can always be applied, so nobody waits longer than a ticket lives.

In sync mode the lowest N unapplied batches of the epoch are a group, all at one
version, and the group is applied together. A worker that finds nothing to do
gets the batch that somebody else has been at for unusually long, and the first
result counts (backup workers: Chen et al. 2016, "Revisiting Distributed
Synchronous SGD"). What is summed does not depend on who was first.

A pure state machine: no I/O, no threads; time comes in as an argument. "Version"
is that of the published weights; those that are on their way are counted here.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable

from headwater.server.dial import Dial
from headwater.server.ledger import Ledger, WorkerId
from headwater.server.ranges import Ranges

LEASE_SIZE = 8
"""Batches reserved for a worker, so that it can load their data ahead, unless it asks for more."""

NO_BATCH = NOBODY = -1
"""In place of a batch's position, and of a worker."""

BACKUP_AFTER = 2.0
"""Median steps that a batch of a group takes before an idle worker gets it as well."""

_STEPS = 64
"""Recent steps that the median is taken of."""


@dataclasses.dataclass(frozen=True)
class Ticket:
    """The right to one push. `number` counts the tickets of this process from 1."""

    number: int
    worker: WorkerId
    """NOBODY for a session's push."""
    position: int
    """NO_BATCH for a session's push."""
    base: int
    slots: int = 1
    """Of staging memory that its gradient takes."""

    @property
    def has_batch(self) -> bool:
        return self.position != NO_BATCH


@dataclasses.dataclass(frozen=True)
class Grant:
    """A ticket, and how the leases changed to make it."""

    ticket: Ticket
    leased: tuple[int, ...]
    """Newly reserved for the ticket's worker."""
    withdrawn_from: WorkerId | None = None
    """Who held the ticket's batch in reserve until now."""


class Unwanted(enum.Enum):
    """Why the gradient of a ticket will not be used, though its worker did nothing wrong."""

    STALE = "older than the dial allows"
    DUPLICATE = "somebody else was first"


@dataclasses.dataclass
class _Request:
    """A worker's wish for a ticket."""

    deadline_s: float
    reserve: int


@dataclasses.dataclass
class _Out:
    """A ticket whose gradient has not come yet."""

    ticket: Ticket
    deadline_s: float
    issued_time: float
    last_progress: float


class Admission:
    """Tickets and held gradients over a ledger.

    Args:
      ledger: Moved by this object alone from here on.
      slots: Gradients that staging memory can hold, at least 1, and in sync mode
        at least a group: tickets, held and applying together never exceed it.
      avoid: The batches that a worker should not be given (see refusals.py).
      dial: See `set_dial`.
      workers: How many could have a ticket now.
    """

    def __init__(
        self,
        ledger: Ledger,
        slots: int,
        avoid: Callable[[WorkerId], Collection[int]] = lambda worker: (),
        dial: Dial = Dial(),  # noqa: B008  (frozen)
        workers: Callable[[], int] = lambda: 0,
    ) -> None:
        self.ledger = ledger
        self.paused = False
        self.dial = dial
        self.drop_over: int | None = None
        """Staleness above which a gradient is refused when its turn comes."""
        self._slots = slots
        self._avoid = avoid
        self._workers = workers
        self._waiting: dict[WorkerId, _Request] = {}  # in order
        self._out: dict[int, _Out] = {}
        self._unwanted: dict[int, tuple[WorkerId, Unwanted]] = {}  # still under way, for nothing
        self._held: list[Ticket] = []  # in order of arrival
        self._checked: set[int] = set()  # of those held in a group
        self._applying: list[tuple[Ticket, ...]] = []
        self._overtaken: set[int] = set()  # were being applied when the dial was set
        self._issued = 0
        self.session_count = 0
        """Programs that push without tickets, for whom second tickets leave room."""
        self.awaited_slots = 0
        """Of memory that their pushes wait for, and get before a new ticket does."""
        self._steps: deque[float] = deque(maxlen=_STEPS)

    # ------------------------------------------------------------- looking

    @property
    def bases(self) -> list[int]:
        """Of all gradients that are awaited or held."""
        return sorted(t.base for t in self._under_way())

    @property
    def applying_count(self) -> int:
        """Updates on their way into the weights, which nothing can stop."""
        return len(self._applying)

    @property
    def out_count(self) -> int:
        """Tickets whose gradients have not come yet."""
        return len(self._out)

    def outstanding(self, number: int) -> Ticket | None:
        """The ticket, if its gradient is still awaited."""
        out = self._out.get(number)
        return out.ticket if out else None

    def is_held(self, ticket: Ticket) -> bool:
        """Whether its gradient waits for its turn."""
        return ticket in self._held

    def tickets_of(self, worker: WorkerId) -> list[Ticket]:
        return [o.ticket for o in self._out.values() if o.ticket.worker == worker]

    def under_way_of(self, worker: WorkerId) -> int:
        """Gradients of the worker's that are awaited, held or being applied."""
        applying = (ticket for update in self._applying for ticket in update)
        return sum(t.worker == worker for t in (*self._under_way(), *applying))

    def backup_time(self) -> float | None:
        """When the first of those who wait may get somebody else's batch; None: not for now."""
        if self.dial.group is None or self.paused or self._applying or not self._has_slot():
            return None
        have_none = [worker for worker in self._waiting if not self.tickets_of(worker)]
        found = [oldest for worker in have_none if (oldest := self._oldest(worker))]
        return min(map(self._backup_due, found), default=None)

    # -------------------------------------------------------------- moving

    def request(self, worker: WorkerId, deadline_s: float, reserve: int = LEASE_SIZE) -> None:
        """The worker is ready for a ticket.

        Args:
          worker: Who.
          deadline_s: Seconds that the ticket may go without progress.
          reserve: Batches leased to the worker, at most; its next ticket's is one of them.
        """
        self._waiting[worker] = _Request(deadline_s, max(1, reserve))

    def grants(self, version: int, now: float) -> list[Grant]:
        """Issue what can be issued: first tickets, then second ones, in the order asked for."""
        found: list[Grant] = []
        have_one = {out.ticket.worker for out in self._out.values()}
        for worker in sorted(self._waiting, key=have_one.__contains__):
            room = 1 + self.awaited_slots
            if self.paused or not self._has_slot(room) or not self._may_begin(version):
                break
            if worker in have_one and not self._has_room_for_second(version):
                break
            grant = self._grant(worker, version, now)
            if grant:
                found.append(grant)
        return found

    def has_room(self, slots: int) -> bool:
        """Whether a session's push could be received."""
        return self._has_slot(slots)

    def announce(
        self, base: int, version: int, now: float, *, slots: int, deadline_s: float
    ) -> Ticket | None:
        """A session is about to push a gradient computed at `base`, and there is room for it.

        Its place among those under way is kept from now on, as if it had asked for a
        ticket. None where the bound leaves none: it would be too old, or make others so.
        """
        if self.dial.group is not None or not self._ok(self._clock(version), (*self.bases, base)):
            return None
        self._issued += 1
        ticket = Ticket(self._issued, NOBODY, NO_BATCH, base, slots)
        self._out[ticket.number] = _Out(ticket, deadline_s, now, now)
        return ticket

    def moved(self, number: int, now: float) -> None:
        """More of the gradient for this ticket, which must be outstanding, has come."""
        self._out[number].last_progress = now

    def issued_time(self, number: int) -> float:
        """Of an outstanding ticket; the time of a pause does not count."""
        return self._out[number].issued_time

    def hold(self, number: int, now: float) -> Ticket:
        """The whole gradient for this ticket, which must be outstanding, has come."""
        out = self._out.pop(number)
        ticket = out.ticket
        if not ticket.has_batch:
            self._held.append(ticket)
            return ticket
        self._steps.append(now - out.issued_time)
        self.ledger.admit(ticket.position)
        self._held.append(ticket)
        for other in [o.ticket for o in self._out.values()]:
            if other.position == ticket.position:
                self._disown(other, Unwanted.DUPLICATE)
        return ticket

    def checked(self, ticket: Ticket) -> None:
        """The gradient is finite: if it is held, in sync mode, it may be applied with its group."""
        if ticket in self._held:
            self._checked.add(ticket.number)

    def too_stale(self, version: int) -> list[Ticket]:
        """Take back what is held and must not be applied; to be called before `next_to_apply`.

        That is what is older than `drop_over`, and what is left of a group that
        failed and was begun under an earlier dial: nothing was kept free for it.
        """
        late = [ticket for ticket in self._held if self._is_late(ticket, version)]
        for ticket in late:
            self.refuse(ticket)
        return late

    def next_to_apply(self, version: int) -> tuple[Ticket, ...] | None:
        """Take the gradients whose turn it is, in the order of their batches.

        None when paused, when nothing is held, or when what is held has to wait for
        others: for an older one under way, or for the rest of its group.
        """
        if self.paused or not self._held:
            return None
        in_groups = self.dial.group is not None
        update = self._whole_group() if in_groups else self._oldest_held(version)
        for ticket in update:
            self._held.remove(ticket)
            self._checked.discard(ticket.number)
        if update:
            self._applying.append(update)
        return update or None

    def leave_out(self, ticket: Ticket) -> None:
        """The held or applying gradient counts as applying from now on: as a batch left out."""
        if ticket in self._held:
            self._held.remove(ticket)
            self._checked.discard(ticket.number)
        else:
            self._stop_applying(ticket)
        self._applying.append((ticket,))

    def settle(self, update: tuple[Ticket, ...], applied: Ranges) -> None:
        """The update, or its being left out, was published."""
        self._applying.remove(update)
        positions = [ticket.position for ticket in update if ticket.has_batch]
        self.ledger.settle(positions, applied)

    def refuse(self, ticket: Ticket) -> None:
        """The gradient, awaited, held or being applied, is not to be used: its batch goes back."""
        if self._out.pop(ticket.number, None) is None:
            if ticket in self._held:
                self._held.remove(ticket)
                self._checked.discard(ticket.number)
            else:
                self._stop_applying(ticket)
        self._give_back(ticket)

    def lost(self, worker: WorkerId) -> list[Ticket]:
        """The worker is gone: tickets and leases go back; gradients it finished stay."""
        self._waiting.pop(worker, None)
        self.ledger.release(worker)
        self._unwanted = {n: found for n, found in self._unwanted.items() if found[0] != worker}
        return [self._void(t.number) for t in self.tickets_of(worker)]

    def unwanted(self, number: int, worker: WorkerId) -> Unwanted | None:
        """Why the worker's gradient is not used; None where it never had such a ticket. Once."""
        found = self._unwanted.get(number)
        if found is None or found[0] != worker:
            return None
        del self._unwanted[number]
        return found[1]

    def set_dial(self, dial: Dial, version: int) -> list[Ticket]:
        """Hold to another dial from now on.

        Keeps what could have come about under it: to bounded, what fits, finished
        gradients before awaited ones; to sync, what was begun at this version within
        the group. All else goes back: awaited tickets will be `unwanted`.

        Returns:
          The held gradients that went back.
        """
        if dial == self.dial:
            return []
        was_sync, self.dial = self.dial.group is not None, dial
        self._overtaken = {ticket.number for update in self._applying for ticket in update}
        held, self._held = self._held, []
        out, self._out = self._out, {}
        if dial.group is not None:
            # Unless they were checked, held ones would have to be now.
            keep = self._in_group(version, (*(held if was_sync else ()), *_tickets(out)))
        else:
            keep = self._fitting(version, (*held, *_tickets(out)))
        self._held = [ticket for ticket in held if ticket in keep]
        self._out = {number: o for number, o in out.items() if o.ticket in keep}
        late = [ticket for ticket in held if ticket not in keep]
        kept = {ticket.position for ticket in keep if ticket.has_batch}
        for ticket in _tickets(out):
            if ticket not in keep:
                why = Unwanted.DUPLICATE if ticket.position in kept else Unwanted.STALE
                self._unwanted[ticket.number] = ticket.worker, why
        self._checked -= {ticket.number for ticket in late}
        for position in {ticket.position for ticket in (*late, *_tickets(out))} - kept:
            if position != NO_BATCH:
                self.ledger.give_back(position)
        return late

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
            out.issued_time = min(out.issued_time + seconds, now)

    # ------------------------------------------------------- privately: bounds

    def _under_way(self) -> list[Ticket]:
        return [*_tickets(self._out), *self._held]

    def _has_slot(self, count: int = 1) -> bool:
        applying = (ticket for update in self._applying for ticket in update)
        return sum(t.slots for t in (*self._under_way(), *applying)) + count <= self._slots

    def _clock(self, version: int) -> int:
        """The version when all that is being applied will have been."""
        return version + len(self._applying)

    def _ok(self, version: int, bases: Iterable[int]) -> bool:
        """Whether gradients of these bases can all be applied from `version` on, in some order."""
        if self.dial.bound is None:
            return True
        return all(version + i <= base + self.dial.bound for i, base in enumerate(sorted(bases)))

    def _may_begin(self, version: int) -> bool:
        """Whether a gradient may be begun at the published version."""
        if self.dial.group is not None:
            return not self._applying  # all of a group are at one version
        return self.dial.bound is None or self._ok(self._clock(version), (*self.bases, version))

    def _has_room_for_second(self, version: int) -> bool:
        """Whether all who have no ticket could still be given one beside it."""
        if self.dial.group is not None:
            return False
        having = {out.ticket.worker for out in self._out.values() if out.ticket.has_batch}
        idle = max(0, self._workers() - len(having)) + self.session_count
        bases = (*self.bases, *[version] * (1 + idle))
        return self._has_slot(1 + idle) and self._ok(self._clock(version), bases)

    def _oldest_held(self, version: int) -> tuple[Ticket, ...]:
        ticket = min(self._held, key=lambda t: t.base)  # the first to come of those
        others = [t.base for t in self._under_way() if t is not ticket]
        return (ticket,) if self._ok(self._clock(version) + 1, others) else ()

    def _is_late(self, ticket: Ticket, version: int) -> bool:
        if ticket.number in self._overtaken:
            return True
        if self.drop_over is None or self.paused or self.dial.group is not None:
            return False
        return self._clock(version) - ticket.base > self.drop_over

    def _fitting(self, version: int, tickets: Iterable[Ticket]) -> set[Ticket]:
        """Those that a bound allows together; no batch twice. Earlier ones go first."""
        # Unit jobs with deadlines are a matroid: to take what still fits, in order of
        # preference, gives the best set there is.
        keep: set[Ticket] = set()
        for ticket in tickets:
            is_new = not ticket.has_batch or all(t.position != ticket.position for t in keep)
            if is_new and self._ok(self._clock(version), [t.base for t in (*keep, ticket)]):
                keep.add(ticket)
        return keep

    # ------------------------------------------------------- privately: groups

    def _group(self) -> list[int]:
        """The batches of the next update."""
        return self.ledger.lowest_unapplied(self.dial.group or 0)

    def _whole_group(self) -> tuple[Ticket, ...]:
        have = {t.position: t for t in self._held if t.number in self._checked}
        group = self._group()
        return tuple(have[p] for p in group) if have.keys() >= set(group) else ()

    def _in_group(self, version: int, tickets: Iterable[Ticket]) -> set[Ticket]:
        group = set() if self._applying else set(self._group())
        keep: dict[int, Ticket] = {}
        for ticket in tickets:
            if ticket.base == version and ticket.position in group:
                keep.setdefault(ticket.position, ticket)
        return set(keep.values())

    def _group_batch(self, worker: WorkerId) -> int | None:
        """The batch of the group that the worker should compute, if one is free.

        One of its reserve, whose data it has perhaps; or else one that nobody has.
        """
        avoid = self._avoid(worker)
        begun = {t.position for t in self._under_way()}
        free = [p for p in self._group() if p not in begun and p not in avoid]
        reserved = [p for p in self.ledger.leased_to(worker) if p in free]
        pending = [p for p in free if self.ledger.state(p) is None]
        return min(reserved or pending or free, default=None)

    def _oldest(self, worker: WorkerId) -> _Out | None:
        """The ticket out longest, of those whose batch just one other than the worker computes."""
        if self.dial.group is None or not self._steps:
            return None
        count: dict[int, int] = {}
        for out in self._out.values():
            count[out.ticket.position] = count.get(out.ticket.position, 0) + 1
        avoid = self._avoid(worker)
        others = [
            out
            for out in self._out.values()
            if count[out.ticket.position] == 1
            and out.ticket.worker != worker
            and out.ticket.position not in avoid
        ]
        return min(others, key=lambda out: out.issued_time, default=None)

    def _backup_due(self, out: _Out) -> float:
        return out.issued_time + BACKUP_AFTER * sorted(self._steps)[len(self._steps) // 2]

    def _backup(self, worker: WorkerId, version: int, now: float) -> Grant | None:
        """A second ticket for a batch that takes unusually long."""
        oldest = self._oldest(worker)
        if oldest is None or now < self._backup_due(oldest):
            return None
        position = oldest.ticket.position
        return Grant(self._issue(worker, position, version, now), (position,))

    # ------------------------------------------------------ privately: tickets

    def _grant(self, worker: WorkerId, version: int, now: float) -> Grant | None:
        if self.dial.group is not None:
            return self._grant_in_group(worker, version, now)
        # A larger share would be taken from this worker before it came to it.
        share = self.ledger.open_count // max(1, self._workers())
        leased = self._top_up(worker, max(1, min(self._waiting[worker].reserve, share)))
        position = self.ledger.take(worker)
        holder = None
        if position is None:
            if self.tickets_of(worker):
                return None  # what others have in reserve is not for a second ticket
            moved = self.ledger.withdraw(worker, self._avoid(worker))
            if moved is None:
                return None
            holder, position = moved
            leased = [position]
            self.ledger.take(worker)
        return Grant(self._issue(worker, position, version, now), tuple(leased), holder)

    def _grant_in_group(self, worker: WorkerId, version: int, now: float) -> Grant | None:
        position = self._group_batch(worker)
        if position is None:
            return self._backup(worker, version, now)
        # A larger share would be taken from this worker before it came to it.
        workers = len({t.worker for t in self._under_way()} | self._waiting.keys())
        share = math.ceil((self.dial.group or 1) / max(1, workers))
        leased = self._top_up(worker, min(self._waiting[worker].reserve, share))
        holder = None
        if self.ledger.state(position) is None:
            # Only where the worker's reserve is full of batches of later groups.
            leased += self.ledger.lease(worker, 1, self._avoid(worker))
        elif position not in self.ledger.leased_to(worker):
            holder = self.ledger.move(position, worker)
            leased.append(position)
        self.ledger.take(worker, position)
        return Grant(self._issue(worker, position, version, now), tuple(leased), holder)

    def _top_up(self, worker: WorkerId, size: int) -> list[int]:
        reserve = len(self.ledger.leased_to(worker))
        if reserve > size // 2:  # few, larger top-ups: each costs a message field
            return []
        return self.ledger.lease(worker, size - reserve, self._avoid(worker))

    def _issue(self, worker: WorkerId, position: int, version: int, now: float) -> Ticket:
        self._issued += 1
        ticket = Ticket(self._issued, worker, position, version)
        deadline_s = self._waiting.pop(worker).deadline_s
        self._out[ticket.number] = _Out(ticket, deadline_s, now, now)
        return ticket

    def _void(self, number: int) -> Ticket:
        ticket = self._out.pop(number).ticket
        self._give_back(ticket)
        return ticket

    def _disown(self, ticket: Ticket, why: Unwanted) -> None:
        """Its gradient may still come, and is not used."""
        del self._out[ticket.number]
        self._unwanted[ticket.number] = ticket.worker, why

    def _stop_applying(self, ticket: Ticket) -> None:
        """It was found unfit just before its update, which then does not come about."""
        update = next(update for update in self._applying if ticket in update)
        self._applying.remove(update)
        if update[1:]:
            # The others of its group wait for it to be computed anew.
            self._held += [other for other in update if other != ticket]
            self._checked.update(other.number for other in update if other != ticket)

    def _give_back(self, ticket: Ticket) -> None:
        """Its batch is pending again, unless somebody else computes it as well."""
        if not ticket.has_batch:
            return
        if all(other.position != ticket.position for other in self._under_way()):
            self.ledger.give_back(ticket.position)


def _tickets(out: dict[int, _Out]) -> list[Ticket]:
    return [o.ticket for o in out.values()]
