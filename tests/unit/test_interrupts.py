"""Signals as exceptions: when they are raised, and that all is as before afterwards."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest

from headwater.client.interrupts import Interrupts, Stopped

NUMBER = signal.SIGUSR1


def test_a_signal_is_raised_at_once_but_where_it_is_held_at_the_end() -> None:
    before = signal.getsignal(NUMBER)
    done = []

    def ends(*, held: bool) -> None:
        with Interrupts(NUMBER) as interrupts:
            with interrupts.held() if held else contextlib.nullcontext():
                signal.raise_signal(NUMBER)
                done.append("went on")
            done.append("went on without end")

    with pytest.raises(Stopped) as raised:
        ends(held=False)
    assert (raised.value.number, done) == (NUMBER, [])
    with pytest.raises(Stopped):
        ends(held=True)
    assert done == ["went on"]
    assert signal.getsignal(NUMBER) is before


def test_another_thread_leaves_signals_alone() -> None:
    found = []

    def run() -> None:
        with Interrupts(NUMBER):
            found.append(signal.getsignal(NUMBER))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    assert found == [signal.getsignal(NUMBER)]
