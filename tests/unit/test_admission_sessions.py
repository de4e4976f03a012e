"""Pushes without tickets among those with: the bound holds for all, and nobody is in the way."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.server.admission import Admission, Ticket
from headwater.server.dial import Dial
from headwater.server.ledger import Ledger

TOTAL, SLOTS = 30, 5

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 3)),
        st.tuples(st.just("announce"), st.integers(0, 6), st.integers(1, 2)),
        st.tuples(st.just("come"), st.integers(0, 9)),
        st.tuples(st.just("apply")),
        st.tuples(st.just("give up"), st.integers(0, 9)),
        st.tuples(st.just("lose"), st.integers(0, 3)),
        st.tuples(st.just("dial"), st.sampled_from(["async", "bounded:0", "bounded:2"])),
    ),
    max_size=80,
)


class Run:
    def __init__(self, dial: str) -> None:
        self.ledger = Ledger(TOTAL, TOTAL)
        self.admission = Admission(self.ledger, SLOTS, dial=Dial.parse(dial))
        self.version = 0
        self.sessions_applied = 0
        self.out: list[Ticket] = []

    def do(self, step: tuple[Any, ...]) -> None:
        kind, *values = step
        a = self.admission
        if kind == "ask":
            a.request(values[0], 60)
        elif kind == "announce":
            base, slots = max(0, self.version - values[0]), values[1]
            if a.has_room(slots):
                ticket = a.announce(base, self.version, 0, slots=slots, deadline_s=60)
                self.out += [ticket] if ticket else []
        elif kind == "come" and self.out:
            ticket = self.out.pop(values[0] % len(self.out))
            a.hold(ticket.number, 0)
        elif kind == "give up" and self.out:
            a.refuse(self.out.pop(values[0] % len(self.out)))
        elif kind == "apply":
            self.apply()
        elif kind == "lose":
            a.lost(values[0])
        elif kind == "dial":
            a.set_dial(Dial.parse(values[0]), self.version)
        self.out = [ticket for ticket in self.out if a.outstanding(ticket.number)]
        self.out += [grant.ticket for grant in a.grants(self.version, 0)]

    def apply(self) -> None:
        self.admission.too_stale(self.version)
        update = self.admission.next_to_apply(self.version)
        if update is None:
            return
        (ticket,) = update
        bound = self.admission.dial.bound
        assert bound is None or self.version - ticket.base <= bound
        applied = self.ledger.applied
        if ticket.has_batch:
            applied = applied.add(ticket.position)
        else:
            self.sessions_applied += 1
        self.version += 1
        self.admission.settle(update, applied)

    def check(self) -> None:
        bound, bases = self.admission.dial.bound, self.admission.bases
        assert bound is None or all(self.version + i <= b + bound for i, b in enumerate(bases))
        assert self.version == len(self.ledger.applied) + self.sessions_applied
        assert sum(ticket.slots for ticket in self.out) <= SLOTS


@given(st.sampled_from(["async", "bounded:0", "bounded:1", "bounded:3"]), STEPS)
@settings(max_examples=400, deadline=None)
def test_the_bound_holds_for_pushes_with_tickets_and_without(
    dial: str, steps: list[tuple[Any, ...]]
) -> None:
    run = Run(dial)
    for step in steps:
        run.do(step)
        run.check()
    while run.out:  # and nothing is stuck: what is under way can all be applied
        run.do(("come", 0))
        before = run.version
        run.apply()
        run.check()
        if run.version == before and not run.admission.bases:
            break
    while run.admission.bases:
        before = len(run.admission.bases)
        run.do(("come", 0))
        run.apply()
        if not run.out:
            assert len(run.admission.bases) < before


def test_sync_mode_has_no_place_for_them() -> None:
    run = Run("sync:2")
    assert run.admission.announce(0, 0, 0, slots=1, deadline_s=60) is None


def test_a_push_that_waits_for_memory_comes_before_the_next_ticket() -> None:
    run = Run("async")
    for _ in range(SLOTS):
        run.do(("announce", 0, 1))
    run.admission.awaited_slots = 1
    run.do(("come", 0))
    run.do(("ask", 1))
    run.apply()
    assert run.admission.has_room(1)
    assert not run.admission.grants(run.version, 0)
    run.admission.awaited_slots = 0
    assert run.admission.grants(run.version, 0)
