"""Networks whose reductions are large enough for XLA to split them among threads."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from headwater import ArrayData, Task
from headwater.examples import mnist
from headwater.worker.tree import PyTree


def task(kind: str = "wide", batch_size: int = 512, epochs: int = 3) -> Task:
    """Digits by a network of this kind: "wide", with 512 hidden units, or "conv"."""
    init, predict = {"wide": (_wide, _predict_wide), "conv": (_conv, _predict_conv)}[kind]

    def loss(params: PyTree, batch: Any, key: jax.Array) -> jax.Array:
        logits = predict(params, batch["image"].astype(jnp.float32) / 255)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    return Task(
        init=init,
        loss=loss,
        data=functools.cache(lambda: ArrayData(**mnist.load_sample()[0])),
        optimizer="adam(1e-3)",
        batch_size=batch_size,
        epochs=epochs,
    )


def _wide(key: jax.Array) -> PyTree:
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (784, 512)) * 0.05,
        "output": jax.random.normal(second, (512, 10)) * 0.05,
    }


def _predict_wide(params: PyTree, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["hidden"]) @ params["output"]


def _conv(key: jax.Array) -> PyTree:
    first, second = jax.random.split(key)
    return {
        "filters": jax.random.normal(first, (5, 5, 1, 16)) * 0.1,
        "output": jax.random.normal(second, (14 * 14 * 16, 10)) * 0.02,
    }


def _predict_conv(params: PyTree, x: jax.Array) -> jax.Array:
    x = jax.lax.conv_general_dilated(
        x.reshape(-1, 28, 28, 1),
        params["filters"],
        window_strides=(2, 2),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # (batch, 14, 14, 16)
    return jax.nn.relu(x).reshape(len(x), -1) @ params["output"]
