"""Exactly once, whoever comes, dies or stalls: admission over its ledger, whatever the dial.

Histories that anyone can review. Those of single dials are in test_admission_dial.py;
test_admission_runs.py makes up its own.
"""

from __future__ import annotations

import pytest

from headwater.server.admission import LEASE_SIZE, Admission, Grant, Ticket
from headwater.server.ledger import Ledger
from kit.admission_history import DEADLINE_S, History, worker_id


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


@pytest.mark.parametrize(("reserve", "leased"), [(0, (0,)), (1, (0,)), (3, (0, 1, 2))])
def test_a_worker_gets_as_large_a_reserve_as_it_asks_for(
    reserve: int, leased: tuple[int, ...]
) -> None:
    admission = Admission(Ledger(100, 100), slots=2)
    admission.request(7, DEADLINE_S, reserve)

    (grant,) = admission.grants(version=0, now=0.0)

    assert grant.leased == leased


def test_a_reserve_is_no_larger_than_the_workers_share_of_what_is_open() -> None:
    """Or those who come last would have to be given what the first have in reserve."""
    workers = range(10)
    admission = Admission(Ledger(100, 10), slots=10, workers=lambda: len(workers))
    for worker in workers:
        admission.request(worker, DEADLINE_S)

    grants = admission.grants(version=0, now=0.0)

    assert [len(grant.leased) for grant in grants] == [2] * 10  # two epochs are open
    assert [grant.withdrawn_from for grant in grants] == [None] * 10


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


def test_a_second_ticket_leaves_the_bounds_room_to_who_has_none() -> None:
    History(total=100, dial="bounded:1", workers=2).play("""
        ask a b  -> a gets 0, b gets 8
        ask a    -> nothing
        hold b   -> 8 held
        begin    -> 8 begun
        end      -> 8 applied
        ask b    -> b gets 9
    """)


def test_a_second_ticket_leaves_a_staging_slot_to_who_has_none() -> None:
    History(total=100, slots=3, workers=2).play("""
        ask a b  -> a gets 0, b gets 8
        ask a    -> a gets 1
        hold b   -> 8 held
        begin    -> 8 begun
        end      -> 8 applied
        ask a    -> nothing
        ask b    -> b gets 9
    """)


def test_nobody_gets_a_second_ticket_before_all_have_a_first() -> None:
    History(total=100).play("""
        ask a      -> a gets 0
        pause      -> nothing
        ask a b    -> nothing
        resume     -> b gets 8, a gets 1
    """)


def test_a_second_ticket_does_not_take_what_another_has_in_reserve() -> None:
    History(total=10).play("""
        ask a      -> a gets 0
        ask b      -> b gets 8
        ask b      -> b gets 9
        ask b      -> nothing
        push b     -> 8 applied
        push b     -> 9 applied, b gets 7 from a
    """)


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
    history.avoided[worker_id("a")] = {0}
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
        history.admission.hold(1, now=0.0)

    assert history.admission.bases == [0]
