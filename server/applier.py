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
"""Of a gradient, and of the weights, for each version, on average, whose checksums go into
the history: 0.6 ms each."""

QUICK_BYTES = 1 << 20
QUICK_S = 0.002
"""Up to here an update is made on the event loop: handing it to the thread and back takes
about as long as the update of a small model."""


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
        # Of a large model the checksums would take longer than the update.
        self._crc_every = 1 + store.layout.total_bytes // CRC_BYTES
        self._noted_workers: set[str] = set()
        self._updates = 0
        self._updates_s = 0.0
        self._fastest_s = 0.0
        self._broken: Exception | None = (
            None  # then the log may end with a record that made no version
        )
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="headwater-applier", daemon=True)
        self._thread.start()

    @property
    def mean_update_s(self) -> float:
        """Seconds that the optimizer takes for one update; 0 before the first."""
        return self._updates_s / max(1, self._updates)

    @property
    def is_quick(self) -> bool:
        """Whether a job takes so little that it may be done where it comes up, by `do`."""
        is_small = self._store.layout.total_bytes <= QUICK_BYTES and self._journal is None
        # The fastest: a thread that waits for a busy loop's GIL takes as long as that pleases.
        return is_small and self._fastest_s < QUICK_S

    def submit(self, job: Job) -> None:
        """Have the thread do a job after all that were submitted before."""
        self._jobs.put(job)

    def close(self) -> None:
        """Finish what was submitted, then end the thread; a disk that hangs is not waited for."""
        self._jobs.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.error("an update has not ended within %.0f s; leaving it", CLOSE_TIMEOUT_S)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._on_done(job, self.do(job))

    def do(self, job: Job) -> Result:
        """Do a job here and now; the thread must have nothing to do meanwhile."""
        try:
            return self._do(job)
        except Exception as error:
            return error

    def _do(self, job: Job) -> Published | None:
        store, journal = self._store, self._journal
        if isinstance(job, Check):
            store.check_pushed(job.gradient, job.loss)
            return None
        if self._broken is not None:
            # What was queued behind it must not be logged after a version that never was.
            raise self._broken
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
        if journal is not None:
            contributions = tuple(map(self._own, contributions))
        step = store.step(contributions)
        compensates = store.current.settings.staleness.compensate is not None
        is_summed = (store.current.version + 1) % self._crc_every == 0
        gradients = [_noted(c, compensates, is_summed) for c in contributions]
        if journal is not None:
            store.check(step.leaves, step.loss)  # before it is written down, which cannot be undone
            self._note_workers(contributions)
            journal.update(store.current, gradients, step)
        failpoints.reach("before-apply")
        began = time.monotonic()
        try:
            published = store.move(step)
        except Exception as error:
            if journal is None and not isinstance(error, Diverged):
                raise
            self._broken = error
            if not isinstance(error, NotFinite):
                raise
            # Too late to be refused, for it was found finite and is written down.
            self._broken = RuntimeError(f"what was finite before is not: {error}")
            raise self._broken from error
        took_s = time.monotonic() - began
        self._updates, self._updates_s = self._updates + 1, self._updates_s + took_s
        self._fastest_s = min(took_s, self._fastest_s or took_s)
        line: dict[str, Any] = {"v": published.version, "u": gradients}
        if is_summed:
            line["w"] = weights_crc(published)
        self._record(line)
        failpoints.reach("after-apply")
        return published

    def _own(self, contribution: Contribution) -> Contribution:
        """With the gradient in memory of our own: what is logged must be what is applied."""
        if (
            not contribution.is_shared
            or contribution.push is not None
            or not self._store.reads_in_place
        ):
            return contribution
        gradient = self._store.layout.moving.empty()
        gradient[:] = contribution.gradient
        return dataclasses.replace(contribution, gradient=gradient, is_shared=False)

    def _record(self, line: Line) -> None:
        if self._history is not None:
            self._history.append(line)

    def _note_workers(self, contributions: tuple[Contribution, ...]) -> None:
        """Have on disk who computed these: their updates survive in the journal, which lacks it."""
        new = {c.worker for c in contributions} - self._noted_workers
        if new and self._history is not None:
            self._history.sync()
            self._noted_workers |= new


def _noted(contribution: Contribution, compensates: bool, is_summed: bool) -> list[Any]:
    """A gradient as the history has it."""
    c = contribution
    position = c.position if c.push is None else None
    crc = crc32c(c.gradient.data) if is_summed else None
    noted: list[Any] = [position, c.base, c.worker, crc]
    if compensates and c.base_params is None:
        noted.append(PLAIN)
    if c.push is not None:
        noted.append(list(dataclasses.astuple(c.push)))
    return noted
