"""What evaluators found, and whether one is still expected to report."""

from __future__ import annotations

import dataclasses
from collections import deque

from headwater.protos import parameter_server_pb2 as pb
from headwater.server.store import Published

KEPT_EPOCHS = 2
"""Ends of epochs that are kept for an evaluator; more would be memory for one that is too slow."""


class Evaluations:
    """Reports by version, newest first in importance. Time comes in as an argument."""

    def __init__(self) -> None:
        self.newest: pb.EvaluationReport | None = None
        self.needs_optimizer_state = False
        """Whether the weights for evaluation are made from it."""
        self._kept: deque[tuple[int, Published]] = deque(maxlen=KEPT_EPOCHS)
        self._seen_time: float | None = None
        self._waiting = 0

    def begin_wait(self) -> None:
        """An evaluator waits for a version."""
        self._waiting += 1

    def end_wait(self, now: float) -> None:
        """It was answered, and owes a report."""
        self._waiting -= 1
        self._seen_time = now

    def add(self, report: pb.EvaluationReport, now: float) -> None:
        """A report of an older version than the newest does not replace it."""
        self._seen_time = now
        if self.newest is None or report.version >= self.newest.version:
            self.newest = report
        while self._kept and self._kept[0][1].version <= report.version:
            self._kept.popleft()

    def keep(self, epoch: int, published: Published) -> None:
        """Have a version be there to be evaluated: the one that so many epochs ended with."""
        if not self.needs_optimizer_state:
            published = dataclasses.replace(published, optimizer_state=None)
        self._kept.append((epoch, published))

    def oldest(self, epoch: int) -> tuple[int, Published] | None:
        """Of the versions kept, the first with so many complete epochs, and how many it has."""
        return next((kept for kept in self._kept if kept[0] >= epoch), None)

    def is_done(self, version: int) -> bool:
        """Whether this version, or a later one, was reported on."""
        return self.newest is not None and self.newest.version >= version

    def expected(self, now: float, patience_s: float) -> bool:
        """Whether an evaluator is about that may still report."""
        recent = self._seen_time is not None and now - self._seen_time < patience_s
        return self._waiting > 0 or recent
