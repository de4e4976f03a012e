"""A program that leads its run: it lets epochs begin, and hears what every batch added up."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from headwater import Client, Server, Task
from headwater.protos.errors import Reason, Refused
from headwater.protos.rpc import Transport
from headwater.server.pace import Pace, Tallies
from headwater.worker.gradient import TALLIES
from headwater.worker.link import Patience
from headwater.worker.load import LoadedTask
from headwater.worker.loop import Worker
from kit import counting
from kit.waiting import wait_for

PER_EPOCH = 16


def tallying(**options: int) -> Task:
    """The counting task; each batch adds up its examples, and their numbers."""
    task = counting.task(examples=64, batch_size=4, **options)
    inner = task.loss

    def loss(params: Any, batch: Any, key: Any) -> Any:
        sums = jnp.stack(
            [jnp.float32(len(batch["index"])), batch["index"].sum().astype(jnp.float32)]
        )
        return inner(params, batch, key), {"half": jnp.float32(0.5), TALLIES: sums}

    return Task(**{**vars(task), "loss": loss})


@contextmanager
def working(server: Server, task: Task) -> Iterator[None]:
    worker = Worker(LoadedTask(task, "task", {}, ""), server.address, Patience(server.address, 10))
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield
    finally:
        worker.give_up()
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("consistency", ["async", "sync:4"])
def test_an_epoch_begins_when_it_is_allowed(consistency: str, tmp_path: Path) -> None:
    heard: list[tuple[int, Tallies | None]] = []

    def on_batch(epoch: int, tallies: Tallies | None) -> None:
        heard.append((epoch, None if tallies is None else list(tallies)))

    task = tallying(epochs=3)
    server = Server(
        task,
        pace=Pace(0, on_batch, tally_count=2),
        run_dir=tmp_path / "run",
        consistency=consistency,
    )
    with server, working(server, task):
        for allowed in range(4):
            server.allow_epochs(allowed)
            wait_for(lambda a=allowed: len(heard) == a * PER_EPOCH, "the epoch is over")
            updates = PER_EPOCH // (4 if consistency == "sync:4" else 1)
            assert server.published.version == allowed * updates
    assert Counter(epoch for epoch, _ in heard) == dict.fromkeys(range(3), PER_EPOCH)
    sums = np.sum([tallies for _, tallies in heard], axis=0)
    np.testing.assert_array_equal(sums, [3 * 64, 3 * sum(range(64))])


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_worker_whose_pushes_cannot_be_added_up_is_refused(
    transport: Transport, tmp_path: Path
) -> None:
    heard: list[int] = []
    task = tallying(epochs=1)
    pace = Pace(1, lambda epoch, _: heard.append(epoch), tally_count=3)
    with (
        Server(task, pace=pace, run_dir=tmp_path / "run") as server,
        Client(server.address) as client,
    ):
        patience = Patience(server.address, 10)
        loaded = LoadedTask(task, "task", {}, "")
        other = Worker(loaded, server.address, patience, transport=transport)

        with pytest.raises(Refused, match=r"adds up 2 numbers, and .* 3; has") as refused:
            other.run()

        assert refused.value.reason is Reason.MALFORMED
        status = client.status()
    assert status["rejected"]["malformed"] == 1
    assert (status["version"], status["workers"], heard) == (0, [], [])
