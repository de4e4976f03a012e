"""Commands without a server, or with wrong words: one line, and the right status."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from headwater import Server, __version__
from headwater.client.main import PROCESSES
from headwater.client.processes import free_address
from headwater.protos.errors import UsageError
from kit import counting
from kit.commands import (
    PACED,
    PLAIN,
    TALKING,
    assert_fails,
    quick,
)
from kit.processes import FREE_PORT, Finished, run

# ------------------------------------------------------------------- no server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with paced.py, where no run has begun."""
    (tmp_path / "paced.py").write_text(PACED)
    return tmp_path


def nobody_answers(address: str) -> str:
    return (
        f"no Headwater server answers at {address}; start one with `headwater server`, or name "
        "another address with --server HOST:PORT"
    )


@pytest.mark.parametrize("command", TALKING)
def test_without_a_server_every_command_says_so_and_exits_3(command: str, folder: Path) -> None:
    address = free_address("127.0.0.1")
    speaker = "headwater evaluate" if command == "evaluate" else "headwater"
    assert_fails(
        run(*TALKING[command], "--server", address, cwd=folder),
        3,
        f"{speaker}: error: {nobody_answers(address)}",
    )
    assert not (folder / "out.safetensors").exists()


def assert_worker_gives_up(finished: Finished, address: str) -> None:
    assert (finished.status, finished.output) == (3, "")
    *warnings, last = finished.errors.splitlines()
    assert warnings
    for line in warnings:
        assert f" headwater worker: warning: no server at {address} (" in line
    assert last.startswith(
        f"headwater worker: error: no Headwater server answers at {address} (tried for 1 s; "
    )


def test_without_a_server_a_worker_gives_up_after_its_time(folder: Path) -> None:
    address = free_address("127.0.0.1")
    task = ("--task", "paced.py", "--server", address, "--connect-timeout", "1")
    assert_worker_gives_up(run("worker", *task, cwd=folder), address)


