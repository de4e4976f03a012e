"""What trains here, in a line: two spirals told apart by a small network.

    headwater check --task starter.py            # one batch, one gradient: what is wrong
    headwater run --task starter.py --workers 2  # train, here; --epochs 10, --optimizer 'sgd(0.1)'

Server, workers and evaluators each load this file, and take the Task from its end.
"""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from headwater import ArrayData, Task

# ---- The data. The same on every machine, for a worker is told which examples to take.


def spirals(count: int, seed: int) -> dict[str, np.ndarray]:
    """Points on two arms, and which arm each is on."""
    rng = np.random.default_rng(seed)
    arm = rng.integers(0, 2, count)
    turn = np.sqrt(rng.uniform(0.05, 1, count)) * 2 * np.pi
    angle = turn + arm * np.pi
    point = np.stack([np.cos(angle), np.sin(angle)], axis=1) * turn[:, None] / (2 * np.pi)
    point += rng.normal(scale=0.02, size=point.shape)
    return {"point": point.astype(np.float32), "arm": arm.astype(np.int32)}


def data() -> ArrayData:
    """Called when it is needed; `ArrayData` is for what fits in memory.

    Other data: `from_items(dataset)`, an object with len() and batch(indices, rng), or
    `Generated(make)` where there is nothing to read.
    """
    return ArrayData(**spirals(8192, seed=0))


# ---- The model. Parameters are any tree of arrays: dicts here, Flax's or Equinox's as well.

WIDTHS = (2, 64, 64, 2)


def init(key: jax.Array) -> Any:
    """The first weights. Only the server runs this."""
    layers = []
    for wide, narrow in pairwise(WIDTHS):
        key, drawn = jax.random.split(key)
        kernel = jax.random.normal(drawn, (wide, narrow)) * jnp.sqrt(2 / wide)
        layers.append({"kernel": kernel, "bias": jnp.zeros(narrow)})
    return layers


def predict(params: Any, point: Any) -> jax.Array:
    """Logits, (batch, 2), of points, (batch, 2)."""
    x = 2 * point
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


# ---- What is minimised: the mean over a batch, and what to show beside it.


def loss(params: Any, batch: Any, key: jax.Array) -> Any:
    """`key` is the batch's own, for dropout and the like; not needed here."""
    logits = predict(params, batch["point"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["arm"])
    accuracy = (logits.argmax(-1) == batch["arm"]).mean()
    return losses.mean(), {"accuracy": accuracy}


def evaluate(params: Any) -> dict[str, Any]:
    """Of the served weights, on data that is not trained on; every epoch."""
    held_out = spirals(2048, seed=1)
    logits = predict(params, held_out["point"])
    return {"accuracy": (logits.argmax(-1) == held_out["arm"]).mean()}


task = Task(
    init=init,
    loss=loss,
    data=data,
    optimizer="adam(3e-3)",  # or any optax transformation; as text, `headwater set` can change it
    batch_size=64,
    epochs=20,
    evaluate=evaluate,
)
