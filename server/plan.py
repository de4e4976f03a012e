"""What a run consists of, from its task and the options that override the task's values."""

from __future__ import annotations

from typing import Any

import jax

from headwater.protos.errors import UsageError
from headwater.server.config import ServerConfig
from headwater.server.optimizer import AbstractOptimizer
from headwater.server.order import BatchOrder
from headwater.server.rounds import Rounds
from headwater.server.settings import Settings
from headwater.server.store import NotFinite, Store, initial
from headwater.worker.load import LoadedTask
from headwater.worker.task import Task
from headwater.worker.user_code import guard_user_code

OUTER_OPTIMIZER = "sgd(0.7, momentum=0.9, nesterov=True)"
"""With local steps, unless another is given: DiLoCo's (Douillard et al. 2023)."""


def rounds_of(task: Task, config: ServerConfig) -> Rounds:
    """Which batches there are, and how many make one push; loads the data, to count it.

    Raises:
      TaskError: There are no examples, or an epoch would have no batch.
    """
    order = BatchOrder(
        example_count=len(task.dataset),
        batch_size=config.batch_size or task.batch_size,
        epochs=config.epochs or task.epochs,
        seed=task.seed if config.seed is None else config.seed,
        shuffle=task.shuffle,
        remainder=task.remainder,
    )
    return Rounds(order, config.local_steps or 1)


def chosen_optimizer(config: ServerConfig, task: Task) -> Any:
    """The server's, as `resolve` takes it: with local steps the task's own is the inner one."""
    if config.optimizer:
        return config.optimizer
    return OUTER_OPTIMIZER if (config.local_steps or 1) > 1 else task.optimizer


def first_store(
    loaded: LoadedTask, optimizer: AbstractOptimizer, seed: int, settings: Settings
) -> Store:
    """Version 0, from the task's own `init`.

    Raises:
      UsageError: The weights are not finite.
      UserCodeError: `init` raised.
      LayoutError: It gave something else than arrays.
    """
    task = loaded.task
    with guard_user_code("Task.init raised"):
        params = task.init(jax.random.key(seed))
    task.tree.check(params)
    try:
        return Store(task.tree, optimizer, initial(task.tree, params, optimizer, settings=settings))
    except NotFinite as error:
        raise UsageError(f"Task.init gave weights that are not finite: {error}") from None
