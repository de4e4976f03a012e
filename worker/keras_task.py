"""A compiled Keras model as a task: its tensors by their paths, and one batch's loss.

What is computed for a batch is Keras's own train step up to the gradient, on its JAX
backend: loss, regularisation, sample weights, metrics. Of the model's variables

    trainable                    are parameters,
    changed by a step            are state, such as BatchNorm's averages,
    neither                      are constants, such as frozen weights,
    seeds of random layers       are not served: each batch has its own, from its number.

Metrics are sums over examples in Keras, and stay so: a batch's share of each metric
variable travels with its gradient, see TALLIES.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from headwater.worker import keras_pickle
from headwater.worker.data import Batch
from headwater.worker.gradient import TALLIES
from headwater.worker.keras_data import KerasBatches, KerasData
from headwater.worker.task import Task
from headwater.worker.tree import PyTree

Arrays = Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Variables:
    """A model's variables by role; the names are Keras's paths."""

    trained: list[str]
    """In the order of `model.trainable_variables`."""

    others: list[tuple[str, str]]
    """(name, role) in the order of `model.non_trainable_variables`; the role is state,
    constant or seed."""

    slots: list[str]
    """Of the optimizer's variables."""

    def named(self, trained: Arrays, others: Arrays) -> tuple[dict[str, Any], dict[str, Any]]:
        """(parameters and constants, state) as the task has them."""
        by_role: dict[str, dict[str, Any]] = {"state": {}, "constant": {}, "seed": {}}
        for (name, role), value in zip(self.others, others, strict=True):
            by_role[role][name] = value
        params = dict(zip(self.trained, trained, strict=True))
        return {**params, **by_role["constant"]}, by_role["state"]

    def in_order(
        self, params: Mapping[str, Any], state: Mapping[str, Any], seeds: Iterator[Any]
    ) -> tuple[list[Any], list[Any]]:
        """(trainable, non-trainable) values as Keras has them."""
        places = {"state": state, "constant": params}
        trained = [params[name] for name in self.trained]
        others = [
            next(seeds) if role == "seed" else places[role][name] for name, role in self.others
        ]
        return trained, others


def variables_of(model: keras.Model, batch: Batch) -> Variables:
    """Sort a built, compiled model's variables by what a step does to them.

    Args:
      batch: One, as `KerasData` gives it; only its shapes are looked at.
    """
    seeds = {
        id(generator.state)
        for layer in model._flatten_layers()
        for generator in layer._seed_generators
    }
    changed = _changed(model, batch)
    unique = _Unique()
    trained = [unique(variable.path) for variable in model.trainable_variables]
    others = []
    for variable, is_changed in zip(model.non_trainable_variables, changed, strict=True):
        role = "seed" if id(variable) in seeds else "state" if is_changed else "constant"
        others.append((unique(variable.path), role))
    own = _Unique()
    return Variables(trained, others, [own(v.path) for v in model.optimizer.variables])


