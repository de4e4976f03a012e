"""From the gradients of an update to the one that the optimizer gets. Pure.

One gradient passes as it is, or compensated for its staleness. A group's is the
mean over all its examples, sum(n_i g_i) / sum(n_i), added in the order of the
batches, so that it does not depend on who computed what, and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from headwater.server.staleness import StalenessPolicy

Leaves = Sequence[Any]


class Weighed(Protocol):
    """What is known of a gradient beside its numbers."""

    @property
    def examples(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def base_params(self) -> tuple[jax.Array, ...] | None: ...


def combine(
    gradients: Sequence[Leaves],
    of: Sequence[Weighed],
    weights: Sequence[jax.Array],
    policy: StalenessPolicy,
) -> tuple[Leaves, float]:
    """The optimizer's gradient and loss.

    Args:
      gradients: In the order of their batches, each in layout order.
      of: What each is of.
      weights: Of the version that the update moves.
      policy: Compensates where it is told to.
    """
    if len(gradients) > 1:
        sizes = [each.examples for each in of]
        return mean(gradients, sizes), mean_loss([each.loss for each in of], sizes)
    base = of[0].base_params
    if policy.compensate is None or base is None:
        return gradients[0], of[0].loss
    return _compensated(gradients[0], weights, base, policy.compensate), of[0].loss


def mean(gradients: Sequence[Leaves], sizes: Sequence[int]) -> list[jax.Array]:
    """sum(n_i g_i) / sum(n_i) over each leaf, added from the first to the last.

    Leaves narrower than float32 are added in float32.
    """
    total = _weighed(tuple(gradients[0]), np.float32(sizes[0]))
    for gradient, size in zip(gradients[1:], sizes[1:], strict=True):
        total = _add(total, tuple(gradient), np.float32(size))
    return list(_divided(total, np.float32(sum(sizes)), tuple(gradients[0])))


def mean_loss(losses: Sequence[float], sizes: Sequence[int]) -> float:
    """The same of the losses."""
    return sum(n * x for n, x in zip(sizes, losses, strict=True)) / sum(sizes)


@jax.jit
def _weighed(gradient: tuple[Any, ...], size: Any) -> tuple[Any, ...]:
    return tuple(wide(g) * size.astype(wide(g).real.dtype) for g in gradient)


@jax.jit
def _add(total: tuple[Any, ...], gradient: tuple[Any, ...], size: Any) -> tuple[Any, ...]:
    # The barrier keeps the product's rounding: fused into the sum it would round once,
    # on machines that have an instruction for it.
    products = jax.lax.optimization_barrier(_weighed(gradient, size))
    return tuple(t + p for t, p in zip(total, products, strict=True))


@jax.jit
def _divided(total: tuple[Any, ...], size: Any, like: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        (t / size.astype(t.real.dtype)).astype(g.dtype) for t, g in zip(total, like, strict=True)
    )


@jax.jit
def _compensated(gradient: Any, weights: Any, base: Any, strength: Any) -> list[Any]:
    found = []
    for g, w, b in zip(gradient, weights, base, strict=True):
        own, gap = wide(g), wide(w) - wide(b)
        factor = jnp.asarray(strength, own.real.dtype)
        found.append((own + factor * own * own.conj() * gap).astype(g.dtype))
    return found


def wide(x: Any) -> jax.Array:
    """With at least float32's precision, to compute with."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
