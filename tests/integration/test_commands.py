"""The commands by hand: a server and workers in processes of their own, looked at and steered.

Endless runs are paced by their data, and begin when the file `go` is there; so
nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from headwater import __version__
from headwater.client.main import PROCESSES
from headwater.client.processes import free_address
from kit import processes
from kit.processes import Command, Finished, run, status_of
from kit.waiting import wait_for

PACED = """
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

from headwater import Task

WIDTH, SEED = 3, 0


class Paced:
    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return self.examples

    def batch(self, indices, rng):
        while not Path("go").exists():
            time.sleep(0.01)
        time.sleep(0.02)
        return {"x": np.ones((len(indices), 3), np.float32)}


def loss(params, batch, key):
    error = params["w"].sum() + params["b"] - batch["x"].sum(axis=1)  # (batch,)
    return (error**2).mean(), {"error": jnp.abs(error).mean()}


def task(examples: int = 64, epochs: int = 100_000):
    return Task(
        init=lambda key: {"w": jnp.zeros(WIDTH), "b": jnp.zeros(())},
        loss=loss,
        data=Paced(examples),
        optimizer=optax.sgd(1e-3),
        batch_size=8,
        epochs=epochs,
        seed=SEED,
        evaluate=lambda params: {"bias": params["b"]},
    )
"""

PLAIN = """
import jax.numpy as jnp
import numpy as np
import optax

from headwater import ArrayData, Task


def init(key):
    return {"w": jnp.ones(3)}


def loss(params, batch, key):
    return (params["w"] * batch["x"]).mean()


def evaluate(params):
    return {"sum": params["w"].sum()}


