"""The dial holds, and every batch counts once, with real workers that are slow or killed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from headwater.client.client import Client
from kit import counting
from kit.processes import server, worker
from kit.waiting import wait_for

TASK = Path(counting.__file__)
EPOCHS = 2


@pytest.mark.parametrize("bound", [0, 1, pytest.param(4, marks=pytest.mark.slow)])
def test_no_gradient_is_older_than_the_bound_and_each_counts_once(
    tmp_path: Path, bound: int
) -> None:
    """With three workers, one of them slow for a while, and one that is killed."""
    slow = tmp_path / "slow"
    slow.touch()
    words = counting.options(
        examples=1024, epochs=EPOCHS, compute_s=0.02, slow_while=slow, begun=tmp_path / "begun"
    )
    run = [*words, "--consistency", f"bounded:{bound}"]
    with (
        server(TASK, *run, cwd=tmp_path) as (_, address),
        worker(TASK, address, *words, cwd=tmp_path),
        worker(TASK, address, *words, cwd=tmp_path),
        worker(TASK, address, *words, cwd=tmp_path) as victim,
        Client(address) as client,
    ):
        wait_for(lambda: client.status()["version"] >= 3, "the first updates")
        victim.kill()
        slow.unlink()
        wait_for(lambda: client.status()["state"] == "finished", "the end", 90)
        status = counting.assert_exactly_once(client)

    assert status["consistency"] == f"bounded:{bound}"
    assert status["staleness"]["max"] <= bound
    histogram = status["staleness"]["histogram"]
    assert sum(histogram.values()) == status["version"]
    assert status["rejected"]["stale"] == 0, "nobody's work was for nothing"


def hash_of_sync_run(tmp_path: Path, workers: int, *, kill: bool = False) -> str:
    """SHA-256 over the final weights of the digits, trained in groups of four."""
    task = "headwater.examples.mnist"
    options = ["--epochs", "1", "--consistency", "sync:4"]
    folder = tmp_path / f"{workers}-{kill}"
    folder.mkdir()
    with server(task, *options, cwd=folder) as (_, address), Client(address) as client:
        started = [worker(task, address, cwd=folder) for _ in range(workers)]
        commands = [one.__enter__() for one in started]
        try:
            if kill:
                wait_for(lambda: client.status()["version"] >= 5, "the first updates", 60)
                commands[0].kill()
            wait_for(lambda: client.status()["state"] == "finished", "the end", 90)
            status, weights = client.status(), client.pull()
        finally:
            for one in started:
                one.__exit__(None, None, None)
    assert status["version"] == 32  # ceil(125 / 4)
    assert status["batches_applied"] == 125
    assert status["staleness"]["max"] == 0
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()


def test_sync_weights_do_not_depend_on_how_many_workers_there_are_or_who_dies(
    tmp_path: Path,
) -> None:
    alone = hash_of_sync_run(tmp_path, 1)

    assert hash_of_sync_run(tmp_path, 3, kill=True) == alone
