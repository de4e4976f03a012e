"""No staler than the dial allows: histories of each dial, and of its being turned."""

from __future__ import annotations

import pytest

from kit.admission_history import History, worker_id

# ---------------------------------------------------------------------- bounded


def test_with_a_bound_of_zero_training_is_serial() -> None:
    history = History(total=100, dial="bounded:0")
    history.play("""
        ask a b c  -> a gets 0
        push a     -> 0 applied, b gets 8
        hold b     -> 8 held
        begin      -> 8 begun
        end        -> 8 applied, c gets 16
        push c     -> 16 applied, a gets 1
    """)

    assert history.staleness == [0, 0, 0]


def test_a_bound_holds_the_fast_one_back_and_never_refuses_the_slow_one() -> None:
    history = History(total=100, dial="bounded:2")
    history.play("""
        ask a b  -> a gets 0, b gets 8
        push b   -> 8 applied, b gets 9
        push b   -> 9 applied, b gets 10
        push b   -> 10 held, b gets 11
        push b   -> 11 held
        push a   -> 0 applied, 10 applied, 11 applied, b gets 12, a gets 1
    """)

    assert history.staleness == [0, 0, 2, 1, 2]


@pytest.mark.parametrize("end_of_a", ["lose a", "wait 61", "refuse a"])
def test_a_worker_that_is_gone_holds_nobody_back(end_of_a: str) -> None:
    history = History(total=100, dial="bounded:0")
    history.play(f"""
        ask a b     -> a gets 0
        {end_of_a}  -> 0 back, b gets 0
        hold b      -> 0 held
        begin       -> 0 begun
    """)


def test_when_the_slow_one_is_gone_what_waited_for_it_is_applied() -> None:
    history = History(total=100, dial="bounded:1")
    history.play("""
        ask a b  -> a gets 0, b gets 8
        push b   -> 8 applied, b gets 9
        push b   -> 9 held
        lose a   -> 0 back, b gets 10
        begin    -> 9 begun
        end      -> 9 applied
    """)


def test_a_finished_gradient_waits_for_the_older_one_that_it_would_make_too_old() -> None:
    history = History(total=100, dial="bounded:1")
    history.play("""
        ask a b  -> a gets 0, b gets 8
        push b   -> 8 applied, b gets 9
        hold b   -> 9 held
        begin    -> nothing
        hold a   -> 0 held
        begin    -> 0 begun
        begin    -> 9 begun
        end      -> 0 applied
        end      -> 9 applied
    """)

    assert history.staleness == [0, 1, 1]


def test_what_is_being_applied_counts_before_a_gradient_is_begun() -> None:
    History(total=100, dial="bounded:1").play("""
        ask a b  -> a gets 0, b gets 8
        hold a   -> 0 held
        hold b   -> 8 held
        begin    -> 0 begun
        ask c    -> nothing
        begin    -> 8 begun
        end      -> 0 applied, c gets 16
    """)


def test_a_refused_gradient_makes_room_for_another() -> None:
    History(total=100, dial="bounded:0").play("""
        ask a b   -> a gets 0
        hold a    -> 0 held
        begin     -> 0 begun
        refuse a  -> 0 back, b gets 0
    """)


# ------------------------------------------------------------------ staleness


def test_a_gradient_staler_than_the_policy_allows_is_computed_anew() -> None:
    history = History(total=100)
    history.play("""
        drop 1   -> nothing
        ask a b  -> a gets 0, b gets 8
        push b   -> 8 applied, b gets 9
        push b   -> 9 applied, b gets 10
        push a   -> 0 held, 0 too stale, a gets 1
        push b   -> 10 applied, b gets 11
        push a   -> 1 applied, a gets 2
        lose a   -> 2 back
        ask c    -> c gets 0
    """)

    assert history.staleness == [0, 0, 0, 1]


