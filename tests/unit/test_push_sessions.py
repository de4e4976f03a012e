"""Whatever is sent again, crashes or is forgotten: no push is in a history twice."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.server.push_sessions import NotNext, PushId, PushSessions, Verdict

LIMIT = 2
"""Sessions remembered in these tests, so that many are forgotten."""

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open")),
        st.tuples(st.just("push"), st.integers(0, 7), st.integers(1, 5)),
        st.tuples(st.just("next"), st.integers(0, 7)),
        st.tuples(st.just("update")),
        st.tuples(st.just("crash"), st.integers(0, 10)),
    ),
    max_size=60,
)
"""Sessions are opened, anything at all is sent, batches make updates, and the server goes back."""


class History:
    """Versions as they survive: of each its table, and the pushes in it."""

    def __init__(self) -> None:
        self.versions: list[tuple[PushSessions, tuple[PushId, ...]]] = [(PushSessions(), ())]
        self.opened: list[PushId] = []

    def do(self, step: tuple[Any, ...]) -> None:
        kind, *values = step
        table, pushes = self.versions[-1]
        version = len(self.versions)
        if kind == "open":
            self.opened.append(PushId(100 + len(self.opened), version - 1, 0))
        elif kind == "update":
            self.versions.append((table, pushes))
        elif kind == "crash":
            # To what was durable. Sessions were opened in what is lost, and go on.
            del self.versions[max(1, version - values[0]) :]
        elif self.opened:
            session = self.opened[values[0] % len(self.opened)]
            sequence = values[1] if kind == "push" else table.last_sequence(session.session) + 1
            push = PushId(session.session, session.opened, sequence)
            if table.judge(push) is Verdict.NEXT:
                self.versions.append((table.add(push, version, 0, LIMIT), (*pushes, push)))
            else:
                with pytest.raises(NotNext, match="push"):
                    table.add(push, version, 0, LIMIT)


@given(STEPS)
@settings(max_examples=1000, deadline=None)
def test_no_push_is_in_a_history_twice_and_none_is_left_out(steps: list[tuple[Any, ...]]) -> None:
    history = History()
    for step in steps:
        history.do(step)
        table, pushes = history.versions[-1]
        assert set(Counter(pushes).values()) <= {1}
        for session in {push.session for push in pushes}:
            done = [push.sequence for push in pushes if push.session == session]
            assert done == list(range(1, len(done) + 1))
            if session in table.known:
                assert table.known[session].sequence == len(done)
        assert len(table.known) <= LIMIT
        assert PushSessions.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_a_session_goes_on_from_its_last_push_and_no_other() -> None:
    table = PushSessions().add(PushId(7, 3, 1), 5, 1)

    verdicts = [table.judge(PushId(7, 3, sequence)) for sequence in (1, 2, 3)]

    assert verdicts == [Verdict.REPEATED, Verdict.NEXT, Verdict.MISSING]
    assert table.known[7].version == 5
    assert table.known[7].staleness == 1


def test_who_may_have_been_forgotten_is_refused_and_who_came_later_is_not() -> None:
    table = PushSessions()
    for session, opened in ((1, 4), (2, 5), (3, 6)):
        table = table.add(PushId(session, opened, 1), opened + 1, 0, LIMIT)

    assert table.forgotten == 4
    assert table.judge(PushId(1, 4, 1)) is Verdict.FORGOTTEN  # it would be its second time
    assert table.judge(PushId(1, 4, 2)) is Verdict.FORGOTTEN
    assert table.judge(PushId(9, 4, 1)) is Verdict.FORGOTTEN  # who knows?
    assert table.judge(PushId(9, 5, 1)) is Verdict.NEXT
    assert table.judge(PushId(2, 5, 1)) is Verdict.REPEATED


def test_the_one_that_pushed_longest_ago_is_forgotten() -> None:
    table = PushSessions()
    for number, (session, sequence) in enumerate([(1, 1), (2, 1), (1, 2), (3, 1)]):
        table = table.add(PushId(session, 0, sequence), number + 1, 0, LIMIT)

    assert list(table.known) == [1, 3]


def test_a_run_without_sessions_has_nothing_to_keep() -> None:
    assert PushSessions().to_json() is None
    assert PushSessions.from_json(None) == PushSessions()
