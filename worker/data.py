"""Training data: anything that gives the batch at a list of positions.

The server owns the order; a worker is told positions and asks its own copy of
the data for them. So the data must be the same, in the same order, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


class ItemData:
    """Examples that are taken one by one, and collated. Made by `from_items`."""

    def __init__(self, source: Any, collate: Callable[[Sequence[Any]], Batch]) -> None:
        for method in ("__len__", "__getitem__"):
            if not hasattr(source, method):
                raise ValueError(
                    f"from_items: {type(source).__name__} has no {method}; it takes what has a "
                    "length and gives an item for a whole number, as a list does"
                )
        self.source = source
        self._collate = collate

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: npt.NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """See `Indexed.batch`; `rng` is not used."""
        positions = indices.tolist()
        if many := getattr(self.source, "__getitems__", None):
            return self._collate(many(positions))  # as Hugging Face's and PyTorch's have it
        return self._collate([self.source[position] for position in positions])


def stack(items: Sequence[Any]) -> Batch:
    """A batch from its items: dicts by key, tuples by place, all else as arrays, stacked.

    Lists are arrays: `[1, 2, 3]` is one example of three numbers. PyTorch's tensors
    and images of PIL become arrays as NumPy sees them.

    Raises:
      ValueError: The items are not alike, or something in them is no number.
    """
    return _stack(items, "the item")


def _stack(items: Sequence[Any], what: str) -> Batch:
    first = items[0]
    if isinstance(first, Mapping):
        if any(not isinstance(item, Mapping) or item.keys() != first.keys() for item in items):
            raise ValueError(f"from_items: the keys of {what} differ from item to item")
        return {key: _stack([item[key] for item in items], f"{what}'s {key!r}") for key in first}
    if isinstance(first, tuple):
        if any(not isinstance(item, tuple) or len(item) != len(first) for item in items):
            raise ValueError(f"from_items: the tuples of {what} differ from item to item")
        columns = [
            _stack([item[place] for item in items], f"{what}'s place {place}")
            for place in range(len(first))
        ]
        return type(first)(*columns) if hasattr(first, "_fields") else tuple(columns)
    arrays = [np.asarray(item) for item in items]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(
            f"from_items: {what} has shape {list(shapes[0])} in one item and {list(shapes[1])} in "
            "another; pad or crop them to one shape, or give a `collate` that does"
        )
    if arrays[0].dtype.kind not in "biufcV":
        raise ValueError(
            f"from_items: {what} is {type(first).__name__}, not numbers; leave it out, or give a "
            "`collate` that makes numbers of it"
        )
    return np.stack(arrays)


def from_items(source: Any, collate: Callable[[Sequence[Any]], Batch] = stack) -> ItemData:
    """Data from anything with a length that gives an item for a whole number.

    Such as a list, a map-style dataset of PyTorch, Hugging Face or grain. Called in one
    background thread.

    Args:
      source: Has `__len__` and `__getitem__`, or `__getitems__` for many at once.
      collate: (items) -> batch: a pytree of arrays whose leading axis is the batch.

    Raises:
      ValueError: It has no such methods.
    """
    return ItemData(source, collate)


class ExamplesElsewhere:
    """So many examples, which only the workers have: programs of their own, without a task here.

    Args:
      count: 0 where there are no batches at all.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: npt.NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """There is none: whoever computes with this task has another than was meant.

        Raises:
          LookupError: Always.
        """
        raise LookupError("the examples of a run without a task are its workers' own")


ENDLESS_BATCHES = 2**31
"""Of an epoch that has no end: more than anybody computes, and countable in 32 bits."""


class Generated:
    """Batches that are made, not read: for reinforcement learning and simulators.

    `make(params, key)` gives a batch: a pytree of arrays, whatever their shapes. It is
    traced by `jax.jit` into the function that computes the gradient, which does not flow
    through it; a simulator in plain Python is called with `jax.pure_callback`. The key is
    named by the run's seed, the epoch and the batch's number, so that a batch counts
    exactly once as any other does.

    Args:
      make: (params, key) -> batch, from the weights that the gradient is computed at;
        with `Task.has_state`, (params, state, key) -> batch.
      batches_per_epoch: How many make an epoch; None has one epoch go on until the run
        is stopped.

    Raises:
      ValueError: `make` is no function, or the count is not a whole number from 1 on.
    """

    def __init__(self, make: Callable[..., Batch], batches_per_epoch: int | None = None) -> None:
        if not callable(make):
            raise ValueError(f"Generated takes a function (params, key) -> batch, not {make!r}")
        count = ENDLESS_BATCHES if batches_per_epoch is None else batches_per_epoch
        if type(count) is not int or not 1 <= count <= ENDLESS_BATCHES:
            raise ValueError(
                f"Generated: batches_per_epoch is a whole number from 1 to {ENDLESS_BATCHES}, or "
                f"None, not {batches_per_epoch!r}"
            )
        self.make = make
        self.batches_per_epoch = count

    @property
    def is_endless(self) -> bool:
        return self.batches_per_epoch == ENDLESS_BATCHES

    def batch(self, indices: npt.NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """Nothing: the batch is made where its gradient is computed."""
        return None


def batch_rng(seed: int, epoch: int, number: int) -> np.random.Generator:
    """The generator that `Indexed.batch` gets for one batch."""
    return np.random.default_rng([seed, epoch, number])
