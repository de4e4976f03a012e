"""Processes of ours on this machine: started, listened to, and ended for certain.

Each is in a session of its own, so that Ctrl-C in the terminal reaches only the
process that started them, which ends them in order. Should that one die without
a word, a pipe tells them (the lifeline of protos/command.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from headwater.client.main import command_line
from headwater.client.memory import tuning
from headwater.protos.command import LIFELINE_ENV, READY_ENV
from headwater.protos.errors import HeadwaterError, RunFailed, Unreachable, UsageError
from headwater.protos.rpc import join_address

KEPT_LINES = 200
"""Of a process's log, kept to show when it fails, and until its file is known."""


class Child:
    """One `headwater` process, and what it says on stderr.

    Args:
      name: Of its log file, and for people.
      command: A key of `PROCESSES`.
      environment: Added to our own.
      tells_ready: It is a server that will say where it listens; see `ready`.
      inherits: Open files of ours that it gets too, each by the variable that tells it which.
    """

    def __init__(
        self,
        name: str,
        command: str,
        arguments: Iterable[str],
        *,
        environment: Mapping[str, str] = {},
        tells_ready: bool = False,
        inherits: Mapping[str, int] = {},
    ) -> None:
        self.name = name
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._file: IO[str] | None = None
        self._lock = threading.Lock()
        lifeline, self._lifeline = os.pipe()
        passed = [lifeline]
        given = {**os.environ, **environment}
        env = {**given, **tuning(given), LIFELINE_ENV: str(lifeline)}
        env |= {variable: str(descriptor) for variable, descriptor in inherits.items()}
        self._ready_pipe: int | None = None
        if tells_ready:
            self._ready_pipe, write_end = os.pipe()
            passed.append(write_end)
            env[READY_ENV] = str(write_end)
        try:
            self.process = subprocess.Popen(  # noqa: S603  (our own module)
                command_line(command, list(arguments)),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                pass_fds=[*passed, *inherits.values()],
                start_new_session=True,
            )
        finally:
            for descriptor in passed:
                os.close(descriptor)
        self._reader = threading.Thread(target=self._read, name=f"log of {name}", daemon=True)
        self._reader.start()

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs, negative when a signal ended it."""
        return self.process.poll()

    def ready(self) -> dict[str, Any] | None:
        """Wait until the server serves, for what it says of itself; None when it ended instead."""
        assert self._ready_pipe is not None
        # From here on it is closed by this call alone, whatever `close` finds.
        descriptor, self._ready_pipe = self._ready_pipe, None
        with os.fdopen(descriptor) as pipe:
            line = pipe.readline()
        return json.loads(line) if line else None

    def log_to(self, path: Path) -> None:
        """Write to `path` what it said so far, and from now on."""
        # A log that cannot be kept stops no training.
        with self._lock, contextlib.suppress(OSError):
            self._file = path.open("w")
            self._file.writelines(self._lines)
            self._file.flush()

    def last_words(self) -> str:
        """What it said last: its error, from the line that names it on, else its last line."""
        self._reader.join(1.0)
        lines = [line.rstrip("\n") for line in self._lines]
        for at, line in enumerate(lines):
            if line.startswith("headwater ") and ": error: " in line:
                return "\n".join(lines[at:]).partition(": error: ")[2]
        return "\n".join(lines[-20:])

    @property
    def ending(self) -> str:
        """How it ended: that a signal did it, or what it said."""
        status = self.status
        if status is not None and status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        return f"failed: {self.last_words()}"

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def close(self) -> None:
        """Forget it; it must have ended."""
        self._reader.join(1.0)
        os.close(self._lifeline)
        if self._ready_pipe is not None:
            os.close(self._ready_pipe)
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                with self._lock:
                    self._lines.append(line)
                    if self._file is not None:
                        with contextlib.suppress(OSError):
                            self._file.write(line)
                            self._file.flush()


def failure(child: Child) -> HeadwaterError:
    """The error of a process that ended, as our own."""
    status = child.status or 0
    kind = {2: UsageError, 3: Unreachable}.get(status, RunFailed)
    error: HeadwaterError = kind(f"{child.name} {child.ending}")
    if status > 0:
        error.exit_status = status
    return error


def wait_all(children: Iterable[Child], timeout_s: float) -> bool:
    """Whether all ended in time."""
    end = time.monotonic() + timeout_s
    children = list(children)
    while any(child.status is None for child in children):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def kill_all(children: Iterable[Child]) -> None:
    """End them at once."""
    children = list(children)
    for child in children:
        child.send(signal.SIGKILL)
    for child in children:
        child.process.wait()


def is_free(host: str, port: int) -> bool:
    """Whether one can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def free_address(host: str) -> str:
    """HOST:PORT where nobody listens at the moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return join_address(host, probe.getsockname()[1])


def core_count() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
