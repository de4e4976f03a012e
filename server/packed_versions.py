"""A version's weights as they are sent: as they are, or with fewer bytes."""

from __future__ import annotations

import jax
import numpy as np

from headwater.protos.compression import Compression
from headwater.protos.layout import Layout
from headwater.server.optimizer import AbstractOptimizer
from headwater.server.store import Published
from headwater.worker.compression import Pack
from headwater.worker.tree import ModelTree


class PackedVersions:
    """Packs versions. May be used by several threads.

    Args:
      sent: The layout of the tensors that are sent, the first ones of a version's.
      compression: How they are sent.
    """

    def __init__(self, sent: Layout, compression: Compression) -> None:
        self.layout = compression.packed(sent)
        """Of what crosses the wire for them."""
        self._count = len(sent.tensors)
        self._pack = Pack(sent, compression)

    def arrays(self, published: Published) -> list[np.ndarray]:
        """What is sent, in the order of `layout`."""
        return self._pack(published.tensors[: self._count])


class EvaluationVersions:
    """All tensors of a version, with the weights that the optimizer has for evaluation."""

    def __init__(self, tree: ModelTree, optimizer: AbstractOptimizer) -> None:
        self.layout = tree.layout
        self._tree = tree
        self._params = jax.jit(optimizer.evaluation_params)
        params = tree.trained_shapes
        state = jax.eval_shape(optimizer.init, params)
        self.differs = jax.eval_shape(optimizer.evaluation_params, state, params) is not None
        """Whether they are others than those that are trained."""

    def arrays(self, published: Published) -> list[np.ndarray]:
        """In layout order."""
        tensors = published.tensors
        if self.differs:
            trained = self._tree.trained
            params, state, _ = self._tree.split(published.leaves)
            found = self._params(published.optimizer_state, trained.restore(params))
            tensors = (*trained.leaves(found), *state, *published.constants)
        return list(map(np.asarray, tensors))
