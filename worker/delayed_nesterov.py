"""Nesterov's momentum for an outer optimizer whose gradients are stale.

Asynchronous workers' pseudo-gradients, each amplified by momentum, overshoot.
Here each moves the weights by its share of `delay` of them at once, and the
momentum is renewed only every `delay` updates, from their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class DelayedNesterovState(NamedTuple):
    """Of `delayed_nesterov`."""

    count: jax.Array  # type: ignore[assignment]  # optax's name for it, and a tuple's method
    """int32: updates so far."""
    momentum: Any
    """Each leaf of its parameter's shape and dtype; so is `accumulated`."""
    accumulated: Any
    """Sum of the gradients since the momentum was renewed."""


def delayed_nesterov(
    learning_rate: float | jax.Array | Callable[[jax.Array], Any],
    momentum: float = 0.9,
    delay: int = 8,
    activation: float = 0.0,
) -> optax.GradientTransformation:
    """Delayed Nesterov, with N = delay, beta = momentum, c = activation:

        accumulated <- accumulated + g
        every N-th update:
            m     <- beta m + accumulated / N;  accumulated <- 0
            theta <- theta - learning_rate ((1 - c N + c) beta m + g / N)
        any other:
            theta <- theta - learning_rate (c beta m + g / N)

    So N updates move the weights as far as one Nesterov step along their mean.
    With N = 1 it is `optax.sgd(learning_rate, momentum, nesterov=True)`.

    Args:
      learning_rate: A number, or a schedule of the updates so far.
      momentum: In [0, 1).
      delay: Updates from one renewal of the momentum to the next; about as many
        as there are workers, or more.
      activation: In [0, 1/delay]: how much of the momentum goes into each of the
        updates between; at 1/delay, as much as into the N-th.

    Raises:
      ValueError: An argument is out of its range.

    Source: Liu et al. 2024, "Asynchronous Local-SGD Training for Language
    Modeling" (arXiv 2401.09135), the delayed Nesterov update.
    """
    _check(momentum, delay, activation)

    def init(params: Any) -> DelayedNesterovState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return DelayedNesterovState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates: Any, state: DelayedNesterovState, params: Any = None) -> Any:
        del params
        renews = (state.count + 1) % delay == 0
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        share = jnp.where(renews, 1 - activation * delay + activation, activation) * momentum

        def accumulate(total: jax.Array, g: jax.Array) -> jax.Array:
            return total + g

        def renew(m: jax.Array, total: jax.Array) -> jax.Array:
            return jnp.where(renews, _like(m, momentum) * m + total / _like(m, delay), m)

        def move(g: jax.Array, m: jax.Array) -> jax.Array:
            return -_like(g, rate) * (_like(g, share) * m + g / _like(g, delay))

        def clear(total: jax.Array) -> jax.Array:
            return jnp.where(renews, jnp.zeros_like(total), total)

        total = jax.tree.map(accumulate, state.accumulated, updates)
        m = jax.tree.map(renew, state.momentum, total)
        moves = jax.tree.map(move, updates, m)
        count = optax.safe_increment(state.count)
        return moves, DelayedNesterovState(count, m, jax.tree.map(clear, total))

    return optax.GradientTransformation(init, update)


def _like(leaf: jax.Array, number: Any) -> jax.Array:
    # A traced float32 would make float32 of a bfloat16 leaf.
    return jnp.asarray(number, leaf.dtype)


def _check(momentum: float, delay: int, activation: float) -> None:
    if any(isinstance(argument, jax.Array) for argument in (momentum, delay, activation)):
        return  # optax.inject_hyperparams passes arrays, which may be traced: no values to check
    if not isinstance(delay, int) or isinstance(delay, bool) or delay < 1:
        raise ValueError(f"delay is {delay!r}; it must be a whole number from 1 on")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; it must be in [0, 1)")
    if not 0 <= activation <= 1 / delay:
        raise ValueError(
            f"activation is {activation}; it must be in [0, 1/delay], here [0, {1 / delay:g}]"
        )
