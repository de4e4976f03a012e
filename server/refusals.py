"""Whose fault it is when a gradient is not finite: the worker's or the batch's.

A worker with three refusals in a row is quarantined: it gets no more tickets.
A batch refused by three workers, or three times when every worker that could
take it has refused it, is condemned: no one can compute it. A refused batch
goes to somebody else first. When the last worker is quarantined, the weights
themselves are to blame, and the run ends.

A pure state machine: no clock, no thread, no I/O.
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from collections.abc import Collection

LIMIT = 3
"""Refusals in a row that quarantine a worker, and refusals that condemn a batch."""


class Verdict(enum.Enum):
    """What follows from a refusal."""

    GO_ON = "the batch is tried again"
    QUARANTINE = "the worker gets no more tickets"
    CONDEMN = "the batch cannot be computed by anyone"


class Refusals:
    """Counts of gradients refused as not finite, by worker and by batch."""

    def __init__(self) -> None:
        self.quarantined: set[int] = set()
        self.total = 0
        self._streak: Counter[int] = Counter()
        self._by_batch: dict[int, Counter[int]] = defaultdict(Counter)

    def refused(self, worker: int, batch: int, connected: Collection[int]) -> Verdict:
        """Record one refusal; `connected` are the workers in the roster."""
        self.total += 1
        self._streak[worker] += 1
        refusers = self._by_batch[batch]
        refusers[worker] += 1
        able = {w for w in connected if w not in self.quarantined} | {worker}
        if len(refusers) >= LIMIT or (refusers.total() >= LIMIT and able <= refusers.keys()):
            return Verdict.CONDEMN
        if self._streak[worker] >= LIMIT:
            self.quarantined.add(worker)
            return Verdict.QUARANTINE
        return Verdict.GO_ON

    def accepted(self, worker: int, batch: int) -> None:
        """The worker's gradient of this batch was applied."""
        self._streak.pop(worker, None)
        self._by_batch.pop(batch, None)

    def left_out(self, batch: int) -> None:
        """The batch was skipped; what it did to its workers' records was not their fault."""
        for worker in self._by_batch.pop(batch, {}):
            self._streak.pop(worker, None)

    @property
    def is_clear(self) -> bool:
        """Whether no batch was refused that has not been computed since."""
        return not self._by_batch

    def avoided_by(self, worker: int, connected: Collection[int]) -> set[int]:
        """Batches that the worker refused and that another worker has yet to try."""
        able = {w for w in connected if w not in self.quarantined}
        return {
            batch
            for batch, refusers in self._by_batch.items()
            if worker in refusers and able - refusers.keys()
        }

    def forget(self, worker: int) -> None:
        """The worker left the roster; what it said of batches still counts."""
        self._streak.pop(worker, None)
        self.quarantined.discard(worker)
