"""Exchange, promise by promise: what the .proto says of a worker's stream, over real gRPC."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import load_file

from headwater import Client, Server, Task
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.server import shared_line
from headwater.server.order import BatchOrder
from kit import counting, processes
from kit.protocol import BareWorker, counting_gradient, hello_of, key, slices
from kit.waiting import wait_for

EXAMPLES, BATCH = 64, 4
BATCHES = EXAMPLES // BATCH
SEVERAL_PARTS = 700_000
"""Padding, in float32: the model is 2.8 MB, in three parts."""

TASK_FILE = """
from kit import counting

task = counting.task(examples=64, epochs=1, batch_size=4)
"""


class Run:
    """An embedded server of the counting task, its client, and its bare workers."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        run_dir: Path,
        task: Task,
        on_line: bool,
        **options: Any,
    ):
        self._stack = stack
        self.on_line = on_line
        self.task = task
        self.server = stack.enter_context(Server(task, run_dir=run_dir, **options))
        self.client = stack.enter_context(Client(self.server.address))

    def worker(self, name: str = "", **options: Any) -> BareWorker:
        """One that has not opened its stream yet."""
        hello = hello_of(self.task)
        worker = BareWorker(self.server.address, hello, name=name, on_line=self.on_line, **options)
        return self._stack.enter_context(worker)

    def joined(self, name: str = "") -> BareWorker:
        """One that has said hello and ready."""
        worker = self.worker(name)
        worker.join()
        return worker

    @property
    def status(self) -> dict[str, Any]:
        return self.client.status()

    def state_of(self, worker: BareWorker) -> str:
        """What status calls it; "" when it is not in the roster."""
        (welcome,) = worker.heard("welcome")
        return next(
            (w["state"] for w in self.status["workers"] if w["id"] == welcome.worker_id), ""
        )

    def count(self) -> list[float]:
        """How often each example has moved the weights."""
        return self.client.pull()["count"].tolist()


