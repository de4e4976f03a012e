"""Loads the data of leased batches ahead of need, in one background thread; or when needed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from headwater.worker.data import Batch, Generated, Indexed, batch_rng

Key = tuple[int, int, int]
"""(epoch, shard, number)"""


class Loader:
    """The leased batches and their data.

    Args:
      data: The task's.
      seed: The run's.
      ahead: Else a batch is loaded by `take`, in the thread that asks for it.
    """

    def __init__(self, data: Indexed | Generated, seed: int, *, ahead: bool = True) -> None:
        self._data = data
        self._seed = seed
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(1, "headwater-loader")  # which begins with the first
        self._batches: dict[Key, tuple[list[int], Future[Batch] | None]] = {}

    def grant(self, key: Key, indices: Sequence[int]) -> None:
        """Begin to load a batch."""
        positions = list(indices)
        future = self._thread.submit(self._load, key, positions) if self._ahead else None
        self._batches[key] = positions, future

    def withdraw(self, key: Key) -> None:
        """The batch was given to somebody else."""
        _, future = self._batches.pop(key, ([], None))
        if future is not None:
            future.cancel()

    def take(self, key: Key) -> Batch:
        """The batch's data, when it has been loaded. What the user's code raises goes through.

        Raises:
          KeyError: The batch is not leased to this worker.
        """
        positions, future = self._batches.pop(key)
        return self._load(key, positions) if future is None else future.result()

    def clear(self) -> None:
        """Drop everything: the stream that leased it has ended."""
        for key in list(self._batches):
            self.withdraw(key)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _load(self, key: Key, indices: list[int]) -> Batch:
        epoch, _, number = key
        rng = batch_rng(self._seed, epoch, number)
        return self._data.batch(np.asarray(indices, np.int64), rng)