def test_nothing_is_found_too_stale_in_a_pause() -> None:
    History(total=100).play("""
        drop 0   -> nothing
        ask a b  -> a gets 0, b gets 8
        push b   -> 8 applied, b gets 9
        pause    -> nothing
        hold a   -> 0 held
        begin    -> nothing
        resume   -> nothing
        begin    -> 0 too stale
    """)


# ----------------------------------------------------------------------- sync


def test_one_worker_computes_a_whole_group_at_one_version() -> None:
    history = History(total=100, dial="sync:3")
    history.play("""
        ask a   -> a gets 0
        push a  -> 0 held, a gets 1
        push a  -> 1 held, a gets 2
        push a  -> 2 held, 0+1+2 applied, a gets 3
    """)

    assert history.staleness == [0, 0, 0]


def test_workers_share_a_group_and_the_others_wait_for_the_next() -> None:
    History(total=100, dial="sync:3").play("""
        ask a b c d e  -> a gets 0, b gets 1, c gets 2
        wait 1         -> nothing
        push c         -> 2 held
        push a         -> 0 held
        hold b         -> 1 held
        check b        -> nothing
        begin          -> 0+1+2 begun
        ask f          -> nothing
        end            -> 0+1+2 applied, d gets 3, e gets 4, c gets 5
    """)


@pytest.mark.parametrize("workers", ["a", "ba", "cabed"])
def test_groups_are_the_same_however_many_workers_there_are(workers: str) -> None:
    history = History(total=16, dial="sync:3", per_epoch=8)
    updates = []

    history.do(f"ask {' '.join(workers)}")
    while not history.ledger.done:
        for who in workers:
            if history.admission.tickets_of(worker_id(who)):
                done = history.do(f"push {who}").split(", ")
                updates += [what for what in done if what.endswith("applied")]

    assert updates == [
        *("0+1+2 applied", "3+4+5 applied", "6+7 applied"),
        *("8+9+10 applied", "11+12+13 applied", "14+15 applied"),
    ]
    assert set(history.staleness) == {0}


def test_a_group_ends_with_its_epoch() -> None:
    History(total=8, dial="sync:3", per_epoch=4).play("""
        ask a    -> a gets 0
        wait 1   -> nothing
        push a   -> 0 held, a gets 1
        wait 1   -> nothing
        push a   -> 1 held, a gets 2
        push a   -> 2 held, 0+1+2 applied, a gets 3
        ask b    -> nothing
        push a   -> 3 applied, b gets 5, a gets 4
        wait 1   -> nothing
        push a   -> 4 held, a gets 6 from b
        push b   -> 5 held
        push a   -> 6 held, 4+5+6 applied, b gets 7 from a
        push b   -> 7 applied
    """)


def test_who_has_nothing_to_do_gets_the_batch_that_takes_over_twice_the_median_step() -> None:
    history = History(total=100, dial="sync:2")
    history.play("""
        ask a b c  -> a gets 0, b gets 1
        wait 3     -> nothing
        push a     -> 0 held
    """)
    assert history.admission.backup_time() == 6

    history.play("""
        wait 2.5   -> nothing
        wait 0.5   -> c gets 1
        wait 50    -> nothing
        push c     -> 1 held, 0+1 applied, a gets 2, c gets 3
        push b     -> DUPLICATE
        hold b     -> LEASE_LOST
    """)


def test_the_first_of_two_results_counts_whoever_it_is_from() -> None:
    History(total=100, dial="sync:2").play("""
        ask a b c  -> a gets 0, b gets 1
        wait 3     -> nothing
        push a     -> 0 held
        wait 3     -> c gets 1
        push b     -> 1 held, 0+1 applied, a gets 2, b gets 3
        push c     -> DUPLICATE
    """)


def test_a_backed_up_batch_goes_back_only_when_both_who_compute_it_are_gone() -> None:
    History(total=100, dial="sync:2").play("""
        ask a b c  -> a gets 0, b gets 1
        wait 3     -> nothing
        push a     -> 0 held
        wait 3     -> c gets 1
        lose b     -> 1 lost
        wait 10    -> a gets 1
        lose a     -> 1 lost
        lose c     -> 1 back
        ask d      -> d gets 1
        push d     -> 1 held, 0+1 applied, d gets 2
    """)


