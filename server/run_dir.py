"""The run directory: where a run is kept.

run.json                what the run is: id, incarnation, task, settings
snapshot-….safetensors  weights, optimizer state and ledger of one version each
updates-….log           with --durability log: every update since
weights.safetensors     the weights of the version that the last server ended with
evaluation.safetensors  those for evaluation, where they are others
history.jsonl           what made each version, to replay the run
metrics.jsonl           progress, evaluations and the end, a JSON object a line
lock                    held by the server that serves the run
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from headwater.protos import files, plain_json
from headwater.protos.command import expected_run_id, new_run_id
from headwater.protos.errors import UsageError
from headwater.server.run_record import RunRecord

log = logging.getLogger("headwater.server")

LOCK_POLL_S = 0.1
LOCK_EXTRA_S = 5.0
"""Seconds beyond its grace that a server which is ending is waited for."""
LOCK_MAX_S = 300.0


class RunDir:
    """A run's directory, locked by this process until `close`.

    Args:
      path: May hold a run already, which is then to be continued. None makes a
        new one under runs/.
      task_name: For the name of a new one.

    Raises:
      UsageError: Another server has it, or it cannot be read or written.
    """

    def __init__(self, path: Path | None, task_name: str) -> None:
        self.run_id = expected_run_id() or new_run_id()
        default = Path("runs") / f"{task_name}-{self.run_id}"
        self.path = path or default
        self.record: RunRecord | None = None
        """Of the incarnation before this one; None where the run is new."""
        with contextlib.ExitStack() as opened:
            try:
                files.make_folder(self.path)
                self._lock: IO[str] = opened.enter_context((self.path / "lock").open("a+"))
                self._metrics: IO[str] = opened.enter_context(self._metrics_path.open("a"))
                self._take()
                for file in (
                    self._record_path, self._metrics_path, self.weights_path, self.evaluation_path
                ):  # fmt: skip
                    files.remove_leftovers(file)
                if self._record_path.exists():
                    text = self._record_path.read_text()
                    self.record = RunRecord.parse(text, str(self._record_path))
                    self.run_id = self.record.run_id
            except OSError as error:
                raise UsageError(
                    f"the run directory {self.path} cannot be used: {error.strerror}; name another "
                    "with --run-dir"
                ) from None
            self._opened = opened.pop_all()
        if path is None:
            _link_latest(default)

    @staticmethod
    def holds_run(path: Path | None) -> bool:
        """Whether there is a run to continue."""
        return path is not None and (path / "run.json").exists()

    @staticmethod
    def recorded(path: Path | None) -> RunRecord | None:
        """What the run there is, as long as nobody has the directory; None where there is none.

        Raises:
          UsageError: It is damaged, or cannot be read.
        """
        if path is None or not RunDir.holds_run(path):
            return None
        file = path / "run.json"
        try:
            return RunRecord.parse(file.read_text(), str(file))
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}") from None

    # ------------------------------------------------------------------- lock

    def _take(self) -> None:
        """Lock the directory; wait for a server that has said that it is ending."""
        began, limit_s = time.monotonic(), 0.0
        while not self._try_lock():
            holder = self._holder()
            if (ends_within_s := holder.get("ends_within_s")) is None:
                raise UsageError(
                    f"another server (pid {holder.get('pid', 'unknown')}) has the run directory "
                    f"{self.path}; stop it, or name another with --run-dir"
                )
            if limit_s == 0.0:
                limit_s = min(ends_within_s + LOCK_EXTRA_S, LOCK_MAX_S)
                log.info(
                    "waiting up to %.0f s for the server (pid %s) that is ending in %s",
                    limit_s, holder.get("pid"), self.path,
                )  # fmt: skip
            if time.monotonic() - began > limit_s:
                raise UsageError(
                    f"the server (pid {holder.get('pid')}) that was ending in {self.path} has not "
                    f"ended within {limit_s:.0f} s; end it, or name another with --run-dir"
                )
            time.sleep(LOCK_POLL_S)
        self._tell(None)

    def ends_within(self, seconds: float) -> None:
        """Let whoever wants the directory next know that it will be free soon."""
        with contextlib.suppress(OSError):  # a full disk; they will be told that it is in use
            self._tell(seconds)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _holder(self) -> dict[str, Any]:
        try:
            found = json.loads((self.path / "lock").read_text())
        except (OSError, ValueError):
            return {}  # it is being written
        return found if isinstance(found, dict) else {}

    def _tell(self, ends_within_s: float | None) -> None:
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(json.dumps({"pid": os.getpid(), "ends_within_s": ends_within_s}))
        self._lock.flush()

    # ----------------------------------------------------------------- record

    @property
    def _record_path(self) -> Path:
        return self.path / "run.json"

    def write_record(self, record: RunRecord) -> None:
        """Make the run's facts durable; done before the server serves.

        Raises:
          OSError: The disk is full or broken; the record is as it was.
        """
        files.replace_file(self._record_path, [record.text().encode()])

    # ---------------------------------------------------------------- weights

    @property
    def weights_path(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def evaluation_path(self) -> Path:
        """Of the weights for evaluation, where they are others."""
        return self.path / "evaluation.safetensors"

    # ---------------------------------------------------------------- metrics

    @property
    def _metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def log_metrics(self, kind: str, values: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl.

        Raises:
          OSError: The disk is full or broken.
        """
        line = {"kind": kind, "time": time.time(), **values}
        self._metrics.write(plain_json.dumps(line) + "\n")
        self._metrics.flush()

    def cut_metrics(self, version: int) -> dict[str, Any] | None:
        """Drop the lines on versions after this one: their history did not survive.

        Also what a crash left of a last line. Returns the newest evaluation that is left.

        Raises:
          OSError: The disk is full or broken; the file is as it was.
        """
        kept, evaluation = "", None
        text = self._metrics_path.read_text(errors="replace")
        for line in text.splitlines():
            try:
                values = json.loads(line)
                survives = values["version"] <= version
            except (ValueError, KeyError, TypeError):
                continue
            if survives:
                kept += line + "\n"
                if values.get("kind") == "evaluation":
                    evaluation = values
        if kept != text:
            files.replace_file(self._metrics_path, [kept.encode()])
            self._metrics.close()
            self._metrics = self._opened.enter_context(self._metrics_path.open("a"))
        return evaluation

    def close(self) -> None:
        """Let the directory go. What the disk would not take was said when it was written."""
        with contextlib.suppress(OSError):
            self._opened.close()


def _link_latest(target: Path) -> None:
    """runs/latest -> the run. Not worth failing for: some file systems have no links."""
    link = target.parent / "latest"
    temporary = target.parent / f".latest-{os.getpid()}"
    try:
        temporary.symlink_to(target.name)
        temporary.replace(link)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        print(f"headwater server: {link} could not be linked: {error.strerror}", flush=True)
