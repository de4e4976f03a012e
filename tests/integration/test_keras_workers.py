"""Keras's fit with worker processes: killed, joined from elsewhere, interrupted, gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
import psutil
import pytest
from keras import layers

from headwater.client.client import Client
from headwater.client.processes import free_address
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import RunFailed, Unreachable
from headwater.protos.reading import Read, Reader
from headwater.server.embedded import Server
from headwater.worker import keras_worker
from headwater.worker.keras_worker import ParameterServerStrategy
from headwater.worker.link import Patience
from headwater.worker.load import LoadedTask
from headwater.worker.loop import Worker
from kit import counting
from kit.waiting import wait_for

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"  # Keras's
)

PROGRAM = """
import json, os, sys
os.environ["KERAS_BACKEND"] = "jax"
import keras, numpy as np
from headwater.worker.keras_worker import ParameterServerStrategy

from headwater.client.client import Client

server, options, epochs = json.loads(sys.argv[1])

class UntilTwoCompute(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        with Client(options["listen"]) as client:
            workers = client.status()["workers"]
        self.model.stop_training = sum(w["gradients"] > 0 for w in workers) == 2

keras.utils.set_random_seed(0)
x = np.random.default_rng(0).normal(size=(1024, 6)).astype(np.float32)
y = (x.sum(1) > 0).astype(np.int32)
strategy = ParameterServerStrategy(server, **options)
with strategy.scope():
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1)]
    )
