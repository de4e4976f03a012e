"""The run directory: where a run is kept.

run.json             what the run is: id, incarnation, task, settings
weights.safetensors  the newest durable version
metrics.jsonl        progress, evaluations and the end, a JSON object a line
lock                 held by the server that serves the run
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from headwater.protos import plain_json
from headwater.protos.errors import UsageError
from headwater.protos.weights_file import replace_file, save_weights

FORMAT = 1
"""Of run.json and what it stands beside."""


class RunDir:
    """A new run's directory, locked by this process until `close`.

    Raises:
      UsageError: The directory holds a run already, another server has it, or it
        cannot be written.
    """

    def __init__(self, path: Path | None, task_name: str) -> None:
        self.run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        default = Path("runs") / f"{task_name}-{self.run_id}"
        self.path = path or default
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (self.path / "lock").open("a")
            self._metrics: IO[str] = (self.path / "metrics.jsonl").open("a")
        except OSError as error:
            raise UsageError(
                f"the run directory {self.path} cannot be written: {error.strerror}; name another "
                "with --run-dir"
            ) from None
        try:
            self._take()
        except UsageError:
            self.close()
            raise
        if path is None:
            _link_latest(default)

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"another server has the run directory {self.path}; stop it, or name another "
                "with --run-dir"
            ) from None
        if (self.path / "run.json").exists():
            raise UsageError(
                f"{self.path} holds a run already, and this version cannot continue one; name "
                "another with --run-dir"
            )

    @property
    def weights_path(self) -> Path:
        return self.path / "weights.safetensors"

    def write_run(self, facts: Mapping[str, Any]) -> None:
        """Make the run's facts durable; done before the server serves."""
        text = json.dumps({"format": FORMAT, "run_id": self.run_id, **facts}, indent=2)
        replace_file(self.path / "run.json", text.encode() + b"\n")

    def save_weights(self, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
        """Make a version durable.

        Raises:
          OSError: The disk is full or broken; the file is as it was.
        """
        save_weights(self.weights_path, arrays, metadata)

    def log_metrics(self, kind: str, values: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl.

        Raises:
          OSError: The disk is full or broken.
        """
        line = {"kind": kind, "time": time.time(), **values}
        self._metrics.write(plain_json.dumps(line) + "\n")
        self._metrics.flush()

    def close(self) -> None:
        self._metrics.close()
        self._lock.close()


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
