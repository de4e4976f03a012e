"""From weights and batches to what a worker pushes; here, one batch's loss and gradient."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater.worker.data import Batch, Generated
from headwater.worker.devices import Devices, Placement
from headwater.worker.task import Task, TaskError
from headwater.worker.tree import ModelTree, PyTree, described

Step = tuple[Batch, int, int]
"""A batch, its epoch, and its number in the epoch."""


Leaves = list[Any]
"""Arrays in layout order."""


@dataclasses.dataclass(frozen=True)
class Gradient:
    """What a ticket's batches gave."""

    loss: float
    metrics: Mapping[str, float]
    leaves: Sequence[Any]
    """Arrays, of JAX or NumPy: the gradient and then the new state, in layout order; each
    of its tensor's shape and dtype."""
    tallies: Sequence[float] = ()
    """Sums over the examples, where the loss gives such; see TALLIES."""


TALLIES = ""
"""Among a loss's metrics, the name of what is none but a vector of sums over the batch's
examples, float; for a task whose server runs in a program that adds them up."""


class AbstractGradientFunction(abc.ABC):
    """What a worker computes for a ticket, compiled once for each shape of batch.

    Args:
      task: Its loss is traced when a shape is compiled.
      seed: The run's.
      devices: Batches are split over them, see `Placement`.
    """

    def __init__(self, task: Task, seed: int, devices: Devices = ()) -> None:
        self._task = task
        self._seed = seed
        self._devices = devices
        self._compiled: dict[Any, tuple[Placement, Any]] = {}

    def compile(self, batch: Batch) -> float:
        """Compile for batches of this one's shapes; seconds it took, 0 when it was there.

        Raises:
          TaskError: The loss is not a scalar, or its metrics are not a dict of
            scalars. What the user's own code raises goes through.
        """
        shapes = described(batch)
        if shapes in self._compiled:
            return 0.0
        began = time.perf_counter()
        placement = Placement(self._devices, batch)
        self._compiled[shapes] = placement, self._compile(placement, batch)
        return time.perf_counter() - began

    def device_count(self, batch: Batch) -> int:
        """Over how many devices a batch of this one's shapes is split."""
        return self._compiled_for(batch)[0].count

    @abc.abstractmethod
    def __call__(
        self,
        weights: Sequence[Any],
        steps: Sequence[Step],
        on_step: Callable[[], None] = lambda: None,
    ) -> Gradient:
        """What is to be pushed for these batches.

        Args:
          weights: All tensors in layout order. May be written again when this returns.
          steps: The ticket's batches, in its order.
          on_step: Called when one of them has been computed.
        """

    @abc.abstractmethod
    def _compile(self, placement: Placement, batch: Batch) -> Any:
        """What `_compiled_for` gives for batches of this one's shapes."""

    def _compiled_for(self, batch: Batch) -> tuple[Placement, Any]:
        shapes = described(batch)
        if shapes not in self._compiled:
            self.compile(batch)
        return self._compiled[shapes]

    def _loss_and_gradient(
        self,
        trained: Leaves,
        state: Leaves,
        constants: Leaves,
        batch: Batch,
        epoch: jax.Array,
        number: jax.Array,
    ) -> tuple[jax.Array, dict[str, Any], Leaves, Leaves]:
        """(loss, metrics, gradient, new state) of one batch, to be traced.

        The loss's key is `fold_in(fold_in(key(seed), epoch), number)`, made inside
        the compiled function, so that a batch gives the same gradient anywhere.
        """
        task = self._task
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._seed), epoch), number)

        def given(trained: Leaves) -> tuple[PyTree, ...]:
            leaves = [*trained, *state, *constants]
            params = task.tree.params(leaves)
            return (params, task.tree.state(leaves)) if task.has_state else (params,)

        data = task.dataset
        if isinstance(data, Generated):
            batch = _made(data, given(trained), key)

        def loss(trained: Leaves) -> Any:
            value, metrics, after = _split(task.loss(*given(trained), batch, key), task.has_state)
            return value, (metrics, _new_state(task.tree, after) if task.has_state else [])

        (value, (metrics, after)), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        # JAX gives the conjugate of the direction of steepest ascent for complex
        # parameters; optax descends along what it is given.
        return value, metrics, list(map(_conjugate, grads)), after


