"""One worker's stream: its messages in, the server's messages out.

Reading and writing are separate tasks, so that a worker that is slow to take
its weights can still be heard. Gradients are put together here, part by part,
in staging memory that the coordinator hands out; what they mean is decided
there. Nothing a peer sends is trusted before it was checked.

A worker on this machine may come in through the door (door.py): then its messages,
and ours to it, go over a line of its own, and tensors through shared memory. The
stream stays what it was: the worker's membership.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused
from headwater.protos.wire import PART_BYTES, MalformedMessage, unframe
from headwater.server.admission import Ticket
from headwater.server.door import Door, ServerLine
from headwater.server.encoder import Encoder
from headwater.server.roster import Member
from headwater.server.shared_line import SharedLine, not_slower
from headwater.server.slots import VersionSlots
from headwater.server.staging import Staged
from headwater.server.store import Published

if TYPE_CHECKING:
    from headwater.server.coordinator import Coordinator

Context = grpc.aio.ServicerContext[Any, Any]


@dataclasses.dataclass
class _Incoming:
    """A gradient on its way in."""

    ticket: Ticket
    push: pb.Push
    staged: Staged
    received: int = 0


@dataclasses.dataclass(frozen=True)
class Ways:
    """How tensors leave the server; shared by all sessions."""

    encoder: Encoder
    """For workers."""
    readers_encoder: Encoder
    evaluators_encoder: Encoder
    """For readers who ask for the weights to evaluate; may be the readers' own."""
    versions: VersionSlots
    door: Door | None
    """None: there is none for anybody."""

    def close(self) -> None:
        self.encoder.close()
        self.readers_encoder.close()
        self.evaluators_encoder.close()
        if self.door is not None:
            self.door.close()


