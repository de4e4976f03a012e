"""Rules that end a run by its evaluations, and what they must not end it for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.protos.errors import UsageError
from headwater.server.early_stop import EarlyStop


def stopped_at(rule: EarlyStop, *values: float, metric: str = "accuracy") -> int | None:
    """Which of the evaluations ended the run, counted from 0."""
    for version, value in enumerate(values):
        if rule.add(version, {metric: value, "other": 0.0}):
            return version
    return None


@pytest.mark.parametrize(
    ("text", "values", "at"),
    [
        ("accuracy>=0.97", (0.9, 0.969, 0.97), 2),
        ("accuracy > 0.97", (0.97, 0.971), 1),
        ("accuracy<=1e-3", (0.5, 0.001), 1),
        ("accuracy<0", (0.0, -0.0, -1.0), 2),
        ("accuracy>=0.97", (math.nan, 0.5), None),
        ("accuracy>-inf", (-math.inf, 0.0), 1),
    ],
)
def test_a_run_ends_with_the_first_evaluation_that_is_good_enough(
    text: str, values: tuple[float, ...], at: int | None
) -> None:
    assert stopped_at(EarlyStop(text, None), *values) == at


@pytest.mark.parametrize(
    ("text", "metric", "values", "at"),
    [
        ("accuracy:2", "accuracy", (0.5, 0.6, 0.6, 0.7, 0.7, 0.6), 5),
        ("loss:2", "loss", (0.5, 0.4, 0.4, 0.3, 0.3, 0.4), 5),
        ("top-5 error:1", "top-5 error", (0.5, 0.6), 1),
        ("max:loss:1", "loss", (0.5, 0.6, 0.6), 2),
        ("min:seconds:1", "seconds", (0.5, 0.4, 0.4), 2),
        ("accuracy:1", "accuracy", (0.5,), None),
        ("accuracy:2", "accuracy", (math.nan, math.nan), 1),
        ("a:b:1", "a:b", (2.0, 1.0), 1),
    ],
)
def test_a_run_ends_when_it_has_not_got_better_for_so_long(
    text: str, metric: str, values: tuple[float, ...], at: int | None
) -> None:
    assert stopped_at(EarlyStop(None, text), *values, metric=metric) == at


@given(st.lists(st.floats(0, 1), max_size=30), st.integers(1, 5))
def test_patience_is_that_many_evaluations_after_the_best(
    values: list[float], patience: int
) -> None:
    at = stopped_at(EarlyStop(None, f"accuracy:{patience}"), *values)

    seen = values if at is None else values[: at + 1]
    since = [len(seen) - 1 - seen.index(max(seen))] if seen else [0]
    assert since == [patience] if at is not None else since < [patience]


def test_the_reason_says_which_value_and_which_rule() -> None:
    assert EarlyStop("accuracy>=0.9", None).add(1, {"accuracy": 0.9125}) == "accuracy 0.9125 >= 0.9"
    rule = EarlyStop(None, "loss:1")
    rule.add(1, {"loss": 0.25})
    assert rule.add(2, {"loss": 0.5}) == "loss has not been better than 0.25 for 1 evaluations"


def test_an_evaluation_of_an_older_version_says_nothing() -> None:
    rule = EarlyStop("accuracy>=0.9", None)
    assert rule.add(7, {"accuracy": 0.5}) is None
    assert rule.add(6, {"accuracy": 0.95}) is None
    assert rule.add(7, {"accuracy": 0.95}) is None
    assert rule.add(8, {"accuracy": 0.95})


def test_a_metric_that_no_evaluation_has_is_known() -> None:
    rule = EarlyStop("acuracy>=0.9", "loss:3")
    assert rule.missing({"accuracy": 1.0, "loss": 0.1}) == ["acuracy"]
    assert rule.add(1, {"accuracy": 1.0, "loss": 0.1}) is None


@pytest.mark.parametrize(
    "text", ["", "accuracy", "accuracy=0.9", ">=0.9", "accuracy>=high", "a>nan"]
)
def test_a_stop_when_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--stop-when .*such as 'accuracy>=0.97'"):
        EarlyStop(text, None)


@pytest.mark.parametrize("text", ["", "accuracy", "accuracy:", ":3", "accuracy:0", "accuracy:-1"])
def test_a_patience_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--patience .*such as accuracy:3"):
        EarlyStop(None, text)
