"""Ray: an actor that holds NumPy weights; gradients and weights go by the object store.

After Ray's example "Parameter Server", asynchronous; but each worker calls the
server itself, where the example has the driver hand on every gradient, which is
slower. Model and optimizer are NumPy, in place. What is returned is copied by Ray
into the object store, or the message where it is small.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from benchmarks.peers import work

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


class ParameterServer:
    """One thread, hence no lock."""

    def __init__(self, weights: list[np.ndarray], optimizer: str) -> None:
        self.weights = [weight.copy() for weight in weights]
        self.apply = getattr(self, optimizer)
        self.moments = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
        self.updates = 0
        self.over = False

    def push(self, gradients: list[np.ndarray] | None) -> list[np.ndarray] | None:
        """Apply it, if there is one; the weights, or None when it is over."""
        if self.over:
            return None
        if gradients is not None:
            self.updates += 1
            self.apply(gradients)
        return self.weights

    def sgd(self, gradients: list[np.ndarray]) -> None:
        for weight, gradient in zip(self.weights, gradients, strict=True):
            np.subtract(weight, np.float32(work.LEARNING_RATE) * gradient, out=weight)

    def adam(self, gradients: list[np.ndarray]) -> None:
        rate = work.LEARNING_RATE * (1 - BETA_2**self.updates) ** 0.5 / (1 - BETA_1**self.updates)
        for weight, (mean, square), gradient in zip(
            self.weights, self.moments, gradients, strict=True
        ):
            np.add(mean, (1 - BETA_1) * (gradient - mean), out=mean)
            np.add(square, (1 - BETA_2) * (gradient * gradient - square), out=square)
            np.subtract(weight, rate * mean / (np.sqrt(square) + EPSILON), out=weight)

    def count(self) -> int:
        return self.updates

    def end(self) -> None:
        self.over = True


class Worker:
    def __init__(self, server: Any) -> None:
        self.server = server

    def train(self) -> None:
        """Of the MLP, until it is over."""
        images, labels = work.digits()
        generator = np.random.default_rng()
        weights = ray.get(self.server.push.remote(None))
        while weights is not None:
            batch = generator.integers(0, len(images), work.BATCH_SIZE)
            x = images[batch].astype(np.float32) / 255
            weights = ray.get(self.server.push.remote(gradient(weights, x, labels[batch])))

    def round_trip_s(self, size: int) -> float:
        gradients = [np.ones(size // work.TENSORS, np.float32) for _ in range(work.TENSORS)]
        return work.median_s(lambda: ray.get(self.server.push.remote(gradients)), size)


# Any: what Ray adds to a class has no types.
RemoteServer: Any = ray.remote(ParameterServer)
RemoteWorker: Any = ray.remote(Worker)


def gradient(weights: list[np.ndarray], x: np.ndarray, label: np.ndarray) -> list[np.ndarray]:
    """Of the mean cross-entropy, by hand."""
    w_1, b_1, w_2, b_2 = weights
    hidden = np.maximum(x @ w_1 + b_1, 0)
    logits = hidden @ w_2 + b_2
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    d_logits = exp / exp.sum(axis=1, keepdims=True)
    d_logits[np.arange(len(x)), label] -= 1
    d_logits /= len(x)
    d_hidden = (d_logits @ w_2.T) * (hidden > 0)
    return [x.T @ d_hidden, d_hidden.sum(axis=0), hidden.T @ d_logits, d_logits.sum(axis=0)]


def updates_per_s() -> float:
    server = RemoteServer.remote(work.initial_weights(), "adam")
    running = [RemoteWorker.remote(server) for _ in range(2)]
    trained = [worker.train.remote() for worker in running]
    rate = work.window(lambda: ray.get(server.count.remote()))
    ray.get(server.end.remote())
    ray.get(trained)
    return rate


def round_trip_s(size: int) -> float:
    weights = [np.ones(size // work.TENSORS, np.float32) for _ in range(work.TENSORS)]
    server = RemoteServer.remote(weights, "sgd")
    worker = RemoteWorker.remote(server)
    found = ray.get(worker.round_trip_s.remote(size))
    ray.kill(worker)
    ray.kill(server)
    return float(found)


def main() -> None:
    sizes = work.size_arguments()
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=6_000_000_000)
    trips = {size: round_trip_s(size) for size in sizes}
    work.report({"numpy": updates_per_s()}, {"numpy": trips})


if __name__ == "__main__":
    main()
