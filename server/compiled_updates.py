"""The update as XLA has it: the optimizer, and whether what comes out of it is finite.

Kept for settings that may be asked for again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater.server.optimizer import AbstractOptimizer
from headwater.server.settings import Settings
from headwater.worker.tree import ModelTree, PyTree

KEPT_UPDATES = 8
"""Kept for numbers that may be set again, beside those that are needed."""


class CompiledUpdates:
    """One optimizer's updates of a model like this. May be used by several threads."""

    def __init__(self, tree: ModelTree, optimizer: AbstractOptimizer) -> None:
        self._optimizer = optimizer
        self._params = tree.trained_shapes
        _, self._model_state, _ = tree.split(tree.shapes)
        self._compiled: dict[Any, Any] = {}

    def get(self, settings: Settings) -> tuple[Any, dict[str, float], bool]:
        """The update, the numbers that it takes, and whether it takes a scale.

        Called with gradient, optimizer state, parameters, loss, the model's next state and
        `extras`, it gives parameters, optimizer state, a copy of the model's state, and
        whether all came out finite.

        Raises:
          OptimizerError: A number cannot be set to that.
        """
        key, scale = self._key(settings), settings.staleness.scale
        live = self._optimizer.live_values(settings.numbers)
        compiled = self._compiled.get(key)  # once: another thread may forget it meanwhile
        if compiled is None:
            fixed = self._optimizer.compiled_in(settings.numbers)
            optimizer = self._optimizer.with_numbers(fixed, self._params)
            state = jax.eval_shape(self._optimizer.init, self._params)
            loss = np.zeros((), np.float32)
            more = extras(live, 1.0 if scale else None)
            arguments = [self._params, state, self._params, loss, self._model_state, *more]
            compiled = jax.jit(_checked(optimizer)).lower(*arguments).compile()
            self._compiled[key] = compiled
        return compiled, live, scale

    def prepare(self, stages: Iterable[Settings]) -> bool:
        """Compile what is missing of what these settings need; whether anything was.

        Raises:
          OptimizerError: A number cannot be set to that.
        """
        missing = [stage for stage in stages if self._key(stage) not in self._compiled]
        for stage in missing:
            self.get(stage)
        return bool(missing)

    def forget_others(self, stages: Iterable[Settings]) -> None:
        """Keep the updates that these need, and the newest others."""
        needed = {self._key(stage) for stage in stages}
        others = [key for key in list(self._compiled) if key not in needed]
        for key in others[:-KEPT_UPDATES]:
            del self._compiled[key]

    def _key(self, settings: Settings) -> Any:
        fixed = self._optimizer.compiled_in(settings.numbers)
        live = self._optimizer.live_values(settings.numbers)
        return tuple(sorted(fixed.items())), tuple(sorted(live)), settings.staleness.scale


def extras(live: dict[str, float], scale: float | None) -> list[Any]:
    """What `AbstractOptimizer.apply` gets beside the usual, where there is any."""
    if scale is not None:
        return [live, np.float32(scale)]
    return [live] if live else []


def _checked(optimizer: AbstractOptimizer) -> Callable[..., Any]:
    """The update, and whether its loss, its gradient, the weights after it and the model's
    state are finite.

    The weights are made NaN where the gradient is not finite, whatever the optimizer would
    have made of it, so that they alone need be looked at: reading a large gradient twice
    took longer than the update.
    """

    def apply(
        grads: PyTree,
        state: PyTree,
        params: PyTree,
        loss: jax.Array,
        model_state: list[jax.Array],
        *extras: Any,
    ) -> tuple[PyTree, PyTree, list[jax.Array], jax.Array]:
        params, state = optimizer.apply(grads, state, params, loss, *extras)
        params = jax.tree.map(_finite_as, params, grads)
        model_state = list(map(jnp.copy, model_state))  # and never what was pushed itself
        is_finite = all_finite([loss, *jax.tree.leaves(params), *model_state])
        return params, state, model_state, is_finite

    return apply


def _finite_as(weight: jax.Array, gradient: jax.Array) -> jax.Array:
    """The weights, NaN where the gradient is not finite."""
    return jnp.where(jnp.isfinite(wide(gradient)), weight, jnp.asarray(jnp.nan, weight.dtype))


def all_finite(arrays: Sequence[Any]) -> jax.Array:
    # Infinity and NaN times 0 are NaN, and a sum has it to the end. XLA does not fold this,
    # and adds many numbers at once, which it does not with the truth values of isfinite.
    sums = [jnp.sum(wide(jnp.asarray(x)) * 0) for x in arrays]
    return jnp.stack([jnp.isfinite(total) for total in sums]).all()


def wide(x: jax.Array) -> jax.Array:
    # 8-bit floats have no isfinite of their own everywhere.
    return x.astype(jnp.float32) if x.dtype.itemsize == 1 else x