@pytest.fixture(params=["grpc", "shm"])
def start(request: Any, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs: `start(padding=..., epochs=..., <server's options>)`."""
    with contextlib.ExitStack() as stack:

        def run(padding: int = 0, epochs: int = 1, examples: int = EXAMPLES, **options: Any) -> Run:
            task = counting.task(examples, epochs, BATCH, padding)
            return Run(stack, tmp_path / "run", task, request.param == "shm", **options)

        yield run


def train(worker: BareWorker, ticket: pb.Ticket) -> pb.Outcome:
    """Do what a good worker does with a ticket; returns what became of it."""
    worker.push(ticket, counting_gradient(worker.layout, worker.leased[key(ticket)]))
    return worker.outcome()


def finish(worker: BareWorker) -> None:
    """Train until the server says bye."""
    for ticket in worker.tickets():
        train(worker, ticket)


# ------------------------------------------------------------------------ order


def test_hello_welcome_ready_ticket_push_outcome_follow_in_this_order(start) -> None:
    run = start()
    worker = run.worker("alice").open()

    welcome = worker.welcome()
    worker.progress(moving=True, phase=pb.PHASE_WAITING)
    wait_for(lambda: run.state_of(worker) == "waiting", "the progress arrives")
    assert [event.kind for event in worker.poll()] == ["welcome"]  # no ticket before ready
    assert run.status["batches_leased"] == 0

    worker.ready()
    ticket = worker.ticket()
    assert [event.kind for event in worker.events] == ["welcome", "weights", "lease", "ticket"]

    outcome = train(worker, ticket)
    next_ticket = worker.ticket()
    assert [event.kind for event in worker.events[4:]] == ["outcome", "weights", "ticket"]

    assert (welcome.run_id, welcome.name) == (run.status["run_id"], "alice")
    assert (welcome.epochs, welcome.batches_per_epoch, welcome.batch_size) == (1, BATCHES, BATCH)
    assert (outcome.code, outcome.token) == (pb.OUTCOME_APPLIED, ticket.token)
    assert (outcome.version, outcome.staleness) == (1, 0)
    assert next_ticket.base == 1


def test_each_push_gets_exactly_one_outcome(start) -> None:
    run = start()
    worker = run.joined()
    pushed: list[pb.Token] = []
    for _ in range(5):
        ticket = worker.ticket()
        gradient = counting_gradient(worker.layout, worker.leased[key(ticket)])
        for token in (pb.Token(life=1, number=1), ticket.token, ticket.token):
            worker.push(ticket, gradient, token=token)
            pushed.append(token)

    answers = [worker.outcome() for _ in pushed]
    worker.leave()
    worker.end()

    assert sorted(str(answer.token) for answer in answers) == sorted(map(str, pushed))
    assert len(worker.heard("outcome")) == len(pushed)
    codes = [answer.code for answer in answers]
    assert codes.count(pb.OUTCOME_APPLIED) == 5
    assert codes.count(pb.OUTCOME_LEASE_LOST) == 10


def test_leases_carry_the_indices_of_the_servers_order(start) -> None:
    run = start(epochs=2)
    order = BatchOrder(example_count=EXAMPLES, batch_size=BATCH, epochs=2, seed=0)
    worker = run.joined()

    finish(worker)

    granted = [batch for lease in worker.heard("lease") for batch in lease.granted]
    expected = {
        (order.id(at).epoch, order.id(at).number): order.indices(at).tolist()
        for at in range(order.total)
    }
    assert {(b.id.epoch, b.id.number): list(b.indices) for b in granted} == expected
    assert [key(ticket) for ticket in worker.heard("ticket")] == sorted(expected)
    assert run.count() == [2.0] * EXAMPLES


def test_the_weights_of_its_base_come_whole_before_each_ticket(start) -> None:
    run = start(padding=SEVERAL_PARTS)
    workers = [run.joined(), run.joined()]
    bases = []
    for turn in range(BATCHES):
        worker = workers[turn % 2]
        ticket = worker.ticket()
        assert worker.weights.version == ticket.base
        assert worker.weights.leaves[0].sum() == BATCH * ticket.base  # the counts of that version
        bases.append(ticket.base)
        assert train(worker, ticket).code == pb.OUTCOME_APPLIED

    assert bases == [0, 0, *range(1, BATCHES - 1)]  # each got its next ticket with its outcome
    for worker in workers:
        offsets = {event.value.offset for event in worker.events if event.kind == "weights"}
        assert len(offsets) == (1 if run.on_line else 3)


def test_a_worker_that_has_a_version_is_not_sent_it_again(start) -> None:
    run = start(padding=SEVERAL_PARTS)
    worker = run.joined()
    ticket = worker.ticket()

    worker.push(ticket, base=ticket.base + 1)  # rejected: the version stays
    assert worker.outcome().code == pb.OUTCOME_REJECTED
    again = worker.ticket()

    assert again.base == ticket.base
    assert sum(event.size for event in worker.events) <= worker.layout.total_bytes


# ----------------------------------------------------------------- ends of streams


def test_a_higher_attempt_takes_over_from_the_older_stream_and_its_ticket(start) -> None:
    run = start()
    old, new = run.worker(instance=7), run.worker(instance=7)
    old.join()
    ticket = old.ticket()

    new.join(attempt=2)

    ended = old.end()
    assert (ended.code, ended.reason) == (grpc.StatusCode.ABORTED, "FENCED")
    assert len(run.status["workers"]) == 1
    assert key(new.ticket()) == key(ticket)  # its batch has come back
    new.push(ticket)
    assert new.outcome().code == pb.OUTCOME_LEASE_LOST
    assert run.status["version"] == 0


def test_an_attempt_that_is_not_the_newest_is_fenced(start) -> None:
    run = start()
    new, old = run.worker(instance=7), run.worker(instance=7)
    new.join(attempt=2)

    ends = [old.open(attempt=attempt).end() for attempt in (2, 1)]

    assert [(e.code, e.reason) for e in ends] == [(grpc.StatusCode.ABORTED, "FENCED")] * 2
    assert train(new, new.ticket()).code == pb.OUTCOME_APPLIED


def test_a_worker_that_leaves_gets_bye_and_its_batches_go_to_others(start) -> None:
    run = start()
    leaver, other = run.joined(), run.joined()
    left = {key(leaver.ticket()), *leaver.leased}

    leaver.leave()

    assert leaver.bye().reason == pb.BYE_LEFT
    assert leaver.end().code is grpc.StatusCode.OK
    finish(other)
    assert left <= {key(ticket) for ticket in other.heard("ticket")}
    assert run.count() == [1.0] * EXAMPLES
    assert run.status["workers"] == []


@pytest.mark.parametrize("how", ["cut", "half_close"])
def test_a_stream_that_ends_without_a_word_gives_everything_back(start, how: str) -> None:
    run = start(padding=SEVERAL_PARTS)
    gone = run.joined()
    ticket = gone.ticket()
    gradient = counting_gradient(gone.layout, gone.leased[key(ticket)])
    gone.push(ticket, pieces=slices(gradient)[:-1])  # the last part is missing

    if how == "cut":
        gone.cut()
    else:
        gone.done_sending()

    wait_for(lambda: not run.status["workers"], "the worker leaves the roster")
    assert run.status["batches_pending"] == BATCHES
    finish(run.joined())
    assert run.count() == [1.0] * EXAMPLES


def test_a_stream_cut_while_weights_are_on_their_way_ends_at_once(start) -> None:
    run = start(padding=SEVERAL_PARTS, examples=400 * BATCH)
    for _ in range(80):  # it depends on the moment
        worker = run.joined()
        worker.push(worker.ticket())
        worker.outcome()  # the weights of the next ticket follow, or are here

        worker.cut()

        wait_for(lambda: not run.status["workers"], "it leaves the roster", timeout_s=3)
        worker.close()
    assert run.status["batches_leased"] == 0


def test_a_gradient_received_whole_is_applied_although_its_worker_has_vanished(start) -> None:
    run = start(padding=SEVERAL_PARTS)
    worker = run.joined()
    ticket = worker.ticket()
    examples = worker.leased[key(ticket)]
    run.client.pause()  # so that it is gone before its gradient is applied
    worker.push(ticket, counting_gradient(worker.layout, examples))
    wait_for(lambda: run.status["batches_admitted"] == 1, "the gradient is here whole")

    worker.cut()
    wait_for(lambda: not run.status["workers"], "the worker leaves the roster")
    run.client.resume()

    wait_for(lambda: run.status["version"] == 1, "the gradient is applied")
    assert [at for at, count in enumerate(run.count()) if count] == sorted(examples)
    finish(run.joined())
    assert run.count() == [1.0] * EXAMPLES


def test_who_comes_after_the_end_gets_bye_finished(start) -> None:
    run = start()
    early = run.joined()
    finish(early)
    assert early.bye().reason == pb.BYE_FINISHED

    late = run.worker().open()

    assert late.bye().reason == pb.BYE_FINISHED
    assert late.end().code is grpc.StatusCode.OK
    wait_for(lambda: not run.status["workers"], "both have left")
    assert run.status["state"] == "finished"


def test_an_evicted_worker_gets_bye_and_may_not_come_back(start) -> None:
    run = start()
    bad, good = run.joined("bad"), run.joined("good")
    ticket = bad.ticket()

    run.client.evict("bad")

    assert bad.bye().reason == pb.BYE_EVICTED
    assert bad.end().code is grpc.StatusCode.OK
    again = bad.open().end()
    assert (again.code, again.reason) == (grpc.StatusCode.PERMISSION_DENIED, "EVICTED")
    finish(good)
    assert key(ticket) in {key(t) for t in good.heard("ticket")}
    assert run.count() == [1.0] * EXAMPLES


def test_workers_whose_streams_break_just_as_the_server_writes_are_gone_at_once(start) -> None:
    """Not when their silence is noticed: what they had goes to others until then."""
    run = start()
    for _ in range(30):
        worker = run.joined()
        (here,) = wait_for(lambda: run.client.status()["workers"], "it is in the roster")
        run.client.evict(here["name"])
        worker.close()
        wait_for(lambda: not run.client.status()["workers"], "it is gone", 5.0)


def test_a_new_process_may_come_in_place_of_an_evicted_one(start) -> None:
    run = start()
    bad = run.joined("bad")
    run.client.evict(str(bad.heard("welcome")[0].worker_id))
    assert bad.bye().reason == pb.BYE_EVICTED

    new = run.joined("bad")

    assert train(new, new.ticket()).code == pb.OUTCOME_APPLIED


def test_a_silent_stream_is_ended_and_one_that_speaks_is_not(start) -> None:
    run = start(session_timeout_s=1.0)
    silent, speaking = run.joined("silent"), run.joined("speaking")
    lost = {key(silent.ticket()), *silent.leased}

    def ended() -> bool:
        speaking.progress(moving=False)
        return run.state_of(silent) == ""

    wait_for(ended, "the silent one leaves the roster")

    end = silent.end()
    assert (end.code, end.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "SILENT")
    assert "not heard of" in end.text
    finish(speaking)
    assert lost <= {key(ticket) for ticket in speaking.heard("ticket")}


def test_a_stream_on_which_no_hello_comes_is_ended(start) -> None:
    end = start(session_timeout_s=0.5).worker().connect().end()

    assert (end.code, end.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "SILENT")
    assert "nothing came" in end.text


def test_a_worker_that_waits_hears_of_the_server_and_one_that_computes_is_left_alone(start) -> None:
    """Else waiting could not be told from a network that swallows what the server sends."""
    run = start()
    computing, waiting = run.joined("computing"), run.joined("waiting")
    computing.ticket()
    computing.progress(moving=True)
    wait_for(lambda: run.state_of(computing) == "computing", "the server knows")
    ticket, before = waiting.ticket(), len(computing.pulses)
    run.client.pause()
    waiting.push(ticket)

    wait_for(lambda: len(waiting.pulses) >= 2, "the server is heard twice", 10.0)

    assert waiting.pulses[-1].version == 0
    assert len(computing.pulses) == before


def test_an_endless_compilation_is_ended(start) -> None:
    run = start(compile_timeout_s=1.0)
    ready, compiling = run.joined(), run.worker().open()
    compiling.welcome()

    end = compiling.end()

    assert (end.code, end.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "COMPILE_TIMEOUT")
    assert train(ready, ready.ticket()).code == pb.OUTCOME_APPLIED


@pytest.mark.parametrize("start", ["grpc"], indirect=True)
def test_a_pull_that_is_not_read_is_cut(start, monkeypatch) -> None:
    monkeypatch.setattr(shared_line, "WRITE_TIMEOUT_S", 0.5)
    run = start(padding=4_000_000)
    call = rpc.Stub(rpc.connect(run.server.address)).Pull(pb.PullRequest())
    next(call)
    time.sleep(3)  # not to read for so long is what it is about
    with pytest.raises(grpc.RpcError):
        for _ in call:
            pass
    assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("start", ["grpc"], indirect=True)  # in slots they take nobody's time
def test_a_reader_that_does_not_take_its_weights_is_cut(start, monkeypatch) -> None:
    monkeypatch.setattr(shared_line, "WRITE_TIMEOUT_S", 0.5)
    run = start(padding=4_000_000)  # far more than the connection holds by itself
    slow = run.worker()
    with slow.not_reading():
        slow.open()
        slow.ready()
        wait_for(lambda: run.status["workers"], "it is here")
        wait_for(lambda: not run.status["workers"], "it is cut")

    end = slow.end()

    assert (end.code, end.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "SLOW_READER")
    wait_for(lambda: run.status["batches_pending"] == BATCHES, "its batches are back")


# ----------------------------------------------------------------------- tickets


def test_a_ticket_without_progress_is_taken_back_and_one_with_progress_is_not(start) -> None:
    run = start(ticket_timeout_s=1.0)
    moving, hung = run.joined("moving"), run.joined("hung")
    kept, lost = moving.ticket(), hung.ticket()
    examples = hung.leased[key(lost)]

    def taken_back() -> bool:
        moving.progress(moving=True)
        hung.progress(moving=False)  # alive, but nothing is done
        return run.state_of(hung) == "hung"

    wait_for(taken_back, "the ticket expires")

    assert train(moving, kept).code == pb.OUTCOME_APPLIED
    before = run.count()
    hung.push(lost, counting_gradient(hung.layout, examples))
    late = hung.outcome()
    assert (late.code, late.token) == (pb.OUTCOME_LEASE_LOST, lost.token)
    assert run.count() == before
    assert run.status["rejected"]["lease_lost"] == 1

    moving.leave()
    moving.end()
    finish(hung)  # it is answered with a ticket, and does the rest alone
    assert run.count() == [1.0] * EXAMPLES


def test_a_gradient_that_outlasts_its_ticket_is_given_the_time_when_it_is_computed_again(
    start, caplog
) -> None:
    run = start(ticket_timeout_s=0.3)
    slow = run.joined("slow")
    ticket = slow.ticket()
    wait_for(lambda: run.state_of(slow) == "hung", "the ticket expires")
    assert "raise --ticket-timeout where one gradient takes that long" in caplog.text

    slow.push(ticket, load_s=2.0, compute_s=5.0)

    assert slow.outcome().code == pb.OUTCOME_LEASE_LOST
    assert slow.ticket().deadline_s == 70.0


def test_a_hung_worker_is_told_which_leases_it_has_lost(start) -> None:
    run = start(ticket_timeout_s=0.3)
    hung = run.joined()
    ticket = hung.ticket()
    reserved = set(hung.leased) - {key(ticket)}

    def withdrawn() -> set[tuple[int, int]]:
        hung.poll()
        return {(b.epoch, b.number) for lease in hung.heard("lease") for b in lease.withdrawn}

    assert wait_for(withdrawn, "the lease is withdrawn") == reserved
    assert run.status["batches_leased"] == 0


def test_at_the_end_an_idle_worker_is_given_what_a_slow_one_has_in_reserve(start) -> None:
    run = start(examples=8 * BATCH)  # as many batches as the first to ask has reserved
    slow, idle = run.joined(), run.worker()
    mine = slow.ticket()
    idle.join()

    taken = [key(ticket) for ticket in _until_none_is_left(run, idle)]

    assert len(taken) == 7

    def has_only_what_it_computes() -> bool:
        slow.poll()
        return set(slow.leased) == {key(mine)}

    wait_for(has_only_what_it_computes, "the slow one hears that its reserve is gone")
    assert train(slow, mine).code == pb.OUTCOME_APPLIED
    assert idle.bye().reason == pb.BYE_FINISHED
    assert run.count() == [1.0] * (8 * BATCH)


def _until_none_is_left(run: Run, worker: BareWorker) -> Iterator[pb.Ticket]:
    """Train on every ticket while others hold only what they compute."""
    while run.status["batches_applied"] < 7:
        ticket = worker.ticket()
        yield ticket
        train(worker, ticket)


def test_staging_memory_bounds_how_many_hold_a_ticket(start) -> None:
    run = start(max_staged_bytes=1)  # room for one is always made
    first, second = run.joined(), run.joined()
    ticket = first.ticket()
    wait_for(lambda: run.state_of(second) == "waiting", "the second asks")
    assert run.status["batches_leased"] == 8  # the first one's
    assert second.poll()[-1].kind == "welcome"

    assert train(first, ticket).code == pb.OUTCOME_APPLIED

    assert second.ticket().base == 1


# ------------------------------------------------------------------ pause and stop


def test_pause_holds_pushes_and_version_and_resume_applies_them(start) -> None:
    run = start()
    workers = [run.joined(), run.joined()]
    tickets = [worker.ticket() for worker in workers]
    run.client.pause()
    weights = run.count()

    for worker, ticket in zip(workers, tickets, strict=True):
        worker.push(ticket, counting_gradient(worker.layout, worker.leased[key(ticket)]))
    wait_for(lambda: run.status["batches_admitted"] == 2, "both gradients are held")

    late = run.joined()  # asks for a ticket, and gets none
    wait_for(lambda: run.state_of(late) == "waiting", "the third asks")
    assert (run.status["state"], run.status["version"], run.count()) == ("paused", 0, weights)
    for worker in (*workers, late):
        worker.poll()
        assert not worker.heard("outcome")
    assert late.heard("ticket") == []

    run.client.resume()

    outcomes = [worker.outcome() for worker in workers]
    assert sorted(o.version for o in outcomes) == [1, 2]
    assert all(o.code == pb.OUTCOME_APPLIED for o in outcomes)
    assert late.ticket().base in (0, 1, 2)


def test_pause_returns_when_the_version_stands_still(start) -> None:
    run = start(examples=400 * BATCH)
    worker = run.joined()
    for _ in range(20):
        worker.push(worker.ticket())
        run.client.pause()

        version = run.status["version"]
        weights = run.client.pull().version

        assert version == weights == run.status["version"]
        run.client.resume()


def test_deadlines_stand_still_during_a_pause(start) -> None:
    limit = 1.0
    run = start(ticket_timeout_s=limit)
    worker = run.joined()
    ticket = worker.ticket()

    run.client.pause()
    began = run.status["uptime_s"]
    wait_for(lambda: run.status["uptime_s"] > began + 1.5 * limit, "the deadline would be over")
    run.client.resume()

    assert train(worker, ticket).code == pb.OUTCOME_APPLIED
    assert run.status["rejected"]["lease_lost"] == 0


def test_stop_keeps_what_was_applied_says_bye_and_exits_0(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK_FILE)
    tests = str(Path(__file__).parents[1])
    task = counting.task(EXAMPLES, 1, BATCH)
    arguments = ("--task", "task.py", *processes.FREE_PORT, "--run-dir", "run", "--grace", "2")
    with processes.Command("server", *arguments, cwd=tmp_path, PYTHONPATH=tests) as command:
        address = wait_for(lambda: _address(command), "it listens", 60, lambda: command.errors)
        with BareWorker(address, hello_of(task)) as worker, Client(address) as client:
            worker.join()
            examples: list[int] = []
            for _ in range(3):
                ticket = worker.ticket()
                examples += worker.leased[key(ticket)]
                train(worker, ticket)

            client.stop()

            assert worker.bye().reason == pb.BYE_STOPPED
            assert worker.end().code is grpc.StatusCode.OK
            assert command.wait() == 0
    kept = load_file(tmp_path / "run" / "weights.safetensors")
    assert np.flatnonzero(kept["count"]).tolist() == sorted(examples)


def _address(command: processes.Command) -> str:
    assert command.process.poll() is None, command.errors
    return command.errors.partition("listening on ")[2].partition(";")[0]


def test_stop_applies_what_pause_was_holding(start) -> None:
    """The .proto: "Ends the server in order: what it holds is applied"."""
    run = start()
    worker = run.joined()
    ticket = worker.ticket()
    run.client.pause()
    worker.push(ticket, counting_gradient(worker.layout, worker.leased[key(ticket)]))
    wait_for(lambda: run.status["batches_admitted"] == 1, "the gradient is held")

    run.server.stop()

    assert worker.bye().reason == pb.BYE_STOPPED
    assert run.server.wait(1).version == 1
