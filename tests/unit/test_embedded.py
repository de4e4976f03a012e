"""A server inside the calling process that cannot start leaves nothing behind."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from headwater import Server
from headwater.client.processes import free_address
from headwater.protos import shared_memory
from headwater.protos.errors import UsageError
from kit import counting

Unlucky = Callable[[pytest.MonkeyPatch, str], contextlib.AbstractContextManager[object]]


def without_shared_memory(
    patch: pytest.MonkeyPatch, address: str
) -> contextlib.AbstractContextManager[object]:
    patch.setattr(shared_memory, "IS_AVAILABLE", False)
    return contextlib.nullcontext()


def with_its_port_taken(
    patch: pytest.MonkeyPatch, address: str
) -> contextlib.AbstractContextManager[object]:
    host, port = address.rsplit(":", 1)
    return socket.create_server((host, int(port)))


def held(run_dir: Path) -> set[str]:
    """What this process has of a run: open files, and threads."""
    files = {file.path for file in psutil.Process().open_files() if str(run_dir) in file.path}
    return files | {t.name for t in threading.enumerate() if t.name.startswith("headwater-")}


@pytest.mark.skipif(not shared_memory.IS_AVAILABLE, reason="shared memory needs Linux")
@pytest.mark.parametrize(
    ("unlucky", "said"),
    [(without_shared_memory, "--transport shm is not possible"), (with_its_port_taken, "in use")],
)
def test_the_run_of_one_that_could_not_start_can_be_served_at_once(
    unlucky: Unlucky, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, task, before = free_address("127.0.0.1"), counting.task(4), held(tmp_path)
    server = Server(task, run_dir=tmp_path, listen=address, durability="log", transport="shm")
    with (
        monkeypatch.context() as patch,
        unlucky(patch, address),
        pytest.raises(UsageError, match=said),
        server,
    ):
        pass
    server._thread.join(20)

    assert held(tmp_path) == before
    with Server(task, run_dir=tmp_path, durability="log") as again:
        assert again.run_dir == server.run_dir
