"""`Task`: what a user writes. Server, workers and evaluators all load the same one."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from headwater.worker.backend import AbstractBackend
from headwater.worker.data import ExamplesElsewhere, Generated, Indexed
from headwater.worker.tree import ModelTree, PyTree

NAME = r"[\w.-]*\w"
"""Of a task: it becomes part of the name of the run directory."""


class TaskError(ValueError):
    """The task cannot be trained as written; says which field and what it needs."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One training: initial parameters, loss, data, optimizer, evaluation.

    Nothing is computed or loaded when a Task is made.

    Raises:
      TaskError: A field has a value that cannot work.
    """

    init: Callable[[jax.Array], PyTree]
    """(key) -> params: any pytree of floating or complex arrays. Run by the
    server only, with `jax.random.key(seed)`; workers trace it for its shapes.
    With `has_state`: (key) -> (params, state)."""

    loss: Callable[..., Any]
    """(params, batch, key) -> scalar, or (scalar, {"accuracy": scalar, ...}):
    means over the batch's examples, traceable by `jax.jit`. `key` is folded
    from (seed, epoch, batch number), so that the same batch gives the same
    gradient on any worker. With `has_state`: (params, state, batch, key) ->
    (scalar, metrics, new_state)."""

    data: Indexed | Generated | Callable[[], Indexed | Generated]
    """The training examples, or how batches are made, or a function that returns
    either, called on first use."""

    optimizer: Any
    """An optax GradientTransformation, a SPEC string such as "adam(1e-3)", or a
    function (total_updates) -> GradientTransformation."""

    batch_size: int = 32
    """Examples in a batch."""

    epochs: int = 1
    """How often every example is used."""

    shuffle: bool = True
    """Whether each epoch has an order of its own, drawn from the seed."""

    seed: int = 0
    """Of initial parameters, order and keys. 0 to 2**32 - 1."""

    remainder: Literal["keep", "drop"] = "keep"
    """What becomes of an epoch's last batch when it is short."""

    evaluate: Callable[..., Mapping[str, Any]] | None = None
    """(params) -> {"accuracy": scalar, ...}, on data that is not trained on. With
    `has_state`: (params, state) -> the same."""

    trainable: Callable[[str], bool] | None = None
    """(name) -> whether the parameter of this name is trained. The others are
    constants: served, kept, and never changed; they may be of any dtype. None: all."""

    has_state: bool = False
    """Whether there is state beside the parameters that the loss computes anew, such
    as BatchNorm's statistics: any pytree of arrays of numbers. Workers' new states are
    merged: floats move by (new - base) / (1 + staleness), integers by the change."""

    name: str | None = None
    """What the task is called, in place of its file's name; a worker's must be the server's."""

    backend: AbstractBackend | None = None
    """What computes the gradients in place of JAX, which then never calls `loss`: adapters of
    other frameworks set it (see `torch_task`)."""

    def __post_init__(self) -> None:
        for field in ("init", "loss"):
            if not callable(getattr(self, field)):
                raise TaskError(f"Task.{field} must be a function, not {getattr(self, field)!r}")
        for field in ("evaluate", "trainable"):
            value = getattr(self, field)
            if value is not None and not callable(value):
                raise TaskError(f"Task.{field} must be a function or None, not {value!r}")
        if type(self.has_state) is not bool:
            raise TaskError(f"Task.has_state must be True or False, not {self.has_state!r}")
        for field in ("batch_size", "epochs"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TaskError(f"Task.{field} must be a whole number from 1 on, not {value!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise TaskError(f"Task.seed must be a whole number in [0, 2**32), not {self.seed!r}")
        if self.name is not None and not re.fullmatch(NAME, str(self.name)):
            raise TaskError(
                f"Task.name is for a folder: letters, digits, - and _; not {self.name!r}"
            )
        if self.remainder not in ("keep", "drop"):
            raise TaskError(f'Task.remainder must be "keep" or "drop", not {self.remainder!r}')

    def __getstate__(self) -> dict[str, Any]:
        """Without what was loaded and traced: whoever gets a copy finds it by itself."""
        kept = vars(self).items()
        made = functools.cached_property
        return {
            name: v for name, v in kept if not isinstance(getattr(type(self), name, None), made)
        }

    @functools.cached_property
    def dataset(self) -> Indexed | Generated:
        """The training examples; loads them where `data` is a function.

        Raises:
          TaskError: They are neither `Indexed` nor `Generated`, or there are none.
        """
        data = self.data
        is_one = isinstance(data, Indexed | Generated) and not isinstance(data, type)
        if not is_one and callable(data):
            data = data()
        if isinstance(data, Generated):
            return data
        if not isinstance(data, Indexed):
            raise TaskError(
                f"Task.data is {type(data).__name__}, which lacks len() or batch(indices, rng); "
                "wrap arrays in ArrayData(x=..., y=...), and lists or map-style datasets in "
                "from_items(source)"
            )
        if len(data) < 1 and not isinstance(data, ExamplesElsewhere):
            raise TaskError("Task.data has no examples")
        return data

    def example_count(self, batch_size: int) -> int:
        """Examples of an epoch, of batches of this size where they are made."""
        data = self.dataset
        if isinstance(data, Generated):
            return data.batches_per_epoch * batch_size
        return len(data)

    @functools.cached_property
    def tree(self) -> ModelTree:
        """The tensors' names, roles, shapes and structure, by tracing `init`.

        Raises:
          LayoutError: See `ModelTree`.
        """
        made = jax.eval_shape(self.init, jax.random.key(self.seed))
        return ModelTree(made, has_state=self.has_state, trainable=self.trainable)

    def restore(self, weights: Mapping[str, Any]) -> PyTree:
        """The user's own tree from named weights, such as `Client.pull` gives.

        That is params, or with `has_state` (params, state).

        Raises:
          LayoutError: The names or shapes are of another model.
        """
        return self.tree.restore_named(weights)


def batch_sizes(task: Task, batch_size: int) -> list[int]:
    """The leading sizes that batches have: the full one, and the short last one if kept."""
    full, short = divmod(task.example_count(batch_size), batch_size)
    sizes = [batch_size] if full else []
    return [*sizes, short] if short and task.remainder == "keep" else sizes


def batches_per_epoch(example_count: int, batch_size: int, remainder: str) -> int:
    """How many batches one epoch has.

    Raises:
      TaskError: None: fewer examples than one batch, and the remainder is dropped.
    """
    full, short = divmod(example_count, batch_size)
    count = full + (1 if short and remainder == "keep" else 0)
    if count == 0:
        raise TaskError(
            f"an epoch has no batch: {example_count} examples, batch size {batch_size}, and the "
            'short batch is dropped; use remainder="keep" or a smaller batch size'
        )
    return count
