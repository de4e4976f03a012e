"""A worker down to its protocol: every step of Exchange by hand, and every mistake too.

Imports no JAX, so that a process can hold many of them. Whatever waits has a
deadline; a server that says nothing fails the test, never hangs it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import numpy as np

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.protos.assembly import Weights
from headwater.protos.compression import Compression, pulls
from headwater.protos.errors import REASON_KEY
from headwater.protos.layout import Layout
from headwater.protos.line import Line
from headwater.protos.shared_memory import attach
from headwater.protos.wire import PART_BYTES, frame, unframe

if TYPE_CHECKING:
    from headwater import Task

TIMEOUT_S = 20.0
"""For anything a server says. Far more than it takes, so that only a fault reaches it."""

Key = tuple[int, int]
"""Epoch and number of a batch."""

Part = tuple[int, bytes]
"""Offset and bytes of a slice of a gradient."""


KINDS = ("welcome", "outcome", "weights", "lease", "ticket", "bye")
"""The fields of a server's message, in the order in which they are to be read."""


class Event(NamedTuple):
    """One field of a server's message: `kind` is its name. `size` counts the body's bytes."""

    kind: str
    value: Any
    size: int


class StreamEnded(Exception):
    """The server ended the stream. `reason` is its word for it, "" where it was no refusal."""

    def __init__(self, code: grpc.StatusCode, reason: str, text: str) -> None:
        super().__init__(f"{code.name} {reason}: {text}")
        self.code = code
        self.reason = reason
        self.text = text


