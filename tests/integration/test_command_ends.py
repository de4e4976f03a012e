"""How a server and what was started beside it end, from start to the end."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from headwater.client.processes import free_address
from kit import processes
from kit.commands import (
    PACED,
    assert_matches,
)
from kit.processes import Command, run, status_of
from kit.waiting import wait_for


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
