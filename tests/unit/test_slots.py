"""Shared memory: what is read is not written, what cannot be trusted is not used again."""

from __future__ import annotations

import asyncio
import dataclasses
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headwater.protos import shared_memory
from headwater.protos.compression import NONE
from headwater.protos.errors import HeadwaterError
from headwater.protos.layout import Layout
from headwater.protos.shared_memory import SharedMemory, attach
from headwater.server import slots
from headwater.server.packed_versions import PackedVersions
from headwater.server.slots import GradientSlots, Slot, VersionSlots
from headwater.server.store import Published
from headwater.worker.slots import Slots

pytestmark = pytest.mark.skipif(not shared_memory.IS_AVAILABLE, reason="no memfd here")

LAYOUT = Layout.of([("a", np.dtype("float32"), (3,)), ("b", np.dtype("float32"), ())])
LARGE = Layout.of([("a", np.dtype("float32"), (1_000_000,)), ("b", np.dtype("float32"), (5,))])


def version(number: int, layout: Layout = LAYOUT) -> Published:
    leaves = tuple(jnp.full(t.shape, number, t.dtype) for t in layout.tensors)
    fields: dict[str, Any] = {f.name: None for f in dataclasses.fields(Published)}
    return Published(**{**fields, "version": number, "leaves": leaves, "constants": ()})


def contents(slot: Slot, layout: Layout = LAYOUT) -> set[float]:
    return {x for view in layout.views(slot.array).values() for x in np.unique(view).tolist()}


