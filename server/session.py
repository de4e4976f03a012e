"""One worker's stream: its messages in, the server's messages out.

Reading and writing are separate tasks, so that a worker that is slow to take
its weights can still be heard. Gradients are put together here, part by part,
in staging memory that the coordinator hands out; what they mean is decided
there. Nothing a peer sends is trusted before it was checked.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused
from headwater.protos.layout import Bytes
from headwater.protos.wire import PART_BYTES, MalformedMessage, unframe
from headwater.server.admission import Ticket
from headwater.server.encoder import Encoder
from headwater.server.roster import Member
from headwater.server.store import Published

if TYPE_CHECKING:
    from headwater.server.coordinator import Coordinator

WRITE_TIMEOUT_S = 30.0
"""Seconds that a message of about 1 MiB may take to leave: a slower reader is cut."""

Context = grpc.aio.ServicerContext[Any, Any]


@dataclasses.dataclass
class _Incoming:
    """A gradient on its way in."""

    ticket: Ticket
    push: pb.Push
    buffer: Bytes
    received: int = 0


class Session:
    """A worker's stream from hello to its end. `run` does it all."""

    def __init__(self, coordinator: Coordinator, encoder: Encoder, context: Context) -> None:
        self._coordinator = coordinator
        self._encoder = encoder
        self._context = context
        self._outbox: deque[tuple[pb.ServerMessage, Published | None]] = deque()
        self._outbox_filled = asyncio.Event()
        self._over: asyncio.Future[Refused | None] = asyncio.get_running_loop().create_future()
        self._sent_time = coordinator.run.clock()
        self._member: Member | None = None
        self._incoming: _Incoming | None = None

    # --------------------------------------------- what the coordinator calls

    def send(self, message: pb.ServerMessage, weights: Published | None = None) -> None:
        """Queue a message, with a version's weights before its ticket."""
        self._outbox.append((message, weights))
        self._outbox_filled.set()

    def quiet_for(self, seconds: float) -> bool:
        """Whether nothing was sent for so long, and nothing is about to be."""
        idle_s = self._coordinator.run.clock() - self._sent_time
        return not self._outbox_filled.is_set() and idle_s > seconds

    def end(self, reason: Reason, message: str) -> None:
        """End the stream with a refusal."""
        if not self._over.done():
            self._over.set_result(Refused(reason, message))

    # ----------------------------------------------------------------- running

    async def run(self, requests: AsyncIterator[bytes]) -> None:
        """Serve the stream until either side ends it.

        Raises:
          Refused: It was ended with a reason.
        """
        reader = asyncio.create_task(self._read(requests))
        writer = asyncio.create_task(self._write())
        try:
            ends: list[asyncio.Future[Any]] = [reader, writer, self._over]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._over.done() and (refused := self._over.result()):
                raise refused
            for task in (reader, writer):
                if task.done():
                    task.result()  # raises what it raised
        finally:
            for task in (reader, writer):
                task.cancel()
            try:
                await asyncio.wait((reader, writer))
            finally:
                # Whatever they ended with: gRPC has many words for a peer that has gone.
                for task in (reader, writer):
                    if task.done() and not task.cancelled():
                        task.exception()
                if self._member is not None:
                    self._coordinator.lost(self._member)
                self._drop_incoming()

    async def _write(self) -> None:
        """Send what is queued; returns when bye has been sent."""
        while True:
            await self._outbox_filled.wait()
            while self._outbox:
                message, weights = self._outbox.popleft()
                last = message.SerializeToString()
                if weights is not None:
                    final = b""
                    async for part in self._encoder.parts(weights):
                        if final:
                            await self._write_one(final)
                        final = part
                    last += final
                await self._write_one(last)
                if message.HasField("bye"):
                    return
            self._outbox_filled.clear()

    async def _write_one(self, data: bytes) -> None:
        try:
            # Not wait_for: before Python 3.12 it may lose the cancellation of this task.
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._context.write(data)
        except TimeoutError:
            raise Refused(
                Reason.SLOW_READER, f"{len(data)} bytes were not taken in {WRITE_TIMEOUT_S:.0f} s"
            ) from None
        self._coordinator.run.figures.bytes_out += len(data)
        self._sent_time = self._coordinator.run.clock()

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        """Handle what comes, until the worker ends its side."""
        async for data in requests:
            self._coordinator.run.figures.bytes_in += len(data)
            try:
                message, body = unframe(pb.WorkerMessage, data)
            except MalformedMessage as error:
                raise Refused(Reason.MALFORMED, str(error)) from None
            if self._member is None:
                self._member = self._join(message)
            else:
                self._coordinator.heard(self._member)
                self._handle(self._member, message, body)

    def _join(self, message: pb.WorkerMessage) -> Member:
        if message.WhichOneof("kind") != "hello":
            raise Refused(Reason.MALFORMED, "the first message of a stream is hello")
        return self._coordinator.join(self, message.hello)

    def _handle(self, member: Member, message: pb.WorkerMessage, body: memoryview | None) -> None:
        kind = message.WhichOneof("kind")
        if kind == "push":
            self._begin_push(member, message.push, body)
        elif kind == "push_part":
            self._add_part(member, message.push_part, body)
        elif kind == "progress":
            self._coordinator.progress(member, message.progress)
        elif kind == "ready":
            self._coordinator.ready(member)
        elif kind == "leave":
            self._coordinator.say_bye(member, pb.BYE_LEFT, "")
        else:
            raise Refused(Reason.MALFORMED, f"unexpected message: {kind or 'no kind'}")

    # ----------------------------------------------------------------- pushes

    def _begin_push(self, member: Member, push: pb.Push, body: memoryview | None) -> None:
        if self._incoming is not None:
            missing = self._coordinator.run.layout.total_bytes - self._incoming.received
            self._reject(member, f"a new push began while {missing} bytes of the last were missing")
        ticket = self._coordinator.admit(member, push)
        if ticket is not None:
            self._incoming = _Incoming(ticket, push, self._coordinator.run.staging.take())
            self._take_bytes(member, 0, body)

    def _add_part(self, member: Member, part: pb.PushPart, body: memoryview | None) -> None:
        incoming = self._incoming
        if incoming is None or part.token != incoming.push.token:
            # The rest of a push that was answered already: refused, or its ticket lost.
            _check_size(len(body or b""))
            return
        self._take_bytes(member, part.offset, body)

    def _take_bytes(self, member: Member, offset: int, body: memoryview | None) -> None:
        incoming = self._incoming
        assert incoming is not None
        total = len(incoming.buffer)
        size = len(body) if body is not None else 0
        end = offset + size
        if not self._coordinator.still_wanted(member, incoming.ticket, incoming.push.token):
            self._drop_incoming()
        elif offset != incoming.received:
            self._reject(
                member,
                f"a part begins at byte {offset} of the gradient; the next to come is byte "
                f"{incoming.received} (twice, missing or out of order)",
            )
        elif end > total:
            self._reject(member, f"a part ends at byte {end}; the gradient has {total} bytes")
        elif size > PART_BYTES:
            self._reject(member, f"a part has {size} bytes; at most {PART_BYTES} are taken")
        elif size == 0 and total > 0:
            self._reject(member, "a part has no body")
        else:
            if body is not None and size:
                incoming.buffer[offset:end] = np.frombuffer(body, np.uint8)
            incoming.received = end
            if end == total:
                self._incoming = None
                self._coordinator.received(member, incoming.ticket, incoming.push, incoming.buffer)

    def _reject(self, member: Member, message: str) -> None:
        incoming = self._incoming
        assert incoming is not None
        self._drop_incoming()
        self._coordinator.reject_malformed(member, incoming.ticket, incoming.push.token, message)

    def _drop_incoming(self) -> None:
        if self._incoming is not None:
            self._coordinator.run.staging.give_back(self._incoming.buffer)
            self._incoming = None


def _check_size(size: int) -> None:
    """Bound what is thrown away, too."""
    if size > PART_BYTES:
        raise Refused(Reason.MALFORMED, f"a part has {size} bytes; at most {PART_BYTES} are taken")
