"""TensorFlow's ParameterServerStrategy: variables on a server, steps scheduled on workers.

After TensorFlow's tutorial "Parameter server training with ParameterServerStrategy",
with a custom loop: a coordinator schedules a step, the worker reads the variables
from the server, computes, and has the server apply the gradient. Its own optimizers
are those of tf-keras (Keras 3 has none for this strategy). Coordinator, server and
workers are processes that speak gRPC. A round trip is one step scheduled and joined.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")

import tensorflow as tf  # after its settings
import tf_keras

from benchmarks.peers import work

SCHEDULED = 200
"""Steps handed to the coordinator at a time, so that no worker waits for it."""


def serve(job: str, index: int) -> None:
    """Be a member of the cluster in TF_CONFIG, until killed."""
    spec = tf.train.ClusterSpec(json.loads(os.environ["TF_CONFIG"])["cluster"])
    settings = tf.compat.v1.ConfigProto(
        inter_op_parallelism_threads=4, intra_op_parallelism_threads=1
    )
    tf.distribute.Server(spec, job, index, config=settings, protocol="grpc").join()


class Cluster:
    """A coordinator in this process; a server and workers in theirs."""

    def __init__(self, workers: int) -> None:
        spec = {"ps": [free_address()], "worker": [free_address() for _ in range(workers)]}
        config = {"cluster": {**spec, "chief": [free_address()]}}
        members = [("ps", 0), *(("worker", n) for n in range(workers))]
        self.processes = [
            subprocess.Popen(  # noqa: S603  (ourselves)
                [sys.executable, "-m", "benchmarks.peers.tensorflow_ps", job, str(index)],
                env={**os.environ, "TF_CONFIG": json.dumps(config)},
            )
            for job, index in members
        ]
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(config["cluster"]), task_type="chief", task_id=0, rpc_layer="grpc"
        )
        self.strategy = tf.distribute.ParameterServerStrategy(resolver)
        self.coordinator = tf.distribute.coordinator.ClusterCoordinator(self.strategy)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()


def updates_per_s(cluster: Cluster) -> float:
    with cluster.strategy.scope():
        variables = [tf.Variable(weight) for weight in work.initial_weights()]
        optimizer = tf_keras.optimizers.legacy.Adam(work.LEARNING_RATE)

    def data() -> Any:
        images, labels = work.digits()
        whole = tf.data.Dataset.from_tensor_slices((images, labels))
        return whole.shuffle(len(images)).repeat().batch(work.BATCH_SIZE)

    batches = iter(cluster.coordinator.create_per_worker_dataset(data))

    @tf.function  # type: ignore[untyped-decorator]
    def step(batches: Any) -> None:
        def replica(images: Any, labels: Any) -> None:
            with tf.GradientTape() as tape:
                w_1, b_1, w_2, b_2 = variables
                hidden = tf.nn.relu(tf.cast(images, tf.float32) / 255 @ w_1 + b_1)
                loss = tf.reduce_mean(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(labels, hidden @ w_2 + b_2)
                )
            gradients = tape.gradient(loss, variables)
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

        cluster.strategy.run(replica, args=next(batches))

    def many() -> None:
        for _ in range(SCHEDULED):
            cluster.coordinator.schedule(step, args=(batches,))
        cluster.coordinator.join()

    return rate(many)


def rate(many: Callable[[], None]) -> float:
    many()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < work.WINDOW_S:
        many()
        count += SCHEDULED
    return count / (time.perf_counter() - began)


def round_trip_s(cluster: Cluster, size: int) -> float:
    with cluster.strategy.scope():
        variables = [tf.Variable(tf.ones(size // work.TENSORS)) for _ in range(work.TENSORS)]
        optimizer = tf_keras.optimizers.legacy.SGD(work.LEARNING_RATE)

    @tf.function  # type: ignore[untyped-decorator]
    def step() -> None:
        def replica() -> None:
            # Of the weights that were pulled; the device makes sure that they were.
            with tf.device("/job:worker/replica:0/task:0/device:CPU:0"):
                gradients = [tf.sign(tf.identity(variable)) for variable in variables]
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

        cluster.strategy.run(replica)

    def one() -> None:
        cluster.coordinator.schedule(step)
        cluster.coordinator.join()

    return work.median_s(one, size)


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def main() -> None:
    if sys.argv[1:2] in (["ps"], ["worker"]):
        return serve(sys.argv[1], int(sys.argv[2]))
    if sys.argv[1:2] == ["updates"]:
        with Cluster(2) as cluster:
            print(json.dumps(updates_per_s(cluster)), flush=True)
        os._exit(0)  # the coordinator would wait for its cluster
    sizes = work.size_arguments()
    with Cluster(1) as cluster:
        trips = {size: round_trip_s(cluster, size) for size in sizes}
        # In a process of its own: a process has one cluster.
        command = [sys.executable, "-m", "benchmarks.peers.tensorflow_ps", "updates"]
        rate = float(subprocess.check_output(command))  # noqa: S603  (ourselves)
        work.report({"tf-keras": rate}, {"tf-keras": trips})
    os._exit(0)


if __name__ == "__main__":
    main()
