"""The ledger: what became of every batch of the run. Exactly-once is decided here.

    pending --lease--> leased --take--> ticketed --admit--> admitted --settle--> applied
       ^                  |                 |                   |
       +----release-------+----give_back----+-----give_back-----+   (refused as not finite)

Every batch is in exactly one of these at any moment. A batch is applied once
and stays so; what is admitted (received whole) does not go back when its worker
vanishes. Positions count the run's batches from 0; the lowest go first. With
local steps a position is a round of batches, which stand or fall together.

A pure state machine: no clock, no thread, no I/O.
"""

from __future__ import annotations

import enum
import heapq
from collections import defaultdict
from collections.abc import Collection, Iterator

from headwater.server.ranges import Ranges

WorkerId = int


class BatchState(enum.Enum):
    """Where a batch stands that is neither pending nor applied."""

    LEASED = "leased"
    TICKETED = "ticketed"
    ADMITTED = "admitted"


class LedgerError(AssertionError):
    """A transition the diagram above does not have: a bug in the server."""


class Ledger:
    """The batches 0 to total - 1 of a run, `per_epoch` in each epoch.

    At most `open_epochs` epochs are begun and not complete: no batch of a
    later one is leased. Nor is one of an epoch from `allowed_epochs` on.
    """

    def __init__(
        self, total: int, per_epoch: int, applied: Ranges | None = None, open_epochs: int = 2
    ) -> None:
        self.total = total
        self.applied = Ranges() if applied is None else applied
        self._per_epoch = per_epoch
        self._open_epochs = open_epochs
        self.allowed_epochs: int | None = None
        """Epochs that may be begun; None: all."""
        self._under_way: dict[int, tuple[BatchState, WorkerId]] = {}
        self._leased: dict[WorkerId, list[int]] = defaultdict(list)  # heaps
        # Pending are the returned ones (a heap) and those from `_fresh` on that
        # were not applied in an earlier incarnation.
        self._returned: list[int] = []
        self._fresh = self.applied.low_water

    # ------------------------------------------------------------- looking

    @property
    def done(self) -> bool:
        """Whether every batch has been applied."""
        return len(self.applied) == self.total

    @property
    def pending_count(self) -> int:
        return self.total - len(self.applied) - len(self._under_way)

    def count(self, state: BatchState) -> int:
        return sum(1 for at, _ in self._under_way.values() if at is state)

    def positions(self, *states: BatchState) -> list[int]:
        """Those in one of the states."""
        return [position for position, (at, _) in self._under_way.items() if at in states]

    def state(self, position: int) -> BatchState | None:
        """None for pending and applied."""
        return self._under_way[position][0] if position in self._under_way else None

    def lowest_unapplied(self, count: int) -> list[int]:
        """Up to `count` positions of the lowest epoch that is not complete."""
        found: list[int] = []
        position = self.applied.low_water
        end = min((self.epoch + 1) * self._per_epoch, self._allowed_end)
        while len(found) < count and position < end:
            if position not in self.applied:
                found.append(position)
            position += 1
        return found

    @property
    def epoch(self) -> int:
        """The lowest epoch that is not complete; the number of epochs when all are."""
        return self.applied.low_water // self._per_epoch

    @property
    def open_count(self) -> int:
        """Batches of the open epochs that have not been applied."""
        return self._open_end - len(self.applied)

    @property
    def _open_end(self) -> int:
        return min(self._allowed_end, (self.epoch + self._open_epochs) * self._per_epoch)

    @property
    def _allowed_end(self) -> int:
        if self.allowed_epochs is None:
            return self.total
        return min(self.total, self.allowed_epochs * self._per_epoch)

    def leased_to(self, worker: WorkerId) -> list[int]:
        return sorted(self._leased.get(worker, ()))

    # -------------------------------------------------------------- moving

    def lease(self, worker: WorkerId, count: int, avoid: Collection[int] = ()) -> list[int]:
        """Reserve up to `count` pending batches, none of them in `avoid`; the lowest first."""
        taken: list[int] = []
        passed_over: list[int] = []
        pending = self._pending()
        while len(taken) < count and (position := next(pending, None)) is not None:
            (passed_over if position in avoid else taken).append(position)
        for position in passed_over:
            heapq.heappush(self._returned, position)
        for position in taken:
            self._under_way[position] = BatchState.LEASED, worker
            heapq.heappush(self._leased[worker], position)
        return taken

    def withdraw(
        self, worker: WorkerId, avoid: Collection[int] = ()
    ) -> tuple[WorkerId, int] | None:
        """Move a leased batch from the worker that has most of them to `worker`.

        For the end of a run, when nothing is pending: a slow worker's reserve
        must not keep the others idle. Takes the batch its holder would reach
        last, and none in `avoid`. Returns (old holder, position), or None when
        nobody holds a suitable one.
        """
        for holder in sorted(self._leased, key=lambda w: -len(self._leased[w])):
            suitable = [p for p in self._leased[holder] if p not in avoid]
            if holder != worker and suitable:
                position = max(suitable)
                return self.move(position, worker), position
        return None

    def move(self, position: int, worker: WorkerId) -> WorkerId:
        """Move one leased batch to `worker`; returns who held it."""
        _, holder = self._expect(position, BatchState.LEASED)
        self._unlease(holder, position)
        self._under_way[position] = BatchState.LEASED, worker
        heapq.heappush(self._leased[worker], position)
        return holder

    def take(self, worker: WorkerId, position: int | None = None) -> int | None:
        """Ticket a batch leased to the worker, the lowest one; None when it has none."""
        if not self._leased.get(worker):
            return None
        if position is None:
            position = self._leased[worker][0]  # of a heap: the lowest
        self._unlease(worker, position)
        self._under_way[position] = BatchState.TICKETED, worker
        return position

    def admit(self, position: int) -> None:
        """The batch's gradient is here, whole: from now on it outlives its worker."""
        _, worker = self._expect(position, BatchState.TICKETED)
        self._under_way[position] = BatchState.ADMITTED, worker

    def settle(self, positions: Collection[int], applied: Ranges) -> None:
        """Record an update that a version was published with.

        `applied` is that version's own set: the ledger and the weights go
        forward by the same object.
        """
        for position in positions:
            self._expect(position, BatchState.ADMITTED)
        follows = len(applied) == len(self.applied) + len(positions)
        if not follows or any(position not in applied for position in positions):
            raise LedgerError(
                f"the version's set of applied batches does not follow on {list(positions)}"
            )
        for position in positions:
            del self._under_way[position]
        self.applied = applied

    def give_back(self, position: int) -> None:
        """A ticketed or admitted batch whose gradient will not be applied is pending again."""
        self._expect(position, BatchState.TICKETED, BatchState.ADMITTED)
        self._return(position)

    def release(self, worker: WorkerId) -> list[int]:
        """What was reserved for the worker is pending again."""
        positions = self._leased.pop(worker, [])
        for position in positions:
            self._return(position)
        return sorted(positions)

    # ------------------------------------------------------------ privately

    def _pending(self) -> Iterator[int]:
        """The pending batches in rising order; what is drawn is no longer pending."""
        end = self._open_end
        while True:
            while self._fresh in self.applied:
                self._fresh += 1
            if self._returned and self._returned[0] < self._fresh:
                yield heapq.heappop(self._returned)
            elif self._fresh < end:
                self._fresh += 1
                yield self._fresh - 1
            else:
                return

    def _return(self, position: int) -> None:
        del self._under_way[position]
        heapq.heappush(self._returned, position)

    def _unlease(self, worker: WorkerId, position: int) -> None:
        self._leased[worker].remove(position)
        heapq.heapify(self._leased[worker])
        self._drop_if_empty(worker)

    def _drop_if_empty(self, worker: WorkerId) -> None:
        if not self._leased[worker]:
            del self._leased[worker]

    def _expect(self, position: int, *states: BatchState) -> tuple[BatchState, WorkerId]:
        found = self._under_way.get(position)
        if found is None or found[0] not in states:
            raise LedgerError(
                f"batch {position} is {found[0].value if found else 'pending or applied'}, not "
                f"{' or '.join(s.value for s in states)}"
            )
        return found
