"""The one thread that moves the weights.

It takes gradients in the order given, and tells the event loop what became of
each. XLA releases the GIL while it works, so that the loop goes on.

With a journal the order is: found finite, written down, applied. Written down
first, because an update cannot be undone.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from headwater.protos.layout import Bytes
from headwater.server import failpoints
from headwater.server.admission import Ticket
from headwater.server.journal import Journal
from headwater.server.store import NotFinite, Published, Store

log = logging.getLogger("headwater.server")

CLOSE_TIMEOUT_S = 60.0
"""For the updates that were submitted."""


class Job(NamedTuple):
    """One gradient to apply; without a buffer, one batch to leave out."""

    ticket: Ticket
    gradient: Bytes | None
    loss: float


Result = Published | NotFinite | Exception
"""The new version; or that the gradient was refused; or a failure of the update itself."""


class Applier:
    """A queue of jobs and the thread that works it off; `on_done(job, result)` runs there."""

    def __init__(
        self,
        store: Store,
        on_done: Callable[[Job, Result], None],
        journal: Journal | None = None,
    ) -> None:
        self._store = store
        self._on_done = on_done
        self._journal = journal
        self._updates = 0
        self._updates_s = 0.0
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
            return self._apply(job)
        except Exception as error:
            return error

    def _apply(self, job: Job) -> Published:
        store, journal, ticket = self._store, self._journal, job.ticket
        if job.gradient is None:
            if journal is not None:
                journal.left_out(store.current, ticket.position)
            return store.leave_out(ticket.position)
        store.check(job.gradient, job.loss)
        if journal is not None:
            journal.update(store.current, ticket, job.gradient, job.loss)
        failpoints.reach("before-apply")
        began = time.monotonic()
        published = store.move(job.gradient, job.loss, ticket.position)
        self._updates, self._updates_s = (
            self._updates + 1, self._updates_s + time.monotonic() - began,
        )  # fmt: skip
        failpoints.reach("after-apply")
        return published
