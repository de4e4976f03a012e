"""Shared memory for tensors: versions that all workers here read, gradients that each writes."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from headwater.protos.layout import Bytes, Layout
from headwater.protos.shared_memory import SharedMemory, copy
from headwater.protos.wire import PART_BYTES
from headwater.server.packed_versions import PackedVersions
from headwater.server.store import Published

SPARE = 2
"""Slots kept for the next ones; more would be memory for nothing."""

_numbers = itertools.count(1)


class Slot:
    """A buffer of the layout's size that others can map.

    Raises:
      OSError: There is not so much memory.
    """

    def __init__(self, layout: Layout, *, read_only: bool) -> None:
        self.number = next(_numbers)
        """Of this process's life."""
        self.memory = SharedMemory(layout.total_bytes, read_only=read_only)
        self.readers = 0
        """Who were promised or sent the version that it holds, and have not let go of it."""
        self.may_be_read = False
        """A reader vanished, who may read it for ever."""

    @property
    def array(self) -> Bytes:
        return self.memory.array


@dataclasses.dataclass
class _Coming:
    """A version that is being copied."""

    task: asyncio.Task[Slot]
    waiting: int = 0
    """Who will be its readers."""


class VersionSlots:
    """One read-only copy of a version for all who read it here.

    A slot is written again only when it is not the newest version's and its
    readers have all let go of it. Lives on the event loop.
    """

    def __init__(self, packed: PackedVersions) -> None:
        self._packed = packed
        self._layout = layout = packed.layout
        self._places = [slice(t.offset, t.end) for t in layout.tensors]
        self._at_once = layout.total_bytes <= PART_BYTES
        self._newest: tuple[int, Slot] | None = None
        self._free: list[Slot] = []
        self._coming: dict[int, _Coming] = {}
        self.alive: set[int] = set()
        """Numbers of all slots."""
        self.dropped = 0
        """How many are not alive any more."""

    def ready(self, published: Published) -> Slot | None:
        """The version's slot, if it takes no waiting; until it is let go of it stays as it is.

        Raises:
          OSError: There is not so much memory.
        """
        if self._newest is not None and self._newest[0] == published.version:
            slot = self._newest[1]
        elif self._at_once:
            slot = self._take()
            self._fill(slot, published)
            self._publish(published.version, slot)
        else:
            return None
        slot.readers += 1
        return slot

    async def share(self, published: Published) -> Slot:
        """The version's slot, as `ready`, filled in a thread where that takes long.

        Raises:
          OSError: There is not so much memory.
        """
        slot = self.ready(published)
        if slot is not None:
            return slot
        coming = self._coming.get(published.version)
        if coming is None:
            coming = _Coming(asyncio.create_task(self._share(published)))
            self._coming[published.version] = coming
        coming.waiting += 1
        try:
            return await asyncio.shield(coming.task)
        except asyncio.CancelledError:
            coming.waiting -= 1
            if coming.task.done() and not coming.task.cancelled() and not coming.task.exception():
                self.release(coming.task.result())
            raise

    def release(self, slot: Slot) -> None:
        """A reader has let go of it."""
        slot.readers -= 1
        self._free_if_unread(slot)

    def drop(self, slot: Slot) -> None:
        """A reader vanished, who may still read it: it is never written again."""
        slot.may_be_read = True
        if self._newest is not None and self._newest[1] is slot:
            self._newest = None
        self.release(slot)

    async def _share(self, published: Published) -> Slot:
        slot = None
        try:
            slot = self._take()
            await asyncio.to_thread(self._fill, slot, published)
        except BaseException:
            del self._coming[published.version]
            if slot is not None:
                self._forget(slot)
            raise
        # Counted now: before they wake up, a newer version may have taken this one's place.
        slot.readers += self._coming.pop(published.version).waiting
        self._publish(published.version, slot)
        return slot

    def _take(self) -> Slot:
        if self._free:
            return self._free.pop()
        slot = Slot(self._layout, read_only=True)
        self.alive.add(slot.number)
        return slot

    def _fill(self, slot: Slot, published: Published) -> None:
        leaves = (leaf.reshape(-1).view(np.uint8) for leaf in self._packed.arrays(published))
        copy([(slot.array[place], leaf) for place, leaf in zip(self._places, leaves, strict=True)])

    def _publish(self, version: int, slot: Slot) -> None:
        if self._newest is not None and self._newest[0] > version:
            self._free_if_unread(slot)  # whoever asked for it will read it, and nobody else
            return
        old, self._newest = self._newest, (version, slot)
        if old is not None:
            self._free_if_unread(old[1])

    def _free_if_unread(self, slot: Slot) -> None:
        is_newest = self._newest is not None and self._newest[1] is slot
        if slot.readers or is_newest or slot.number not in self.alive:
            return
        if slot.may_be_read or len(self._free) >= SPARE:
            self._forget(slot)
        else:
            self._free.append(slot)

    def _forget(self, slot: Slot) -> None:
        if slot.number in self.alive:
            self.alive.discard(slot.number)
            self.dropped += 1
            slot.memory.close()


class GradientSlots:
    """One worker's slots, which it alone writes: each from a ticket until its gradient is applied.

    Not given to another worker, ever: this one may be slow, and write late.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._free: list[Slot] = []
        self._assigned: dict[int, Slot] = {}
        self.alive: set[int] = set()
        """Numbers of all slots."""
        self.dropped = 0

    def assign(self, ticket: int) -> Slot:
        """A slot for a ticket's gradient.

        Raises:
          OSError: There is not so much memory.
        """
        slot = self._free.pop() if self._free else Slot(self._layout, read_only=False)
        self.alive.add(slot.number)
        self._assigned[ticket] = slot
        return slot

    def written(self, ticket: int) -> Slot | None:
        """The ticket's slot, which its worker has written; once."""
        return self._assigned.pop(ticket, None)

    def give_back(self, slot: Slot) -> Callable[[], None]:
        """What frees a slot that was written."""
        return lambda: self._free_again(slot)

    def _free_again(self, slot: Slot) -> None:
        if len(self._free) < SPARE:
            self._free.append(slot)
        else:
            self.alive.discard(slot.number)
            self.dropped += 1
            slot.memory.close()
