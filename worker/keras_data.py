"""What Keras's `fit` was given to train on, as data that workers can index."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from headwater.protos.errors import UsageError
from headwater.worker.data import Batch


def training_data(given: dict[str, Any]) -> KerasData | KerasBatches:
    """The examples of a `fit` with these arguments; those for validation are settled in them.

    Raises:
      UsageError: They cannot be indexed, or asked for in a way that has no place here.
    """
    if given["steps_per_epoch"] is not None:
        raise UsageError(
            "fit: steps_per_epoch has no place: an epoch is all batches, each exactly once; pass "
            "fewer examples, or a keras.utils.PyDataset of so many batches"
        )
    if isinstance(given["x"], keras.utils.PyDataset):
        if given["class_weight"] is not None:
            raise UsageError("fit: class_weight goes with arrays; weigh the batches of a PyDataset")
        return KerasBatches(given["x"])
    if given["shuffle"] not in (True, False):
        raise UsageError(f"fit: shuffle is True or False, not {given['shuffle']!r}")
    data = KerasData(given["x"], given["y"], given["sample_weight"])
    if given["validation_split"] and given["validation_data"] is None:
        data = _split(data, given)
    if given["class_weight"] is not None:
        x, y, weight = data.arrays
        if weight is not None:
            raise UsageError("fit takes class_weight or sample_weight, not both")
        if keras.tree.is_nested(y):
            raise UsageError("fit: class_weight is for a model with one output")
        return KerasData(x, y, class_weights(y, given["class_weight"]))
    return data


def _split(data: KerasData, given: dict[str, Any]) -> KerasData:
    """The first examples; the last ones are for validation."""
    share = given["validation_split"]
    count = math.floor(len(data) * (1.0 - share))
    if not 0 < count < len(data):
        raise UsageError(f"fit: validation_split={share} leaves nothing of {len(data)} examples")

    def part(where: slice) -> tuple[Any, ...]:
        def taken(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[where]

        return keras.tree.map_structure(taken, data.arrays)

    first = part(slice(count))
    given.update(zip(("x", "y", "sample_weight"), first, strict=True))
    given.update(validation_data=part(slice(count, None)), validation_split=0.0)
    return KerasData(*first)


class KerasData:
    """What `fit` is given, example by example: `(x, y, sample_weight)`, each a tree or None.

    Raises:
      UsageError: It cannot be indexed, or its arrays differ in length.
    """

    def __init__(self, x: Any, y: Any = None, sample_weight: Any = None) -> None:
        self.arrays = tuple(
            keras.tree.map_structure(lambda leaf, name=name: _array(leaf, name), tree)
            for name, tree in (("x", x), ("y", y), ("sample_weight", sample_weight))
        )
        lengths = {len(leaf) for leaf in keras.tree.flatten(self.arrays) if leaf is not None}
        if len(lengths) != 1:
            raise UsageError(f"fit: x, y and sample_weight differ in length: {sorted(lengths)}")
        (self._length,) = lengths

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: npt.NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """See `Indexed.batch`; floats are of Keras's `floatx`."""
        floatx = keras.config.floatx()

        def taken(array: np.ndarray | None) -> Any:
            if array is None:
                return None
            found = array[indices]
            is_float = found.dtype.kind == "f" and found.dtype != floatx
            return found.astype(floatx) if is_float else found

        return keras.tree.map_structure(taken, self.arrays)


class KerasBatches:
    """A `keras.utils.PyDataset`, whose items are batches: each is one of the run's batches."""

    def __init__(self, source: keras.utils.PyDataset) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: npt.NDArray[np.int64], rng: np.random.Generator) -> Batch:
        """See `Indexed.batch`; there is one index."""
        (at,) = indices
        item = self._source[int(at)]
        given = item if isinstance(item, tuple) else (item,)
        whole = KerasData(*given)
        return whole.batch(np.arange(len(whole)), rng)


def _array(leaf: Any, name: str) -> np.ndarray | None:
    if leaf is None:
        return None
    if not hasattr(leaf, "shape") or not hasattr(leaf, "__array__"):
        raise UsageError(
            f"fit: {name} has a {type(leaf).__name__}, which workers cannot index; give arrays, "
            "or a keras.utils.PyDataset"
        )
    array = np.asarray(leaf)
    if array.ndim == 0 or (array.dtype.kind not in "biufc" and array.dtype.name != "bfloat16"):
        raise UsageError(
            f"fit: {name} is {array.dtype.name}{list(array.shape)}, no array of numbers"
        )
    return array


def class_weights(y: Any, weights: Mapping[int, float]) -> np.ndarray:
    """`class_weight` as a weight for each example, float32 of shape (examples,).

    Args:
      y: Classes, or one-hot.
    """
    classes = np.asarray(y)
    if classes.ndim > 1:
        is_column = classes.shape[-1] == 1
        classes = classes.squeeze(-1) if is_column else classes.argmax(-1)
    return np.array([weights.get(int(c), 1.0) for c in np.round(classes)], keras.config.floatx())
