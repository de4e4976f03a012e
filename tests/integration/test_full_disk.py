"""A disk that is full when the run ends: the weights are kept in memory until there is room."""

from __future__ import annotations

import contextlib
import errno
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from headwater import Client, Server
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import RunFailed
from headwater.server import serve
from headwater.server.run_dir import RunDir
from headwater.worker.load import LoadedTask
from headwater.worker.loop import Worker
from kit import counting
from kit.waiting import wait_for

LOADED = LoadedTask(counting.task(examples=64, epochs=1), "counting", {}, "")


class FullDisk:
    """Stands in for a disk without room, until `room` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = threading.Event()
        save = RunDir.save_weights

        def save_weights(run_dir: RunDir, *arguments: Any) -> None:
            if not self.room.is_set():
                raise OSError(errno.ENOSPC, "No space left on device")
            save(run_dir, *arguments)

        monkeypatch.setattr(RunDir, "save_weights", save_weights)
        monkeypatch.setattr(serve, "SAVE_RETRY_S", 0.05)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


def serving(tmp_path: Path) -> Server:
    return Server(LOADED.task, name="counting", run_dir=tmp_path / "run", exit_when_done=True)


def problems(address: str) -> list[str]:
    with Client(address) as client:
        found: list[str] = client.status()["problems"]
        return found


def train(server: Server) -> threading.Thread:
    def live() -> None:
        with contextlib.suppress(RunFailed):
            Worker(LOADED, server.address).run()

    thread = threading.Thread(target=live)
    thread.start()
    return thread


def test_the_final_weights_are_written_once_there_is_room(disk: FullDisk, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        worker = train(server)
        (problem,) = wait_for(lambda: problems(server.address), "the problem is shown")
        with Client(server.address) as client:
            assert client.status()["durable_version"] == 0
            assert client.status()["state"] != "finished"
            assert set(client.pull()["count"]) == {1.0}  # nothing is lost meanwhile

        disk.room.set()
        ended = server.wait(30)
        worker.join()

    assert problem == (
        "the weights of version 2 could not be written: [Errno 28] No space left on device"
    )
    assert (ended.state, ended.version, ended.saved) == (pb.RUN_FINISHED, 2, True)
    assert set(load_file(tmp_path / "run/weights.safetensors")["count"]) == {1.0}


def test_a_server_that_is_stopped_says_that_the_weights_are_lost(
    disk: FullDisk, tmp_path: Path
) -> None:
    with serving(tmp_path) as server:
        worker = train(server)
        wait_for(lambda: problems(server.address), "the problem is shown")

        server.stop()
        ended = server.wait(30)
        worker.join()

    assert (ended.state, ended.saved) == (pb.RUN_FAILED, False)
    assert "the final weights could not be written" in ended.message
