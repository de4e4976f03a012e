"""Wrong input of every kind: its own clear error, and neither weights nor ledger move.

Each test looks at the run, does the wrong thing over real gRPC, looks again,
and then lets a good worker push, to see that the server still does its work.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from headwater import Client, Server
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.protos.errors import REASON_KEY, Reason
from headwater.protos.layout import Layout
from headwater.protos.wire import PART_BYTES, frame
from kit import counting
from kit.protocol import (
    BareWorker,
    Part,
    StreamEnded,
    counting_gradient,
    hello_of,
    key,
    slices,
)
from kit.waiting import wait_for

EXAMPLES, BATCH = 64, 4
BATCHES = EXAMPLES // BATCH
PADDING = 600_000
TOTAL_BYTES = 4 * (EXAMPLES + PADDING)  # three parts, the last one shorter

F32 = np.dtype(np.float32)


class Run:
    """An embedded server of the counting task, and those who talk to it."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        run_dir: Path,
        task: tuple[int, int, int, int] = (EXAMPLES, 1, BATCH, PADDING),
        **options: Any,
    ) -> None:
        self._stack = stack
        self._workers: list[BareWorker] = []
        made = counting.task(*task)
        self.hello = hello_of(made)
        self.server = stack.enter_context(Server(made, run_dir=run_dir, **options))
        self.client = stack.enter_context(Client(self.server.address))
        channel = stack.enter_context(rpc.connect(self.server.address))
        self.stub = rpc.Stub(channel)

    def worker(self, name: str = "") -> BareWorker:
        worker = BareWorker(self.server.address, self.hello, name=name)
        self._workers.append(self._stack.enter_context(worker))
        return worker

    def dismiss(self) -> None:
        """Cut all workers off."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def joined(self, name: str = "") -> BareWorker:
        worker = self.worker(name)
        worker.join()
        return worker

    @property
    def status(self) -> dict[str, Any]:
        return self.client.status()

    def weights(self) -> dict[str, bytes]:
        return {name: array.tobytes() for name, array in self.client.pull().items()}

    def facts(self) -> dict[str, Any]:
        """All that wrong input must not change."""
        now = self.status
        not_applied = ("batches_pending", "batches_leased", "batches_admitted")
        return {
            "weights": self.weights(),
            "not_applied": sum(now[name] for name in not_applied),
            **{
                name: now[name]
                for name in ("version", "incarnation", "batches_applied", "skipped", "epoch",
                             "loss", "metrics", "training_metrics", "staleness", "problems")
            },
        }  # fmt: skip

    def refusal(self, method: str, request: Any) -> StreamEnded:
        """How a call ends that is not a worker's stream."""
        return refusal_of(lambda: getattr(self.stub, method)(request, timeout=20))


def refusal_of(call: Callable[[], Any]) -> StreamEnded:
    """How a call ends that must be refused; it may answer with a stream."""
    with pytest.raises(grpc.RpcError) as raised:
        list(call())
    error: Any = raised.value
    words = dict(error.trailing_metadata() or ())
    return StreamEnded(error.code(), words.get(REASON_KEY, ""), error.details())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    with contextlib.ExitStack() as stack:
        yield lambda **options: Run(stack, tmp_path / "run", **options)


def with_two_versions(run: Run) -> Run:
    with BareWorker(run.server.address, run.hello) as worker:
        worker.join()
        for _ in range(2):
            assert train(worker, worker.ticket()).code == pb.OUTCOME_APPLIED
        leave(worker)
    wait_for(lambda: not run.status["workers"], "the worker that made them is gone")
    return run


@pytest.fixture
def run(start: Callable[..., Run]) -> Run:
    """One that has made two versions."""
    return with_two_versions(start())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with contextlib.ExitStack() as stack:
        folder = tmp_path_factory.mktemp("shared") / "run"
        task = (EXAMPLES, 50, BATCH, PADDING)  # batches enough for all
        yield with_two_versions(Run(stack, folder, task))


@pytest.fixture
def shared(made: Run) -> Iterator[Run]:
    """The same run for all who are refused before they take part."""
    yield made
    made.dismiss()
    wait_for(lambda: not made.status["workers"], "the workers are gone")