fields = dict(
    init=init,
    loss=loss,
    data=ArrayData(x=np.ones((8, 3), np.float32)),
    optimizer=optax.sgd(0.1),
    batch_size=4,
    evaluate=evaluate,
)
"""

INTERRUPTED = (130, -signal.SIGINT)
"""Both are 130 to a shell."""

FREE_PORT = ("--listen", "127.0.0.1:0")

TALKING = {
    "status": ("status",),
    "workers": ("workers",),
    "watch": ("watch",),
    "pull": ("pull", "out.safetensors"),
    "pause": ("pause",),
    "resume": ("resume",),
    "evict": ("evict", "ada"),
    "stop": ("stop",),
    "evaluate": ("evaluate", "--task", "paced.py"),
}
"""Every command that asks a server something and ends."""


def say(where: str, finished: Finished) -> str:
    return f"{where}: {finished.status}\n{finished.output}{finished.errors}"


def assert_fails(finished: Finished, status: int, errors: str) -> None:
    """It ended with `status`, having said `errors`, which is all of stderr, and nothing else."""
    assert finished == (status, "", f"{errors}\n")
    assert "Traceback" not in finished.errors


def assert_matches(pattern: str, text: str) -> None:
    assert re.fullmatch(pattern, text), f"{text!r} is not\n{pattern!r}"


# --------------------------------------------------------------- one training


class Training(NamedTuple):
    """An endless run, with one worker, ada."""

    address: str
    cwd: Path
    run_dir: Path
    server_pid: int

    def run(self, *arguments: str | Path, **environment: str) -> Finished:
        server = {"HEADWATER_SERVER": self.address, **environment}
        return run(*arguments, cwd=self.cwd, **server)

    def ok(self, *arguments: str | Path) -> str:
        """The output of a command that must succeed, and say nothing on stderr."""
        finished = self.run(*arguments)
        assert (finished.status, finished.errors) == (0, ""), say(str(arguments), finished)
        return finished.output

    def status(self) -> dict[str, Any]:
        return status_of(self.address)

    def wait_past(self, version: int) -> None:
        wait_for(lambda: self.status()["version"] > version, f"a version after {version}")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    cwd = tmp_path_factory.mktemp("training")
    (cwd / "paced.py").write_text(PACED)
    (cwd / "go").touch()
    with (
        processes.server("paced.py", cwd=cwd) as (server, address),
        processes.worker("paced.py", address, "--name", "ada", cwd=cwd),
    ):
        run_dir = (cwd / "runs/latest").resolve()
        training = Training(address, cwd, run_dir, server.process.pid)
        training.wait_past(0)
        yield training


# --------------------------------------------------------------------- looking


def test_status_shows_the_run_on_one_screen(training: Training) -> None:
    lines = [line.rstrip() for line in training.ok("status").splitlines()]
    expected = [
        r"run         paced [0-9]{8}-[0-9]{6}-[0-9a-f]{4}, incarnation 1",
        r"state       training",
        r"version     [\d,]+",
        r"durable     [\d,]+ \(a snapshot every 30 s\)",
        r"epoch       [\d,]+/100000",
        r"batches     [\d,]+ of 800,000 applied",
        r"training    loss \S+  error \S+",
        r"(evaluation  bias \S+ \(version [\d,]+\))?",  # when another test evaluated before
        r"speed       [\d,.]+ updates/s, [\d,]+ examples/s",
        r"staleness   mean \d\.\d\d, p50 \d, p99 \d, max \d(  0 .+ \d\+?)?",
        r"push time   ░ wait [\d.]+  ▒ load [\d.]+  █ compute [\d.]+  ▓ wire [\d.]+ ms  [░▒█▓]+",
        r"rejected    .+",
        r"workers     1: 1 \w+",
        r"optimizer   the task's own optimizer, async",
        r"parameters  4; \S+ k?B in, \S+ k?B out",
        r"directory   runs/paced-\S+",
    ]
    if not any(line.startswith("evaluation") for line in lines):
        lines.insert(7, "")
    assert len(lines) == len(expected), lines
    for pattern, line in zip(expected, lines, strict=True):
        assert_matches(pattern, line)


PROMISED = {
    "run_id": str,
    "incarnation": int,
    "state": str,
    "version": int,
    "durable_version": int,
    "epoch": int,
    "epochs": int,
    "batches_applied": int,
    "batches_total": int,
    "loss": float,
    "metrics": dict,
    "updates_per_second": float,
    "examples_per_second": float,
    "staleness": {"mean": float, "p50": int, "p99": int, "max": int, "histogram": dict},
    "rejected": {
        "stale": int,
        "lease_lost": int,
        "duplicate": int,
        "nonfinite": int,
        "malformed": int,
    },
    "parameters": int,
    "bytes_in": int,
    "bytes_out": int,
    "workers": list,
}
PROMISED_OF_A_WORKER = {
    "id": int,
    "name": str,
    "host": str,
    "platform": str,
    "devices": int,
    "state": str,
    "gradients": int,
    "examples_per_second": float,
    "staleness_mean": float,
}


def assert_has_fields(value: Any, fields: dict[str, Any]) -> None:
    for name, kind in fields.items():
        if isinstance(kind, dict):
            assert value[name].keys() == kind.keys()
            assert_has_fields(value[name], kind)
        else:
            assert type(value[name]) is kind, f"{name} is {value[name]!r}, not {kind.__name__}"


def test_status_as_json_has_every_promised_field(training: Training) -> None:
    status = json.loads(training.ok("status", "--json"))
    assert_has_fields(status, PROMISED)
    assert_has_fields(status["workers"][0], PROMISED_OF_A_WORKER)
    assert status["state"] == "training"
    assert status["incarnation"] == 1
    assert status["epochs"] == 100_000
    assert status["batches_total"] == 800_000
    assert status["batches_applied"] == status["version"] > 0
    assert status["parameters"] == 4
    assert status["rejected"]["malformed"] == 0


def test_workers_names_who_is_connected(training: Training) -> None:
    heading, ada = training.ok("workers").splitlines()
    # The histogram has its axis in the heading, once there is staleness to show.
    assert re.sub(r" 0-\d+\+?", "", heading).split() == [
        *("ID", "NAME", "HOST", "PLATFORM", "STATE"),
        *("GRADIENTS", "EXAMPLES/S", "STALENESS", "P50", "P99", "MAX"),
        *("PUSH", "TIME", "WAIT", "LOAD", "COMPUTE", "WIRE"),
    ]
    pattern = (
        r"1 +ada +\S+ +\w+ x\d +\w+ +[\d,]+ +[\d,]+ +\d\.\d\d( \S+)? +\d +\d +\d +"
        r"[░▒█▓]+ +[\d,.]+ ms( +[\d,.]+ ms){4}"
    )
    assert_matches(pattern, ada.rstrip())


def test_workers_as_json_are_those_of_status(training: Training) -> None:
    (ada,) = json.loads(training.ok("workers", "--json"))
    assert_has_fields(ada, PROMISED_OF_A_WORKER)
    assert (ada["id"], ada["name"], ada["host"]) == (1, "ada", socket.gethostname())


def test_a_reader_that_has_enough_is_no_failure(training: Training) -> None:
    watch = f"{shlex.quote(str(processes.HEADWATER))} watch --server {training.address}"
    done = subprocess.run(  # noqa: S603  (our own command)
        ["/bin/sh", "-c", f"{{ {watch} --interval 0.1; echo $? >&2; }} | head -n 1"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stderr == "0\n"
    assert_matches(r"training  epoch .*  workers 1\n", done.stdout)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_output_that_cannot_be_written_is_an_error_in_one_line(training: Training) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(  # noqa: S603  (our own command)
            [processes.HEADWATER, "status", "--server", training.address],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 1
    assert_matches(r"headwater: error: .*No space left on device.*\n", done.stderr)


def test_pull_writes_whole_weights_that_say_their_version(training: Training) -> None:
    line = training.ok("pull", "out.safetensors")
    pattern = r"version (\d+) of run (\S+): 2 tensors, 16 B, in [\d.]+ s -> out\.safetensors\n"
    assert_matches(pattern, line)
    version, run_id = re.match(pattern, line).groups()
    weights = load_file(training.cwd / "out.safetensors")
    assert {name: array.shape for name, array in weights.items()} == {"b": (), "w": (3,)}
    with safe_open(training.cwd / "out.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["version"] == version
    assert metadata["run_id"] == run_id == training.status()["run_id"]
    assert metadata["incarnation"] == "1"


def test_pull_as_json_says_what_it_took(training: Training) -> None:
    facts = json.loads(training.ok("pull", "json.safetensors", "--json"))
    with safe_open(training.cwd / "json.safetensors", "np") as file:
        assert file.metadata()["version"] == str(facts["version"])
    assert facts == {
        "file": "json.safetensors",
        "tensors": 2,
        "bytes": 16,
        "run_id": training.status()["run_id"],
        "incarnation": 1,
        "version": facts["version"],
        "epoch": facts["epoch"],
    }


def test_pull_into_a_missing_folder_is_refused(training: Training) -> None:
    assert_fails(
        training.run("pull", "nowhere/out.safetensors"),
        2,
        "headwater: error: there is no folder nowhere to write out.safetensors into",
    )


def test_pull_onto_what_cannot_be_replaced_fails_and_leaves_it(training: Training) -> None:
    (training.cwd / "taken.safetensors").mkdir()
    assert_fails(
        training.run("pull", "taken.safetensors"),
        1,
        "headwater: error: taken.safetensors could not be written: Is a directory; what was there "
        "before is as it was",
    )
    assert (training.cwd / "taken.safetensors").is_dir()
    assert not list(training.cwd.glob(".taken*"))


# -------------------------------------------------------------------- steering


def test_pause_holds_the_version_until_resume(training: Training) -> None:
    line = training.ok("pause")
    assert_matches(r"paused at version \d+\n", line)
    version = int(line.split()[-1])
    paused = training.status()
    assert (paused["state"], paused["version"]) == ("paused", version)

    # By the server's own clock, time for 25 updates.
    later = wait_for(
        lambda: (now := training.status())["uptime_s"] > paused["uptime_s"] + 0.5 and now,
        "half a second passes",
    )

    assert (later["state"], later["version"]) == ("paused", version)
    assert training.ok("resume") == "training goes on\n"
    training.wait_past(version)
    assert training.status()["state"] == "training"


def test_evict_of_an_unknown_worker_names_the_connected_ones(training: Training) -> None:
    assert_fails(
        training.run("evict", "eve"),
        2,
        "headwater: error: no worker is called 'eve'; connected: ada",
    )


def names(training: Training) -> list[str]:
    return [worker["name"] for worker in training.status()["workers"]]


def named(training: Training, name: str) -> list[dict[str, Any]]:
    return [worker for worker in training.status()["workers"] if worker["name"] == name]


def test_an_evicted_worker_ends_with_one_line_and_training_goes_on(training: Training) -> None:
    with processes.worker(
        "paced.py", training.address, "--name", "bob", cwd=training.cwd
    ) as worker:
        wait_for(lambda: "bob" in names(training), "bob joins", 30, lambda: worker.errors)
        assert training.ok("evict", "bob") == "bob was evicted\n"
        assert worker.wait() == 1
        assert worker.errors.splitlines()[-1] == (
            "headwater worker: error: this worker was evicted"
        )
        assert "Traceback" not in worker.errors
    assert names(training) == ["ada"]
    training.wait_past(training.status()["version"])


def test_ctrl_c_makes_a_worker_leave_and_training_goes_on(training: Training) -> None:
    with processes.worker(
        "paced.py", training.address, "--name", "cyd", cwd=training.cwd
    ) as worker:
        wait_for(
            lambda: any(each["gradients"] for each in named(training, "cyd")),
            "cyd trains", 30, lambda: worker.errors,
        )  # fmt: skip
        worker.send(signal.SIGINT)
        assert worker.wait(10) == 130
        assert_matches(r".* headwater worker: left; \d+ of its .*", worker.errors.splitlines()[-1])
        assert "Traceback" not in worker.errors
    assert names(training) == ["ada"]
    training.wait_past(training.status()["version"])


@pytest.mark.parametrize("arguments", [("watch",), ("evaluate", "--task", "paced.py", "--follow")])
def test_ctrl_c_ends_a_command_that_follows(training: Training, arguments: tuple[str, ...]) -> None:
    with Command(*arguments, "--server", training.address, cwd=training.cwd) as command:
        wait_for(lambda: command.output, "its first line", 30, lambda: command.errors)
        command.send(signal.SIGINT)
        assert command.wait(10) in INTERRUPTED
        assert command.errors == ""


@contextlib.contextmanager
def interrupted(tmp_path: Path, when: str, *arguments: str) -> Iterator[Command]:
    """A command that gets Ctrl-C in the middle of its imports, as `when` says."""
    (tmp_path / "sitecustomize.py").write_text(f"import gc, os, signal, sys\n{when}")
    (tmp_path / "paced.py").write_text(PACED)
    with Command(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path)) as command:
        yield command


def test_ctrl_c_while_a_command_is_being_imported_is_quiet(tmp_path: Path) -> None:
    when = """
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""
    with interrupted(tmp_path, when, "status") as command:
        assert command.wait(10) in INTERRUPTED
        assert command.errors == ""


