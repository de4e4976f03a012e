"""Batches that are made count exactly once, like those that are read."""

from __future__ import annotations

from pathlib import Path

from headwater.client.client import Client
from kit import generated
from kit.lives import Lives
from kit.processes import FREE_PORT, Command, run
from kit.waiting import wait_for

TASK = generated.__file__


def test_a_run_of_made_batches_applies_each_once(tmp_path: Path) -> None:
    with Lives(tmp_path) as lives:
        lives.task = TASK
        lives.start()
        workers = [worker(lives, tmp_path) for _ in range(2)]
        with workers[0], workers[1], Client(lives.address) as client:
            lives.finished()
            status, weights = client.status(), client.pull()
    assert (status["batches_applied"], status["batches_total"], status["epoch"]) == (80, 80, 2)
    assert float(weights["count"][0]) == 80


def test_an_epoch_without_end_goes_on_until_it_is_stopped_and_further_when_resumed(
    tmp_path: Path,
) -> None:
    endless = ("--task-option", "endless=true")
    with Lives(tmp_path, endless) as lives:
        lives.task = TASK
        lives.start()
        with worker(lives, tmp_path, *endless):
            applied = wait_for(lambda: over(lives, 100), "100 updates")
            with Client(lives.address) as client:
                assert client.status()["batches_total"] is None
            lives.kill()
            lives.start()
            wait_for(lambda: over(lives, applied + 50), "more of them")
            with Client(lives.address) as client:
                client.pause()
                wait_for(lambda: client.status()["batches_leased"] >= 0, "a status")
                weights = client.pull()
                assert float(weights["count"][0]) == weights.version


def test_what_needs_the_number_of_updates_is_refused_where_there_is_none(tmp_path: Path) -> None:
    spec = "sgd(cosine_decay_schedule(0.1, total_updates))"

    done = run(
        *("server", "--task", TASK, "--task-option", "endless=true", "--optimizer", spec),
        *FREE_PORT,
        cwd=tmp_path,
    )

    assert done.status == 2
    assert "there is no total_updates: this run has no end: give Generated its" in done.errors


def test_check_tries_made_batches_too(tmp_path: Path) -> None:
    done = run("check", "--task", TASK, cwd=tmp_path)

    assert done.status == 0, done.errors
    assert "40 batches of 4 an epoch" in done.output


def worker(lives: Lives, cwd: Path, *options: str) -> Command:
    return Command("worker", "--task", TASK, "--server", lives.address, *options, cwd=cwd)


def over(lives: Lives, version: int) -> int:
    """The version, once it is beyond `version`."""
    found = lives.status().get("version", 0)
    return found if found > version else 0