class VersionsUnderUse(RuleBasedStateMachine):
    """Readers take versions, release them or vanish; what one reads stays what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = VersionSlots(PackedVersions(LAYOUT, NONE))
        self.newest = 0
        self.held: list[tuple[int, Slot]] = []
        self.vanished: list[tuple[int, Slot]] = []

    @rule()
    def publish(self) -> None:
        self.newest += 1

    @rule()
    def take(self) -> None:
        slot = self.slots.ready(version(self.newest))
        assert slot is not None
        self.held.append((self.newest, slot))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), vanishes=st.booleans())
    def let_go(self, data: st.DataObject, vanishes: bool) -> None:
        number, slot = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if vanishes:
            self.slots.drop(slot)
            self.vanished.append((number, slot))
        else:
            self.slots.release(slot)

    @invariant()
    def what_is_read_stays(self) -> None:
        for number, slot in [*self.held, *self.vanished]:
            assert contents(slot) == {number}

    @invariant()
    def memory_is_bounded(self) -> None:
        read = {slot.number for _, slot in self.held}
        assert read <= self.slots.alive, "what is spoken of is not said to be gone"
        assert len(self.slots.alive) <= len(read) + slots.SPARE + 1

    @invariant()
    def readers_of_one_version_share_it(self) -> None:
        if not self.vanished:
            by_version = {number: slot.number for number, slot in self.held}
            assert all(by_version[number] == slot.number for number, slot in self.held)


TestVersionsUnderUse = pytest.mark.filterwarnings("ignore")(VersionsUnderUse.TestCase)
VersionsUnderUse.TestCase.settings = settings(max_examples=60, deadline=None)


def test_a_large_version_is_copied_once_for_all_who_wait_for_it() -> None:
    async def share() -> None:
        versions = VersionSlots(PackedVersions(LARGE, NONE))
        assert versions.ready(version(3, LARGE)) is None  # not at once: the loop would stand still
        found = await asyncio.gather(*(versions.share(version(3, LARGE)) for _ in range(3)))
        assert len({slot.number for slot in found}) == 1
        assert contents(found[0], LARGE) == {3.0}
        assert versions.ready(version(3, LARGE)) is found[0]

    asyncio.run(share())


def test_who_waits_for_a_version_gets_it_whatever_became_of_it_meanwhile() -> None:
    """All of these are copied before anybody who waits for one of them wakes up."""

    async def share() -> None:
        versions = VersionSlots(PackedVersions(LARGE, NONE))
        asked = [asyncio.create_task(versions.share(version(n, LARGE))) for n in range(1, 9)]
        await asyncio.sleep(0)
        time.sleep(0.5)  # noqa: ASYNC251  (the copies end, and the loop hears of all at once)
        found = [await each for each in asked]
        assert [contents(slot, LARGE) for slot in found] == [{float(n)} for n in range(1, 9)]
        assert {slot.number for slot in found} <= versions.alive
        for slot in found:
            versions.release(slot)
        assert len(versions.alive) == slots.SPARE + 1

    asyncio.run(share())


def test_who_stops_waiting_for_a_version_does_not_keep_it() -> None:
    async def share() -> None:
        versions = VersionSlots(PackedVersions(LARGE, NONE))
        for n in range(1, 9):
            asked = asyncio.create_task(versions.share(version(n, LARGE)))
            await asyncio.sleep(0)
            asked.cancel()
            kept = await versions.share(version(n, LARGE))
            assert contents(kept, LARGE) == {float(n)}
            versions.release(kept)
        assert len(versions.alive) <= slots.SPARE + 1

    asyncio.run(share())


def test_a_gradients_slot_is_used_again_only_when_it_was_given_back() -> None:
    mine = GradientSlots(LAYOUT)
    first = mine.assign(1)
    second = mine.assign(2)
    assert first.number != second.number
    assert mine.written(1) is first
    assert mine.written(1) is None  # once
    third = mine.assign(3)
    assert third.number not in (first.number, second.number)  # its gradient may wait for its group
    mine.give_back(first)()
    assert mine.assign(4) is first


def test_more_gradients_slots_than_are_of_use_are_dropped() -> None:
    mine = GradientSlots(LAYOUT)
    for ticket in range(6):
        mine.assign(ticket)
    for ticket in range(6):
        slot = mine.written(ticket)
        assert slot is not None
        mine.give_back(slot)()
    assert len(mine.alive) == slots.SPARE
    assert mine.dropped == 6 - slots.SPARE


def test_versions_cannot_be_written_by_who_reads_them() -> None:
    memory = SharedMemory(4096, read_only=True)
    memory.array[:] = 7
    with pytest.raises(PermissionError):
        attach(os.dup(memory.descriptor), 4096, writable=True)
    assert set(attach(os.dup(memory.descriptor), 4096, writable=False)) == {7}


def test_shared_memory_cannot_shrink() -> None:
    memory = SharedMemory(8192, read_only=False)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.descriptor, 4096)


def _small() -> int:
    memory = SharedMemory(1024, read_only=False)
    return os.dup(memory.descriptor)


def _unsealed() -> int:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, 1 << 16)
    return descriptor


@pytest.mark.parametrize("made", [_small, _unsealed])
def test_memory_that_could_end_under_us_is_not_mapped(made: Callable[[], int]) -> None:
    descriptor = made()
    with pytest.raises(HeadwaterError, match="65536 are needed"):
        attach(descriptor, 1 << 16, writable=False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)  # closed, whatever it was


def test_what_no_process_holds_any_more_is_gone() -> None:
    memory = SharedMemory(1 << 20, read_only=False)
    inode = os.fstat(memory.descriptor).st_ino
    del memory
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert not any("memfd:headwater" in line and f" {inode} " in line for line in maps)


@pytest.mark.parametrize("sizes", [(10,), (9 << 20,), (1 << 20, 3, 7 << 20, 0, 5)])
def test_copies_are_whole_with_one_thread_and_with_two(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    sources = [rng.integers(0, 256, size, np.uint8) for size in sizes]
    pairs = [(np.zeros(len(s), np.uint8), s) for s in sources]
    shared_memory.copy(pairs)
    assert all(np.array_equal(to, source) for to, source in pairs)


def test_a_worker_finds_wrong_announcements() -> None:
    from headwater.protos import parameter_server_pb2 as pb

    worker = Slots(LAYOUT, LAYOUT)
    memory = SharedMemory(LAYOUT.total_bytes, read_only=True)
    with pytest.raises(HeadwaterError, match="announced 2 slots and sent 1"):
        worker.learn(pb.ServerMessage(new_slots=[1, 2]), [os.dup(memory.descriptor)])
    worker.learn(pb.ServerMessage(new_slots=[3]), [os.dup(memory.descriptor)])
    assert len(worker.weights(3)) == len(LAYOUT.tensors)
    with pytest.raises(HeadwaterError, match="slot 3"):
        worker.write(3, [])  # it is a version's
    worker.learn(pb.ServerMessage(gone_slots=[3]), [])
    with pytest.raises(HeadwaterError, match="slot 3"):
        worker.weights(3)
    assert LAYOUT.total_bytes <= mmap.PAGESIZE
