"""Who is connected: joining, fencing, names, silence."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused
from headwater.server.roster import MAX_TEXT, Member, Roster


def hello(instance: int = 1, attempt: int = 1, name: str = "") -> pb.Hello:
    return pb.Hello(instance=instance, attempt=attempt, name=name)


def join(roster: Roster, instance: int = 1, attempt: int = 1, name: str = "") -> Member:
    """A worker of the roster that has just joined, at time 0."""
    return roster.join(hello(instance, attempt, name), 0.0)[0]


def test_a_worker_that_joins_is_in_the_roster_under_an_id_of_its_own() -> None:
    roster = Roster()

    alice, bob = join(roster, 1), join(roster, 2)

    assert (alice.id, bob.id) == (1, 2)
    assert roster.members == {1: alice, 2: bob}


def test_an_id_is_never_given_twice() -> None:
    roster = Roster()
    roster.leave(join(roster, 1))

    assert join(roster, 2).id == 2


def test_a_worker_that_left_is_no_longer_in_the_roster() -> None:
    roster = Roster()
    alice = join(roster)

    assert roster.leave(alice) is True
    assert roster.leave(alice) is False
    assert roster.members == {}


def test_a_worker_that_lost_its_stream_joins_again_with_its_next_attempt() -> None:
    roster = Roster()
    roster.leave(join(roster, attempt=1, name="alice"))

    again, old = roster.join(hello(attempt=2, name="alice"), 1.0)

    assert (again.name, old) == ("alice", None)


def test_a_higher_attempt_takes_over_from_the_older_stream_at_once() -> None:
    roster = Roster()
    first = join(roster, attempt=1, name="alice")

    second, old = roster.join(hello(attempt=2, name="alice"), 1.0)

    assert old is first
    assert list(roster.members.values()) == [second]
    assert second.name == "alice"


def test_a_fenced_streams_end_does_not_take_the_newer_one_out() -> None:
    roster = Roster()
    first = join(roster, attempt=1)
    second = join(roster, attempt=2)

    assert roster.leave(first) is False

    assert list(roster.members.values()) == [second]


@pytest.mark.parametrize("attempt", [1, 2])
@pytest.mark.parametrize("still_here", [True, False])
def test_an_attempt_that_is_not_higher_is_refused(attempt: int, still_here: bool) -> None:
    roster = Roster()
    newest = join(roster, attempt=2)
    if not still_here:
        roster.leave(newest)

    with pytest.raises(Refused, match=f"^attempt {attempt} of this worker is not its newest$") as e:
        join(roster, attempt=attempt)

    assert e.value.reason is Reason.FENCED
    assert list(roster.members.values()) == [newest] * still_here


def test_attempts_of_different_instances_have_nothing_to_do_with_each_other() -> None:
    roster = Roster()
    join(roster, instance=1, attempt=9)

    join(roster, instance=2, attempt=1)

    assert len(roster.members) == 2


@pytest.mark.parametrize("who", ["alice", "1"], ids=["by name", "by id"])
def test_an_evicted_worker_is_refused_for_good(who: str) -> None:
    roster = Roster()
    alice = join(roster, name="alice")

    assert roster.evict(who) is alice

    roster.leave(alice)
    for attempt in (2, 3):
        with pytest.raises(Refused, match="was evicted; start a new one to take part again") as e:
            join(roster, attempt=attempt)
        assert e.value.reason is Reason.EVICTED


def test_a_new_process_may_join_under_an_evicted_workers_name() -> None:
    roster = Roster()
    roster.leave(roster.evict(join(roster, instance=1, name="alice").name))

    assert join(roster, instance=2, name="alice").name == "alice"


def test_evicting_a_stranger_is_refused_and_names_who_is_there() -> None:
    roster = Roster()
    join(roster, 1, name="alice")
    join(roster, 2, name="bob")

    with pytest.raises(Refused, match=r"^no worker is called 'eve'; connected: alice, bob$") as e:
        roster.evict("eve")

    assert e.value.reason is Reason.UNKNOWN_WORKER


def test_evicting_from_an_empty_roster_says_that_nobody_is_connected() -> None:
    with pytest.raises(Refused, match=r"connected: no one$"):
        Roster().evict("eve")


def test_a_worker_without_a_name_is_called_by_its_id() -> None:
    roster = Roster()
    join(roster, 1, name="alice")

    assert join(roster, 2).name == "worker-2"


def test_a_name_that_is_taken_gets_a_number() -> None:
    roster = Roster()

    assert [join(roster, i, name="gpu").name for i in (1, 2, 3)] == ["gpu", "gpu-2", "gpu-3"]


@given(st.lists(st.sampled_from(["", "a", "a-2", "worker-1", "worker-2", "\n"]) | st.text()))
@settings(deadline=None)
def test_names_are_unique_and_can_be_printed_whatever_the_workers_say(names: list[str]) -> None:
    roster = Roster()
    for instance, name in enumerate(names, start=1):
        join(roster, instance, name=name)

    found = [member.name for member in roster.members.values()]

    assert len(set(found)) == len(names)
    assert all(name and name.isprintable() for name in found)


def test_a_name_cannot_write_to_the_readers_terminal_or_fill_it() -> None:
    roster = Roster()

    assert join(roster, 1, name="\x1b[31mred\r\n").name == "[31mred"
    assert join(roster, 2, name="x" * 1000).name == "x" * MAX_TEXT


def test_a_worker_is_silent_when_nothing_was_heard_of_it_for_too_long() -> None:
    roster = Roster()
    alice, bob = join(roster, 1), join(roster, 2)
    bob.heard_time = 1.0

    assert roster.silent(15.0, timeout_s=15.0) == []
    assert roster.silent(15.5, timeout_s=15.0) == [alice]
    assert roster.silent(17.0, timeout_s=15.0) == [alice, bob]


def test_silence_while_the_server_was_stopped_counts_for_nothing() -> None:
    roster = Roster()
    alice = join(roster)

    roster.shift(100.0)

    assert roster.silent(115.0, timeout_s=15.0) == []
    assert roster.silent(115.5, timeout_s=15.0) == [alice]
    assert alice.joined_time == 100.0  # nor is it charged to its compiling


def test_a_worker_that_has_done_nothing_yet_gets_the_least_deadline() -> None:
    assert join(Roster()).deadline_s(60.0) == 60.0


def test_a_slow_worker_gets_ten_times_its_own_step() -> None:
    alice = join(Roster())
    alice.steps_s.add(20.0)

    assert alice.deadline_s(60.0) == 200.0


def test_a_fast_worker_gets_the_least_deadline() -> None:
    alice = join(Roster())
    alice.steps_s.add(0.1)

    assert alice.deadline_s(60.0) == 60.0


def test_one_slow_step_in_200_is_no_reason_to_wait_longer() -> None:
    alice = join(Roster())
    alice.steps_s.add(*([10.0] * 199 + [1000.0]))

    assert alice.deadline_s(60.0) == 100.0


def test_three_slow_steps_in_200_are() -> None:
    alice = join(Roster())
    alice.steps_s.add(*([10.0] * 197 + [1000.0] * 3))

    assert alice.deadline_s(60.0) == 10_000.0


def test_only_the_last_200_steps_count() -> None:
    alice = join(Roster())
    alice.steps_s.add(*([1000.0] * 10 + [10.0] * 200))

    assert alice.deadline_s(60.0) == 100.0


@pytest.mark.parametrize("before", [0, 1, 50, 100, 101, 200])
def test_a_gradient_that_came_too_late_would_not_a_second_time(before: int) -> None:
    alice = join(Roster())
    alice.steps_s.add(*[1.0] * before)

    alice.came_late(pb.Push(load_s=10.0, compute_s=90.0))

    assert alice.deadline_s(60.0) == 1000.0
    alice.steps_s.add(*[1.0] * 200)
    assert alice.deadline_s(60.0) == 60.0


@pytest.mark.parametrize("seconds", [math.inf, -math.inf, math.nan, -1.0, 0.0, 20.0])
def test_a_late_gradient_with_times_that_ask_for_nothing_changes_no_deadline(
    seconds: float,
) -> None:
    alice = join(Roster())
    alice.steps_s.add(20.0)

    alice.came_late(pb.Push(compute_s=seconds))

    assert alice.deadline_s(60.0) == 200.0


@pytest.mark.parametrize(
    ("quarantined", "hung", "state"),
    [(False, False, "computing"), (False, True, "hung"), (True, True, "quarantined")],
)
def test_status_shows_the_worst_that_is_known_of_a_worker(
    quarantined: bool, hung: bool, state: str
) -> None:
    alice = join(Roster(), name="alice")
    alice.set_phase(pb.PHASE_COMPUTING)
    alice.hung = hung

    status = alice.status(now=3.0, quarantined=quarantined, leased=0)

    assert (status.id, status.name, status.state, status.connected_s) == (1, "alice", state, 3.0)


def test_a_phase_from_a_later_protocol_changes_nothing() -> None:
    alice = join(Roster())
    alice.set_phase(pb.PHASE_SENDING)

    alice.set_phase(99)  # type: ignore[arg-type]

    assert alice.phase == "sending"


def test_a_workers_host_and_platform_are_printable_too() -> None:
    roster = Roster()
    alice, _ = roster.join(
        pb.Hello(instance=1, attempt=1, host="h\x1bost\n", platform="c\tpu"), 0.0
    )

    status = alice.status(now=0.0, quarantined=False, leased=0)

    assert (status.host, status.platform) == ("host", "cpu")