def test_nobody_backs_up_a_batch_of_its_own_or_one_that_it_cannot_compute() -> None:
    history = History(total=100, dial="sync:3")
    history.avoided[worker_id("a")] = {0}
    history.play("""
        ask b    -> b gets 0
        wait 1   -> nothing
        ask c a  -> c gets 1 from b, a gets 2 from b
        wait 2   -> nothing
        push a   -> 2 held
        ask b    -> nothing
        wait 2   -> a gets 1
        wait 50  -> nothing
    """)


def test_without_room_for_it_there_is_no_backup() -> None:
    history = History(total=100, dial="sync:2", slots=2)
    history.play("""
        ask a b c  -> a gets 0, b gets 1
        wait 3     -> nothing
        push a     -> 0 held
        wait 50    -> nothing
    """)

    assert history.admission.backup_time() is None


def test_a_gradient_joins_its_group_only_when_it_was_found_finite() -> None:
    History(total=100, dial="sync:2").play("""
        ask a b   -> a gets 0, b gets 1
        wait 1    -> nothing
        hold a    -> 0 held
        push b    -> 1 held
        begin     -> nothing
        refuse a  -> 0 back, b gets 0
        check a   -> nothing
        push b    -> 0 held, 0+1 applied, b gets 2
    """)


def test_when_a_mean_is_not_finite_one_gradient_is_computed_anew_and_the_others_wait() -> None:
    history = History(total=100, dial="sync:3")
    history.play("""
        ask a b c  -> a gets 0, b gets 1, c gets 2
        wait 1     -> nothing
        push a     -> 0 held
        push b     -> 1 held
        hold c     -> 2 held
        check c    -> nothing
        begin      -> 0+1+2 begun
        refuse b   -> 1 back, a gets 1
        begin      -> nothing
        push a     -> 1 held, 0+1+2 applied, b gets 3, a gets 5
    """)

    assert history.staleness == [0, 0, 0]


@pytest.mark.parametrize("begin", ["", "begin -> 0+1 begun"], ids=["held", "begun"])
def test_where_a_batch_is_left_out_the_next_one_joins_its_group(begin: str) -> None:
    History(total=100, dial="sync:2").play(f"""
        ask a b      -> a gets 0, b gets 1
        wait 1       -> nothing
        push b       -> 1 held
        hold a       -> 0 held
        check a      -> nothing
        {begin}
        leave_out a  -> 0 left out, b gets 2
        push b       -> 2 held, 1+2 applied, b gets 3
    """)


def test_a_groups_batch_reserved_for_another_is_withdrawn() -> None:
    history = History(total=100, dial="sync:4")
    history.play("""
        ask a   -> a gets 0
        ask b   -> b gets 1 from a
    """)

    assert history.reserve("a") == [2, 3]


# --------------------------------------------------------- when the dial is turned


def test_a_lower_bound_voids_what_is_too_old_for_it() -> None:
    history = History(total=100)
    history.play("""
        ask a b c       -> a gets 0, b gets 8, c gets 16
        push b          -> 8 applied, b gets 9
        push c          -> 16 applied, c gets 17
        push c          -> 17 applied, c gets 18
        hold a          -> 0 held
        dial bounded:2  -> 0 back
        dial bounded:1  -> b's 9 void
        push b          -> STALE, b gets 10
        push c          -> 18 applied, c gets 19
        hold b          -> 10 held
        hold b          -> LEASE_LOST
    """)


def test_a_lower_bound_keeps_what_is_finished_before_what_is_not() -> None:
    history = History(total=100)
    history.play("""
        ask a b c d     -> a gets 0, b gets 8, c gets 16, d gets 24
        hold d          -> 24 held
        dial bounded:1  -> b's 8 void, c's 16 void
        push c          -> STALE, 24 applied, c gets 17
        push a          -> 0 applied, a gets 1
    """)

    assert history.staleness == [0, 1]