@pytest.fixture
def no_tracebacks() -> Iterator[None]:
    """Two threads that format tracebacks at once break Python 3.11's parser, and pytest with it."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def gradient_of(worker: BareWorker, ticket: pb.Ticket) -> bytes:
    return counting_gradient(worker.layout, worker.leased[key(ticket)])


def train(worker: BareWorker, ticket: pb.Ticket) -> pb.Outcome:
    worker.push(ticket, gradient_of(worker, ticket))
    return worker.outcome()


def leave(worker: BareWorker) -> None:
    """In order, so that nothing is on its way when it has gone."""
    worker.leave()
    worker.end()


def finish(worker: BareWorker) -> pb.Bye:
    for ticket in worker.tickets():
        train(worker, ticket)
    return worker.bye()


@contextlib.contextmanager
def unharmed(run: Run, **counted: int) -> Iterator[None]:
    """What happens inside changes nothing but the counts of refused pushes, and harms nobody."""
    before, refused = run.facts(), run.status["rejected"]
    yield
    assert run.facts() == before
    assert run.status["rejected"] == {**refused, **counted}

    good = run.joined("good")
    ticket = good.ticket()
    examples = sorted(good.leased[key(ticket)])
    assert train(good, ticket).code == pb.OUTCOME_APPLIED
    assert run.status["version"] == before["version"] + 1
    moved = run.client.pull()["count"] - np.frombuffer(before["weights"]["count"], F32)
    assert np.flatnonzero(moved).tolist() == examples
    assert set(moved[examples]) == {1}


def assert_refused(ended: StreamEnded, reason: Reason, text: str) -> None:
    assert (ended.code, ended.reason) == (reason.code, reason.name)
    assert re.search(text, ended.text), ended.text


# ------------------------------------------------------------------------- hello


def layout(*tensors: tuple[str, tuple[int, ...]], dtype: Any = F32) -> pb.Layout:
    return Layout.of((name, np.dtype(dtype), shape) for name, shape in tensors).to_proto()


COUNT, PADS = ("count", (EXAMPLES,)), ("padding", (PADDING,))


def identity(**changes: Any) -> pb.TaskIdentity:
    right: dict[str, Any] = {"name": "task", "example_count": EXAMPLES, "batch_size": BATCH}
    return pb.TaskIdentity(**{**right, **changes})


def tensor(**changes: Any) -> pb.Layout:
    """The count alone, with one thing about it that no layout may have."""
    right: dict[str, Any] = {"name": "count", "role": 1, "dtype": "float32", "shape": [EXAMPLES]}
    return pb.Layout(tensors=[pb.Tensor(**{**right, **changes})])


WRONG_HELLOS = {
    "no protocol": ({"protocol": 0}, "PROTOCOL_MISMATCH", "protocol 0, the server 1"),
    "newer protocol": ({"protocol": 2}, "PROTOCOL_MISMATCH", "protocol 2, the server 1"),
    "no instance": ({"instance": 0}, "MALFORMED", "instance"),
    "no attempt": ({"attempt": 0}, "MALFORMED", "attempt"),
    "task's name": ({"task": identity(name="mnist")}, "TASK_MISMATCH", "mnist .* task in"),
    "task's options": (
        {"task": identity(options={"width": "64"})}, "TASK_MISMATCH", "width=64 .* none in",
    ),
    "example count": (
        {"task": identity(example_count=63)}, "TASK_MISMATCH", "examples: 63 .* 64 in",
    ),
    "batch size": ({"task": identity(batch_size=5)}, "TASK_MISMATCH", "batch size: 5 .* 4 in"),
    "seed": ({"task": identity(seed=1)}, "TASK_MISMATCH", "seed: 1 .* 0 in"),
    "no task": ({"task": pb.TaskIdentity()}, "TASK_MISMATCH", "examples: 0 .* 64 in"),
    "a tensor's name": (
        {"layout": layout(("counts", (EXAMPLES,)), PADS)}, "LAYOUT_MISMATCH", "counts: .* missing",
    ),
    "a tensor's shape": (
        {"layout": layout(("count", (8, 8)), PADS)}, "LAYOUT_MISMATCH",
        r"count: here float32\[8,8\], there float32\[64\]",
    ),
    "a tensor's dtype": (
        {"layout": layout(COUNT, PADS, dtype=np.float16)}, "LAYOUT_MISMATCH",
        r"count: here float16\[64\], there float32\[64\]",
    ),
    "order of tensors": ({"layout": layout(PADS, COUNT)}, "LAYOUT_MISMATCH", "another order"),
    "a tensor too few": ({"layout": layout(COUNT)}, "LAYOUT_MISMATCH", "padding: here missing"),
    "a tensor too many": (
        {"layout": layout(COUNT, PADS, ("bias", ()))}, "LAYOUT_MISMATCH", r"bias: here float32\[\]",
    ),
    "no tensor": ({"layout": pb.Layout()}, "MALFORMED", "no tensor"),
    "no name": ({"layout": tensor(name="")}, "MALFORMED", "no name"),
    "a file's own name": ({"layout": tensor(name="__metadata__")}, "MALFORMED", "__metadata__"),
    "a name twice": (
        {"layout": pb.Layout(tensors=[*tensor().tensors, *tensor(offset=256).tensors])},
        "MALFORMED", "two tensors are called 'count'",
    ),
    "unknown dtype": ({"layout": tensor(dtype="object")}, "MALFORMED", "'count' .* 'object'"),
    "a dtype not trained": ({"layout": tensor(dtype="int32")}, "MALFORMED", "'int32'"),
    "role of another version": ({"layout": tensor(role=2)}, "MALFORMED", "no tensor to train"),
    "unknown role": ({"layout": tensor(role=9)}, "MALFORMED", "'count' has role 9"),
    "a gap": ({"layout": tensor(offset=64)}, "MALFORMED", "'count' starts at byte 64"),
    "overlap": (
        {"layout": pb.Layout(tensors=[*tensor().tensors, *tensor(name="b", offset=0).tensors])},
        "MALFORMED", "'b' starts at byte 0; .* at 256",
    ),
    "too large": ({"layout": tensor(shape=[2**63, 2**63])}, "MALFORMED", "too large"),
    "large and empty": ({"layout": tensor(shape=[2**63, 0])}, "MALFORMED", "too large"),
    "too many axes": ({"layout": tensor(shape=[1] * 65)}, "MALFORMED", "too large"),
    "another run": ({"run_id": "20270101-120000-abcd"}, "WRONG_RUN", "not 20270101-120000-abcd"),
    "incarnation from the future": (
        {"seen_incarnation": 2}, "OLD_INCARNATION", "is incarnation 1 .* incarnation 2 has been",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_HELLOS)
def test_a_worker_that_does_not_fit_is_told_what_differs(shared: Run, what: str) -> None:
    overrides, reason, text = WRONG_HELLOS[what]
    with unharmed(shared):
        assert_refused(shared.worker().open(**overrides).end(), Reason[reason], text)
        assert shared.status["workers"] == []


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (tensor(name="n" * 100_000), "LAYOUT_MISMATCH"),
        (tensor(name="n" * 100_000, dtype="object"), "MALFORMED"),
        (tensor(dtype="d" * 100_000), "MALFORMED"),
        (layout(*((f"{i}/{'n' * 4000}", ()) for i in range(10))), "LAYOUT_MISMATCH"),
    ],
    ids=["name", "name of malformed", "dtype", "ten names"],
)
def test_a_refusal_is_told_briefly_however_long_what_was_sent(
    shared: Run, wrong: pb.Layout, reason: str
) -> None:
    """gRPC drops an error whose text is over 8 KiB, and its reason with it."""
    with unharmed(shared):
        assert_refused(shared.worker().open(layout=wrong).end(), Reason[reason], "layout|tensors")


def test_a_layout_with_endless_axes_does_not_hold_the_server_up(run: Run) -> None:
    with unharmed(run):
        worker = run.worker().open(layout=tensor(shape=[2**63] * 30_000))
        with Client(run.server.address, timeout_s=1.0) as client:
            assert client.status()["version"] == 2
        assert_refused(worker.end(), Reason.MALFORMED, "too large")


def test_a_hello_of_the_same_run_and_incarnation_is_welcome(run: Run) -> None:
    status = run.status
    worker = run.worker().open(run_id=status["run_id"], seen_incarnation=status["incarnation"])

    assert worker.welcome().run_id == status["run_id"]


# ------------------------------------------------------- messages out of place


def message(**kind: Any) -> bytes:
    return frame(pb.WorkerMessage(**kind))


NO_MESSAGES = {
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "0xff": b"\xff" * 64,
    "field number 0": b"\x00\x00",
    "a group": b"\x0b\x0c",
    "a length past the end": b"\x0a\x7f\x01",
    "a body past the end": b"\x7a\xff\xff\xff\xff\x0f",
    "a number without an end": b"\x08" + b"\x80" * 11,
    "a name that is not UTF-8": b"\x0a\x04\x42\x02\xff\xfe",
    "nothing at all": b"",
    "a field of another version": b"\x3a\x00",
    "a body alone": b"\x7a\x01\x00",
}


@pytest.mark.parametrize("what", NO_MESSAGES)
@pytest.mark.parametrize("when", ["first", "after ready"])
def test_bytes_that_are_no_message_end_the_stream(shared: Run, what: str, when: str) -> None:
    with unharmed(shared):
        worker = shared.worker()
        if when == "first":
            worker.connect()
        else:
            worker.join()
            worker.ticket()
        worker.send_bytes(NO_MESSAGES[what])
        assert_refused(worker.end(), Reason.MALFORMED, ".+")
        wait_for(lambda: not shared.status["workers"], "it is out of the roster")


@pytest.mark.parametrize(
    "data",
    [
        message(ready=pb.Ready()),
        message(progress=pb.Progress()),
        message(push=pb.Push(base=2, incarnation=1)),
        message(push_part=pb.PushPart()),
        message(leave=pb.Leave()),
    ],
    ids=["ready", "progress", "push", "part", "leave"],
)
def test_what_comes_before_hello_ends_the_stream(shared: Run, data: bytes) -> None:
    with unharmed(shared):
        worker = shared.worker().connect()
        worker.send_bytes(data)
        assert_refused(worker.end(), Reason.MALFORMED, "first message .* is hello")


def test_hello_twice_ends_the_stream_and_takes_its_ticket_back(run: Run) -> None:
    with unharmed(run):
        worker = run.joined()
        worker.ticket()
        worker.send(pb.WorkerMessage(hello=worker.hello))
        assert_refused(worker.end(), Reason.MALFORMED, "unexpected message: hello")
        wait_for(lambda: run.status["batches_leased"] == 0, "what it had is pending")


def test_a_message_too_large_for_grpc_ends_the_stream(run: Run) -> None:
    with unharmed(run):
        worker = run.joined()
        worker.push(worker.ticket(), pieces=[(0, bytes(5 << 20))])
        assert worker.end().code is grpc.StatusCode.RESOURCE_EXHAUSTED


# ------------------------------------------------------------- parts of a push


def with_piece(at: int, piece: Part) -> Callable[[list[Part]], list[Part]]:
    return lambda good: [*good[:at], piece, *good[at + 1 :]]


LAST = 2 * PART_BYTES
WRONG_PARTS: dict[str, tuple[Callable[[list[Part]], list[Part]], str]] = {
    "first part empty": (with_piece(0, (0, b"")), "no body"),
    "a part empty": (with_piece(1, (PART_BYTES, b"")), "no body"),
    "first part too large": (
        with_piece(0, (0, bytes(PART_BYTES + 1))), f"{PART_BYTES + 1} bytes; at most {PART_BYTES}",
    ),
    "a part too large": (
        with_piece(1, (PART_BYTES, bytes(PART_BYTES + 64))), f"at most {PART_BYTES} are taken",
    ),
    "a part past the end": (
        with_piece(2, (LAST, bytes(TOTAL_BYTES - LAST + 1))),
        f"ends at byte {TOTAL_BYTES + 1}; the gradient has {TOTAL_BYTES}",
    ),
    "a part out of range": (
        with_piece(1, (TOTAL_BYTES, bytes(64))),
        f"begins at byte {TOTAL_BYTES} .* next to come is byte {PART_BYTES}",
    ),
    "a part at no place at all": (with_piece(1, (2**64 - 1, bytes(64))), f"byte {2**64 - 1}"),
    "a part twice": (
        lambda good: [good[0], good[1], good[1], good[2]],
        f"begins at byte {PART_BYTES} .* next to come is byte {LAST}",
    ),
    "the first part twice": (lambda good: [good[0], *good], "begins at byte 0 "),
    "a part missing": (
        lambda good: [good[0], good[2]],
        f"begins at byte {LAST} .* next to come is byte {PART_BYTES}",
    ),
    "parts out of order": (
        lambda good: [good[0], good[2], good[1]],
        f"begins at byte {LAST} .* next to come is byte {PART_BYTES}",
    ),
    "parts that overlap": (
        with_piece(1, (PART_BYTES - 64, bytes(PART_BYTES))), f"begins at byte {PART_BYTES - 64} ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_PARTS)
def test_a_gradient_whose_parts_do_not_fit_is_rejected(run: Run, what: str) -> None:
    change, text = WRONG_PARTS[what]
    with unharmed(run, malformed=1):
        worker = run.joined()
        ticket = worker.ticket()

        worker.push(ticket, pieces=change(slices(gradient_of(worker, ticket))))

        outcome = worker.outcome()
        assert (outcome.code, outcome.token) == (pb.OUTCOME_REJECTED, ticket.token)
        assert outcome.rejected_for == pb.REJECTED_FOR_MALFORMED
        assert re.search(text, outcome.message), outcome.message
        worker.ticket()  # the stream goes on
        leave(worker)
        assert len(worker.heard("outcome")) == 1  # the parts after it count for nothing
        assert run.status["batches_leased"] == 0


def test_a_push_whose_rest_never_came_is_rejected_when_the_next_begins(run: Run) -> None:
    with unharmed(run, malformed=1, lease_lost=1):
        worker = run.joined()
        ticket = worker.ticket()
        gradient = gradient_of(worker, ticket)

        worker.push(ticket, pieces=slices(gradient)[:-1])
        worker.push(ticket, gradient)

        first, second = worker.outcome(), worker.outcome()
        assert (first.code, first.rejected_for) == (pb.OUTCOME_REJECTED, pb.REJECTED_FOR_MALFORMED)
        assert f"{TOTAL_BYTES - LAST} bytes of the last were missing" in first.message
        assert second.code == pb.OUTCOME_LEASE_LOST
        assert worker.ticket().base == ticket.base
        leave(worker)


def test_a_push_that_begins_after_an_unfinished_one_expired_gets_its_outcome(
    start, no_tracebacks: None
) -> None:
    run = start(ticket_timeout_s=0.3)
    worker = run.joined()
    ticket = worker.ticket()
    gradient = gradient_of(worker, ticket)
    worker.push(ticket, pieces=slices(gradient)[:-1])
    wait_for(lambda: run.status["workers"][0]["state"] == "hung", "the ticket expires")

    worker.push(ticket, gradient)

    assert [worker.outcome().code for _ in range(2)] == [pb.OUTCOME_LEASE_LOST] * 2
    assert run.status["version"] == 0


def test_the_rest_of_a_refused_push_is_bounded_too(run: Run) -> None:
    with unharmed(run, lease_lost=1):
        worker = run.joined()
        nobodys = pb.Token(life=1, number=1)
        worker.push(worker.ticket(), pieces=[(0, b"x"), (1, bytes(PART_BYTES + 1))], token=nobodys)
        assert_refused(worker.end(), Reason.MALFORMED, f"at most {PART_BYTES} are taken")
        assert worker.heard("outcome")[0].code == pb.OUTCOME_LEASE_LOST


# ------------------------------------------------------ tokens, bases, incarnations

NEVER_ISSUED = {
    "none": lambda token: pb.Token(),
    "a number to come": lambda token: pb.Token(life=token.life, number=token.number + 1),
    "number 0": lambda token: pb.Token(life=token.life, number=0),
    "another life": lambda token: pb.Token(life=token.life ^ 1, number=token.number),
    "no life": lambda token: pb.Token(life=0, number=token.number),
}


@pytest.mark.parametrize("what", NEVER_ISSUED)
def test_a_token_that_was_never_issued_is_void(run: Run, what: str) -> None:
    with unharmed(run, lease_lost=1):
        worker = run.joined()
        ticket = worker.ticket()
        token = NEVER_ISSUED[what](ticket.token)

        worker.push(ticket, gradient_of(worker, ticket), token=token)

        outcome = worker.outcome()
        assert (outcome.code, outcome.token) == (pb.OUTCOME_LEASE_LOST, token)
        assert "nothing was changed" in outcome.message
        leave(worker)


def test_a_push_before_ready_has_no_ticket(run: Run) -> None:
    with unharmed(run, lease_lost=1):
        worker = run.worker().open()
        worker.welcome()
        worker.push(pb.Ticket(base=2))
        assert worker.outcome().code == pb.OUTCOME_LEASE_LOST
        leave(worker)


def test_a_token_is_good_once(run: Run) -> None:
    worker = run.joined()
    ticket = worker.ticket()
    gradient = gradient_of(worker, ticket)
    assert train(worker, ticket).code == pb.OUTCOME_APPLIED

    with unharmed(run, lease_lost=1):
        worker.push(ticket, gradient)
        assert worker.outcome().code == pb.OUTCOME_LEASE_LOST
        leave(worker)


def test_somebody_elses_token_is_void_and_stays_good_for_its_owner(run: Run) -> None:
    owner = run.joined()
    ticket = owner.ticket()
    with unharmed(run, lease_lost=1):
        thief = run.joined()
        thief.push(ticket, gradient_of(owner, ticket))
        assert thief.outcome().code == pb.OUTCOME_LEASE_LOST
        leave(thief)

    assert train(owner, ticket).code == pb.OUTCOME_APPLIED


def test_a_ticket_of_an_earlier_stream_is_void(run: Run) -> None:
    with unharmed(run, lease_lost=1):
        worker = run.joined()
        ticket = worker.ticket()
        gradient = gradient_of(worker, ticket)
        worker.join()  # again, over a new stream
        worker.push(ticket, gradient)
        assert worker.outcome().code == pb.OUTCOME_LEASE_LOST
        leave(worker)


@pytest.mark.parametrize("base", [0, 1, 3, 2**63], ids=["old", "last", "next", "far future"])
def test_a_base_that_is_not_the_tickets_is_rejected(run: Run, base: int) -> None:
    with unharmed(run, malformed=1):
        worker = run.joined()
        ticket = worker.ticket()

        worker.push(ticket, gradient_of(worker, ticket), base=base)

        outcome = worker.outcome()
        assert (outcome.code, outcome.token) == (pb.OUTCOME_REJECTED, ticket.token)
        assert outcome.rejected_for == pb.REJECTED_FOR_MALFORMED
        assert outcome.message == f"the push's base is version {base}, its ticket's is 2"
        assert worker.ticket().token != ticket.token
        leave(worker)


@pytest.mark.parametrize("incarnation", [0, 2])
def test_a_push_of_another_incarnation_is_void(run: Run, incarnation: int) -> None:
    with unharmed(run, lease_lost=1):
        worker = run.joined()
        ticket = worker.ticket()
        worker.push(ticket, gradient_of(worker, ticket), incarnation=incarnation)
        assert worker.outcome().code == pb.OUTCOME_LEASE_LOST
        leave(worker)


# ------------------------------------------------------------------- not finite


def poisoned(worker: BareWorker, ticket: pb.Ticket, value: float, at: int = -1) -> bytes:
    """The ticket's gradient with one number that is not finite."""
    buffer = np.frombuffer(bytearray(gradient_of(worker, ticket)), F32)
    buffer[at] = value
    return buffer.tobytes()


