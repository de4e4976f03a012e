"""What a run consists of, from its task and the options that override the task's values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from headwater.protos import tensor_file
from headwater.protos.errors import UsageError
from headwater.protos.layout import LayoutError
from headwater.server.averaged import Averaged
from headwater.server.config import ServerConfig
from headwater.server.dial import Dial
from headwater.server.optimizer import AbstractOptimizer, resolve
from headwater.server.order import BatchOrder
from headwater.server.rounds import Rounds
from headwater.server.settings import Settings
from headwater.server.store import NotFinite, Store, initial
from headwater.worker.data import Generated
from headwater.worker.load import LoadedTask
from headwater.worker.task import Task
from headwater.worker.tree import ModelTree, PyTree
from headwater.worker.user_code import guard_user_code

OUTER_OPTIMIZER = "sgd(0.7, momentum=0.9, nesterov=True)"
"""With local steps in sync mode, unless another is given: DiLoCo's (Douillard et al. 2023)."""

ASYNC_OUTER_OPTIMIZER = "delayed_nesterov(0.7, delay=8)"
"""Otherwise: to plain Nesterov, staleness does harm (Liu et al. 2024; docs/consistency.md)."""


def rounds_of(task: Task, config: ServerConfig) -> Rounds:
    """Which batches there are, and how many make one push; loads the data, to count it.

    Raises:
      TaskError: There are no examples, or an epoch would have no batch.
    """
    batch_size = config.batch_size or task.batch_size
    order = BatchOrder(
        example_count=task.example_count(batch_size),
        batch_size=batch_size,
        epochs=config.epochs or task.epochs,
        seed=task.seed if config.seed is None else config.seed,
        shuffle=task.shuffle and not isinstance(task.dataset, Generated),
        remainder=task.remainder,
    )
    return Rounds(order, config.local_steps or 1)


def with_outer_optimizer(config: ServerConfig) -> ServerConfig:
    """With local steps the task's own optimizer is the inner one: name an outer one, if none is."""
    if config.optimizer or (config.local_steps or 1) == 1:
        return config
    in_sync = Dial.parse(config.consistency or "async").group is not None
    outer = OUTER_OPTIMIZER if in_sync else ASYNC_OUTER_OPTIMIZER
    return dataclasses.replace(config, optimizer=outer)


def optimizer_of(
    task: Task, spec: str | None, ema: float | None, updates: int | None
) -> AbstractOptimizer:
    """What moves a run's weights.

    Args:
      task: Has an optimizer of its own.
      spec: --optimizer, in place of that.
      ema: --ema.
      updates: Of the whole run; None if it has no end.

    Raises:
      OptimizerError, SpecError, UserCodeError: See `resolve`.
    """
    optimizer = resolve(spec or task.optimizer, updates)
    return Averaged(optimizer, ema) if ema else optimizer


def first_store(
    loaded: LoadedTask,
    optimizer: AbstractOptimizer,
    seed: int,
    settings: Settings,
    init: str | None = None,
) -> Store:
    """Version 0, from the task's own `init`, or from the weights in the file `init`.

    Raises:
      UsageError: The weights are not finite, or the file's are not the task's.
      UserCodeError: `init` raised.
      LayoutError: It gave something else than arrays.
    """
    task = loaded.task
    if init is not None:
        made = _weights_of(Path(init), task.tree)
    else:
        with guard_user_code("Task.init raised"):
            made = task.init(jax.random.key(seed))
    task.tree.check(made)
    try:
        return Store(task.tree, optimizer, initial(task.tree, made, optimizer, settings=settings))
    except NotFinite as error:
        whose = "Task.init gave" if init is None else f"{init} has"
        raise UsageError(f"{whose} weights that are not finite: {error}") from None


def no_weights(path: Path, error: Exception) -> UsageError:
    """What is wrong with the file of --init, which could not be read."""
    reason = getattr(error, "strerror", None) or error
    return UsageError(f"--init {path}: {reason}; it is a safetensors file of weights")


def _weights_of(path: Path, tree: ModelTree) -> PyTree:
    """The task's tree with the weights of a safetensors file, floats of another width cast.

    Raises:
      UsageError: The file cannot be read, or its tensors are not the task's.
    """
    try:
        arrays = tensor_file.read_file(path)
    except (OSError, tensor_file.FormatError) as error:
        raise no_weights(path, error) from None
    try:
        found = tree.leaves(tree.restore_named(arrays))
    except LayoutError as error:
        raise UsageError(f"--init {path}: {error}") from None
    leaves = []
    for spec, leaf in zip(tree.layout.tensors, found, strict=True):
        is_float = all(jnp.issubdtype(dtype, jnp.inexact) for dtype in (leaf.dtype, spec.dtype))
        is_kind = jnp.iscomplexobj(leaf) == jnp.issubdtype(spec.dtype, jnp.complexfloating)
        if leaf.dtype != spec.dtype and not (is_float and is_kind):
            raise UsageError(
                f"--init {path}: {spec.name} is {leaf.dtype.name}, the model's is {spec.dtype.name}"
            )
        leaves.append(leaf.astype(spec.dtype))
    return tree.restore(leaves)