def test_a_voided_gradient_is_its_workers_affair_and_dies_with_it() -> None:
    history = History(total=100)
    history.play("""
        ask a b         -> a gets 0, b gets 8
        dial bounded:0  -> b's 8 void
    """)
    assert history.admission.unwanted(2, worker_id("a")) is None

    history.play("""
        lose b  -> nothing
        hold b  -> LEASE_LOST
    """)


def test_the_dial_goes_all_the_way_round() -> None:
    history = History(total=12)
    history.play("""
        ask a b c       -> a gets 0, b gets 8, c gets 7 from a
        push a          -> 0 applied, a gets 1
        dial sync:3     -> b's 8 void, c's 7 void
        push b          -> STALE, b gets 2 from a
        push c          -> STALE, c gets 3 from a
        wait 1          -> nothing
        push c          -> 3 held
        push a          -> 1 held
        dial async      -> c gets 7, a gets 4
        push b          -> 3 applied, 1 applied, 2 applied, b gets 9
        push b          -> 9 applied, b gets 10
        dial bounded:3  -> a's 4 void, c's 7 void
        push c          -> STALE, c gets 4
        push a          -> STALE, a gets 5
    """)

    assert history.staleness == [0, 0, 1, 2, 0]


def test_to_sync_only_what_was_begun_at_this_version_within_the_group_stays() -> None:
    history = History(total=100)
    history.play("""
        ask a b      -> a gets 0, b gets 8
        ask a        -> a gets 1
        ask a        -> a gets 2
        hold a       -> 0 held
        dial sync:2  -> 0 back, a's 2 void, b's 8 void
        ask b        -> b gets 0
    """)


def test_nothing_is_begun_in_sync_while_an_update_from_before_is_on_its_way() -> None:
    history = History(total=100)
    history.play("""
        ask a b      -> a gets 0, b gets 8
        hold a       -> 0 held
        begin        -> 0 begun
        dial sync:2  -> b's 8 void
        ask a        -> nothing
        end          -> 0 applied, a gets 1
    """)


def test_a_smaller_group_keeps_what_belongs_to_it() -> None:
    History(total=100, dial="sync:4").play("""
        ask a b c    -> a gets 0, b gets 2, c gets 1 from a
        wait 1       -> nothing
        push c       -> 1 held, c gets 3 from b
        push b       -> 2 held
        dial sync:2  -> 2 back, c's 3 void
        push a       -> 0 held, 0+1 applied, b gets 2, a gets 3
    """)


def test_of_a_batch_computed_twice_one_gradient_is_kept_outside_sync() -> None:
    History(total=100, dial="sync:2").play("""
        ask a b c   -> a gets 0, b gets 1
        wait 3      -> nothing
        push a      -> 0 held
        wait 3      -> c gets 1
        dial async  -> c's 1 void, a gets 2
        hold c      -> DUPLICATE
    """)


def test_a_group_that_fails_when_the_dial_has_been_turned_is_computed_anew() -> None:
    history = History(total=100, dial="sync:3")
    history.play("""
        ask a b c       -> a gets 0, b gets 1, c gets 2
        wait 1          -> nothing
        push a          -> 0 held
        push b          -> 1 held
        hold c          -> 2 held
        check c         -> nothing
        begin           -> 0+1+2 begun
        dial bounded:0  -> nothing
        refuse b        -> 1 back
        begin           -> 0 too stale, 2 too stale, a gets 0
        push a          -> 0 applied, b gets 8
    """)


def test_to_set_the_dial_to_what_it_is_changes_nothing() -> None:
    History(total=100, dial="sync:2").play("""
        ask a b c    -> a gets 0, b gets 1
        wait 3       -> nothing
        push a       -> 0 held
        wait 3       -> c gets 1
        dial sync:2  -> nothing
        push c       -> 1 held, 0+1 applied, a gets 2, c gets 3
        push b       -> DUPLICATE
    """)
