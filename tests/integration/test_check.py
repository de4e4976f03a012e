"""`headwater check`: what it shows of a task, and what it says of a wrong one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from kit import processes
from kit.commands import (
    PLAIN,
    assert_fails,
    assert_matches,
    quick,
)
from kit.processes import Finished, run


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
