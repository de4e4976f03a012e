"""Sync is reproducible: the same bits, whoever computes, and whoever dies on the way."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from headwater.client.client import Client
from headwater.protos.errors import HeadwaterError
from kit import nets
from kit.processes import Command, server, status_of, worker
from kit.waiting import wait_for

MNIST = "headwater.examples.mnist"
NETS = Path(nets.__file__)

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


@contextlib.contextmanager
def cores(count: int) -> Iterator[None]:
    """What is started inside may use so many cores."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("processes cannot be given cores here")
    os.sched_setaffinity(0, CORES[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)


def digest(weights: Path) -> str:
    """SHA-256 over all of the weights."""
    arrays = load_file(weights)
    whole = hashlib.sha256()
    for name in sorted(arrays):
        whole.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return whole.hexdigest()


def train(
    folder: Path,
    workers: int | Sequence[int],
    *options: str,
    task: str | Path = MNIST,
    words: Sequence[str] = (),
    kills: int = 0,
    server_kills: int = 0,
    seed: int = 0,
) -> str:
    """A run in groups of four; the hash of its final weights.

    Args:
      workers: How many; or the cores that each of them may use.
      words: Of the task's options.
      kills: Workers to kill on the way, each at a random moment, and replaced.
      server_kills: Likewise, and started again.
    """
    folder.mkdir()
    luck = random.Random(seed)  # noqa: S311
    run = ["--consistency", "sync:4", "--run-dir", "run", "--snapshot-every", "5", *options, *words]
    shares = [len(CORES)] * workers if isinstance(workers, int) else workers
    free = {"NPROC": None}  # as a user starts them: Headwater has to see to the threads
    with contextlib.ExitStack() as stack:
        command, address = stack.enter_context(server(task, *run, cwd=folder, **free))
        started: list[Command] = []
        for share in shares:
            with cores(share):
                started.append(
                    stack.enter_context(worker(task, address, *words, cwd=folder, **free))
                )
        fates = ["worker"] * kills + ["server"] * server_kills
        luck.shuffle(fates)
        killed = 0
        for fate in fates:
            version = int(str(status_of(address).get("version", 0)))

            def has_moved(before: int = version) -> bool:
                now = status_of(address)
                # On a slow machine it may be over before the last of them is to be killed.
                return int(str(now.get("version", 0))) > before or now.get("state") == "finished"

            wait_for(has_moved, "an update", 90, lambda: status_of(address))
            if status_of(address).get("state") == "finished":
                break
            time.sleep(luck.random() * 0.1)  # at any point of an update
            killed += 1
            if fate == "worker":
                started[luck.randrange(len(started))].kill()
                started.append(
                    stack.enter_context(worker(task, address, *words, cwd=folder, **free))
                )
            else:
                command.kill()
                # Continued without --consistency: the run knows how it was started.
                again = ("server", "--task", task, "--listen", address, "--run-dir", "run", *words)
                command = stack.enter_context(Command(*again, cwd=folder, **free))
        assert killed or not fates, "over before anything was killed: give it more to do"
        wait_for(lambda: status_of(address).get("state") == "finished", "the end", 120)
        with Client(address) as client:
            status = client.status()
            with contextlib.suppress(HeadwaterError):
                client.stop()
        command.wait()
    assert status["staleness"]["max"] == 0
    assert status["batches_applied"] == status["batches_total"]
    return digest(folder / "run/weights.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of four epochs with one worker."""
    return train(tmp_path_factory.mktemp("alone") / "run", 1, "--epochs", "4")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [2, 3, 5])
def test_the_weights_are_the_same_with_more_workers(
    tmp_path: Path, alone: str, workers: int
) -> None:
    assert train(tmp_path / "more", workers, "--epochs", "4") == alone


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(3))
def test_the_weights_are_the_same_under_fire(tmp_path: Path, alone: str, seed: int) -> None:
    under_fire = train(tmp_path / "fire", 3, "--epochs", "4", kills=4, server_kills=2, seed=seed)
    assert under_fire == alone


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(len(CORES) < 2, reason="there is one core")
@pytest.mark.parametrize(
    "words",
    # The last two have other bits with two threads than with one, where nobody sees to it.
    ["kind=wide batch_size=512", "kind=wide batch_size=500", "kind=conv batch_size=2000"],
)
def test_workers_with_more_cores_compute_the_same_bits(tmp_path: Path, words: str) -> None:
    options = [word for option in words.split() for word in ("--task-option", option)]

    def hash_of(name: str, workers: Sequence[int]) -> str:
        return train(tmp_path / name, workers, task=NETS, words=options)

    one_core = hash_of("one", [1])
    assert hash_of("two", [2]) == one_core
    assert hash_of("both", [1, 2, 2]) == one_core


PLAIN_LOOP = """
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from headwater.examples.mnist import task as mnist
from headwater.server.order import BatchOrder

GROUP = 4
task, tx = mnist(), optax.adam(1e-3)
order = BatchOrder(example_count=len(task.dataset), batch_size=32, epochs=1, seed=0)


@jax.jit
def gradient(params, batch):
    return jax.grad(lambda p: task.loss(p, batch, None)[0])(params)


@jax.jit
def update(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def in_order(params, batches):
    # sum(n_i g_i) / sum(n_i), one operation after the other, from the first batch to the last
    total, examples = None, 0
    for batch in batches:
        count = len(batch["label"])
        scaled = jax.tree.map(lambda g: np.asarray(g) * np.float32(count), gradient(params, batch))
        total = scaled if total is None else jax.tree.map(np.add, total, scaled)
        examples += count
    return jax.tree.map(lambda t: t / np.float32(examples), total)


def at_once(params, batches):
    return gradient(params, {k: np.concatenate([b[k] for b in batches]) for k in batches[0]})


for mean in (in_order, at_once):
    params = task.init(jax.random.key(0))
    state = tx.init(params)
    for start in range(0, order.total, GROUP):
        positions = range(start, min(start + GROUP, order.total))
        batches = [task.dataset.batch(order.indices(p), None) for p in positions]
        params, state = update(mean(params, batches), state, params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }
    save_file(named, f"{mean.__name__}.safetensors")
"""


def test_the_weights_are_those_of_a_plain_optax_loop_whoever_computes_and_whoever_dies(
    tmp_path: Path,
) -> None:
    trained = train(tmp_path / "trained", 3, "--epochs", "1", kills=1, server_kills=1)

    subprocess.run(  # noqa: S603  (our own script)
        [sys.executable, "-c", PLAIN_LOOP],
        cwd=tmp_path,
        env={**os.environ, "NPROC": "1"},
        check=True,
        timeout=120,
    )

    assert digest(tmp_path / "in_order.safetensors") == trained
    ours = load_file(tmp_path / "trained/run/weights.safetensors")
    theirs = load_file(tmp_path / "at_once.safetensors")
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)
