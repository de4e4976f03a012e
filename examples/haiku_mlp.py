"""Handwritten digits by a Haiku model with BatchNorm.

    headwater run --task headwater.examples.haiku_mlp --workers 2

In 5 epochs it learns to recognise 93.9 % of the digits that it was not trained on.

`hk.transform_with_state` gives functions of parameters and state, as Headwater wants them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from headwater import ArrayData, Task
from headwater.examples.mnist import load

try:
    import haiku as hk
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "this example needs Haiku, which is not installed: run pip install 'headwater[haiku]'"
    ) from None


def network(image: jax.Array, width: int, is_training: bool) -> jax.Array:
    """Logits, (batch, 10), of images, (batch, 784) in 0..255."""
    x = hk.Linear(width, with_bias=False)(image.astype(jnp.float32) / 255)
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training)
    return hk.Linear(10, name="output")(jax.nn.relu(x))


def task(data: str = "sample", width: int = 128, epochs: int = 5, every: int = 1) -> Task:
    """Train on each `every`th digit of `data`: "sample", or the path of Keras's mnist.npz."""
    model = hk.transform_with_state(network)

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, 784)), width, is_training=True)

    def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
        logits, state = model.apply(params, state, key, batch["image"], width, is_training=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}, state

    @jax.jit
    def predict(params: Any, state: Any, image: Any) -> jax.Array:
        return model.apply(params, state, None, image, width, is_training=False)[0]

    def evaluate(params: Any, state: Any) -> dict[str, Any]:
        test = load(data)[1]
        guess = predict(params, state, test["image"]).argmax(axis=-1)
        return {"accuracy": (guess == test["label"]).mean()}

    return Task(
        init=init,
        loss=loss,
        data=lambda: ArrayData(**{name: x[::every] for name, x in load(data)[0].items()}),
        optimizer="adam(1e-3)",
        batch_size=32,
        epochs=epochs,
        evaluate=evaluate,
        has_state=True,
    )
