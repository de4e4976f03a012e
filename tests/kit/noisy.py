"""A small network on noisy data, so that weights, keys and generators all count."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater import Task

ROWS = np.random.default_rng(7).normal(size=(200, 24)).astype(np.float32)


class Noisy:
    """Adds noise of the batch's own generator."""

    def __len__(self) -> int:
        return len(ROWS)

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        noise = rng.normal(size=(len(indices), 24)).astype(np.float32)
        return {"x": ROWS[indices] + 0.1 * noise, "y": ROWS[indices, :3].sum(axis=1)}


def init(key: jax.Array) -> Any:
    first, second = jax.random.split(key)
    return {
        "first": jax.random.normal(first, (24, 48)) * 0.2,
        "second": (jax.random.normal(second, (48,)) * 0.2, jnp.zeros(())),
    }


def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    hidden = jnp.tanh(batch["x"] @ params["first"])  # (batch, 48)
    weight, bias = params["second"]
    return jnp.mean((hidden @ weight + bias - batch["y"]) ** 2)


def dropout_loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    kept = jax.random.bernoulli(key, 0.8, batch["x"].shape)
    return loss(params, {**batch, "x": jnp.where(kept, batch["x"] / 0.8, 0)}, key)


task = Task(
    init=init,
    loss=loss,
    data=Noisy(),
    optimizer="adam(cosine_decay_schedule(0.01, total_updates))",
    batch_size=8,
    epochs=2,
    seed=3,
)
"""25 batches an epoch."""

with_dropout = dataclasses.replace(task, loss=dropout_loss, batch_size=9)
"""23 batches an epoch, the last one short."""
