"""An optimizer that keeps a running average of the weights it makes, for evaluation.

The average is exponential, and debiased like Adam's moments (Kingma & Ba 2014, section
3), so that after one update it is the weights, not mostly where they began. Kept in
float32 at least: in bfloat16 a step of 0.001 would be lost.

Source: Polyak & Juditsky 1992, averaging of iterates; exponential as in Mean Teacher,
Tarvainen & Valpola 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from headwater.server.combine import wide
from headwater.server.optimizer import AbstractOptimizer, HyperParameter
from headwater.worker.tree import PyTree


class AveragedState(NamedTuple):
    """Of the optimizer within, and of the average."""

    inner: PyTree
    average: PyTree
    """Sum of decay**(updates since) * (1 - decay) * weights; float32 at least."""
    weight: jax.Array
    """Sum of the same without the weights: 0 at first, towards 1. float32."""


class Averaged(AbstractOptimizer):
    """`inner`, which moves the weights exactly as it would alone.

    Args:
      inner: Moves the weights.
      decay: Of the average, in (0, 1); 0.999 averages over about the last thousand updates.
    """

    def __init__(self, inner: AbstractOptimizer, decay: float) -> None:
        self._inner = inner
        self._decay = decay
        self.text = f"{inner.text}, averaged by {decay!r}"

    def init(self, params: PyTree) -> PyTree:
        zeros = jax.tree.map(lambda x: jnp.zeros_like(wide(x)), params)
        return AveragedState(self._inner.init(params), zeros, jnp.zeros((), jnp.float32))

    def apply(
        self, grads: PyTree, state: PyTree, params: PyTree, loss: jax.Array, *extras: Any
    ) -> tuple[PyTree, PyTree]:
        params, inner = self._inner.apply(grads, state.inner, params, loss, *extras)

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            return old + (wide(new) - old) * jnp.asarray(1 - self._decay, old.real.dtype)

        averages = jax.tree.map(average, state.average, params)
        return params, AveragedState(inner, averages, average(state.weight, jnp.float32(1)))

    def evaluation_params(self, state: PyTree, params: PyTree) -> PyTree:
        def debiased(average: jax.Array, now: jax.Array) -> jax.Array:
            weight = state.weight.astype(average.real.dtype)
            return jnp.where(weight > 0, average / weight, wide(now)).astype(now.dtype)

        return jax.tree.map(debiased, state.average, params)

    # ------------------------------------------------------- as the one within

    def hyper_parameters(self, state: PyTree) -> dict[str, HyperParameter]:
        return self._inner.hyper_parameters(state.inner)

    def live_values(self, set_values: Mapping[str, float]) -> dict[str, float]:
        return self._inner.live_values(set_values)

    def compiled_in(self, set_values: Mapping[str, float]) -> dict[str, float]:
        return self._inner.compiled_in(set_values)

    def in_state(self, set_values: Mapping[str, float]) -> dict[str, float]:
        return self._inner.in_state(set_values)

    def with_numbers(self, values: Mapping[str, float], params: PyTree) -> AbstractOptimizer:
        return Averaged(self._inner.with_numbers(values, params), self._decay) if values else self

    def set_in_state(self, state: PyTree, values: Mapping[str, float]) -> PyTree:
        return state._replace(inner=self._inner.set_in_state(state.inner, values))