def push_nan(worker: BareWorker, ticket: pb.Ticket) -> pb.Outcome:
    worker.push(ticket, poisoned(worker, ticket, math.nan))
    return worker.outcome()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(("at", "name"), [(0, "count"), (-1, "padding")])
def test_a_gradient_that_is_not_finite_is_rejected(
    run: Run, value: float, at: int, name: str
) -> None:
    with unharmed(run, nonfinite=1):
        worker = run.joined()
        ticket = worker.ticket()

        worker.push(ticket, poisoned(worker, ticket, value, at))

        outcome = worker.outcome()
        assert (outcome.code, outcome.token) == (pb.OUTCOME_REJECTED, ticket.token)
        assert outcome.rejected_for == pb.REJECTED_FOR_NOT_FINITE
        _, number = key(ticket)
        assert f"batch {number} of epoch 0 is not finite: 1 of the" in outcome.message
        assert outcome.message.endswith(f"numbers in {name}")
        leave(worker)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf], ids=str)
def test_a_loss_that_is_not_finite_is_rejected(run: Run, loss: float) -> None:
    with unharmed(run, nonfinite=1):
        worker = run.joined()
        ticket = worker.ticket()

        worker.push(ticket, gradient_of(worker, ticket), loss=loss)

        outcome = worker.outcome()
        assert outcome.rejected_for == pb.REJECTED_FOR_NOT_FINITE
        assert outcome.message.endswith(f"the loss is {loss}")
        leave(worker)


