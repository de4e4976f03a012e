"""--pipeline: a second ticket, so that a worker computes while it exchanges."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headwater import Client, Server
from headwater.protos import parameter_server_pb2 as pb
from headwater.worker.link import Link, Patience
from headwater.worker.load import LoadedTask
from headwater.worker.loop import Worker
from kit import counting
from kit.processes import BY_GRPC, server, worker
from kit.protocol import BareWorker, counting_gradient, hello_of, key
from kit.waiting import wait_for

TASK = Path(counting.__file__)
EXAMPLES, BATCH = 64, 4


class Run:
    """An embedded server of the counting task, and bare workers that take second tickets."""

    def __init__(self, stack: contextlib.ExitStack, run_dir: Path, on_line: bool, **options: Any):
        self._stack, self._on_line = stack, on_line
        self._task = counting.task(EXAMPLES, 1, BATCH)
        self.server = stack.enter_context(Server(self._task, run_dir=run_dir, **options))
        self.client = stack.enter_context(Client(self.server.address))

    def joined(self, *, pipelines: bool = True, **overrides: Any) -> BareWorker:
        found = self._stack.enter_context(
            BareWorker(self.server.address, hello_of(self._task), on_line=self._on_line)
        )
        found.join(pipelines=pipelines, **overrides)
        return found


@pytest.fixture(params=["grpc", "shm"])
def start(request: Any, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    with contextlib.ExitStack() as stack:
        yield lambda **options: Run(stack, tmp_path / "run", request.param == "shm", **options)


def push(worker: BareWorker, ticket: pb.Ticket) -> None:
    worker.push(ticket, counting_gradient(worker.layout, worker.leased[key(ticket)]))


def tickets_of(worker: BareWorker) -> list[pb.Ticket]:
    worker.poll()
    return worker.heard("ticket")


def test_the_second_ticket_is_at_the_same_weights_and_the_third_at_fresh_ones(start) -> None:
    run = start(pipeline="on")
    worker = run.joined()
    first, second = worker.ticket(), worker.ticket()
    assert (first.base, second.base) == (0, 0)
    assert len({part.version for part in worker.heard("weights")}) == 1
    push(worker, first)
    outcome, third = worker.outcome(), worker.ticket()
    assert (outcome.code, outcome.version, outcome.staleness) == (pb.OUTCOME_APPLIED, 1, 0)
    assert (third.base, worker.weights.version) == (1, 1)
    push(worker, second)
    assert worker.outcome().staleness == 1
    push(worker, third)
    assert worker.outcome().staleness == 1


def test_no_more_than_two_are_under_way_however_fast_the_worker_is(start) -> None:
    run = start(pipeline="on")
    worker = run.joined()
    tickets = [worker.ticket(), worker.ticket()]
    for _ in range(4):
        for ticket in tickets:  # both, before it is heard what became of the first
            push(worker, ticket)
        outcomes = [worker.outcome() for _ in tickets]
        assert max(outcome.staleness for outcome in outcomes) <= 1
        tickets = [worker.ticket(), worker.ticket()]
    run.client.status()
    assert len(tickets_of(worker)) == 10


def test_all_batches_count_once_with_second_tickets(start) -> None:
    run = start(pipeline="on")
    ann, bob = run.joined(), run.joined()
    done: set[int] = set()
    while run.client.status()["state"] != "finished":
        for each in (ann, bob):
            for ticket in tickets_of(each):
                if ticket.token.number not in done:
                    done.add(ticket.token.number)
                    push(each, ticket)
    assert run.client.pull()["count"].tolist() == [1] * EXAMPLES


@pytest.mark.parametrize(
    ("options", "pipelines"),
    [({"pipeline": "off"}, True), ({"pipeline": "on"}, False), ({"pipeline": "auto"}, True),
     ({"pipeline": "on", "consistency": "bounded:0"}, True),],
)  # fmt: skip
def test_one_worker_has_one_ticket_unless_it_is_to_have_two(start, options, pipelines) -> None:
    run = start(**options)
    worker = run.joined(pipelines=pipelines)
    ticket = worker.ticket()
    worker.progress(moving=True)
    run.client.status()  # by now it would have come
    assert tickets_of(worker) == [ticket]


def test_error_feedback_has_no_second_tickets(tmp_path: Path) -> None:
    """What a gradient leaves out is added to the next only once it was applied."""
    with contextlib.ExitStack() as stack:
        run = Run(stack, tmp_path / "run", on_line=False, pipeline="on", compress="topk:0.1")
        found = run.joined()
        ticket = found.ticket()
        run.client.status()
        assert tickets_of(found) == [ticket]


def test_sync_has_no_second_tickets(start) -> None:
    run = start(pipeline="on", consistency="sync:2")
    worker = run.joined(compute={"all": "alike"})
    ticket = worker.ticket()
    run.client.status()
    assert tickets_of(worker) == [ticket]


def test_auto_gives_second_ones_to_two_workers_that_wait_for_a_network_or_a_host(start) -> None:
    run = start(pipeline="auto")
    ann = run.joined()
    first = ann.ticket()
    bob = run.joined()
    wait_for(lambda: len(tickets_of(bob)) == 2, "two at once")
    assert tickets_of(ann) == [first]
    push(ann, first)
    wait_for(lambda: len(tickets_of(ann)) == 3, "from now on two at once")


def test_auto_gives_none_to_a_cpu_on_the_servers_machine(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        run = Run(stack, tmp_path / "run", on_line=True, pipeline="auto")
        ann, bob = run.joined(platform="cpu"), run.joined(platform="cpu")
        for worker in (ann, bob):
            push(worker, worker.ticket())
            assert worker.outcome().code == pb.OUTCOME_APPLIED
            worker.ticket()
        run.client.status()
        assert [len(tickets_of(worker)) for worker in (ann, bob)] == [2, 2]


def test_shared_weights_stay_as_they_are_until_the_last_push_that_is_based_on_them(
    tmp_path: Path,
) -> None:
    with contextlib.ExitStack() as stack:
        run = Run(stack, tmp_path / "run", on_line=True, pipeline="on")
        slow, fast = run.joined(), run.joined(pipelines=False)
        first, second = slow.ticket(), slow.ticket()
        assert first.base == second.base == 0
        (weights,) = slow.heard("weights")
        here = slow.slots[weights.slot]
        push(slow, first)
        assert slow.outcome().code == pb.OUTCOME_APPLIED
        for _ in range(6):  # versions that need a slot each
            push(fast, fast.ticket())
            assert fast.outcome().code == pb.OUTCOME_APPLIED
            assert not here.any()  # still version 0
        push(slow, second)
        assert slow.outcome().code == pb.OUTCOME_APPLIED
        shared: set[int] = set()
        for _ in range(4):
            push(fast, fast.ticket())
            assert fast.outcome().code == pb.OUTCOME_APPLIED
            shared |= {part.slot for part in fast.heard("weights")}
        assert np.any(here) or weights.slot not in fast.slots or weights.slot in shared


def test_a_worker_that_is_lost_gives_both_its_batches_back(start) -> None:
    run = start(pipeline="on")
    ann = run.joined()
    lost = {key(ann.ticket()), key(ann.ticket())}
    ann.cut()
    bob = run.joined()
    done = []
    for ticket in bob.tickets():
        done.append(key(ticket))
        push(bob, ticket)
    assert lost <= set(done)
    assert run.client.pull()["count"].tolist() == [1] * EXAMPLES


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_worker_whose_tickets_expired_goes_on_with_those_that_come_in_their_place(
    transport: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    awake, went_on = threading.Event(), threading.Event()

    def before_gradient(epoch: int) -> None:
        if awake.is_set():
            went_on.set()
        assert awake.wait(60)

    def has_more_soon(link: Link) -> bool:
        """As where the answer overtakes what is left to send of a large gradient."""
        end = time.monotonic() + 0.5
        while not (found := has_more(link)) and awake.is_set() and not went_on.is_set():
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        return found

    has_more = Link.has_more
    monkeypatch.setattr(Link, "has_more", has_more_soon)
    with contextlib.ExitStack() as stack:
        run = Run(stack, tmp_path / "run", False, pipeline="on", ticket_timeout_s=2.0)
        slow = Worker(
            LoadedTask(counting.task(EXAMPLES, 1, BATCH), "task", {}, ""),
            run.server.address,
            Patience(run.server.address, 10),
            transport=transport,
            before_gradient=before_gradient,
        )
        life = stack.enter_context(ThreadPoolExecutor(1)).submit(slow.run)
        stack.callback(run.server.stop)
        stack.callback(awake.set)
        wait_for(lambda: run.client.status()["batches_leased"] > 0, "it has both its tickets")
        wait_for(lambda: run.client.status()["batches_leased"] == 0, "both have expired")
        awake.set()
        wait_for(
            lambda: run.client.status()["state"] == "finished" or life.done(), "the end of the run"
        )
        run.server.stop()
        life.result(10)
    assert run.server.wait(1).version == EXAMPLES // BATCH


@pytest.mark.parametrize("way", [(), BY_GRPC], ids=["shm", "grpc"])
@pytest.mark.parametrize("consistency", ["async", "bounded:3", "bounded:1"])
def test_real_workers_count_exactly(tmp_path: Path, way: tuple[str, ...], consistency: str) -> None:
    options = ("--task-option", "examples=1024", "--task-option", "epochs=2",
               "--task-option", "padding=600000")  # fmt: skip
    with contextlib.ExitStack() as stack:
        _, address = stack.enter_context(
            server(TASK, "--pipeline", "on", "--consistency", consistency, *options,
                   cwd=tmp_path)
        )  # fmt: skip
        crew = [
            stack.enter_context(worker(TASK, address, *way, *options, cwd=tmp_path))
            for _ in range(2)
        ]
        client = stack.enter_context(Client(address))
        wait_for(
            lambda: client.status()["state"] == "finished", "the end of the run", 60,
            lambda: (client.status(), [each.errors for each in crew]),
        )  # fmt: skip
        status = client.status()
        assert client.pull()["count"].tolist() == [2] * 1024
        assert sum(status["rejected"].values()) == 0
        if consistency != "async":
            assert status["staleness"]["max"] <= int(consistency[-1])