class _Unique:
    """Names that nobody else has: Keras lets two layers be called the same."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def __call__(self, path: str) -> str:
        self._seen[path] += 1
        count = self._seen[path]
        return path if count == 1 else self(f"{path}_{count}")


def _changed(model: keras.Model, batch: Batch) -> list[bool]:
    """Whether a train step assigns each non-trainable variable, found by tracing one."""

    def shapes(variables: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in variables]

    def step(others: list[Any], trained: list[Any], batch: Batch) -> list[Any]:
        metrics = [jnp.zeros(v.shape, v.dtype) for v in model.metrics_variables]
        return _loss_and_updates(model, trained, others, metrics, batch)[1][1]

    others = shapes(model.non_trainable_variables)
    traced = jax.make_jaxpr(step)(others, shapes(model.trainable_variables), batch).jaxpr
    before = traced.invars[: len(others)]
    return [old is not new for old, new in zip(before, traced.outvars, strict=True)]


def _loss_and_updates(
    model: keras.Model, trained: Arrays, others: Arrays, metrics: Arrays, batch: Batch
) -> tuple[Any, tuple[Any, Any, Any]]:
    """(loss, (the metrics' results, non-trainable and metric variables after the step))."""
    x, y, weights = batch
    own = [] if model.optimizer is None else [v.value for v in model.optimizer.variables]
    loss, (unscaled, predicted, others, metrics) = model.compute_loss_and_updates(
        list(trained), list(others), list(metrics), x, y, weights,
        training=True, optimizer_variables=own,
    )  # fmt: skip
    mapping = list(zip(model.metrics_variables, metrics, strict=True))
    with keras.StatelessScope(state_mapping=mapping) as scope:
        model._loss_tracker.update_state(unscaled, sample_weight=_example_count(x))
        logs = model.compute_metrics(x, y, predicted, weights)
    after = [scope.get_current_value(variable) for variable in model.metrics_variables]
    return loss, (logs, list(others), after)


def _example_count(x: Any) -> int:
    return next(leaf.shape[0] for leaf in keras.tree.flatten(x) if leaf is not None)


class KerasLoss:
    """`Task.loss` of a model: (params, state, batch, key) -> (loss, metrics, new state)."""

    def __init__(self, model: keras.Model, variables: Variables) -> None:
        self._model = model
        self._variables = variables
        model.reset_metrics()
        self._metrics_at_first = [np.array(v.value) for v in model.metrics_variables]

    def __call__(
        self,
        params: Mapping[str, Any],
        state: Mapping[str, Any],
        batch: Batch,
        key: jax.Array,
    ) -> tuple[Any, dict[str, Any], PyTree]:
        seeds = _seeds(self._model, self._variables, key)
        trained, others = self._variables.in_order(params, state, seeds)
        first = [jnp.asarray(values) for values in self._metrics_at_first]
        loss, (logs, others, metrics) = _loss_and_updates(
            self._model, trained, others, first, batch
        )
        _, state = self._variables.named(trained, others)
        shares = [
            jnp.ravel(after - before).astype(jnp.float32)
            for before, after in zip(first, metrics, strict=True)
        ]
        shown = {
            name: value for name, value in logs.items() if name != "loss" and jnp.ndim(value) == 0
        }
        return loss, {**shown, TALLIES: jnp.concatenate([jnp.zeros(0), *shares])}, state

    def __reduce__(self) -> tuple[Any, ...]:
        model = keras_pickle.dumps(self._model)
        return _restored_loss, (model, self._variables, self._metrics_at_first)


def _restored_loss(
    model: bytes, variables: Variables, metrics_at_first: list[np.ndarray]
) -> KerasLoss:
    loss = object.__new__(KerasLoss)
    vars(loss).update(
        _model=keras_pickle.loads(model),
        _variables=variables,
        _metrics_at_first=metrics_at_first,
    )
    return loss


def _seeds(model: keras.Model, variables: Variables, key: jax.Array) -> Iterator[jax.Array]:
    """A batch's own state for each of the model's seed generators."""
    for number, ((_, role), variable) in enumerate(
        zip(variables.others, model.non_trainable_variables, strict=True)
    ):
        if role == "seed":
            bits = jax.random.bits(jax.random.fold_in(key, number), variable.shape, np.uint32)
            yield bits.astype(variable.dtype)


class _Init:
    """`Task.init`: the values that the model's variables have when this is made.

    In other processes, which only look at the shapes, they are zero.
    """

    def __init__(self, model: keras.Model, variables: Variables) -> None:
        self._made = variables.named(
            [np.array(v.value) for v in model.trainable_variables],
            [np.array(v.value) for v in model.non_trainable_variables],
        )

    def __call__(self, key: jax.Array) -> PyTree:
        return jax.tree.map(jnp.asarray, self._made)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Zeros, (jax.tree.map(lambda x: (x.shape, x.dtype.name), self._made),)


class _Zeros:
    def __init__(self, made: PyTree) -> None:
        self._made = made

    def __call__(self, key: jax.Array) -> PyTree:
        def is_described(node: Any) -> bool:
            return isinstance(node, tuple) and len(node) == 2 and isinstance(node[1], str)

        return jax.tree.map(
            lambda described: jnp.zeros(*described), self._made, is_leaf=is_described
        )


def task_of(
    model: keras.Model,
    variables: Variables,
    data: KerasData | KerasBatches,
    optimizer: Any,
    *,
    batch_size: int,
    shuffle: bool,
) -> Task:
    """The task of a model that is built and compiled, from the weights it has now on."""
    return Task(
        init=_Init(model, variables),
        loss=KerasLoss(model, variables),
        data=data,
        optimizer=optimizer,
        batch_size=batch_size,
        shuffle=shuffle,
        trainable=functools.partial(operator.contains, frozenset(variables.trained)),
        has_state=True,
    )


def build(model: keras.Model, data: KerasData | KerasBatches, batch_size: int) -> Variables:
    """Build what is not built yet of a compiled model; the variables it has then."""
    # A PyDataset's items are whole batches.
    count = 1 if isinstance(data, KerasBatches) else min(batch_size, len(data))
    batch = data.batch(np.arange(count), np.random.default_rng(0))
    model._symbolic_build(data_batch=batch)
    return variables_of(model, batch)
