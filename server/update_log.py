"""The update log of --durability log: every update on disk before it is acknowledged.

    updates-00000000000000014071.log      records from the 14,071st of the run on

`append` writes and `sync` makes durable what was appended so far, in one fsync
for many updates (group commit); they may be called from two threads. A new
segment begins after each snapshot, and segments that no kept snapshot needs are
removed. What a record is, and what is made of a damaged one: log_records.py.

When the disk is full nothing is lost: the record is cut off again, and may be
appended when there is room. Any other error, of fsync above all, ends the log:
what the disk then holds nobody knows (Rebello et al. 2020, "Can Applications
Recover from fsync Failures?").
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import mmap
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from headwater.protos import files
from headwater.protos.errors import UsageError
from headwater.server import failpoints, log_records
from headwater.server.log_records import Kind, LogError, Record

log = logging.getLogger("headwater.server")

_PREFIX, _SUFFIX = "updates-", ".log"

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


class NoRoom(Exception):
    """The disk is full; the log is as it was before."""


class LogBroken(Exception):
    """The disk failed; nothing more can be made durable."""


class Segment(NamedTuple):
    """One file, and the sequence of its first record."""

    first: int
    path: Path


class UpdateLog:
    """The log while it is written.

    Args:
      folder: The run directory; this process holds its lock.
      facts: What every segment's head says: the run's id, the layout's fingerprint.
      version: Of the weights now.
      sequence: Of the last record so far; 0 where there is none.

    Raises:
      NoRoom: The disk is full.
      LogBroken: The disk failed.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], *, version: int, sequence: int
    ) -> None:
        self._folder = folder
        self._facts = facts
        self._version = self._synced_version = version
        self._appended = self._synced = sequence
        self._size = self._head_size = 0
        self._rotate = False
        self._broken: LogBroken | None = None
        self._sync_lock = threading.Lock()  # held while the file must stay open
        self._file = self._begin()

    # ------------------------------------------------------------- writing

    @property
    def size_bytes(self) -> int:
        """Of the newest segment: what a recovery from the newest snapshot would read."""
        return self._size

    @property
    def is_synced(self) -> bool:
        """Whether everything appended is durable."""
        return self._appended == self._synced

    @property
    def synced_version(self) -> int:
        """That what is durable leads to."""
        return self._synced_version

    def append(self, kind: Kind, *, version: int, gradient: memoryview, **values: Any) -> int:
        """Write a record, not yet durably; returns its sequence.

        Args:
          kind: Of the record.
          version: Of the weights after it.
          gradient: The flat buffer, or nothing.
          **values: Other fields of `Record`.

        Raises:
          NoRoom: The disk is full; the record was not written.
          LogBroken: The disk failed.
        """
        self._check()
        if self._rotate and self._size > self._head_size:
            self._next_segment()
        record = Record(
            kind=kind,
            sequence=self._appended + 1,
            synced=self._synced,
            version=version,
            gradient=gradient,
            **values,
        )
        head = log_records.encode(record)
        try:
            files.write_all(self._file, head)
            files.write_all(self._file, gradient)
        except OSError as error:
            with self._breaking():
                files.DISK.truncate(self._file, self._size)
            raise self._kind_of(error) from error
        self._size += len(head) + len(gradient)
        self._appended, self._version = record.sequence, version
        failpoints.reach("log-appended")
        return record.sequence

    def sync(self) -> int:
        """Make everything appended so far durable; returns the version that it leads to.

        Raises:
          LogBroken: It is not durable, and will not be.
        """
        with self._sync_lock, self._breaking():
            self._check()
            # In this order: another thread appends, and sets the sequence first.
            version, sequence = self._version, self._appended
            files.DISK.sync(self._file)
            self._synced, self._synced_version = sequence, version
        failpoints.reach("log-synced")
        return version

    def snapshot_written(self, needed_from: int) -> None:
        """Begin a new segment with the next record; drop what no snapshot needs any more.

        Args:
          needed_from: Version of the oldest snapshot that a recovery may begin with.
        """
        self._rotate = True
        found = segments(self._folder)
        for segment, following in itertools.pairwise(found):
            # Less, not equal: a batch left out at just that version makes no version.
            try:
                if _version(following) >= needed_from:
                    return
                files.DISK.remove(segment.path)
            except (OSError, LogError) as error:
                # It only takes room, and is tried again next time. Not those after it,
                # which would leave a gap.
                log.warning("%s could not be removed: %s", segment.path, error)
                return

    def close(self) -> None:
        """Say on disk that nothing is missing, and close.

        Raises:
          NoRoom: The disk is full; everything else is durable.
          LogBroken: The disk failed.
        """
        try:
            self.sync()
            self.append(Kind.SYNCED, version=self._version, gradient=memoryview(b""))
            self.sync()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close without a word, as a crash would."""
        with self._sync_lock:
            os.close(self._file)

    def _begin(self) -> int:
        path = self._folder / f"{_PREFIX}{self._appended + 1:020}{_SUFFIX}"
        head = log_records.encode_head(
            {**self._facts, "version": self._version, "sequence": self._appended}
        )
        try:
            # A file of this name holds no record, or ours would have another number.
            file = files.DISK.create(path)
        except OSError as error:
            raise self._kind_of(error) from error
        try:
            files.write_all(file, head)
            with self._breaking():
                files.DISK.sync(file)
                files.DISK.sync_folder(self._folder)
        except (OSError, LogBroken) as error:
            os.close(file)
            with contextlib.suppress(OSError):
                files.DISK.remove(path)
            raise self._kind_of(error) from error
        self._size = self._head_size = len(head)
        return file

    def _next_segment(self) -> None:
        self.sync()
        with self._sync_lock:
            before, self._file = self._file, self._begin()
            os.close(before)
        self._rotate = False

    # --------------------------------------------------------------- failing

    def _check(self) -> None:
        """What failed once is never believed again: a later fsync would say that all is well."""
        if self._broken is not None:
            raise self._broken

    def _kind_of(self, error: OSError | LogBroken) -> NoRoom | LogBroken:
        if isinstance(error, LogBroken):
            return error
        text = error.strerror or str(error)
        if error.errno in _NO_ROOM:
            return NoRoom(text)
        self._broken = LogBroken(text)
        return self._broken

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """No error in here leaves a usable log, a full disk neither."""
        try:
            yield
        except OSError as error:
            self._broken = LogBroken(error.strerror or str(error))
            raise self._broken from error


def segments(folder: Path) -> list[Segment]:
    """The log's files in order."""
    found = []
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        number = path.name[len(_PREFIX) : -len(_SUFFIX)]
        if number.isdecimal():
            found.append(Segment(int(number), path))
    return sorted(found)