class Session:
    """A worker's stream from hello to its end. `run` does it all."""

    def __init__(self, coordinator: Coordinator, ways: Ways, context: Context) -> None:
        self._coordinator = coordinator
        self._ways = ways
        self._context = context
        self._line: SharedLine | None = None
        self._offer: pb.SameHost | None = None
        # Its first is being sent; taken out when it has left.
        self._outbox: deque[tuple[pb.ServerMessage, Published | None]] = deque()
        self._outbox_filled = asyncio.Event()
        self._over: asyncio.Future[Refused | None] = asyncio.get_running_loop().create_future()
        self._sent_time = coordinator.run.clock()
        self._member: Member | None = None
        self._incoming: _Incoming | None = None

    # --------------------------------------------- what the coordinator calls

    def send(self, message: pb.ServerMessage, weights: Published | None = None) -> None:
        """Send a message, with a version's weights before its ticket; or queue it."""
        if message.HasField("welcome") and self._ways.door is not None:
            self._offer = self._ways.door.offer(self._attach)
            message.welcome.same_host.CopyFrom(self._offer)
        line = self._line
        if line is not None and not self._outbox and line.send_at_once(message, weights):
            self._sent_time = self._coordinator.run.clock()
            return
        self._outbox.append((message, weights))
        self._outbox_filled.set()

    def quiet_for(self, seconds: float) -> bool:
        """Whether nothing was sent for so long, and nothing is about to be."""
        idle_s = self._coordinator.run.clock() - self._sent_time
        return not self._outbox and idle_s > seconds

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
                self._leave_line()

    # --------------------------------------------------------------- same host

    def _attach(self, connection: ServerLine) -> None:
        """The worker has come in through the door: go on over its line."""
        assert self._member is not None
        self._offer = None
        self._line = SharedLine(connection, self._ways.versions, self._coordinator)
        self._member.transport = "shm"
        connection.on_message = self._line_read
        connection.on_end = self._line_ended
        self.send(pb.ServerMessage(stamp=self._coordinator.run.stamp()))

    def _line_read(self, data: bytes) -> None:
        if self._over.done():
            return
        try:
            self._take(data)
        except Exception as error:
            self._over.set_exception(error)

    def _line_ended(self, error: Exception | None) -> None:
        if self._over.done():
            return
        if isinstance(error, MalformedMessage):
            self._over.set_result(Refused(Reason.MALFORMED, str(error)))
        else:
            self._over.set_result(None)

    def _leave_line(self) -> None:
        if self._offer is not None and self._ways.door is not None:
            self._ways.door.withdraw(self._offer)
        if self._line is not None:
            self._line.close()

    async def _write(self) -> None:
        """Send what is queued; returns when bye has been sent."""
        while True:
            await self._outbox_filled.wait()
            while self._outbox:
                message, weights = self._outbox[0]
                if self._line is not None:
                    await self._write_on_line(self._line, message, weights)
                else:
                    await self._write_parts(self._write_one, message, weights)
                self._outbox.popleft()
                if message.HasField("bye"):
                    return
            self._outbox_filled.clear()

    async def _write_on_line(
        self, line: SharedLine, message: pb.ServerMessage, weights: Published | None
    ) -> None:
        slot = await line.share(weights) if weights is not None else None
        if weights is not None and slot is None:
            await self._write_parts(line.write_part, message, weights)
        else:
            line.send(message, weights, slot)
            await line.drain()
        self._sent_time = self._coordinator.run.clock()

    async def _write_parts(
        self,
        write: Callable[[bytes], Awaitable[None]],
        message: pb.ServerMessage,
        weights: Published | None,
    ) -> None:
        last = message.SerializeToString()
        if weights is not None:
            final = b""
            async for part in self._ways.encoder.parts(weights):
                if final:
                    await write(final)
                final = part
            last += final
        await write(last)

    async def _write_one(self, data: bytes) -> None:
        async with not_slower(len(data)):
            await self._context.write(data)
        self._coordinator.run.figures.bytes_out += len(data)
        self._sent_time = self._coordinator.run.clock()

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        """Handle what comes, until the worker ends its side."""
        try:
            async with asyncio.timeout(self._coordinator.run.config.session_timeout_s):
                first = await anext(requests)  # from then on the roster knows when it was heard
        except TimeoutError:
            raise Refused(Reason.SILENT, "nothing came on the stream") from None
        except StopAsyncIteration:
            return
        self._take(first)
        async for data in requests:
            self._take(data)

    def _take(self, data: bytes) -> None:
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
        self._coordinator.check_tallies(member, push)
        if self._incoming is not None:
            missing = self._coordinator.run.pushed.total_bytes - self._incoming.received
            self._reject(member, f"a new push began while {missing} bytes of the last were missing")
        written = None
        if self._line is not None and self._coordinator.tickets.token_is_mine(push.token):
            written = self._line.pushed(push)
            member.has_version = -1  # it let go of those weights
        ticket = self._coordinator.admit(member, push)
        if push.slot and ticket is not None and written is None:
            self._coordinator.reject_malformed(
                member, ticket, push.token, f"slot {push.slot} is not its ticket's"
            )
        elif push.slot:
            self._take_slot(member, ticket, push, written)
        elif ticket is not None:
            self._incoming = _Incoming(ticket, push, self._coordinator.run.staging.take())
            self._take_bytes(member, 0, body)

    def _take_slot(
        self, member: Member, ticket: Ticket | None, push: pb.Push, written: Staged | None
    ) -> None:
        """A gradient that is whole in shared memory."""
        if ticket is None or not self._coordinator.still_wanted(member, ticket, push.token):
            if written is not None:
                written.give_back()
            return
        assert written is not None
        self._coordinator.run.figures.bytes_in += len(written.buffer)
        self._coordinator.received(member, ticket, push, written)

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
        total = len(incoming.staged.buffer)
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
                incoming.staged.buffer[offset:end] = np.frombuffer(body, np.uint8)
            incoming.received = end
            if end == total:
                self._incoming = None
                self._coordinator.received(member, incoming.ticket, incoming.push, incoming.staged)

    def _reject(self, member: Member, message: str) -> None:
        incoming = self._incoming
        assert incoming is not None
        self._drop_incoming()
        self._coordinator.reject_malformed(member, incoming.ticket, incoming.push.token, message)

    def _drop_incoming(self) -> None:
        if self._incoming is not None:
            self._incoming.staged.give_back()
            self._incoming = None


def _check_size(size: int) -> None:
    """Bound what is thrown away, too."""
    if size > PART_BYTES:
        raise Refused(Reason.MALFORMED, f"a part has {size} bytes; at most {PART_BYTES} are taken")
