"""`headwater run`: what it trains, what it says, and that nothing of it is ever left behind."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from kit.processes import FREE_PORT, HEADWATER, Command, Finished, run, status_of
from kit.waiting import wait_for

PACED = """
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

from headwater import Task


def wait_for(name):
    while not Path(name).exists():
        time.sleep(0.01)


class Paced:
    loaded = 0

    def __len__(self):
        return 64

    def batch(self, indices, rng):
        wait_for("go")
        self.loaded += 1
        if self.loaded > 20:
            wait_for("finish")
        time.sleep(0.01)
        return {"x": np.ones((len(indices), 3), np.float32)}


def loss(params, batch, key):
    return ((params["w"] - batch["x"]) ** 2).mean()


def evaluate(params):
    return {"mean": params["w"].mean()}


def task(epochs: int = 100_000, evaluates: bool = False):
    return Task(
        init=lambda key: {"w": jnp.zeros(3)},
        loss=loss,
        data=Paced(),
        optimizer=optax.sgd(1e-3),
        batch_size=8,
        epochs=epochs,
        evaluate=evaluate if evaluates else None,
    )
"""

SHORT = ("run", "--task", "paced.py", "--task-option", "epochs=2", "--workers", "1")
"""Sixteen updates."""

TOLD_TO_END_S = 5.0
"""Promised from Ctrl-C to the exit."""
ALONE_S = 15.0
"""For the rest to end when `headwater run` itself was killed."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with paced.py, whose training neither begins nor pauses for long."""
    (tmp_path / "paced.py").write_text(PACED)
    (tmp_path / "go").touch()
    (tmp_path / "finish").touch()
    return tmp_path


def records(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "runs/latest/metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/latest/run.json").read_text())


def assert_kept(folder: Path) -> None:
    """The newest run's weights and record are there, and whole."""
    latest = folder / "runs/latest"
    assert load_file(latest / "weights.safetensors").keys() == {"w"}
    with safe_open(latest / "weights.safetensors", "np") as file:
        assert file.metadata()["run_id"] == record(folder)["run_id"]


# ------------------------------------------------------------ from start to end


