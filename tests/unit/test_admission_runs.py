"""Exactly once, and never staler than the dial allows, through histories that nobody thought of.

A state machine makes up runs with any dial, and the dial turned at any moment.
It keeps its own simple record of every batch and every gradient, says itself
what should happen next, and compares after each step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, deque
from collections.abc import Collection, Iterable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from headwater.server.admission import Admission, Grant, Ticket, Unwanted
from headwater.server.dial import Dial
from headwater.server.ledger import BatchState, Ledger
from headwater.server.ranges import Ranges

DEADLINE_S = 60


@dataclasses.dataclass
class Awaited:
    """What the machine knows of a ticket that is out."""

    ticket: Ticket
    issued_time: int
    last_progress: int
    deadline_s: int


@dataclasses.dataclass(frozen=True)
class Update:
    """What is being applied, or left out."""

    tickets: tuple[Ticket, ...]
    limit: float
    """The staleness that was allowed when it was begun."""
    is_left_out: bool = False


def dials(slots: int) -> st.SearchStrategy[Dial]:
    """Any dial; a group must fit in staging memory."""
    return st.one_of(
        st.just(Dial()),
        st.builds(Dial, bound=st.integers(0, 5)),
        st.builds(Dial, group=st.integers(1, min(5, slots))),
    )


class Runs(RuleBasedStateMachine):
    """Any history of workers, gradients, failures, pauses, time and dials.

    `done_count` is the record that promise 1 is about: how often each batch
    moved the weights, or was left out for good.
    """

    # What a rule acts on, drawn from what the machine has at that moment.
    a_worker = st.runner().flatmap(lambda run: st.sampled_from(sorted(run.workers)))
    a_ticket = st.runner().flatmap(lambda run: st.sampled_from(sorted(run.awaited)))
    a_check = st.runner().flatmap(lambda run: st.sampled_from(run.in_check))
    an_unwanted = st.runner().flatmap(lambda run: st.sampled_from(sorted(run.unwanted)))
    a_dial = st.runner().flatmap(lambda run: dials(run.slots))

    @initialize(
        per_epoch=st.sampled_from([12, 1, 2, 3, 7, 20]),
        epochs=st.integers(1, 4),
        slots_and_dial=st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), dials(n))),
        reserve=st.sampled_from([8, 0, 1, 3]),
        applied=st.sets(st.integers(0, 23), max_size=10),
        workers=st.integers(0, 5),
    )
    def begin_run(
        self,
        per_epoch: int,
        epochs: int,
        slots_and_dial: tuple[int, Dial],
        reserve: int,
        applied: set[int],
        workers: int,
    ) -> None:
        """A new run, or one resumed with holes in what was applied."""
        self.total, self.per_epoch, self.reserve_size = per_epoch * epochs, per_epoch, reserve
        self.slots, self.dial = slots_and_dial
        self.drop_over: int | None = None
        self.before = Ranges.of(n for n in applied if n < self.total)
        self.applied = self.before  # published with the newest version
        self.done_count: Counter[int] = Counter()
        self.version = 0
        self.now = 0
        self.paused_time = 0
        self.workers: set[int] = set()
        self.joined_count = 0
        self.waiting: dict[int, int] = {}  # to its deadline, in the order of asking
        self.awaited: dict[int, Awaited] = {}
        self.unwanted: dict[int, tuple[int, Unwanted]] = {}  # still under way, for nothing
        self.held: list[Ticket] = []
        self.in_check: list[Ticket] = []  # held in a group, then perhaps no longer
        self.checked: set[int] = set()
        self.applying: deque[Update] = deque()
        self.overtaken: set[int] = set()  # were being applied when the dial was turned
        self.steps: deque[int] = deque(maxlen=64)
        self.reserve: dict[int, set[int]] = {}  # as the worker itself was told
        self.refusers: dict[int, set[int]] = {}
        self.issued_count = 0
        self.ledger = Ledger(self.total, per_epoch, self.before)
        self.admission = Admission(
            self.ledger, self.slots, self.avoided_by, self.dial, lambda: len(self.workers)
        )
        for _ in range(workers):
            self.join(DEADLINE_S)

    # ---------------------------------------------------------- what happens

    @precondition(lambda self: len(self.workers) < 8)  # more would only wait for slots
    @rule(deadline_s=st.integers(5, 60))
    def join(self, deadline_s: int) -> None:
        self.joined_count += 1
        self.workers.add(self.joined_count)
        self.reserve[self.joined_count] = set()
        self.ask(self.joined_count, deadline_s)

    @precondition(lambda self: self.workers)
    @rule(worker=a_worker, deadline_s=st.integers(5, 60))
    def ask(self, worker: int, deadline_s: int) -> None:
        """Once for each ticket; a pipelined worker asks while it has one."""
        self.admission.request(worker, deadline_s, self.reserve_size)
        self.waiting[worker] = deadline_s
        self.serve()

    @precondition(lambda self: self.awaited)
    @rule(number=a_ticket, asks=st.booleans())
    def receive(self, number: int, asks: bool = False) -> None:
        """A whole gradient comes; whoever else computes its batch does so for nothing."""
        awaited = self.awaited.pop(number)
        ticket = awaited.ticket
        assert self.admission.hold(number, self.now) == ticket
        self.steps.append(self.now - awaited.issued_time)
        self.held.append(ticket)
        if self.dial.group is not None:
            self.in_check.append(ticket)
        for other in self.tickets_out():
            if other.position == ticket.position:
                self.disown(other, Unwanted.DUPLICATE)
        self.serve()
        if asks:
            self.ask(ticket.worker, DEADLINE_S)

    @precondition(lambda self: self.unwanted)
    @rule(number=an_unwanted, stranger=st.integers(1, 9))
    def receive_unwanted(self, number: int, stranger: int) -> None:
        """A gradient comes that has been overtaken: its own worker is told why, once."""
        worker, why = self.unwanted.pop(number)
        assert self.admission.outstanding(number) is None
        if stranger != worker:
            assert self.admission.unwanted(number, stranger) is None
        assert self.admission.unwanted(number, worker) is why
        assert self.admission.unwanted(number, worker) is None

    @precondition(lambda self: self.in_check)
    @rule(ticket=a_check, finding=st.sampled_from(["finite", "refused", "left out"]))
    def end_check(self, ticket: Ticket, finding: str) -> None:
        """A gradient of a group was looked at, and may by now be somewhere else."""
        self.in_check.remove(ticket)
        assert self.admission.is_held(ticket) == (ticket in self.held)
        if finding == "finite":
            self.admission.checked(ticket)
            self.checked.add(ticket.number)
        elif ticket in self.held:
            self.held.remove(ticket)
            self.give_up(ticket, is_left_out=finding == "left out")
        self.serve()

    @precondition(lambda self: self.awaited and not self.admission.paused)
    @rule(number=a_ticket, rounds=st.integers(1, 20))
    def train(self, number: int, rounds: int) -> None:
        """A worker goes on for some rounds without trouble, so that histories get far."""
        worker = self.awaited[number].ticket.worker
        for _ in range(rounds):
            self.receive(number)
            self.apply_all()
            self.ask(worker, DEADLINE_S)
            tickets = self.admission.tickets_of(worker)
            if not tickets:
                break
            number = tickets[0].number

    @precondition(lambda self: self.workers and not self.admission.paused)
    @rule(slow=st.sets(st.integers(0, 3)), begins=st.booleans())
    def work(self, slow: set[int], begins: bool) -> None:
        """All work at once but for the slow; then, perhaps, what can be applied is begun."""
        self.ask_all()
        for number in sorted(self.awaited):
            if number in self.awaited and number % 4 not in slow:
                self.receive(number)
        self.check_all()
        while begins and self.due():
            self.begin_apply()
        self.ask_all()

    @precondition(lambda self: self.awaited)
    @rule(number=a_ticket)
    def refuse_push(self, number: int) -> None:
        """A gradient is malformed."""
        ticket = self.awaited.pop(number).ticket
        self.give_up(ticket)
        self.serve()

    @precondition(lambda self: self.held and not self.admission.paused)
    @rule()
    def begin_apply(self) -> None:
        due = self.due()
        assert self.admission.next_to_apply(self.version) == due
        if due:
            for ticket in due:
                self.held.remove(ticket)
            self.applying.append(Update(due, self.staleness_limit()))
        self.serve()

    @precondition(lambda self: self.applying)
    @rule()
    def end_apply(self) -> None:
        """The oldest update that was begun is published."""
        update = self.applying.popleft()
        for ticket in update.tickets:
            self.applied = self.applied.add(ticket.position)
            self.done_count[ticket.position] += 1
            assert update.is_left_out or self.version - ticket.base <= update.limit
        self.version += not update.is_left_out
        self.admission.settle(update.tickets, self.applied)
        self.serve()

    @precondition(lambda self: self.applying)
    @rule(pick=st.integers(0, 4), is_left_out=st.booleans())
    def fail_apply(self, pick: int, is_left_out: bool) -> None:
        """The oldest update that was begun is not finite; one of its gradients pays for it."""
        update = self.applying.popleft()
        bad = update.tickets[pick % len(update.tickets)]
        self.held += [ticket for ticket in update.tickets if ticket is not bad]
        self.give_up(bad, is_left_out=is_left_out)
        self.serve()

    @precondition(lambda self: self.workers)
    @rule(worker=a_worker)
    def die(self, worker: int) -> None:
        tickets = self.tickets_out(worker)
        assert self.admission.lost(worker) == tickets
        for ticket in tickets:
            del self.awaited[ticket.number]
        for number in [n for n, (who, _) in self.unwanted.items() if who == worker]:
            del self.unwanted[number]
            assert self.admission.unwanted(number, worker) is None
        self.workers.remove(worker)
        self.waiting.pop(worker, None)
        del self.reserve[worker]
        self.serve()

    @precondition(lambda self: self.workers)
    @rule(worker=a_worker)
    def make_progress(self, worker: int) -> None:
        self.admission.progress(worker, self.now)
        for awaited in self.awaited.values():
            if awaited.ticket.worker == worker:
                awaited.last_progress = self.now

    @precondition(lambda self: self.awaited)
    @rule(seconds=st.integers(1, 80))
    def let_time_pass(self, seconds: int) -> None:
        self.now += seconds
        late = [
            a.ticket
            for a in self.awaited.values()
            if self.now - a.last_progress > a.deadline_s and not self.admission.paused
        ]
        expired = self.admission.expire(self.now)
        assert [ticket for ticket, _ in expired] == late
        for ticket, released in expired:
            del self.awaited[ticket.number]
            assert set(released) == self.reserve[ticket.worker]
            self.reserve[ticket.worker].clear()
        self.serve()

    @precondition(lambda self: self.awaited)
    @rule(seconds=st.integers(1, 40))
    def stand_still(self, seconds: int) -> None:
        """The server itself was stopped."""
        self.now += seconds
        self.shift(seconds)

    @precondition(lambda self: self.held and self.awaited and not self.admission.paused)
    @rule()
    def pause(self) -> None:
        self.admission.paused = True
        self.paused_time = self.now

    @precondition(lambda self: self.admission.paused)
    @rule()
    def resume(self) -> None:
        self.admission.paused = False
        self.shift(self.now - self.paused_time)
        self.serve()

    @rule(drop_over=st.none() | st.integers(0, 4))
    def set_drop(self, drop_over: int | None) -> None:
        self.drop_over = self.admission.drop_over = drop_over
        self.serve()

    @precondition(lambda self: self.under_way())
    @rule(dial=a_dial)
    def turn(self, dial: Dial) -> None:
        """The dial is turned, whatever is going on."""
        before, held, out = self.dial, self.held, self.tickets_out()
        self.dial = dial
        late = self.admission.set_dial(dial, self.version)
        self.held = [ticket for ticket in held if ticket not in late]
        kept = {*self.held, *(t for t in out if self.admission.outstanding(t.number))}
        assert late == [ticket for ticket in held if ticket not in kept]
        if dial == before:
            assert kept == {*held, *out}
        elif dial.group is None:
            self.check_kept_to_bounded(kept, held, out)
        else:
            self.check_kept_to_sync(kept, held if before.group is not None else [], out)
        if dial != before:
            self.overtaken.update(t.number for update in self.applying for t in update.tickets)
        for ticket in out:
            if ticket not in kept:
                is_twin = any(ticket.position == other.position for other in kept)
                self.disown(ticket, Unwanted.DUPLICATE if is_twin else Unwanted.STALE)
        self.serve()

    @precondition(lambda self: self.workers and not self.admission.paused)
    @rule(dial=a_dial, slow=st.sets(st.integers(0, 3)), fails=st.booleans())
    def turn_at_work(self, dial: Dial, slow: set[int], fails: bool) -> None:
        """The same in the middle of work, so that often something is under way."""
        self.work(slow, begins=fails)
        self.turn(dial)
        if fails and self.applying:
            self.fail_apply(1, is_left_out=False)

    def teardown(self) -> None:
        """Whatever has happened, the run ends while workers keep coming; some have stalled."""
        if self.admission.paused:
            self.resume()
        for worker in [w for w in self.workers if w % 2]:
            self.die(worker)
        stalled = {worker for worker in self.workers if worker % 4}
        self.refusers.clear()  # the stalled would be tried, too
        self.join(DEADLINE_S)
        for _ in range(self.total + 10):  # ten, for what the stalled had asked for
            for worker in sorted(self.workers - stalled):
                self.ask(worker, DEADLINE_S)
            for number in sorted(self.awaited):
                if number in self.awaited and self.awaited[number].ticket.worker not in stalled:
                    self.receive(number)
            self.apply_all()
            self.let_time_pass(DEADLINE_S + 1)
        assert self.ledger.done, f"stuck with {sorted(self.pending())} pending, at {self.dial}"
        assert self.admission.bases == []
        assert self.done_count == Counter(set(range(self.total)) - set(self.before))
        for number in sorted(self.unwanted):
            self.receive_unwanted(number, stranger=0)

    # --------------------------------------------------------- what should be

    def fits(self, version: int, bases: Collection[int]) -> bool:
        """Whether gradients of these bases can be applied, one a version, within the bound.

        Those as old as b or older have the versions up to b + K to themselves.
        """
        bound = self.dial.bound
        return bound is None or all(
            sum(other <= base for other in bases) <= base + bound - version + 1 for base in bases
        )

    def clock(self) -> int:
        """The version after all that is being applied."""
        return self.version + len(self.applying)

    def group(self) -> list[int]:
        """The lowest batches that are missing, of one epoch."""
        missing = [n for n in range(self.total) if n not in self.applied]
        same_epoch = [n for n in missing if n // self.per_epoch == missing[0] // self.per_epoch]
        return same_epoch[: self.dial.group]

    def due(self) -> tuple[Ticket, ...] | None:
        """The next update, where one can be begun."""
        if self.admission.paused or not self.held:
            return None
        if self.dial.group is not None:
            ready = {t.position: t for t in self.held if t.number in self.checked}
            group = self.group()
            return tuple(ready[n] for n in group) if ready.keys() >= set(group) else None
        first = min(self.held, key=lambda ticket: ticket.base)
        others = [t.base for t in self.under_way_but_applying() if t is not first]
        return (first,) if self.fits(self.clock() + 1, others) else None

    def staleness_limit(self) -> float:
        if self.dial.group is not None:
            return 0
        limits = (self.dial.bound, self.drop_over)
        return min((limit for limit in limits if limit is not None), default=float("inf"))

    def may_begin(self) -> bool:
        """Whether there is room, by memory and by the dial, for one more gradient."""
        if self.admission.paused or len(self.under_way()) >= self.slots:
            return False
        if self.dial.group is not None:
            return not self.applying
        bases = [ticket.base for ticket in self.under_way_but_applying()]
        return self.fits(self.clock(), [*bases, self.version])

    def may_begin_second(self) -> bool:
        """Whether that leaves room for a first one for each who has none."""
        idle = len(self.workers) - len({t.worker for t in self.tickets_out()})
        bases = [ticket.base for ticket in self.under_way_but_applying()]
        return (
            self.dial.group is None
            and len(self.under_way()) + 1 + idle <= self.slots
            and self.fits(self.clock(), [*bases, *[self.version] * (1 + idle)])
        )

    def possible(self, worker: int) -> set[int]:
        """The batches that the worker could be given, and that nobody computes."""
        if self.dial.group is not None:
            begun = {ticket.position for ticket in self.under_way()}
            return set(self.group()) - begun - self.avoided_by(worker)
        free = {n for n in self.pending() if n < self.end_of_open_epochs()}
        if self.tickets_out(worker):
            return (free - self.avoided_by(worker)) | self.reserve[worker]
        reserved = (mine for who, mine in self.reserve.items() if who != worker)
        return (free.union(*reserved) - self.avoided_by(worker)) | self.reserve[worker]

    def slowest(self, worker: int) -> Awaited | None:
        """Whose batch the worker may try as well, when it has taken long enough."""
        if self.dial.group is None:
            return None
        count = Counter(ticket.position for ticket in self.tickets_out())
        others = [
            a
            for a in self.awaited.values()
            if count[a.ticket.position] == 1
            and a.ticket.worker != worker
            and a.ticket.position not in self.avoided_by(worker)
        ]
        return min(others, key=lambda a: a.issued_time, default=None)

    def backup_time(self) -> float | None:
        """When the first of those who wait may get a second ticket of somebody's batch."""
        have_none = [worker for worker in self.waiting if not self.tickets_out(worker)]
        slowest = [found for worker in have_none if (found := self.slowest(worker))]
        if not slowest or not self.steps or not self.may_begin():
            return None
        median = sorted(self.steps)[len(self.steps) // 2]
        return min(a.issued_time for a in slowest) + 2 * median

    # ------------------------------------------------------ the machine's own

    def serve(self) -> None:
        """What a server does after every event: take back, and issue what can be issued."""
        late = [ticket for ticket in self.held if self.is_late(ticket)]
        assert self.admission.too_stale(self.version) == late
        self.held = [ticket for ticket in self.held if ticket not in late]
        while grants := self.admission.grants(self.version, self.now):
            asked = [worker for worker in self.waiting if not self.tickets_out(worker)]
            first = [g.ticket.worker for g in grants if not self.tickets_out(g.ticket.worker)]
            assert first == [g.ticket.worker for g in grants][: len(first)]
            if self.dial.group is None and not any(map(self.avoided_by, asked)):
                assert first == asked[: len(first)]
            for grant in grants:
                self.granted(grant)

    def is_late(self, ticket: Ticket) -> bool:
        if ticket.number in self.overtaken:
            return True
        if self.drop_over is None or self.admission.paused or self.dial.group is not None:
            return False
        return self.clock() - ticket.base > self.drop_over

    def apply_all(self) -> None:
        self.check_all()
        while self.due() or self.applying:
            while self.due():
                self.begin_apply()
            while self.applying:
                self.end_apply()

    def ask_all(self) -> None:
        for worker in sorted(self.workers):
            self.ask(worker, DEADLINE_S)

    def check_all(self) -> None:
        while self.in_check:
            self.end_check(self.in_check[0], "finite")

    def give_up(self, ticket: Ticket, *, is_left_out: bool = False) -> None:
        """The gradient cannot be used: its batch is tried again, or given up as well."""
        if is_left_out:
            self.admission.leave_out(ticket)
            self.applying.append(Update((ticket,), 0, is_left_out=True))
        else:
            self.admission.refuse(ticket)
            self.refusers.setdefault(ticket.position, set()).add(ticket.worker)

    def disown(self, ticket: Ticket, why: Unwanted) -> None:
        del self.awaited[ticket.number]
        self.unwanted[ticket.number] = ticket.worker, why

    def granted(self, grant: Grant) -> None:
        ticket, worker = grant.ticket, grant.ticket.worker
        assert self.may_begin()
        assert not self.tickets_out(worker) or self.may_begin_second()
        self.issued_count += 1
        assert (ticket.number, ticket.base) == (self.issued_count, self.version)
        if any(ticket.position == other.position for other in self.tickets_out()):
            self.check_backup(grant)
        else:
            self.check_reserve(grant)
        deadline_s = self.waiting.pop(worker)  # one ticket for each time it asked
        self.awaited[ticket.number] = Awaited(ticket, self.now, self.now, deadline_s)

    def check_reserve(self, grant: Grant) -> None:
        """The lowest batches go first, and reserves move as the workers were told."""
        position, worker = grant.ticket.position, grant.ticket.worker
        mine, possible = self.reserve[worker], self.possible(worker)
        reserved = mine.copy()
        fresh = list(grant.leased)
        if grant.withdrawn_from is not None:
            assert fresh.pop() == position
            assert position not in self.avoided_by(worker)
        lowest = sorted(self.pending() - self.avoided_by(worker))
        assert fresh == lowest[: len(fresh)]
        if grant.withdrawn_from is not None:
            self.reserve[grant.withdrawn_from].remove(position)
        assert mine.isdisjoint(grant.leased)
        mine.update(grant.leased)
        if self.dial.group is not None:
            assert position == min(reserved & possible or set(lowest) & possible or possible)
        else:
            assert position == min(mine)
        mine.remove(position)

    def check_backup(self, grant: Grant) -> None:
        """Only who finds nothing else gets a batch as well, and the one that is oldest."""
        worker = grant.ticket.worker
        slowest, due = self.slowest(worker), self.backup_time()
        assert slowest is not None
        assert due is not None
        assert due <= self.now
        assert grant == Grant(
            dataclasses.replace(slowest.ticket, number=self.issued_count, worker=worker),
            leased=(slowest.ticket.position,),
        )
        assert not self.possible(worker)

    def check_kept_to_bounded(
        self, kept: Collection[Ticket], held: list[Ticket], out: list[Ticket]
    ) -> None:
        """As many finished ones as can be, then as many in all as can be."""
        assert self.fits(self.clock(), [ticket.base for ticket in kept])
        assert len({ticket.position for ticket in kept}) == len(kept)
        single = {ticket.position: ticket for ticket in out}.values()
        assert sum(ticket in kept for ticket in held) == self.most(held)
        assert len(kept) == self.most([*held, *single])

    def most(self, tickets: list[Ticket]) -> int:
        """How many of the tickets can be applied at best."""
        return max(
            count
            for count in range(len(tickets) + 1)
            for chosen in itertools.combinations(tickets, count)
            if self.fits(self.clock(), [ticket.base for ticket in chosen])
        )

    def check_kept_to_sync(
        self, kept: Collection[Ticket], held: list[Ticket], out: list[Ticket]
    ) -> None:
        """What the new group would have begun itself; of a batch begun twice, one."""
        group = set() if self.applying else set(self.group())
        good = [t for t in (*held, *out) if t.base == self.version and t.position in group]
        assert set(kept) <= set(good)
        assert sorted(t.position for t in kept) == sorted({t.position for t in good})

    def shift(self, seconds: int) -> None:
        self.admission.shift(seconds, self.now)
        for awaited in self.awaited.values():
            awaited.last_progress = min(awaited.last_progress + seconds, self.now)
            awaited.issued_time = min(awaited.issued_time + seconds, self.now)

    def avoided_by(self, worker: int) -> set[int]:
        """What the worker had refused and somebody else here has yet to try."""
        return {n for n, who in self.refusers.items() if worker in who and self.workers - who}

    def tickets_out(self, worker: int | None = None) -> list[Ticket]:
        out = [a.ticket for a in self.awaited.values()]
        return [ticket for ticket in out if worker in (None, ticket.worker)]

    def being_applied(self) -> list[Ticket]:
        return [ticket for update in self.applying for ticket in update.tickets]

    def under_way_but_applying(self) -> list[Ticket]:
        return [*self.tickets_out(), *self.held]

    def under_way(self) -> list[Ticket]:
        return [*self.under_way_but_applying(), *self.being_applied()]

    def pending(self) -> set[int]:
        reserved = set().union(*self.reserve.values())
        out = {ticket.position for ticket in self.under_way()}
        return set(range(self.total)) - set(self.applied) - reserved - out

    def end_of_open_epochs(self) -> int:
        missing = set(range(self.total)) - set(self.applied)
        return (min(missing, default=self.total) // self.per_epoch + 2) * self.per_epoch

    # ------------------------------------------------------- what always holds

    @invariant()
    def all_that_is_under_way_can_be_applied_within_the_bound(self) -> None:
        updates = sum(not update.is_left_out for update in self.applying)
        assert self.fits(self.version + updates, self.admission.bases)

    @invariant()
    def the_oldest_gradient_once_held_is_applied(self) -> None:
        awaited = [ticket.base for ticket in self.tickets_out()]
        is_oldest = self.held and min(t.base for t in self.held) <= min(
            awaited, default=self.clock()
        )
        if is_oldest and self.dial.group is None and not self.admission.paused:
            assert self.due() is not None

    @invariant()
    def all_of_a_group_are_at_one_version(self) -> None:
        if self.dial.group is not None:
            assert set(self.admission.bases) <= {self.version}

    @invariant()
    def every_batch_is_in_exactly_one_state(self) -> None:
        states: list[tuple[BatchState, Iterable[int]]] = [
            (BatchState.TICKETED, {t.position for t in self.tickets_out()}),
            (BatchState.ADMITTED, [t.position for t in (*self.held, *self.being_applied())]),
            (BatchState.LEASED, itertools.chain(*self.reserve.values())),
        ]
        begun = [(n, state) for state, positions in states for n in positions]
        expected = dict(begun)
        assert len(expected) == len(begun)
        assert {n: self.ledger.state(n) for n in range(self.total)} == {
            n: expected.get(n) for n in range(self.total)
        }
        assert expected.keys().isdisjoint(self.applied)
        assert self.ledger.pending_count == len(self.pending())
        count = Counter(expected.values())
        assert all(self.ledger.count(state) == count[state] for state in BatchState)
        assert self.ledger.applied is self.applied

    @invariant()
    def a_batch_is_computed_twice_at_once_only_as_a_backup(self) -> None:
        count = Counter(ticket.position for ticket in self.under_way())
        for position in (n for n, times in count.items() if times > 1):
            twins = [t for t in self.tickets_out() if t.position == position]
            assert self.dial.group is not None
            assert len(twins) == len({t.worker for t in twins}) == count[position] == 2
        assert max(self.done_count.values(), default=0) <= 1

    @invariant()
    def gradients_on_their_way_fit_in_staging_memory(self) -> None:
        assert len(self.under_way()) <= self.slots
        assert self.admission.bases == sorted(t.base for t in self.under_way_but_applying())
        assert self.admission.applying_count == len(self.applying)
        assert self.admission.out_count == len(self.awaited)

    @invariant()
    def admission_knows_whose_tickets_are_out(self) -> None:
        for worker in range(1, self.joined_count + 1):
            assert self.admission.tickets_of(worker) == self.tickets_out(worker)
        for number in range(1, self.issued_count + 1):
            ticket = self.awaited[number].ticket if number in self.awaited else None
            assert self.admission.outstanding(number) == ticket

    @invariant()
    def workers_know_their_reserves_and_the_dead_have_none(self) -> None:
        for worker in range(1, self.joined_count + 1):
            assert self.ledger.leased_to(worker) == sorted(self.reserve.get(worker, ()))
            assert len(self.reserve.get(worker, ())) <= self.reserve_size

    @invariant()
    def at_most_two_epochs_are_open(self) -> None:
        begun = [n for n in range(self.total) if self.ledger.state(n) is not None]
        assert max(begun, default=-1) < self.end_of_open_epochs()

    @invariant()
    def nothing_is_applied_before_its_turn(self) -> None:
        if self.due() is None:
            assert self.admission.next_to_apply(self.version) is None

    @invariant()
    def nobody_waits_while_there_is_something_to_do(self) -> None:
        due = self.backup_time()
        assert self.admission.backup_time() == due
        assert due is None or due > self.now
        if self.may_begin():
            for worker in self.waiting:
                if self.tickets_out(worker) and not self.may_begin_second():
                    continue
                found = sorted(self.possible(worker))
                assert not found, f"worker {worker} waits, and {found} could be computed"


RUNS = settings(
    max_examples=60,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # a busy machine is no bug
)


def test_every_batch_is_applied_exactly_once_within_the_dial_whatever_happens() -> None:
    run_state_machine_as_test(Runs, settings=RUNS)
