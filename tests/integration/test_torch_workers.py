"""Workers in PyTorch: beside JAX ones and alone, killed, in sync mode, and refused."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from headwater import Server, Task
from headwater.client.client import Client
from headwater.examples import mnist, mnist_torch
from headwater.protos.errors import HeadwaterError, Reason, Refused
from headwater.worker.link import Patience
from headwater.worker.load import LoadedTask
from headwater.worker.loop import Worker
from headwater.worker.torch_worker import load_weights
from kit import counting, counting_torch
from kit.processes import FREE_PORT, Command, run, server, worker
from kit.waiting import wait_for

COUNTING = Path(counting.__file__)
COUNTING_TORCH = Path(counting_torch.__file__)
MNIST = "headwater.examples.mnist"
MNIST_TORCH = "headwater.examples.mnist_torch"

torch.set_num_threads(1)  # threads that share cores with other tests wait for one another


def gradients(status, name):
    """How many of the worker's were applied so far."""
    return sum(w["gradients"] for w in status["workers"] if w["name"] == name)


@pytest.mark.timeout(180)
def test_beside_jax_workers_every_batch_counts_once_although_workers_are_killed(tmp_path) -> None:
    slow = tmp_path / "slow"
    slow.touch()
    options = counting.options(load_s=0.02, compute_s=0.1, slow_while=slow)
    with contextlib.ExitStack() as stack:
        _, address = stack.enter_context(server(COUNTING, *options, cwd=tmp_path))
        client = stack.enter_context(Client(address))
        client.pause()  # until all are there

        def hire(task: Path, name: str) -> Command:
            command = worker(task, address, *options, "--name", name, cwd=tmp_path)
            return stack.enter_context(command)

        alive = {name: hire(COUNTING, name) for name in ("jax-1", "jax-2")}
        alive |= {name: hire(COUNTING_TORCH, name) for name in ("torch-1", "torch-2")}

        def has_computed(name: str) -> None:
            computed = lambda: gradients(client.status(), name) > 2  # noqa: E731
            wait_for(computed, f"{name} computes", 60, client.status)

        wait_for(lambda: len(client.status()["workers"]) == 4, "all have joined", 60)
        client.resume()
        for name in ("torch-1", "jax-1", "torch-2"):
            has_computed(name)
            alive.pop(name).kill()
        alive["torch-3"] = hire(COUNTING_TORCH, "torch-3")
        has_computed("jax-2")
        has_computed("torch-3")
        assert client.status()["state"] == "training", "the kills must hit while the run goes on"
        slow.unlink()
        for command in alive.values():
            assert command.wait() == 0, command.errors

        status = counting.assert_exactly_once(client)

    assert status["version"] == 3 * 4096 // 32
    assert not any(status["rejected"].values()), status["rejected"]


class Joined(threading.Thread):
    """A worker in this process, in a thread of its own."""

    def __init__(self, task: Task, server: Server, name: str) -> None:
        super().__init__(name=name, daemon=True)
        loaded = LoadedTask(task, "mnist", {}, "")
        self.worker = Worker(loaded, server.address, Patience(server.address, 10), name=name)
        self.start()

    def run(self) -> None:
        with contextlib.suppress(HeadwaterError):  # the server ends first where a test is over
            self.worker.run()


def test_a_mixed_run_learns_as_either_alone(tmp_path) -> None:
    """Three epochs with JAX or PyTorch alone recognise 92.0 and 91.9 % of the digits (seed 0)."""
    with (
        Server(mnist.task(), name="mnist", epochs=3, run_dir=tmp_path / "run") as served,
        Client(served.address) as client,
    ):
        client.pause()  # until both are there
        workers = [
            Joined(mnist.task(), served, "jax"),
            Joined(mnist_torch.task(), served, "torch"),
        ]
        wait_for(lambda: len(client.status()["workers"]) == 2, "both have joined", 60)
        client.resume()
        for name in ("jax", "torch"):
            wait_for(lambda name=name: gradients(client.status(), name) > 20, f"{name} computes")
        wait_for(lambda: client.status()["state"] == "finished", "the end", 60)
        status, weights = client.status(), client.pull()
        for one in workers:
            one.join(10)

    assert status["version"] == status["batches_applied"] == 3 * 125
    test = mnist.load("sample")[1]
    by_jax = float(mnist.measure(mnist.task().restore(weights), test)["accuracy"])
    module = mnist_torch.Net()
    load_weights(module, weights, mnist_torch.MAPPING)
    guess = module(torch.from_numpy(test["image"])).argmax(1).numpy()
    by_torch = (guess == test["label"]).mean()
    assert by_jax == pytest.approx(by_torch, abs=0.0011)  # one of them that is near the edge
    assert by_jax > 0.905