class BareWorker:
    """One worker on a channel of its own. Use as a context, which cuts its stream.

        with BareWorker(address, hello_of(task)) as worker:
            worker.join()
            ticket = worker.ticket()
            worker.push(ticket, gradient)
            assert worker.outcome().code == pb.OUTCOME_APPLIED

    Args:
      hello: What it says at first; `open` adds the attempt.
      instance: Of its process; drawn where not given.
      on_line: Go on over the server's same-host socket before `ready`.
    """

    def __init__(
        self,
        address: str,
        hello: pb.Hello,
        *,
        name: str = "",
        instance: int | None = None,
        on_line: bool = False,
    ) -> None:
        self.hello = pb.Hello()
        self.hello.CopyFrom(hello)
        self.hello.instance = instance or secrets.randbits(63) + 1
        self.hello.name = name or hello.name
        self.layout = Layout.from_proto(hello.layout)
        self.pushed = self.pulled = self.layout
        """Of what is sent for a gradient, and for weights: the welcome says how."""
        self.weights = Weights(self.layout)
        """Put together from what the server sent, and checked on the way."""
        self.leased: dict[Key, list[int]] = {}
        """Batches reserved for it, and their examples."""
        self.stamp = pb.Stamp()
        """Of the newest message."""
        self.events: list[Event] = []
        """All that was heard on this stream, in order."""
        self.pulses: list[pb.Stamp] = []
        """Of the messages that said nothing else."""
        self._address = address
        self._channel: grpc.Channel | None = None
        self._call: Any = None
        self._reader: threading.Thread | None = None
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[tuple[pb.Stamp, Event, Any] | StreamEnded]
        self._may_read = threading.Event()
        self._may_read.set()
        self._unread: dict[str, deque[Any]] = defaultdict(deque)
        self._ended: StreamEnded | None = None
        self._steps = 0
        self._on_line = on_line
        self._line: Line | None = None
        self._line_reader: list[threading.Thread] = []
        self.slots: dict[int, np.ndarray] = {}
        """What the server shares: gradients' slots can be written."""
        self.descriptors: dict[int, int] = {}
        """Of the same."""

    def __enter__(self) -> BareWorker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------- life's steps

    def open(self, **overrides: Any) -> BareWorker:
        """Begin a stream, the next attempt, with a hello; `overrides` are fields of it."""
        self.hello.attempt += 1
        hello = pb.Hello()
        hello.CopyFrom(self.hello)
        for name, value in overrides.items():
            hello.ClearField(name)
            hello.MergeFrom(pb.Hello(**{name: value}))
        self.connect()
        self.send(pb.WorkerMessage(hello=hello))
        return self

    def connect(self) -> BareWorker:
        """Begin a stream and say nothing yet."""
        self.close()
        self._ended = None
        self._unread.clear()
        self.events.clear()
        self.pulses = []
        self.leased.clear()
        self.weights.restart()
        self._outgoing, self._incoming = queue.SimpleQueue(), queue.SimpleQueue()
        self._channel = rpc.connect(self._address)
        self._call = rpc.Stub(self._channel).Exchange(iter(self._outgoing.get, None))
        self._reader = threading.Thread(
            target=_read,
            args=(self._call, self._may_read, self._incoming, self.pulses, self._line_reader),
            name="bare-worker",
            daemon=True,
        )
        self._reader.start()
        return self

    def welcome(self) -> pb.Welcome:
        return self._expect("welcome")

    def attach(self) -> None:
        """Go on over the server's same-host socket, as it offered in its welcome."""
        (welcome,) = self.heard("welcome")
        offer = welcome.same_host
        self._line = Line(offer.socket, TIMEOUT_S)
        self._line.send(offer.key)
        first = self._line.receive()
        assert first is not None, "the server hangs up"
        reader = threading.Thread(target=self._read_line, name="bare-line", daemon=True)
        self._line_reader.append(reader)
        reader.start()

    def ready(self) -> None:
        if self._on_line and self._line is None:
            self.attach()
        self.send(pb.WorkerMessage(ready=pb.Ready()))

    def join(self, **overrides: Any) -> pb.Welcome:
        """Hello, welcome, ready."""
        self.open(**overrides)
        welcome = self.welcome()
        self.ready()
        return welcome

    def ticket(self, timeout_s: float = TIMEOUT_S) -> pb.Ticket:
        """The next ticket, with everything before it taken in."""
        return self._expect("ticket", timeout_s)

    def tickets(self) -> Iterator[pb.Ticket]:
        """Tickets as they come, until bye."""
        while True:
            try:
                yield self.ticket()
            except StreamEnded as ended:
                if ended.code is not grpc.StatusCode.OK:
                    raise
                return

    def push(
        self,
        ticket: pb.Ticket,
        gradient: bytes | np.ndarray | None = None,
        *,
        pieces: Sequence[Part] | None = None,
        **overrides: Any,
    ) -> None:
        """Send a gradient; `overrides` are fields of the push, right unless given.

        Args:
          gradient: The flat buffer; zeros by default.
          pieces: Sent as they are, in place of the gradient's own parts. The
            first goes with the push, whatever offset it claims.
        """
        written = pieces is None and ticket.gradient_slot in self.slots
        if written:
            whole = bytes(self.pushed.total_bytes) if gradient is None else bytes(gradient)
            self.slots[ticket.gradient_slot][:] = np.frombuffer(whole, np.uint8)
            pieces, overrides = [(0, b"")], {"slot": ticket.gradient_slot, **overrides}
        if pieces is None:
            whole = bytes(self.pushed.total_bytes) if gradient is None else bytes(gradient)
            pieces = slices(whole) or [(0, b"")]
        fields = {
            "token": ticket.token,
            "base": ticket.base,
            "incarnation": self.stamp.incarnation,
            **overrides,
        }
        self.send(pb.WorkerMessage(push=pb.Push(**fields)), None if written else pieces[0][1])
        self.send_parts(fields["token"], pieces[1:])

    def send_parts(self, token: pb.Token, pieces: Iterable[Part]) -> None:
        for offset, body in pieces:
            part = pb.PushPart(token=token, offset=offset)
            self.send(pb.WorkerMessage(push_part=part), body)

    def outcome(self, timeout_s: float = TIMEOUT_S) -> pb.Outcome:
        """What became of the next push that was not asked about yet."""
        return self._expect("outcome", timeout_s)

    def bye(self) -> pb.Bye:
        return self._expect("bye")

    def progress(self, *, moving: bool, phase: pb.Phase = pb.PHASE_COMPUTING) -> None:
        """Say that it lives; `moving` says that something was done since."""
        self._steps += moving
        self.send(pb.WorkerMessage(progress=pb.Progress(phase=phase, steps=self._steps)))

    def leave(self) -> None:
        self.send(pb.WorkerMessage(leave=pb.Leave()))

    def cut(self) -> None:
        """End the stream as a killed process would, without a word."""
        self._call.cancel()
        if self._line is not None:
            self._line.end()

    def done_sending(self) -> None:
        """Close this side of the stream in order, without a leave."""
        self._outgoing.put(None)

    @contextlib.contextmanager
    def not_reading(self) -> Iterator[None]:
        """Take nothing from the connection, so that the server's bytes pile up."""
        self._may_read.clear()
        try:
            yield
        finally:
            self._may_read.set()

    def close(self) -> None:
        """Cut the stream if there is one, and wait until its threads have ended."""
        if self._channel is None or self._reader is None:
            return
        self._may_read.set()
        self.cut()
        self._outgoing.put(None)
        self._reader.join(TIMEOUT_S)
        if self._line is not None:
            self._line.close()
            self._line = None
        self._line_reader.clear()
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()
        self.slots.clear()
        self._channel.close()
        self._channel = None

    # ------------------------------------------------------------------- below

    def send(self, message: pb.WorkerMessage, body: bytes | None = None) -> None:
        self.send_bytes(frame(message, *(() if body is None else (body,))))

    def send_bytes(self, data: bytes) -> None:
        """Anything at all, as one message."""
        if self._line is None:
            self._outgoing.put(data)
            return
        with contextlib.suppress(OSError):  # it has ended, as the stream will say
            self._line.send(data)

    def end(self) -> StreamEnded:
        """How the server ended the stream; waits for it, taking in what comes before."""
        end = time.monotonic() + TIMEOUT_S
        try:
            while True:
                self.next(end - time.monotonic())
        except StreamEnded as ended:
            return ended

    def next(self, timeout_s: float = TIMEOUT_S) -> Event:
        """The next field of the server's messages, taken in.

        Raises:
          StreamEnded: There is none.
        """
        if self._ended is not None:
            raise self._ended
        try:
            found = self._incoming.get(timeout=max(timeout_s, 0.001))
        except queue.Empty:
            heard = ", ".join(event.kind for event in self.events) or "nothing"
            raise AssertionError(f"no message within {timeout_s:.1f} s after: {heard}") from None
        if isinstance(found, StreamEnded):
            self._ended = found
            raise found
        self.stamp, event, body = found
        self._take_in(event, body)
        self.events.append(event)
        return event

    def poll(self) -> list[Event]:
        """Take in what has come already; returns all events so far. Never raises StreamEnded."""
        with contextlib.suppress(StreamEnded):
            while not self._incoming.empty():
                self.next()
        return self.events

    def heard(self, kind: str) -> list[Any]:
        """All of one kind that was taken in on this stream."""
        return [event.value for event in self.events if event.kind == kind]

    def _read_line(self) -> None:
        assert self._line is not None
        with contextlib.suppress(OSError):
            while (received := self._line.receive()) is not None:
                message, body = unframe(pb.ServerMessage, received.data)
                assert len(message.new_slots) == len(received.descriptors)
                for number, descriptor in zip(message.new_slots, received.descriptors, strict=True):
                    self.descriptors[number] = os.dup(descriptor)
                    writable = number == message.ticket.gradient_slot
                    size = (self.pushed if writable else self.pulled).total_bytes
                    self.slots[number] = attach(descriptor, size, writable=writable)
                _hand_on(message, body, self._incoming, self.pulses)

    def _take_in(self, event: Event, body: memoryview | None) -> None:
        if event.kind == "weights" and event.value.slot:
            views = self.pulled.views(self.slots[event.value.slot])
            self.weights.use(event.value.version, list(views.values()))
        elif event.kind == "weights":
            self.weights.add(event.value, body)
        elif event.kind == "lease":
            for batch in event.value.granted:
                self.leased[batch.id.epoch, batch.id.number] = list(batch.indices)
            for batch_id in event.value.withdrawn:
                self.leased.pop((batch_id.epoch, batch_id.number), None)
        else:
            if event.kind == "welcome":
                self.pushed = Compression.parse(event.value.compression).packed(self.layout)
                self.pulled = pulls(event.value.pull_dtype).packed(self.layout)
                self.weights = Weights(self.pulled)
            self._unread[event.kind].append(event.value)

    def _expect(self, kind: str, timeout_s: float = TIMEOUT_S) -> Any:
        """The next of its kind; others are kept for those who ask for them."""
        end = time.monotonic() + timeout_s
        while not self._unread[kind]:
            self.next(end - time.monotonic())
        return self._unread[kind].popleft()


