"""--stop-when and --patience end a run in order, by what its evaluations say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwater.client.client import Client
from kit import counting
from kit.lives import Lives
from kit.processes import FREE_PORT, Command, run
from kit.waiting import wait_for

ENDLESS = counting.options(examples=1024, epochs=100_000)


NOT_EVALUATED = """
import jax.numpy as jnp, numpy as np
from headwater import ArrayData, Task
task = Task(init=lambda key: {"w": jnp.zeros(2)}, loss=lambda params, batch, key: params["w"].sum(),
            data=ArrayData(x=np.arange(64)), optimizer="sgd(1e-3)", epochs=2)
"""


def report(client: Client, **metrics: float) -> int:
    """Evaluate the newest version."""
    weights = client.pull()
    client.report_evaluation(weights, metrics)
    return weights.version


@pytest.mark.parametrize("exits", [False, True], ids=["serves on", "exits"])
def test_the_first_evaluation_that_is_good_enough_ends_the_run(exits: bool, tmp_path: Path) -> None:
    options = ["--stop-when", "accuracy>=0.9", *["--exit-when-done"] * exits]
    with Lives(tmp_path, ENDLESS, options) as lives:
        server = lives.start()
        words = ("worker", "--task", counting.__file__, "--server", lives.address, *ENDLESS)
        with Command(*words, cwd=tmp_path) as worker, Client(lives.address) as client:
            wait_for(lambda: report(client, accuracy=0.5) > 20, "versions")
            status = client.status()
            assert status["state"] == "training"
            # A second evaluation of one version says nothing.
            wait_for(lambda: client.status()["version"] > status["version"], "a newer version")
            report(client, accuracy=0.95)
            assert worker.wait(30) == 0, worker.errors
            if exits:
                report(client, accuracy=0.96)  # of the final version, which is waited for
                assert server.wait(30) == 0, server.errors
            else:
                assert lives.finished()["durable_version"] == client.status()["version"]
                assert client.pull().version == client.status()["version"]
        assert "the run is over: accuracy 0.95 >= 0.9" in server.errors
        lines = (lives.run_dir / "metrics.jsonl").read_text().splitlines()
        reasons = [
            line["reason"] for line in map(json.loads, lines) if line["kind"] == "early stop"
        ]
        assert reasons == ["accuracy 0.95 >= 0.9"]


def test_patience_ends_the_run_and_it_can_be_continued(tmp_path: Path) -> None:
    with Lives(tmp_path, ENDLESS, ["--patience", "accuracy:2", "--exit-when-done"]) as lives:
        server = lives.start()
        words = ("worker", "--task", counting.__file__, "--server", lives.address, *ENDLESS)
        with Command(*words, cwd=tmp_path) as worker, Client(lives.address) as client:
            for accuracy in (0.5, 0.6, 0.55, 0.6):
                before = client.status()["version"]
                wait_for(lambda: client.status()["version"] > before, "a newer version")  # noqa: B023
                report(client, accuracy=accuracy)
            assert worker.wait(30) == 0, worker.errors
            report(client, accuracy=0.6)  # of the final version, which is waited for
            assert server.wait(30) == 0, server.errors
        assert "accuracy has not been better than 0.6 for 2 evaluations" in server.errors
        ended = lives.start()
        assert lives.status()["version"] > 0
        assert ended.process.poll() is None


def test_a_metric_that_is_not_evaluated_is_said(tmp_path: Path) -> None:
    with Lives(tmp_path, ENDLESS, ["--stop-when", "acuracy>=0.9"]) as lives:
        server = lives.start()
        with Client(lives.address) as client:
            report(client, accuracy=0.95)
            assert client.status()["state"] == "waiting"
            begun, problem = client.status()["problems"]
            assert begun.startswith("--stop-when and --patience go by evaluations, and the task")
            assert "no 'acuracy', which --stop-when" in problem
            assert problem.endswith("it has accuracy")
            report(client, acuracy=0.5)
            assert client.status()["problems"] == [begun]
        wait_for(lambda: "the evaluation has no 'acuracy'" in server.errors, "the warning")


def test_a_rule_for_a_task_without_evaluate_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(NOT_EVALUATED)
    done = run("run", "--task", "task.py", "--workers", "1", "--patience", "loss:3", *FREE_PORT,
               cwd=tmp_path)  # fmt: skip
    assert done.status == 0, done.errors
    assert "warning: --stop-when and --patience go by evaluations, and the task has" in done.output


def test_a_rule_of_another_form_is_refused_before_the_run_begins(tmp_path: Path) -> None:
    words = ("--task", counting.__file__, "--stop-when", "accuracy")
    done = run("server", *words, *FREE_PORT, cwd=tmp_path)

    assert done.status == 2
    assert "--stop-when accuracy: it is a metric, one of >= <= > <, and a number" in done.errors
    assert not (tmp_path / "runs").exists()