@pytest.mark.parametrize("name", ["queue_s", "load_s", "compute_s"])
@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=str)
def test_times_that_are_not_finite_are_malformed_and_harm_nobody(
    run: Run, name: str, value: float
) -> None:
    with unharmed(run, malformed=1):
        worker = run.joined()
        worker.push(worker.ticket(), **{name: value})
        outcome = worker.outcome()
        assert outcome.rejected_for == pb.REJECTED_FOR_MALFORMED
        assert outcome.message == "the push's times are not finite"
        leave(worker)


def test_a_loss_too_large_for_float32_is_answered_and_the_run_goes_on(
    run: Run, no_tracebacks: None
) -> None:
    worker = run.joined()

    worker.push(worker.ticket(), loss=1e300)

    assert worker.outcome().code in (pb.OUTCOME_REJECTED, pb.OUTCOME_APPLIED)
    assert run.status["state"] != "failed"


def test_a_metric_called_loss_does_not_stand_in_for_the_loss(run: Run) -> None:
    worker = run.joined()
    ticket = worker.ticket()
    assert run.status["loss"] == 0

    worker.push(ticket, gradient_of(worker, ticket), metrics={"loss": 5.0})

    assert worker.outcome().code == pb.OUTCOME_APPLIED
    assert run.status["loss"] == 0