def test_ctrl_c_while_jax_is_being_imported_is_not_lost(tmp_path: Path) -> None:
    when = """
def interrupt(phase, info):
    if "jax" in sys.modules:
        gc.callbacks.remove(interrupt)
        os.kill(os.getpid(), signal.SIGINT)

gc.callbacks.append(interrupt)
"""
    server = ("server", "--task", "paced.py", *FREE_PORT)
    with interrupted(tmp_path, when, *server) as command:
        wait_for(
            lambda: command.process.poll() is not None or "listening on" in command.errors,
            "it ends, or goes on as if nothing had been", 30, lambda: command.errors,
        )  # fmt: skip
        assert command.process.poll() in INTERRUPTED
        assert command.errors == ""


# ------------------------------------------------------------------ evaluating


def test_evaluate_prints_the_metrics_and_reports_them(training: Training) -> None:
    line = training.ok("evaluate", "--task", "paced.py")
    pattern = r"version (\d+) \(epoch \d+\)  bias (\d\.\d{4})  \[\d+\.\d s\]\n"
    assert_matches(pattern, line)
    version, bias = re.match(pattern, line).groups()
    status = training.status()
    assert status["metrics_version"] == int(version)
    assert status["metrics"] == {"bias": pytest.approx(float(bias), abs=1e-4)}
    assert f" (version {int(version):,})" in training.ok("status")


