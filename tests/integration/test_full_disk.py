"""A disk that is full: nothing is lost that can be kept, and everybody is told."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from headwater import Client, Server
from headwater.protos import files
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused, RunFailed
from headwater.server import saver, serve
from headwater.worker.link import Patience
from headwater.worker.load import LoadedTask
from headwater.worker.loop import Worker
from kit import counting
from kit.disk import FaultyDisk, set_faults
from kit.waiting import wait_for

LOADED = LoadedTask(counting.task(examples=64, epochs=1), "counting", {}, "")

FULL = {"operation": "write", "files": "*.safetensors*", "error": "ENOSPC"}


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the disk does; it is well at first."""
    control = tmp_path / "faults.json"
    monkeypatch.setattr(files, "DISK", FaultyDisk(control))
    monkeypatch.setattr(serve, "SAVE_RETRY_S", 0.05)
    monkeypatch.setattr(saver, "RETRY_S", 0.05)
    return control


def serving(tmp_path: Path, **options: object) -> Server:
    settings = {"exit_when_done": True, "grace_s": 3.0, **options}
    return Server(LOADED.task, name="counting", run_dir=tmp_path / "run", **settings)


def problems(address: str) -> list[str]:
    with Client(address) as client:
        found: list[str] = client.status()["problems"]
        return found


@contextlib.contextmanager
def trained(server: Server) -> Iterator[None]:
    """With a worker that trains to the end, however the run ends."""

    def live() -> None:
        with contextlib.suppress(RunFailed):
            Worker(LOADED, server.address, Patience(server.address, 60)).run()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def test_the_final_version_is_written_once_there_is_room(control: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        set_faults(control, FULL)
        with trained(server):
            (problem,) = wait_for(lambda: problems(server.address), "the problem is shown")
            with Client(server.address) as client:
                assert client.status()["durable_version"] == 0
                assert client.status()["state"] != "finished"
                assert set(client.pull()["count"]) == {1.0}  # nothing is lost meanwhile

            set_faults(control)
            ended = server.wait(30)

    assert problem == (
        f"version 2 could not be written to {tmp_path / 'run'}: No space left on device; what has "
        "come since version 0 would be lost in a crash"
    )
    assert (ended.state, ended.version, ended.saved) == (pb.RUN_FINISHED, 2, True)
    assert set(load_file(tmp_path / "run/weights.safetensors")["count"]) == {1.0}


def test_a_server_that_is_stopped_says_that_the_version_is_lost(
    control: Path, tmp_path: Path
) -> None:
    with serving(tmp_path, grace_s=1.0) as server:
        set_faults(control, FULL)
        with trained(server):
            wait_for(lambda: problems(server.address), "the problem is shown")
            server.stop()
            ended = server.wait(30)

    assert (ended.state, ended.saved, ended.durable_version) == (pb.RUN_FAILED, False, 0)
    assert "the final weights could not be written" in ended.message


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("operation", ["create", "write", "sync", "rename", "sync_folder"])
def test_training_goes_on_while_snapshots_cannot_be_written(
    operation: str, error: str, control: Path, tmp_path: Path
) -> None:
    """And the older snapshot is intact, nothing is called durable, and room again mends it."""
    with serving(tmp_path, exit_when_done=False) as server, Client(server.address) as client:
        kept = {path: path.read_bytes() for path in (tmp_path / "run").glob("snapshot-*")}
        set_faults(control, {"operation": operation, "error": error})
        with trained(server):
            wait_for(lambda: client.status()["version"] == 2, "it trains all the same")
            with pytest.raises(Refused, match="version 2 could not be written to") as refused:
                client.snapshot()
            status = client.status()
            assert refused.value.reason is Reason.UNWRITABLE
            assert status["durable_version"] == 0
            assert len(status["problems"]) >= 1
            assert {path: path.read_bytes() for path in kept} == kept

            set_faults(control)
            wait_for(lambda: client.status()["state"] == "finished", "it is written")
            assert client.status()["durable_version"] == 2
            assert client.status()["problems"] == []
            assert client.snapshot() == "version 2 is durable"


def test_a_disk_that_writes_less_than_it_is_given_is_written_to_again(
    control: Path, tmp_path: Path
) -> None:
    with serving(tmp_path) as server:
        set_faults(control, {"operation": "write", "short": True})
        with trained(server):
            assert server.wait(30).saved

    assert set(load_file(tmp_path / "run/weights.safetensors")["count"]) == {1.0}
