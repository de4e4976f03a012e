"""The figures that status shows: rates, staleness, smoothed loss. Time comes in as an argument."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping

from headwater.protos import parameter_server_pb2 as pb

WINDOW_S = 5.0
"""Seconds over which rates are taken: steady to the eye, and quick to show a stall."""

SMOOTHING = 0.98
"""Of the running means of loss and metrics: about the last 50 pushes."""

MAX_NAMES = 256
"""That running means are kept of; a push brings 64 at most, and the loss."""


class Rate:
    """Amounts a second over the last WINDOW_S seconds."""

    def __init__(self) -> None:
        # Sums by tenths of a second: bounded memory at any rate of events.
        self._slots: deque[tuple[int, float]] = deque()
        self._first: float | None = None

    def add(self, amount: float, now: float) -> None:
        slot = int(now * 10)
        if self._first is None:
            self._first = now
        if self._slots and self._slots[-1][0] == slot:
            self._slots[-1] = slot, self._slots[-1][1] + amount
        else:
            self._slots.append((slot, amount))
        self._forget(now)

    def per_second(self, now: float) -> float:
        """0 before the first amount."""
        self._forget(now)
        if self._first is None or not self._slots:
            return 0.0
        return sum(amount for _, amount in self._slots) / min(WINDOW_S, max(now - self._first, 0.1))

    def _forget(self, now: float) -> None:
        oldest = int((now - WINDOW_S) * 10)
        while self._slots and self._slots[0][0] <= oldest:
            self._slots.popleft()


class Times:
    """Where a worker's time went, over its last pushes."""

    def __init__(self) -> None:
        self._pushes: deque[tuple[float, float, float, float]] = deque(maxlen=50)
        self._asked_time: float | None = None
        self._wait_s = 0.0

    def asked(self, now: float) -> None:
        """The worker is ready for a ticket."""
        if self._asked_time is None:
            self._asked_time = now

    def granted(self, now: float) -> None:
        self._wait_s = 0.0 if self._asked_time is None else now - self._asked_time
        self._asked_time = None

    def pushed(self, load_s: float, compute_s: float, step_s: float) -> None:
        """A gradient came, `step_s` seconds after its ticket was granted."""
        wire_s = max(0.0, step_s - load_s - compute_s)
        self._pushes.append((self._wait_s, load_s, compute_s, wire_s))

    @property
    def median_compute_s(self) -> float:
        """0 before the first."""
        return statistics.median(push[2] for push in self._pushes) if self._pushes else 0.0

    def message(self) -> pb.Times:
        return mean_times([self])

    @property
    def pushes(self) -> list[tuple[float, float, float, float]]:
        return list(self._pushes)


def mean_times(of: Iterable[Times]) -> pb.Times:
    """The means over all their pushes; zeros before the first."""
    pushes = [push for times in of for push in times.pushes]
    if not pushes:
        return pb.Times()
    wait_s, load_s, compute_s, wire_s = (
        statistics.fmean(each) for each in zip(*pushes, strict=True)
    )
    return pb.Times(wait_s=wait_s, load_s=load_s, compute_s=compute_s, wire_s=wire_s)


class Histogram:
    """Exact counts of small whole numbers, such as staleness."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, value: int) -> None:
        self._counts[value] += 1

    @property
    def mean(self) -> float:
        total = self._counts.total()
        return sum(v * n for v, n in self._counts.items()) / total if total else 0.0

    @property
    def max(self) -> int:
        return max(self._counts, default=0)

    def message(self) -> pb.Staleness:
        return pb.Staleness(
            mean=self.mean,
            p50=self.percentile(50),
            p99=self.percentile(99),
            max=self.max,
            histogram=self._counts,
        )

    def percentile(self, percent: float) -> int:
        """The smallest value that at least `percent` of the values do not exceed."""
        wanted = self._counts.total() * percent / 100
        seen = 0
        for value in sorted(self._counts):
            seen += self._counts[value]
            if seen >= wanted:
                return value
        return 0


class RunningMeans:
    """Exponentially smoothed values by name, unbiased from the first one on.

    Of the MAX_NAMES that came first: names are the workers' to choose.

    Source: the bias correction of Adam, Kingma and Ba 2015, section 3.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}  # name: (weighted sum, weight)

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                continue  # it would make the mean NaN for ever
            if name not in self._sums and len(self._sums) >= MAX_NAMES:
                continue
            total, weight = self._sums.get(name, (0.0, 0.0))
            rest = 1 - SMOOTHING
            self._sums[name] = SMOOTHING * total + rest * value, SMOOTHING * weight + rest

    def values(self) -> dict[str, float]:
        return {name: total / weight for name, (total, weight) in self._sums.items()}


class RunFigures:
    """What is counted and averaged over one life of a server."""

    def __init__(self) -> None:
        self.means = RunningMeans()
        """Of loss and metrics, over the last pushes."""
        self.staleness = Histogram()
        self.updates = Rate()
        self.examples = Rate()
        self.first_time: float | None = None
        """When the first update of this life was counted; `last_time` likewise the last."""
        self.last_time = 0.0
        self.lease_lost_count = 0
        self.stale_count = 0
        self.duplicate_count = 0
        self.malformed_count = 0
        self.nonfinite_count = 0
        """Of pushes of sessions; those of batches are counted with them."""
        self.session_updates = 0
        self.bytes_in = 0
        """Messages and tensors, without gRPC's own framing; so is `bytes_out`."""
        self.bytes_out = 0

    @property
    def training_s(self) -> float:
        """Seconds from the first update to the last."""
        return 0.0 if self.first_time is None else self.last_time - self.first_time

    def count_update(
        self, values: Mapping[str, float], *, examples: int, staleness: int, now: float
    ) -> None:
        """One gradient of `examples` examples moved the weights."""
        self.first_time = now if self.first_time is None else self.first_time
        self.last_time = now
        self.means.add(values)
        self.staleness.add(staleness)
        self.updates.add(1, now)
        self.examples.add(examples, now)
