"""Workers that split their batches over several devices, as real processes."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from headwater import ArrayData
from headwater.client.client import Client
from headwater.examples import mnist
from headwater.server.order import BatchOrder
from headwater.worker.data import batch_rng
from headwater.worker.gradient import GradientFunction
from kit.commands import PACED
from kit.commands import PLAIN as PLAIN_TASK
from kit.processes import FREE_PORT, run, server, worker
from kit.waiting import wait_for

MNIST = "headwater.examples.mnist"
FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
PLAIN = {"XLA_FLAGS": ""}


def test_a_run_on_four_devices_ends_where_one_does_and_can_be_replayed(tmp_path: Path) -> None:
    # Batches of 30 and a last one of 10; SGD, for Adam makes much of what is almost 0.
    done = run(
        *("run", "--task", MNIST, "--workers", "1", "--run-dir", "four", "--epochs", "1"),
        *("--batch-size", "30", "--optimizer", "sgd(0.1)", *FREE_PORT),
        cwd=tmp_path,
        **FOUR,
    )
    assert done.status == 0, done.errors

    split, one = load_file(tmp_path / "four" / "weights.safetensors"), on_one_device(30, 0.1)
    assert split.keys() == one.keys()
    for name, tensor in split.items():
        np.testing.assert_allclose(tensor, one[name], rtol=0, atol=1e-5)
    log = (tmp_path / "four" / "logs" / "worker-1.log").read_text()
    assert "batches of 30 are split over 3 of 4 cpu devices" in log
    assert "batches of 10 are split over 2 of 4 cpu devices" in log
    again = run("replay", "four", "--task", MNIST, cwd=tmp_path, **PLAIN)
    assert (again.status, "has the same bits" in again.output) == (0, True), again


def on_one_device(batch_size: int, learning_rate: float) -> dict[str, np.ndarray]:
    """An epoch of the digits in this process."""
    task = mnist.task()
    data = task.dataset
    assert isinstance(data, ArrayData)
    order = BatchOrder(example_count=len(data), batch_size=batch_size, epochs=1, seed=task.seed)
    gradient = GradientFunction(task, task.seed)
    leaves = [np.asarray(leaf) for leaf in task.tree.leaves(task.init(jax.random.key(task.seed)))]
    for position in range(order.total):
        at = order.id(position)
        batch = data.batch(order.indices(position), batch_rng(task.seed, at.epoch, at.number))
        grads = gradient(leaves, [(batch, at.epoch, at.number)]).leaves
        leaves = [w - learning_rate * np.asarray(g) for w, g in zip(leaves, grads, strict=True)]
    return dict(zip(task.tree.names, leaves, strict=True))


def test_workers_show_their_devices_and_sync_refuses_another_number(tmp_path: Path) -> None:
    (tmp_path / "paced.py").write_text(PACED)
    sync = ("--consistency", "sync:2")
    with (
        server("paced.py", *sync, cwd=tmp_path, **PLAIN) as (_, address),
        Client(address) as client,
        worker("paced.py", address, "--devices", "2", cwd=tmp_path, **FOUR),
    ):
        wait_for(lambda: client.status()["workers"], "the first worker")
        (first,) = client.status()["workers"]
        done = run("worker", "--task", "paced.py", "--server", address, cwd=tmp_path, **FOUR)

    assert (first["platform"], first["devices"]) == ("cpu", 2)
    assert done.status == 2, done.errors
    assert "devices: 4 here, 2 there" in done.errors


def test_devices_that_are_not_there_are_named_before_a_server_is_asked(tmp_path: Path) -> None:
    absent = ("worker", "--task", MNIST, "--server", "127.0.0.1:1")

    wrong = run(*absent, "--devices", "first", cwd=tmp_path, NPROC=None)
    many = run(*absent, "--devices", "5", cwd=tmp_path, **FOUR)

    assert (wrong.status, many.status) == (2, 2)
    assert "--devices 'first': it is all, a number for the first so many" in wrong.errors
    assert "--devices 5: there are 4 cpu devices, 0 to 3; name each once" in many.errors


def test_check_shows_over_how_many_devices_a_batch_is_split(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(f"{PLAIN_TASK}\ntask = Task(**fields)\n")

    done = run("check", "--task", "plain.py", "--devices", "3", cwd=tmp_path, **FOUR)

    # Two of the three, for batches of 4.
    assert "on 2 cpu devices, which a batch is split over\n" in done.output, done.errors


def test_run_deals_gpus_out_among_its_workers(tmp_path: Path) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text('#!/bin/sh\nfor n in 0 1 2; do echo "GPU $n: Fake (UUID: GPU-$n)"; done\n')
    smi.chmod(0o755)
    (tmp_path / "seen.py").write_text(
        "import os\n"
        "from pathlib import Path\n"
        "from headwater.examples.mnist import task\n"
        "Path(f'seen-{os.getpid()}').write_text(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))\n"
    )
    done = run(
        *("run", "--task", "seen.py", "--workers", "2", "--epochs", "1"),
        *FREE_PORT,
        cwd=tmp_path,
        PATH=f"{smi.parent}:/usr/bin:/bin",
        CUDA_VISIBLE_DEVICES=None,
        JAX_PLATFORMS="cpu",
    )

    assert done.status == 0, done.errors
    seen = sorted(path.read_text() for path in tmp_path.glob("seen-*"))
    assert seen == ["0,1", "2", "all", "all"]  # two workers, the server, the evaluator