@contextlib.contextmanager
def listener(answer: bytes) -> Iterator[str]:
    """The address of something else than Headwater, which answers all with the same bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(4096)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(5)


HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
NOISE = bytes(range(256)) * 4


@pytest.mark.parametrize(
    ("command", "answer"),
    [("status", HTTP), ("pull", HTTP), ("stop", NOISE), ("evaluate", NOISE)],
    ids=["status", "pull", "stop", "evaluate"],
)
def test_something_else_on_the_port_is_no_server(command: str, answer: bytes, folder: Path) -> None:
    with listener(answer) as address:
        finished = run(*TALKING[command], "--server", address, cwd=folder, timeout_s=20)
    speaker = "headwater evaluate" if command == "evaluate" else "headwater"
    assert_fails(finished, 3, f"{speaker}: error: {nobody_answers(address)}")


def test_a_worker_gives_up_on_something_else_on_the_port(folder: Path) -> None:
    with listener(HTTP) as address:
        task = ("--task", "paced.py", "--server", address, "--connect-timeout", "1")
        finished = run("worker", *task, cwd=folder, timeout_s=20)
    assert_worker_gives_up(finished, address)


# ----------------------------------------------------------------- wrong usage


WRONG_FLAGS = {
    "--listen 0.0.0.0:0": (
        "--listen 0.0.0.0:0 lets other machines in, without encryption or passwords; add "
        "--insecure if you trust everyone on that network, or listen on 127.0.0.1:0"
    ),
    "--listen nonsense": "--listen takes HOST:PORT such as 127.0.0.1:50051, not 'nonsense'",
    "--consistency bounded": (
        "--consistency 'bounded': it is async; bounded:K, with a staleness of at most K, from 0 "
        "on; or sync:N, with N batches in an update, from 1 on"
    ),
    "--epochs 0": "--epochs 0 must be at least 1",
    "--batch-size 0": "--batch-size 0 must be at least 1",
    "--seed -1": "--seed -1 must be in 0 … 4294967295",
    "--platform abacus": "--platform abacus: it is one of cpu, gpu, tpu",
}


@pytest.mark.parametrize(
    "options",
    quick(WRONG_FLAGS, "--listen 0.0.0.0:0", "--consistency bounded", "--platform abacus"),
)
def test_a_wrong_flag_of_the_server_is_one_line(options: str, folder: Path) -> None:
    finished = run("server", "--task", "paced.py", *FREE_PORT, *options.split(), cwd=folder)
    assert_fails(finished, 2, f"headwater server: error: {WRONG_FLAGS[options]}")
    assert not (folder / "runs").exists()


def test_a_mistyped_option_of_a_server_in_this_process_is_named() -> None:
    with pytest.raises(UsageError, match=r"Server takes no 'epoch'; did you mean 'epochs'\?"):
        Server(counting.task(4), epoch=2)


def test_a_batch_larger_than_the_data_is_refused_when_short_ones_are_dropped(
    folder: Path,
) -> None:
    (folder / "plain.py").write_text(f'{PLAIN}\ntask = Task(**fields, remainder="drop")\n')
    assert_fails(
        run("server", "--task", "plain.py", "--batch-size", "9", *FREE_PORT, cwd=folder),
        2,
        "headwater server: error: an epoch has no batch: 8 examples, batch size 9, and the short "
        'batch is dropped; use remainder="keep" or a smaller batch size',
    )
    assert not (folder / "runs").exists()


def test_a_wrong_optimizer_is_pointed_at(folder: Path) -> None:
    spec = "sgd(0.1, momentum=x)"
    finished = run("server", "--task", "paced.py", "--optimizer", spec, *FREE_PORT, cwd=folder)
    assert_fails(
        finished,
        2,
        "headwater server: error: --optimizer, character 19: 'x' is not a function of optax\n"
        "    sgd(0.1, momentum=x)\n"
        "                      ^",
    )


def test_a_run_directory_that_was_damaged_is_refused(folder: Path) -> None:
    (folder / "old").mkdir()
    (folder / "old/run.json").write_text("{}")
    assert_fails(
        run("server", "--task", "paced.py", "--run-dir", "old", *FREE_PORT, cwd=folder),
        2,
        "headwater server: error: old/run.json was damaged ('format'); restore it from a copy, or "
        "start anew in another directory",
    )
    assert (folder / "old/run.json").read_text() == "{}"


def test_a_run_directory_that_cannot_be_written_is_refused(folder: Path) -> None:
    (folder / "file").touch()  # root may write anywhere, but not below a file
    assert_fails(
        run("server", "--task", "paced.py", "--run-dir", "file/run", *FREE_PORT, cwd=folder),
        2,
        "headwater server: error: the run directory file/run cannot be used: Not a directory; "
        "name another with --run-dir",
    )


WRONG_USAGE = {
    "nonsense": "No such command 'nonsense'. (see headwater --help)",
    "status --server here": "--server takes HOST:PORT such as 127.0.0.1:50051, not 'here'",
    "status --nonsense": "No such option: --nonsense (see headwater status --help)",
    "pull": "Missing argument 'OUT.safetensors'. (see headwater pull --help)",
}


@pytest.mark.parametrize("arguments", WRONG_USAGE)
def test_wrong_usage_is_one_line(arguments: str, tmp_path: Path) -> None:
    finished = run(*arguments.split(), cwd=tmp_path)
    assert_fails(finished, 2, f"headwater: error: {WRONG_USAGE[arguments]}")


def test_headwater_alone_helps(tmp_path: Path) -> None:
    status, output, errors = run(cwd=tmp_path)
    assert (status, errors) == (2, "")
    assert output == run("--help", cwd=tmp_path).output


COMMANDS = [
    *("server", "worker", "run", "check", "status", "workers", "watch", "pull", "evaluate"),
    *("pause", "resume", "set", "evict", "snapshot", "stop", "check-snapshot", "replay", "new"),
]


def test_help_lists_every_command(tmp_path: Path) -> None:
    helped = run("--help", cwd=tmp_path)
    assert (helped.status, helped.errors) == (0, "")
    assert set(re.findall(r"^  ([a-z][a-z-]*)  ", helped.output, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("command", quick(COMMANDS, *PROCESSES, "status"))
def test_every_command_helps(command: str, tmp_path: Path) -> None:
    helped = run(command, "--help", cwd=tmp_path)
    assert (helped.status, helped.errors) == (0, "")
    assert helped.output.startswith(f"Usage: headwater {command} [OPTIONS]")


def test_headwater_says_its_version(tmp_path: Path) -> None:
    assert run("--version", cwd=tmp_path) == (0, f"headwater {__version__}\n", "")
