"""How the states that workers computed become the model's next one. Pure.

One state whose base is the newest version passes as it is. A stale one moves a
floating state by (new - base) / (1 + staleness): added whole, changes computed side
by side diverge for averages with a small momentum, such as BatchNorm's. A group's is
the mean over its examples. Integers, which count, move by the change of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater.server.combine import mean, wide

Leaves = Sequence[Any]


def merged(
    current: Leaves, new: Sequence[Leaves], sizes: Sequence[int], base: Leaves, staleness: int
) -> Leaves:
    """The next state; may be one of `new`.

    Args:
      current: Of the version that moves.
      new: Of each worker, in the order of the batches.
      sizes: Examples of each.
      base: Of the version that a state alone was computed at; a group's is `current`.
      staleness: Of a state alone, in versions.
    """
    if not current or (len(new) == 1 and staleness == 0):
        return new[0]
    if len(new) == 1:
        return _moved(tuple(current), tuple(new[0]), tuple(base), np.float32(1 + staleness))
    means = iter(mean([_floating(leaves) for leaves in new], sizes))
    counts = iter(_counted(tuple(current), tuple(map(tuple, new))))
    return [next(means if _is_floating(leaf) else counts) for leaf in current]


def _floating(leaves: Leaves) -> list[Any]:
    return [leaf for leaf in leaves if _is_floating(leaf)]


def _is_floating(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


@jax.jit
def _moved(current: Any, new: Any, base: Any, divisor: Any) -> list[Any]:
    found = []
    for s, n, b in zip(current, new, base, strict=True):
        if _is_floating(s):
            change = (wide(n) - wide(b)) / divisor.astype(wide(s).real.dtype)
            found.append((wide(s) + change).astype(s.dtype))
        else:
            found.append(s + (n - b))
    return found


@jax.jit
def _counted(current: Any, new: Any) -> list[Any]:
    return [
        sum((leaves[at] - s for leaves in new), start=s)
        for at, s in enumerate(current)
        if not _is_floating(s)
    ]
