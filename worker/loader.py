"""Loads the data of leased batches ahead of need, in one background thread."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from headwater.worker.data import Batch, Generated, Indexed, batch_rng

Key = tuple[int, int, int]
"""(epoch, shard, number)"""


class Loader:
    """The leased batches and their data."""

    def __init__(self, data: Indexed | Generated, seed: int) -> None:
        self._data = data
        self._seed = seed
        self._thread = ThreadPoolExecutor(1, "headwater-loader")
        self._batches: dict[Key, Future[Batch]] = {}

    def grant(self, key: Key, indices: Sequence[int]) -> None:
        """Begin to load a batch."""
        self._batches[key] = self._thread.submit(self._load, key, list(indices))

    def withdraw(self, key: Key) -> None:
        """The batch was given to somebody else."""
        if future := self._batches.pop(key, None):
            future.cancel()

    def take(self, key: Key) -> Batch:
        """The batch's data, when it has been loaded. What the user's code raises goes through.

        Raises:
          KeyError: The batch is not leased to this worker.
        """
        return self._batches.pop(key).result()

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