def test_one_metric_that_is_not_finite_does_not_blind_status_for_ever(run: Run) -> None:
    worker = run.joined()
    for value in (1.0, math.nan, 1.0):
        ticket = worker.ticket()
        gradient = gradient_of(worker, ticket)
        worker.push(ticket, gradient, metrics={"accuracy": value})
        assert worker.outcome().code == pb.OUTCOME_APPLIED

    assert run.status["training_metrics"]["accuracy"] == pytest.approx(1.0)


def test_three_in_a_row_quarantine_the_worker_and_others_do_its_batches(start) -> None:
    run = start()
    good, bad = run.joined("good"), run.joined("bad")
    tried = []
    for _ in range(3):
        ticket = bad.ticket()
        tried.append(key(ticket))
        assert push_nan(bad, ticket).rejected_for == pb.REJECTED_FOR_NOT_FINITE

    assert len(set(tried)) == 3  # a batch it refused goes to somebody else first
    states = {w["name"]: w["state"] for w in run.status["workers"]}
    assert states["bad"] == "quarantined"
    assert finish(good).reason == pb.BYE_FINISHED
    assert run.client.pull()["count"].tolist() == [1.0] * EXAMPLES
    assert bad.bye().reason == pb.BYE_FINISHED
    assert len(bad.heard("ticket")) == 3
    assert run.status["rejected"]["nonfinite"] == 3


