"""A run of real processes, which were killed on the way, is computed again to the same bits."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest

from headwater.client.client import Client
from headwater.server import history
from headwater.server.survey import survey
from kit import processes
from kit.lives import Lives
from kit.processes import server, worker
from kit.waiting import wait_for

MNIST = "headwater.examples.mnist"


def wait_ready(address: str, workers: int) -> None:
    """Until so many are there and have compiled; the run must be paused."""
    with Client(address) as client:
        wait_for(
            lambda: [w["state"] for w in client.status()["workers"]] == ["waiting"] * workers,
            "all workers have compiled",
            60,
            lambda: client.status()["workers"],
        )


def max_staleness(path: Path) -> int:
    lines = history.read(path)
    return max(line["v"] - 1 - base for line in lines for _, base, *_ in line.get("u", ()))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["snapshot", "log"])
def test_four_workers_are_replayed_in_one_process_whoever_was_killed(
    level: str, tmp_path: Path
) -> None:
    options = ["--durability", level, "--snapshot-every", "40", "--epochs", "2"]
    lives = Lives(tmp_path, options=options)
    lives.task = MNIST
    with lives, contextlib.ExitStack() as stack:
        lives.start()
        with Client(lives.address) as client:
            client.pause()
            victim, *others = (
                stack.enter_context(worker(MNIST, lives.address, cwd=tmp_path)) for _ in range(4)
            )
            wait_ready(lives.address, 4)
            client.resume()
            wait_for(lambda: client.status()["version"] >= 60, "version 60", 60, client.status)
        victim.kill()
        lives.kill()
        lives.start()
        lives.finished()
        assert [one.wait() for one in others] == [0, 0, 0]
        assert lives.command is not None
        lives.command.send(signal.SIGTERM)
        assert lives.command.wait() == 0, lives.command.errors

    path = lives.run_dir / history.NAME
    done = processes.run("replay", "run", "--task", MNIST, cwd=tmp_path)

    assert [line["incarnation"] for line in survey(path).incarnations] == [1, 2]
    assert max_staleness(path) > 0
    assert done.status == 0, done.output + done.errors
    assert "warning" not in done.errors, "it is known of each gradient what computed it"
    assert done.output.startswith("replayed 250 updates in ")


@pytest.mark.slow
def test_two_thousand_asynchronous_updates_are_replayed(tmp_path: Path) -> None:
    options = ("--run-dir", "run", "--exit-when-done", "--epochs", "16")
    with (
        server(MNIST, *options, cwd=tmp_path) as (command, address),
        contextlib.ExitStack() as stack,
    ):
        for _ in range(4):
            stack.enter_context(worker(MNIST, address, cwd=tmp_path))
        assert command.wait(110) == 0, command.errors

    done = processes.run("replay", "run", "--task", MNIST, cwd=tmp_path, timeout_s=110)

    assert done.status == 0, done.output + done.errors
    assert done.output.startswith("replayed 2,000 updates in ")
    assert max_staleness(tmp_path / "run" / history.NAME) > 0
