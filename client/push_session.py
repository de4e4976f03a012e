"""Training by any program: weights out, gradients in, each applied exactly once.

    with Client("127.0.0.1:50051").train() as session:
        while …:
            weights = session.pull()                     # {name: array}, with .version
            outcome = session.push(gradient, loss=loss)  # {name: array}

The server knows of each session the last push that it has applied, in every version
and so in every snapshot. This side keeps a push until it is durable, and sends again,
in order, what a crash of the server took back. So whichever of the two is killed
whenever, in the history that survives each push has moved the weights exactly once;
but for the last one of a program that died before `push` returned, which has once or
not at all.

Knows no JAX: gradients may come from NumPy, another framework, or a simulator.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, TypeVar

import grpc
import numpy as np
import numpy.typing as npt

from headwater.client.weights import Weights, named
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.protos.errors import (
    HeadwaterError,
    Reason,
    Refused,
    Unreachable,
    UsageError,
    from_rpc_error,
)
from headwater.protos.layout import Bytes, Layout
from headwater.protos.reading import Reader
from headwater.protos.wire import PART_BYTES, frame

log = logging.getLogger("headwater.client")

T = TypeVar("T")

CALL_TIMEOUT_S = 60.0
"""For the reply to one push, which a server gives after 20 s at the latest; and for sending it, at
1 MB/s. A call that takes longer is made again."""
SNAPSHOT_TIMEOUT_S = 600.0
KEEP_BYTES = 256 << 20
SAY_S = 60.0
"""Between lines on a server that is away, or holds a push."""

_AGAIN = {Reason.SILENT, Reason.SERVER_ENDED}

_NOT_APPLIED = {Reason.RUN_OVER, Reason.NOT_IN_SYNC, Reason.FUTURE_VERSION}
"""Refusals that say what became of the push."""


class SessionLost(HeadwaterError):
    """The server's history lacks pushes that were durable, or was too busy to remember them."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a push."""

    code: Literal["applied", "stale", "rejected"]
    """applied: it moved the weights. stale: it was computed at weights older than the consistency
    allows, and changed nothing: pull, and compute anew. rejected: it was not finite."""
    version: int | None
    """That it made; None where it was not applied."""
    staleness: int | None
    """Versions between the one that it was computed at and the one that it moved."""
    message: str
    """For people, where it was not applied."""

    @property
    def applied(self) -> bool:
        return self.code == "applied"


@dataclasses.dataclass(eq=False)
class _Push:
    """One that is kept until it is durable."""

    sequence: int
    base: int
    base_incarnation: int
    loss: float | None
    examples: int
    data: Bytes
    version: int | None = None
    """That it made in the history of `incarnation`; None as long as it is not known to have."""
    incarnation: int = 0


