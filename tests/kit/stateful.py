"""A task with state and constants, by which it can be counted.

The optimizer adds 1 at each example of a batch to `count`, as in the counting task;
the state counts the same examples in a whole number; the constants must stay.
"""

from __future__ import annotations

import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

from headwater import ArrayData, Task

EXAMPLES = 1024


def task(epochs: int = 2, load_s: float = 0.0, slow_while: str = "") -> Task:
    """Its steps can be drawn out, so that a fault can hit them, while a file is there."""

    class Data(ArrayData):
        def batch(self, indices, rng):
            if slow_while and Path(slow_while).exists():
                time.sleep(load_s)
            return super().batch(indices, rng)

    def init(key):
        params = {
            "base": {"scale": jnp.ones(()), "table": jnp.arange(5)},
            "count": jnp.zeros(EXAMPLES),
        }
        return params, {"mean": jnp.zeros(()), "seen": jnp.zeros((), jnp.int32)}

    def loss(params, state, batch, key):
        at = batch["at"]
        used = (params["count"] * params["base"]["scale"])[at].sum()
        mean = 0.9 * state["mean"] + 0.1 * jnp.mean(at / EXAMPLES)
        return -used, {}, {"mean": mean, "seen": state["seen"] + len(at)}

    def evaluate(params, state):
        return {"used": params["count"].sum(), "seen": state["seen"]}

    return Task(
        init=init,
        loss=loss,
        data=Data(at=np.arange(EXAMPLES)),
        optimizer=optax.sgd(1.0),
        batch_size=32,
        epochs=epochs,
        evaluate=evaluate,
        has_state=True,
        trainable=lambda name: not name.startswith("base/"),
    )
