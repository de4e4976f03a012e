"""Which of its local devices a worker computes on, and how a batch lies on them.

A batch is split along its leading axis, the weights are whole on every device, and
the loss is traced once, for the whole batch: it is XLA that splits the computation
(GSPMD, Xu et al. 2021), so that a mean, or BatchNorm's statistics, are over all of the
batch, and one gradient comes out. `pmap` and one loss a device would average means.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from headwater.worker.data import Batch, Generated
from headwater.worker.task import Task
from headwater.worker.tree import PyTree

Devices = Sequence[jax.Device]
"""Of this process. None at all leaves it to JAX: its default one."""


def used_count(task: Task, devices: Devices) -> int:
    """Over how many of them a batch is split that their number divides."""
    # Made inside the compiled function, a batch has no parts that came from elsewhere.
    is_whole = task.backend is not None or isinstance(task.dataset, Generated)
    return 1 if is_whole else max(1, len(devices))


class Placement:
    """Where one shape of batch, and all that is computed with it, lies.

    Args:
      devices: To choose from.
      batch: Of this shape. It is split over the first of them: as many as the largest
        divisor of its size lets. None: nothing is split.
    """

    def __init__(self, devices: Devices, batch: Batch = None) -> None:
        size = example_count(batch)
        self.count = _largest_divisor(size, len(devices))
        """Devices that are used."""
        self._whole: Any = None
        if self.count > 1:
            mesh = Mesh(np.array(devices[: self.count]), ("batch",))
            self._whole = NamedSharding(mesh, PartitionSpec())
            split = NamedSharding(mesh, PartitionSpec("batch"))
            self._batch = jax.tree.map(
                lambda leaf: split if np.shape(leaf)[:1] == (size,) else self._whole, batch
            )
        elif devices and devices[0] != jax.local_devices()[0]:
            self._whole = SingleDeviceSharding(devices[0])
            self._batch = jax.tree.map(lambda leaf: self._whole, batch)
        # Where it is JAX's default device, nothing is said, and nothing is moved by hand.
        self._constants: tuple[list[Any], list[Any]] = [], []

    def compile(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        batch_at: int | None = None,
        donated: tuple[int, ...] = (),
    ) -> Any:
        """`function` for arguments of these shapes, one of them the batch.

        Its arguments have to be where `put` and `put_batch` place them.
        """
        if self._whole is None:
            jitted = jax.jit(function, donate_argnums=donated)
        else:
            places = [self._whole] * len(arguments)
            if batch_at is not None:
                places[batch_at] = self._batch
            jitted = jax.jit(
                function,
                in_shardings=tuple(places),
                out_shardings=self._whole,
                donate_argnums=donated,
            )
        return jitted.lower(*arguments).compile()

    def put(self, arrays: PyTree) -> PyTree:
        """Whole on every device. Arrays in the host's memory may be used where they are."""
        return arrays if self._whole is None else jax.device_put(arrays, self._whole)

    def put_batch(self, batch: Batch) -> Batch:
        return batch if self._whole is None else jax.device_put(batch, self._batch)

    def put_constants(self, constants: list[Any]) -> list[Any]:
        """As `put`, but once for all calls with the same arrays."""
        if self._whole is None or not constants:
            return constants
        source, placed = self._constants
        if len(source) != len(constants) or any(map(operator.is_not, source, constants)):
            placed = self.put(constants)
            self._constants = constants, placed
        return placed

    def first(self, arrays: PyTree) -> PyTree:
        """What is whole on every device, as it is on the first alone."""
        if self.count == 1:
            return arrays
        return jax.tree.map(lambda array: array.addressable_data(0), arrays)


def example_count(batch: Batch) -> int:
    """A batch's size: the leading axis that most of its leaves share. 0 where none has one."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    counts = Counter(shape[0] for shape in shapes if shape)
    return max(counts, key=lambda size: (counts[size], size), default=0)


def _largest_divisor(size: int, most: int) -> int:
    return max((n for n in range(1, most + 1) if size and size % n == 0), default=1)
