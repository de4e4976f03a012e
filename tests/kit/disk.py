"""Disks to fear: full, broken, slow, and forgetful of what was not fsynced.

In a test's own process:    files.DISK = FaultyDisk(control)
In a server's:              headwater server --task tests/kit/counting.py --task-option faults=FILE

The control file is read at each operation, so a test can make room on a disk,
or break it, while the server runs. It is JSON, a list of rules; the first that
fits an operation holds:

    {"operation": "write", "files": "updates-*", "error": "ENOSPC"}
    {"operation": "sync", "files": "*", "delay_s": 2.0}
    {"operation": "write", "files": "*", "short": true}       writes half of what it gets
    {"operation": "write", "files": "*", "error": "ENOSPC", "room": 500}   after 500 bytes

Operations are the methods of `Disk`; temporary names count as those they stand for.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import secrets
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from headwater.protos.files import Buffer, Disk


class FaultyDisk(Disk):
    """Fails as the control file says."""

    def __init__(self, control: Path) -> None:
        self.control = control
        self.failed: Counter[str] = Counter()
        """Operations that failed, by name."""
        self._names: dict[int, str] = {}
        self._room_taken = 0

    def create(self, path: Path) -> int:
        self._check("create", path.name)
        file = super().create(path)
        self._names[file] = path.name
        return file

    def reopen(self, path: Path, at: int) -> int:
        self._check("reopen", path.name)
        file = super().reopen(path, at)
        self._names[file] = path.name
        return file

    def write(self, file: int, data: Buffer) -> int:
        rule = self._check("write", self._names.get(file, ""))
        if rule.get("short") and len(data) > 1:
            data = memoryview(data)[: len(data) // 2]
        if "room" in rule:
            data = memoryview(data)[: rule["room"] - self._room_taken]
            self._room_taken += len(data)
            if not data:
                self._room_taken = 0
                self._fail("write", rule["error"])
        return super().write(file, data)

    def truncate(self, file: int, size: int) -> None:
        self._check("truncate", self._names.get(file, ""))
        super().truncate(file, size)

    def sync(self, file: int) -> None:
        self._check("sync", self._names.get(file, ""))
        super().sync(file)

    def rename(self, old: Path, new: Path) -> None:
        self._check("rename", new.name)
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self._check("remove", path.name)
        super().remove(path)

    def sync_folder(self, path: Path) -> None:
        self._check("sync_folder", path.name)
        super().sync_folder(path)

    def _check(self, operation: str, name: str) -> dict[str, Any]:
        for rule in self._rules():
            bare = name.lstrip(".")  # .snapshot-7.safetensors-1a2b3c4d
            if rule["operation"] == operation and fnmatch.fnmatch(bare, rule.get("files", "*")):
                time.sleep(rule.get("delay_s", 0.0))
                if "error" in rule and "room" not in rule:
                    self._fail(operation, rule["error"])
                return rule
        return {}

    def _fail(self, operation: str, error: str) -> None:
        self.failed[operation] += 1
        raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))

    def _rules(self) -> list[dict[str, Any]]:
        try:
            return json.loads(self.control.read_text())
        except FileNotFoundError:
            return []


def set_faults(control: Path, *rules: dict[str, Any]) -> None:
    """What the disk does from now on; without rules it is well."""
    temporary = control.with_suffix(".new")
    temporary.write_text(json.dumps(rules))
    temporary.replace(control)


class ForgetfulDisk(Disk):
    """Keeps, in a folder of its own, what a loss of power would leave of another.

    A file's bytes count from the end of its fsync, its name from that of its folder's.
    An fsync takes 30 ms, so that who does not wait for it is found out. What this disk
    did not write itself counts as it is when its folder is synced. What a process that was
    killed had not fsynced is still in the file for the next, and still may be lost.

    Args:
      shadow: Where it is kept; `power_loss` puts it back.
    """

    def __init__(self, shadow: Path) -> None:
        self._shadow = shadow
        self._files: dict[int, str] = {}  # descriptor to the file that has what was fsynced
        self._names: dict[str, str] = {}  # the name in the folder to that file
        self._foreign: set[str] = set()
        self._folder: Path | None = None
        shadow.mkdir(exist_ok=True)
        if (shadow / "names.json").exists():
            self._names = json.loads((shadow / "names.json").read_text())

    def create(self, path: Path) -> int:
        file = super().create(path)
        self._files[file] = self._names[path.name] = secrets.token_hex(8)
        self._folder = path.parent
        return file

    def reopen(self, path: Path, at: int) -> int:
        file = super().reopen(path, at)
        if path.name not in self._names:  # as a loss of power left it
            self._names[path.name] = secrets.token_hex(8)
            (self._shadow / self._names[path.name]).write_bytes(path.read_bytes())
        self._files[file] = self._names[path.name]
        return file

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self._names[new.name] = self._names.pop(old.name)

    def remove(self, path: Path) -> None:
        super().remove(path)
        self._names.pop(path.name, None)

    def sync(self, file: int) -> None:
        size = os.fstat(file).st_size
        time.sleep(0.03)
        super().sync(file)
        if file not in self._files:
            return  # a folder
        kept = self._shadow / self._files[file]
        have = kept.stat().st_size if kept.exists() else 0
        with Path(f"/proc/self/fd/{file}").open("rb") as source, kept.open("ab") as target:
            target.truncate(min(have, size))
            source.seek(have)
            target.write(source.read(max(0, size - have)))

    def sync_folder(self, path: Path) -> None:
        for file in path.iterdir() if path == self._folder else ():
            if file.name.startswith("."):
                continue
            if file.name not in self._names:
                self._names[file.name] = secrets.token_hex(8)
                self._foreign.add(file.name)
            if file.name in self._foreign:
                (self._shadow / self._names[file.name]).write_bytes(file.read_bytes())
        new = self._shadow / "names.new"
        new.write_text(json.dumps(self._names))
        new.replace(self._shadow / "names.json")


def power_loss(folder: Path, shadow: Path) -> None:
    """Leave in `folder` what had been fsynced. Its processes must have been killed."""
    names = json.loads((shadow / "names.json").read_text())
    for path in folder.iterdir():
        path.unlink()
    for name, kept in names.items():
        found = shadow / kept
        (folder / name).write_bytes(found.read_bytes() if found.exists() else b"")
    shutil.rmtree(shadow)
