"""`headwater` commands as real processes, which never outlive their test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pytest

from headwater.client.client import Client
from headwater.protos.errors import HeadwaterError
from kit.waiting import wait_for

FREE_PORT = ("--listen", "127.0.0.1:0")
"""For servers: another test, or its neighbour, may be at the default one."""

BY_GRPC = ("--transport", "grpc")
"""For workers behind a proxy, which shared memory would go round."""

HEADWATER = Path(sys.executable).parent / "headwater"

START_TIMEOUT_S = 60.0


class Command:
    """A running `headwater` command. Use as a context, which kills it and what it started.

    XLA has one thread unless `environment` says otherwise; None takes a variable away.
    """

    def __init__(self, *arguments: str | Path, cwd: Path, **environment: str | None) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in __exit__)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        env = {k: v for k, v in os.environ.items() if not k.startswith("HEADWATER")}
        changed = {"NPROC": "1", **environment}
        self.arguments = [str(word) for word in arguments]
        self.process = subprocess.Popen(  # noqa: S603  (our own command)
            [str(HEADWATER), *self.arguments],
            cwd=cwd,
            env={k: v for k, v in {**env, **changed}.items() if v is not None},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._errors,
            start_new_session=True,
        )

    def __enter__(self) -> Command:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._output.close()
        self._errors.close()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return _contents(self._output)

    @property
    def errors(self) -> str:
        """What it has said on stderr so far."""
        return _contents(self._errors)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit status; fails when it has not ended in time."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self} has not ended within {timeout_s} s\n{self.output}{self.errors}")

    def __str__(self) -> str:
        return f"headwater {' '.join(self.arguments)}"


def _contents(file: tempfile._TemporaryFileWrapper[str]) -> str:
    # pread: the process writes at the same file position.
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")


class Finished(NamedTuple):
    """How a command ended."""

    status: int
    output: str
    errors: str


def run(
    *arguments: str | Path, cwd: Path, timeout_s: float = 60.0, **environment: str | None
) -> Finished:
    """Run a command to its end."""
    with Command(*arguments, cwd=cwd, **environment) as command:
        status = command.wait(timeout_s)
        return Finished(status, command.output, command.errors)


@contextlib.contextmanager
def server(
    task: str | Path, *options: str | Path, cwd: Path, **environment: str | None
) -> Iterator[tuple[Command, str]]:
    """A server process of the task on a free port, and its address, once it answers."""
    arguments = ("server", "--task", task, *FREE_PORT, *options)
    with Command(*arguments, cwd=cwd, **environment) as command:
        address = wait_for(
            lambda: _address(command), "the server listens", START_TIMEOUT_S, lambda: command.errors
        )
        yield command, address


def _address(command: Command) -> str:
    if command.process.poll() is not None:
        pytest.fail(f"{command} ended with {command.process.returncode}:\n{command.errors}")
    return command.errors.partition("listening on ")[2].partition(";")[0]


@contextlib.contextmanager
def worker(
    task: str | Path, address: str, *options: str | Path, cwd: Path, **environment: str | None
) -> Iterator[Command]:
    """A worker process."""
    arguments = ("worker", "--task", task, "--server", address, *options)
    with Command(*arguments, cwd=cwd, **environment) as command:
        yield command


def status_of(address: str) -> dict[str, object]:
    """The status, or {} when no server answers."""
    try:
        with Client(address) as client:
            return client.status()
    except HeadwaterError:
        return {}
