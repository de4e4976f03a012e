"""The ledger has the transitions of its diagram, and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from headwater.server.ledger import BatchState, Ledger, LedgerError
from headwater.server.ranges import Ranges

ALICE, BOB = 1, 2

STATES = ("pending", "leased", "ticketed", "admitted", "applied")
MOVES: dict[str, Callable[[Ledger], None]] = {
    "admit": lambda ledger: ledger.admit(0),
    "settle": lambda ledger: ledger.settle([0], Ranges.of([0])),
    "give_back": lambda ledger: ledger.give_back(0),
}
DIAGRAM = {
    ("ticketed", "admit"): "admitted",
    ("admitted", "settle"): "applied",
    ("ticketed", "give_back"): "pending",
    ("admitted", "give_back"): "pending",
}


def ledger_with_batch_0(state: str) -> Ledger:
    """A ledger of three batches, the first in `state`, the others pending."""
    ledger = Ledger(total=3, per_epoch=3)
    steps: list[Callable[[], object]] = [
        lambda: ledger.lease(ALICE, 1),
        lambda: ledger.take(ALICE),
        lambda: ledger.admit(0),
        lambda: ledger.settle([0], Ranges.of([0])),
    ]
    for step in steps[: STATES.index(state)]:
        step()
    return ledger


def state_of_batch_0(ledger: Ledger) -> str:
    state = ledger.state(0)
    if state is not None:
        return state.value
    return "applied" if 0 in ledger.applied else "pending"


def test_a_batch_goes_from_pending_to_applied_in_four_moves() -> None:
    assert [state_of_batch_0(ledger_with_batch_0(state)) for state in STATES] == list(STATES)


@pytest.mark.parametrize(
    ("state", "move", "after"), [(state, move, after) for (state, move), after in DIAGRAM.items()]
)
def test_a_move_of_the_diagram_is_made(state: str, move: str, after: str) -> None:
    ledger = ledger_with_batch_0(state)

    MOVES[move](ledger)

    assert state_of_batch_0(ledger) == after


@pytest.mark.parametrize(
    ("state", "move"),
    [(state, move) for state in STATES for move in MOVES if (state, move) not in DIAGRAM],
)
def test_a_move_the_diagram_lacks_is_an_error_and_changes_nothing(state: str, move: str) -> None:
    ledger = ledger_with_batch_0(state)
    shown = state if state in ("leased", "ticketed", "admitted") else "pending or applied"

    with pytest.raises(LedgerError, match=f"^batch 0 is {shown}, not "):
        MOVES[move](ledger)

    assert state_of_batch_0(ledger) == state


def test_only_pending_batches_are_leased() -> None:
    for state in STATES[1:]:
        assert 0 not in ledger_with_batch_0(state).lease(BOB, 3)


def test_releasing_returns_what_is_leased_and_not_what_has_a_ticket() -> None:
    ledger = Ledger(total=3, per_epoch=3)
    ledger.lease(ALICE, 3)
    ledger.take(ALICE)

    assert ledger.release(ALICE) == [1, 2]

    assert ledger.state(0) is BatchState.TICKETED
    assert ledger.lease(BOB, 3) == [1, 2]


@pytest.mark.parametrize(
    "applied",
    [Ranges(), Ranges.of([1]), Ranges.of([0, 1])],
    ids=["none more", "another one", "one too many"],
)
def test_an_update_that_does_not_follow_on_its_batch_is_an_error(applied: Ranges) -> None:
    ledger = ledger_with_batch_0("admitted")

    with pytest.raises(LedgerError, match=r"applied batches does not follow on \[0\]$"):
        ledger.settle([0], applied)

    assert ledger.state(0) is BatchState.ADMITTED
    assert ledger.applied == Ranges()


def test_a_groups_update_is_recorded_whole_or_not_at_all() -> None:
    ledger = Ledger(total=3, per_epoch=3)
    ledger.lease(ALICE, 2)
    for position in (0, 1):
        ledger.take(ALICE)
        ledger.admit(position)

    with pytest.raises(LedgerError, match=r"applied batches does not follow on \[0, 1\]$"):
        ledger.settle([0, 1], Ranges.of([0]))
    with pytest.raises(LedgerError, match=r"^batch 2 is pending or applied, not admitted$"):
        ledger.settle([0, 1, 2], Ranges.of([0, 1, 2]))
    assert ledger.count(BatchState.ADMITTED) == 2

    ledger.settle([0, 1], Ranges.of([0, 1]))
    assert (ledger.count(BatchState.ADMITTED), ledger.pending_count) == (0, 1)


def test_the_ledger_goes_forward_by_the_versions_own_object() -> None:
    ledger = ledger_with_batch_0("admitted")
    published = Ranges.of([0])

    ledger.settle([0], published)

    assert ledger.applied is published


def test_a_resumed_ledger_leases_the_holes_first_and_nothing_applied() -> None:
    ledger = Ledger(total=10, per_epoch=5, applied=Ranges.of([0, 1, 3, 6, 9]))

    assert (ledger.epoch, ledger.pending_count, ledger.done) == (0, 5, False)
    assert ledger.lease(ALICE, 3) == [2, 4, 5]
    assert ledger.lease(BOB, 9) == [7, 8]
    assert ledger.pending_count == 0


def test_a_hole_that_was_given_back_comes_before_fresh_batches_and_after_lower_holes() -> None:
    ledger = Ledger(total=10, per_epoch=10, applied=Ranges.of([0, 2, 4]))
    ledger.lease(ALICE, 2)  # 1 and 3
    ledger.take(ALICE)
    ledger.release(ALICE)
    assert ledger.lease(BOB, 2) == [3, 5]

    ledger.give_back(1)

    assert ledger.lease(BOB, 2) == [1, 6]


def test_a_ledger_resumed_at_its_end_is_done() -> None:
    ledger = Ledger(total=4, per_epoch=2, applied=Ranges.of(range(4)))

    assert (ledger.done, ledger.epoch, ledger.pending_count) == (True, 2, 0)
    assert ledger.lease(ALICE, 1) == []


def test_a_resumed_ledger_keeps_to_the_open_epochs() -> None:
    ledger = Ledger(total=6, per_epoch=2, applied=Ranges.of([0, 2, 3]))

    assert ledger.lease(ALICE, 6) == [1]  # of the third epoch nothing: the first is not complete


def test_an_epoch_barrier_is_one_open_epoch() -> None:
    ledger = Ledger(total=4, per_epoch=2, open_epochs=1)
    assert ledger.lease(ALICE, 4) == [0, 1]
    for position in (0, 1):
        ledger.take(ALICE)
        ledger.admit(position)
    ledger.settle([1], Ranges.of([1]))
    assert ledger.lease(ALICE, 4) == []

    ledger.settle([0], Ranges.of([0, 1]))

    assert ledger.lease(ALICE, 4) == [2, 3]


def test_batches_to_avoid_stay_pending_for_the_others() -> None:
    ledger = Ledger(total=5, per_epoch=5)

    assert ledger.lease(ALICE, 2, avoid={0, 2}) == [1, 3]
    assert ledger.lease(BOB, 2) == [0, 2]


def test_a_batch_is_withdrawn_from_whoever_holds_most_and_would_reach_it_last() -> None:
    ledger = Ledger(total=5, per_epoch=5)
    ledger.lease(ALICE, 3)
    ledger.lease(BOB, 2)

    assert ledger.withdraw(3) == (ALICE, 2)

    assert [ledger.leased_to(worker) for worker in (ALICE, BOB, 3)] == [[0, 1], [3, 4], [2]]


def test_nothing_is_withdrawn_where_nobody_has_a_reserve() -> None:
    ledger = ledger_with_batch_0("ticketed")

    assert ledger.withdraw(BOB) is None


def test_to_lease_no_batches_leaves_all_of_them_pending() -> None:
    ledger = Ledger(total=3, per_epoch=3)

    assert ledger.lease(ALICE, 0) == []

    assert ledger.lease(BOB, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("applied", "count", "lowest"),
    [([], 3, [0, 1, 2]), ([0, 2], 3, [1, 3]), ([0, 1, 2, 3, 5], 9, [4, 6, 7]), (range(10), 2, [])],
    ids=["new", "with a hole", "second epoch", "done"],
)
def test_the_lowest_unapplied_batches_are_all_of_one_epoch(
    applied: Iterable[int], count: int, lowest: list[int]
) -> None:
    ledger = Ledger(total=10, per_epoch=4, applied=Ranges.of(applied))

    assert ledger.lowest_unapplied(count) == lowest


def test_a_run_may_end_within_an_epoch() -> None:
    ledger = Ledger(total=10, per_epoch=4, applied=Ranges.of(range(8)))

    assert ledger.lowest_unapplied(3) == [8, 9]


def test_a_certain_leased_batch_can_be_moved_and_taken() -> None:
    ledger = Ledger(total=5, per_epoch=5)
    ledger.lease(ALICE, 3)

    assert ledger.move(1, BOB) == ALICE
    assert ledger.take(BOB, 1) == 1
    assert ledger.take(ALICE, 2) == 2

    assert [ledger.leased_to(worker) for worker in (ALICE, BOB)] == [[0], []]
    with pytest.raises(LedgerError, match=r"^batch 4 is pending or applied, not leased$"):
        ledger.move(4, BOB)


def test_nothing_is_begun_of_an_epoch_that_is_not_allowed() -> None:
    ledger = Ledger(total=6, per_epoch=2)
    ledger.allowed_epochs = 0
    assert ledger.lease(ALICE, 6) == ledger.lowest_unapplied(6) == []

    ledger.allowed_epochs = 1
    assert ledger.lowest_unapplied(6) == [0, 1]
    assert ledger.lease(ALICE, 6) == [0, 1]
    for position in (0, 1):
        ledger.take(ALICE, position)
        ledger.admit(position)
    ledger.settle([0, 1], Ranges.of([0, 1]))
    assert ledger.epoch == 1
    assert not ledger.done
    assert ledger.lease(ALICE, 6) == ledger.lowest_unapplied(6) == []
    assert ledger.open_count == 0

    ledger.allowed_epochs = 3
    assert ledger.lowest_unapplied(6) == [2, 3]
    assert ledger.lease(ALICE, 6) == [2, 3, 4, 5]
