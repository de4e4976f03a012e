"""`set`: settings changed while a run trains, over real gRPC, and kept through crashes."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from headwater import Client, Server
from headwater.client.status import Status
from headwater.protos import files, snapshot_file
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused
from headwater.server import journal, steering
from headwater.server.store import Published, Step, Store
from kit import counting, processes
from kit.disk import FaultyDisk, set_faults
from kit.line import ONES, LineRun, line
from kit.protocol import BareWorker, hello_of
from kit.waiting import wait_for


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., LineRun]]:
    with contextlib.ExitStack() as stack:
        yield lambda optimizer="sgd(1.0)", **options: LineRun(
            stack, line(optimizer), tmp_path / "run", **options
        )


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What XLA compiled meanwhile, in this process."""
    found: list[str] = []

    def heard(event: str, seconds: float, **_: Any) -> None:
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


def test_what_can_be_set_is_listed_with_its_value_and_what_a_change_costs(
    start: Callable[..., LineRun],
) -> None:
    run = start("sgd(cosine_decay_schedule(0.1, total_updates), momentum=0.9)")
    settings = run.client.settings()
    assert settings["consistency"]["value"] == "async"
    assert settings["learning_rate"] == {
        "value": "schedule", "is_set": False, "compiles": False, "planned": []
    }  # fmt: skip
    assert settings["momentum"] == {
        "value": "0.9", "is_set": False, "compiles": True, "planned": []
    }  # fmt: skip


def test_a_learning_rate_holds_from_the_next_update_on_and_compiles_nothing(
    start: Callable[..., LineRun],
) -> None:
    run = start("sgd(1.0)")
    assert run.push() == 1.0
    with compilations() as compiled:
        said = run.client.set({"learning_rate": 0.25})
        assert run.push() == 0.25
        run.client.set({"learning_rate": 2})
        assert run.push() == 2.0
    assert compiled == []
    assert said == "learning_rate=0.25 from version 1 on"
    assert run.client.settings()["learning_rate"]["is_set"]
    assert run.client.status()["optimizer_numbers"] == {"learning_rate": 2.0}


def test_compilations_are_seen() -> None:
    with compilations() as compiled:
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
    assert compiled


def test_another_number_is_compiled_once_before_it_holds(start: Callable[..., LineRun]) -> None:
    run = start("sgd(1.0, momentum=0.5)")
    run.push()
    with compilations() as compiled:
        run.client.set({"momentum": 0.0})
        assert len(compiled) == 1
        assert run.push() == 1.0
        assert run.push() == 1.0
    assert len(compiled) == 1
    assert run.client.settings()["momentum"]["compiles"], "as any other value would be"


def test_a_number_set_at_a_version_is_the_first_of_the_update_after_it(
    start: Callable[..., LineRun],
) -> None:
    run = start("sgd(1.0)")
    run.client.set({"learning_rate": 0.5}, at_version=3)
    run.client.set({"learning_rate": 0.125}, at_version=4)
    planned = run.client.settings()["learning_rate"]["planned"]
    assert planned == [
        {"after_version": 3, "value": "0.5", "queued": False},
        {"after_version": 4, "value": "0.125", "queued": False},
    ]
    assert [run.push() for _ in range(6)] == [1.0, 1.0, 1.0, 0.5, 0.125, 0.125]
    assert run.client.settings()["learning_rate"]["planned"] == []
    assert run.value("learning_rate") == "0.125"
    assert run.client.status()["optimizer_numbers"] == {"learning_rate": 0.125}


def test_a_value_in_place_of_a_schedule(start: Callable[..., LineRun]) -> None:
    run = start("sgd(linear_schedule(1.0, 0.0, total_updates))")
    assert run.push() == 1.0
    run.client.set({"learning_rate": 0.5})
    assert run.push() == run.push() == 0.5
    assert run.value("learning_rate") == "0.5"


def test_a_schedule_goes_on_where_it_would_be(start: Callable[..., LineRun]) -> None:
    run = start("sgd(piecewise_constant_schedule(1.0, {2: 0.5, 4: 0.5}))")
    run.client.set({"learning_rate": 0.75})
    assert [run.push(), run.push()] == [0.75, 0.75]
    with compilations() as compiled:
        run.client.set({"learning_rate": "schedule"})
        assert run.push() == 0.5
    assert compiled == []
    setting = run.client.settings()["learning_rate"]
    assert (setting["value"], setting["is_set"]) == ("schedule", False)

    run.client.set({"learning_rate": 0.75})
    run.client.set({"learning_rate": "schedule"}, at_version=4)
    planned = run.client.settings()["learning_rate"]["planned"]
    assert planned == [{"after_version": 4, "value": "schedule", "queued": False}]
    assert [run.push(), run.push()] == [0.75, 0.25]
    assert run.client.status()["optimizer_numbers"] == {}


