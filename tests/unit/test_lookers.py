"""Who watches is waited for, and nobody else."""

from __future__ import annotations

from headwater.server.lookers import RECENT_S, Lookers


def test_who_asked_a_moment_ago_is_unaware_until_it_asks_again() -> None:
    lookers = Lookers()
    lookers.asked("ann", 9.9)
    lookers.asked("bob", 9.8)

    assert lookers.unaware(10.0)
    lookers.asked("ann", 10.1)
    assert lookers.unaware(10.0)
    lookers.asked("bob", 10.2)
    assert not lookers.unaware(10.0)


def test_who_asked_long_ago_does_not_watch() -> None:
    lookers = Lookers()
    lookers.asked("ann", 10.0 - RECENT_S - 0.1)

    assert not lookers.unaware(10.0)


def test_lookers_that_went_away_are_forgotten() -> None:
    lookers = Lookers()
    for number in range(1000):
        lookers.asked(f"peer {number}", number * RECENT_S)

    assert len(lookers._asked) <= 2