class PushSession:
    """One program's pushes, one after the other. For one thread; made by `Client.train`.

    Use it as a context. At its end, unless that is an exception, it waits until all
    pushes are durable.
    """

    def __init__(
        self, address: str, *, name: str, timeout_s: float | None, keep_bytes: int
    ) -> None:
        self._address = address
        self._name = name
        self._timeout_s = timeout_s
        self._keep_bytes = keep_bytes
        self._channel = rpc.connect(address)
        self._stub = rpc.Stub(self._channel)
        self._reader = Reader(address)
        self._session = secrets.randbits(63) + 1
        self._opened_version: int | None = None
        self._attempt = 0
        self._run_id = ""
        self._incarnation = 0  # the newest that was heard of
        self._durable_sequence = 0  # the last that is not kept any more
        self._layout: Layout | None = None
        self._fingerprint = b""
        self._pulled: Weights | None = None
        self._kept: deque[_Push] = deque()
        self.lost_count = 0
        """Pushes that were applied, taken back by a crash of the server, and then too old for its
        consistency to be applied again."""

    def __enter__(self) -> PushSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection, whatever is not durable yet."""
        self._channel.close()
        self._reader.close()

    @property
    def kept_count(self) -> int:
        """Pushes that a crash of the server could still take back, and that would be sent again."""
        return len(self._kept)

    # ------------------------------------------------------------------- using

    def pull(self) -> Weights:
        """The newest weights, with all of this session's pushes in them.

        Raises:
          Unreachable: No server answered for `timeout_s`.
          Refused: The server keeps another run, or an older copy of this one.
        """
        while True:
            weights = self._read()
            if weights.incarnation == self._incarnation or not self._kept:
                break
            self._incarnation = weights.incarnation
            self._deliver(asks=True)  # what the crash took back comes first
        self._incarnation, self._run_id = weights.incarnation, weights.run_id
        if self._opened_version is None:
            self._opened_version = weights.version
        self._pulled = weights
        return weights

    def push(
        self,
        gradient: Mapping[str, npt.ArrayLike],
        *,
        loss: float | None = None,
        examples: int = 0,
        at: Weights | None = None,
    ) -> Outcome:
        """Have the server move the weights by a gradient; returns what became of it.

        The server's optimizer descends along it: it is the direction in which the loss
        grows. Waits while the run is paused, and outlasts a server that is away.

        Args:
          gradient: For each parameter an array of its shape, and of its dtype or one that
            NumPy casts to it within its kind, such as float64 to float32.
          loss: At the same weights; shown, and given to the optimizer, which gets 0 without. One
            that looks at it, such as `reduce_on_plateau`, needs it with each push.
          examples: That it is of; for the statistics alone.
          at: The weights that it was computed at; those pulled last by default.

        Raises:
          UsageError: Nothing was pulled yet; or the arrays are not the parameters, or the loss
            or the number of examples is none. Nothing was pushed.
          Refused: RUN_OVER, NOT_IN_SYNC, FUTURE_VERSION: it was not applied. UNWRITABLE: so much
            is kept that it has to be durable first, and the server's disk is full or broken;
            nothing was pushed. And what `pull` raises.
          SessionLost: What was durable is not there any more.
          Unreachable: No server answered for `timeout_s`. The push stays kept, and goes
            before the next one.
        """
        base = self._pulled if at is None else at
        if base is None or self._layout is None:
            raise UsageError("push: pull the weights first, for the gradient is computed at them")
        if base.run_id != self._run_id:
            raise UsageError(
                f"push: `at` is of run {base.run_id}, and this session's is {self._run_id}"
            )
        # All that can be wrong is found before it is kept, from when on it is sent until it is
        # known what became of it.
        data = _packed(self._layout, gradient)
        loss, examples = _loss(loss), _count(examples)
        if any(push.version is None for push in self._kept):
            self._deliver()  # one that was left when no server answered
        if self._kept and self._kept_bytes() + data.nbytes > self._keep_bytes:
            self.flush()
        sequence = 1 + (self._kept[-1].sequence if self._kept else self._durable_sequence)
        self._kept.append(_Push(sequence, base.version, base.incarnation, loss, examples, data))
        return self._deliver()

    def flush(self) -> None:
        """Have all pushes durable; then no crash can take them back.

        Raises:
          Refused: UNWRITABLE; the server's disk is full or broken. And what `push` raises.
        """
        while self._kept:
            self._deliver(asks=True)
            if self._kept:
                self._patiently(self._snapshot)

    def _kept_bytes(self) -> int:
        return sum(push.data.nbytes for push in self._kept)

    # -------------------------------------------------------------- delivering

    def _deliver(self, *, asks: bool = False) -> Outcome:
        """Have the server apply all that is kept, and not applied in its history, in order.

        Args:
          asks: Ask about the newest first, without sending it.

        Returns:
          What became of the newest.
        """
        newest = current = self._kept[-1]
        began = said = time.monotonic()
        while True:
            try:
                reply = self._patiently(lambda: self._call(current, asks=asks))  # noqa: B023
            except Refused as refused:
                if refused.reason in _NOT_APPLIED and current.version is None:
                    self._drop(current)
                raise
            asks = False
            if reply.code in (pb.OUTCOME_APPLIED, pb.OUTCOME_DUPLICATE):
                outcome = self._is_applied(current, reply)
                if current is newest:
                    return outcome
                current = self._after(current.sequence)
            elif reply.code == pb.OUTCOME_HELD:
                asks = True
                if time.monotonic() - said > SAY_S:
                    said = time.monotonic()
                    log.warning("a push has been held for %.0f s; is the run paused?", said - began)
            elif reply.code == pb.OUTCOME_MISSING:
                if reply.last_sequence < current.sequence:
                    current = self._after(reply.last_sequence)
                else:
                    asks = True  # it was not looked for, because the call was for an earlier life
            else:
                self._drop(current)
                if current.version is not None:
                    self.lost_count += 1
                    log.warning(
                        "a push that a crash of the server took back is not applied again: %s",
                        reply.message,
                    )
                if current is newest:
                    is_stale = reply.code == pb.OUTCOME_STALE
                    return Outcome("stale" if is_stale else "rejected", None, None, reply.message)
                current = self._after(current.sequence - 1)

    def _after(self, sequence: int) -> _Push:
        """The kept push that follows a sequence."""
        for push in self._kept:
            if push.sequence == sequence + 1:
                return push
        raise SessionLost(
            f"the server at {self._address} has this session's pushes up to {sequence}, and those "
            f"kept here begin with {self._kept[0].sequence}: it was restored from an older copy, "
            "or another program used the session"
        )

    def _is_applied(self, push: _Push, reply: pb.SessionReply) -> Outcome:
        stamp = reply.stamp
        for earlier in self._kept:  # they come before it in this history
            if earlier.sequence < push.sequence:
                earlier.incarnation = stamp.incarnation
        push.incarnation = stamp.incarnation
        if reply.version:
            push.version = reply.version
        outcome = Outcome("applied", push.version, reply.staleness, "")
        self._forget_durable(stamp)
        return outcome

    def _drop(self, push: _Push) -> None:
        """It was not applied, and uses up no sequence: those after it move up."""
        for later in self._kept:
            if later.sequence > push.sequence:
                later.sequence -= 1
        self._kept.remove(push)

    def _forget_durable(self, stamp: pb.Stamp) -> None:
        while self._kept:
            first = self._kept[0]
            is_here = first.version is not None and first.incarnation == stamp.incarnation
            if not is_here or (first.version or 0) > stamp.durable_version:
                return
            self._durable_sequence = self._kept.popleft().sequence

    # ------------------------------------------------------------------- below

    def _call(self, push: _Push, *, asks: bool) -> pb.SessionReply:
        self._attempt += 1
        head = pb.SessionPush(
            session=self._session,
            opened_version=self._opened_version,
            sequence=push.sequence,
            attempt=self._attempt,
            run_id=self._run_id,
            incarnation=self._incarnation,
            base_incarnation=push.base_incarnation,
            base=push.base,
            layout=self._fingerprint,
            loss=push.loss,
            examples=push.examples,
            asks=asks,
            name=self._name,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        timeout_s = CALL_TIMEOUT_S + push.data.nbytes / 1e6
        messages = iter([frame(head)]) if asks else _parts(head, push.data)
        try:
            reply: pb.SessionReply = self._stub.PushGradient(messages, timeout=timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._address) from None
        self._incarnation = max(self._incarnation, reply.stamp.incarnation)
        return reply

    def _snapshot(self) -> None:
        try:
            reply = self._stub.Snapshot(pb.SnapshotRequest(), timeout=SNAPSHOT_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._address) from None
        self._forget_durable(reply.stamp)

    def _read(self) -> Weights:
        request = pb.PullRequest(run_id=self._run_id, seen_incarnation=self._incarnation)
        read = self._patiently(lambda: self._reader.pull(request))
        assert read.weights is not None  # no version was said to be here
        if self._layout is None:
            layout = read.weights.layout
            self._layout, self._fingerprint = layout.trained, bytes.fromhex(layout.fingerprint)
        return named(read)

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask again while no server answers, for `timeout_s`."""
        began = said = time.monotonic()
        pause_s = 0.05
        while True:
            try:
                return ask()
            except (Unreachable, Refused) as error:
                if isinstance(error, Refused) and error.reason not in _AGAIN:
                    raise
                now = time.monotonic()
                if self._timeout_s is not None and now - began > self._timeout_s:
                    raise
                if said == began or now - said > SAY_S:
                    said = now
                    log.warning("%s; trying again", error)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 2.0)