def test_who_mistypes_a_number_is_told_of_its_schedule(start: Callable[..., LineRun]) -> None:
    run = start("sgd(linear_schedule(1.0, 0.0, total_updates), momentum=0.5)")
    with pytest.raises(Refused, match="such as 3e-4; or schedule, which is its own"):
        run.client.set({"learning_rate": "scheduled"})
    with pytest.raises(Refused, match="momentum=schedule: it takes a number, such as 3e-4"):
        run.client.set({"momentum": "schedule"})


def test_a_closed_transformation_can_be_scaled_and_what_it_injected_be_set(
    start: Callable[..., LineRun],
) -> None:
    run = start(optax.inject_hyperparams(optax.sgd)(learning_rate=1.0))
    assert run.push() == 1.0
    with compilations() as compiled:
        run.client.set({"learning_rate": 0.5})
        assert run.push() == 0.5
    assert compiled == []
    assert run.client.settings()["update_scale"]["compiles"]
    run.client.set({"update_scale": 0.5})
    assert run.push() == 0.25
    assert not run.client.settings()["update_scale"]["compiles"]
    with compilations() as compiled:
        run.client.set({"update_scale": 0.25})
        assert run.push() == 0.125
    assert compiled == []


@pytest.mark.parametrize(
    ("values", "at_version", "text"),
    [
        ({}, None, "nothing was given"),
        ({"lr": "1"}, None, "no setting 'lr' .* there are consistency, learning_rate, momentum"),
        ({"learning_rate": "fast"}, None, "learning_rate=fast: it takes a number"),
        ({"learning_rate": "nan"}, None, "learning_rate=nan: it takes a number"),
        ({"learning_rate": "0.5", "nesterov": "1"}, None, "no setting 'nesterov'"),
        ({"learning_rate": "0.5", "consistency": "loose"}, None, "'loose': it is async;"),
        ({"consistency": "sync:0"}, None, "sync:N, with N batches in an update, from 1 on"),
        ({"consistency": "sync:1000000"}, None, "--max-staged-bytes has room for"),
        ({"consistency": "async"}, 5, "only numbers can wait for a version"),
        ({"learning_rate": "0.5"}, 0, "version 0 is past: the run is at version 1"),
        ({"momentum": "0.5\n", "\x1b[31mred": "1"}, None, "no setting '.31mred'"),
    ],
)
def test_what_cannot_be_set_is_refused_whole(
    start: Callable[..., LineRun], values: dict[str, str], at_version: int | None, text: str
) -> None:
    run = start("sgd(1.0, momentum=0.5)", max_staged_bytes=1 << 16)
    run.push()
    before = run.client.settings()
    with pytest.raises(Refused, match=text) as refused:
        run.client.set(values, at_version=at_version)
    assert refused.value.reason is Reason.BAD_SETTING
    assert run.client.settings() == before


@pytest.mark.parametrize("at_version", [None, 5])
@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"learning_rate": "1e39"}, "cannot have learning_rate=1e+39: float32 holds numbers from"),
        (
            {"step_size": "1e30"},
            "cannot have step_size=1e+30: int32 holds numbers from -2147483648",
        ),
    ],
    ids=["live", "in the state"],
)
def test_what_a_number_cannot_hold_is_refused_before_anything_changes(
    start: Callable[..., LineRun], values: dict[str, str], text: str, at_version: int | None
) -> None:
    run = start("chain(sgd(1.0), inject_hyperparams(scale)(1))")
    run.client.set({"learning_rate": 0.5, "step_size": 2}, at_version=7)
    before = run.client.settings()
    with pytest.raises(Refused, match=re.escape(text)) as refused:
        run.client.set(values, at_version=at_version)
    assert refused.value.reason is Reason.BAD_SETTING
    assert run.client.settings() == before
    assert run.push() == 1.0


