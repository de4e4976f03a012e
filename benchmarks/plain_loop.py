"""The loop that a user without Headwater writes: one process, one jitted step, the same batches.

Prints its updates per second. Run by updates.py in a process of its own.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
import numpy as np
import optax

from headwater.examples.mnist import task as mnist
from headwater.server.order import BatchOrder
from headwater.worker.data import batch_rng
from headwater.worker.optimizer_spec import transformation

WARM_UP = 50
"""Updates before the clock starts."""


def updates_per_second(epochs: int) -> float:
    """Of the mnist task, batches loaded as a worker loads them."""
    task = mnist()
    data = task.dataset
    order = BatchOrder(
        example_count=task.example_count(task.batch_size),
        batch_size=task.batch_size,
        epochs=epochs,
        seed=task.seed,
    )
    optimizer, _ = transformation(task.optimizer, order.total)
    key = jax.random.key(task.seed)

    @jax.jit
    def step(params: Any, state: Any, batch: Any, epoch: Any, number: Any) -> Any:
        batch_key = jax.random.fold_in(jax.random.fold_in(key, epoch), number)
        (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(params, batch, batch_key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = task.init(key)
    state = optimizer.init(params)
    began = time.perf_counter()
    for position in range(order.total):
        if position == WARM_UP:
            jax.block_until_ready(params)
            began = time.perf_counter()
        at = order.id(position)
        batch = data.batch(order.indices(position), batch_rng(0, at.epoch, at.number))
        params, state, loss = step(params, state, batch, np.uint32(at.epoch), np.uint32(at.number))
        float(loss)  # a loop that shows its loss waits for each step
    jax.block_until_ready(params)
    return (order.total - WARM_UP) / (time.perf_counter() - began)


if __name__ == "__main__":
    print(updates_per_second(int(sys.argv[1])))
