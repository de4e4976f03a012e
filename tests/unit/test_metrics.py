"""The figures that status shows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.server.metrics import MAX_NAMES, WINDOW_S, Histogram, Rate, RunningMeans


def test_a_rate_is_zero_before_the_first_amount() -> None:
    assert Rate().per_second(100.0) == 0.0


def test_a_steady_rate_is_shown_as_it_is() -> None:
    rate = Rate()
    for tick in range(200):
        rate.add(3, 100 + tick / 10)

    assert rate.per_second(119.9) == pytest.approx(30)


def test_a_rate_is_right_from_the_first_seconds_on() -> None:
    rate = Rate()
    for tick in range(11):
        rate.add(1, 100 + tick / 10)

    assert rate.per_second(101.0) == pytest.approx(11)


def test_the_first_amount_alone_does_not_make_an_endless_rate() -> None:
    rate = Rate()
    rate.add(32, 100.0)

    assert rate.per_second(100.0) == pytest.approx(320)  # as if it had taken a tenth of a second


def test_a_stall_shows_at_once_and_is_zero_after_the_window() -> None:
    rate = Rate()
    for tick in range(100):
        rate.add(1, 100 + tick / 10)

    later = [rate.per_second(109.9 + s) for s in (0, 2.5, WINDOW_S + 0.1)]

    assert later == [pytest.approx(10), pytest.approx(5), 0.0]


def test_a_rate_remembers_no_more_than_its_window_however_many_amounts_come() -> None:
    rate = Rate()
    for tick in range(20_000):
        rate.add(1, 100 + tick / 1000)

    assert len(rate._slots) <= 10 * WINDOW_S + 1
    assert rate.per_second(119.999) == pytest.approx(1000, rel=0.03)


values = st.lists(st.integers(0, 50), min_size=1)


def histogram_of(found: list[int]) -> Histogram:
    histogram = Histogram()
    for value in found:
        histogram.add(value)
    return histogram


@given(values, st.integers(0, 100))
@settings(deadline=None)
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(
    found: list[int], percent: int
) -> None:
    reached = [v for v in found if 100 * sum(w <= v for w in found) >= percent * len(found)]

    assert histogram_of(found).percentile(percent) == min(reached)


@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 100])
def test_percentiles_are_those_of_numpys_inverted_cdf(percent: int) -> None:
    found = np.random.default_rng(0).poisson(3, 1000)

    expected = np.percentile(found, percent, method="inverted_cdf")

    assert histogram_of(found.tolist()).percentile(percent) == expected


@given(values)
@settings(deadline=None)
def test_mean_and_max_are_exact(found: list[int]) -> None:
    histogram = histogram_of(found)

    assert histogram.mean == sum(found) / len(found)
    assert histogram.max == max(found)


def test_an_empty_histogram_is_all_zero() -> None:
    empty = Histogram()

    assert (empty.mean, empty.max, empty.percentile(50), empty.percentile(99)) == (0.0, 0, 0, 0)


def test_a_running_mean_starts_at_the_first_value() -> None:
    means = RunningMeans()

    means.add({"loss": 2.5})

    assert means.values() == {"loss": pytest.approx(2.5)}


@given(st.floats(-1e6, 1e6), st.integers(1, 200))
@settings(deadline=None)
def test_the_running_mean_of_a_constant_is_the_constant(value: float, count: int) -> None:
    means = RunningMeans()

    for _ in range(count):
        means.add({"loss": value})

    assert means.values()["loss"] == pytest.approx(value)


def test_a_running_mean_forgets_what_was_long_ago() -> None:
    means = RunningMeans()
    means.add({"loss": 1000.0})

    for _ in range(500):
        means.add({"loss": 1.0})

    assert means.values()["loss"] == pytest.approx(1.0, abs=0.01)


def test_a_name_that_comes_later_is_as_unbiased_as_the_others() -> None:
    means = RunningMeans()
    for _ in range(100):
        means.add({"loss": 1.0})

    means.add({"loss": 1.0, "accuracy": 0.5})

    assert means.values() == {"loss": pytest.approx(1.0), "accuracy": pytest.approx(0.5)}


def test_there_are_no_means_before_the_first_value() -> None:
    assert RunningMeans().values() == {}


def test_names_that_are_new_in_every_push_take_no_more_memory_and_the_first_are_kept() -> None:
    means = RunningMeans()
    means.add({"loss": 1.0, "accuracy": 0.5})
    for number in range(2 * MAX_NAMES):
        means.add({f"step {number}": 1.0, "loss": 1.0})
    means.add({"loss": 2.0})

    found = means.values()
    assert len(found) == MAX_NAMES
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["loss"] > 1.0