def holds_records(folder: Path) -> bool:
    """Whether there are updates in the log.

    Raises:
      OSError: It cannot be read.
    """
    return any(
        segment.first > 1
        or any(log_records.records_within(memoryview(segment.path.read_bytes()), 0))
        for segment in segments(folder)
    )


def remove_all(folder: Path) -> None:
    """Remove the log: a snapshot holds all of it.

    Raises:
      OSError: The disk is broken.
    """
    for segment in segments(folder):
        files.DISK.remove(segment.path)
    files.DISK.sync_folder(folder)


def _version(segment: Segment) -> int:
    """Of the weights when the segment was begun."""
    with segment.path.open("rb") as file:
        facts, _ = log_records.decode_head(memoryview(file.read(4096)))
    return int(facts["version"])


class Recovery:
    """Reads a log that an earlier incarnation left; iterate over it, then look at what was found.

    Args:
      folder: The run directory; this process holds its lock.
      facts: What every head must say.
      version: Of the snapshot that recovery began with: older records are passed over.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], version: int) -> None:
        self._folder = folder
        self._facts = facts
        self._version = version
        self.sequence = 0
        """Of the last whole record."""

    def __iter__(self) -> Iterator[Record]:
        """The records of batches that the snapshot may not know, in order.

        At the end the torn tail, if there is one, is cut off the last segment.

        Raises:
          UsageError: The log is damaged, is of another run, or has a gap.
        """
        found = self._needed()
        for number, segment in enumerate(found):
            last = number == len(found) - 1
            if segment.path.stat().st_size == 0 and last:
                self._remove(segment)
                return
            # Not closed by hand: records that were read from it may still be about.
            with segment.path.open("rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            end = yield from self._read(segment, data, first=number == 0, last=last)
            if end is not None:
                self._settle(segment, data, *end)

    def _needed(self) -> list[Segment]:
        """The segments from the one on in which the snapshot's version was made.

        Whatever is wrong with those before it, it is in the snapshot.
        """
        found = segments(self._folder)
        for number in range(len(found) - 1, 0, -1):
            # Less, not equal: a batch left out at just that version makes no version.
            with contextlib.suppress(LogError):
                if _version(found[number]) < self._version:
                    return found[number:]
        return found

    def _read(
        self, segment: Segment, data: memoryview, *, first: bool, last: bool
    ) -> Generator[Record, None, tuple[int, int] | None]:
        """Yields the records.

        Returns, of the last segment, between which bytes it may not be on disk.
        """
        try:
            facts, at = log_records.decode_head(data)
        except LogError as error:
            if last and not any(log_records.records_within(data, 0)):
                self._remove(segment)
                return None
            raise _damaged(segment, f"{error}") from None
        for name, value in self._facts.items():
            if facts.get(name) != value:
                raise _damaged(segment, f"its {name} is {facts.get(name)}, not {value}")
        if first:
            self.sequence = facts["sequence"]
            if facts["version"] > self._version:
                raise UsageError(
                    f"the log in {self._folder} begins at version {facts['version']}, and the "
                    f"newest whole snapshot is of version {self._version}: what lies between is "
                    "missing. Restore the run directory from a copy"
                )
        elif facts["sequence"] != self.sequence:
            raise _damaged(
                segment, f"records {self.sequence + 1} to {facts['sequence']} are missing"
            )
        unsynced: deque[tuple[int, int]] = deque()  # records: sequence and first byte
        for found in log_records.read(data, at, self.sequence):
            if isinstance(found, Record):
                unsynced.append((found.sequence, at))
                while unsynced[0][0] <= found.synced:
                    unsynced.popleft()
                at += len(log_records.encode(found)) + len(found.gradient)
                self.sequence = found.sequence
                if found.kind is not Kind.SYNCED:
                    yield found
            elif found.damaged or (found.torn_bytes and not last):
                raise _damaged(segment, f"it is not whole from byte {found.end} on")
        return (unsynced[0][1] if unsynced else at, at) if last else None

    def _remove(self, segment: Segment) -> None:
        log.warning("%s: removed; it was being begun, and held no update", segment.path)
        files.DISK.remove(segment.path)

    def _settle(self, segment: Segment, data: memoryview, start: int, end: int) -> None:
        """Cut the torn tail off, and have on disk what was found.

        From `start` on it may have been found in memory alone: the process died before
        its fsync, or the fsync failed, after which the system takes what it holds for
        written. So it is written once more.
        """
        if torn_bytes := len(data) - end:
            log.warning(
                "%s: cut at byte %d; the %d bytes after it are of an update that was never "
                "acknowledged", segment.path, end, torn_bytes,
            )  # fmt: skip
        again = bytes(data[start:end])
        file = files.DISK.reopen(segment.path, start)
        try:
            files.write_all(file, again)
            files.DISK.truncate(file, end)
            files.DISK.sync(file)
        finally:
            os.close(file)


def _damaged(segment: Segment, why: str) -> UsageError:
    return UsageError(
        f"{segment.path} was damaged: {why}, and updates that were reported as durable are in it. "
        "Nothing was changed; restore the run directory from a copy"
    )
