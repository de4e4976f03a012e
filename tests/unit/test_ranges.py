"""Ranges are a set of whole numbers that never changes, in few pairs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.server.ranges import Ranges

numbers = st.integers(0, 40)
orders = st.lists(numbers, unique=True)


@given(orders)
@settings(deadline=None)
def test_ranges_hold_what_a_set_holds_whatever_the_order(order: list[int]) -> None:
    ranges, plain = Ranges.of(order), set(order)

    assert list(ranges) == sorted(plain)
    assert len(ranges) == len(plain)
    assert [n for n in range(-1, 45) if n in ranges] == sorted(plain)


@given(orders)
@settings(deadline=None)
def test_the_low_water_mark_is_the_lowest_number_missing(order: list[int]) -> None:
    assert Ranges.of(order).low_water == min(set(range(len(order) + 1)) - set(order))


@given(orders)
@settings(deadline=None)
def test_pairs_rise_and_never_touch_so_that_equal_sets_are_equal(order: list[int]) -> None:
    ranges = Ranges.of(order)

    edges = [edge for pair in ranges.pairs for edge in pair]
    assert edges == sorted(set(edges))
    assert ranges == Ranges.of(sorted(order))


@given(st.lists(numbers, unique=True, min_size=1), st.data())
@settings(deadline=None)
def test_adding_a_number_twice_is_an_error_that_names_it(
    order: list[int], data: st.DataObject
) -> None:
    ranges = Ranges.of(order)
    again = data.draw(st.sampled_from(order))

    with pytest.raises(ValueError, match=f"^{again} is in the set already$"):
        ranges.add(again)

    assert set(ranges) == set(order)


def test_adding_leaves_the_set_it_was_added_to_alone() -> None:
    before = Ranges.of([0, 1, 5])

    after = before.add(2)

    assert before.pairs == ((0, 2), (5, 6))
    assert after.pairs == ((0, 3), (5, 6))


def test_a_number_between_two_ranges_joins_them() -> None:
    assert Ranges.of([0, 1, 3, 4]).add(2).pairs == ((0, 5),)


def test_a_run_in_order_is_one_pair_however_long() -> None:
    assert Ranges.of(range(1000)).pairs == ((0, 1000),)


def test_the_empty_set_holds_nothing() -> None:
    empty = Ranges()

    assert (len(empty), list(empty), empty.low_water, 0 in empty) == (0, [], 0, False)
