"""Training data: anything that gives the batch at a list of positions.

The server owns the order; a worker is told positions and asks its own copy of
the data for them. So the data must be the same, in the same order, everywhere.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Batch = Any
"""A pytree of arrays whose leading axis is the batch."""


@runtime_checkable
class Indexed(Protocol):
    """What a task's data must offer."""

    def __len__(self) -> int:
        """Examples in one epoch."""

    def batch(self, indices: npt.NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """The examples at `indices`, int64 of shape (batch,), in that order.

        Called ahead of need from one background thread. `rng` is seeded by the
        run's seed, the epoch and the batch's number, so that random
        augmentation is the same whichever worker loads the batch.
        """


class ArrayData:
    """Arrays in memory that share their leading axis: `ArrayData(x=images, y=labels)`.

    A batch is a dict of the same keys, each array taken at the batch's indices.

    Raises:
      ValueError: No array was given, one has no leading axis, or their leading
        axes differ.
    """

    def __init__(self, **arrays: npt.ArrayLike) -> None:
        if not arrays:
            raise ValueError("ArrayData needs at least one array, such as ArrayData(x=images)")
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        lengths = {}
        for name, array in self.arrays.items():
            if array.ndim == 0:
                raise ValueError(f"ArrayData: {name} is a scalar; it needs a leading axis")
            lengths[name] = len(array)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"ArrayData: the leading axes differ: {lengths}")
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def batch(
        self, indices: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """See `Indexed.batch`; `rng` is not used."""
        return {name: array[indices] for name, array in self.arrays.items()}


def batch_rng(seed: int, epoch: int, number: int) -> np.random.Generator:
    """The generator that `Indexed.batch` gets for one batch."""
    return np.random.default_rng([seed, epoch, number])
