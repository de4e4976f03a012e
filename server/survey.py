"""What a history says as a whole, read once before any of it is computed again.

It tells until when the weights of each version are needed, so that none are kept
for longer, and who computed the gradients, so that this process can be made to
compute alike. Imports no JAX: what it finds decides how JAX is started.
"""

from __future__ import annotations

import array
import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwater.protos.errors import HeadwaterError, UsageError
from headwater.server import history
from headwater.server.history import Line
from headwater.server.settings import Settings

_NEEDED = (
    *("run_id", "epochs", "updates", "optimizer", "optimizer_spec", "inner_optimizer_spec"),
    *("ema", "compression", "pull_dtype", "weights", "set", "compute"),
)
"""Of the line on an incarnation."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """One that a history names."""

    name: str
    compute: Mapping[str, str]
    """Its fingerprint (worker/compute.py); empty where it was not written."""
    gradients: int
    """Of the updates, so many are of its."""

    @property
    def device_count(self) -> int:
        """Over how many devices it split its batches, as far as their size let it."""
        text = self.compute.get("devices", "")
        return int(text) if re.fullmatch(r"[1-9]\d{0,5}", text) else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """A history up to a version."""

    run_id: str
    version: int
    """That it leads to, from 0 on: as many updates are to be made again."""
    incarnations: tuple[Line, ...]
    workers: Mapping[str, Worker]
    """Of those gradients, by the name that the lines have for each."""
    last_used: array.array[int]
    """By version: the last one that a gradient computed at it went into; 0 where there is none."""


def survey(path: Path, to: int | None = None) -> Survey:
    """Read a history, up to and with version `to`.

    Raises:
      UsageError: There is no history, or none of that version.
      HeadwaterError: It is damaged, or was not written whole, so that what comes
        after cannot be computed.
    """
    found = _Surveyor()
    number = 1
    try:
        for line in history.read(path):
            if to is not None and line["v"] > to:
                break
            found.add(line)
            number += 1
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}; name the directory of a run that has one"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeadwaterError(
            f"{path} is damaged in line {number}: {error}; restore it from a copy, or replay "
            f"--to {found.version}, the version before"
        ) from None
    if not found.incarnations:
        raise HeadwaterError(f"{path} is empty: the run has not begun, or its history was lost")
    if to is not None and to > found.version:
        raise UsageError(f"--to {to}: the history leads to version {found.version}")
    return found.survey()


class _Surveyor:
    """Takes in line after line. Raises what it raises where a line cannot be."""

    def __init__(self) -> None:
        self.version = 0
        self.incarnations: list[Line] = []
        self._last_used = array.array("q", [0])
        self._gradients: Counter[str] = Counter()
        self._workers: dict[str, Line] = {}

    def add(self, line: Line) -> None:
        version = line["v"]
        if "gap" in line:
            raise HeadwaterError(
                f"the run cannot be replayed to its end: what came between version {line['gap']} "
                f"and {version} was not written, because the disk was full or failed; replay "
                f"--to {line['gap']}"
            )
        if not self.incarnations and "incarnation" not in line:
            raise ValueError("it begins with something else than a server's first life")
        expected = self.version + ("u" in line)
        if version != expected:
            raise ValueError(f"it is of version {version}, and {expected} should follow")
        if "incarnation" in line:
            for name in _NEEDED:
                line[name]
            self.incarnations.append(line)
        if "set" in line:
            Settings.from_json(line["set"])
        if "worker" in line:
            self._workers[line["worker"]] = line
        if "u" in line:
            self._update(version, line["u"])

    def _update(self, version: int, gradients: Any) -> None:
        if not gradients:
            raise ValueError("an update has no gradient")
        for position, base, worker, crc, *_ in gradients:
            if position is None:
                raise HeadwaterError(
                    f"the run cannot be replayed to its end: version {version} was made by a push "
                    f"of {worker}, whose gradient is no batch's and was not kept; replay "
                    f"--to {version - 1}"
                )
            if not 0 <= base < version or position < 0 or (crc is not None and crc < 0):
                raise ValueError(f"its gradient is of round {position} at version {base}")
            self._last_used[base] = version
            self._gradients[worker] += 1
        self._last_used.append(0)
        self.version = version

    def survey(self) -> Survey:
        return Survey(
            run_id=self.incarnations[0]["run_id"],
            version=self.version,
            incarnations=tuple(self.incarnations),
            workers={name: self._worker(name) for name in self._gradients},
            last_used=self._last_used,
        )

    def _worker(self, name: str) -> Worker:
        line = self._workers.get(name, {})
        return Worker(
            line.get("name", f"worker {name}"), line.get("compute", {}), self._gradients[name]
        )
