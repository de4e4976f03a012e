"""Nobody is told that an update is durable before it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headwater.server.acknowledgements import Acknowledgements


def test_what_is_logged_and_not_applied_is_not_durable_yet() -> None:
    owed = Acknowledgements[str](4)
    owed.on_disk(6)

    assert owed.due(5) == []
    assert owed.durable_version == 5

    owed.owe(6, "ann")
    assert owed.due(6) == ["ann"]
    assert owed.durable_version == 6


def test_what_is_applied_and_not_on_disk_is_owed() -> None:
    owed = Acknowledgements[str](0)
    for version, name in ((1, "ann"), (2, "bob"), (3, "cyd")):
        owed.owe(version, name)

    assert owed.due(3) == []
    owed.on_disk(2)
    assert owed.due(3) == ["ann", "bob"]
    owed.on_disk(1)  # an older snapshot that took long
    assert owed.due(3) == []
    owed.on_disk(3)
    assert owed.due(3) == ["cyd"]


@given(st.lists(st.sampled_from(["apply", "sync"]), max_size=60), st.data())
def test_each_is_answered_once_in_order_and_never_early(
    events: list[str], data: st.DataObject
) -> None:
    owed, applied, synced, answered = Acknowledgements[int](0), 0, 0, []
    for event in events:
        if event == "apply":
            applied += 1
            owed.owe(applied, applied)
        else:
            synced = data.draw(st.integers(synced, applied + 1))
            owed.on_disk(synced)
        answered += owed.due(applied)
        assert owed.durable_version == min(applied, max(synced, owed.durable_version))
        assert owed.durable_version <= applied
        assert all(version <= synced for version in answered)
    assert answered == list(range(1, len(answered) + 1))
    assert len(answered) == min(applied, synced)
