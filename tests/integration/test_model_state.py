"""State and constants through a whole run: counted exactly once, whatever happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headwater.client.client import Client
from kit import stateful
from kit.processes import FREE_PORT, run, server, worker
from kit.waiting import wait_for

TASK = Path(stateful.__file__)
EPOCHS = 2


def assert_counted(weights, group=1):
    np.testing.assert_array_equal(weights["count"], EPOCHS / group)  # of a group it is the mean
    assert weights["seen"] == EPOCHS * stateful.EXAMPLES
    assert 0.3 < weights["mean"] < 0.7
    np.testing.assert_array_equal(weights["base/table"], np.arange(5))
    assert weights["base/scale"] == 1


@pytest.mark.parametrize(
    ("consistency", "group", "transport"),
    [
        ("async", 1, "shm"),
        ("sync:2", 2, "grpc"),
        pytest.param("async", 1, "grpc", marks=pytest.mark.slow),
        pytest.param("sync:2", 2, "shm", marks=pytest.mark.slow),
    ],
)
def test_counts_are_exact_in_spite_of_a_killed_worker_and_a_killed_server(
    tmp_path, transport, consistency, group
):
    slow = tmp_path / "slow"
    slow.touch()
    options = ["--task-option", "load_s=0.05", "--task-option", f"slow_while={slow}"]
    lasting = ["--durability", "log", "--consistency", consistency, "--run-dir", tmp_path / "run"]
    by = ["--transport", transport]
    with (
        server(TASK, *options, *lasting, cwd=tmp_path) as (service, address),
        Client(address) as client,
        worker(TASK, address, *by, *options, cwd=tmp_path) as ann,
        worker(TASK, address, *by, *options, cwd=tmp_path),
    ):
        wait_for(lambda: len(client.status()["workers"]) == 2, "both have joined", 60)
        wait_for(lambda: client.status()["version"] >= 6, "some updates", 60)
        ann.kill()
        version = client.status()["version"]
        wait_for(lambda: client.status()["version"] >= version + 4, "it goes on", 60)
        service.kill()
    slow.unlink()
    with (
        server(TASK, *options, *lasting, cwd=tmp_path) as (_, address),
        Client(address) as client,
        worker(TASK, address, *by, *options, cwd=tmp_path) as bob,
    ):
        assert bob.wait() == 0, bob.errors
        assert_counted(client.pull(), group)

    replayed = run("replay", tmp_path / "run", "--task", TASK, *options, cwd=tmp_path)
    assert replayed.status == 0, replayed.errors + replayed.output


def test_run_evaluates_parameters_and_state(tmp_path):
    ended = run(
        "run", "--task", TASK, "--workers", "2", *FREE_PORT, cwd=tmp_path,
        timeout_s=120,
    )  # fmt: skip
    assert ended.status == 0, ended.errors
    used = EPOCHS * stateful.EXAMPLES
    assert f"seen {used}" in ended.output
    assert f"used {used}" in ended.output
