"""The dial and the staleness policy are read from what people type, and say what they are."""

from __future__ import annotations

import pytest

from headwater.protos.errors import UsageError
from headwater.server.dial import Dial
from headwater.server.staleness import DEFAULT_LAMBDA, StalenessPolicy


@pytest.mark.parametrize(
    ("text", "dial"),
    [
        ("async", Dial()),
        ("bounded:0", Dial(bound=0)),
        ("bounded:7", Dial(bound=7)),
        ("sync:1", Dial(group=1)),
        ("sync:999999999", Dial(group=999_999_999)),
    ],
)
def test_a_dial_is_read_and_shown_in_the_same_words(text: str, dial: Dial) -> None:
    assert Dial.parse(text) == dial
    assert str(dial) == text


def test_the_dial_is_at_async_unless_told_otherwise() -> None:
    assert str(Dial()) == "async"


@pytest.mark.parametrize(
    "text",
    [
        *("", "Async", " async", "async\n", "async:1"),
        *("bounded", "bounded:", "bounded:-1", "bounded:1.5", "bounded:1234567890"),
        *("sync", "sync:", "sync:0", "sync:00", "sync:-2", "sync: 2", "sync:2,3"),
    ],
)
def test_any_other_dial_is_refused_with_what_it_could_be(text: str) -> None:
    with pytest.raises(UsageError) as error:
        Dial.parse(text)

    assert str(error.value) == (
        f"--consistency {text!r}: it is async; bounded:K, with a staleness of at most K, "
        "from 0 on; or sync:N, with N batches in an update, from 1 on"
    )


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("none", StalenessPolicy()),
        ("scale", StalenessPolicy(scale=True)),
        ("compensate:0.04", StalenessPolicy(compensate=0.04)),
        ("compensate:2", StalenessPolicy(compensate=2.0)),
        ("compensate:1e-05", StalenessPolicy(compensate=1e-5)),
        ("drop:0", StalenessPolicy(drop=0)),
        ("drop:12", StalenessPolicy(drop=12)),
    ],
)
def test_a_policy_is_read_and_shown_in_the_same_words(text: str, policy: StalenessPolicy) -> None:
    assert StalenessPolicy.parse(text) == policy
    assert str(policy) == text


def test_to_compensate_without_a_number_takes_that_of_the_paper() -> None:
    assert StalenessPolicy.parse("compensate") == StalenessPolicy(compensate=DEFAULT_LAMBDA)
    assert str(StalenessPolicy.parse("compensate")) == "compensate:0.04"


def test_a_stale_gradient_is_used_as_it_is_unless_told_otherwise() -> None:
    assert str(StalenessPolicy()) == "none"


@pytest.mark.parametrize(
    "text",
    [
        *("", "None", "none\n", "scale:2", "drop", "drop:", "drop:-1", "drop:1.5"),
        *("compensate:", "compensate:-1", "compensate:nan", "compensate:inf", "compensate:.5"),
    ],
)
def test_any_other_policy_is_refused_with_what_it_could_be(text: str) -> None:
    with pytest.raises(UsageError) as error:
        StalenessPolicy.parse(text)

    assert str(error.value) == (
        f"--staleness {text!r}: it is none; scale; compensate or compensate:LAMBDA, such as "
        "compensate:0.04; or drop:K, with K versions of staleness allowed"
    )


def test_an_error_names_the_setting_that_was_read() -> None:
    with pytest.raises(UsageError, match=r"^consistency 'fast': it is async; "):
        Dial.parse("fast", name="consistency")
    with pytest.raises(UsageError, match=r"^staleness 'slow': it is none; "):
        StalenessPolicy.parse("slow", name="staleness")


def test_a_strength_is_shown_with_all_its_digits_and_is_finite() -> None:
    for text in ("compensate:0.123456789012345", "compensate:1e+16", "compensate:1e-07"):
        assert str(StalenessPolicy.parse(text)) == text
    with pytest.raises(UsageError, match="compensate:1e999"):
        StalenessPolicy.parse("compensate:1e999")