def _parts(head: pb.SessionPush, data: Bytes) -> Iterator[bytes]:
    yield frame(head, data[:PART_BYTES].data)
    for at in range(PART_BYTES, len(data), PART_BYTES):
        yield frame(pb.SessionPush(), data[at : at + PART_BYTES].data)


def _loss(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise UsageError(f"push: loss is a number, not {value!r}") from None


def _count(value: Any) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if not 0 <= count < 1 << 63:
        raise UsageError(f"push: examples is a whole number from 0 on, not {value!r}")
    return count


def _packed(layout: Layout, gradient: Mapping[str, Any]) -> Bytes:
    """The flat buffer of a gradient.

    Raises:
      UsageError: A name is missing or unknown, or an array does not fit; names it.
    """
    if not isinstance(gradient, Mapping):
        kind = type(gradient).__name__
        raise UsageError(f"push: a gradient is a dict of arrays by name, not of type {kind}")
    names = [spec.name for spec in layout.tensors]
    missing, unknown = set(names) - gradient.keys(), gradient.keys() - set(names)
    if missing or unknown:
        raise UsageError(
            f"push: a gradient has the parameters' names; missing {sorted(missing)[:5]}, unknown "
            f"{sorted(unknown)[:5]}"
        )
    arrays = []
    for spec in layout.tensors:
        array = np.asarray(gradient[spec.name])
        if array.shape != spec.shape or not np.can_cast(array.dtype, spec.dtype, "same_kind"):
            got = f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
            raise UsageError(f"push: {spec.name} is {got}, the parameter is {spec.describe()}")
        with np.errstate(over="ignore"):  # what becomes infinite is refused as such
            arrays.append(array.astype(spec.dtype, copy=False))
    buffer = layout.empty()
    layout.pack(arrays, buffer)
    return buffer
