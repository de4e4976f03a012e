"""Batches that are made: each adds 1 to the count of nobody knows which, exactly once.

The gradient is -1 whatever the weights, and SGD(1.0) applies it, so that the weight is
the number of batches that were applied.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from headwater import Generated, Task


def task(batches: int = 40, endless: bool = False, optimizer: str = "sgd(1.0)") -> Task:
    """`batches` an epoch, two epochs; or one without an end."""

    def make(params: Any, key: jax.Array) -> Any:
        return {"one": jnp.ones(4), "noise": jax.random.normal(key, (4,))}

    def loss(params: Any, batch: Any, key: jax.Array) -> Any:
        return -(params["count"] * batch["one"].mean()).sum(), {"noise": batch["noise"].mean()}

    return Task(
        init=lambda key: {"count": jnp.zeros(1)},
        loss=loss,
        data=Generated(make, None if endless else batches),
        optimizer=optimizer,
        batch_size=4,
        epochs=2,
        evaluate=lambda params: {"count": params["count"][0]},
    )
