"""The one thread that moves the weights.

It takes jobs in the order given, and tells the event loop what became of each.
XLA releases the GIL while it works, so that the loop goes on.

With a journal the order is: found finite, written down, applied. Written down
first, because an update cannot be undone. The history is written after.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from headwater.protos.crc import crc32c
from headwater.protos.layout import Bytes
from headwater.server import failpoints
from headwater.server.admission import Ticket
from headwater.server.history import PLAIN, History, Line
from headwater.server.journal import Journal, weights_crc
from headwater.server.settings import Settings
from headwater.server.store import Contribution, Diverged, NotFinite, Published, Store

log = logging.getLogger("headwater.server")

CLOSE_TIMEOUT_S = 60.0
"""For the jobs that were submitted."""

CRC_BYTES = 4 << 20
"""Of weights for each version, on average, whose checksum goes into the history: 0.6 ms."""


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """Gradients that make one version together, in the order of their batches."""

    tickets: tuple[Ticket, ...]
    contributions: tuple[Contribution, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class LeaveOut:
    """A batch to leave out."""

    ticket: Ticket


@dataclasses.dataclass(frozen=True, eq=False)
class Check:
    """A gradient that will be applied later: is it finite?"""

    ticket: Ticket
    gradient: Bytes
    loss: float


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """Settings to hold from here on."""

    settings: Settings


Job = Update | LeaveOut | Check | Change

Result = Published | NotFinite | Exception | None
"""The new version, None after a Check that passed; or that a gradient was refused; or a failure."""


class Applier:
    """A queue of jobs and the thread that works it off; `on_done(job, result)` runs there."""

    def __init__(
        self,
        store: Store,
        on_done: Callable[[Any, Result], None],
        journal: Journal | None = None,
        history: History | None = None,
    ) -> None:
        self._store = store
        self._on_done = on_done
        self._journal = journal
        self._history = history
        # Of large weights the checksum would take longer than the update.
        self._crc_every = 1 + store.layout.total_bytes // CRC_BYTES
        self._noted_workers: set[str] = set()
        self._updates = 0
        self._updates_s = 0.0
        self._diverged: Diverged | None = None  # then the log's last record made no version
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="headwater-applier", daemon=True)
        self._thread.start()

    @property
    def mean_update_s(self) -> float:
        """Seconds that the optimizer takes for one update; 0 before the first."""
        return self._updates_s / max(1, self._updates)

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Finish what was submitted, then end the thread; a disk that hangs is not waited for."""
        self._jobs.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.error("an update has not ended within %.0f s; leaving it", CLOSE_TIMEOUT_S)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._on_done(job, self._result(job))

    def _result(self, job: Job) -> Result:
        try:
            return self._do(job)
        except Exception as error:
            return error

    def _do(self, job: Job) -> Published | None:
        store, journal = self._store, self._journal
        if isinstance(job, Check):
            store.check(job.gradient, job.loss)
            return None
        if self._diverged is not None:
            # What was queued behind it must not be logged after a version that never was.
            raise self._diverged
        if isinstance(job, Update):
            return self._update(job.contributions)
        if isinstance(job, LeaveOut):
            position = job.ticket.position
            if journal is not None:
                journal.left_out(store.current, position)
            published = store.leave_out(position)
            self._record({"v": published.version, "out": position})
            return published
        if journal is not None:
            journal.settings(store.current, job.settings)
        published = store.set(job.settings)
        self._record({"v": published.version, "set": job.settings.to_json()})
        return published

    def _update(self, contributions: tuple[Contribution, ...]) -> Published:
        store, journal = self._store, self._journal
        step = store.step(contributions)
        compensates = store.current.settings.staleness.compensate is not None
        gradients = [_noted(c, compensates) for c in contributions]
        if journal is not None:
            self._note_workers(contributions)
            journal.update(store.current, gradients, step)
        failpoints.reach("before-apply")
        began = time.monotonic()
        try:
            published = store.move(step)
        except Diverged as error:
            self._diverged = error
            raise
        self._updates, self._updates_s = (
            self._updates + 1, self._updates_s + time.monotonic() - began,
        )  # fmt: skip
        line: dict[str, Any] = {"v": published.version, "u": gradients}
        if published.version % self._crc_every == 0:
            line["w"] = weights_crc(published)
        self._record(line)
        failpoints.reach("after-apply")
        return published

    def _record(self, line: Line) -> None:
        if self._history is not None:
            self._history.append(line)

    def _note_workers(self, contributions: tuple[Contribution, ...]) -> None:
        """Have on disk who computed these: their updates survive in the journal, which lacks it."""
        new = {c.worker for c in contributions} - self._noted_workers
        if new and self._history is not None:
            self._history.sync()
            self._noted_workers |= new


def _noted(contribution: Contribution, compensates: bool) -> list[Any]:
    """A gradient as the history has it."""
    c = contribution
    noted: list[Any] = [c.position, c.base, c.worker, crc32c(c.gradient.data)]
    return [*noted, PLAIN] if compensates and c.base_leaves is None else noted
