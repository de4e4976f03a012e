"""Reinforcement learning learns; and its episodes count once each, whoever is killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.lives import Lives
from kit.processes import FREE_PORT, Command, run
from kit.waiting import wait_for

CARTPOLE = "headwater.examples.cartpole"


def test_two_workers_learn_to_balance_the_pole(tmp_path: Path) -> None:
    command = ("run", "--task", CARTPOLE, "--workers", "2", "--run-dir", "run", *FREE_PORT)

    done = run(*command, cwd=tmp_path)

    assert done.status == 0, done.errors
    records = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    last = [record for record in records if record["kind"] == "evaluation"][-1]
    assert (last["version"], last["metrics"]["length"] >= 475) == (150, True), last


@pytest.mark.parametrize("durability", ["log", pytest.param("snapshot", marks=pytest.mark.slow)])
def test_whoever_is_killed_ends_with_the_bits_of_an_undisturbed_run(
    tmp_path: Path, durability: str
) -> None:
    """Each batch of episodes is played with the newest weights, so that none may differ."""
    options = ("--durability", durability, "--snapshot-every", "10")
    with trained(tmp_path, "killed", *options) as lives, worker(lives) as doomed, worker(lives):
        before = moved(lives, 10)
        doomed.kill()
        before = moved(lives, before + 5)
        lives.kill()
        lives.start()
        assert moved(lives, before if durability == "log" else 0) < UPDATES, "it was over before"
        killed = lives.finished()
    with trained(tmp_path, "alone") as lives, worker(lives):
        alone = lives.finished()

    for status in (killed, alone):
        assert (status["batches_applied"], status["version"]) == (2 * UPDATES, UPDATES)
    assert (killed["incarnation"], alone["incarnation"]) == (2, 1)
    assert tensors(tmp_path / "killed") == tensors(tmp_path / "alone")


UPDATES = 100
OPTION = ("--task-option", f"batches={2 * UPDATES}")


def trained(folder: Path, name: str, *options: str) -> Lives:
    """A server of one epoch in groups of two batches, once it answers."""
    (folder / name).mkdir()
    sync = ("--consistency", "sync:2", *OPTION, "--epochs", "1")
    lives = Lives(folder / name, options=(*sync, *options))
    lives.task = CARTPOLE
    lives.start()
    return lives


def worker(lives: Lives) -> Command:
    where = ("--task", CARTPOLE, "--server", lives.address)
    return Command("worker", *where, *OPTION, cwd=lives.cwd)


def moved(lives: Lives, version: int) -> int:
    """The version, once it is beyond `version`."""

    def found() -> int:
        now = int(str(lives.status().get("version", 0)))
        return now if now > version else 0

    return wait_for(found, f"more than version {version}", 60, lives.status)


def tensors(path: Path) -> bytes:
    """The weights' bytes, after the header, which names the run."""
    data = (path / "run" / "weights.safetensors").read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]
