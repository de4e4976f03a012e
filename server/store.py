"""The weights, the optimizer's state, and the one way they move.

Each update publishes one immutable `Published`; replies, reads and what is kept
on disk come from such an object alone, so that a read never locks and is one
version by construction. Imports no grpc, reads no clock, starts no thread: the
same calls in, the same state out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater.protos.layout import Bytes, Layout
from headwater.server.optimizer import AbstractOptimizer
from headwater.server.ranges import Ranges
from headwater.worker.tree import ParameterTree, PyTree


class NotFinite(ValueError):
    """A gradient or its loss holds NaN or infinity; names the first place. Nothing changed."""


@dataclasses.dataclass(frozen=True)
class Published:
    """One version: its weights, and which batches made it. Never mutated."""

    incarnation: int
    version: int
    leaves: tuple[jax.Array, ...]
    """The weights, in layout order."""
    optimizer_state: PyTree
    applied: Ranges
    """Positions of the batches that are done with, those left out included."""
    left_out: Ranges


def initial(
    tree: ParameterTree, params: PyTree, optimizer: AbstractOptimizer, incarnation: int = 1
) -> Published:
    """Version 0 of a run, from what `Task.init` gave."""
    leaves = tuple(jnp.array(leaf) for leaf in tree.leaves(params))  # a copy: they stay the user's
    state = optimizer.init(tree.restore(leaves))
    return Published(incarnation, 0, leaves, state, Ranges(), Ranges())


class Store:
    """The newest version, and `apply`, which makes the next one.

    Args:
      tree: Of the parameters.
      optimizer: Moves them.
      start: The version to go on from.

    Raises:
      NotFinite: Its weights are not finite.
    """

    def __init__(self, tree: ParameterTree, optimizer: AbstractOptimizer, start: Published) -> None:
        self._tree = tree
        self.current = start
        params = tree.restore(start.leaves)
        loss = np.zeros((), np.float32)
        # Compiled here, so that the first push does not wait for it.
        self._is_finite = jax.jit(_is_finite).lower(start.leaves, loss).compile()
        self._step = (
            jax.jit(optimizer.apply).lower(params, start.optimizer_state, params, loss).compile()
        )
        self._check(start.leaves, loss)

    @property
    def layout(self) -> Layout:
        return self._tree.layout

    def apply(self, gradient: Bytes, loss: float, position: int) -> Published:
        """Move the weights by one gradient; the version grows by one.

        Args:
          gradient: The flat buffer, uint8 of shape (layout.total_bytes,). It may
            be used again when this returns.
          loss: Mean over the batch's examples.
          position: Of the batch, which counts as applied from this version on.

        Raises:
          NotFinite: The gradient or the loss is not finite.
        """
        self.check(gradient, loss)
        return self.move(gradient, loss, position)

    def check(self, gradient: Bytes, loss: float) -> None:
        """Whether `move` may have them.

        Raises:
          NotFinite: The gradient or the loss is not finite.
        """
        self._check(list(self.layout.views(gradient).values()), _loss_array(loss))

    def move(self, gradient: Bytes, loss: float, position: int) -> Published:
        """`apply`, for what `check` has passed."""
        grads = list(self.layout.views(gradient).values())
        loss_array = _loss_array(loss)
        before = self.current
        params, state = self._step(
            self._tree.restore(grads),
            before.optimizer_state,
            self._tree.restore(before.leaves),
            loss_array,
        )
        # XLA may read the gradient where it lies: it is ours until this is ready.
        jax.block_until_ready((params, state))
        self.current = dataclasses.replace(
            before,
            version=before.version + 1,
            leaves=tuple(self._tree.leaves(params)),
            optimizer_state=state,
            applied=before.applied.add(position),
        )
        return self.current

    def leave_out(self, position: int) -> Published:
        """Count a batch as done without an update; the version stays."""
        before = self.current
        self.current = dataclasses.replace(
            before,
            applied=before.applied.add(position),
            left_out=before.left_out.add(position),
        )
        return self.current

    def _check(self, leaves: Any, loss: np.ndarray) -> None:
        if self._is_finite(tuple(leaves), loss):
            return
        if not np.isfinite(loss):
            raise NotFinite(f"the loss is {float(loss)}")
        for spec, leaf in zip(self.layout.tensors, leaves, strict=True):
            count = np.size(leaf) - int(np.count_nonzero(jnp.isfinite(_wide(jnp.asarray(leaf)))))
            if count:
                raise NotFinite(f"{count} of the {np.size(leaf)} numbers in {spec.name}")


def _loss_array(loss: float) -> np.ndarray:
    with np.errstate(over="ignore"):  # too large is infinite, and refused as such
        return np.asarray(loss, np.float32)


def _is_finite(leaves: tuple[jax.Array, ...], loss: jax.Array) -> jax.Array:
    return jnp.stack([jnp.isfinite(loss), *(jnp.isfinite(_wide(x)).all() for x in leaves)]).all()


def _wide(x: jax.Array) -> jax.Array:
    # 8-bit floats have no isfinite of their own everywhere.
    return x.astype(jnp.float32) if x.dtype.itemsize == 1 else x
