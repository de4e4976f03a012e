"""A task without code: named arrays from a file, an optimizer, and perhaps a number of examples.

For runs whose gradients come from programs that know nothing of JAX: workers that
speak the protocol, or push sessions. What is floating or complex is trained; integers
and booleans are constants. The optimizer sees a flat dict {name: array}, with None in
a constant's place; so a mask is a dict of the same names.

The arrays' names, dtypes and shapes are kept in run.json: a run that is continued
does not need the file any more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from headwater.protos import tensor_file
from headwater.protos.errors import UsageError
from headwater.protos.layout import DTYPES, FLOATING
from headwater.server.config import NEEDS_BATCHES, ServerConfig
from headwater.server.dial import Dial
from headwater.server.plan import no_weights
from headwater.server.run_dir import RunDir
from headwater.worker.data import ExamplesElsewhere
from headwater.worker.load import LoadedTask
from headwater.worker.task import Task

log = logging.getLogger("headwater.server")

Arrays = Mapping[str, tuple[str, tuple[int, ...]]]


def weights_task(config: ServerConfig, examples: int | None) -> LoadedTask:
    """What `headwater server` serves without --task: a new run, or the one in its directory.

    Args:
      config: Its `init` is the file of a new run.
      examples: The workers have so many; None: as before, or none, and so no batches.

    Raises:
      UsageError: The file, an option or the run directory cannot work; says which.
    """
    record = RunDir.recorded(config.run_dir)
    if record is not None:
        if record.arrays is None:
            raise UsageError(
                f"{config.run_dir} holds a run of the task {record.task}; continue it with --task, "
                "which names the task's code"
            )
        name, arrays = record.task, record.arrays
        config = record.settings(config)
        examples = record.example_count if examples is None else examples
    elif config.init is None:
        raise UsageError(
            "give --task TASK, or for a run without task code --init WEIGHTS.safetensors "
            "--optimizer SPEC"
        )
    else:
        name, arrays = Path(config.init).stem, _specs(Path(config.init))
    _check(config, examples or 0)
    _use_64_bits_if_needed(arrays)
    constants = [
        f"{name} ({dtype})" for name, (dtype, _) in arrays.items() if dtype not in FLOATING
    ]
    if constants:
        log.info("served, and not trained, for they are no floats: %s", ", ".join(constants))
    task = Task(
        # Only traced, for names, dtypes and shapes: the numbers come from the file.
        init=lambda key: {name: jnp.zeros(shape, dtype) for name, (dtype, shape) in arrays.items()},
        loss=_no_loss,
        data=ExamplesElsewhere(examples or 0),
        optimizer=config.optimizer,
        batch_size=config.batch_size or 1,
        epochs=config.epochs or 1,
        seed=config.seed or 0,
        trainable=lambda name: arrays[name][0] in FLOATING,
    )
    return LoadedTask(task, name, {}, "", arrays=arrays)


def _no_loss(params: Any, batch: Any, key: jax.Array) -> Any:
    raise LookupError("a run without a task has no loss: its gradients are computed elsewhere")


def _specs(path: Path) -> Arrays:
    try:
        arrays = tensor_file.read_specs(path)
    except (OSError, tensor_file.FormatError) as error:
        raise no_weights(path, error) from None
    for name, (dtype, _) in arrays.items():
        if not name or dtype not in DTYPES:
            raise UsageError(
                f"--init {path}: the array {name!r} of dtype {dtype} cannot be served; each has a "
                f"name, and one of {', '.join(DTYPES)}"
            )
    if not any(dtype in FLOATING for dtype, _ in arrays.values()):
        found = ", ".join(f"{name} ({dtype})" for name, (dtype, _) in arrays.items())
        raise UsageError(
            f"--init {path}: there is nothing to train in it, only {found or 'no array at all'}; "
            "what is trained is floating or complex"
        )
    return arrays


def _check(config: ServerConfig, examples: int) -> None:
    if not config.optimizer:
        raise UsageError(
            "without --task nothing says how the weights move: add --optimizer SPEC, such as "
            "--optimizer 'adam(1e-3)'"
        )
    if examples < 0:
        raise UsageError(f"--examples {examples} must be at least 1; leave it out for none")
    if (config.local_steps or 1) > 1 or config.inner_optimizer:
        raise UsageError(
            "--local-steps and --inner-optimizer need --task: the inner optimizer is the task's"
        )
    if examples and not config.batch_size:
        raise UsageError(f"--examples {examples} is to be dealt out in batches: add --batch-size N")
    if not examples:
        for flag, value in (("--batch-size", config.batch_size), ("--epochs", config.epochs)):
            if value is not None:
                raise UsageError(
                    f"{flag} {value} without --task says nothing unless there are --examples N to "
                    "deal out to workers; add it, or leave both out for push sessions alone"
                )
        if Dial.parse(config.consistency or "async").group is not None:
            raise UsageError(f"--consistency {config.consistency}: {NEEDS_BATCHES}")


def _use_64_bits_if_needed(arrays: Arrays) -> None:
    """JAX would make 32 bits of 64 without a word."""
    if any(DTYPES[dtype].itemsize >= 8 and dtype != "complex64" for dtype, _ in arrays.values()):
        jax.config.update("jax_enable_x64", True)
