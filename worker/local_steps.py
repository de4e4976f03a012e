"""Local steps: an inner optimizer walks over a ticket's batches, its way is pushed.

What is pushed, the pseudo-gradient, is `base - local`: the weights where the walk
began less those where it ended. To the server it is a gradient like any other,
and the server's optimizer is the outer one.

Source: DiLoCo, Douillard et al. 2023 (arXiv 2311.08105), algorithm 1. Differs: the
inner state, such as Adam's moments, starts afresh with each ticket, because workers
keep none, so that killing one loses nothing. Schedules do not start afresh: they
stand where the ticket's first batch stands in the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from headwater.worker.data import ENDLESS_BATCHES, Batch
from headwater.worker.devices import Devices, Placement, example_count
from headwater.worker.gradient import (
    AbstractGradientFunction,
    Gradient,
    GradientFunction,
    Leaves,
    Step,
)
from headwater.worker.optimizer_spec import INNER_OPTION, OPTION, transformation
from headwater.worker.task import Task, TaskError
from headwater.worker.tree import PyTree, described

# By name, since optax keeps some of the classes to itself. Not Adam's count: it
# corrects the bias of moments that do start afresh.
_SCHEDULES = {
    "InjectHyperparamsState",
    "InjectStatefulHyperparamsState",
    "ScaleByScheduleState",
    "WeightDecaySchedule",
    "WrappedScheduleState",
}


class LocalSteps(AbstractGradientFunction):
    """The pseudo-gradient of consecutive batches of one epoch.

    Args:
      task: See `AbstractGradientFunction`.
      seed: The run's.
      optimizer: The inner one; an expression or what `Task.optimizer` may be.
      epochs: Of the run.
      batches_per_epoch: Of the run.
      option: What gave the optimizer if it is an expression, for errors.
      devices: See `AbstractGradientFunction`.

    Raises:
      TaskError: The inner optimizer needs more than the loss, or would change a
        shape, a dtype or the tree of the parameters or of its state.
      SpecError: Its expression cannot be read.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        *,
        optimizer: Any,
        epochs: int,
        batches_per_epoch: int,
        option: str = OPTION,
        devices: Devices = (),
    ) -> None:
        super().__init__(task, seed, devices)
        self._per_epoch = batches_per_epoch
        updates = epochs * batches_per_epoch if batches_per_epoch < ENDLESS_BATCHES else None
        made, self._text = transformation(optimizer, updates, option=option)
        self._inner = optax.with_extra_args_support(made)
        self._shapes = self._check(task.tree.trained_shapes)
        self._move = jax.jit(self._update, donate_argnums=(1, 2))
        self._outside: AbstractGradientFunction | None = None
        """What computes the gradients, if it is not JAX."""
        # Where a walk begins and ends; batches of several sizes may lie differently.
        self._home = Placement(devices[:1])
        self._begin: Any = None
        self._difference: Any = None

    def __call__(
        self,
        weights: Sequence[Any],
        steps: Sequence[Step],
        on_step: Callable[[], None] = lambda: None,
    ) -> Gradient:
        walks = [self._compiled_for(batch) for batch, _, _ in steps]
        _, epoch, number = steps[0]
        position = min(epoch * self._per_epoch + number, np.iinfo(np.int32).max)
        tree = self._task.tree
        # May be the caller's own memory, so it is never donated.
        leaves, before, constants = tree.split(weights)
        leaves, before = jax.device_put((leaves, before))
        place = self._home
        base, before, start = place.put((tree.trained.restore(leaves), before, np.int32(position)))
        params, inner, state = self._begin(base, before, start)
        values: list[Any] = []
        for (placement, walk), (batch, epoch, number) in zip(walks, steps, strict=True):
            if placement.count != place.count:
                params, inner, state = placement.put(place.first((params, inner, state)))
                place = placement
            params, inner, state, value = walk(
                params,
                inner,
                state,
                placement.put_constants(constants),
                placement.put_batch(batch),
                *placement.put((np.uint32(epoch), np.uint32(number))),
            )
            if values:
                # The step before: so the device has the next one while this one waits.
                jax.block_until_ready(values[-1])
                on_step()
            values.append(value)
        params, state = place.first((params, state))
        gradient = [*tree.trained.leaves(self._difference(base, params)), *state]
        jax.block_until_ready(gradient)
        on_step()
        loss, metrics = _means(values, [example_count(batch) or 1 for batch, _, _ in steps])
        return Gradient(loss, metrics, gradient)

    def _compile(self, placement: Placement, batch: Batch) -> Any:
        params, inner = self._shapes
        tree = self._task.tree
        _, state, constants = tree.split(tree.shapes)
        if self._begin is None:
            position = np.zeros((), np.int32)
            self._begin = self._home.compile(self._start, params, state, position)
            self._difference = self._home.compile(_subtract, params, params, donated=(1,))
        if self._task.backend is not None:
            if self._outside is None:
                self._outside = self._task.backend.gradient_function(self._task, self._seed)
            self._outside.compile(batch)
            return self._take_step_outside
        number = np.zeros((), np.uint32)
        arguments = (params, inner, state, constants, batch, number, number)
        # What one step has moved is of no use after the next.
        return placement.compile(self._take_step, *arguments, batch_at=4, donated=(0, 1, 2))

    def _start(
        self, base: PyTree, state: Leaves, position: jax.Array
    ) -> tuple[PyTree, PyTree, Leaves]:
        """The weights, the inner state and the model's state before the first step.

        Every array is a copy, also of what the inner state has of the weights: no two
        arrays that are donated together may share memory.
        """
        inner = _move_schedules(self._inner.init(base), position)
        return jax.tree.map(jnp.copy, (base, inner, state))

    def _take_step(
        self,
        params: PyTree,
        inner: PyTree,
        state: Leaves,
        constants: Leaves,
        batch: Batch,
        epoch: jax.Array,
        number: jax.Array,
    ) -> tuple[PyTree, PyTree, Leaves, tuple[jax.Array, dict[str, Any]]]:
        trained = self._task.tree.trained
        loss, metrics, grads, state = self._loss_and_gradient(
            trained.leaves(params), state, constants, batch, epoch, number
        )
        params, inner = self._update(
            trained.restore(grads), inner, params, loss.astype(jnp.float32)
        )
        return params, inner, state, (loss, metrics)

    def _take_step_outside(
        self,
        params: PyTree,
        inner: PyTree,
        state: Leaves,
        constants: Leaves,
        batch: Batch,
        epoch: np.uint32,
        number: np.uint32,
    ) -> tuple[PyTree, PyTree, Leaves, tuple[float, Mapping[str, float]]]:
        """As `_take_step`; the gradient is the backend's, and only the update JAX's."""
        assert self._outside is not None
        tree = self._task.tree
        weights = [*tree.trained.leaves(params), *state, *constants]
        found = self._outside(weights, [(batch, int(epoch), int(number))])
        grads, after, _ = tree.split(found.leaves)
        loss = np.float32(found.loss)
        params, inner = self._move(tree.trained.restore(grads), inner, params, loss)
        return params, inner, after, (found.loss, found.metrics)

    def _update(
        self, grads: PyTree, inner: PyTree, params: PyTree, loss: jax.Array
    ) -> tuple[PyTree, PyTree]:
        updates, inner = self._inner.update(grads, inner, params, value=loss)
        return optax.apply_updates(params, updates), inner

    def _check(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """Try the inner optimizer on shapes; those of the parameters and of its state."""
        loss = jax.ShapeDtypeStruct((), jnp.float32)
        try:
            position = jax.ShapeDtypeStruct((), jnp.int32)
            before = jax.eval_shape(self._start, params, [], position)[:2]
            after = jax.eval_shape(self._update, params, before[1], params, loss)
        except Exception as error:
            raise TaskError(
                f"the inner optimizer, {self._text}, cannot make a local step from a gradient and "
                f"its loss alone: {type(error).__name__}: {error}"
            ) from error
        for what, old, new in zip(("parameters", "state"), before, after, strict=True):
            if described(old) != described(new):
                raise TaskError(
                    f"the inner optimizer, {self._text}, changes the shapes, dtypes or structure "
                    f"of its {what}, which must stay the same from step to step"
                )
        return before


def gradient_of_one(task: Task, seed: int, devices: Devices = ()) -> AbstractGradientFunction:
    """A batch's gradient, by JAX or by the task's backend."""
    if task.backend is not None:
        return task.backend.gradient_function(task, seed)
    return GradientFunction(task, seed, devices)


def gradient_function(
    task: Task,
    seed: int,
    *,
    steps: int,
    inner_optimizer: str | None,
    epochs: int,
    batches_per_epoch: int,
    devices: Devices = (),
) -> AbstractGradientFunction:
    """What a run's workers compute: gradients, or with local steps pseudo-gradients.

    Args:
      task: See `AbstractGradientFunction`.
      seed: The run's.
      steps: Batches of a push; 1 is training without local steps.
      inner_optimizer: With local steps, a SPEC; nothing means the task's optimizer.
      epochs: Of the run.
      batches_per_epoch: Of the run.
      devices: See `AbstractGradientFunction`.

    Raises:
      TaskError, SpecError: See `LocalSteps`.
    """
    if steps == 1:
        return gradient_of_one(task, seed, devices)
    return LocalSteps(
        task,
        seed,
        optimizer=inner_optimizer or task.optimizer,
        epochs=epochs,
        batches_per_epoch=batches_per_epoch,
        option=INNER_OPTION if inner_optimizer else OPTION,
        devices=devices,
    )


def _move_schedules(state: PyTree, position: jax.Array) -> PyTree:
    """An optax state whose schedules stand at `position`, those inside others included."""

    def is_schedule(node: Any) -> bool:
        return type(node).__name__ in _SCHEDULES

    def move(node: Any) -> Any:
        if not is_schedule(node):
            return node
        inner = jax.tree.map(move, node, is_leaf=lambda x: x is not node and is_schedule(x))
        return inner._replace(count=position)

    return jax.tree.map(move, state, is_leaf=is_schedule)


def _subtract(base: PyTree, local: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, base, local)


def _means(
    values: Sequence[tuple[Any, Mapping[str, Any]]], example_counts: Sequence[int]
) -> tuple[float, dict[str, float]]:
    """Loss and metrics over all examples, from their means over each batch."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    total = 0.0
    for (loss, metrics), count in zip(values, example_counts, strict=True):
        total += count * float(loss)
        for name, metric in metrics.items():
            sums[name] += count * float(metric)
            counts[name] += count
    return total / sum(example_counts), {name: sums[name] / counts[name] for name in sums}
