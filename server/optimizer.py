"""How the weights move by a gradient: an interface, and optax behind it.

The optimizer sees the user's own tree, None leaves included. What it is given
beside the gradient is the push's loss, as optax's `value`; a transformation
that needs more (a line search needs the loss as a function) cannot be served.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from headwater.protos.errors import UsageError
from headwater.server import optimizer_spec
from headwater.worker.tree import PyTree
from headwater.worker.user_code import guard_user_code


class OptimizerError(UsageError):
    """The optimizer cannot be served; says why."""


class AbstractOptimizer(abc.ABC):
    """What moves the weights. Traced by `jax.jit`, so it is pure."""

    text: str
    """For people, and for the run's record."""

    @abc.abstractmethod
    def init(self, params: PyTree) -> PyTree:
        """The state before the first update: a pytree of arrays."""

    @abc.abstractmethod
    def apply(
        self, grads: PyTree, state: PyTree, params: PyTree, loss: jax.Array
    ) -> tuple[PyTree, PyTree]:
        """The parameters and the state after one update.

        Args:
          grads: The tree of `params`: same shapes and dtypes.
          state: From `init` or the update before.
          params: The weights before.
          loss: float32 scalar, the mean over the gradient's batch.
        """


class OptaxOptimizer(AbstractOptimizer):
    """Any optax GradientTransformation that needs at most `value`."""

    def __init__(self, transformation: optax.GradientTransformation, text: str) -> None:
        self.text = text
        self._transformation = optax.with_extra_args_support(transformation)

    def init(self, params: PyTree) -> PyTree:
        # Python numbers in the state become what they are after the first update.
        return jax.tree.map(
            lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x),
            self._transformation.init(params),
        )

    def apply(
        self, grads: PyTree, state: PyTree, params: PyTree, loss: jax.Array
    ) -> tuple[PyTree, PyTree]:
        updates, state = self._transformation.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state


def resolve(optimizer: Any, total_updates: int) -> AbstractOptimizer:
    """The optimizer that a task or --optimizer names.

    Args:
      optimizer: A SPEC, a GradientTransformation, a function of the number of
        updates that returns one, or an AbstractOptimizer.
      total_updates: Of the whole run.

    Raises:
      OptimizerError: It is none of these.
      SpecError: The SPEC cannot be read; points at the character.
      UserCodeError: The function raised.
    """
    if isinstance(optimizer, AbstractOptimizer):
        return optimizer
    if isinstance(optimizer, str):
        return OptaxOptimizer(optimizer_spec.parse(optimizer, total_updates), optimizer)
    if isinstance(optimizer, optax.GradientTransformation):
        return OptaxOptimizer(optimizer, "the task's own optimizer")
    if isinstance(optimizer, Callable):  # type: ignore[arg-type]
        with guard_user_code("Task.optimizer raised"):
            made = optimizer(total_updates)
        if isinstance(made, optax.GradientTransformation):
            return OptaxOptimizer(made, "the task's own optimizer")
        raise OptimizerError(
            f"Task.optimizer({total_updates}) returned {type(made).__name__}, not an optax "
            "GradientTransformation"
        )
    raise OptimizerError(
        f"Task.optimizer is {optimizer!r}; it must be an optax GradientTransformation, a string "
        'such as "adam(1e-3)", or a function of the number of updates that returns one'
    )


def check(optimizer: AbstractOptimizer, params: PyTree) -> None:
    """Try the optimizer on the parameters' shapes, without computing anything.

    Raises:
      OptimizerError: It needs more than the loss, or would change a shape, a
        dtype or the tree of the parameters or of its state.
    """
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    try:
        state = jax.eval_shape(optimizer.init, params)
        after = jax.eval_shape(optimizer.apply, params, state, params, loss)
    except Exception as error:
        raise OptimizerError(
            f"the optimizer, {optimizer.text}, cannot make an update from a gradient and its "
            f"loss alone: {type(error).__name__}: {error}"
        ) from error
    for what, old, new in zip(("parameters", "state"), (params, state), after, strict=True):
        if _shapes(old) != _shapes(new):
            raise OptimizerError(
                f"the optimizer, {optimizer.text}, changes the shapes, dtypes or structure of its "
                f"{what}, which must stay the same from update to update"
            )


def _shapes(tree: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]
