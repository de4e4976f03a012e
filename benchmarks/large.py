"""A model of any size whose gradient costs next to nothing: what is left is moving bytes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from headwater import ArrayData, Task

OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}


def task(
    parameters: int = 10_000_000, tensors: int = 10, optimizer: str = "sgd", updates: int = 1000
) -> Task:
    """`parameters` float32 numbers in equal `tensors`; a loss that is linear in them."""
    size = parameters // tensors

    def init(key: jax.Array) -> Any:
        return {f"tensor{number}": jnp.ones(size) for number in range(tensors)}

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        return jnp.stack([jnp.sum(leaf) for leaf in params.values()]).sum() * 1e-9

    return Task(
        init=init,
        loss=loss,
        data=lambda: ArrayData(index=np.arange(updates)),
        optimizer=OPTIMIZERS[optimizer](1e-3),
        batch_size=1,
    )
