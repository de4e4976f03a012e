"""Four weights at 0, and an embedded server that moves them by whatever a bare worker pushes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater import ArrayData, Client, Server, Task
from headwater.protos import parameter_server_pb2 as pb
from headwater.worker.tree import PyTree
from kit.protocol import BareWorker, hello_of

ONES = np.ones(4, np.float32)


def line(optimizer: Any = "sgd(1.0, momentum=0.5)", batches: int = 64) -> Task:
    """Four weights at 0, moved by what is pushed."""

    def loss(params: PyTree, batch: PyTree, key: jax.Array) -> jax.Array:
        return params["w"].sum()

    return Task(
        init=lambda key: {"w": jnp.zeros(4)},
        loss=loss,
        data=ArrayData(x=np.arange(batches)),
        optimizer=optimizer,
        batch_size=1,
        epochs=1,
    )


class LineRun:
    """An embedded server of `line`, a client, and a worker that pushes ones."""

    def __init__(self, stack: contextlib.ExitStack, task: Task, run_dir: Path, **options: Any):
        self._stack = stack
        self.hello = hello_of(task)
        self.server = stack.enter_context(Server(task, run_dir=run_dir, **options))
        self.client = stack.enter_context(Client(self.server.address))
        self._worker: BareWorker | None = None

    def worker(self, **overrides: Any) -> BareWorker:
        worker = self._stack.enter_context(BareWorker(self.server.address, self.hello))
        worker.join(**overrides)
        return worker

    def push(self) -> float:
        """Push ones; how far the weights moved by it."""
        if self._worker is None:
            self._worker = self.worker()
        before = self.client.pull()["w"][0]
        self._worker.push(self._worker.ticket(), ONES.tobytes())
        assert self._worker.outcome().code == pb.OUTCOME_APPLIED
        return float(before - self.client.pull()["w"][0])

    def value(self, name: str) -> str:
        return self.client.settings()[name]["value"]
