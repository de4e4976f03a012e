"""Whose fault a gradient that is not finite is: the rules of `refusals.py`, one test each."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.server.refusals import Refusals, Verdict

ALICE, BOB, CAROL, DAVE = 1, 2, 3, 4


def refuse(refusals: Refusals, connected: set[int], *refused: tuple[int, int]) -> list[Verdict]:
    """The verdicts on (worker, batch) after each other."""
    return [refusals.refused(worker, batch, connected) for worker, batch in refused]


def test_a_single_refusal_blames_nobody() -> None:
    refusals = Refusals()

    assert refuse(refusals, {ALICE, BOB}, (ALICE, 0)) == [Verdict.GO_ON]

    assert refusals.quarantined == set()


def test_a_worker_with_three_refusals_in_a_row_is_quarantined() -> None:
    refusals = Refusals()

    verdicts = refuse(refusals, {ALICE, BOB}, (ALICE, 0), (ALICE, 1), (ALICE, 2))

    assert verdicts == [Verdict.GO_ON, Verdict.GO_ON, Verdict.QUARANTINE]
    assert refusals.quarantined == {ALICE}


def test_a_finite_gradient_ends_a_workers_row() -> None:
    refusals = Refusals()
    refuse(refusals, {ALICE, BOB}, (ALICE, 0), (ALICE, 1))

    refusals.accepted(ALICE, 2)

    verdicts = refuse(refusals, {ALICE, BOB}, (ALICE, 3), (ALICE, 4))
    assert verdicts == [Verdict.GO_ON, Verdict.GO_ON]


def test_another_workers_finite_gradient_does_not_end_the_row() -> None:
    refusals = Refusals()
    refuse(refusals, {ALICE, BOB}, (ALICE, 0), (ALICE, 1))

    refusals.accepted(BOB, 2)

    assert refuse(refusals, {ALICE, BOB}, (ALICE, 3)) == [Verdict.QUARANTINE]


def test_a_batch_refused_by_three_workers_is_condemned_whoever_else_is_there() -> None:
    verdicts = refuse(Refusals(), {ALICE, BOB, CAROL, DAVE}, (ALICE, 0), (BOB, 0), (CAROL, 0))

    assert verdicts == [Verdict.GO_ON, Verdict.GO_ON, Verdict.CONDEMN]


def test_a_batch_refused_three_times_by_the_only_worker_is_condemned() -> None:
    verdicts = refuse(Refusals(), {ALICE}, (ALICE, 0), (ALICE, 0), (ALICE, 0))

    assert verdicts == [Verdict.GO_ON, Verdict.GO_ON, Verdict.CONDEMN]


def test_a_batch_refused_three_times_by_all_of_two_workers_is_condemned() -> None:
    verdicts = refuse(Refusals(), {ALICE, BOB}, (ALICE, 0), (BOB, 0), (ALICE, 0))

    assert verdicts == [Verdict.GO_ON, Verdict.GO_ON, Verdict.CONDEMN]


def test_a_batch_that_another_worker_has_yet_to_try_is_not_condemned() -> None:
    verdicts = refuse(Refusals(), {ALICE, BOB}, (ALICE, 0), (ALICE, 0), (ALICE, 0))

    assert verdicts[-1] is Verdict.QUARANTINE  # the worker's fault, as far as anyone can tell


def test_a_quarantined_worker_need_not_try_a_batch_before_it_is_condemned() -> None:
    refusals = Refusals()
    refuse(refusals, {ALICE, BOB}, (BOB, 7), (BOB, 8), (BOB, 9))

    verdicts = refuse(refusals, {ALICE, BOB}, (ALICE, 0), (ALICE, 0), (ALICE, 0))

    assert verdicts[-1] is Verdict.CONDEMN


def test_the_word_of_a_worker_that_left_still_counts_against_the_batch() -> None:
    refusals = Refusals()
    refuse(refusals, {ALICE, BOB}, (ALICE, 0), (BOB, 0))
    refusals.forget(ALICE)
    refusals.forget(BOB)

    assert refuse(refusals, {CAROL, DAVE}, (CAROL, 0)) == [Verdict.CONDEMN]


def test_a_batch_that_was_applied_in_between_starts_anew() -> None:
    refusals = Refusals()
    refuse(refusals, {ALICE, BOB, CAROL}, (ALICE, 0), (BOB, 0))

    refusals.accepted(CAROL, 0)

    assert refuse(refusals, {ALICE, BOB, CAROL}, (CAROL, 0)) == [Verdict.GO_ON]


def test_a_condemned_batch_quarantines_nobody() -> None:
    refusals = Refusals()

    refuse(refusals, {ALICE}, (ALICE, 0), (ALICE, 0), (ALICE, 0))

    assert refusals.quarantined == set()


def test_leaving_a_batch_out_clears_the_workers_that_refused_it() -> None:
    refusals = Refusals()
    refuse(refusals, {ALICE}, (ALICE, 0), (ALICE, 0), (ALICE, 0))

    refusals.left_out(0)

    assert refuse(refusals, {ALICE}, (ALICE, 1), (ALICE, 2)) == [Verdict.GO_ON, Verdict.GO_ON]


def test_a_refused_batch_goes_to_somebody_else_first() -> None:
    refusals = Refusals()
    refuse(refusals, {ALICE, BOB}, (ALICE, 0))

    assert refusals.avoided_by(ALICE, {ALICE, BOB}) == {0}
    assert refusals.avoided_by(BOB, {ALICE, BOB}) == set()


def test_the_only_worker_tries_a_refused_batch_again() -> None:
    refusals = Refusals()
    refuse(refusals, {ALICE}, (ALICE, 0))

    assert refusals.avoided_by(ALICE, {ALICE}) == set()


def test_a_batch_that_everybody_refused_is_avoided_by_nobody() -> None:
    refusals = Refusals()
    refuse(refusals, {ALICE, BOB}, (ALICE, 0), (BOB, 0))

    assert [refusals.avoided_by(worker, {ALICE, BOB}) for worker in (ALICE, BOB)] == [set(), set()]


def test_nobody_waits_for_a_quarantined_worker_to_try_a_batch() -> None:
    refusals = Refusals()
    refuse(refusals, {ALICE, BOB}, (BOB, 7), (BOB, 8), (BOB, 9), (ALICE, 0))

    assert refusals.avoided_by(ALICE, {ALICE, BOB}) == set()


def test_every_refusal_is_counted() -> None:
    refusals = Refusals()

    refuse(refusals, {ALICE, BOB}, (ALICE, 0), (BOB, 0), (ALICE, 1))

    assert refusals.total == 3


def test_a_worker_that_leaves_is_no_longer_shown_as_quarantined() -> None:
    refusals = Refusals()
    refuse(refusals, {ALICE, BOB}, (ALICE, 0), (ALICE, 1), (ALICE, 2))

    refusals.forget(ALICE)

    assert refusals.quarantined == set()


@given(
    workers=st.integers(1, 5).map(lambda count: set(range(1, count + 1))),
    draws=st.lists(st.integers(0, 9), min_size=60, max_size=60),
)
@settings(deadline=None)
def test_one_bad_batch_is_condemned_at_its_third_refusal_and_quarantines_nobody(
    workers: set[int], draws: list[int]
) -> None:
    """Batch 0 is bad, the others are good; whoever does not avoid it may be given it."""
    refusals = Refusals()
    for draw in draws:
        worker = sorted(workers)[draw % len(workers)]
        if 0 in refusals.avoided_by(worker, workers):
            refusals.accepted(worker, 1)
        elif refusals.refused(worker, 0, workers) is Verdict.CONDEMN:
            break

    assert refusals.quarantined == set()
    assert refusals.total <= 3


@given(
    workers=st.integers(1, 5).map(lambda count: set(range(1, count + 1))),
    draws=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=15, max_size=15),
)
@settings(deadline=None)
def test_weights_that_give_no_finite_gradient_end_the_run_after_three_refusals_a_worker(
    workers: set[int], draws: list[tuple[int, int]]
) -> None:
    refusals = Refusals()
    condemned = False
    for which, batch in draws[: 3 * len(workers)]:
        able = sorted(workers - refusals.quarantined)
        if able and not condemned:
            verdict = refusals.refused(able[which % len(able)], batch, workers)
            condemned = verdict is Verdict.CONDEMN

    assert condemned or refusals.quarantined == workers
