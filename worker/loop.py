"""A worker's life: take a ticket, compute its gradient, push it, again.

It keeps nothing that matters. It never repeats a push: when the stream breaks
it drops what it was doing, connects again and asks anew; the server's ledger
knows what was applied.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.assembly import Weights
from headwater.protos.command import expected_run_id
from headwater.protos.errors import HeadwaterError, Reason, Refused, RunFailed, Unreachable
from headwater.protos.layout import CONSTANT
from headwater.protos.reading import Reader
from headwater.protos.rpc import PROTOCOL, Transport
from headwater.protos.wire import PART_BYTES
from headwater.worker.data import Generated, batch_rng
from headwater.worker.devices import Devices, used_count
from headwater.worker.forms import Forms
from headwater.worker.gradient import AbstractGradientFunction, Gradient
from headwater.worker.link import SILENCE_S, Disconnected, Link, Patience, refuse_older
from headwater.worker.load import LoadedTask
from headwater.worker.loader import Key, Loader
from headwater.worker.local_steps import gradient_function
from headwater.worker.task import batch_sizes

log = logging.getLogger("headwater.worker")

LEAVE_TIMEOUT_S = 5.0
"""For the server's bye."""

SAY_S = 10.0
"""Between lines about how it goes."""

# Both are a part of normal life: duplicates in sync mode, stale pushes where they are dropped.
_LEVELS = {pb.OUTCOME_DUPLICATE: logging.DEBUG, pb.OUTCOME_STALE: logging.INFO}


class _Work(NamedTuple):
    """A ticket, and what is needed for it."""

    ticket: pb.Ticket
    weights: list[np.ndarray]
    incarnation: int
    since: float
    """When all of that was here."""