def test_hundreds_of_them_by_one_of_several_move_nothing(start) -> None:
    """Never three in a row, so that it is not stopped before; at last it is, and named."""
    run = start(task=(400, 1, 1, 0))
    good, bad = run.joined("good"), run.joined("bad")
    for _ in range(100):
        for turn in (push_nan, push_nan, train):
            turn(bad, bad.ticket())
    trained = run.client.pull()
    assert trained.version == 100
    assert np.count_nonzero(trained["count"]) == 100  # its own finite ones, and nothing else
    for _ in range(3):
        push_nan(bad, bad.ticket())

    states = {w["name"]: w["state"] for w in run.status["workers"]}
    assert states["bad"] == "quarantined"
    assert run.status["rejected"]["nonfinite"] == 203
    assert finish(good).reason == pb.BYE_FINISHED
    assert run.client.pull()["count"].tolist() == [1.0] * 400
    assert run.status["version"] == 400


def test_a_good_gradient_between_them_clears_the_worker(start) -> None:
    run = start()
    run.joined("other")
    worker = run.joined("uneven")
    for turn in (push_nan, push_nan, train, push_nan, push_nan, train):
        turn(worker, worker.ticket())

    states = {w["name"]: w["state"] for w in run.status["workers"]}
    assert states["uneven"] != "quarantined"
    assert worker.ticket()


