"""Which examples make up which batch: the server's order, the same on any machine.

A batch has a position, counted through the whole run from 0; on the wire it is
(epoch, shard, number). The shuffle sorts the raw 64-bit output of Philox
(Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"), because
NumPy keeps raw streams the same for ever and its own `permutation` not.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from headwater.worker.data import ENDLESS_BATCHES
from headwater.worker.task import batches_per_epoch

ORDER_VERSION = 1
"""Of the rule in this file; part of a run's identity."""


@dataclasses.dataclass(frozen=True)
class BatchId:
    """A batch as it is named on the wire."""

    epoch: int
    shard: int
    number: int

    def __str__(self) -> str:
        return f"batch {self.number} of epoch {self.epoch}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """The batches of a run; without examples there are none.

    Raises:
      TaskError: An epoch would have no batch.
    """

    example_count: int
    batch_size: int
    epochs: int
    seed: int
    shuffle: bool = True
    remainder: str = "keep"

    def __post_init__(self) -> None:
        self.per_epoch  # noqa: B018  (raises where there is no batch)
        # On the instance, so that the cache goes when the order goes. Three: two
        # epochs are open at once, and the next is prepared.
        object.__setattr__(self, "_permutation", functools.lru_cache(3)(self._shuffled))

    @property
    def has_batches(self) -> bool:
        """Whether there is anything to give workers tickets for."""
        return self.example_count > 0

    @functools.cached_property
    def per_epoch(self) -> int:
        """Batches in an epoch; more than anybody comes to where there are none."""
        if not self.has_batches:
            return ENDLESS_BATCHES
        return batches_per_epoch(self.example_count, self.batch_size, self.remainder)

    @property
    def total(self) -> int:
        """Batches in the run."""
        return self.per_epoch * self.epochs

    @property
    def is_endless(self) -> bool:
        """Whether nobody is to wait for the end."""
        return self.per_epoch >= ENDLESS_BATCHES

    def id(self, position: int) -> BatchId:
        epoch, number = divmod(position, self.per_epoch)
        return BatchId(epoch, 0, number)

    def indices(self, position: int) -> npt.NDArray[np.int64]:
        """The examples of a batch, int64 of shape (batch_size,) or shorter at an epoch's end."""
        at = self.id(position)
        start = at.number * self.batch_size
        stop = min(start + self.batch_size, self.example_count)
        if not self.shuffle:
            return np.arange(start, stop)
        return self._permutation(at.epoch)[start:stop]  # type: ignore[attr-defined]

    def size(self, position: int) -> int:
        """Examples in a batch."""
        start = self.id(position).number * self.batch_size
        return min(self.batch_size, self.example_count - start)

    def prepare(self, epoch: int) -> None:
        """Shuffle an epoch ahead of need; takes seconds for 100 million examples."""
        if self.shuffle and epoch < self.epochs:
            self._permutation(epoch)  # type: ignore[attr-defined]

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        raw = np.random.Philox(key=[self.seed, epoch]).random_raw(self.example_count)
        return np.argsort(raw, kind="stable")