class Worker:
    """Trains `loaded` for the server at `address` until the run is over.

    Args:
      loaded: The task; must be the server's.
      address: HOST:PORT.
      patience: For the first connection; later ones have all the time there is.
      name: Shown in status; the server makes one up for "".
      transport: How tensors travel if the server is on this machine.
      devices: Batches are split over them; none leaves it to JAX's default device.
      before_gradient: Called in the thread of `run` with the epoch of the gradient to come.
      loads_ahead: Else the data are loaded there as well, when they are needed.
    """

    def __init__(
        self,
        loaded: LoadedTask,
        address: str,
        patience: Patience,
        *,
        name: str = "",
        transport: Transport = "auto",
        devices: Devices = (),
        before_gradient: Callable[[int], None] | None = None,
        loads_ahead: bool = True,
    ) -> None:
        self._before_gradient = before_gradient
        self._loads_ahead = loads_ahead
        self._loaded = loaded
        self._transport = transport
        self._task = loaded.task
        self._devices = devices
        self._address = address
        self._layout = self._task.tree.layout
        self._patience = patience
        count = used_count(self._task, devices)
        self._hello = pb.Hello(
            protocol=PROTOCOL,
            run_id=expected_run_id(),
            instance=secrets.randbits(63) + 1,
            task=loaded.identity(),
            layout=self._layout.to_proto(),
            name=name,
            host=socket.gethostname(),
            pid=os.getpid(),
            platform=loaded.platform(),
            devices=count,
            software=loaded.software(),
            compute=loaded.fingerprint(count),
            pipelines=True,
        )
        self._forms = Forms(self._layout)
        self._weights = Weights(self._forms.pulled)
        self._constants: list[jax.Array] = []
        self._constants_of = ""  # the run's id
        self._compiled_for: tuple[object, ...] | None = None  # what decides it, of the welcome
        self._local_steps = 1
        self._gradient: AbstractGradientFunction | None = None
        self._loader: Loader | None = None
        self._link: Link | None = None
        self._waiting: deque[_Work] = deque()
        self._unanswered = 0
        self._phase = pb.PHASE_WAITING
        self._steps = 0
        self._gradients = 0
        self._said_time = time.monotonic()
        self._leaving = False
        self._awaiting = False  # a message, with nothing in hand

    def run(self) -> None:
        """Returns when the run is finished or was stopped, or this worker was asked to leave.

        Raises:
          Unreachable: No server in time.
          Refused: The server will not have this worker.
          RunFailed: The run ended with an error.
        """
        try:
            while not self._leaving:
                try:
                    if self._serve_one_stream():
                        return
                except Disconnected as broken:
                    self._patience.wait(str(broken), lambda: self._leaving)
                except Refused as refusal:
                    # Of a run that has the port of ours, which may get it yet.
                    if refusal.reason is not Reason.WRONG_RUN or self._patience.connected_before:
                        raise
                    self._patience.wait(str(refusal), lambda: self._leaving)
                else:
                    self._patience.wait("the server ended the stream", lambda: self._leaving)
        finally:
            if self._loader:
                self._loader.close()

    def leave(self) -> None:
        """Finish the gradient in hand, tell the server, and end. Call in the thread of `run`."""
        self._leaving = True
        if self._awaiting and self._link:
            self._say_leave(self._link)

    def give_up(self) -> None:
        """Have `run` return when it is next without a server. From any thread."""
        self._leaving = True

    # ------------------------------------------------------------------ stream

    def _serve_one_stream(self) -> bool:
        """Whether a bye was received; else the stream just ended."""
        self._hello.attempt += 1
        self._weights.restart()
        self._waiting.clear()
        if self._unanswered:
            # The last push may have been applied: what it took of the residual must not go twice.
            self._forms.forget()
        self._unanswered = 0
        if self._loader:
            self._loader.clear()
        link = self._link = Link(
            self._address, lambda: pb.Progress(phase=self._phase, steps=self._steps)
        )
        try:
            link.send(pb.WorkerMessage(hello=self._hello))
            self._awaiting = True
            for message, body in link.receive():
                self._awaiting = False
                refuse_older(message.stamp, self._hello.seen_incarnation)
                if message.stamp.incarnation != self._hello.seen_incarnation:
                    self._forms.forget()  # what it left out was left out of weights that are gone
                self._hello.seen_incarnation = message.stamp.incarnation
                if self._handle(link, message, body):
                    return True
                # What waits to be read comes first: a bye, or weights that are newer.
                while self._waiting and not self._leaving and not link.has_more():
                    self._compute(link, self._waiting.popleft())
                # A push that is held outlives its worker: its outcome may be long in coming.
                if self._leaving and (not self._unanswered or _only_says_it_is_there(message)):
                    self._say_leave(link)
                self._awaiting = True
            return False
        finally:
            self._awaiting = False
            self._link = None
            link.close()

    def _handle(self, link: Link, message: pb.ServerMessage, body: memoryview | None) -> bool:
        """Act on a message, field by field; whether it was the last."""
        if message.HasField("welcome"):
            self._welcome(link, message.welcome)
        if message.HasField("outcome"):
            self._outcome(message.outcome)
        if message.HasField("weights"):
            self._take_weights(link, message.weights, body)
        if message.HasField("lease"):
            self._lease(message.lease)
        if message.HasField("bye"):
            return self._bye(message.bye)
        if message.HasField("ticket"):
            self._take_ticket(message.ticket, message.stamp.incarnation)
        return False

    def _welcome(self, link: Link, welcome: pb.Welcome) -> None:
        self._patience.connected()
        link.silence_s = max(SILENCE_S, welcome.session_timeout_s)
        self._agree(welcome)
        link.attach(
            welcome.same_host, self._transport,
            pulled=self._forms.pulled, pushed=self._forms.pushed,
        )  # fmt: skip
        if welcome.pipelines:
            link.work_ahead(self._forms.pushed.total_bytes)
        self._hello.run_id = welcome.run_id
        self._take_constants(welcome.run_id)
        for warning in welcome.warnings:
            log.warning("%s", warning)
        log.info("joined run %s as %s", welcome.run_id, welcome.name)
        self._hello.name = welcome.name
        seconds = self._compile(welcome)
        self._phase = pb.PHASE_WAITING
        link.send(pb.WorkerMessage(ready=pb.Ready(compile_s=seconds)))

    def _agree(self, welcome: pb.Welcome) -> None:
        """Send and take tensors in the forms that the run has."""
        forms = welcome.compression, welcome.pull_dtype, welcome.seed
        if self._forms.of != forms:
            self._forms = Forms(self._layout, *forms)
            self._weights = Weights(self._forms.pulled)

    def _take_constants(self, run_id: str) -> None:
        """They come with no ticket, because they are the same for the whole run."""
        if not self._layout.count(CONSTANT) or self._constants_of == run_id:
            return
        reader = Reader(self._address, self._layout)
        try:
            read = reader.pull(pb.PullRequest(run_id=run_id))
        except Unreachable as error:
            raise Disconnected(str(error)) from None
        finally:
            reader.close()
        assert read.weights is not None  # no version was named as known
        _, _, constants = self._task.tree.split(read.weights.leaves)
        self._constants = jax.device_put(constants)
        self._constants_of = run_id

    def _compile(self, welcome: pb.Welcome) -> float:
        """Compile for every shape a batch can have; seconds it took."""
        seed, batch_size = welcome.seed, welcome.batch_size
        self._local_steps = max(1, welcome.local_steps)
        total = welcome.epochs * welcome.batches_per_epoch
        needed = seed, batch_size, self._local_steps, welcome.inner_optimizer, total
        if self._compiled_for == needed:
            return 0.0
        self._phase = pb.PHASE_COMPILING
        data = self._task.dataset
        if self._loader:
            self._loader.close()
        self._loader = Loader(data, seed, ahead=self._loads_ahead)
        self._gradient = gradient_function(
            self._task,
            seed,
            steps=self._local_steps,
            inner_optimizer=welcome.inner_optimizer,
            epochs=welcome.epochs,
            batches_per_epoch=welcome.batches_per_epoch,
            devices=self._devices,
        )
        seconds = 0.0
        for size in batch_sizes(self._task, batch_size):
            batch = data.batch(np.arange(size), batch_rng(seed, 0, 0))
            seconds += self._gradient.compile(batch)
            if len(self._devices) > 1:
                self._say_devices(size, self._gradient.device_count(batch))
        self._compiled_for = needed
        log.info("compiled in %.1f s", seconds)
        return seconds

    def _say_devices(self, size: int, count: int) -> None:
        there = f"{len(self._devices)} {jax.default_backend()} devices"
        if isinstance(self._task.dataset, Generated):
            log.info("batches that are made are not split: one of %s is used", there)
        elif count == 1:
            log.info("batches of %d are not split: no divisor fits %s", size, there)
        else:
            log.info("batches of %d are split over %d of %s", size, count, there)

    def _take_weights(self, link: Link, part: pb.WeightsPart, body: memoryview | None) -> None:
        if part.slot and link.slots is not None:
            self._weights.use(part.version, link.slots.weights(part.slot))
        else:
            self._weights.add(part, body)

    def _outcome(self, outcome: pb.Outcome) -> None:
        self._step()
        self._unanswered -= 1
        self._forms.settle(applied=outcome.code == pb.OUTCOME_APPLIED)
        if outcome.code in (pb.OUTCOME_APPLIED, pb.OUTCOME_HELD):
            self._gradients += 1
            return
        name = pb.OutcomeCode.Name(outcome.code).removeprefix("OUTCOME_").replace("_", " ").lower()
        log.log(_LEVELS.get(outcome.code, logging.WARNING), "%s: %s", name, outcome.message)

    def _lease(self, lease: pb.Lease) -> None:
        assert self._loader is not None, "the server leases after welcome"
        # A ticket whose batch is leased anew has expired, unseen from here: its gradient would be
        # refused, and it would take the data from the ticket that comes in its place.
        changed = {_key(id_) for id_ in (*(b.id for b in lease.granted), *lease.withdrawn)}
        self._waiting = deque(
            work for work in self._waiting if changed.isdisjoint(map(_key, work.ticket.batches))
        )
        for batch in lease.granted:
            self._loader.grant(_key(batch.id), batch.indices)
        for withdrawn in lease.withdrawn:
            self._loader.withdraw(_key(withdrawn))

    def _bye(self, bye: pb.Bye) -> bool:
        if bye.reason == pb.BYE_FAILED:
            raise RunFailed(f"the run failed: {bye.message}")
        if bye.reason == pb.BYE_EVICTED:
            raise Refused(Reason.EVICTED, bye.message or "this worker was evicted")
        texts = {pb.BYE_FINISHED: "the run is finished", pb.BYE_LEFT: "left"}
        text = texts.get(bye.reason, "the server was stopped")
        log.info("%s; %d of its gradients are from here", text, self._gradients)
        if (norm := self._forms.forget()) > 0:
            log.info("--compress left a residual of norm %.4g that was never pushed", norm)
        return True

    def _say_leave(self, link: Link) -> None:
        link.send(pb.WorkerMessage(leave=pb.Leave()))
        timer = threading.Timer(LEAVE_TIMEOUT_S, link.end)
        timer.daemon = True
        timer.start()

    # --------------------------------------------------------------- computing

    def _take_ticket(self, ticket: pb.Ticket, incarnation: int) -> None:
        """Keep it for its turn, with its weights: newer ones may come before that."""
        if ticket.base != self._weights.version:
            raise HeadwaterError(
                f"the server's ticket is for version {ticket.base}, the weights it sent are of "
                f"version {self._weights.version}"
            )
        if not 1 <= len(ticket.batches) <= self._local_steps:
            raise HeadwaterError(
                f"the server's ticket has {len(ticket.batches)} batches, its welcome said "
                f"local_steps={self._local_steps}; are server and worker of one version?"
            )
        self._waiting.append(_Work(ticket, self._weights.leaves, incarnation, time.perf_counter()))

    def _compute(self, link: Link, task: _Work) -> None:
        """One ticket: load, compute, push."""
        assert self._loader is not None
        assert self._gradient is not None
        ticket = task.ticket
        if self._before_gradient is not None:
            self._before_gradient(ticket.batches[0].epoch)
        self._enter(pb.PHASE_LOADING)
        began = time.perf_counter()
        steps = []
        for batch in ticket.batches:
            steps.append((self._loader.take(_key(batch)), batch.epoch, batch.number))
            self._step()
        loaded = time.perf_counter()
        self._enter(pb.PHASE_COMPUTING)
        weights = [*self._forms.unpack(task.weights), *self._constants]
        gradient = self._gradient(weights, steps, self._step)
        pushed = self._forms.pack(gradient.leaves, steps[0][1], steps[0][2])
        computed = time.perf_counter()
        self._enter(pb.PHASE_SENDING)
        push = pb.Push(
            token=ticket.token,
            base=ticket.base,
            incarnation=task.incarnation,
            loss=gradient.loss,
            metrics=gradient.metrics,
            compute_s=computed - loaded,
            load_s=loaded - began,
            queue_s=began - task.since,
            tallies=gradient.tallies,
        )
        self._unanswered += 1
        if ticket.gradient_slot and link.slots is not None:
            link.slots.write(ticket.gradient_slot, pushed)
            push.slot = ticket.gradient_slot
            link.send(pb.WorkerMessage(push=push))
        else:
            self._push(link, push, pushed)
        if not self._waiting:
            self._enter(pb.PHASE_WAITING)
        self._say(gradient)

    def _push(self, link: Link, push: pb.Push, pushed: list[np.ndarray]) -> None:
        for offset, pieces in self._forms.pushed.cut(pushed, PART_BYTES):
            if offset == 0:
                message = pb.WorkerMessage(push=push)
            else:
                part = pb.PushPart(token=push.token, offset=offset)
                message = pb.WorkerMessage(push_part=part)
            link.send(message, *(pieces or (memoryview(b""),)))
            self._step()

    def _enter(self, phase: pb.Phase) -> None:
        self._phase = phase
        self._step()

    def _step(self) -> None:
        """Work was done, which keeps a ticket from being taken back."""
        self._steps += 1

    def _say(self, gradient: Gradient) -> None:
        now = time.monotonic()
        if now - self._said_time >= SAY_S:
            self._said_time = now
            log.info(
                "version %d: %d gradients from here, loss %.4g",
                self._weights.version, self._gradients, gradient.loss,
            )  # fmt: skip


def _only_says_it_is_there(message: pb.ServerMessage) -> bool:
    return [field.name for field, _ in message.ListFields()] == ["stamp"]


def _key(batch: pb.BatchId) -> Key:
    return batch.epoch, batch.shard, batch.number
