"""The stream to the server: connecting, sending, receiving. Knows nothing of training."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator

import grpc

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.protos.errors import (
    HeadwaterError,
    Reason,
    Refused,
    Unreachable,
    from_rpc_error,
    refusal_of,
)
from headwater.protos.layout import Layout
from headwater.protos.line import Line
from headwater.protos.rpc import Transport
from headwater.protos.wire import PART_BYTES, Framed, MalformedMessage, frame, unframe
from headwater.worker.slots import Slots

log = logging.getLogger("headwater.worker")

PROGRESS_S = 2.0
"""Between progress messages."""

QUEUED_MESSAGES = 4
"""Parts waiting to leave; more would be memory, fewer would leave gaps on the wire."""

SILENCE_S = 15.0
"""Without a message of the server that was waited for, or without room for one of
ours: then the stream is given up. The server says something every few seconds."""

ATTACH_TIMEOUT_S = 5.0
"""For the server to answer at its door."""

STATUS_TIMEOUT_S = 5.0
"""For one answer about the dial."""

_COMES_BACK = {Reason.SILENT, Reason.SLOW_READER, Reason.SERVER_ENDED}
"""Refusals that a new connection may mend."""


class Disconnected(Exception):
    """The stream has ended; connect again and ask anew."""


class Link:
    """One stream, from its opening to its end.

    With a server on the same machine its messages may go over a line beside it, from
    `attach` on; how the stream ends still tells how the server ended it.

    A thread tells the server every two seconds how the worker gets on, however
    long computing takes; `progress` says what. It also ends a stream on which
    nothing comes any more: gRPC itself may take more than a minute to find out.
    """

    def __init__(self, address: str, progress: Callable[[], pb.Progress]) -> None:
        self._address = address
        self._progress = progress
        self.silence_s = SILENCE_S
        """May be set."""
        self._waiting_since: float | None = time.monotonic()
        self._given_up = ""
        self._outgoing: queue.Queue[bytes | None] = queue.Queue(QUEUED_MESSAGES)
        self._closed = threading.Event()
        self._line: Line | None = None
        self._ahead: queue.SimpleQueue[bytes | grpc.RpcError | None] | None = None
        self.slots: Slots | None = None
        """What the server shares, once it does."""
        self._channel = rpc.connect(address)
        self._call = rpc.Stub(self._channel).Exchange(iter(self._outgoing.get, None))
        threading.Thread(target=self._report, name="headwater-progress", daemon=True).start()

    def attach(
        self, offer: pb.SameHost, transport: Transport, *, pulled: Layout, pushed: Layout
    ) -> bool:
        """Go on over a line, if this is the server's machine and user; whether it is.

        Args:
          offer: The server's.
          transport: Whether to take it.
          pulled: See `Slots`.
          pushed: See `Slots`.

        Raises:
          HeadwaterError: It is not, and `transport` insists.
        """
        if transport == "grpc":
            return False
        try:
            if not offer.socket:
                raise OSError("the server offers none")
            self._line = _opened(offer, self.silence_s)
        except (OSError, MalformedMessage) as error:
            if transport == "shm":
                raise HeadwaterError(
                    f"--transport shm: no shared memory with the server at {self._address}: "
                    f"{error}; use auto or grpc"
                ) from None
            log.info("tensors travel by gRPC: no shared memory with the server (%s)", error)
            return False
        self.slots = Slots(pulled, pushed)
        log.info("tensors travel through shared memory: the server is on this machine")
        return True

    def work_ahead(self, gradient_bytes: int) -> None:
        """Have room for a whole gradient to leave, and take in what comes, while one computes.

        Over a line that costs nothing: it has room for all that is said there.
        """
        if self._line is None:
            self._outgoing.maxsize = QUEUED_MESSAGES + -(-gradient_bytes // PART_BYTES)
            self._ahead = queue.SimpleQueue()
            threading.Thread(target=self._take_in, name="headwater-receive", daemon=True).start()

    def has_more(self) -> bool:
        """Whether `receive` would return at once, of what was taken in ahead or over a line."""
        if self._line is not None:
            return self._line.has_more()
        return self._ahead is not None and not self._ahead.empty()

    def send(self, message: pb.WorkerMessage, *body: memoryview) -> None:
        """Queue a message, with the pieces of its body; blocks while the network is behind.

        Raises:
          Disconnected: The stream has ended.
        """
        data = frame(message, *body)
        if self._line is not None:
            try:
                return self._line.send(data)
            except TimeoutError:
                raise Disconnected(f"nothing could be sent for {self.silence_s:.0f} s") from None
            except OSError:
                return None  # it has ended; what the server said before that is still to be read
        began = time.monotonic()
        while True:
            try:
                return self._outgoing.put(data, timeout=0.5)
            except queue.Full:
                if not self._call.is_active():
                    raise Disconnected("while sending") from None
                if time.monotonic() - began > self.silence_s:
                    raise Disconnected(
                        f"nothing could be sent for {self.silence_s:.0f} s"
                    ) from None

    def receive(self) -> Iterator[Framed[pb.ServerMessage]]:
        """The server's messages, until it has said everything.

        Raises:
          Refused: The server said no, and a new connection would not change that.
          Disconnected: The stream broke.
        """
        try:
            self._waiting_since = time.monotonic()
            for data in self._call:
                self._waiting_since = None  # what comes while we compute, we do not read
                yield unframe(pb.ServerMessage, data)
                if self._line is not None:
                    yield from self._receive_on(self._line)  # then the stream says how it ended
                elif self._ahead is not None:
                    yield from self._receive_ahead(self._ahead)
                self._waiting_since = time.monotonic()
        except grpc.RpcError as error:
            if self._given_up:
                raise Disconnected(self._given_up) from None
            refusal = refusal_of(error)
            if refusal is not None and refusal.reason not in _COMES_BACK:
                raise refusal from None
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise from_rpc_error(error, self._address) from None
            raise Disconnected(error.details() or error.code().name) from None

    def _receive_on(self, line: Line) -> Iterator[Framed[pb.ServerMessage]]:
        assert self.slots is not None
        while True:
            try:
                received = line.receive()
            except TimeoutError:
                raise Disconnected(self._silence()) from None
            except OSError:
                return  # as at its end
            if received is None:
                return
            framed = unframe(pb.ServerMessage, received.data)
            if framed.message.new_slots or framed.message.gone_slots or received.descriptors:
                self.slots.learn(framed.message, received.descriptors)
            yield framed

    def _take_in(self) -> None:
        assert self._ahead is not None
        try:
            for data in self._call:
                self._ahead.put(data)
        except grpc.RpcError as error:
            self._ahead.put(error)
        else:
            self._ahead.put(None)

    def _receive_ahead(
        self, ahead: queue.SimpleQueue[bytes | grpc.RpcError | None]
    ) -> Iterator[Framed[pb.ServerMessage]]:
        while True:
            self._waiting_since = time.monotonic()
            data = ahead.get()
            self._waiting_since = None
            if data is None:
                return
            if isinstance(data, grpc.RpcError):
                raise data
            yield unframe(pb.ServerMessage, data)

    def _silence(self) -> str:
        return f"nothing was heard from the server for {self.silence_s:.0f} s"

    def end(self) -> None:
        """Have `receive` return, in whatever thread it waits; `close` is still to come."""
        self._call.cancel()
        if self._line is not None:
            self._line.end()

    def close(self) -> None:
        """End the stream; the server takes back whatever was out."""
        self._closed.set()
        self.end()
        if self._line is not None:
            self._line.close()
        self._channel.close()
        # Lets gRPC's sending thread end where it waits for the next message.
        try:
            self._outgoing.put_nowait(None)
        except queue.Full:
            log.debug("closed with messages unsent")

    def _report(self) -> None:
        while not self._closed.wait(PROGRESS_S):
            self._send_progress(frame(pb.WorkerMessage(progress=self._progress())))
            since = self._waiting_since
            if since is not None and time.monotonic() - since > self.silence_s:
                self._given_up = self._silence()
                self._call.cancel()

    def _send_progress(self, message: bytes) -> None:
        try:
            if self._line is not None:
                self._line.send(message)
            else:
                self._outgoing.put_nowait(message)
        except queue.Full:
            log.debug("parts are on their way, and they are progress themselves")
        except OSError:
            log.debug("the line has ended, as who reads it will find")


def _opened(offer: pb.SameHost, timeout_s: float) -> Line:
    """The line that was offered, once the server has answered on it.

    Raises:
      OSError: The server is not here.
      MalformedMessage: What answers is no server of ours.
    """
    line = Line(offer.socket, ATTACH_TIMEOUT_S)
    try:
        line.send(offer.key)
        answer = line.receive()
        if answer is None:
            raise ConnectionError("the server does not know this worker's key")
        line.put_back(answer)  # it may be more than an answer: a bye, say
    except BaseException:
        line.close()
        raise
    line.set_timeout(timeout_s)
    return line


MIN_PAUSE_S, MAX_PAUSE_S = 0.1, 2.0
"""Between attempts to connect."""


class Patience:
    """How long to keep trying to connect.

    The first connection has `first_s` seconds. After one success it tries
    without end, and says so once a minute.
    """

    def __init__(self, address: str, first_s: float) -> None:
        self._address = address
        self._first_s = first_s
        self._began = time.monotonic()
        self._said = self._began
        self.connected_before = False
        """Whether there was a first connection."""
        self._waits_since: float | None = None
        self._last_error = ""

    def connected(self) -> None:
        self.connected_before = True
        self._waits_since = None
        self._began = self._said = time.monotonic()

    def wait(self, error: str, give_up: Callable[[], bool]) -> None:
        """Pause before the next attempt; returns early when `give_up` says so.

        Raises:
          Unreachable: The first connection did not come about in time.
        """
        now = time.monotonic()
        # The first attempt may take longer than that; one more, for what came up meanwhile.
        is_late = now - self._began > self._first_s and self._last_error
        if not self.connected_before and is_late:
            raise Unreachable(
                f"no Headwater server answers at {self._address} (tried for {self._first_s:.0f} s; "
                f"the last error: {error}); start one with `headwater server`, or name another "
                "address with --server HOST:PORT"
            )
        if now - self._said >= 60 or error != self._last_error:
            log.warning("no server at %s (%s); trying again", self._address, error)
            self._said, self._last_error = now, error
        if self._waits_since is None:
            self._waits_since = now
        # Of what it has waited, a tenth: a server that starts is not kept waiting itself.
        end = now + min(MAX_PAUSE_S, max(MIN_PAUSE_S, (now - self._waits_since) / 10))
        while time.monotonic() < end and not give_up():
            time.sleep(0.05)


def consistency_of(address: str, patience: Patience) -> str:
    """The position of the server's dial, once it tells.

    Raises:
      Unreachable: Nobody told in time.
    """
    while True:
        with rpc.connect(address) as channel:
            try:
                status = rpc.Stub(channel).GetStatus(pb.StatusRequest(), timeout=STATUS_TIMEOUT_S)
                return str(status.consistency)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    raise from_rpc_error(error, address) from None
                text = error.details() or error.code().name
        patience.wait(text, lambda: False)


def refuse_older(stamp: pb.Stamp, seen_incarnation: int) -> None:
    """Stop rather than train on a past that this worker has outlived.

    Raises:
      Refused: OLD_INCARNATION.
    """
    if stamp.incarnation < seen_incarnation:
        raise Refused(
            Reason.OLD_INCARNATION,
            f"the server is incarnation {stamp.incarnation} of the run, but this worker has seen "
            f"incarnation {seen_incarnation}: it was restored from an older copy. Start it from "
            "the newest copy of the run directory",
        )