def _refuse_batch_0(run: Run, count: int) -> list[BareWorker]:
    """So many workers push NaN for batch 0, one after the other."""
    workers = []
    for _ in range(count):
        worker = run.joined()
        ticket = worker.ticket()
        assert key(ticket) == (0, 0)
        assert push_nan(worker, ticket).rejected_for == pb.REJECTED_FOR_NOT_FINITE
        workers.append(worker)
    return workers


def test_a_batch_refused_by_three_workers_ends_the_run_and_is_named(start) -> None:
    run = start()

    workers = _refuse_batch_0(run, 3)

    for worker in workers:
        bye = worker.bye()
        assert bye.reason == pb.BYE_FAILED
        assert "batch 0 of epoch 0 is not finite: 1 of the" in bye.message
        assert "--on-nonfinite skip" in bye.message
    ended = run.server.wait(20)
    assert (ended.state, ended.version) == (pb.RUN_FAILED, 0)
    assert "batch 0 of epoch 0" in ended.message


def test_with_skip_it_is_left_out_and_counted_and_the_run_goes_on(start) -> None:
    run = start(on_nonfinite="skip")
    workers = _refuse_batch_0(run, 3)
    missing = sorted(workers[0].leased[0, 0])
    for worker in workers[1:]:
        leave(worker)

    assert finish(workers[0]).reason == pb.BYE_FINISHED

    status = run.status
    assert (status["skipped"], status["batches_applied"]) == (1, BATCHES - 1)
    assert (status["version"], status["state"]) == (BATCHES - 1, "finished")
    count = run.client.pull()["count"]
    assert np.flatnonzero(count == 0).tolist() == missing
    assert count.sum() == EXAMPLES - BATCH


def test_a_batch_refused_three_times_by_the_only_worker_ends_the_run(start) -> None:
    run = start()
    worker = run.joined()
    for ticket in worker.tickets():
        with contextlib.suppress(StreamEnded):  # the last ticket comes with the end of the run
            (push_nan if key(ticket) == (0, 0) else train)(worker, ticket)

    assert worker.bye().reason == pb.BYE_FAILED
    refused = [o for o in worker.heard("outcome") if o.rejected_for == pb.REJECTED_FOR_NOT_FINITE]
    assert len(refused) == 3
    assert "batch 0 of epoch 0" in run.server.wait(20).message


@pytest.mark.parametrize(
    ("updates", "remedy"),
    [(0, "initial weights: look for what is not finite in the data"), (1, "the learning rate")],
)
def test_when_nobody_is_left_who_computes_finite_gradients_the_run_ends(
    updates: int, remedy: str, start
) -> None:
    run = start()
    worker = run.joined("alice")
    for at, ticket in enumerate(worker.tickets()):
        (train if at < updates else push_nan)(worker, ticket)

    assert worker.bye().reason == pb.BYE_FAILED
    ended = run.server.wait(20)
    assert (ended.state, ended.version) == (pb.RUN_FAILED, updates)
    assert "alice" in ended.message
    assert remedy in ended.message