def test_evaluate_as_json_is_an_object_a_line(training: Training) -> None:
    found = json.loads(training.ok("evaluate", "--task", "paced.py", "--json"))
    status = training.status()
    fields = ["run_id", "incarnation", "version", "epoch", "metrics", "seconds"]
    assert list(found) == fields
    assert found["run_id"] == status["run_id"]
    assert (found["version"], found["metrics"]) == (status["metrics_version"], status["metrics"])


# ----------------------------------------------------------------- not the same


def other_folder(training: Training, tmp_path: Path, old: str, new: str) -> Path:
    """A folder whose paced.py differs from the server's."""
    (tmp_path / "paced.py").write_text(PACED.replace(old, new))
    (tmp_path / "go").touch()
    return tmp_path


def test_a_worker_with_other_options_is_refused_and_told_which(training: Training) -> None:
    worker = training.run("worker", "--task", "paced.py", "--task-option", "examples=65")
    assert_fails(
        worker,
        2,
        "headwater worker: error: the worker's task is another than the server's: "
        "options: examples=65 in the worker, none in the server; "
        "examples: 65 in the worker, 64 in the server",
    )


def test_a_worker_with_another_seed_is_refused_and_told_both(
    training: Training, tmp_path: Path
) -> None:
    cwd = other_folder(training, tmp_path, "SEED = 3, 0", "SEED = 3, 9")
    assert_fails(
        run("worker", "--task", "paced.py", "--server", training.address, cwd=cwd),
        2,
        "headwater worker: error: the worker's task is another than the server's: "
        "seed: 9 in the worker, 0 in the server",
    )


def test_a_worker_of_another_task_is_refused_and_told_all_that_differs(training: Training) -> None:
    assert_fails(
        training.run("worker", "--task", "headwater.examples.mnist"),
        2,
        "headwater worker: error: the worker's task is another than the server's: "
        "task: mnist in the worker, paced in the server; "
        "examples: 4000 in the worker, 64 in the server; "
        "batch size: 32 in the worker, 8 in the server",
    )


@pytest.mark.parametrize(
    ("command", "whose", "here"),
    [("worker", "the worker's tensors differ from the server's", "the worker"),
     ("evaluate", "the server's tensors differ from this task's", "the task")],
)  # fmt: skip
def test_other_tensors_are_refused_and_named(
    training: Training, tmp_path: Path, command: str, whose: str, here: str
) -> None:
    cwd = other_folder(training, tmp_path, "WIDTH, SEED = 3", "WIDTH, SEED = 5")
    assert_fails(
        run(command, "--task", "paced.py", "--server", training.address, cwd=cwd),
        2,
        f"headwater {command}: error: {whose} (here: {here}, there: the server): "
        "w: here float32[5], there float32[3]",
    )


def test_a_second_server_on_the_port_is_refused(training: Training) -> None:
    assert_fails(
        training.run("server", "--task", "paced.py", "--listen", training.address),
        2,
        f"headwater server: error: {training.address} is in use or not an address of this machine; "
        "stop what listens there, or choose another with --listen HOST:PORT (port 0 takes a free "
        "one)",
    )


def test_a_run_directory_is_one_servers(training: Training) -> None:
    where = ("--listen", "127.0.0.1:0", "--run-dir", str(training.run_dir))
    assert_fails(
        training.run("server", "--task", "paced.py", *where),
        2,
        f"headwater server: error: another server (pid {training.server_pid}) has the run "
        f"directory {training.run_dir}; stop it, or name another with --run-dir",
    )
    training.wait_past(training.status()["version"])


# ------------------------------------------------------- from start to the end


def test_everything_ends_by_itself_when_the_run_is_over(tmp_path: Path) -> None:
    (tmp_path / "paced.py").write_text(PACED)
    task = ("--task", "paced.py", "--task-option", "epochs=3")
    options = task[2:]
    with (
        processes.server("paced.py", *options, cwd=tmp_path) as (server, address),
        processes.worker("paced.py", address, *options, cwd=tmp_path) as worker,
        Command("watch", "--server", address, "--interval", "0.1", cwd=tmp_path) as watch,
        Command("watch", "--server", address, "--json", cwd=tmp_path) as objects,
        Command("evaluate", *task, "--server", address, "--follow", cwd=tmp_path) as evaluate,
    ):
        followers = [watch, objects, evaluate]
        for follower in followers:
            wait_for(lambda f=follower: f.output, "its first line", 30, lambda f=follower: f.errors)
        (tmp_path / "go").touch()
        for command in [worker, *followers]:
            assert command.wait(30) == 0, f"{command}: {command.errors}"
            assert "Traceback" not in command.errors

        # 64 examples in batches of 8, three times over.
        first, *_, last = watch.output.splitlines()
        assert_matches(r"waiting  epoch 1/3  version 0  0 examples/s  .*  workers [01]", first)
        assert_matches(r"finished  epoch 3/3  version 24  loss .*  workers \d", last)

        looks = [json.loads(line) for line in objects.output.splitlines()]
        assert looks[-1]["state"] == "finished"
        versions = [look["version"] for look in looks]
        assert versions == sorted(versions)
        assert versions[-1] == 24

        assert_matches(r"version 0 \(epoch 0\)  bias 0\.0000  .*", evaluate.output.splitlines()[0])
        assert_matches(r"version 24 \(epoch 3\)  bias .*", evaluate.output.splitlines()[-1])
        status = status_of(address)
        assert (status["state"], status["version"], status["durable_version"]) == (
            "finished",
            24,
            24,
        )
        assert status["metrics_version"] == 24
        assert status["batches_applied"] == status["batches_total"] == 24

        # Who comes later is told so, and what was learnt is still served.
        with processes.worker("paced.py", address, *options, cwd=tmp_path) as late:
            assert late.wait(30) == 0, late.errors
            assert "the run is finished; 0 of its gradients are from here" in late.errors
        pulled = run("pull", "final.safetensors", "--server", address, cwd=tmp_path)
        assert pulled.output.startswith("version 24 of run ")
        stopped = run("stop", "--server", address, cwd=tmp_path)
        assert stopped == (0, "stopping at version 24\nstopped\n", "")
        assert server.wait(10) == 0
    kept = tmp_path / "runs/latest/weights.safetensors"
    final = load_file(tmp_path / "final.safetensors")
    assert {n: a.tobytes() for n, a in load_file(kept).items()} == {
        n: a.tobytes() for n, a in final.items()
    }