def hello_of(task: Task, name: str = "task") -> pb.Hello:
    """What a worker of `task` says; `name` is that of the server's task."""
    return pb.Hello(
        protocol=rpc.PROTOCOL,
        task=pb.TaskIdentity(
            name=name,
            example_count=len(task.dataset),
            batch_size=task.batch_size,
            seed=task.seed,
        ),
        layout=task.tree.layout.to_proto(),
        host="here",
        platform="bare",
    )


def key(ticket: pb.Ticket) -> Key:
    """Of the ticket's one batch."""
    (batch,) = ticket.batches
    return batch.epoch, batch.number


def counting_gradient(layout: Layout, indices: Iterable[int]) -> bytes:
    """What kit.counting's loss gives for a batch: -1 at each of its examples, else 0."""
    buffer = layout.empty()
    layout.views(buffer)["count"][list(indices)] = -1
    return buffer.tobytes()


def slices(data: bytes, size: int = PART_BYTES) -> list[Part]:
    """A buffer cut into parts of `size` bytes."""
    return [(at, data[at : at + size]) for at in range(0, len(data), size)]


def _read(
    call: Any,
    may_read: threading.Event,
    incoming: queue.SimpleQueue[Any],
    pulses: list[pb.Stamp],
    line_reader: list[threading.Thread],
) -> None:
    """Put what comes into the queue, at last how it ended."""
    try:
        may_read.wait(TIMEOUT_S)
        for data in call:
            _hand_on(*unframe(pb.ServerMessage, data), incoming, pulses)
        ended = StreamEnded(grpc.StatusCode.OK, "", "")
    except grpc.RpcError as error:
        metadata: Any = call.trailing_metadata() or ()
        reason = next((value for name, value in metadata if name == REASON_KEY), "")
        ended = StreamEnded(error.code(), reason, error.details() or "")
    for reader in line_reader:
        reader.join(TIMEOUT_S)
    incoming.put(ended)


def _hand_on(
    message: pb.ServerMessage,
    body: memoryview | None,
    incoming: queue.SimpleQueue[Any],
    pulses: list[pb.Stamp],
) -> None:
    kinds = [kind for kind in KINDS if message.HasField(kind)]
    for kind in kinds:
        here = body if kind == "weights" else None
        event = Event(kind, getattr(message, kind), len(here or b""))
        incoming.put((message.stamp, event, here))
    if not kinds:
        pulses.append(message.stamp)
