"""`fit`: trains a task wherever it was made, by processes of which nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import pytest

from headwater import ArrayData, Task, fit
from headwater.protos import files
from headwater.protos.errors import HeadwaterError, RunFailed, UsageError
from kit import counting
from kit.disk import FaultyDisk, set_faults
from kit.waiting import wait_for

TOLD_TO_END_S = 5.0
"""Promised from Ctrl-C to the end of everything."""
ALONE_S = 15.0
"""For what fit started to end when its process was killed."""


def halved(value: jax.Array) -> jax.Array:
    """Of this module, which no other process could import."""
    return value / 2


def quadratic(**changes: Any) -> Task:
    """Two weights that go to 1, by functions that exist here alone."""
    goal = np.ones(2, np.float32)

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        return halved(((params["w"] - goal) ** 2).sum() + 0 * batch["x"].sum())

    fields = {
        "init": lambda key: {"w": jnp.zeros(2)},
        "loss": loss,
        "data": ArrayData(x=np.arange(32)),
        "optimizer": optax.sgd(0.5),
        "batch_size": 4,
        "evaluate": lambda params: {"distance": abs(params["w"] - goal).max()},
    }
    return Task(**{**fields, **changes})  # type: ignore[arg-type]


def counted(epochs: int) -> Task:
    """The counting task, with an evaluation made in this function."""
    task = counting.task(examples=512, epochs=epochs, batch_size=16)
    mean = jax.jit(lambda params: {"count": params["count"].mean()})
    return Task(**{**vars(task), "evaluate": mean})


def here() -> tuple[Any, ...]:
    """What fit must leave as it is, in this process."""
    gc.collect()  # grpc.aio's own thread goes with the last of its objects
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return handlers, set(threading.enumerate()), psutil.Process().children(), dict(os.environ)


def assert_left_as_it_was(before: tuple[Any, ...]) -> None:
    wait_for(lambda: here() == before, "nothing is left", 5, lambda: (before, here()))


# --------------------------------------------------------------- from start to end


def test_in_a_running_event_loop_every_example_counts_once_and_nothing_is_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task, before = counted(epochs=3), here()

    async def cell() -> Any:  # as a notebook runs it
        return fit(task, 2, name="counted", run_dir=tmp_path / "run", batch_size=8)

    result = asyncio.run(cell())

    assert result.state == "finished"
    assert result.weights.keys() == {"count", "padding"}
    assert np.all(result.weights["count"] == 3)
    assert (result.weights.version, result.weights.epoch) == (3 * 512 // 8, 3)
    assert jax.tree.all(jax.tree.map(np.array_equal, result.params, dict(result.weights)))
    versions = [evaluation.version for evaluation in result.history]
    assert versions == sorted(versions)
    assert (result.history[-1].epoch, versions[-1]) == (3, result.weights.version)
    assert result.metrics == result.history[-1].metrics == {"count": 3.0}
    assert result.run_dir == tmp_path / "run"
    assert repr(result) == f"<finished at version 192, count 3; {tmp_path / 'run'}>"
    assert {path.name for path in (tmp_path / "run/logs").iterdir()} == {
        *("server.log", "worker-1.log", "worker-2.log", "evaluator.log")
    }
    assert_left_as_it_was(before)
    assert capfd.readouterr().out == ""


SCRIPT = """
print("begins")
import jax, jax.numpy as jnp, numpy as np, optax
from headwater import ArrayData, Task, fit

jax.config.update("jax_enable_x64", True)

@jax.jit
def distance(params, goal):
    return ((params["w"] - goal) ** 2).sum()

goal = jnp.arange(3.0)
task = Task(
    init=lambda key: {"w": jnp.zeros(3)},
    loss=lambda params, batch, key: distance(params, goal) + 0 * batch["x"].sum(),
    data=ArrayData(x=np.arange(16)),
    optimizer=optax.chain(optax.clip(10.0), optax.sgd(0.5)),
    batch_size=4,
)
result = fit(task, workers=1, consistency="sync:1")
print(result.params["w"].dtype, result.params["w"].tolist())
print(result.run_dir, result.history, result.metrics)
"""


def python(*arguments: str, cwd: Path, text: str = "") -> tuple[int, str, str]:
    """Its status, output and errors."""
    done = subprocess.run(  # noqa: S603  (our own text)
        [sys.executable, *arguments],
        cwd=cwd, input=text, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_script_without_a_guard_runs_once_and_its_settings_of_jax_hold(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)

    status, output, errors = python("script.py", cwd=tmp_path)

    assert status == 0, errors
    begins, weights, rest = output.splitlines()
    assert (begins, weights) == ("begins", "float64 [0.0, 1.0, 2.0]")
    assert re.fullmatch(r"runs/task-\S+ \(\) {}", rest)


SESSION = """
import jax.numpy as jnp, numpy as np, optax
from headwater import ArrayData, Task, fit
data = ArrayData(x=np.ones((8, 2), np.float32))
init = lambda key: {"w": jnp.zeros(2)}
def loss(params, batch, key):
    return params["v"].sum()

