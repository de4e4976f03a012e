"""The counting task: its weights count how often each example was used.

The gradient is -1 at each example of the batch, and the optimizer is SGD with
learning rate 1, so after E epochs of exactly-once every cell equals E. What is
applied twice or lost shows in the one cell, whatever was killed in between.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax

from headwater import ArrayData, Task


def task(examples: int = 4096, epochs: int = 3, batch_size: int = 32, padding: int = 0) -> Task:
    """`padding` float32 zeros are added to the weights, to make pushes long."""

    def init(key):
        return {"count": jnp.zeros(examples), "padding": jnp.zeros(padding)}

    def loss(params, batch, key):
        used = params["count"][batch["index"]]
        # The sum, not the mean, on purpose: one for each example.
        return -used.sum() + 0.0 * params["padding"].sum()

    return Task(
        init=init,
        loss=loss,
        data=lambda: ArrayData(index=np.arange(examples)),
        optimizer=optax.sgd(1.0),
        batch_size=batch_size,
        epochs=epochs,
    )