def test_a_poisoned_gradient_of_a_worker_that_has_vanished_goes_back_too(run: Run) -> None:
    with unharmed(run, nonfinite=1):
        worker = run.joined()
        ticket = worker.ticket()
        run.client.pause()
        worker.push(ticket, poisoned(worker, ticket, math.nan))
        wait_for(lambda: run.status["batches_admitted"] == 1, "it is here whole")
        worker.cut()
        wait_for(lambda: not run.status["workers"], "its worker is gone")
        run.client.resume()
        wait_for(lambda: run.status["batches_pending"] == BATCHES - 2, "its batch is back")


# -------------------------------------------------------------------- other calls

WRONG_CALLS = {
    "a pull that has a version to come": (
        "Pull", pb.PullRequest(have_version=3, seen_incarnation=1), "FUTURE_VERSION",
        "version 3 of incarnation 1 has never been made; the newest is version 2",
    ),
    "a pull from another run": (
        "Pull", pb.PullRequest(run_id="20270101-120000-abcd"), "WRONG_RUN", "not 20270101",
    ),
    "a pull of a later incarnation": (
        "Pull", pb.PullRequest(seen_incarnation=2), "OLD_INCARNATION", "incarnation 2 has been",
    ),
    "an evaluation of a version to come": (
        "ReportEvaluation", pb.EvaluationReport(incarnation=1, version=3, metrics={"loss": 1}),
        "FUTURE_VERSION", "version 3 of incarnation 1 .* newest is version 2",
    ),
    "an evaluation of a later incarnation": (
        "ReportEvaluation", pb.EvaluationReport(incarnation=2, version=1, metrics={"loss": 1}),
        "FUTURE_VERSION", "version 1 of incarnation 2",
    ),
    "an evaluation of no incarnation": (
        "ReportEvaluation", pb.EvaluationReport(version=1, metrics={"loss": 1}),
        "FUTURE_VERSION", "version 1 of incarnation 0",
    ),
    "an evaluation that found nothing": (
        "ReportEvaluation", pb.EvaluationReport(incarnation=1, version=2), "MALFORMED",
        "0 metrics",
    ),
    "an evaluation that found too much": (
        "ReportEvaluation",
        pb.EvaluationReport(incarnation=1, version=2, metrics={str(i): i for i in range(1001)}),
        "MALFORMED", "1001 metrics .* 1 to 1000",
    ),
    "an evaluation of an epoch to come": (
        "ReportEvaluation",
        pb.EvaluationReport(incarnation=1, version=2, metrics={"loss": 1}, epoch=1),
        "MALFORMED", "1 complete epochs .* there are 0",
    ),
    "an eviction of nobody": (
        "Evict", pb.EvictRequest(worker="bob"), "UNKNOWN_WORKER", "'bob'; connected: no one",
    ),
    "an eviction of no name": ("Evict", pb.EvictRequest(), "UNKNOWN_WORKER", "no worker"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_CALLS)
def test_a_call_that_cannot_be_answered_is_refused(run: Run, what: str) -> None:
    method, request, reason, text = WRONG_CALLS[what]
    with unharmed(run):
        assert_refused(run.refusal(method, request), Reason[reason], text)


def test_an_eviction_of_somebody_else_names_who_is_here(run: Run) -> None:
    with unharmed(run):
        run.joined("alice")
        refused = run.refusal("Evict", pb.EvictRequest(worker="bob"))
        assert_refused(refused, Reason.UNKNOWN_WORKER, "'bob'; connected: alice")


@pytest.mark.parametrize("wait_s", [math.nan, math.inf, -math.inf, -1.0], ids=str)
def test_a_pull_that_waits_for_no_time_at_all_is_answered_at_once(run: Run, wait_s: float) -> None:
    with unharmed(run):
        request = pb.PullRequest(min_version=2**63, wait_s=wait_s)
        replies = list(run.stub.Pull(request, timeout=20))
        assert pb.PullReply.FromString(replies[0]).stamp.version == 2


@pytest.mark.parametrize("method", ["Pull", "GetStatus", "ReportEvaluation", "Evict"])
def test_a_request_that_is_no_message_is_refused(
    run: Run, no_tracebacks: None, method: str
) -> None:
    with unharmed(run), rpc.connect(run.server.address) as channel:
        kind = channel.unary_stream if method == "Pull" else channel.unary_unary
        call = kind(f"/headwater.v1.ParameterServer/{method}")
        refused = refusal_of(lambda: call(b"\xff" * 64, timeout=20))
        assert_refused(refused, Reason.MALFORMED, ".+")