def test_an_evaluator_that_has_evaluated_the_final_version_ends(tmp_path: Path) -> None:
    # The line for the final version is longer than a pipe holds: so it is still being
    # printed, and its report long made, when the server ends.
    long = "{f'{i:0200}': 0.0 for i in range(1000)} if params['b'] else {'bias': 0.0}"
    (tmp_path / "paced.py").write_text(PACED.replace('{"bias": params["b"]}', long))
    task = ("--task", "paced.py", "--task-option", "epochs=1")
    with (
        processes.server("paced.py", *task[2:], "--exit-when-done", cwd=tmp_path) as (server, at),
        processes.worker("paced.py", at, *task[2:], cwd=tmp_path),
        subprocess.Popen(  # noqa: S603  (our own command)
            [processes.HEADWATER, "evaluate", *task, "--server", at, "--follow"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as evaluator,
    ):
        try:
            assert evaluator.stdout.readline().startswith("version 0 (epoch 0)  bias 0.0000")
            (tmp_path / "go").touch()
            assert server.wait(30) == 0
            output, _ = evaluator.communicate(timeout=3)
        except subprocess.TimeoutExpired:
            pytest.fail("it goes on without a server")
        finally:
            evaluator.kill()
    assert output.startswith("version 8 (epoch 1)")
    assert evaluator.returncode == 0


def kept_version(cwd: Path) -> int:
    """The version of the weights in the newest run directory; they must be whole."""
    path = cwd / "runs/latest/weights.safetensors"
    assert load_file(path).keys() == {"b", "w"}
    with safe_open(path, "np") as file:
        return int(file.metadata()["version"])


def test_a_worker_waits_for_its_server_and_stop_ends_both(tmp_path: Path) -> None:
    (tmp_path / "paced.py").write_text(PACED)
    (tmp_path / "go").touch()
    address = free_address("127.0.0.1")
    with (
        processes.worker("paced.py", address, cwd=tmp_path) as worker,
        contextlib.ExitStack() as later,
    ):
        refused = f"headwater worker: warning: no server at {address} ("
        wait_for(lambda: refused in worker.errors, "it finds no server", 30, lambda: worker.errors)
        arguments = ("server", "--task", "paced.py", "--listen", address)
        server = later.enter_context(Command(*arguments, cwd=tmp_path))
        wait_for(
            lambda: status_of(address).get("version"), "it trains", 30,
            lambda: f"{worker.errors}{server.errors}",
        )  # fmt: skip

        stopped = run("stop", "--server", address, cwd=tmp_path)

        assert_matches(r"stopping at version \d+\nstopped\n", stopped.output)
        assert (stopped.status, stopped.errors) == (0, "")
        assert server.wait(10) == 0, server.errors
        assert worker.wait(10) == 0, worker.errors
        assert "the server was stopped" in worker.errors.splitlines()[-1]
        assert "Traceback" not in server.errors + worker.errors
    assert kept_version(tmp_path) >= int(stopped.output.split()[3])


def test_ctrl_c_ends_a_server_in_order_and_keeps_the_weights(tmp_path: Path) -> None:
    (tmp_path / "paced.py").write_text(PACED)
    (tmp_path / "go").touch()
    with (
        processes.server("paced.py", cwd=tmp_path) as (server, address),
        processes.worker("paced.py", address, cwd=tmp_path) as worker,
    ):
        seen = wait_for(
            lambda: status_of(address).get("version"), "it trains", 30, lambda: worker.errors
        )
        server.send(signal.SIGINT)
        assert server.wait(10) == 130, server.errors
        assert worker.wait(10) == 0, worker.errors
        assert "Traceback" not in server.errors + worker.errors
        version = kept_version(tmp_path)
        end, again = server.errors.splitlines()[-2:]
        assert f"headwater server: stopped; version {version} is in runs/paced-" in end
        assert "go on with: headwater server --task paced.py " in again
    assert version >= seen


def test_sigterm_ends_a_server_that_waits_for_workers_in_order(tmp_path: Path) -> None:
    (tmp_path / "paced.py").write_text(PACED)
    with processes.server("paced.py", cwd=tmp_path) as (server, address):
        assert status_of(address)["state"] == "waiting"
        nobody = run("workers", "--server", address, cwd=tmp_path)
        hint = f"headwater worker --task TASK --server {address}"
        assert nobody.output == f"no worker is connected; start one with: {hint}\n"
        server.send(signal.SIGTERM)
        assert server.wait(10) == 0, server.errors
        assert "Traceback" not in server.errors
    assert kept_version(tmp_path) == 0


# ------------------------------------------------------------------- no server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with paced.py, where no run has begun."""
    (tmp_path / "paced.py").write_text(PACED)
    return tmp_path


def nobody_answers(address: str) -> str:
    return (
        f"no Headwater server answers at {address}; start one with `headwater server`, or name "
        "another address with --server HOST:PORT"
    )


@pytest.mark.parametrize("command", TALKING)
def test_without_a_server_every_command_says_so_and_exits_3(command: str, folder: Path) -> None:
    address = free_address("127.0.0.1")
    speaker = "headwater evaluate" if command == "evaluate" else "headwater"
    assert_fails(
        run(*TALKING[command], "--server", address, cwd=folder),
        3,
        f"{speaker}: error: {nobody_answers(address)}",
    )
    assert not (folder / "out.safetensors").exists()


def assert_worker_gives_up(finished: Finished, address: str) -> None:
    assert (finished.status, finished.output) == (3, "")
    *warnings, last = finished.errors.splitlines()
    assert warnings
    for line in warnings:
        assert f" headwater worker: warning: no server at {address} (" in line
    assert last.startswith(
        f"headwater worker: error: no Headwater server answers at {address} (tried for 1 s; "
    )


def test_without_a_server_a_worker_gives_up_after_its_time(folder: Path) -> None:
    address = free_address("127.0.0.1")
    task = ("--task", "paced.py", "--server", address, "--connect-timeout", "1")
    assert_worker_gives_up(run("worker", *task, cwd=folder), address)


@contextlib.contextmanager
def listener(answer: bytes) -> Iterator[str]:
    """The address of something else than Headwater, which answers all with the same bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(4096)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(5)


HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
NOISE = bytes(range(256)) * 4


@pytest.mark.parametrize(
    ("command", "answer"),
    [("status", HTTP), ("pull", HTTP), ("stop", NOISE), ("evaluate", NOISE)],
    ids=["status", "pull", "stop", "evaluate"],
)
def test_something_else_on_the_port_is_no_server(command: str, answer: bytes, folder: Path) -> None:
    with listener(answer) as address:
        finished = run(*TALKING[command], "--server", address, cwd=folder, timeout_s=20)
    speaker = "headwater evaluate" if command == "evaluate" else "headwater"
    assert_fails(finished, 3, f"{speaker}: error: {nobody_answers(address)}")


def test_a_worker_gives_up_on_something_else_on_the_port(folder: Path) -> None:
    with listener(HTTP) as address:
        task = ("--task", "paced.py", "--server", address, "--connect-timeout", "1")
        finished = run("worker", *task, cwd=folder, timeout_s=20)
    assert_worker_gives_up(finished, address)


@contextlib.contextmanager
def far_away(address: str, delay_s: float) -> Iterator[str]:
    """An address from which what the server says takes `delay_s` to arrive."""
    host, _, port = address.rpartition(":")

    def carry(source: socket.socket, target: socket.socket, after_s: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(after_s)
                target.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as opened:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    near = opened.enter_context(listening.accept()[0])
                    far = opened.enter_context(socket.create_connection((host, int(port))))
                    for pair in ((near, far, 0), (far, near, delay_s)):
                        threading.Thread(target=carry, args=pair, daemon=True).start()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(5)


def test_a_server_far_away_is_reached(training: Training) -> None:
    with far_away(training.address, 0.2) as address:
        finished = run("status", "--json", "--server", address, cwd=training.cwd)
    assert finished.status == 0, finished.errors


# ----------------------------------------------------------------- wrong usage


def quick(cases: Iterable[str], *chosen: str) -> list[Any]:
    """The cases; those that are not chosen, of which unit tests see the texts, are slow ones."""
    slow = pytest.mark.slow
    return [case if case in chosen else pytest.param(case, marks=slow) for case in cases]


WRONG_FLAGS = {
    "--listen 0.0.0.0:0": (
        "--listen 0.0.0.0:0 lets other machines in, without encryption or passwords; add "
        "--insecure if you trust everyone on that network, or listen on 127.0.0.1:0"
    ),
    "--listen nonsense": "--listen takes HOST:PORT such as 127.0.0.1:50051, not 'nonsense'",
    "--consistency bounded": (
        "--consistency 'bounded': it is async; bounded:K, with a staleness of at most K, from 0 "
        "on; or sync:N, with N batches in an update, from 1 on"
    ),
    "--epochs 0": "--epochs 0 must be at least 1",
    "--batch-size 0": "--batch-size 0 must be at least 1",
    "--seed -1": "--seed -1 must be in 0 … 4294967295",
    "--platform abacus": "--platform abacus: it is one of cpu, gpu, tpu",
}


@pytest.mark.parametrize(
    "options",
    quick(WRONG_FLAGS, "--listen 0.0.0.0:0", "--consistency bounded", "--platform abacus"),
)
def test_a_wrong_flag_of_the_server_is_one_line(options: str, folder: Path) -> None:
    finished = run("server", "--task", "paced.py", *options.split(), cwd=folder)
    assert_fails(finished, 2, f"headwater server: error: {WRONG_FLAGS[options]}")
    assert not (folder / "runs").exists()


def test_a_batch_larger_than_the_data_is_refused_when_short_ones_are_dropped(
    folder: Path,
) -> None:
    (folder / "plain.py").write_text(f'{PLAIN}\ntask = Task(**fields, remainder="drop")\n')
    assert_fails(
        run("server", "--task", "plain.py", "--batch-size", "9", *FREE_PORT, cwd=folder),
        2,
        "headwater server: error: an epoch has no batch: 8 examples, batch size 9, and the short "
        'batch is dropped; use remainder="keep" or a smaller batch size',
    )
    assert not (folder / "runs").exists()


def test_a_wrong_optimizer_is_pointed_at(folder: Path) -> None:
    spec = "sgd(0.1, momentum=x)"
    finished = run("server", "--task", "paced.py", "--optimizer", spec, *FREE_PORT, cwd=folder)
    assert_fails(
        finished,
        2,
        "headwater server: error: --optimizer, character 19: 'x' is not a function of optax\n"
        "    sgd(0.1, momentum=x)\n"
        "                      ^",
    )


def test_a_run_directory_that_was_damaged_is_refused(folder: Path) -> None:
    (folder / "old").mkdir()
    (folder / "old/run.json").write_text("{}")
    assert_fails(
        run("server", "--task", "paced.py", "--run-dir", "old", *FREE_PORT, cwd=folder),
        2,
        "headwater server: error: old/run.json was damaged ('format'); restore it from a copy, or "
        "start anew in another directory",
    )
    assert (folder / "old/run.json").read_text() == "{}"


def test_a_run_directory_that_cannot_be_written_is_refused(folder: Path) -> None:
    (folder / "file").touch()  # root may write anywhere, but not below a file
    assert_fails(
        run("server", "--task", "paced.py", "--run-dir", "file/run", *FREE_PORT, cwd=folder),
        2,
        "headwater server: error: the run directory file/run cannot be used: Not a directory; "
        "name another with --run-dir",
    )


WRONG_USAGE = {
    "nonsense": "No such command 'nonsense'. (see headwater --help)",
    "status --server here": "--server takes HOST:PORT such as 127.0.0.1:50051, not 'here'",
    "status --nonsense": "No such option: --nonsense (see headwater status --help)",
    "pull": "Missing argument 'OUT.safetensors'. (see headwater pull --help)",
}


@pytest.mark.parametrize("arguments", WRONG_USAGE)
def test_wrong_usage_is_one_line(arguments: str, tmp_path: Path) -> None:
    finished = run(*arguments.split(), cwd=tmp_path)
    assert_fails(finished, 2, f"headwater: error: {WRONG_USAGE[arguments]}")


def test_headwater_alone_helps(tmp_path: Path) -> None:
    status, output, errors = run(cwd=tmp_path)
    assert (status, errors) == (2, "")
    assert output == run("--help", cwd=tmp_path).output


COMMANDS = [
    *("server", "worker", "run", "check", "status", "workers", "watch", "pull", "evaluate"),
    *("pause", "resume", "set", "evict", "snapshot", "stop", "check-snapshot", "replay", "new"),
]


def test_help_lists_every_command(tmp_path: Path) -> None:
    helped = run("--help", cwd=tmp_path)
    assert (helped.status, helped.errors) == (0, "")
    assert set(re.findall(r"^  ([a-z][a-z-]*)  ", helped.output, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("command", quick(COMMANDS, *PROCESSES, "status"))
def test_every_command_helps(command: str, tmp_path: Path) -> None:
    helped = run(command, "--help", cwd=tmp_path)
    assert (helped.status, helped.errors) == (0, "")
    assert helped.output.startswith(f"Usage: headwater {command} [OPTIONS]")


def test_headwater_says_its_version(tmp_path: Path) -> None:
    assert run("--version", cwd=tmp_path) == (0, f"headwater {__version__}\n", "")


# ----------------------------------------------------------------------- check


def check(tmp_path: Path, ending: str, *options: str) -> Finished:
    """`headwater check` of PLAIN and this ending."""
    (tmp_path / "plain.py").write_text(f"{PLAIN}\n{ending}\n")
    return run("check", "--task", "plain.py", *options, cwd=tmp_path)


def test_check_shows_what_a_task_is_and_what_its_parts_take(tmp_path: Path) -> None:
    checked = check(tmp_path, "task = Task(**fields)")
    assert (checked.status, checked.errors) == (0, "")
    expected = [
        r"plain: 3 parameters in 1 tensors, 12 bytes a gradient",
        r"  w  float32\[3\]",
        r"8 examples, 2 batches of 4 an epoch, 2 updates in 1 epochs",
        r"init +[\d.]+ s",
        r"batch +[\d.]+ ms  x float32\[4, 3\]",
        r"compile +[\d.]+ s   on \w+",
        r"gradient +[\d.]+ ms  loss 1",
        r"update +[\d.]+ ms",
        r"evaluate +[\d.]+ s   sum 3",
        r"ok; this machine computes [\d,]+ gradients/s, for one process alone",
    ]
    for pattern, line in zip(expected, checked.output.splitlines(), strict=True):
        assert_matches(pattern, line)


def test_check_as_json_says_the_same(tmp_path: Path) -> None:
    checked = check(tmp_path, "task = Task(**fields)", "--json")
    assert (checked.status, checked.errors) == (0, "")
    report = json.loads(checked.output)
    assert report["tensors"] == {"w": "float32[3]"}
    assert (report["parameters"], report["examples"], report["loss"]) == (3, 8, 1.0)
    assert report["evaluation"] == {"sum": 3.0}


class Wrong(NamedTuple):
    """What stands after PLAIN, and what `check` says of that."""

    ending: str
    error: str
    status: int = 2


def changed(fields: str) -> str:
    return f"task = Task(**{{**fields, {fields}}})"


WRONG_TASKS = {
    "no task": Wrong("", "plain.py has no 'task'; a task is a Task called `task`"),
    "no Task": Wrong(
        "task = 42", "task in plain.py is int; it must be a Task or a function that returns one"
    ),
    "int leaf": Wrong(
        changed("'init': lambda key: {'w': jnp.ones(3), 'n': jnp.zeros(2, int)}"),
        "n has dtype int32; a parameter is floating or complex. Keep counters and masks out of the "
        "parameters",
    ),
    "Python number": Wrong(
        changed("'init': lambda key: {'w': 1.0}"),
        "w is 1.0, not an array; `init` gives a tree of arrays",
    ),
    "nan weights": Wrong(
        changed("'init': lambda key: {'w': jnp.full(3, jnp.nan)}"),
        "Task.init gave weights that are not finite: 3 of the 3 numbers in w",
    ),
    "field": Wrong(
        changed("'batch_size': 0"),
        "Task.batch_size must be a whole number from 1 on, not 0 (plain.py, line LAST)",
    ),
    "vector loss": Wrong(
        changed("'loss': lambda params, batch, key: params['w']"),
        "Task.loss returned float32[3]; it must be one real number, the mean over the batch's "
        "examples, alone or as (loss, metrics)",
    ),
    "optimizer": Wrong(
        changed("'optimizer': 'adma(1e-3)'"),
        "--optimizer, character 1: 'adma' is not a function of optax; did you mean adamax?\n"
        "    adma(1e-3)\n"
        "    ^",
    ),
    "nan gradient": Wrong(
        changed("'loss': lambda params, batch, key: jnp.sqrt(params['w'] - 1).mean()"),
        "the first gradient is not finite: 3 of the 3 numbers in w; every worker's would be "
        "refused",
        status=1,
    ),
}


@pytest.mark.parametrize("wrong", quick(WRONG_TASKS, "nan weights", "optimizer", "nan gradient"))
def test_check_says_what_is_wrong_with_a_task(wrong: str, tmp_path: Path) -> None:
    ending, error, status = WRONG_TASKS[wrong]
    checked = check(tmp_path, ending)
    last = len((tmp_path / "plain.py").read_text().splitlines())
    said = error.replace("LAST", str(last))
    assert_fails(checked, status, f"headwater check: error: {said}")


def test_check_says_that_there_is_no_such_file(tmp_path: Path) -> None:
    assert_fails(
        run("check", "--task", "nowhere.py", cwd=tmp_path),
        2,
        "headwater check: error: there is no file nowhere.py; --task nowhere.py names one",
    )


def assert_shows_only_the_users_frames(errors: str, cwd: Path) -> None:
    files = re.findall(r'^  File "(.*?)"', errors, re.MULTILINE)
    assert set(files) == {str(cwd / "plain.py")}


class Raising(NamedTuple):
    """What stands after PLAIN, and what is shown around its own traceback."""

    ending: str
    before: str
    after: str
    status: int = 2


RAISING = {
    "loading": Raising(
        "def helper():\n    return 1 / 0\nhelper()",
        "plain.py raised while it was loaded",
        "ZeroDivisionError: division by zero",
    ),
    "function": Raising(
        "def task():\n    raise RuntimeError('no data here')",
        "plain.py raised",
        "RuntimeError: no data here",
    ),
    "loss": Raising(
        "def loss(params, batch, key):\n    return params['v']\n" + changed("'loss': loss"),
        "the task plain raised",
        "KeyError: 'v'",
        status=1,
    ),
}


@pytest.mark.parametrize("raising", quick(RAISING, "loading", "loss"))
def test_a_task_that_raises_is_shown_with_the_users_own_traceback(
    raising: str, tmp_path: Path
) -> None:
    ending, before, after, status = RAISING[raising]
    checked = check(tmp_path, ending)
    assert checked.status == status
    lines = checked.errors.splitlines()
    assert lines[0] == f"headwater check: error: {before}"
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == after
    assert_shows_only_the_users_frames(checked.errors, tmp_path)


def test_a_syntax_error_is_shown_where_the_user_made_it(tmp_path: Path) -> None:
    checked = check(tmp_path, "def (")
    assert checked.errors.splitlines()[-1] == "SyntaxError: invalid syntax"
    assert_shows_only_the_users_frames(checked.errors, tmp_path)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_a_platform_that_is_not_there_is_refused(tmp_path: Path) -> None:
    checked = check(tmp_path, "task = Task(**fields)", "--platform", "gpu")
    assert checked.status == 2
    assert checked.errors.startswith(
        "headwater check: error: --platform gpu cannot be had here, JAX finds cpu;"
    )


def test_stdout_that_is_closed_does_no_harm(tmp_path: Path) -> None:
    """Daemons are started so."""
    headwater = shlex.quote(str(processes.HEADWATER))
    done = subprocess.run(  # noqa: S603  (our own command)
        ["/bin/sh", "-c", f"{headwater} --version >&-"],
        env={k: v for k, v in os.environ.items() if not k.startswith("HEADWATER")},
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
        check=False,
    )
    assert "Traceback" not in done.stderr