def test_a_run_that_is_over_cannot_be_set(start: Callable[..., LineRun], tmp_path: Path) -> None:
    with (
        Server(line("sgd(1.0)", batches=1), run_dir=tmp_path / "short") as server,
        Client(server.address) as client,
        BareWorker(server.address, hello_of(line(batches=1))) as worker,
    ):
        worker.join()
        worker.push(worker.ticket(), ONES.tobytes())
        wait_for(lambda: client.status()["state"] == "finished", "the end")
        with pytest.raises(Refused, match="the run is over"):
            client.set({"learning_rate": 1})


def test_to_sync_only_if_all_workers_compute_alike(start: Callable[..., LineRun]) -> None:
    run = start()
    alike = [run.worker(compute={"threads": "1"}) for _ in range(2)]
    run.client.set({"consistency": "sync:2"})
    run.client.set({"consistency": "async"})
    other = run.worker(compute={"threads": "2"})
    with pytest.raises(Refused, match=r"worker-3 and worker-1 do not .* threads: 2 here, 1 there"):
        run.client.set({"consistency": "sync:2"})
    assert run.value("consistency") == "async"
    run.client.evict("worker-3")
    other.close()
    wait_for(lambda: len(run.client.status()["workers"]) == 2, "the other one is gone")
    run.client.set({"consistency": "sync:2"})
    late = BareWorker(run.server.address, run.hello)
    with late:
        late.open(compute={"threads": "2"})
        assert late.end().reason == "COMPUTE_MISMATCH"
    for worker in alike:
        worker.close()


