"""The RPCs: each finds the object that does it. No arithmetic, no decisions.

Refusals become a status and a reason by the table in errors.py; any other
exception is logged here and told to the peer as "internal error" alone.
"""

from __future__ import annotations

import functools
import logging
import math
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import REASON_KEY, Reason, Refused
from headwater.protos.wire import frame
from headwater.server.coordinator import Coordinator
from headwater.server.saver import Saver
from headwater.server.session import Session, Ways
from headwater.server.shared_line import not_slower
from headwater.server.status import status

log = logging.getLogger("headwater.server")

Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[..., Awaitable[Any]]

MAX_TEXT = 2000
"""Characters of an error's text; gRPC drops what is over 8 KiB, and the reason with it."""

MAX_WAIT_S = 60.0
"""Seconds a Pull may wait; readers ask again."""


def _answered(method: Method) -> Method:
    """Turn what a method raises into a status that tells a peer only what it may know."""

    @functools.wraps(method)
    async def answered(self: Service, request: Any, context: Context) -> Any:
        try:
            if isinstance(request, DecodeError):
                raise Refused(Reason.MALFORMED, f"the request is no message: {request}")
            return await method(self, request, context)
        except Refused as refused:
            reason = ((REASON_KEY, refused.reason.name),)
            text = textwrap.shorten(str(refused), MAX_TEXT, placeholder=" …")
            await context.abort(refused.reason.code, text, trailing_metadata=reason)
        except (grpc.RpcError, grpc.aio.BaseError):
            raise  # the peer has gone
        except Exception:
            log.exception("%s failed", method.__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")

    return answered


class Service:
    """The .proto's service. `on_stop` and `on_evaluation` belong to who runs the server."""

    def __init__(
        self,
        coordinator: Coordinator,
        ways: Ways,
        saver: Saver,
        on_stop: Callable[[], None],
        on_evaluation: Callable[[pb.EvaluationReport], None],
    ) -> None:
        self._coordinator = coordinator
        self._run = coordinator.run
        self._ways = ways
        self._saver = saver
        self._on_stop = on_stop
        self._on_evaluation = on_evaluation

    @_answered
    async def Exchange(self, requests: AsyncIterator[bytes], context: Context) -> None:
        await Session(self._coordinator, self._ways, context).run(requests)

    @_answered
    async def PushGradient(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> pb.SessionReply:
        return await self._coordinator.session_pushes.push(requests)

    @_answered
    async def Pull(self, request: pb.PullRequest, context: Context) -> None:
        run = self._run
        run.identity.check_run(request.run_id, request.seen_incarnation, run.current.incarnation)
        same_life = request.seen_incarnation == run.current.incarnation
        if same_life and request.have_version > run.current.version:
            raise Refused(
                Reason.FUTURE_VERSION,
                f"version {request.have_version} of incarnation {run.current.incarnation} has "
                f"never been made; the newest is version {run.current.version}",
            )
        await self._wait(request)
        epoch, published = run.ledger.epoch, run.current
        if request.evaluates:
            epoch, published = run.evaluations.oldest(request.min_epoch) or (epoch, published)
        first = pb.PullReply(
            stamp=run.stamp(),
            run_id=run.identity.run_id,
            state=run.state,
            epoch=epoch,
            epochs=run.order.epochs,
        )
        if same_life and request.have_version and request.have_version == published.version:
            await self._write(context, frame(first))
            return
        first.layout.CopyFrom(run.layout.to_proto())
        head = frame(first)
        # Alone, because the layout of a model with many tensors is itself large.
        await self._write(context, head)
        ways = self._ways
        encoder = ways.evaluators_encoder if request.for_evaluation else ways.readers_encoder
        async for part in encoder.parts(published):
            await self._write(context, part)

    async def _wait(self, request: pb.PullRequest) -> None:
        run = self._run
        wait_s = min(max(request.wait_s, 0.0), MAX_WAIT_S) if math.isfinite(request.wait_s) else 0.0
        if request.evaluates:
            run.evaluations.begin_wait()
        try:
            end = run.clock() + wait_s
            await self._coordinator.wait_for_version(request.min_version, wait_s)
            await self._coordinator.wait_for_epoch(request.min_epoch, end - run.clock())
        finally:
            if request.evaluates:
                run.evaluations.end_wait(run.clock())

    async def _write(self, context: Context, data: bytes) -> None:
        async with not_slower(len(data)):
            await context.write(data)
        self._run.figures.bytes_out += len(data)

    @_answered
    async def GetStatus(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        if request.watches:
            self._run.lookers.asked(context.peer(), self._run.clock())
        return status(self._run)

    @_answered
    async def ReportEvaluation(
        self, request: pb.EvaluationReport, context: Context
    ) -> pb.SteerReply:
        run = self._run
        if request.incarnation != run.current.incarnation or request.version > run.current.version:
            raise Refused(
                Reason.FUTURE_VERSION,
                f"version {request.version} of incarnation {request.incarnation} was never served "
                f"here; the newest is version {run.current.version} of {run.current.incarnation}",
            )
        if request.epoch > run.ledger.epoch:
            raise Refused(
                Reason.MALFORMED,
                f"a version with {request.epoch} complete epochs was reported on; there are "
                f"{run.ledger.epoch}",
            )
        if not 1 <= len(request.metrics) <= 1000:
            raise Refused(
                Reason.MALFORMED, f"{len(request.metrics)} metrics were reported; 1 to 1000 can be"
            )
        run.evaluations.add(request, run.clock())
        self._on_evaluation(request)
        return self._done(f"evaluation of version {request.version} recorded")

    @_answered
    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.SteerReply:
        return self._done(await self._coordinator.steering.pause())

    @_answered
    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.SteerReply:
        return self._done(self._coordinator.steering.resume())

    @_answered
    async def Set(self, request: pb.SetRequest, context: Context) -> pb.SettingsReply:
        at_version = request.at_version if request.HasField("at_version") else None
        message = await self._coordinator.steering.set(request.values, at_version)
        if problem := await self._saver.save(self._run.current):
            message += f"; a crash now would undo it: {problem}"
        return await self._settings(message)

    @_answered
    async def GetSettings(self, request: pb.SettingsRequest, context: Context) -> pb.SettingsReply:
        return await self._settings("")

    async def _settings(self, message: str) -> pb.SettingsReply:
        settings = await self._coordinator.steering.settings()
        return pb.SettingsReply(stamp=self._run.stamp(), settings=settings, message=message)

    @_answered
    async def Evict(self, request: pb.EvictRequest, context: Context) -> pb.SteerReply:
        return self._done(f"{self._coordinator.evict(request.worker)} was evicted")

    @_answered
    async def Snapshot(self, request: pb.SnapshotRequest, context: Context) -> pb.SteerReply:
        published = self._run.current
        if problem := await self._saver.save(published):
            raise Refused(Reason.UNWRITABLE, problem)
        return self._done(f"version {published.version} is durable")

    @_answered
    async def Stop(self, request: pb.StopRequest, context: Context) -> pb.SteerReply:
        self._on_stop()
        return self._done(f"stopping at version {self._run.current.version}")

    def _done(self, message: str) -> pb.SteerReply:
        return pb.SteerReply(stamp=self._run.stamp(), message=message)
