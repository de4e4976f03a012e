"""Promise 1, exactly once: workers are killed at any moment, and every batch counts once."""

from __future__ import annotations

import contextlib
import random
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from headwater.client.client import Client
from kit import counting
from kit.processes import Command, server, worker
from kit.proxy import Proxy
from kit.waiting import wait_for

TASK = Path(counting.__file__)

WORKERS = 4
WORKING = {"batch_size": 8, "load_s": 0.01, "compute_s": 0.01}


class Crew(contextlib.ExitStack):
    """Always four workers: who is killed is replaced."""

    def __init__(self, address: str, options: Sequence[str], cwd: Path) -> None:
        super().__init__()
        self._arguments = (TASK, address, *options)
        self._cwd = cwd
        self.alive: dict[int, Command] = {}

    def __enter__(self) -> Crew:
        for _ in range(WORKERS):
            self._hire()
        return self

    def kill(self, pid: int) -> None:
        self.alive.pop(pid).kill()
        self._hire()

    def _hire(self) -> None:
        command = self.enter_context(worker(*self._arguments, cwd=self._cwd))
        self.alive[command.process.pid] = command


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("options", "bytes_per_s", "transport"),
    [
        # A step is 10 ms of loading, half of it ahead, and 10 ms of computing.
        pytest.param(WORKING, None, "shm", id="working"),
        pytest.param(WORKING, None, "grpc", id="working-grpc", marks=pytest.mark.slow),
        # A gradient of two parts takes 0.2 s on its way.
        pytest.param(
            {"batch_size": 32, "padding": 500_000},
            10e6,
            "grpc",
            id="sending",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_batch_counts_once_although_workers_are_killed(
    options, bytes_per_s, transport, kills, tmp_path
):
    """`kills` counts the workers that were connected and had pushed gradients."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown on failure
    rng = random.Random(seed)  # noqa: S311  (moments, not secrets)
    slow = tmp_path / "slow"
    slow.touch()
    task_options = counting.options(**options, slow_while=slow)
    with (
        server(TASK, *task_options, cwd=tmp_path) as (service, address),
        Client(address) as client,
        Proxy(address) as network,
        Crew(network.address, ["--transport", transport, *task_options], tmp_path) as crew,
    ):
        network.bytes_per_s = bytes_per_s
        hits = 0
        while hits < kills:
            time.sleep(rng.uniform(0.0, 0.1))
            least = rng.choice((0, 1, 1, 4))  # 0: it may have come only just now
            victim = rng.choice(
                wait_for(
                    lambda: _connected(client, crew, least),  # noqa: B023  (called in here)
                    "a worker is there to be killed",
                    state=client.status,
                )
            )
            crew.kill(victim["pid"])
            hits += victim["gradients"] > 0
        by_then = client.status()
        print(f"{kills} kills by version {by_then['version']} of {by_then['batches_total']}")
        assert by_then["state"] != "finished", "the kills must hit while the run goes on"

        network.bytes_per_s = None
        slow.unlink()
        for command in crew.alive.values():
            assert command.wait() == 0, command.errors
        status = counting.assert_exactly_once(client)

        assert status["version"] == 3 * 4096 // options["batch_size"]
        # A killed worker's push comes whole or not at all: there is nothing to refuse.
        assert not any(status["rejected"].values()), status["rejected"]
        assert service.errors.count(" left\n") >= kills


def _connected(client, crew, least_gradients):
    """The workers alive that the server knows, and has had gradients from."""
    return [
        w
        for w in client.status()["workers"]
        if w["pid"] in crew.alive and w["gradients"] >= least_gradients
    ]
