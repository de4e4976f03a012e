"""`headwater server --init FILE --optimizer SPEC`, without task code; a worker that has none."""

from __future__ import annotations

import ast
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from headwater.client.client import Client
from headwater.examples import numpy_worker
from kit import counting
from kit.processes import FREE_PORT, run
from kit.served import COUNTING, ServedLives, program, write_weights
from kit.waiting import wait_for

WORKER = "headwater.examples.numpy_worker"
EXAMPLES, EPOCHS = 600, 3


def test_named_arrays_are_served_without_a_task_and_again_without_their_file(
    tmp_path: Path,
) -> None:
    arrays = {"b/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array([7])}
    with ServedLives(tmp_path, ["--optimizer", "adam(1e-3)"], **arrays) as lives:
        lives.start()
        with Client(lives.address) as client:
            status, weights = client.status(), client.pull()
            assert status["task"] == "counts"
            assert [status[f"batches_{of}"] for of in ("total", "pending")] == [None, 0]
            assert (status["example_count"], status["optimizer"]) == (0, "adam(1e-3)")
            assert {name: array.dtype for name, array in weights.items()} == {
                "b/kernel": np.float32,
                "n": np.int64,
            }
            np.testing.assert_array_equal(weights["b/kernel"], arrays["b/kernel"])
        lives.kill()
        (tmp_path / "counts.safetensors").unlink()

        lives.start()
        with Client(lives.address) as client:
            assert client.pull()["n"] == 7
        assert lives.command is not None
        lives.command.send(signal.SIGINT)
        assert lives.command.wait() == 130
        resume = lives.command.errors.partition("go on with: headwater ")[2].splitlines()[0]

        lives.start()  # what it printed, word by word
        lives.kill()
        assert lives.command.arguments == [w for w in shlex.split(resume) if w]


def test_a_worker_of_numpy_and_the_proto_alone_trains_to_an_exact_end(tmp_path: Path) -> None:
    options = ["--examples", str(EXAMPLES), "--batch-size", "7", "--epochs", str(EPOCHS)]
    count = np.zeros(EXAMPLES, np.float32)
    with ServedLives(tmp_path, [*COUNTING, *options], count=count, frozen=np.array([5])) as lives:
        lives.start()
        with (
            program("-m", WORKER, lives.address, cwd=tmp_path, PAUSE_S="0.01") as killed,
            program("-m", WORKER, lives.address, cwd=tmp_path, PAUSE_S="0.005") as other,
            Client(lives.address) as client,
        ):
            wait_for(lambda: len(client.status()["workers"]) == 2, "both are here")
            wait_for(lambda: client.status()["version"] > 20, "they train", state=client.status)
            killed.kill()
            lives.finished()
            assert other.wait(20) == 0, other.stdout
            assert other.stdout is not None
            assert other.stdout.read() == "BYE_FINISHED\n"
            status = counting.assert_exactly_once(client)
            assert status["rejected"] == dict.fromkeys(status["rejected"], 0)
            assert client.pull()["frozen"] == 5
        replayed = run("replay", "run", "--task", counting.__file__, cwd=tmp_path)
        assert replayed.status == 2
        assert "its gradients were computed by programs of their own" in replayed.errors


def test_that_worker_is_small_and_uses_no_other_module_of_ours() -> None:
    source = Path(numpy_worker.__file__).read_text()
    assert len(source.splitlines()) < 150
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
    foreign = {name for name in used if name.partition(".")[0] not in sys.stdlib_module_names}
    assert foreign == {"grpc", "numpy", "headwater.protos.parameter_server_pb2"}


def test_without_examples_workers_are_sent_away(tmp_path: Path) -> None:
    with ServedLives(tmp_path, COUNTING, count=np.zeros(4, np.float32)) as lives:
        lives.start()
        with program("-m", WORKER, lives.address, cwd=tmp_path) as worker:
            assert worker.wait(20) == 1
            assert worker.stdout is not None
            assert "the server's run has no batches to give to workers" in worker.stdout.read()
        refused = run("set", "consistency=sync:2", "--server", lives.address, cwd=tmp_path)
        assert refused.status == 2
        assert "a run without --examples has none" in refused.errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--init", "counts.safetensors"), "add --optimizer SPEC"),
        (("--task", counting.__file__, "--examples", "9"), "the task's data say how many"),
    ],
)
def test_wrong_usage_is_exit_status_2(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    write_weights(tmp_path, count=np.zeros(2, np.float32))
    done = run("server", *FREE_PORT, *words, cwd=tmp_path)
    assert done.status == 2
    assert message in done.errors
    assert len(done.errors.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
