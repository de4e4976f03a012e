"""Loss and gradient of one batch, jitted, as NumPy arrays in layout order."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater.worker.data import Batch
from headwater.worker.task import Task, TaskError
from headwater.worker.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Gradient:
    """What one batch gave."""

    loss: float
    metrics: Mapping[str, float]
    leaves: Sequence[np.ndarray]
    """In layout order; each of its parameter's shape and dtype."""


class GradientFunction:
    """A task's loss and gradient, compiled once for each shape of batch.

    The loss's key is `fold_in(fold_in(key(seed), epoch), number)`, made inside
    the compiled function, so that a batch gives the same gradient anywhere.

    Args:
      task: Its loss is traced when a shape is compiled.
      seed: The run's.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self._task = task
        self._seed = seed
        self._jitted = jax.jit(self._loss_and_gradient)
        self._compiled: dict[Any, Any] = {}

    def compile(self, batch: Batch) -> float:
        """Compile for batches of this one's shapes; seconds it took, 0 when it was there.

        Raises:
          TaskError: The loss is not a scalar, or its metrics are not a dict of
            scalars. What the user's own code raises goes through.
        """
        shapes = _shapes(batch)
        if shapes in self._compiled:
            return 0.0
        began = time.perf_counter()
        params = self._task.tree.restore(
            [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in self._task.tree.layout.tensors]
        )
        number = np.zeros((), np.uint32)
        self._compiled[shapes] = self._jitted.lower(params, batch, number, number).compile()
        return time.perf_counter() - began

    def __call__(
        self, weights: Sequence[np.ndarray], batch: Batch, epoch: int, number: int
    ) -> Gradient:
        """The gradient of one batch.

        Args:
          weights: In layout order. May be written again when this returns.
          batch: A pytree of arrays whose leading axis is the batch.
          epoch: Of the batch.
          number: Of the batch in its epoch.
        """
        shapes = _shapes(batch)
        if shapes not in self._compiled:
            self.compile(batch)
        (loss, metrics), grads = self._compiled[shapes](
            self._task.tree.restore(weights), batch, np.uint32(epoch), np.uint32(number)
        )
        leaves = [np.asarray(leaf) for leaf in self._task.tree.leaves(grads)]
        return Gradient(float(loss), {k: float(v) for k, v in metrics.items()}, leaves)

    def _loss_and_gradient(
        self, params: PyTree, batch: Batch, epoch: jax.Array, number: jax.Array
    ) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._seed), epoch), number)

        def loss(params: PyTree) -> Any:
            return _split(self._task.loss(params, batch, key))

        values, grads = jax.value_and_grad(loss, has_aux=True)(params)
        # JAX gives the conjugate of the direction of steepest ascent for complex
        # parameters; optax descends along what it is given.
        return values, jax.tree.map(_conjugate, grads)


def _split(value: Any) -> tuple[jax.Array, dict[str, Any]]:
    """What a loss may return, checked, as (loss, metrics)."""
    loss, metrics = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
    if _describe(loss) not in _REAL_SCALARS:
        raise TaskError(
            f"Task.loss returned {_describe(loss)}; it must be one real number, the mean over the "
            "batch's examples, alone or as (loss, metrics)"
        )
    if not isinstance(metrics, Mapping):
        raise TaskError(
            f"Task.loss returned {type(metrics).__name__} beside the loss; it must be a dict of "
            'scalars such as {"accuracy": accuracy}'
        )
    for name, metric in metrics.items():
        if not isinstance(name, str) or not _is_real_scalar(metric):
            raise TaskError(f"metric {name!r} is {_describe(metric)}, not a scalar")
    return jnp.asarray(loss), dict(metrics)


_REAL_SCALARS = {"float16[]", "bfloat16[]", "float32[]", "float64[]"}


def _is_real_scalar(value: Any) -> bool:
    if hasattr(value, "dtype"):
        kinds = (jnp.floating, jnp.integer, jnp.bool_)
        return value.shape == () and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    return isinstance(value, (bool, int, float))


def _describe(value: Any) -> str:
    """An array or a number as `float32[3]`; anything else as its type's name."""
    if isinstance(value, (bool, int, float, complex)) or hasattr(value, "dtype"):
        return f"{jnp.result_type(value).name}{list(jnp.shape(value))}"
    return type(value).__name__


def _conjugate(gradient: jax.Array) -> jax.Array:
    return gradient.conj() if jnp.iscomplexobj(gradient) else gradient


def _shapes(batch: Batch) -> Any:
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, tuple((np.shape(x), np.result_type(x)) for x in leaves)
