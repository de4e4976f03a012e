"""Exactly once, whoever comes, dies or stalls: admission over its ledger, through many histories.

First histories that anyone can review, then a state machine that makes up its
own: it keeps its own simple record of every batch and compares after each step.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Callable

import pytest
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

from headwater.server.admission import LEASE_SIZE, Admission, Grant, Ticket
from headwater.server.ledger import BatchState, Ledger
from headwater.server.ranges import Ranges

DEADLINE_S = 60


# ---------------------------------------------------------------- histories


class History:
    """A run driven by lines such as `push a -> 0 applied, a gets 1`.

    What is left of the arrow is done, and tickets are granted where they can
    be; right of it stands what came of that. Workers are letters.
    """

    def __init__(self, total: int, *, per_epoch: int | None = None, slots: int = 100) -> None:
        self.ledger = Ledger(total, per_epoch or total)
        self.admission = Admission(self.ledger, slots, lambda worker: self.avoided.get(worker, ()))
        self.avoided: dict[int, set[int]] = {}
        self._applying: deque[Ticket] = deque()
        self._now = 0.0
        self._paused_time = 0.0

    def play(self, text: str) -> None:
        for line in filter(None, map(str.strip, text.splitlines())):
            action, _, expected = (part.strip() for part in line.partition("->"))
            assert (action, self.do(action)) == (action, expected)

    def do(self, action: str) -> str:
        verb, *words = action.split()
        verbs: dict[str, Callable[..., list[str]]] = {
            "ask": self._ask,
            "hold": self._hold,
            "begin": self._begin,
            "end": self._end,
            "push": self._push,
            "refuse": self._refuse,
            "lose": self._lose,
            "wait": self._wait,
            "progress": self._progress,
            "stand_still": self._stand_still,
            "pause": self._pause,
            "resume": self._resume,
        }
        found = verbs[verb](*words)
        grants = self.admission.grants(version=len(self.ledger.applied), now=self._now)
        return ", ".join([*found, *map(_shown, grants)]) or "nothing"

    def reserve(self, who: str) -> list[int]:
        return self.ledger.leased_to(_id(who))

    def _ask(self, *who: str) -> list[str]:
        for letter in who:
            self.admission.request(_id(letter), DEADLINE_S)
        return []

    def _hold(self, who: str) -> list[str]:
        ticket = self.admission.hold(self.admission.tickets_of(_id(who))[0].number)
        return [f"{ticket.position} held"]

    def _begin(self) -> list[str]:
        ticket = self.admission.next_to_apply()
        self._applying.extend([ticket] if ticket else [])
        return [f"{ticket.position} begun"] if ticket else []

    def _end(self) -> list[str]:
        ticket = self._applying.popleft()
        self.admission.settle(ticket, self.ledger.applied.add(ticket.position))
        return [f"{ticket.position} applied"]

    def _push(self, who: str) -> list[str]:
        """A whole round: hold, begin, end, ask."""
        self._hold(who)
        self._begin()
        return [*self._end(), *self._ask(who)]

    def _refuse(self, who: str) -> list[str]:
        ticket = self.admission.tickets_of(_id(who))[0]
        self.admission.refuse(ticket)
        return [f"{ticket.position} back"]

    def _lose(self, who: str) -> list[str]:
        return [f"{ticket.position} back" for ticket in self.admission.lost(_id(who))]

    def _wait(self, seconds: str) -> list[str]:
        self._now += float(seconds)
        return [f"{ticket.position} back" for ticket, _ in self.admission.expire(self._now)]

    def _progress(self, who: str) -> list[str]:
        self.admission.progress(_id(who), self._now)
        return []

    def _stand_still(self, seconds: str) -> list[str]:
        self._now += float(seconds)
        self.admission.shift(float(seconds), self._now)
        return []

    def _pause(self) -> list[str]:
        self.admission.paused, self._paused_time = True, self._now
        return []

    def _resume(self) -> list[str]:
        self.admission.paused = False
        self.admission.shift(self._now - self._paused_time, self._now)
        return []


def _id(letter: str) -> int:
    return ord(letter) - ord("a")


def _shown(grant: Grant) -> str:
    letter = chr(ord("a") + grant.ticket.worker)
    source = "" if grant.withdrawn_from is None else f" from {chr(ord('a') + grant.withdrawn_from)}"
    return f"{letter} gets {grant.ticket.position}{source}"


def test_the_lowest_batches_go_first() -> None:
    History(total=100).play("""
        ask a    -> a gets 0
        push a   -> 0 applied, a gets 1
        push a   -> 1 applied, a gets 2
    """)


def test_who_asks_first_is_served_first() -> None:
    History(total=100, slots=2).play("""
        ask a b c  -> a gets 0, b gets 8
        ask d      -> nothing
        push a     -> 0 applied, c gets 16
        push b     -> 8 applied, d gets 24
        push c     -> 16 applied, a gets 1
    """)


def test_a_worker_gets_a_reserve_to_load_ahead_and_a_new_one_when_half_is_used() -> None:
    history = History(total=100)

    history.do("ask a")
    assert history.reserve("a") == [1, 2, 3, 4, 5, 6, 7]
    history.do("ask b")
    assert history.reserve("b") == [9, 10, 11, 12, 13, 14, 15]

    for _ in range(3):
        history.do("push a")
    assert history.reserve("a") == [4, 5, 6, 7]
    history.do("push a")
    assert history.reserve("a") == [5, 6, 7, 16, 17, 18, 19]


def test_a_grant_says_what_is_newly_reserved_with_its_ticket() -> None:
    admission = Admission(Ledger(100, 100), slots=2)
    admission.request(7, DEADLINE_S)

    assert admission.grants(version=41, now=0.0) == [
        Grant(Ticket(number=1, worker=7, position=0, base=41), leased=tuple(range(LEASE_SIZE)))
    ]
    assert admission.bases == [41]


def test_what_a_lost_worker_had_goes_first() -> None:
    History(total=100).play("""
        ask a    -> a gets 0
        ask b    -> b gets 8
        lose a   -> 0 back
        ask c    -> c gets 0
        push c   -> 0 applied, c gets 1
    """)


def test_a_batch_that_was_given_back_goes_before_fresh_ones() -> None:
    history = History(total=100)
    history.play("""
        ask a      -> a gets 0
        refuse a   -> 0 back
        ask b      -> b gets 0
    """)

    assert history.reserve("b") == [8, 9, 10, 11, 12, 13, 14]


def test_at_the_end_of_a_run_an_idle_worker_takes_from_the_one_who_has_most() -> None:
    history = History(total=13)
    history.play("""
        ask a    -> a gets 0
        ask b    -> b gets 8
        ask c    -> c gets 7 from a
        ask d    -> d gets 6 from a
        ask e    -> e gets 5 from a
    """)

    assert (history.reserve("a"), history.reserve("b")) == ([1, 2, 3, 4], [9, 10, 11, 12])


def test_a_stalled_workers_reserve_is_finished_by_the_others() -> None:
    History(total=4).play("""
        ask a    -> a gets 0
        ask b    -> b gets 3 from a
        push b   -> 3 applied, b gets 2 from a
        push b   -> 2 applied, b gets 1 from a
        push b   -> 1 applied
        lose a   -> 0 back, b gets 0
        push b   -> 0 applied
    """)


def test_a_reserve_is_touched_only_when_nothing_is_pending() -> None:
    History(total=9).play("""
        ask a    -> a gets 0
        ask b    -> b gets 8
        ask c    -> c gets 7 from a
    """)


def test_a_gradient_received_whole_outlives_its_worker() -> None:
    History(total=100).play("""
        ask a    -> a gets 0
        hold a   -> 0 held
        lose a   -> nothing
        ask b    -> b gets 1
        begin    -> 0 begun
        lose a   -> nothing
        end      -> 0 applied
    """)


def test_gradients_are_applied_in_the_order_they_came() -> None:
    History(total=100).play("""
        ask a b  -> a gets 0, b gets 8
        hold b   -> 8 held
        hold a   -> 0 held
        begin    -> 8 begun
        begin    -> 0 begun
        begin    -> nothing
        end      -> 8 applied
        end      -> 0 applied
    """)


def test_a_gradient_takes_its_staging_slot_until_it_is_applied() -> None:
    History(total=100, slots=1).play("""
        ask a    -> a gets 0
        ask b    -> nothing
        hold a   -> 0 held
        begin    -> 0 begun
        end      -> 0 applied, b gets 8
    """)


def test_a_ticket_without_progress_is_taken_back_with_its_holders_reserve() -> None:
    history = History(total=100)
    history.play("""
        ask a    -> a gets 0
        wait 60  -> nothing
        wait 1   -> 0 back
        ask b    -> b gets 0
    """)

    assert history.reserve("a") == []
    assert history.reserve("b") == [1, 2, 3, 4, 5, 6, 7]


def test_a_worker_that_is_slow_but_moving_keeps_its_ticket() -> None:
    History(total=100).play("""
        ask a       -> a gets 0
        ask b       -> b gets 8
        wait 50     -> nothing
        progress a  -> nothing
        wait 50     -> 8 back
        wait 11     -> 0 back
    """)


def test_an_expired_ticket_says_which_batches_are_no_longer_reserved() -> None:
    history = History(total=5)
    history.play("ask a -> a gets 0")

    ((ticket, released),) = history.admission.expire(now=DEADLINE_S + 1)

    assert (ticket.position, released) == (0, [1, 2, 3, 4])
    assert history.admission.outstanding(ticket.number) is None


def test_a_gradient_that_has_come_has_no_deadline() -> None:
    History(total=100).play("""
        ask a      -> a gets 0
        hold a     -> 0 held
        wait 1000  -> nothing
        begin      -> 0 begun
        wait 1000  -> nothing
        end        -> 0 applied
    """)


def test_a_pause_stops_tickets_and_updates_and_freezes_deadlines() -> None:
    History(total=100).play("""
        ask a b    -> a gets 0, b gets 8
        wait 50    -> nothing
        pause      -> nothing
        wait 1000  -> nothing
        hold b     -> 8 held
        begin      -> nothing
        ask c      -> nothing
        resume     -> c gets 16
        begin      -> 8 begun
        wait 10    -> nothing
        wait 1     -> 0 back
    """)


def test_time_that_was_nobodys_fault_does_not_count() -> None:
    History(total=100).play("""
        ask a      -> a gets 0
        stand_still 100 -> nothing
        wait 60    -> nothing
        wait 1     -> 0 back
    """)


def test_progress_during_a_pause_is_not_counted_twice() -> None:
    History(total=100).play("""
        ask a      -> a gets 0
        pause      -> nothing
        wait 3600  -> nothing
        progress a -> nothing
        resume     -> nothing
        wait 60    -> nothing
        wait 1     -> 0 back
    """)


def test_a_worker_that_left_before_it_was_served_is_not_served() -> None:
    History(total=100, slots=1).play("""
        ask a b c  -> a gets 0
        lose b     -> nothing
        push a     -> 0 applied, c gets 8
    """)


def test_a_pipelined_worker_has_as_many_tickets_as_it_asked_for() -> None:
    history = History(total=100)
    history.play("""
        ask a    -> a gets 0
        ask a    -> a gets 1
        lose a   -> 0 back, 1 back
    """)

    assert history.admission.bases == []


def test_asking_again_while_waiting_makes_no_second_ticket() -> None:
    History(total=100, slots=1).play("""
        ask a    -> a gets 0
        ask b    -> nothing
        ask b    -> nothing
        push a   -> 0 applied, b gets 8
        push b   -> 8 applied, a gets 1
    """)


def test_no_batch_of_a_third_epoch_is_out_while_the_first_is_incomplete() -> None:
    History(total=6, per_epoch=2).play("""
        ask a    -> a gets 0
        ask b    -> b gets 3 from a
        ask c    -> c gets 2 from a
        ask d    -> d gets 1 from a
        ask e    -> nothing
        push b   -> 3 applied
        push a   -> 0 applied
        push d   -> 1 applied, e gets 4, b gets 5 from e
    """)


def test_a_batch_to_avoid_goes_to_somebody_else() -> None:
    history = History(total=2)
    history.avoided[_id("a")] = {0}
    history.play("""
        ask a    -> a gets 1
        ask a    -> nothing
        ask b    -> b gets 0
    """)


def test_only_an_awaited_gradient_can_be_held() -> None:
    history = History(total=2)
    history.play("""
        ask a    -> a gets 0
        hold a   -> 0 held
    """)

    with pytest.raises(KeyError):
        history.admission.hold(1)

    assert history.admission.bases == [0]


# ------------------------------------------------------------ the state machine


@dataclasses.dataclass
class Awaited:
    """What the machine knows of a ticket that is out."""

    ticket: Ticket
    last_progress: int
    deadline_s: int


class Runs(RuleBasedStateMachine):
    """Any history of workers, gradients, failures, pauses and time.

    `applied_count` is the record that promise 1 is about: how often each batch
    moved the weights.
    """

    # What a rule acts on, drawn from what the machine has at that moment.
    a_worker = st.runner().flatmap(lambda run: st.sampled_from(sorted(run.workers)))
    a_ticket = st.runner().flatmap(lambda run: st.sampled_from(sorted(run.awaited)))

    @initialize(
        per_epoch=st.sampled_from([12, 1, 2, 3, 7, 20]),
        epochs=st.integers(1, 4),
        slots=st.integers(1, 6),
        applied=st.sets(st.integers(0, 23), max_size=10),
    )
    def begin_run(self, per_epoch: int, epochs: int, slots: int, applied: set[int]) -> None:
        """A new run, or one resumed with holes in what was applied."""
        self.total, self.per_epoch, self.slots = per_epoch * epochs, per_epoch, slots
        self.before = Ranges.of(n for n in applied if n < self.total)
        self.applied = self.before  # published with the newest version
        self.applied_count: Counter[int] = Counter()
        self.version = 0
        self.now = 0
        self.paused_time = 0
        self.workers: set[int] = set()
        self.joined_count = 0
        self.waiting: dict[int, int] = {}  # to its deadline, in the order of asking
        self.awaited: dict[int, Awaited] = {}
        self.held: list[Ticket] = []
        self.applying: deque[Ticket] = deque()
        self.reserve: dict[int, set[int]] = {}  # as the worker itself was told
        self.refusers: dict[int, set[int]] = {}
        self.issued_count = 0
        self.ledger = Ledger(self.total, per_epoch, self.before)
        self.admission = Admission(self.ledger, slots, self.avoided_by)

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
        self.admission.request(worker, deadline_s)
        self.waiting[worker] = deadline_s
        self.serve()

    @precondition(lambda self: self.awaited)
    @rule(number=a_ticket)
    def receive(self, number: int) -> None:
        """A whole gradient comes."""
        ticket = self.awaited.pop(number).ticket
        assert self.admission.hold(number) == ticket
        self.held.append(ticket)
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

    @precondition(lambda self: self.awaited)
    @rule(number=a_ticket)
    def refuse_push(self, number: int) -> None:
        """A gradient is malformed."""
        ticket = self.awaited.pop(number).ticket
        self.admission.refuse(ticket)
        self.refusers.setdefault(ticket.position, set()).add(ticket.worker)
        self.serve()

    @precondition(lambda self: self.held and not self.admission.paused)
    @rule()
    def begin_apply(self) -> None:
        ticket = self.admission.next_to_apply()
        assert ticket == self.held.pop(0)
        self.applying.append(ticket)
        self.serve()

    @precondition(lambda self: self.applying)
    @rule()
    def end_apply(self) -> None:
        """The oldest update that was begun is published."""
        ticket = self.applying.popleft()
        self.applied = self.applied.add(ticket.position)
        self.applied_count[ticket.position] += 1
        self.version += 1
        self.admission.settle(ticket, self.applied)
        self.serve()

    @precondition(lambda self: self.applying)
    @rule()
    def refuse_apply(self) -> None:
        """The oldest gradient that was begun is not finite."""
        ticket = self.applying.popleft()
        self.admission.refuse(ticket)
        self.refusers.setdefault(ticket.position, set()).add(ticket.worker)
        self.serve()

    @precondition(lambda self: self.workers)
    @rule(worker=a_worker)
    def die(self, worker: int) -> None:
        tickets = [a.ticket for a in self.awaited.values() if a.ticket.worker == worker]
        assert self.admission.lost(worker) == tickets
        for ticket in tickets:
            del self.awaited[ticket.number]
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

    @precondition(lambda self: not self.admission.paused)
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

    def teardown(self) -> None:
        """Whatever has happened, the run ends while workers keep coming."""
        if self.admission.paused:
            self.resume()
        for worker in [w for w in self.workers if w % 2]:
            self.die(worker)
        self.join(DEADLINE_S)
        for _ in range(self.total + 1):
            for worker in sorted(self.workers):
                self.ask(worker, DEADLINE_S)
            for number in sorted(self.awaited):
                self.receive(number)
            self.apply_all()
        assert self.ledger.done, f"stuck with {sorted(self.pending())} pending"
        assert self.admission.bases == []
        assert self.applied_count == Counter(set(range(self.total)) - set(self.before))

    # ------------------------------------------------------ the machine's own

    def serve(self) -> None:
        """Issue tickets until there is nothing to issue, as every event of a server does."""
        while grants := self.admission.grants(self.version, self.now):
            asked = list(self.waiting)
            if not any(map(self.avoided_by, asked)):
                assert [g.ticket.worker for g in grants] == asked[: len(grants)]
            for grant in grants:
                self.granted(grant)

    def apply_all(self) -> None:
        while self.held:
            self.begin_apply()
        while self.applying:
            self.end_apply()

    def granted(self, grant: Grant) -> None:
        ticket = grant.ticket
        assert not self.admission.paused
        self.issued_count += 1
        assert (ticket.number, ticket.base) == (self.issued_count, self.version)
        deadline_s = self.waiting.pop(ticket.worker)  # one ticket for each time it asked
        mine = self.reserve[ticket.worker]
        assert mine.isdisjoint(grant.leased)
        if grant.withdrawn_from is None:
            possible = sorted(self.pending() - self.avoided_by(ticket.worker))
            assert list(grant.leased) == possible[: len(grant.leased)]
            assert ticket.position == min(mine.union(grant.leased))
        else:
            assert ticket.position not in self.avoided_by(ticket.worker)
            self.reserve[grant.withdrawn_from].remove(ticket.position)
        mine.update(grant.leased)
        mine.remove(ticket.position)
        self.awaited[ticket.number] = Awaited(ticket, self.now, deadline_s)

    def shift(self, seconds: int) -> None:
        self.admission.shift(seconds, self.now)
        for awaited in self.awaited.values():
            awaited.last_progress = min(awaited.last_progress + seconds, self.now)

    def avoided_by(self, worker: int) -> set[int]:
        """What the worker had refused and somebody else here has yet to try."""
        return {n for n, who in self.refusers.items() if worker in who and self.workers - who}

    def under_way(self) -> list[Ticket]:
        return [*(a.ticket for a in self.awaited.values()), *self.held, *self.applying]

    def pending(self) -> set[int]:
        reserved = set().union(*self.reserve.values())
        out = {ticket.position for ticket in self.under_way()}
        return set(range(self.total)) - set(self.applied) - reserved - out

    def end_of_open_epochs(self) -> int:
        missing = set(range(self.total)) - set(self.applied)
        return (min(missing, default=self.total) // self.per_epoch + 2) * self.per_epoch

    # ------------------------------------------------------- what always holds

    @invariant()
    def every_batch_is_in_exactly_one_state(self) -> None:
        expected = {
            **dict.fromkeys(
                (a.ticket.position for a in self.awaited.values()), BatchState.TICKETED
            ),
            **dict.fromkeys(
                (t.position for t in (*self.held, *self.applying)), BatchState.ADMITTED
            ),
            **{n: BatchState.LEASED for mine in self.reserve.values() for n in mine},
        }
        assert {n: self.ledger.state(n) for n in range(self.total)} == {
            n: expected.get(n) for n in range(self.total)
        }
        assert expected.keys().isdisjoint(self.applied)
        assert len(expected) == len(self.under_way()) + sum(map(len, self.reserve.values()))
        assert self.ledger.pending_count == len(self.pending())
        assert {state: self.ledger.count(state) for state in BatchState} == {
            BatchState.LEASED: sum(map(len, self.reserve.values())),
            BatchState.TICKETED: len(self.awaited),
            BatchState.ADMITTED: len(self.held) + len(self.applying),
        }
        assert self.ledger.applied is self.applied

    @invariant()
    def no_batch_is_computed_twice_at_once_or_again(self) -> None:
        positions = [ticket.position for ticket in self.under_way()]
        assert len(set(positions)) == len(positions)
        assert not any(position in self.applied for position in positions)
        assert max(self.applied_count.values(), default=0) <= 1

    @invariant()
    def gradients_on_their_way_fit_in_staging_memory(self) -> None:
        assert len(self.under_way()) <= self.slots
        assert self.admission.bases == sorted(ticket.base for ticket in self.under_way())
        assert self.admission.applying_count == len(self.applying)

    @invariant()
    def admission_knows_whose_tickets_are_out(self) -> None:
        for worker in range(1, self.joined_count + 1):
            mine = [a.ticket for a in self.awaited.values() if a.ticket.worker == worker]
            assert self.admission.tickets_of(worker) == mine
        for number in range(1, self.issued_count + 1):
            ticket = self.awaited[number].ticket if number in self.awaited else None
            assert self.admission.outstanding(number) == ticket

    @invariant()
    def workers_know_their_reserves_and_the_dead_have_none(self) -> None:
        for worker in range(1, self.joined_count + 1):
            assert self.ledger.leased_to(worker) == sorted(self.reserve.get(worker, ()))
            assert len(self.reserve.get(worker, ())) <= LEASE_SIZE

    @invariant()
    def at_most_two_epochs_are_open(self) -> None:
        begun = [n for n in range(self.total) if self.ledger.state(n) is not None]
        assert max(begun, default=-1) < self.end_of_open_epochs()

    @invariant()
    def nothing_is_applied_in_a_pause_or_out_of_nothing(self) -> None:
        if self.admission.paused or not self.held:
            assert self.admission.next_to_apply() is None

    @invariant()
    def nobody_waits_while_there_is_something_to_do(self) -> None:
        if self.admission.paused or len(self.under_way()) >= self.slots:
            return
        free = {n for n in self.pending() if n < self.end_of_open_epochs()}
        for worker in self.waiting:
            reserved = (mine for who, mine in self.reserve.items() if who != worker)
            possible = free.union(*reserved) - self.avoided_by(worker)
            assert not possible, f"worker {worker} waits, and {sorted(possible)} could be computed"


RUNS = settings(
    max_examples=200,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # a busy machine is no bug
)


def test_every_batch_is_applied_exactly_once_whatever_happens() -> None:
    run_state_machine_as_test(Runs, settings=RUNS)