def test_a_worker_that_computes_otherwise_gets_its_bye_after_the_end(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        run = LineRun(stack, line(batches=1), tmp_path / "run", consistency="sync:1")
        worker = run.worker(compute={"threads": "1"})
        worker.push(worker.ticket(), ONES.tobytes())
        assert worker.bye().reason == pb.BYE_FINISHED
        late = stack.enter_context(BareWorker(run.server.address, run.hello))
        late.open(compute={"threads": "2"})
        assert late.bye().reason == pb.BYE_FINISHED


def test_a_worker_that_is_refused_does_not_settle_what_computes_the_run(
    start: Callable[..., LineRun],
) -> None:
    run = start()
    bad = run.worker(compute={"threads": "2"})
    run.client.evict("worker-1")
    assert bad.bye().reason == pb.BYE_EVICTED
    wait_for(lambda: not run.client.status()["workers"], "it is gone")
    run.client.set({"consistency": "sync:1"})
    bad.open(compute={"threads": "2"})
    assert bad.end().reason == "EVICTED"
    run.worker(compute={"threads": "1"})


def test_a_worker_that_comes_back_computing_otherwise_is_refused_and_its_stream_goes_on(
    start: Callable[..., LineRun],
) -> None:
    run = start(consistency="sync:1")
    worker = run.worker(compute={"threads": "1"})
    ticket = worker.ticket()
    instance = worker.hello.instance
    with BareWorker(run.server.address, worker.hello, instance=instance) as again:
        again.open(compute={"threads": "2"})
        assert again.end().reason == "COMPUTE_MISMATCH"
    assert len(run.client.status()["workers"]) == 1
    worker.push(ticket, ONES.tobytes())
    assert worker.outcome().code == pb.OUTCOME_HELD


def test_a_gradient_that_waits_for_its_group_is_applied_alone_when_the_dial_turns(
    start: Callable[..., LineRun],
) -> None:
    run = start("sgd(1.0)", consistency="sync:2")
    worker = run.worker(compute={"threads": "1"})
    worker.push(worker.ticket(), ONES.tobytes())
    assert worker.outcome().code == pb.OUTCOME_HELD
    second = worker.ticket()
    run.client.set({"consistency": "bounded:1"})
    wait_for(lambda: run.client.status()["version"] == 1, "the held one was applied")
    worker.push(second, ONES.tobytes())
    outcome = worker.outcome()
    assert outcome.code == pb.OUTCOME_APPLIED, "one outcome for each push, and no other"
    assert (outcome.version, outcome.staleness) == (2, 1)


def test_what_is_too_old_for_the_new_bound_is_told_so_and_computed_anew(
    start: Callable[..., LineRun],
) -> None:
    run = start("sgd(1.0)")
    slow, fast = run.worker(), run.worker()
    late = slow.ticket()
    for _ in range(3):
        fast.push(fast.ticket(), ONES.tobytes())
        assert fast.outcome().code == pb.OUTCOME_APPLIED
    run.client.set({"consistency": "bounded:1"})
    slow.push(late, ONES.tobytes())
    outcome = slow.outcome()
    assert outcome.code == pb.OUTCOME_STALE
    assert "bounded:1" in outcome.message
    assert run.client.status()["rejected"]["stale"] == 1
    assert run.client.status()["version"] == 3


@pytest.mark.parametrize("durability", [pytest.param("snapshot", marks=pytest.mark.slow), "log"])
def test_what_was_set_survives_kill_9_at_once(tmp_path: Path, durability: str) -> None:
    task = tmp_path / "line.py"
    task.write_text(
        "import jax.numpy as jnp, numpy as np\n"
        "from headwater import ArrayData, Task\n"
        "task = Task(init=lambda key: {'w': jnp.zeros(4)}, batch_size=1, epochs=1,\n"
        "            loss=lambda params, batch, key: params['w'].sum(),\n"
        "            data=ArrayData(x=np.arange(64)), optimizer='sgd(1.0)')\n"
    )
    options = ["--run-dir", tmp_path / "run", "--durability", durability]
    with (
        processes.server(task, *options, cwd=tmp_path) as (command, address),
        Client(address) as client,
        BareWorker(address, hello_of(line(), "line")) as worker,
    ):
        worker.join()
        worker.push(worker.ticket(), ONES.tobytes())
        assert worker.outcome().code == pb.OUTCOME_APPLIED
        client.set({"consistency": "bounded:3", "learning_rate": 0.5})
        client.set({"learning_rate": 0.25}, at_version=2)
        command.kill()
    with (
        processes.server(task, *options, cwd=tmp_path) as (_, address),
        Client(address) as client,
        BareWorker(address, hello_of(line(), "line")) as worker,
    ):
        assert client.status()["consistency"] == "bounded:3"
        worker.join()
        moved = []
        for _ in range(3):
            worker.push(worker.ticket(), ONES.tobytes())
            assert worker.outcome().code == pb.OUTCOME_APPLIED
            moved.append(float(client.pull()["w"][0]))
    assert moved == [-1.5, -1.75, -2.0]
    events = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert events.count('"kind": "set"') == 2


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether the update log finds the disk full; nobody waits long for it."""
    control = tmp_path / "faults.json"
    monkeypatch.setattr(files, "DISK", FaultyDisk(control))
    monkeypatch.setattr(journal, "RETRY_S", 0.05)
    monkeypatch.setattr(steering, "CHANGE_TIMEOUT_S", 0.2)
    rule = {"operation": "write", "files": "updates-*", "error": "ENOSPC"}
    return lambda is_full: set_faults(control, *([rule] if is_full else []))


def set_events(run_dir: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "set"]


def test_what_is_set_while_the_log_is_full_is_queued_and_noted_when_it_holds(
    start: Callable[..., LineRun], full: Callable[[bool], None], tmp_path: Path
) -> None:
    run = start("sgd(1.0)", durability="log")
    assert run.push() == 1.0
    full(True)

    with pytest.raises(Refused, match="still queued: it takes effect once that is over") as refused:
        run.client.set({"learning_rate": 0.5})
    with pytest.raises(Refused):
        run.client.set({"learning_rate": 0.25}, at_version=3)
    with pytest.raises(Refused):
        run.client.set({"consistency": "bounded:3"})

    assert refused.value.reason is Reason.UNWRITABLE
    assert "No space left on device" in str(refused.value)
    assert "lost if the server ends before" in str(refused.value)
    settings = run.client.settings()
    assert settings["learning_rate"] == {
        "value": "1.0", "is_set": False, "compiles": False, "planned": [
            {"after_version": 1, "value": "0.5", "queued": True},
            {"after_version": 3, "value": "0.25", "queued": True},
        ]
    }  # fmt: skip
    assert settings["consistency"]["value"] == "async"
    assert settings["consistency"]["planned"] == [
        {"after_version": 1, "value": "bounded:3", "queued": True}
    ]
    assert run.client.status()["optimizer_numbers"] == {}
    assert set_events(tmp_path / "run") == []

    full(False)
    wait_for(lambda: run.value("consistency") == "bounded:3", "all are in force")
    settings = run.client.settings()
    assert (settings["learning_rate"]["value"], settings["consistency"]["planned"]) == ("0.5", [])
    assert settings["learning_rate"]["planned"] == [
        {"after_version": 3, "value": "0.25", "queued": False}
    ]
    assert [(event["version"], event["values"]) for event in set_events(tmp_path / "run")] == [
        (1, {"learning_rate": "0.5"}),
        (1, {"learning_rate": "0.25"}),
        (1, {"consistency": "bounded:3"}),
    ]
    assert [run.push() for _ in range(3)] == [0.5, 0.5, 0.25]


def test_what_is_queued_when_the_server_is_stopped_is_lost_and_nowhere_noted(
    full: Callable[[bool], None], tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        run = LineRun(stack, line("sgd(1.0)"), tmp_path / "run", durability="log")
        full(True)
        with pytest.raises(Refused, match="lost if the server ends before"):
            run.client.set({"learning_rate": 0.5})
        run.server.stop()
        run.server.wait(30)
    full(False)
    with contextlib.ExitStack() as stack:
        run = LineRun(stack, line("sgd(1.0)"), tmp_path / "run", durability="log")
        assert run.value("learning_rate") == "1.0"
    assert set_events(tmp_path / "run") == []


def test_a_pause_while_the_log_is_full_says_what_still_waits(
    start: Callable[..., LineRun], full: Callable[[bool], None]
) -> None:
    run = start("sgd(1.0)", durability="log")
    worker = run.worker()
    ticket = worker.ticket()
    full(True)
    worker.push(ticket, ONES.tobytes())
    wait_for(lambda: run.client.status()["problems"], "the log is full")

    said = run.client.pause()

    assert said.startswith("paused, but what was on its way still waits: the update log in ")
    assert "No space left on device" in said
    assert run.client.status()["state"] == "paused"
    full(False)
    assert worker.outcome().code == pb.OUTCOME_APPLIED
    assert run.client.pause() == "paused at version 1"


def test_a_run_that_another_optimizer_took_over_is_written_down_as_its(tmp_path: Path) -> None:
    """Though nothing was trained."""
    folder = tmp_path / "run"
    for options in ({}, {"optimizer": "sgd(0.25)"}):
        with Server(line("sgd(1.0)"), run_dir=folder, **options) as server:
            server.stop()
            server.wait(30)
    (snapshot,) = folder.glob("snapshot-*")
    assert snapshot_file.read(snapshot).facts.optimizer == "sgd(0.25)"


def test_every_batch_counts_once_while_the_dial_is_turned_and_a_worker_is_killed(
    tmp_path: Path,
) -> None:
    slow = tmp_path / "slow"
    slow.touch()
    words = counting.options(
        examples=2048, epochs=2, compute_s=0.02, slow_while=slow, begun=tmp_path / "begun"
    )
    task = Path(counting.__file__)
    dials = itertools.cycle(["bounded:0", "sync:4", "async", "bounded:1", "sync:3", "bounded:4"])
    with (
        processes.server(task, *words, cwd=tmp_path) as (_, address),
        processes.worker(task, address, *words, cwd=tmp_path),
        processes.worker(task, address, *words, cwd=tmp_path),
        processes.worker(task, address, *words, cwd=tmp_path) as victim,
        Client(address) as client,
    ):
        wait_for(lambda: client.status()["version"] >= 3, "the first updates")
        for turn, dial in zip(range(8), dials, strict=False):
            client.set({"consistency": dial})
            version = client.status()["version"]
            wait_for(lambda v=version: client.status()["version"] >= v + 2, f"updates with {dial}")
            if turn == 5:
                victim.kill()
        slow.unlink()
        wait_for(lambda: client.status()["state"] == "finished", "the end", 90)
        status = client.status()
        counts = client.pull()["count"]
    assert status["batches_applied"] == status["batches_total"]
    assert status["skipped"] == 0
    # In a group of N each of 32 N cells moves by 1 / N: an update moves 32 in all.
    assert counts.sum() == pytest.approx(32 * status["version"], rel=1e-5)
    assert (counts > 0).all()


def test_an_update_that_would_not_be_finite_ends_the_run_at_the_version_before(
    start: Callable[..., LineRun], tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        run = LineRun(stack, line("sgd(1.0)"), tmp_path / "run", durability="log")
        run.push()
        run.client.set({"learning_rate": 3e38})
        with BareWorker(run.server.address, run.hello) as worker:
            worker.join()
            worker.push(worker.ticket(), (ONES * 1e5).tobytes())
            ended = worker.bye()
    assert ended.reason == pb.BYE_FAILED
    assert "4 of the 4 numbers in w would not be finite any more" in ended.message
    with contextlib.ExitStack() as stack:
        run = LineRun(stack, line("sgd(1.0)"), tmp_path / "run", durability="log")
        assert run.client.status()["version"] == 1
        run.client.set({"learning_rate": 1.0})
        assert run.push() == 1.0
        assert float(run.client.pull()["w"][0]) == -2.0


def test_an_update_that_would_not_be_finite_while_the_server_stops_is_told_of(
    start: Callable[..., LineRun], caplog: pytest.LogCaptureFixture
) -> None:
    run = start("sgd(1.0)")
    workers = [run.worker() for _ in range(2)]
    tickets = [worker.ticket() for worker in workers]
    run.client.set({"learning_rate": 3e38})
    run.client.pause()
    for worker, ticket in zip(workers, tickets, strict=True):
        worker.push(ticket, (ONES * 1e5).tobytes())

    def status() -> Status:
        return run.client.status(watches=True)  # a server that ends waits for who asks so

    wait_for(lambda: status()["batches_admitted"] == 2, "both are held")

    run.client.stop()

    problems = wait_for(lambda: status()["problems"], "the problem")
    assert len(problems) == 1
    assert "version 1 failed: 4 of the 4 numbers in w would not be finite any more" in problems[0]
    assert workers[0].bye().reason == pb.BYE_STOPPED
    ended = run.server.wait(30)
    assert (ended.version, ended.message) == (0, "")
    assert caplog.messages.count(f"while the server stops: {problems[0]}") == 1


def test_what_is_queued_behind_an_update_that_diverged_is_not_applied(tmp_path: Path) -> None:
    """Nor logged: what is acknowledged can be continued from."""
    with contextlib.ExitStack() as stack:
        run = LineRun(stack, line("sgd(1.0)"), tmp_path / "run", durability="log")
        workers = [run.worker() for _ in range(3)]
        tickets = [worker.ticket() for worker in workers]
        run.push()
        run.client.set({"learning_rate": 3e38})
        run.client.pause()
        for worker, ticket, size in zip(workers, tickets, (1e5, 0.0, 0.0), strict=True):
            worker.push(ticket, (np.float32(size) * ONES).tobytes())
            admitted = len(workers) - len(workers[workers.index(worker) + 1 :])
            wait_for(lambda n=admitted: run.client.status()["batches_admitted"] == n, "it is held")
        run.client.resume()
        for worker in workers:
            assert worker.bye().reason == pb.BYE_FAILED
            assert worker.heard("outcome") == []
    with contextlib.ExitStack() as stack:
        run = LineRun(stack, line("sgd(1.0)"), tmp_path / "run", durability="log")
        assert run.client.status()["version"] == 1
        run.client.set({"learning_rate": 1.0})
        assert run.push() == 1.0


def test_what_is_queued_behind_an_update_that_failed_after_it_was_logged_is_not_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = []

    def move(store: Store, step: Step) -> Published:
        moves.append(step)
        if len(moves) == 1:
            raise MemoryError("made up")
        return own_move(store, step)

    own_move = Store.move
    with contextlib.ExitStack() as stack:
        run = LineRun(stack, line("sgd(1.0)"), tmp_path / "run", durability="log")
        workers = [run.worker() for _ in range(2)]
        tickets = [worker.ticket() for worker in workers]
        run.client.pause()
        for worker, ticket in zip(workers, tickets, strict=True):
            worker.push(ticket, ONES.tobytes())
        wait_for(lambda: run.client.status()["batches_admitted"] == 2, "both are held")
        monkeypatch.setattr(Store, "move", move)
        run.client.resume()
        for worker in workers:
            assert worker.bye().reason == pb.BYE_FAILED
            assert worker.heard("outcome") == []
    monkeypatch.undo()
    with contextlib.ExitStack() as stack:
        run = LineRun(stack, line("sgd(1.0)"), tmp_path / "run", durability="log")
        status = run.client.status()
        assert status["version"] == status["batches_applied"] == 1  # what was written down
        assert run.push() == 1.0


def test_what_fails_while_a_stopping_server_waits_for_gradients_is_told_of(
    start: Callable[..., LineRun],
) -> None:
    run = start("sgd(1.0)", grace_s=20.0)
    workers = [run.worker() for _ in range(2)]
    tickets = [worker.ticket() for worker in workers]
    run.client.set({"learning_rate": 3e38})
    run.client.stop()

    began = time.monotonic()
    workers[0].push(tickets[0], (ONES * 1e5).tobytes())

    ended = run.server.wait(30)
    assert (ended.state, ended.version) == (pb.RUN_FAILED, 0)
    assert "would not be finite any more" in ended.message
    assert time.monotonic() - began < 8  # the other's gradient is not waited for
