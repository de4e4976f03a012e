"""Promise 2: a reader sees one version of all the weights, never a mixture of two.

The model's every cell starts at 0 and each gradient adds 1 to it, so at version
v every cell equals v, exactly. A mixture shows at once, and what a version has
to be, byte by byte, is known beforehand.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from headwater import ArrayData, Client, Server, Task
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.protos.layout import Layout
from headwater.protos.wire import unframe
from kit.protocol import BareWorker, StreamEnded, hello_of
from kit.waiting import wait_for

SHAPES = {"embed": (300, 500), "bias": (7,), "dense": (1000, 601), "scale": ()}
"""3.0 MB in float32: three parts, whose edges lie within tensors, and gaps between tensors."""

PULLS = 30
"""For each of the four readers."""


def task(batches: int) -> Task:
    return Task(
        init=lambda key: {name: jnp.zeros(shape) for name, shape in SHAPES.items()},
        loss=lambda params, batch, key: -sum(p.sum() for p in params.values()),
        data=lambda: ArrayData(x=np.zeros(batches)),
        optimizer=optax.sgd(1.0),
        batch_size=1,
    )


LAYOUT: Layout = task(1).tree.layout


def filled(value: float) -> bytes:
    """The flat buffer whose every cell has the value."""
    buffer = LAYOUT.empty()
    LAYOUT.pack([np.full(t.shape, value, t.dtype) for t in LAYOUT.tensors], buffer)
    return buffer.tobytes()


GRADIENT = filled(-1)


@functools.cache
def hash_of(version: int) -> str:
    return hashlib.sha256(filled(version)).hexdigest()


class Pulled(NamedTuple):
    """What one pull said it was, and the hash of what came."""

    version: int
    sha256: str


class Storm:
    """A run of as many batches as it takes, and workers that push as fast as they can."""

    def __init__(self, address: str, hello: pb.Hello) -> None:
        self.address = address
        self.over = threading.Event()
        self._hello = hello

    def push(self) -> int:
        """A worker's life; returns how many of its gradients were applied."""
        applied = 0
        with BareWorker(self.address, self._hello) as worker:
            worker.join()
            while not self.over.is_set():
                ticket = worker.ticket()
                # Its own weights come over the same road as everybody's.
                assert all((leaf == ticket.base).all() for leaf in worker.weights.leaves)
                worker.push(ticket, GRADIENT)
                applied += worker.outcome().code == pb.OUTCOME_APPLIED
            worker.leave()
            worker.end()
        return applied

    def pull_by_client(self) -> list[Pulled]:
        found = []
        with Client(self.address) as client:
            for _ in range(PULLS):
                weights = client.pull()
                assert {name: array.shape for name, array in weights.items()} == SHAPES
                buffer = LAYOUT.empty()
                LAYOUT.pack([weights[t.name] for t in LAYOUT.tensors], buffer)
                found.append(Pulled(weights.version, hashlib.sha256(buffer).hexdigest()))
        return found

    def pull_raw(self) -> list[Pulled]:
        found = []
        with rpc.connect(self.address) as channel:
            stub = rpc.Stub(channel)
            for _ in range(PULLS):
                first, *rest = [
                    unframe(pb.PullReply, data) for data in stub.Pull(pb.PullRequest(), timeout=60)
                ]
                (version,) = {reply.weights.version for reply, _ in rest}
                assert version == first.message.stamp.version
                digest, received = hashlib.sha256(), 0
                for reply, body in rest:
                    assert (reply.weights.offset, reply.stamp.version) == (received, version)
                    received += len(body)
                    digest.update(body)
                assert received == reply.weights.total_bytes == LAYOUT.total_bytes
                found.append(Pulled(version, digest.hexdigest()))
        return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int], tuple[Server, pb.Hello]]]:
    with contextlib.ExitStack() as stack:

        def run(batches: int) -> tuple[Server, pb.Hello]:
            made = task(batches)
            server = Server(made, run_dir=tmp_path / "run")
            return stack.enter_context(server), hello_of(made)

        yield run


def test_every_pull_in_a_storm_of_updates_is_one_whole_version(start) -> None:
    server, hello = start(100_000)
    storm = Storm(server.address, hello)
    with ThreadPoolExecutor(6) as threads:
        pushing = [threads.submit(storm.push) for _ in range(2)]
        reading = [
            threads.submit(read)
            for read in (storm.pull_by_client, storm.pull_by_client, storm.pull_raw, storm.pull_raw)
        ]
        try:
            histories = [reader.result(60) for reader in reading]
        finally:
            storm.over.set()
        applied = sum(pusher.result(60) for pusher in pushing)

    pulls = [pulled for history in histories for pulled in history]
    assert len(pulls) == 4 * PULLS
    assert [p for p in pulls if p.sha256 != hash_of(p.version)] == []
    for history in histories:
        versions = [pulled.version for pulled in history]
        assert versions == sorted(versions)  # never back
    # It was a storm: the weights moved all the while, under most of the pulls.
    assert applied >= max(p.version for p in pulls)
    assert len({p.version for p in pulls}) > 10


def test_a_subscription_gives_rising_whole_versions_to_the_last(start) -> None:
    server, hello = start(80)
    seen: list[int] = []

    def train() -> None:
        with BareWorker(server.address, hello) as worker:
            worker.join()
            for ticket in worker.tickets():
                worker.push(ticket, GRADIENT)
                with contextlib.suppress(StreamEnded):
                    worker.outcome()

    with ThreadPoolExecutor(1) as threads, Client(server.address) as client:
        training = threads.submit(train)
        for weights in client.subscribe(timeout_s=30):
            assert all((array == weights.version).all() for array in weights.values())
            seen.append(weights.version)
        training.result(30)

    assert all(a < b for a, b in itertools.pairwise(seen))
    assert seen[-1] == 80
    assert len(seen) > 2


def test_a_slow_subscriber_skips_versions_and_never_lags(start) -> None:
    server, hello = start(100)
    with BareWorker(server.address, hello) as worker, Client(server.address) as client:
        worker.join()
        fresh = client.subscribe(timeout_s=30)
        assert next(fresh).version == 0
        seen = []
        for _ in range(3):
            for _ in range(5):  # it is slow: so much happens meanwhile
                worker.push(worker.ticket(), GRADIENT)
                newest = worker.outcome().version
            weights = next(fresh)
            assert all((array == newest).all() for array in weights.values())
            seen.append(weights.version)

    assert seen == [5, 10, 15]


def test_a_subscription_to_every_tenth_waits_for_it_and_ends_with_the_last(start) -> None:
    server, hello = start(25)
    with BareWorker(server.address, hello) as worker, Client(server.address) as client:
        worker.join()
        fresh = client.subscribe(every=10, timeout_s=30)
        seen = [next(fresh).version]
        for ticket in worker.tickets():
            worker.push(ticket, GRADIENT)
            with contextlib.suppress(StreamEnded):
                worker.outcome()
            if client.status()["version"] in (10, 20):
                seen.append(next(fresh).version)
        wait_for(lambda: client.status()["state"] == "finished", "the run is finished")
        seen += [weights.version for weights in fresh]

    assert seen == [0, 10, 20, 25]
