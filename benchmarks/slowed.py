"""The digits of examples/mnist.py on workers that take their time, so that staleness is real.

A batch takes at least `compute_s` seconds, times the worker's own SLOWNESS from
its environment. The time is slept inside the compiled loss, beside the gradient,
whose bits stay as they are.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import jax
from jax.experimental import io_callback

from headwater import Task
from headwater.examples import mnist

SLOWNESS_ENV = "HEADWATER_BENCH_SLOWNESS"


def task(data: str = "sample", compute_s: float = 0.0) -> Task:
    """Train on `data`, as mnist.py has it; `compute_s` seconds a batch, where SLOWNESS is 1."""
    fast = mnist.task(data)
    slowness = float(os.environ.get(SLOWNESS_ENV, "1"))

    def sleep() -> None:
        time.sleep(compute_s * slowness)

    def loss(params: Any, batch: Any, key: jax.Array) -> Any:
        # Not pure_callback, which XLA leaves out where its result does not matter.
        io_callback(sleep, None)
        return mnist.loss(params, batch, key)

    return dataclasses.replace(fast, loss=loss) if compute_s else fast
