"""What tests of the commands share: tasks, and how a command is looked at."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from typing import Any

import pytest

from kit.processes import Finished

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


def quick(cases: Iterable[str], *chosen: str) -> list[Any]:
    """The cases; those that are not chosen, of which unit tests see the texts, are slow ones."""
    slow = pytest.mark.slow
    return [case if case in chosen else pytest.param(case, marks=slow) for case in cases]
