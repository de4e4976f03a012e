"""The one thread that moves the weights.

It takes gradients in the order given, and tells the event loop what became of
each. XLA releases the GIL while it works, so that the loop goes on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from headwater.protos.layout import Bytes
from headwater.server.admission import Ticket
from headwater.server.store import NotFinite, Published, Store


class Job(NamedTuple):
    """One gradient to apply; without a buffer, one batch to leave out."""

    ticket: Ticket
    gradient: Bytes | None
    loss: float


Result = Published | NotFinite | Exception
"""The new version; or that the gradient was refused; or a failure of the update itself."""


class Applier:
    """A queue of jobs and the thread that works it off; `on_done(job, result)` runs there."""

    def __init__(self, store: Store, on_done: Callable[[Job, Result], None]) -> None:
        self._store = store
        self._on_done = on_done
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="headwater-applier", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Finish what was submitted, then end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._on_done(job, self._apply(job))

    def _apply(self, job: Job) -> Result:
        try:
            if job.gradient is None:
                return self._store.leave_out(job.ticket.position)
            return self._store.apply(job.gradient, job.loss, job.ticket.position)
        except Exception as error:
            return error
