"""Processes that are stopped, not dead, and go on later where they were.

What they held was given to others meanwhile; what they still say must change nothing.
"""

from __future__ import annotations

import contextlib
import random
import re
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from headwater.client.client import Client
from kit import counting
from kit.processes import BY_GRPC, Command, server, worker
from kit.proxy import Proxy
from kit.waiting import wait_for

TASK = Path(counting.__file__)

PASSED_ON = 30
"""Updates after which what a lost worker had is done: pending batches go out lowest first,
and nobody has more than 9."""


class Stage(NamedTuple):
    """A server and three workers at work, slowly, until `finish`."""

    service: Command
    client: Client
    workers: dict[str, Command]
    finish: Callable[[], None]
    network: Proxy
    """Between ann or bob and the server; cyd goes without."""
    rng: random.Random

    def worker_status(self, name: str) -> dict[str, object]:
        return next(w for w in self.client.status()["workers"] if w["name"] == name)

    def log_lines(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.service.errors)


@contextlib.contextmanager
def stage(folder: Path, *server_options: str, **task_options: object) -> Iterator[Stage]:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown on failure
    slow = folder / "slow"
    slow.touch()
    options = counting.options(**task_options, slow_while=slow)
    with (
        server(TASK, *options, *server_options, cwd=folder) as (service, address),
        Client(address) as client,
        Proxy(address) as network,
        contextlib.ExitStack() as stack,
    ):
        workers = {
            name: stack.enter_context(worker(TASK, *via, "--name", name, *options, cwd=folder))
            for name, via in (
                ("ann", (network.address, *BY_GRPC)),
                ("bob", (network.address, *BY_GRPC)),
                ("cyd", (address,)),
            )
        }

        def all_have_pushed() -> bool:
            return sum(w["gradients"] > 0 for w in client.status()["workers"]) == len(workers)

        wait_for(all_have_pushed, "all workers push", 60, client.status)
        rng = random.Random(seed)  # noqa: S311  (moments, not secrets)
        yield Stage(service, client, workers, slow.unlink, network, rng)


def wait_for_updates(stage: Stage, count: int) -> None:
    wanted = stage.client.status()["version"] + count
    wait_for(lambda: stage.client.status()["version"] >= wanted, f"{count} updates", 60)


@contextlib.contextmanager
def stopped(stage: Stage, *names: str) -> Iterator[None]:
    """Inside, these workers stand still, each from some moment of its step on."""
    for name in names:
        time.sleep(stage.rng.uniform(0, 0.1))
        stage.workers[name].send(signal.SIGSTOP)
    yield
    for name in names:
        stage.workers[name].send(signal.SIGCONT)


@pytest.mark.slow
def test_a_silent_worker_loses_its_batches_and_comes_back(tmp_path):
    with stage(
        tmp_path, "--session-timeout", "3", batch_size=8, load_s=0.01, compute_s=0.04
    ) as run:
        with stopped(run, "ann", "bob"):
            for name in ("ann", "bob"):
                wait_for(
                    lambda: run.log_lines(f"{name}: not heard of for"),  # noqa: B023
                    f"{name} is forgotten",
                )
            names = [w["name"] for w in run.client.status()["workers"]]
            assert names == ["cyd"]
            # What the two had is done by the third before they go on with it.
            wait_for_updates(run, PASSED_ON)

        for name in ("ann", "bob"):
            wait_for(lambda: len(run.log_lines(f"{name} joined")) == 2, f"{name} is back")  # noqa: B023
            assert "(not heard of for" in run.workers[name].errors
            wait_for(lambda: run.worker_status(name)["gradients"], f"{name} is at work")  # noqa: B023
            assert run.worker_status(name)["pid"] == run.workers[name].process.pid

        run.finish()
        assert [w.wait() for w in run.workers.values()] == [0, 0, 0]
        status = counting.assert_exactly_once(run.client)
        assert status["rejected"]["malformed"] == 0


@pytest.mark.slow
def test_a_push_after_its_ticket_was_taken_back_is_refused(tmp_path):
    """The stream lives on: the worker is told LEASE_LOST and takes its next ticket."""
    with stage(
        tmp_path,
        *("--session-timeout", "60", "--ticket-timeout", "1"),
        batch_size=16,
        compute_s=0.05,
        padding=500_000,
    ) as run:
        # First most of a step is computing; then most is sending, 0.1 s for two parts.
        for times, sending in ((1, False), (2, True)):
            run.network.bytes_per_s = 20e6 if sending else None
            wait_for_updates(run, 1)
            with stopped(run, "ann", "bob"):
                run.network.stalled = sending  # with what they have sent already
                for name in ("ann", "bob"):
                    taken_back = f"{name}: no progress.*taken back"
                    wait_for(lambda: len(run.log_lines(taken_back)) >= times, taken_back)  # noqa: B023
                wait_for_updates(run, PASSED_ON)
                run.network.stalled = False
            for name in ("ann", "bob"):
                said = run.workers[name]
                wait_for(
                    lambda: said.errors.count("warning: lease lost: ") >= times,  # noqa: B023
                    f"{name} is told that it comes too late",
                )

        refused = run.client.status()["rejected"]
        assert refused["lease_lost"] >= 4
        assert refused["malformed"] == 0
        for name in run.workers:
            assert len(run.log_lines(f"{name} joined")) == 1, "nobody's stream was ended"
            before = run.worker_status(name)["gradients"]
            wait_for(lambda: run.worker_status(name)["gradients"] > before, f"{name} goes on")  # noqa: B023

        run.finish()
        assert [w.wait() for w in run.workers.values()] == [0, 0, 0]
        counting.assert_exactly_once(run.client)


@pytest.mark.slow
def test_nobody_loses_anything_because_the_server_stood_still(tmp_path):
    """It is stopped for longer than both timeouts."""
    with stage(
        tmp_path,
        *("--session-timeout", "3", "--ticket-timeout", "1"),
        batch_size=8,
        load_s=0.01,
        compute_s=0.05,
    ) as run:
        time.sleep(run.rng.uniform(0, 0.2))
        run.service.send(signal.SIGSTOP)
        time.sleep(4.0)
        run.service.send(signal.SIGCONT)

        wait_for(lambda: run.log_lines("the server stood still for"), "the server notices")
        wait_for_updates(run, PASSED_ON)
        assert not run.log_lines("not heard of|taken back| left"), run.service.errors
        assert len(run.log_lines(" joined ")) == len(run.workers)

        run.finish()
        assert [w.wait() for w in run.workers.values()] == [0, 0, 0]
        status = counting.assert_exactly_once(run.client)
        assert not any(status["rejected"].values()), status["rejected"]