class GradientFunction(AbstractGradientFunction):
    """A task's loss and gradient. Takes exactly one batch at a time."""

    def __call__(
        self,
        weights: Sequence[Any],
        steps: Sequence[Step],
        on_step: Callable[[], None] = lambda: None,
    ) -> Gradient:
        ((batch, epoch, number),) = steps
        placement, compiled = self._compiled_for(batch)
        trained, before, constants = self._task.tree.split(weights)
        trained, before, key = placement.put(
            (trained, before, (np.uint32(epoch), np.uint32(number)))
        )
        loss, metrics, grads, state = compiled(
            trained, before, placement.put_constants(constants), placement.put_batch(batch), *key
        )
        leaves = placement.first(jax.block_until_ready([*grads, *state]))
        on_step()
        tallies = np.asarray(metrics.pop(TALLIES, ()), np.float64).tolist()
        named = {name: float(metric) for name, metric in metrics.items()}
        return Gradient(float(loss), named, leaves, tallies)

    def _compile(self, placement: Placement, batch: Batch) -> Any:
        number = np.zeros((), np.uint32)
        tree = self._task.tree
        shapes = tree.split(tree.shapes)
        return placement.compile(
            self._loss_and_gradient, *shapes, batch, number, number, batch_at=3
        )


MADE = 2**32 - 1
"""Folded into a batch's key for `Generated.make`: no key that the loss gets by splitting
its own, which are those of small numbers."""


def _made(data: Generated, given: tuple[PyTree, ...], key: jax.Array) -> Batch:
    """A batch that is a constant to the gradient."""
    still = jax.tree.map(jax.lax.stop_gradient, given)
    return jax.tree.map(jax.lax.stop_gradient, data.make(*still, jax.random.fold_in(key, MADE)))


def _new_state(tree: ModelTree, state: PyTree) -> Leaves:
    """The leaves of what the loss made of the state.

    Raises:
      TaskError: It is not of the shapes, dtypes and structure that `init` gave.
    """
    layout = tree.layout
    try:
        leaves = [jnp.asarray(leaf) for leaf in tree.state_leaves(state)]
    except (TypeError, ValueError) as error:
        raise TaskError(f"Task.loss returned a state of another structure: {error}") from None
    for spec, leaf in zip(tree.split(layout.tensors)[1], leaves, strict=True):
        if (leaf.shape, leaf.dtype) != (spec.shape, spec.dtype):
            raise TaskError(
                f"Task.loss returned {_describe(leaf)} for the state {spec.name}, which is "
                f"{spec.dtype.name}{list(spec.shape)}; it must stay what it was"
            )
    return leaves


def _split(value: Any, has_state: bool = False) -> tuple[jax.Array, dict[str, Any], PyTree]:
    """What a loss may return, checked, as (loss, metrics, state)."""
    if has_state:
        if not isinstance(value, tuple) or len(value) != 3:
            raise TaskError(
                f"Task.loss returned {_described(value)}; with has_state it returns "
                "(loss, metrics, state)"
            )
        loss, metrics, state = value
    else:
        loss, metrics = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
        state = ()
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
        if name == TALLIES:
            continue
        if not isinstance(name, str) or not _is_real_scalar(metric):
            raise TaskError(f"metric {name!r} is {_describe(metric)}, not a scalar")
    return jnp.asarray(loss), dict(metrics), state


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


def _described(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, tuple) else _describe(value)


def _conjugate(gradient: jax.Array) -> jax.Array:
    return gradient.conj() if jnp.iscomplexobj(gradient) else gradient