def test_in_a_sync_run_of_jax_workers_a_torch_worker_is_refused(tmp_path) -> None:
    with (
        Server(
            mnist.task(), name="mnist", epochs=200, consistency="sync:2", run_dir=tmp_path / "run"
        ) as served,
        Client(served.address) as client,
    ):
        jax = Joined(mnist.task(), served, "jax")
        wait_for(lambda: client.status()["version"] > 0, "an update", 60)

        loaded = LoadedTask(mnist_torch.task(), "mnist", {}, "")
        with pytest.raises(
            Refused, match=r"\(here: the worker, there: the run\): framework: torch .*, jax there"
        ) as refused:
            Worker(loaded, served.address, Patience(served.address, 10)).run()

        assert refused.value.reason is Reason.COMPUTE_MISMATCH
        client.stop()
        jax.join(10)


WRONG = """
from headwater.examples import mnist, mnist_torch
from headwater.worker.torch_worker import torch_task

task = torch_task(
    name="mnist", like=mnist.task(), model=mnist_torch.Net, loss=mnist_torch.loss,
    mapping={"hidden/kernel": "fc1.weight", "hidden/bias": "fc1.bias", "output/bias": "fc2.bias"},
)
"""

TABLE = """\
  SERVED                          MODEL
  hidden/bias    float32[64]      fc1.bias    float32[64]      ok
  hidden/kernel  float32[784,64]  fc1.weight  float32[64,784]  the shapes differ
  output/bias    float32[10]      fc2.bias    float32[10]      ok
  output/kernel  float32[64,10]                                is not mapped
                                  fc2.weight  float32[10,64]   is not mapped
"""


def test_a_mapping_that_does_not_fit_ends_the_worker_with_the_table(tmp_path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)

    ended = run("worker", "--task", "wrong.py", "--server", "127.0.0.1:1", cwd=tmp_path)

    assert ended.status == 2
    assert "Traceback" not in ended.errors
    assert ended.errors.splitlines()[1:] == TABLE.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_example_trains_in_processes_and_its_state_counts_every_batch(tmp_path) -> None:
    """By shared memory, with gradients of 8 bits, and two workers."""
    ended = run(
        *("run", "--task", "headwater.examples.torch_mlp", "--workers", "2"),
        *(*FREE_PORT, "--run-dir", "run", "--compress", "int8"),
        cwd=tmp_path, timeout_s=150,
    )  # fmt: skip

    assert ended.status == 0, ended.errors
    weights = load_file(tmp_path / "run/weights.safetensors")
    accuracy = float(re.findall(r"^evaluation +accuracy (\S+)", ended.output, re.MULTILINE)[0])
    assert accuracy > 0.92
    assert int(weights["norm.num_batches_tracked"]) == 625
    logs = "".join(path.read_text() for path in (tmp_path / "run/logs").iterdir())
    assert logs.count("shared memory") >= 2, logs


def digest(weights: Path) -> str:
    arrays = load_file(weights)
    return hashlib.sha256(b"".join(arrays[n].tobytes() for n in sorted(arrays))).hexdigest()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sync_run_of_torch_workers_is_the_same_whoever_computes_and_is_replayed(tmp_path) -> None:
    made = []
    for workers in (1, 2):
        folder = f"of-{workers}"
        ended = run(
            *("run", "--task", "headwater.examples.torch_mlp", "--workers", workers),
            *(*FREE_PORT, "--run-dir", folder, "--consistency", "sync:2"),
            *("--epochs", "2"),
            cwd=tmp_path, timeout_s=120, NPROC=None,
        )  # fmt: skip
        assert ended.status == 0, ended.errors
        made.append(digest(tmp_path / folder / "weights.safetensors"))

    assert made[0] == made[1]
    again = run(
        "replay", "of-2", "--task", "headwater.examples.torch_mlp", cwd=tmp_path, timeout_s=120
    )
    assert again.status == 0, again.errors
    assert "has the same bits as in the run" in again.output
    assert "the server: framework" not in again.errors + again.output  # which is JAX for all


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_with_local_steps_a_mixed_run_learns(tmp_path) -> None:
    options = ("--epochs", "6", "--local-steps", "4", "--consistency", "bounded:2")
    with (
        server(MNIST, *options, "--run-dir", "run", cwd=tmp_path) as (_, address),
        worker(MNIST, address, "--name", "jax", cwd=tmp_path) as one,
        worker(MNIST_TORCH, address, "--name", "torch", cwd=tmp_path) as other,
        Client(address) as client,
    ):
        assert one.wait(120) == 0, one.errors
        assert other.wait(120) == 0, other.errors
        found = run("evaluate", "--task", MNIST, "--server", address, cwd=tmp_path)
        assert client.status()["batches_applied"] == 6 * 125
    assert float(found.output.split("accuracy ")[1].split()[0]) > 0.88