def train(**changes):
    fields = dict(init=init, loss=loss, data=data, optimizer="sgd(1.0)", batch_size=8)
    return fit(Task(**{**fields, **changes}), workers=1, quiet=True)

train()
train(loss=lambda params, batch, key: (params["w"] * batch["x"]).sum()).params["w"].tolist()
"""


def test_what_was_typed_in_a_session_is_trained_and_its_traceback_shown(tmp_path: Path) -> None:
    status, output, errors = python("-i", "-q", cwd=tmp_path, text=SESSION)

    assert status == 0, errors
    assert output.splitlines()[-1] == "[-8.0, -8.0]", errors
    _, _, said = errors.partition("RunFailed: ")
    assert said.startswith("worker-1 failed: the task task raised\nTraceback")
    assert re.search(r'File "<stdin>", line \d+, in loss\nKeyError: \'v\'', said), errors


# ------------------------------------------------------------------ in this process


def test_without_workers_all_user_code_runs_in_this_thread_and_counts_once(tmp_path: Path) -> None:
    task, threads = counted(epochs=2), set()

    class Data(ArrayData):
        def batch(self, indices: Any, rng: np.random.Generator) -> Any:
            threads.add(threading.current_thread())
            return super().batch(indices, rng)

    def evaluate(params: Any) -> dict[str, Any]:
        threads.add(threading.current_thread())
        return {"least": params["count"].min(), "most": params["count"].max()}

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        threads.add(threading.current_thread())
        return task.loss(params, batch, key)

    own = Task(**{**vars(task), "data": Data(index=np.arange(512)), "loss": loss})
    own = Task(**{**vars(own), "evaluate": evaluate})
    before = here()

    result = fit(own, 0, run_dir=tmp_path / "run", durability="log", lease_seconds=1)

    assert np.all(result.weights["count"] == 2)
    assert [(e.version, e.epoch, e.metrics) for e in result.history] == [
        (32, 1, {"least": 1, "most": 1}),
        (64, 2, {"least": 2, "most": 2}),
    ]
    assert threads == {threading.current_thread()}
    assert_left_as_it_was(before)


class Mine(Exception):
    pass


def test_what_evaluate_was_given_may_be_kept(tmp_path: Path) -> None:
    kept: list[np.ndarray] = []

    def evaluate(params: Any) -> dict[str, float]:
        kept.append(params["w"])
        return {"sum": params["w"].sum()}

    task = quadratic(optimizer=optax.sgd(0.01), epochs=5, evaluate=evaluate)
    fit(task, workers=0, run_dir=tmp_path / "run", quiet=True)

    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    sums = [line["metrics"]["sum"] for line in lines if line["kind"] == "evaluation"]
    assert len(set(sums)) == 5
    assert [float(weights.sum()) for weights in kept] == sums


@pytest.mark.parametrize("where", ["loss", "data", "evaluate"])
def test_without_workers_an_exception_goes_through_as_it_is(where: str, tmp_path: Path) -> None:
    def guilty(*arguments: Any) -> Any:
        raise Mine(where)

    class Data(ArrayData):
        def batch(self, indices: Any, rng: np.random.Generator) -> Any:
            return guilty() if rng.random() > 0.5 else super().batch(indices, rng)

    task = quadratic(**{where: Data(x=np.arange(32)) if where == "data" else guilty})
    before = here()

    with pytest.raises(Mine, match=where) as raised:
        fit(task, 0, run_dir=tmp_path / "run", quiet=True)

    assert traceback.extract_tb(raised.tb)[-1].name == "guilty"
    assert_left_as_it_was(before)


def test_weights_of_an_earlier_version_are_not_passed_off_as_the_final_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when a run that was continued has ended."""
    task, run_dir = quadratic(evaluate=None), tmp_path / "run"
    control = tmp_path / "faults.json"
    monkeypatch.setattr(files, "DISK", FaultyDisk(control))
    assert fit(task, 0, run_dir=run_dir, epochs=1, quiet=True).weights.version == 8
    set_faults(control, {"operation": "create", "files": "weights.safetensors*", "error": "ENOSPC"})

    with pytest.raises(HeadwaterError, match=r"has version 8 .* ended at version 16: ") as raised:
        fit(task, 0, run_dir=run_dir, epochs=2, quiet=True)

    assert f"{run_dir / f'snapshot-{16:020}.safetensors'}: make room, " in str(raised.value)
    set_faults(control)
    assert fit(task, 0, run_dir=run_dir, epochs=2, quiet=True).weights.version == 16


