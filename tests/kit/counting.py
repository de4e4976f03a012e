"""The counting task: its weights count how often each example was used.

The gradient is -1 at each example of the batch, and the optimizer is SGD with
learning rate 1, so after E epochs of exactly-once every cell equals E. What is
applied twice or lost shows in the one cell, whatever was killed in between.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from headwater import ArrayData, Task
from headwater.protos import files

if TYPE_CHECKING:
    from headwater.client.client import Client
    from headwater.client.status import Status


def task(
    examples: int = 4096,
    epochs: int = 3,
    batch_size: int = 32,
    padding: int = 0,
    load_s: float = 0.0,
    compute_s: float = 0.0,
    slow_while: str = "",
    begun: str = "",
    faults: str = "",
    shadow: str = "",
    clock: str = "",
) -> Task:
    """A task whose every step can be drawn out, so that a fault can hit it.

    Args:
      padding: float32 zeros added to the weights, to make pushes long.
      load_s: Seconds, on average, that the data of a batch take to load; drawn for each
        batch, between none and twice as many.
      compute_s: Seconds that a gradient takes; times SLOWNESS of the process's environment.
      slow_while: A file: once it is gone, loading and computing take no time.
      begun: A file that grows by a byte with every gradient that is begun (with compute_s).
      faults: The control file of a FaultyDisk, for the process that loads this.
      shadow: The folder of a ForgetfulDisk, likewise.
      clock: A file with the seconds by which the process's wall clock is off.
    """
    if clock:
        real = time.time
        time.time = lambda: real() + float(Path(clock).read_text() or 0)
    if faults or shadow:
        _put_in_a_bad_disk(faults, shadow)

    def pause(seconds: float) -> None:
        if not slow_while or Path(slow_while).exists():
            time.sleep(seconds)

    class Data(ArrayData):
        def batch(self, indices, rng):
            pause(rng.uniform(0, 2 * load_s))
            return super().batch(indices, rng)

    def nothing(index):
        if begun:
            with Path(begun).open("a") as file:
                file.write(".")
        pause(compute_s * float(os.environ.get("SLOWNESS", "1")))
        return np.float32(0.0)

    def init(key):
        return {"count": jnp.zeros(examples), "padding": jnp.zeros(padding)}

    def loss(params, batch, key):
        used = params["count"][batch["index"]]
        # The sum, not the mean, on purpose: one for each example.
        total = -used.sum() + 0.0 * params["padding"].sum()
        if compute_s:
            shape = jax.ShapeDtypeStruct((), np.float32)
            total += jax.pure_callback(nothing, shape, batch["index"])
        return total

    return Task(
        init=init,
        loss=loss,
        data=lambda: Data(index=np.arange(examples)),
        optimizer=optax.sgd(1.0),
        batch_size=batch_size,
        epochs=epochs,
    )


def _put_in_a_bad_disk(faults: str, shadow: str) -> None:
    # A server has only this file's folder on its path.
    sys.path.append(str(Path(__file__).parents[1]))
    from kit.disk import FaultyDisk, ForgetfulDisk

    files.DISK = FaultyDisk(Path(faults)) if faults else ForgetfulDisk(Path(shadow))


def options(**values: object) -> list[str]:
    """The arguments of `task` as words of a command line."""
    return [w for name, value in values.items() for w in ("--task-option", f"{name}={value}")]


def assert_exactly_once(client: Client) -> Status:
    """The run is finished and used every example once an epoch; returns the status."""
    status = client.status()
    weights = client.pull()
    assert status["state"] == "finished", status
    wrong = {
        int(cell): float(weights["count"][cell])
        for cell in np.flatnonzero(weights["count"] != status["epochs"])
    }
    assert not wrong, f"cells that are not {status['epochs']}: {wrong}\n{status}"
    assert weights.version == status["version"] == status["batches_total"], status
    assert status["batches_applied"] == status["batches_total"], status
    under_way = [status[f"batches_{at}"] for at in ("pending", "leased", "admitted")]
    assert under_way == [0, 0, 0], status
    return status
