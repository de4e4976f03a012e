"""The server is killed, at any moment and at every named place, and the run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import secrets
import time

import pytest

from headwater.client.client import Client
from headwater.protos import parameter_server_pb2 as pb
from headwater.server import failpoints
from headwater.worker.evaluate import Evaluation, Evaluator
from headwater.worker.load import LoadedTask
from kit import counting
from kit.lives import Lives, Witness, steady_workers
from kit.protocol import BareWorker, counting_gradient, hello_of, key
from kit.waiting import wait_for

TASK = {"examples": 1024, "epochs": 4, "batch_size": 4}

LOG_ONLY = {"log-appended", "log-synced"}


def options(level: str) -> list[str]:
    return ["--durability", level, "--snapshot-every", "40"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kills", "level"),
    [
        pytest.param(4, "log", marks=pytest.mark.slow),
        pytest.param(50, "snapshot", marks=pytest.mark.slow),
        pytest.param(50, "log", marks=pytest.mark.slow),
    ],
)
def test_a_run_outlasts_a_server_killed_at_random_moments(kills, level, tmp_path):
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown on failure
    rng = random.Random(seed)  # noqa: S311  (moments, not secrets)
    task = TASK | {"epochs": TASK["epochs"] * kills // 4}
    with Lives(tmp_path, counting.options(**task), options(level)) as lives:
        lives.start()
        with (
            Witness(
                lives.address, task["batch_size"], acknowledged_is_durable=level == "log"
            ) as witness,
            steady_workers(lives.address, witness, 2, 0.005, **task) as workers,
        ):
            for _ in range(kills):
                time.sleep(rng.uniform(0.0, 0.8))
                lives.kill()
                lives.start()
            assert lives.status()["state"] != "finished", "the kills must hit while it goes on"
            lives.finished()
            for worker in workers:
                worker.wait_bye()
        with Client(lives.address) as client:
            status = counting.assert_exactly_once(client)
        assert status["incarnation"] == kills + 1
        assert witness.pulls
        assert "Traceback" not in lives.errors


@pytest.mark.timeout(240)
@pytest.mark.parametrize("level", [pytest.param("snapshot", marks=pytest.mark.slow), "log"])
def test_a_run_outlasts_a_crash_at_every_place(level, tmp_path):
    """One run, killed at each failpoint in turn; those of the end come at its end."""
    places = [p for p in failpoints.NAMES if level == "log" or p not in LOG_ONLY]
    task = TASK | {"epochs": 2}
    with Lives(tmp_path, counting.options(**task), options(level)) as lives:
        lives.start()
        with (
            Witness(
                lives.address, task["batch_size"], acknowledged_is_durable=level == "log"
            ) as witness,
            steady_workers(lives.address, witness, 2, **task) as workers,
        ):
            lives.kill()
            for place in places:
                count = 1 if place.startswith(("end", "inc", "snapshot")) else 25
                extra = ["--exit-when-done"] if place == "end-evaluated" else []
                lives.start(*extra, wait=False, HEADWATER_FAILPOINTS=f"{place}={count}")
                lives.wait_killed()
            lives.start()
            lives.finished()
            for worker in workers:
                worker.wait_bye()
        with Client(lives.address) as client:
            status = counting.assert_exactly_once(client)
        assert status["incarnation"] > len(places)
        assert "Traceback" not in lives.errors


@pytest.mark.parametrize("sees_it_gone", [True, False])
def test_an_evaluator_evaluates_the_epochs_again_that_a_crash_took_back(
    sees_it_gone: bool, tmp_path
) -> None:
    fields = {"examples": 16, "epochs": 9, "batch_size": 4}
    task = dataclasses.replace(
        counting.task(**fields), evaluate=lambda params: {"seen": params["count"].sum()}
    )
    hello = hello_of(task, "counting")
    hello.task.options.update({name: str(value) for name, value in fields.items()})

    def evaluated_after_an_epoch() -> tuple[int, int, int, float]:
        with BareWorker(lives.address, hello) as worker:
            worker.join()
            for _ in range(4):
                ticket = worker.ticket()
                worker.push(ticket, counting_gradient(worker.layout, worker.leased[key(ticket)]))
                assert worker.outcome().code == pb.OUTCOME_APPLIED
        found: Evaluation = wait_for(lambda: evaluator.next(1.0), "the epoch is evaluated", 10)
        return found.incarnation, found.epoch, found.version, found.metrics["seen"]

    with Lives(tmp_path, counting.options(**fields)) as lives:
        lives.start()
        loaded = LoadedTask(task, "counting", {}, "")
        evaluator = Evaluator(loaded, lives.address, follows=True, min_epoch=1)
        with contextlib.closing(evaluator):
            assert evaluated_after_an_epoch() == (1, 1, 4, 16.0)
            assert evaluated_after_an_epoch() == (1, 2, 8, 32.0)
            lives.kill()
            if sees_it_gone:
                assert evaluator.next(1.0) is None
            lives.start()  # no snapshot had been taken
            assert evaluated_after_an_epoch() == (2, 1, 4, 16.0)
            assert evaluated_after_an_epoch() == (2, 2, 8, 32.0)