loss = keras.losses.BinaryCrossentropy(from_logits=True)
model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
print("begin", flush=True)
callbacks = [] if epochs else [UntilTwoCompute()]
history = model.fit(x, y, epochs=epochs or 1000, batch_size=4, verbose=0, callbacks=callbacks)
print(json.dumps({
    "updates": int(model.optimizer.iterations.value),
    "epochs": history.epoch,
    "kernel": float(np.abs(model.layers[0].kernel.value).sum()),
}), flush=True)
"""

X = np.random.default_rng(0).normal(size=(1024, 6)).astype(np.float32)
Y = (X.sum(1) > 0).astype(np.int32)
STEPS = 256
"""Of an epoch, at 4 examples each."""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)


def compiled(*more: keras.Layer) -> keras.Model:
    model = keras.Sequential(
        [keras.Input((6,)), *more, layers.Dense(8, activation="relu"), layers.Dense(1)]
    )
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"])
    return model


class At(keras.callbacks.Callback):
    """Does something once, when so many batches were done with."""

    def __init__(self, batch: int, act: Callable[[], object]) -> None:
        super().__init__()
        self._left = batch
        self._act = act

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._left -= 1
        if self._left == 0:
            self._act()


def workers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return sorted((c for c in children if "worker" in c.cmdline()), key=lambda c: c.pid)


def program(server: str | None, options: Mapping[str, Any], epochs: int) -> subprocess.Popen[str]:
    Path("program.py").write_text(PROGRAM)
    return subprocess.Popen(  # noqa: S603  (the program above)
        [sys.executable, "program.py", json.dumps([server, options, epochs])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_each_example_counts_once_though_a_worker_is_killed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = ParameterServerStrategy(workers=2).distribute(compiled())

    def kill_first() -> None:
        workers()[0].kill()

    kill = At(20, kill_first)

    history = model.fit(X, Y, epochs=3, batch_size=4, verbose=0, callbacks=[kill])

    assert int(model.optimizer.iterations.value) == 3 * STEPS
    counts = {v.path: float(v.value) for v in model.metrics_variables if v.path.endswith("count")}
    assert counts == dict.fromkeys(counts, 1024.0)
    assert len(counts) == 2
    assert history.history["accuracy"][-1] > 0.8
    assert workers() == []


def test_a_run_whose_workers_are_all_gone_fails_and_the_model_has_its_weights() -> None:
    model = ParameterServerStrategy(workers=2).distribute(compiled())
    kill = At(20, lambda: list(map(psutil.Process.kill, workers())))

    with pytest.raises(RunFailed, match=r"worker-\d was ended by SIGKILL"):
        model.fit(X, Y, epochs=3, batch_size=4, verbose=0, callbacks=[kill])

    assert 0 < model.evaluate(X, Y, verbose=0)[0] < 1
    assert workers() == []


def test_a_push_session_is_no_worker_that_goes_on() -> None:
    address = free_address("127.0.0.1")
    model = ParameterServerStrategy(workers=1, listen=address).distribute(compiled())

    def push_and_kill() -> None:
        with Client(address) as client, client.train() as session:
            weights = session.pull()
            session.push(
                {v.path: np.zeros_like(weights[v.path]) for v in model.trainable_variables}
            )
            assert "session" in {worker["state"] for worker in client.status()["workers"]}
        workers()[0].kill()

    kill = At(20, push_and_kill)

    with pytest.raises(RunFailed, match=r"worker-1 was ended by SIGKILL"):
        model.fit(X, Y, batch_size=4, verbose=0, callbacks=[kill])


def test_workers_are_told_how_tensors_travel() -> None:
    told: list[str] = []
    look = At(1, lambda: told.extend(workers()[0].cmdline()))
    model = ParameterServerStrategy(workers=1, transport="shm").distribute(compiled())

    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[look])

    # With the server's alone, workers would go another way where that one is barred.
    assert told[told.index("--transport") + 1] == "shm"


def test_what_a_layer_raises_in_a_worker_is_shown() -> None:
    here = os.getpid()

    def broken(x: Any) -> Any:
        if os.getpid() != here:
            raise ZeroDivisionError("only in a worker")
        return x

    model = ParameterServerStrategy(workers=1).distribute(compiled(layers.Lambda(broken)))

    with pytest.raises(RunFailed, match=r"(?s)ZeroDivisionError.*only in a worker"):
        model.fit(X, Y, batch_size=4, verbose=0)


def test_the_same_program_elsewhere_is_a_further_worker_and_gets_the_weights() -> None:
    address = free_address("127.0.0.1")
    lead = program(None, {"workers": 1, "listen": address, "name": "shared"}, 0)
    joined = program(address, {"name": "shared"}, 0)
    try:
        found = []
        for process in (lead, joined):
            output, errors = process.communicate(timeout=100)
            assert process.returncode == 0, errors
            found.append(json.loads(output.splitlines()[-1]))
    finally:
        for process in (lead, joined):
            process.kill()
            process.communicate()
    assert found[0]["updates"] == len(found[0]["epochs"]) * STEPS
    assert found[0]["kernel"] == found[1]["kernel"]
    assert found[1]["epochs"] == []


def test_weights_from_within_a_run_are_not_taken_for_its_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    came: list[Read] = []

    def pull(reader: Reader, request: pb.PullRequest) -> Read:
        came.append(whole(reader, request))
        return came[-1]

    whole = Reader.pull
    monkeypatch.setattr(Reader, "pull", pull)
    monkeypatch.setattr(keras_worker, "LAST_TIMEOUT_S", 0.1)
    with Server(counting.task(examples=8, batch_size=1)) as server:
        with contextlib.closing(keras_worker._LastWeights(server.address)) as last:
            wait_for(lambda: came, "the weights of now")
            with pytest.raises(Unreachable, match="ended without its last weights"):
                last.get()
        wait_for(lambda: not last._thread.is_alive(), "it waits no longer")


def test_the_last_weights_are_waited_for_from_before_the_server_is_there() -> None:
    address = free_address("127.0.0.1")
    task = counting.task(examples=8, batch_size=1, epochs=2)
    with (
        contextlib.closing(keras_worker._LastWeights(address)) as last,
        Server(task, listen=address) as server,
    ):
        Worker(LoadedTask(task, "task", {}, ""), address, Patience(address, 10)).run()
        assert server.published.version == 16
        assert last.get().version == 16


def test_a_program_that_was_killed_goes_on_in_its_run_directory() -> None:
    options = {"workers": 1, "run_dir": "run", "snapshot_every": "50", "listen": "127.0.0.1:0"}
    first = program(None, options, 4)
    try:

        def is_under_way() -> bool:
            versions = [int(p.stem.partition("-")[2]) for p in Path("run").glob("snapshot-*.saf*")]
            return any(version > 1.5 * STEPS for version in versions)

        wait_for(is_under_way, "a snapshot in the second epoch", 90, first.poll)
    finally:
        first.kill()
        first.communicate()
    second = program(None, options, 4)
    output, errors = second.communicate(timeout=90)

    assert second.returncode == 0, errors
    found = json.loads(output.splitlines()[-1])
    assert found["updates"] == 4 * STEPS
    assert 1 <= found["epochs"][0] <= 3
    assert found["epochs"][-1] == 3


def test_the_program_in_the_docs_learns() -> None:
    page = (Path(__file__).parents[2] / "docs" / "keras.md").read_text()
    program = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    Path("program.py").write_text(program + "\nprint(history.history['val_accuracy'][-1])\n")

    done = subprocess.run(
        [sys.executable, "program.py"], capture_output=True, text=True, timeout=100, check=False
    )

    assert done.returncode == 0, done.stderr
    assert re.search(r"training at 127.0.0.1:\d+, 2 workers; kept in runs/keras-", done.stderr)
    assert float(done.stdout.split()[-1]) > 0.88


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["2", "4"])
def test_the_example_learns_what_it_says(workers: str) -> None:
    command = ["-m", "headwater.examples.keras_mnist", "--workers", workers]
    done = subprocess.run(  # noqa: S603  (our own)
        [sys.executable, *command], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"^([\d.]+)% of 1,000 held-out digits", done.stdout, re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) > 91


def test_ctrl_c_ends_the_workers_as_well() -> None:
    lead = program(None, {"workers": 2}, 1000)
    try:
        children = wait_for(
            lambda: len(c := psutil.Process(lead.pid).children()) == 2 and c, "its workers", 60
        )
        wait_for(lambda: list(Path("runs").glob("*/logs/worker-2.log")), "they have logs", 60)
        lead.send_signal(signal.SIGINT)
        _, errors = lead.communicate(timeout=15)
    finally:
        lead.kill()
        lead.communicate()
    assert "KeyboardInterrupt" in errors
    assert lead.returncode != 0
    _, alive = psutil.wait_procs(children, timeout=1)
    assert alive == []
