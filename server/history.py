"""The history: which gradients made which version, so that the run can be computed again.

history.jsonl, a JSON object a line. Each has `v`, the version after it:

    {"v": 7, "incarnation": 2, "compute": {}, ...}  a server began to serve: the optimizer and
                                               settings it has, the CRC32C of the weights
    {"v": 7, "worker": "2.1", "compute": {}}   a worker that the lines after it name
    {"v": 8, "u": [[3, 6, "2.1", 123]], "w": 456}   an update: of each of its gradients the
                                               round, the base, the worker, and the CRC32C
                                               as it was pushed; the CRC32C of the weights
                                               after. Of a large model null and none but at
                                               every so many versions
    {"v": 8, "out": 4}                         a round that was left out
    {"v": 8, "set": {...}}                     the settings from here on
    {"v": 9, "gap": 3}                         what came since version 3 was not written

A gradient has "plain" as its fifth where --staleness compensates and this one was
not, because the weights of its base were not kept when the policy was set. One that a
session pushed has null for a round, and [session, opened, sequence] at its end. What
each batch consists of follows from the run's seed. Lines are written behind the
updates, and are on disk before the snapshot of their version is.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from headwater.protos import files
from headwater.server.ranges import Ranges
from headwater.server.settings import Settings

log = logging.getLogger("headwater.server")

NAME = "history.jsonl"

FLUSH_BYTES = 1 << 16
"""Written to the file at once."""

MAX_PENDING_BYTES = 64 << 20
"""Kept while the disk is full, or an fsync hangs; what is more is given up."""

PLAIN = "plain"
"""Of a gradient that was not compensated where others are."""

Line = Mapping[str, Any]


class History:
    """The file while a server writes to it. May be used from several threads.

    The event loop calls `append`, which therefore waits for nobody's fsync.

    Args:
      folder: The run directory; this process holds its lock.
      version: That the run is at; lines of later ones are cut off.
      applied: What that version is made of.
      settings: That it has; what was set later, at the same version, is cut off too.

    Raises:
      OSError: The disk is full or broken.
    """

    def __init__(self, folder: Path, version: int, applied: Ranges, settings: Settings) -> None:
        path = folder / NAME
        survives = _Survivor(version, applied, settings)
        self._size, self.version, self._last = _surviving(path, survives)
        """`version` is that of the last line; -1 where there is none."""
        self._restored_version = version
        self._file = files.DISK.reopen(path, 0) if path.exists() else files.DISK.create(path)
        files.DISK.truncate(self._file, self._size)
        self._pending = bytearray()
        self._lost_since: int | None = None
        self._filing = threading.Lock()
        """Held through each operation on the file, and taken before `_lock`."""
        self._lock = threading.Lock()
        """Of what is pending, and the version; never held while the disk is waited for."""
        self.problem: str | None = None
        """Why lines could not be written, until they were."""

    def go_on(self, lines: Iterable[Line]) -> None:
        """Add what a crash has cost the file of these, which the update log has kept.

        What even then is missing of the way to the run's version is said to be.
        """
        began = self.version
        for line in lines:
            lost = "u" not in line and line not in self._last
            if line["v"] > began or (line["v"] == began and lost):
                self._mark_gap(line["v"] - ("u" in line))
                self.append(line)
        self._mark_gap(self._restored_version)

    def append(self, line: Line) -> None:
        """Add a line; it is written soon."""
        with self._lock:
            # Who joins is noted by the event loop, which learns of a version after the applier.
            if line["v"] < self.version:
                line = {**line, "v": self.version}
            if self._lost_since is None:
                if len(self._pending) > MAX_PENDING_BYTES:
                    self._lost_since = self.version
                    log.error("%s lacks what comes after version %d", NAME, self.version)
                else:
                    self._pending += _encoded(line)
            self.version = line["v"]
            is_much = len(self._pending) >= FLUSH_BYTES
        # Whoever has the file may be in an fsync of seconds: what is pending waits for the next.
        if is_much and self._filing.acquire(blocking=False):
            try:
                self._flush()
            finally:
                self._filing.release()

    def flush(self) -> None:
        """Hand what was added to the system."""
        with self._filing:
            self._flush()

    def sync(self) -> None:
        """Have all that was added on disk; a disk that fails is a `problem`, and no more."""
        with self._filing:
            self._sync()

    def close(self) -> None:
        """Write what is left."""
        with self._filing:
            self._sync()
            os.close(self._file)

    def _mark_gap(self, version: int) -> None:
        since = max(self.version, 0)  # what an empty file lacks comes after version 0
        if since < version:
            self.append({"v": version, "gap": since})

    def _sync(self) -> None:
        self._flush()
        if self.problem is None:
            try:
                files.DISK.sync(self._file)
            except OSError as error:
                self._failed(error)

    def _flush(self) -> None:
        with self._lock:
            data = bytes(self._pending)
        if not data:
            return
        try:
            files.write_all(self._file, data)
        except OSError as error:
            self._failed(error)
            return
        self._size += len(data)
        self.problem = None
        with self._lock:
            del self._pending[: len(data)]  # what was added meanwhile stays, in order
            if self._lost_since is not None:
                # Room again: what comes from here on is kept, and what is missing is said.
                self._pending += _encoded({"v": self.version, "gap": self._lost_since})
                self._lost_since = None

    def _failed(self, error: OSError) -> None:
        if self.problem is None:
            log.error("%s could not be written: %s", NAME, error.strerror or error)
        self.problem = (
            f"{NAME} could not be written: {error.strerror or error}; unless it can be soon, this "
            "run cannot be replayed"
        )
        try:
            files.DISK.truncate(self._file, self._size)
        except OSError as again:
            log.error("%s could not be cut: %s", NAME, again.strerror or again)


def read(path: Path) -> Iterator[Line]:
    """The whole lines of a history, in order.

    Raises:
      OSError: It cannot be read.
      ValueError: A line is no JSON object with a version.
    """
    with path.open("rb") as file:
        for data in file:
            if not data.endswith(b"\n"):
                return  # was being written
            line = json.loads(data)
            line["v"]
            yield line


def _encoded(line: Line) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


@dataclasses.dataclass(frozen=True)
class _Survivor:
    """The version that a run goes on from."""

    version: int
    applied: Ranges
    settings: Settings

    def has(self, line: Line) -> bool:
        """Whether a line may be of its past."""
        return line["v"] <= self.version and ("out" not in line or line["out"] in self.applied)

    def settles(self, line: Line, *, doubt: bool) -> bool:
        """Whether it is sure that a line that may be, and those before it, are of its past.

        What was set at this very version is so only if it was the last, or is followed
        by what was: the settings may have been restored from before.
        """
        if line["v"] == self.version and line.keys() == {"v", "set"}:
            return bool(line["set"] == self.settings.to_json())
        return not doubt


def _surviving(path: Path, survivor: _Survivor) -> tuple[int, int, list[Line]]:
    """Bytes of the file that the surviving history has, its last version, and that one's lines."""
    size = read_bytes = 0
    last = -1
    lines: list[Line] = []
    doubtful: list[Line] = []
    if not path.exists():
        return size, last, lines
    with path.open("rb") as file:
        for data in file:
            try:
                line = json.loads(data)
                survives = survivor.has(line)
            except (ValueError, KeyError, TypeError):
                break
            if not survives or not data.endswith(b"\n"):
                break
            read_bytes += len(data)
            settled = survivor.settles(line, doubt=bool(doubtful))
            doubtful.append(line)
            if not settled:
                continue
            for each in doubtful:
                lines = [*(lines if each["v"] == last else ()), each]
                last = each["v"]
            doubtful = []
            size = read_bytes
    return size, last, lines
