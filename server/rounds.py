"""What one ticket is for: a batch, or with local steps a round of consecutive batches.

The ledger counts rounds; the wire names batches; the order (order.py) says which
examples are in them. A round never reaches across an epoch, whose last one may be
short.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

from headwater.server.dial import Dial
from headwater.server.order import BatchOrder
from headwater.server.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The rounds of a run, counted from 0.

    Args:
      order: Of the batches.
      steps: Batches of a round; 1 is training without local steps.
    """

    order: BatchOrder
    steps: int = 1

    @property
    def per_epoch(self) -> int:
        """Rounds in an epoch."""
        return math.ceil(self.order.per_epoch / self.steps)

    @property
    def total(self) -> int:
        """Rounds in the run."""
        return self.per_epoch * self.order.epochs

    def updates(self, dial: Dial) -> int | None:
        """Updates of the whole run, if the dial stays where it is; None if it has no end."""
        if self.order.is_endless:
            return None
        return math.ceil(self.per_epoch / (dial.group or 1)) * self.order.epochs

    def batches(self, position: int) -> range:
        """The batches of a round, as the order counts them."""
        epoch, number = divmod(position, self.per_epoch)
        start = epoch * self.order.per_epoch
        first = start + number * self.steps
        return range(first, min(first + self.steps, start + self.order.per_epoch))

    def in_batches(self, positions: Ranges) -> Ranges:
        """The batches that some rounds consist of."""
        return self._mapped(positions, self._first_batch)

    def of_batches(self, batches: Ranges) -> Ranges:
        """The opposite of `in_batches`."""
        return self._mapped(batches, self._round_from)

    def batch_count(self, positions: Iterable[int]) -> int:
        """How many batches some rounds have."""
        return sum(len(self.batches(position)) for position in positions)

    def size(self, position: int) -> int:
        """Examples in a round."""
        return sum(self.order.size(batch) for batch in self.batches(position))

    def name(self, position: int) -> str:
        """For people: `batch 3 of epoch 0`, `batches 8 to 15 of epoch 0`."""
        batches = self.batches(position)
        first = self.order.id(batches[0])
        if self.steps == 1:
            return str(first)
        last = self.order.id(batches[-1])
        return f"batches {first.number} to {last.number} of epoch {first.epoch}"

    def _mapped(self, ranges: Ranges, bound: Callable[[int], int]) -> Ranges:
        if self.steps == 1:
            return ranges
        return Ranges(tuple((bound(start), bound(end)) for start, end in ranges.pairs))

    def _first_batch(self, position: int) -> int:
        """Of a round, or of the one that would follow the last."""
        epoch, number = divmod(position, self.per_epoch)
        return epoch * self.order.per_epoch + number * self.steps

    def _round_from(self, batch: int) -> int:
        """The round that begins with a batch, or with the next one that a round begins with."""
        epoch, number = divmod(batch, self.order.per_epoch)
        return epoch * self.per_epoch + math.ceil(number / self.steps)
