"""A worker's line from the door, and the memory that it shares with the server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused
from headwater.protos.wire import PART_BYTES
from headwater.server.door import ServerLine
from headwater.server.slots import GradientSlots, Slot, VersionSlots
from headwater.server.staging import Staged
from headwater.server.store import Published

if TYPE_CHECKING:
    from headwater.server.coordinator import Coordinator

log = logging.getLogger("headwater.server")

WRITE_TIMEOUT_S = 30.0
"""Seconds that a message of about 1 MiB may take to leave: a slower reader is cut."""


@dataclasses.dataclass
class _Read:
    """A version that the worker reads, until it has pushed all that is based on it."""

    slot: Slot
    tickets: int = 0


class SharedLine:
    """A worker's line, and the memory that it shares with the server."""

    def __init__(
        self, connection: ServerLine, versions: VersionSlots, coordinator: Coordinator
    ) -> None:
        self._connection = connection
        self._versions = versions
        self._coordinator = coordinator
        self._gradients = GradientSlots(coordinator.run.pushed)
        self._reads: dict[int, _Read] = {}  # by version
        self._known: set[int] = set()  # slots that the worker was given
        self._dropped = 0  # slots that were gone when it was last told of such

    def send_at_once(self, message: pb.ServerMessage, weights: Published | None) -> bool:
        """Send a message if it takes no waiting; else nothing was sent."""
        if not self._connection.is_drained or message.HasField("bye"):
            return False
        slot = None
        if weights is not None:
            with contextlib.suppress(OSError):  # no memory: they go in parts
                slot = self._versions.ready(weights)
            if slot is None:
                return False
        self.send(message, weights, slot)
        return True

    async def share(self, weights: Published) -> Slot | None:
        """The slot for weights to be sent, by `send`; None if there is no memory for them."""
        try:
            return await self._versions.share(weights)
        except OSError as error:
            log.warning("no memory to share with workers on this machine: %s", error)
            return None

    def send(self, message: pb.ServerMessage, weights: Published | None, slot: Slot | None) -> None:
        """Send a message, with the weights in `slot`."""
        used = []
        if weights is not None and slot is not None:
            if weights.version in self._reads:
                self._versions.release(slot)
                slot = self._reads[weights.version].slot
            else:
                self._reads[weights.version] = _Read(slot)
            used.append(slot)
            size = self._coordinator.run.pulled.total_bytes
            message.weights.version, message.weights.slot = weights.version, slot.number
            message.weights.total_bytes = size
            self._coordinator.run.figures.bytes_out += size
        if message.HasField("ticket"):
            if read := self._reads.get(message.ticket.base):
                read.tickets += 1
            with contextlib.suppress(OSError):  # no memory: then the gradient comes in parts
                slot = self._gradients.assign(message.ticket.token.number)
                message.ticket.gradient_slot = slot.number
                used.append(slot)
        new = [slot for slot in used if slot.number not in self._known]
        message.new_slots.extend(slot.number for slot in new)
        self._known.update(message.new_slots)
        self._tell_what_is_gone(message)
        self._send(message.SerializeToString(), [slot.memory.descriptor for slot in new])

    async def write_part(self, data: bytes) -> None:
        """Send bytes that carry tensors themselves."""
        self._send(data)
        await self.drain()

    async def drain(self) -> None:
        """Returns when all that was sent has left."""
        async with not_slower(PART_BYTES):
            await self._connection.drain()

    def pushed(self, push: pb.Push) -> Staged | None:
        """The worker has let go of the push's weights; where its gradient is."""
        read = self._reads.get(push.base)
        if read is not None:
            read.tickets -= 1
            if not read.tickets:
                self._versions.release(self._reads.pop(push.base).slot)
        written = self._gradients.written(push.token.number)
        if written is None:
            return None
        give_back = self._gradients.give_back(written)
        if written.number != push.slot:
            give_back()
            return None
        return Staged(written.array, give_back, is_shared=True)

    def close(self) -> None:
        for read in self._reads.values():
            self._versions.drop(read.slot)
        self._reads.clear()
        self._connection.close()

    def _tell_what_is_gone(self, message: pb.ServerMessage) -> None:
        dropped = self._versions.dropped + self._gradients.dropped
        if dropped != self._dropped:
            self._dropped = dropped
            gone = self._known - self._versions.alive - self._gradients.alive
            message.gone_slots.extend(gone)
            self._known -= gone

    def _send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        self._coordinator.run.figures.bytes_out += len(data)
        self._connection.send(data, descriptors)


@contextlib.asynccontextmanager
async def not_slower(size: int) -> AsyncIterator[None]:
    """Give a message of so many bytes its time to leave.

    Raises:
      Refused: SLOW_READER.
    """
    try:
        # Not wait_for: before Python 3.12 it may lose the cancellation of this task.
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            yield
    except TimeoutError:
        raise Refused(
            Reason.SLOW_READER, f"{size} bytes were not taken in {WRITE_TIMEOUT_S:.0f} s"
        ) from None
