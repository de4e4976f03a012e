"""One asynchronous worker trains exactly as a plain optax loop does, bit for bit.

The plain loop is PLAIN_LOOP below, over the same batches in the same order
(`BatchOrder`), from `task.init(jax.random.key(seed))`, on the same device with
the same number of XLA threads (NPROC=1 in every process). It is run twice:

  apart   the gradient is one jitted function (`value_and_grad` of the task's
          loss, its key made inside), the update another (`update` and
          `apply_updates` of optax together). Headwater computes so.
  fused   both in one jitted function, as most people write it. XLA may round
          this one otherwise; for the tasks here it does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from kit import processes

PLAIN_LOOP = """
import sys

import jax
import numpy as np
import optax
from safetensors.numpy import save_file

from headwater.server.order import BatchOrder
from headwater.worker.data import batch_rng
from headwater.worker.load import load_task

spec, epochs, seed, optimizer = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
task = load_task(spec).task
order = BatchOrder(
    example_count=len(task.dataset), batch_size=task.batch_size, epochs=epochs, seed=seed
)
total_updates = order.total
tx = eval(optimizer)


def gradient(params, batch, epoch, number):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), epoch), number)
    _, grads = jax.value_and_grad(task.loss, has_aux=True)(params, batch, key)
    return grads


def update(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


jitted_gradient, jitted_update = jax.jit(gradient), jax.jit(update)


def apart(params, state, *batch):
    return jitted_update(jitted_gradient(params, *batch), state, params)


@jax.jit
def fused(params, state, *batch):
    return update(gradient(params, *batch), state, params)


for step in (apart, fused):
    params = task.init(jax.random.key(seed))
    state = tx.init(params)
    for position in range(total_updates):
        at = order.id(position)
        rng = batch_rng(seed, at.epoch, at.number)
        batch = task.dataset.batch(order.indices(position), rng)
        params, state = step(params, state, batch, np.uint32(at.epoch), np.uint32(at.number))
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }
    save_file(named, f"{step.__name__}.safetensors")
print(total_updates)
"""

NOISY = '''
"""A network with dropout and noisy inputs, so that keys and rngs count; the last batch is short."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from headwater import Task

rows = np.random.default_rng(7).normal(size=(203, 24)).astype(np.float32)


class Noisy:
    def __len__(self):
        return len(rows)

    def batch(self, indices, rng):
        noise = rng.normal(size=(len(indices), 24)).astype(np.float32)
        return {"x": rows[indices] + 0.1 * noise, "y": rows[indices, :3].sum(axis=1)}


def init(key):
    first, second = jax.random.split(key)
    return {
        "first": jax.random.normal(first, (24, 48)) * 0.2,
        "second": (jax.random.normal(second, (48,)) * 0.2, jnp.zeros(())),
    }


def loss(params, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["first"])  # (batch, 48)
    hidden = jnp.where(jax.random.bernoulli(key, 0.8, hidden.shape), hidden / 0.8, 0)
    weight, bias = params["second"]
    error = hidden @ weight + bias - batch["y"]
    return (error**2).mean(), {"error": jnp.abs(error).mean()}


task = Task(
    init=init, loss=loss, data=Noisy(), optimizer=optax.sgd(1.0), batch_size=16, epochs=1, seed=3
)
'''


def train(task: str, *options: str, cwd: Path) -> Path:
    """Train with one real server and one real worker; where the weights are."""
    where = ("--run-dir", "run", "--exit-when-done")
    with (
        processes.server(task, *where, *options, cwd=cwd) as (server, address),
        processes.worker(task, address, cwd=cwd) as worker,
    ):
        assert server.wait() == 0, server.errors
        assert worker.wait() == 0, worker.errors
    return cwd / "run/weights.safetensors"


def plain_loop(task: str, epochs: int, seed: int, optimizer: str, *, cwd: Path) -> int:
    """Run PLAIN_LOOP in a process of its own; the number of its updates."""
    done = subprocess.run(  # noqa: S603  (our own script)
        [sys.executable, "-c", PLAIN_LOOP, task, str(epochs), str(seed), optimizer],
        cwd=cwd,
        env={**os.environ, "NPROC": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    return int(done.stdout)


def assert_same_bits(trained: Path, plain: Path) -> None:
    ours, theirs = load_file(trained), load_file(plain)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        assert array.shape == theirs[name].shape, name
        assert array.tobytes() == theirs[name].tobytes(), name


def test_one_worker_equals_plain_optax_with_adam(tmp_path: Path) -> None:
    task = "headwater.examples.mnist"

    trained = train(task, "--epochs", "1", cwd=tmp_path)

    assert plain_loop(task, 1, 0, "optax.adam(1e-3)", cwd=tmp_path) == 125
    assert_same_bits(trained, tmp_path / "apart.safetensors")
    assert_same_bits(trained, tmp_path / "fused.safetensors")


@pytest.mark.slow
def test_one_worker_equals_plain_optax_with_momentum_a_schedule_and_noise(tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    spec = "sgd(cosine_decay_schedule(0.1, total_updates), momentum=0.9)"
    optimizer = "optax.sgd(optax.cosine_decay_schedule(0.1, total_updates), momentum=0.9)"
    options = ("--optimizer", spec, "--epochs", "3", "--seed", "11")

    trained = train("noisy.py", *options, cwd=tmp_path)

    assert plain_loop("noisy.py", 3, 11, optimizer, cwd=tmp_path) == 3 * 13
    assert_same_bits(trained, tmp_path / "apart.safetensors")
    assert_same_bits(trained, tmp_path / "fused.safetensors")