class Trained(NamedTuple):
    finished: Finished
    cwd: Path


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What the README begins with, run once."""
    cwd = tmp_path_factory.mktemp("digits")
    task = ("run", "--task", "headwater.examples.mnist", "--workers", "2")
    return Trained(run(*task, *FREE_PORT, cwd=cwd), cwd)


def test_run_trains_the_digits_and_says_where_everything_is(digits: Trained) -> None:
    status, output, errors = digits.finished
    assert (status, errors) == (0, "")
    first, *progress = output.splitlines()
    progress, last = progress[:-4], progress[-4:]
    assert re.fullmatch(r"starting a server and 2 workers at 127\.0\.0\.1:\d+", first)
    for line in progress:
        assert re.fullmatch(
            r"(training|finished)  epoch \d+/10  version [\d,]+  loss \S+  accuracy \S+  "
            r"[\d,]+ examples/s  staleness \S+  workers \d",
            line,
        )
    pattern = (
        r"finished at version 1,250 in [\d.]+ s \([\d,]+ updates/s\)\n"
        r"evaluation  (\w+ [\d.]+  \w+ [\d.]+)\n"
        r"weights     runs/(mnist-\S+)/weights\.safetensors\n"
        r"metrics     runs/\2/metrics\.jsonl"
    )
    found = re.fullmatch(pattern, "\n".join(last))
    assert found, last
    metrics = dict(figure.split() for figure in found[1].split("  "))
    assert metrics.keys() == {"accuracy", "loss"}
    assert float(metrics["accuracy"]) >= 0.90
    assert (digits.cwd / "runs/latest").readlink() == Path(found[2])


def test_a_finished_run_leaves_its_final_weights(digits: Trained) -> None:
    path = digits.cwd / "runs/latest/weights.safetensors"
    assert {name: array.shape for name, array in load_file(path).items()} == {
        "hidden/kernel": (784, 64),
        "hidden/bias": (64,),
        "output/kernel": (64, 10),
        "output/bias": (10,),
    }
    with safe_open(path, "np") as file:
        assert file.metadata()["version"] == "1250"


def test_a_finished_run_leaves_its_progress_evaluations_and_end(digits: Trained) -> None:
    lines = records(digits.cwd)
    kinds = [line["kind"] for line in lines]
    assert set(kinds) == {"progress", "evaluation", "end"}
    assert kinds[-1] == "end"
    assert kinds.count("end") == 1
    evaluation = [line for line in lines if line["kind"] == "evaluation"][-1]
    assert evaluation["version"] == 1250
    assert lines[-1]["state"] == "finished"
    assert (lines[-1]["version"], lines[-1]["metrics"]) == (1250, evaluation["metrics"])
    versions = [line["version"] for line in lines if line["kind"] == "progress"]
    assert versions == sorted(versions)
    assert versions[-1] == 1250


def test_a_finished_run_leaves_a_log_of_each_process(digits: Trained) -> None:
    logs = digits.cwd / "runs/latest/logs"
    names = {path.name for path in logs.iterdir()}
    assert names == {"server.log", "worker-1.log", "worker-2.log", "evaluator.log"}
    assert "finished; version 1250 is in " in (logs / "server.log").read_text()
    joined = f"joined run {record(digits.cwd)['run_id']} as worker-"
    for worker in ("worker-1.log", "worker-2.log"):
        assert joined in (logs / worker).read_text()
    assert "the run is finished; " in (logs / "worker-1.log").read_text()


def test_in_sync_mode_its_processes_are_set_up_to_compute_alike(folder: Path) -> None:
    done = run(*SHORT, *FREE_PORT, "--consistency", "sync:1", "--run-dir", "run", cwd=folder)
    assert done.status == 0, done.errors
    lines = map(json.loads, (folder / "run/history.jsonl").read_text().splitlines())
    computed = [line["compute"] for line in lines if "compute" in line]
    assert len(computed) == 2  # the server's and the worker's
    for compute in computed:
        assert "--xla_gpu_deterministic_ops=true" in compute["XLA_FLAGS"]


def test_a_task_without_evaluate_is_trained_and_no_evaluation_is_spoken_of(folder: Path) -> None:
    finished = run(*SHORT, *FREE_PORT, cwd=folder)
    assert (finished.status, finished.errors) == (0, "")
    assert "evaluat" not in finished.output
    assert "finished at version 16 in " in finished.output
    assert {line["kind"] for line in records(folder)} == {"progress", "end"}
    assert_kept(folder)


@pytest.mark.slow
def test_a_server_named_in_the_environment_is_not_this_runs(folder: Path) -> None:
    finished = run(*SHORT, *FREE_PORT, cwd=folder, HEADWATER_SERVER="127.0.0.1:1")
    assert (finished.status, finished.errors) == (0, "")
    assert "127.0.0.1:1\n" not in finished.output
    assert "finished at version 16 in " in finished.output


def test_run_takes_a_free_port_when_the_default_one_is_busy_and_says_so(folder: Path) -> None:
    with contextlib.ExitStack() as holding:
        with contextlib.suppress(OSError):  # somebody else has it: as good
            holding.enter_context(socket.create_server(("127.0.0.1", 50051)))
        finished = run(*SHORT, cwd=folder)
    assert (finished.status, finished.errors) == (0, "")
    busy, starting, *_ = finished.output.splitlines()
    found = re.fullmatch(r"127\.0\.0\.1:50051 is in use; this run is at (127\.0\.0\.1:(\d+))", busy)
    assert found
    assert found[2] != "50051"
    assert starting == f"starting a server and 1 worker at {found[1]}"


# ------------------------------------------------------------- beside other things


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of bash in which $RUN is a short run."""
    words = [str(HEADWATER), *SHORT, *FREE_PORT]
    script = f"RUN={shlex.quote(shlex.join(words))}; {line}"
    return subprocess.run(  # noqa: S603  (our own text)
        ["/bin/bash", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_reader_that_goes_away_does_not_end_the_training(folder: Path) -> None:
    done = shell('eval "$RUN" | head -1; echo ${PIPESTATUS[0]}', folder)
    assert done.stdout.splitlines()[-1] == "0", done
    assert records(folder)[-1]["state"] == "finished"
    assert_kept(folder)


@pytest.mark.slow
def test_a_full_output_does_not_end_the_training(folder: Path) -> None:
    done = shell('eval "$RUN" > /dev/full', folder)
    assert done.returncode == 1
    assert "the output could not be written" in done.stderr
    assert records(folder)[-1]["state"] == "finished"
    assert_kept(folder)


@pytest.mark.parametrize("closed", [pytest.param(">&-", marks=pytest.mark.slow), "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(closed: str, folder: Path) -> None:
    done = shell(f'eval "$RUN" {closed}', folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert records(folder)[-1]["state"] == "finished"


@pytest.mark.slow
def test_two_runs_at_once_are_two_runs(folder: Path) -> None:
    """Each finds a port, and each has its own workers."""
    with (
        Command(*SHORT, "--run-dir", "one", cwd=folder) as one,
        Command(*SHORT, "--run-dir", "two", cwd=folder) as two,
    ):
        assert (one.wait(), two.wait()) == (0, 0), one.errors + two.errors
    for name in ("one", "two"):
        log = (folder / name / "logs/server.log").read_text()
        assert log.count(" joined ") == 1, log


def test_a_run_that_is_stopped_is_called_stopped(folder: Path) -> None:
    with started(folder) as it:
        it.wait_until_training()
        assert run("stop", "--server", it.address, cwd=folder).status == 0
        assert it.command.wait(30) == 0, it.state()
        assert "\nstopped at version " in it.command.output
        assert "finished" not in it.command.output


def test_a_run_whose_server_was_killed_is_continued_by_the_same_command(folder: Path) -> None:
    where = ("--run-dir", "mine")
    with started(folder, *where, "--snapshot-every", "5") as it:
        wait_for(lambda: it.status().get("durable_version", 0) > 10, "a snapshot", 30, it.state)
        durable = it.status()["durable_version"]
        (server,) = [p for p in it.descendants() if "server" in p.cmdline()]
        server.kill()
        assert it.command.wait(20) == 1
        assert it.command.errors == "headwater: error: server was ended by SIGKILL\n"
    with started(folder, *where) as it:
        wait_for(lambda: it.status().get("version", 0) > durable, "it goes on", 30, it.state)
        assert it.status()["incarnation"] == 2
        it.command.send(signal.SIGINT)
        assert it.command.wait(10) == 130


@pytest.mark.slow  # the server alone: tests/faults/test_ending.py
def test_a_finished_run_is_extended_by_more_epochs(folder: Path) -> None:
    for epochs, version in (("2", 16), ("3", 24)):
        done = run(*SHORT, *FREE_PORT, "--run-dir", "mine", "--epochs", epochs, cwd=folder)
        assert (done.status, done.errors) == (0, "")
        assert f"finished at version {version} in " in done.output


# ------------------------------------------------------------------ wrong input


def test_a_busy_port_that_was_asked_for_is_refused(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        finished = run(*SHORT, "--listen", address, cwd=folder)
    assert finished.status == 2
    assert finished.errors == (
        f"headwater: error: server failed: {address} is in use or not an address of this machine; "
        "stop what listens there, or choose another with --listen HOST:PORT (port 0 takes a free "
        "one)\n"
    )


def test_an_unknown_option_is_refused(folder: Path) -> None:
    finished = run(*SHORT, *FREE_PORT, "--nonsense", cwd=folder)
    assert finished.status == 2
    assert re.fullmatch(
        r"headwater: error: server failed: No such option: --nonsense .*\n", finished.errors
    )


def test_a_task_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    finished = run("run", "--task", "nowhere.py", *FREE_PORT, cwd=tmp_path)
    assert finished.status == 2
    assert finished.errors == (
        "headwater: error: server failed: there is no file nowhere.py; --task nowhere.py names "
        "one\n"
    )
    assert not (tmp_path / "runs").exists()


def files_of(traceback: str) -> set[str]:
    return set(re.findall(r'^  File "(.*?)"', traceback, re.MULTILINE))


def test_a_task_that_raises_while_loading_shows_the_users_own_traceback(folder: Path) -> None:
    (folder / "paced.py").write_text("def helper():\n    return 1 / 0\n\n\nhelper()\n")
    finished = run("run", "--task", "paced.py", *FREE_PORT, cwd=folder)
    assert finished.status == 2
    first, second, *_, last = finished.errors.splitlines()
    assert first == "headwater: error: server failed: paced.py raised while it was loaded"
    assert second == "Traceback (most recent call last):"
    assert last == "ZeroDivisionError: division by zero"
    assert files_of(finished.errors) == {str(folder / "paced.py")}
    assert not (folder / "runs").exists()


@pytest.fixture(scope="module")
def wrong_loss(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run whose loss raises in its only worker."""
    cwd = tmp_path_factory.mktemp("wrong")
    (cwd / "paced.py").write_text(PACED.replace('params["w"] -', 'params["v"] -'))
    (cwd / "go").touch()
    task = ("run", "--task", "paced.py", "--workers", "1")
    return Trained(run(*task, *FREE_PORT, cwd=cwd), cwd)


def test_a_loss_that_raises_ends_the_run_with_the_users_own_traceback(wrong_loss: Trained) -> None:
    status, _, errors = wrong_loss.finished
    assert status == 1
    first, second, *_, last = errors.splitlines()
    assert first == "headwater: error: worker-1 failed: the task paced raised"
    assert second == "Traceback (most recent call last):"
    assert last == "KeyError: 'v'"
    assert files_of(errors) == {str(wrong_loss.cwd / "paced.py")}


def test_of_the_last_worker_it_is_not_said_that_others_go_on(wrong_loss: Trained) -> None:
    assert "the others go on" not in wrong_loss.finished.output


# ----------------------------------------------------------------------- ending


class Started(NamedTuple):
    """A `headwater run` under way."""

    command: Command
    cwd: Path

    @property
    def address(self) -> str:
        """Where its server is; "" when it has not said so."""
        found = re.search(r"^starting .* at (\S+)$", self.command.output, re.MULTILINE)
        return found[1] if found else ""

    def status(self) -> dict[str, Any]:
        return status_of(self.address) if self.address else {}

    def workers(self) -> dict[str, dict[str, Any]]:
        return {worker["name"]: worker for worker in self.status().get("workers", [])}

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.command.process.pid).children(recursive=True)

    def state(self) -> str:
        return f"{self.command.output}{self.command.errors}{self.status()}"

    def wait_until_training(self) -> None:
        wait_for(lambda: self.status().get("version"), "training begins", 30, self.state)


@contextlib.contextmanager
def started(folder: Path, *options: str) -> Iterator[Started]:
    """An endless run with two workers."""
    task = ("run", "--task", "paced.py", "--workers", "2", *options)
    with Command(*task, *FREE_PORT, cwd=folder) as command:
        it = Started(command, folder)
        try:
            yield it
        finally:
            # Each is in a session of its own, where the kit does not find it.
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in it.descendants():
                    process.kill()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run; a dead one whose parent has not asked for it does not."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def assert_ends_in_time(it: Started, number: int, status: int) -> list[str]:
    """The signal ends it in the time promised, and all that it started; what it said of that."""
    before = it.descendants()
    assert before
    it.command.send(number)
    end = time.monotonic() + TOLD_TO_END_S
    assert it.command.wait(TOLD_TO_END_S) == status, it.state()
    # One that was being started at that moment ends by itself, for its lifeline is cut.
    left = max(end - time.monotonic(), 0)
    wait_for(lambda: not alive(before), "all it started ends", left, lambda: alive(before))
    assert it.command.errors == ""
    said, stopping, after = it.command.output.partition("stopping\n")
    assert stopping, said
    return after.splitlines()


def assert_says_where_the_weights_are(lines: list[str]) -> None:
    (line,) = lines
    assert re.fullmatch(r"the weights are in runs/paced-\S+/weights\.safetensors", line)


def test_ctrl_c_while_it_starts_ends_it(folder: Path) -> None:
    with started(folder) as it:
        wait_for(it.descendants, "it starts a process", 30, it.state)
        assert assert_ends_in_time(it, signal.SIGINT, 130) == []
    assert not (folder / "runs").exists()


def test_ctrl_c_before_the_first_update_ends_it(folder: Path) -> None:
    (folder / "go").unlink()
    with started(folder) as it:
        wait_for(lambda: len(it.workers()) == 2, "two workers are there", 30, it.state)
        assert_says_where_the_weights_are(assert_ends_in_time(it, signal.SIGINT, 130))
    assert_kept(folder)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_signal_in_the_middle_of_training_ends_it_and_keeps_the_weights(
    number: int, status: int, folder: Path
) -> None:
    with started(folder) as it:
        it.wait_until_training()
        assert_says_where_the_weights_are(assert_ends_in_time(it, number, status))
    assert_kept(folder)
    assert records(folder)[-1]["state"] == "stopped"


def test_when_run_itself_is_killed_its_processes_end_by_themselves(folder: Path) -> None:
    with started(folder, "--task-option", "evaluates=true") as it:
        wait_for(
            lambda: it.status().get("metrics"), "server, workers and evaluator work", 30, it.state
        )
        processes = it.descendants()
        assert len(processes) == 4
        it.command.kill()
        try:
            wait_for(lambda: not alive(processes), "all end", ALONE_S, lambda: alive(processes))
        finally:
            for process in alive(processes):
                process.kill()
    assert_kept(folder)


def test_a_worker_that_is_killed_is_missed_and_the_run_finishes(folder: Path) -> None:
    (folder / "finish").unlink()
    with started(folder, "--task-option", "epochs=10") as it:
        wait_for(
            lambda: len(it.workers()) == 2 and all(w["gradients"] for w in it.workers().values()),
            "both workers train", 30, it.state,
        )  # fmt: skip
        psutil.Process(it.workers()["worker-1"]["pid"]).kill()
        warning = "warning: worker-1 was ended by SIGKILL; the others go on"
        wait_for(lambda: warning in it.command.output.splitlines(), "it is missed", 10, it.state)
        (folder / "finish").touch()
        assert it.command.wait() == 0, it.state()
        assert it.command.errors == ""
        assert it.command.output.count("warning") == 1
    assert records(folder)[-1]["version"] == 80


def test_when_all_workers_are_killed_the_run_fails_and_the_weights_are_kept(folder: Path) -> None:
    with started(folder) as it:
        it.wait_until_training()
        processes = it.descendants()
        kill_workers(it)
        assert it.command.wait(10) == 1
        # Whichever was seen to be gone last.
        last = r"headwater: error: worker-[12] was ended by SIGKILL\n"
        assert re.fullmatch(last, it.command.errors), it.command.errors
        assert not alive(processes)
    assert_kept(folder)


def test_when_the_last_worker_is_killed_after_one_has_left_the_run_fails(folder: Path) -> None:
    with started(folder) as it:
        it.wait_until_training()
        wait_for(lambda: len(it.workers()) == 2, "two workers are there", 30, it.state)
        last = psutil.Process(it.workers()["worker-2"]["pid"])
        first = psutil.Process(it.workers()["worker-1"]["pid"])
        first.terminate()
        wait_for(lambda: not alive([first]), "it leaves in order", 10, it.state)
        last.kill()
        assert it.command.wait(10) == 1, it.state()
        assert it.command.errors == "headwater: error: worker-2 was ended by SIGKILL\n"
        assert "warning" not in it.command.output
    assert_kept(folder)


def kill_workers(it: Started) -> None:
    wait_for(lambda: len(it.workers()) == 2, "two workers are there", 30, it.state)
    for worker in it.workers().values():
        psutil.Process(worker["pid"]).kill()
