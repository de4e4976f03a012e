"""The commands by hand: a server and workers in processes of their own, looked at and steered.

Endless runs are paced by their data, and begin when the file `go` is there; so
nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from kit import processes
from kit.commands import (
    INTERRUPTED,
    PACED,
    assert_fails,
    assert_matches,
    say,
)
from kit.processes import FREE_PORT, Command, Finished, run, status_of
from kit.waiting import wait_for

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
    lines = training.ok("status").splitlines()
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
    where = (*FREE_PORT, "--run-dir", str(training.run_dir))
    assert_fails(
        training.run("server", "--task", "paced.py", *where),
        2,
        f"headwater server: error: another server (pid {training.server_pid}) has the run "
        f"directory {training.run_dir}; stop it, or name another with --run-dir",
    )
    training.wait_past(training.status()["version"])
