"""What is done to disk for things that must survive: write, fsync, rename, and no more.

Everything durable goes through `DISK`, so that the tests can put a disk there
that is full, broken, slow or forgetful, without touching what uses it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

CHUNK_BYTES = 4 << 20
"""Bytes of one write: small enough that other threads get the disk and the GIL in between."""

Buffer = bytes | memoryview


class Disk:
    """The operating system's calls. Each raises OSError where the disk is full or broken."""

    def create(self, path: Path) -> int:
        """A new, empty file, open for writing; an old one of this name is emptied."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def reopen(self, path: Path, at: int) -> int:
        """A file as it is, open for writing from byte `at` on."""
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        os.lseek(file, at, os.SEEK_SET)
        return file

    def write(self, file: int, data: Buffer) -> int:
        """Write on; may write less than it was given. Returns how much."""
        return os.write(file, data)

    def truncate(self, file: int, size: int) -> None:
        """Cut a file to `size` bytes and go on writing there."""
        os.ftruncate(file, size)
        os.lseek(file, size, os.SEEK_SET)

    def sync(self, file: int) -> None:
        """Returns when what was written would survive loss of power."""
        os.fsync(file)

    def rename(self, old: Path, new: Path) -> None:
        old.replace(new)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def sync_folder(self, path: Path) -> None:
        """Returns when what was created, renamed and removed in it would survive."""
        folder = os.open(path, os.O_RDONLY)
        try:
            self.sync(folder)
        finally:
            os.close(folder)


DISK = Disk()
"""The tests put another in its place; so use it as `files.DISK`, never by import."""


def write_all(file: int, data: Buffer) -> None:
    """Append all of `data`, in chunks.

    Raises:
      OSError: Not all of it could be written.
    """
    view = memoryview(data).cast("B") if data else memoryview(b"")
    at = 0
    while at < len(view):
        at += DISK.write(file, view[at : at + CHUNK_BYTES])


def replace_file(
    path: Path, chunks: Iterable[Buffer], reach: Callable[[str], None] = lambda step: None
) -> None:
    """Write to a temporary name, fsync, rename to `path`, fsync the folder.

    On return the file survives loss of power, if the disk keeps what it
    acknowledged to fsync.

    Args:
      path: Replaced only when everything is on disk.
      chunks: The file's contents.
      reach: Told of each step that was reached, for those who test what a crash does there.

    Raises:
      OSError: The folder is missing, or the disk is full or broken; `path` is as
        it was, or whole and new but perhaps not on disk yet.
    """
    temporary = path.parent / f"{temporary_prefix(path)}{secrets.token_hex(4)}"
    try:
        file = DISK.create(temporary)
        try:
            for chunk in chunks:
                write_all(file, chunk)
            DISK.sync(file)
        finally:
            os.close(file)
        reach("before-rename")
        DISK.rename(temporary, path)
        reach("after-rename")
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            DISK.remove(temporary)
        raise
    DISK.sync_folder(path.parent)


def temporary_prefix(path: Path) -> str:
    """How the temporary names of a file begin; a process that was killed may leave one."""
    return f".{path.name}-"


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they replaced a file have left of theirs.

    Raises:
      OSError: The disk is broken.
    """
    for leftover in path.parent.glob(f"{temporary_prefix(path)}*"):
        DISK.remove(leftover)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there; their names survive, too.

    Raises:
      OSError: One cannot be made.
    """
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        DISK.sync_folder(folder.parent)
