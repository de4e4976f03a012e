"""A model of any size whose gradient costs next to nothing: what is left is moving bytes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from headwater import ArrayData, Task

TENSORS = 8


def task(megabytes: int = 40, updates: int = 400) -> Task:
    """`megabytes` of float32 parameters (1 MB is 10**6 bytes) in 8 tensors, under SGD."""
    size = megabytes * 1_000_000 // 4 // TENSORS

    def init(key: jax.Array) -> Any:
        return {f"tensor{number}": jnp.ones(size) for number in range(TENSORS)}

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        return jnp.stack([jnp.sum(leaf) for leaf in params.values()]).sum() * 1e-9

    return Task(
        init=init,
        loss=loss,
        data=lambda: ArrayData(index=np.arange(updates)),
        optimizer=optax.sgd(1e-3),
        batch_size=1,
    )
