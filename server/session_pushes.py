"""PushGradient: a session's push from its first message to its reply.

    known already?   applied, or on its way: the reply is what became of it
    a place          in the dial and in memory, as for a ticket; else STALE, or wait
    receive          what breaks off is given up: the client sends it again
    held             from here on as any gradient: applied in its turn, by updates.py

Of a session one call counts, the newest. An older one that still receives is given up
before the newer is judged: a client that was told that a push is not applied must
never find it applied after all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import NamedTuple

import numpy as np

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused
from headwater.protos.layout import Bytes
from headwater.protos.wire import PART_BYTES, MalformedMessage, unframe
from headwater.server.admission import Ticket
from headwater.server.push_sessions import PushId, Verdict
from headwater.server.pushers import Pusher, SessionPush, disk_failed, forgotten
from headwater.server.run_state import Run
from headwater.server.staging import Staged
from headwater.server.updates import Updates

log = logging.getLogger("headwater.server")

HOLD_S = 20.0
"""Until a call is answered with HELD, or that there is no room."""


class _Message(NamedTuple):
    head: pb.SessionPush
    body: memoryview


class SessionPushes:
    """All sessions of a run. Every method is called on the event loop.

    Args:
      run: As it stands.
      updates: Gets the gradients.
      pump: Called when more may be applied or granted than before.
    """

    def __init__(self, run: Run, updates: Updates, pump: Callable[[], None]) -> None:
        self._run = run
        self._updates = updates
        self._pump = pump
        self._layout = run.layout.trained
        self._fingerprint = bytes.fromhex(run.layout.fingerprint)
        # Gradients are compressed for workers alone, and count in their size.
        size = -(-self._layout.total_bytes // max(1, run.pushed.total_bytes))
        self._slots = min(run.staging.slots, max(1, size))
        self._receiving: dict[int, Ticket] = {}
        self._on_their_way: dict[int, SessionPush] = {}
        self._waiting_for_room: set[asyncio.Future[None]] = set()

    async def push(self, requests: AsyncIterator[bytes]) -> pb.SessionReply:
        """Take one push; returns what became of it.

        Raises:
          Refused: It is none, or of another run, or the session's past is not known.
        """
        messages = self._messages(requests)
        try:
            async with asyncio.timeout(self._run.config.session_timeout_s):
                head, body = await anext(messages)
        except TimeoutError:
            raise Refused(Reason.SILENT, "nothing came in the call") from None
        except StopAsyncIteration:  # a connection that was cut looks like this, too
            raise Refused(Reason.MALFORMED, "there is no message in the call") from None
        self._check(head)
        run = self._run
        pusher = run.pushers.heard(head, run.roster.next_id, run.clock())
        if pusher.joined_time == pusher.heard_time:
            log.info("%s began to push, without tickets (%s)", pusher.name, pusher.history_name)
        self._give_up(head.session)
        if head.incarnation < run.current.incarnation:
            return self._reply(head, pb.OUTCOME_MISSING, message="it was for an earlier life")
        pusher.under_way += 1
        try:
            return await self._answer(pusher, head, body, messages)
        finally:
            pusher.under_way -= 1

    async def _answer(
        self,
        pusher: Pusher,
        head: pb.SessionPush,
        body: memoryview,
        messages: AsyncIterator[_Message],
    ) -> pb.SessionReply:
        found = self._known(head)
        if found is None and head.asks:
            return self._reply(head, pb.OUTCOME_MISSING, message="it is not here")
        if found is None:
            placed = await self._place(pusher, head)
            if not isinstance(placed, Ticket):
                return placed
            found = await self._receive(pusher, head, placed, body, messages)
        if not isinstance(found, SessionPush):
            return found
        await asyncio.wait({found.answer}, timeout=HOLD_S)
        if not found.answer.done():
            return self._reply(head, pb.OUTCOME_HELD, message="it is kept, and not applied yet")
        answer = found.answer.result()
        if isinstance(answer, Refused):
            raise answer
        return answer

    def wake(self) -> None:
        """There may be room now."""
        for waiting in self._waiting_for_room:
            if not waiting.done():
                waiting.set_result(None)

    def end(self) -> None:
        """No more updates will come: who waits for one is told so.

        But for what is applied and not known to be durable: it may be there when the run is
        continued, and to say that it is not applied would have it pushed again.
        """
        run = self._run
        for push in list(self._on_their_way.values()):
            if run.log_broken:
                push.tell(disk_failed())
            elif run.current.sessions.judge(push.id) is Verdict.REPEATED:
                push.tell(Refused(Reason.SERVER_ENDED, "the server is being stopped"))
            else:
                push.tell(_over())
        self.wake()

    # ---------------------------------------------------------------- checking

    def _check(self, head: pb.SessionPush) -> None:
        run, current = self._run, self._run.current
        if run.log_broken:
            raise disk_failed()
        run.identity.check_run(head.run_id, head.incarnation, current.incarnation)
        for name in ("session", "sequence", "attempt", "run_id", "incarnation", "base_incarnation"):
            if not getattr(head, name):
                raise Refused(Reason.MALFORMED, f"{name} of a session's push must be there, not 0")
        if head.base_incarnation > head.incarnation:
            raise Refused(Reason.MALFORMED, "base_incarnation is later than incarnation")
        if head.layout != self._fingerprint:
            raise Refused(
                Reason.LAYOUT_MISMATCH,
                "the gradient is of other tensors than the server's; pull the weights of this run",
            )
        if head.base_incarnation == current.incarnation and head.base > current.version:
            raise Refused(
                Reason.FUTURE_VERSION,
                f"version {head.base} has never been made; the newest is {current.version}",
            )

    def _check_goes_on(self) -> None:
        run = self._run
        if run.is_done or run.draining or run.state_override is not None:
            raise _over()
        if run.in_groups:
            raise Refused(
                Reason.NOT_IN_SYNC,
                f"consistency is {run.settings.dial}: batches make an update together there, "
                "and a session's push is of none; choose another consistency, or take tickets",
            )

    def _known(self, head: pb.SessionPush) -> SessionPush | pb.SessionReply | None:
        """What there is to say of it without receiving it; None: it is the next to be applied."""
        push = _id(head)
        on_its_way = self._on_their_way.get(push.session)
        if on_its_way is not None and on_its_way.id.sequence == push.sequence:
            return on_its_way
        sessions = self._run.current.sessions
        verdict = sessions.judge(push)
        if verdict is Verdict.FORGOTTEN:
            raise forgotten()
        if verdict is Verdict.REPEATED:
            if not head.asks:
                self._run.figures.duplicate_count += 1
            last = sessions.known[push.session]
            reply = self._reply(head, pb.OUTCOME_DUPLICATE, message=verdict.value)
            if push.sequence == last.sequence:
                reply.version, reply.staleness = last.version, last.staleness
            return reply
        if verdict is Verdict.MISSING or on_its_way is not None:
            return self._reply(head, pb.OUTCOME_MISSING, message=verdict.value)
        return None

    def _base(self, head: pb.SessionPush) -> int:
        """The newest version of this history that the gradient's base was made from."""
        if head.base_incarnation == self._run.current.incarnation:
            return head.base
        # What came after it in that life is not in this history, nor what a later one lost.
        return min(head.base, *self._run.starts[head.base_incarnation :])

    # --------------------------------------------------------------- receiving

    async def _place(self, pusher: Pusher, head: pb.SessionPush) -> Ticket | pb.SessionReply:
        """A place among the gradients under way, or why there is none."""
        run = self._run
        self._check_goes_on()
        end = run.clock() + HOLD_S
        while not run.admission.has_room(self._slots):
            if run.clock() > end:
                return self._reply(head, pb.OUTCOME_MISSING, message="there is no room for it yet")
            await self._room(end - run.clock())
            if pusher.attempt != head.attempt:
                raise _fenced()
        self._check_goes_on()
        ticket = run.admission.announce(
            self._base(head),
            run.current.version,
            run.clock(),
            slots=self._slots,
            deadline_s=run.config.ticket_timeout_s,
        )
        if ticket is None:
            return self._stale(head)
        return ticket

    async def _room(self, timeout_s: float) -> None:
        run, waiting = self._run, asyncio.get_running_loop().create_future()
        self._waiting_for_room.add(waiting)
        run.admission.awaited_slots += self._slots
        try:
            await asyncio.wait({waiting}, timeout=max(0.0, timeout_s))
        finally:
            run.admission.awaited_slots -= self._slots
            self._waiting_for_room.discard(waiting)

    async def _receive(
        self,
        pusher: Pusher,
        head: pb.SessionPush,
        ticket: Ticket,
        body: memoryview,
        messages: AsyncIterator[_Message],
    ) -> SessionPush | pb.SessionReply:
        with self._received_by(head.session, ticket):
            buffer = self._layout.empty()
            error = await self._fill(buffer, ticket, body, messages)
            if self._receiving.get(head.session) is not ticket:
                raise _fenced()
            if self._run.admission.outstanding(ticket.number) is None:
                self._run.admission.unwanted(ticket.number, ticket.worker)
                return self._stale(head)  # the dial was turned, or it took too long
            if self._run.is_done or self._run.state_override is not None:
                raise _over()
            if error:
                self._run.figures.malformed_count += 1
                reply = self._reply(head, pb.OUTCOME_REJECTED, message=error)
                reply.rejected_for = pb.REJECTED_FOR_MALFORMED
                return reply
            loss = head.loss if head.HasField("loss") else None
            answer = asyncio.get_running_loop().create_future()
            push = SessionPush(_id(head), pusher, loss, head.examples, answer)
            self._on_their_way[head.session] = push
            answer.add_done_callback(lambda _: self._answered(push))
            self._updates.received_from_session(ticket, push, Staged(buffer, lambda: None))
        self._pump()
        return push

    @contextlib.contextmanager
    def _received_by(self, session: int, ticket: Ticket) -> Iterator[None]:
        """What has not come whole at the end is given up."""
        self._receiving[session] = ticket
        try:
            yield
        finally:
            if self._receiving.get(session) is ticket:
                self._give_up(session)

    def _give_up(self, session: int) -> None:
        ticket = self._receiving.pop(session, None)
        admission = self._run.admission
        if ticket is not None and admission.outstanding(ticket.number) is ticket:
            admission.refuse(ticket)
            self._pump()

    async def _fill(
        self,
        buffer: Bytes,
        ticket: Ticket,
        body: memoryview,
        messages: AsyncIterator[_Message],
    ) -> str:
        """Put the gradient's bytes together; returns what is wrong with them, if anything."""
        admission, total, received = self._run.admission, len(buffer), 0
        while True:
            end = received + len(body)
            if len(body) > PART_BYTES:
                return f"a part has {len(body)} bytes; at most {PART_BYTES} are taken"
            if end > total:
                return f"a part ends at byte {end}; the gradient has {total} bytes"
            buffer[received:end] = np.frombuffer(body, np.uint8)
            received = end
            if received == total or admission.outstanding(ticket.number) is None:
                return ""
            admission.moved(ticket.number, self._run.clock())
            try:
                async with asyncio.timeout(self._run.config.session_timeout_s):
                    _, body = await anext(messages)
            except StopAsyncIteration:
                missing = f"{total - received} of the gradient's {total} bytes are missing"
                raise Refused(Reason.MALFORMED, missing) from None
            except TimeoutError:
                raise Refused(Reason.SILENT, "the rest of the gradient did not come") from None
            if not len(body):
                return "a part has no body"

    async def _messages(self, requests: AsyncIterator[bytes]) -> AsyncIterator[_Message]:
        async for data in requests:
            self._run.figures.bytes_in += len(data)
            try:
                head, body = unframe(pb.SessionPush, data)
            except MalformedMessage as error:
                raise Refused(Reason.MALFORMED, str(error)) from None
            yield _Message(head, body if body is not None else memoryview(b""))

    # --------------------------------------------------------------- answering

    def _answered(self, push: SessionPush) -> None:
        if self._on_their_way.get(push.id.session) is push:
            del self._on_their_way[push.id.session]

    def _stale(self, head: pb.SessionPush) -> pb.SessionReply:
        self._run.figures.stale_count += 1
        current, dial = self._run.current, self._run.settings.dial
        base = f"version {head.base}"
        if head.base_incarnation != current.incarnation:
            base += f" of incarnation {head.base_incarnation}, which counts as {self._base(head)}"
        text = f"computed at {base}, now {current.version}; consistency is {dial}"
        return self._reply(head, pb.OUTCOME_STALE, message=text)

    def _reply(
        self, head: pb.SessionPush, code: pb.OutcomeCode, *, message: str
    ) -> pb.SessionReply:
        last = self._run.current.sessions.last_sequence(head.session)
        return pb.SessionReply(
            stamp=self._run.stamp(), code=code, message=message, last_sequence=last
        )


def _id(head: pb.SessionPush) -> PushId:
    return PushId(head.session, head.opened_version, head.sequence)


def _fenced() -> Refused:
    return Refused(Reason.FENCED, "a newer call of this session took over")


def _over() -> Refused:
    return Refused(Reason.RUN_OVER, "the run is over, or the server is being stopped")