def test_without_workers_a_run_that_fails_says_why(tmp_path: Path) -> None:
    task = quadratic(loss=lambda params, batch, key: params["w"].sum() * jnp.nan)

    with pytest.raises(RunFailed, match="finite"):
        fit(task, 0, run_dir=tmp_path / "run", quiet=True)


# -------------------------------------------------------------------------- ending

ENDLESS = """
import signal, time, jax, jax.numpy as jnp, numpy as np
from headwater import ArrayData, Task, fit

class Data(ArrayData):
    def batch(self, indices, rng):
        time.sleep(0.01)
        return super().batch(indices, rng)

task = Task(init=lambda key: {"w": jnp.zeros(2)}, loss=lambda params, batch, key: params["w"].sum(),
            data=Data(x=np.arange(64)), optimizer="sgd(1e-3)", batch_size=8, epochs=100_000,
            evaluate=lambda params: {"w": params["w"][0]})
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
try:
    fit(task, workers=2, run_dir="run")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_what_was_started_ends_with_ctrl_c_or_its_parent(number: int, tmp_path: Path) -> None:
    process = subprocess.Popen(  # noqa: S603  (our own text)
        [sys.executable, "-c", ENDLESS],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    started: list[psutil.Process] = []
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        wait_for(lambda: metrics.exists() and "evaluation" in metrics.read_text(), "it trains", 60)
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) == 4

        process.send_signal(number)

        output, _ = process.communicate(timeout=TOLD_TO_END_S)
        assert output == ("interrupted\n" if number == signal.SIGINT else "")
        left = 0.0 if number == signal.SIGINT else ALONE_S
        _, alive = psutil.wait_procs(started, left)
        assert alive == []
        assert (tmp_path / "run/weights.safetensors").exists()
    finally:
        for one in (process, *started):
            if one.poll() is None if one is process else one.is_running():
                one.kill()


BLOCKING = """
    fit(task, workers=2, run_dir="run")
"""
IN_A_COROUTINE = """
    async def main():
        fit(task, workers=0, run_dir="run")
    import asyncio
    asyncio.run(main())
"""


def test_one_ctrl_c_ends_a_training_in_this_process_in_a_coroutine_too(tmp_path: Path) -> None:
    process = subprocess.Popen(  # noqa: S603  (our own text)
        [sys.executable, "-c", ENDLESS.replace(BLOCKING, IN_A_COROUTINE)],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        wait_for(lambda: metrics.exists() and "evaluation" in metrics.read_text(), "it trains", 60)

        process.send_signal(signal.SIGINT)

        output, _ = process.communicate(timeout=TOLD_TO_END_S)
        assert output == "interrupted\n"
        assert (tmp_path / "run/weights.safetensors").exists()
    finally:
        process.kill()


# --------------------------------------------------------------------- wrong input


def test_what_cannot_work_is_said_before_anything_starts(tmp_path: Path) -> None:
    lock = threading.Lock()
    wrong: dict[str, tuple[Task, dict[str, Any]]] = {
        r"fit takes no 'epoch'; did you mean 'epochs'\?": (quadratic(), {"epoch": 3}),
        r"Invalid value for '--epochs'": (quadratic(), {"epochs": "many"}),
        r"--consistency 'sinc:2'": (quadratic(), {"consistency": "sinc:2"}),
        r"workers is a whole number from 0 on, not -1": (quadratic(), {"workers": -1}),
        r"Task\.evaluate uses lock: cannot pickle '_thread\.lock' object; load or make it inside": (
            quadratic(evaluate=lambda params: {"locked": lock.locked()}),
            {},
        ),
    }
    for text, (task, options) in wrong.items():
        with pytest.raises(UsageError, match=text) as raised:
            fit(task, **{"run_dir": tmp_path / "run", **options})
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_file_that_calls_fit_when_it_is_loaded_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "looping.py").write_text(SCRIPT)

    status, _, errors = python(
        "-m", "headwater.client.main", "check", "--task", "looping.py", cwd=tmp_path
    )

    assert status == 2
    assert 'put the call under `if __name__ == "__main__":`' in errors
