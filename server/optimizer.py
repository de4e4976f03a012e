"""How the weights move by a gradient: an interface, and optax behind it.

The optimizer sees the user's own tree, None leaves included. What it is given
beside the gradient is the push's loss, as optax's `value`; a transformation
that needs more (a line search needs the loss as a function) cannot be served.

Its numbers can be changed while it trains. Until one is, the update is plain
optax, bit for bit: a traced number keeps XLA from folding it into its
neighbours, which moves last bits (of adafactor's, say), so both updates are
compiled and the plain one is taken while every number has its own value.
Tracing them all alone would halve the compilation, and break that promise.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from headwater.worker import optimizer_spec
from headwater.worker.optimizer_spec import Expression, Number, OptimizerError
from headwater.worker.tree import PyTree, described

Scalar = jax.Array | float

UPDATE_SCALE = "update_scale"

_NOTHING: Mapping[str, Scalar] = MappingProxyType({})


class Change(enum.Enum):
    """What a change of a hyper-parameter costs."""

    LIVE = "live"
    """It takes effect at the next update, and nothing is compiled."""
    RECOMPILED = "recompiled"
    """The update is compiled anew, once."""
    IN_STATE = "in state"
    """It stands in the optimizer's own state, and nothing is compiled."""


@dataclasses.dataclass(frozen=True)
class HyperParameter:
    """A number of the optimizer's."""

    name: str
    value: float | None
    """As the optimizer was written; None where a schedule gives it."""
    change: Change


class AbstractOptimizer(abc.ABC):
    """What moves the weights. Traced by `jax.jit`, so it is pure.

    One that overrides no more than `init` and `apply` has no numbers to change.
    """

    text: str
    """For people, and for the run's record."""

    @abc.abstractmethod
    def init(self, params: PyTree) -> PyTree:
        """The state before the first update: a pytree of arrays."""

    @abc.abstractmethod
    def apply(
        self,
        grads: PyTree,
        state: PyTree,
        params: PyTree,
        loss: jax.Array,
        live: Mapping[str, Scalar] = _NOTHING,
        scale: Scalar | None = None,
    ) -> tuple[PyTree, PyTree]:
        """The parameters and the state after one update.

        Args:
          grads: The tree of `params`: same shapes and dtypes.
          state: From `init` or the update before.
          params: The weights before.
          loss: float32 scalar, the mean over the gradient's batch.
          live: What `live_values` gave: Python's floats, which `jax.jit` traces.
          scale: Multiplies what is added to the weights, not what the state
            takes from the gradient.
        """

    def evaluation_params(self, state: PyTree, params: PyTree) -> PyTree | None:
        """The weights to evaluate, where the optimizer has others than those it moves.

        Args:
          state: From `init` or an update.
          params: Of the same version.

        Returns:
          A tree of the same structure, shapes and dtypes; None: they are `params`.
        """
        return None

    def hyper_parameters(self, state: PyTree) -> dict[str, HyperParameter]:
        """The numbers that can be changed, by name."""
        return {}

    def live_values(self, set_values: Mapping[str, float]) -> dict[str, float]:
        """What `apply` must be given as `live` when these values are set.

        NaN means to follow the schedule. Values of numbers that are not live are
        passed over. The keys change, and with them what is compiled, at most once.

        Raises:
          OptimizerError: One is beyond what the traced number can hold.
        """
        return {}

    def compiled_in(self, set_values: Mapping[str, float]) -> dict[str, float]:
        """Those of the values that `with_numbers` takes."""
        return {}

    def in_state(self, set_values: Mapping[str, float]) -> dict[str, float]:
        """Those of the values that `set_in_state` takes, or refuses if none such is there."""
        return dict(set_values)

    def with_numbers(self, values: Mapping[str, float], params: PyTree) -> AbstractOptimizer:
        """The optimizer as if it had been written with these RECOMPILED numbers.

        Args:
          values: By name.
          params: Arrays or their shapes; nothing is computed.

        Raises:
          OptimizerError: There is no such number, or a value cannot be had: optax
            refuses it, it is beyond what the update computes with, or the state
            would be of another kind.
        """
        return self if not values else _refuse(self.text, values, ())

    def set_in_state(self, state: PyTree, values: Mapping[str, float]) -> PyTree:
        """The state with these IN_STATE numbers, of the dtypes they had.

        Raises:
          OptimizerError: There is no such number, a schedule writes it, or its
            dtype cannot hold the value.
        """
        return state if not values else _refuse(self.text, values, ())


class OptaxOptimizer(AbstractOptimizer):
    """Any optax GradientTransformation that needs at most `value`.

    A SPEC's numbers are those of its expression. Of a GradientTransformation
    they cannot be seen, so that all it offers is to scale its updates. What
    `optax.inject_hyperparams` put in the state is found in both.
    """

    def __init__(
        self, source: optax.GradientTransformation | Expression | _Closed, text: str
    ) -> None:
        self.text = text
        self._source: Expression | _Closed = (
            source if isinstance(source, Expression | _Closed) else _Closed(source)
        )
        self._plain = self._source.build({})

    def init(self, params: PyTree) -> PyTree:
        # Python numbers in the state become what they are after the first update.
        return jax.tree.map(
            lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), self._plain.init(params)
        )

    def apply(
        self,
        grads: PyTree,
        state: PyTree,
        params: PyTree,
        loss: jax.Array,
        live: Mapping[str, Scalar] = _NOTHING,
        scale: Scalar | None = None,
    ) -> tuple[PyTree, PyTree]:
        def move(transformation: optax.GradientTransformation) -> tuple[PyTree, PyTree]:
            served = optax.with_extra_args_support(transformation)
            updates, after = served.update(grads, state, params, value=loss)
            return optax.apply_updates(params, updates), after

        def moved_otherwise() -> tuple[PyTree, PyTree]:
            changed = self._source.build(traced)
            return move(changed if scale is None else _scaled(changed, scale))

        if not live and scale is None:
            return move(self._plain)
        # Weakly typed, as Python's numbers are, so that bfloat16 stays bfloat16.
        traced = {name: jax.lax.full_like(0.0, value) for name, value in live.items()}
        own = [_is_own(value, self._source.numbers[name]) for name, value in traced.items()]
        if scale is not None:
            own.append(jnp.asarray(scale) == 1)
        return jax.lax.cond(
            functools.reduce(operator.and_, own), lambda: move(self._plain), moved_otherwise
        )

    def evaluation_params(self, state: PyTree, params: PyTree) -> PyTree | None:
        """Those of a schedule-free optimizer (Defazio et al. 2024, arXiv 2405.15682)."""

        def is_one(node: Any) -> bool:
            return isinstance(node, optax.contrib.ScheduleFreeState)

        found = list(filter(is_one, jax.tree.leaves(state, is_leaf=is_one)))
        # One within another, or of a part of the weights, is whoever's wrote it.
        if len(found) != 1 or described(found[0].z)[0] != described(params)[0]:
            return None
        made = optax.contrib.schedule_free_eval_params(found[0], params)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), made, params)

    def hyper_parameters(self, state: PyTree) -> dict[str, HyperParameter]:
        written = {
            name: HyperParameter(
                name, number.value, Change.LIVE if number.is_live else Change.RECOMPILED
            )
            for name, number in self._source.numbers.items()
        }
        return written | self._in_state(state)

    def live_values(self, set_values: Mapping[str, float]) -> dict[str, float]:
        values = {}
        for name, number in self._source.numbers.items():
            if name in set_values and (number.is_live or name == UPDATE_SCALE):
                self._check_held(name, set_values[name])
                values[name] = float(set_values[name])
            elif number.is_live:
                values[name] = math.nan if number.value is None else number.value
        return values

    def compiled_in(self, set_values: Mapping[str, float]) -> dict[str, float]:
        own, live = self._source.numbers, self.live_values(set_values)
        return {k: v for k, v in set_values.items() if k in own and k not in live}

    def in_state(self, set_values: Mapping[str, float]) -> dict[str, float]:
        return {k: v for k, v in set_values.items() if k not in self._source.numbers}

    def with_numbers(self, values: Mapping[str, float], params: PyTree) -> AbstractOptimizer:
        if not values:
            return self
        own = [name for name, number in self._source.numbers.items() if not number.is_live]
        if not values.keys() <= set(own):
            _refuse(self.text, values, own)
        for name, value in values.items():
            self._check_held(name, value)
        try:
            other = OptaxOptimizer(
                self._source.with_numbers({k: float(v) for k, v in values.items()}), self.text
            )
            check(other, params)
        except OptimizerError as error:
            raise self._cannot_have(values, str(error)) from error
        except optimizer_spec.SpecError as error:
            raise self._cannot_have(values, error.what) from error
        if described(jax.eval_shape(other.init, params)) != described(
            jax.eval_shape(self.init, params)
        ):
            raise self._cannot_have(
                values, "its state would change in shape, dtype or structure in the middle of a run"
            )
        return other

    def set_in_state(self, state: PyTree, values: Mapping[str, float]) -> PyTree:
        own = self._in_state(state)
        if not values.keys() <= own.keys():
            _refuse(self.text, values, own)
        for name in values:
            if own[name].value is None:
                remedy = f"; set {UPDATE_SCALE}" if UPDATE_SCALE in self._source.numbers else ""
                raise self._cannot_have(
                    {name: values[name]}, f"a schedule overwrites it at each update{remedy}"
                )

        def put(name: str, number: jax.Array, scheduled: bool) -> jax.Array:
            if name not in values:
                return number
            whole = not jnp.issubdtype(number.dtype, jnp.inexact)
            if whole and not float(values[name]).is_integer():
                raise self._cannot_have({name: values[name]}, "it is a whole number")
            self._check_held(name, values[name], number.dtype)
            return jax.device_put(np.asarray(values[name], number.dtype))  # compiles nothing

        return _map_injected(put, state, self._source.numbers)

    def _in_state(self, state: PyTree) -> dict[str, HyperParameter]:
        found: dict[str, HyperParameter] = {}

        def see(name: str, number: jax.Array, scheduled: bool) -> jax.Array:
            value = None if scheduled else float(number)
            found[name] = HyperParameter(name, value, Change.IN_STATE)
            return number

        _map_injected(see, state, self._source.numbers)
        return found

    def _check_held(self, name: str, value: float, dtype: Any = float) -> None:
        """By default, of a number in the update itself: of the precision that JAX has."""
        kept = jax.dtypes.canonicalize_dtype(dtype)
        info: Any = jnp.finfo if jnp.issubdtype(kept, jnp.inexact) else jnp.iinfo
        # Python's own, which compare as they are: a number of 8 bits would round the value.
        lowest, highest = (np.asarray(x).item() for x in (info(kept).min, info(kept).max))
        if not lowest <= value <= highest:
            what = f"{kept} holds numbers from {lowest} to {highest}"
            raise self._cannot_have({name: value}, what)

    def _cannot_have(self, values: Mapping[str, float], why: str) -> OptimizerError:
        shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return OptimizerError(f"the optimizer, {self.text}, cannot have {shown}: {why}")


class _Closed:
    """A GradientTransformation that is no expression: what it can do is move less, or more.

    Not multiplied, rather than by 1, until the scale is set: one compilation then.
    """

    def __init__(
        self, transformation: optax.GradientTransformation, scale: float | None = None
    ) -> None:
        self._transformation = transformation
        self._scale = scale
        is_set = scale is not None
        self.numbers = {UPDATE_SCALE: Number(scale if scale is not None else 1.0, is_live=is_set)}

    def build(self, values: Mapping[str, Any]) -> optax.GradientTransformation:
        scale = values.get(UPDATE_SCALE, self._scale)
        return self._transformation if scale is None else _scaled(self._transformation, scale)

    def with_numbers(self, values: Mapping[str, float]) -> _Closed:
        return _Closed(self._transformation, values[UPDATE_SCALE])


def _scaled(
    transformation: optax.GradientTransformation, scale: Scalar
) -> optax.GradientTransformation:
    """With its updates multiplied, and its state as it is."""
    inner = optax.with_extra_args_support(transformation)

    def update(grads: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> Any:
        updates, state = inner.update(grads, state, params, **extra)
        return jax.tree.map(lambda u: jnp.asarray(scale).astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _is_own(value: jax.Array, number: Number) -> jax.Array:
    return jnp.isnan(value) if number.value is None else value == number.value


_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


def _map_injected(
    function: Callable[[str, jax.Array, bool], jax.Array], state: PyTree, taken: Iterable[str]
) -> PyTree:
    """The state with `function` of the name, the number, and whether a schedule writes it.

    A key that was used before, by a name in `taken` or in the state, is followed
    by #2, and so on. A mask that inject_hyperparams took for a schedule lies
    among the numbers too; it is none.
    """
    uses = dict.fromkeys(taken, 1)

    def visit(key: str, value: Any, scheduled: bool) -> Any:
        is_number = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.number)
        if not is_number or value.shape != ():
            return value
        uses[key] = uses.get(key, 0) + 1
        return function(key if uses[key] == 1 else f"{key}#{uses[key]}", value, scheduled)

    def inside(node: Any) -> Any:
        if not isinstance(node, _INJECTED):
            return node
        schedules = getattr(node, "hyperparams_states", {})
        # Sorted, for a jitted update sorts them, and the names must not change.
        numbers = {
            key: visit(key, node.hyperparams[key], key in schedules)
            for key in sorted(node.hyperparams)
        }
        return node._replace(hyperparams=numbers, inner_state=each(node.inner_state))

    def each(tree: PyTree) -> PyTree:
        return jax.tree.map(inside, tree, is_leaf=lambda node: isinstance(node, _INJECTED))

    return each(state)


def _refuse(text: str, values: Mapping[str, float], own: Iterable[str]) -> Any:
    unknown = ", ".join(repr(name) for name in values if name not in set(own))
    raise OptimizerError(
        f"the optimizer, {text}, has no number {unknown} to change in this way; it has "
        f"{', '.join(own) or 'none'}"
    )


def resolve(optimizer: Any, total_updates: int | None) -> AbstractOptimizer:
    """The optimizer that a task or --optimizer names.

    Args:
      optimizer: A SPEC, a GradientTransformation, a function of the number of
        updates that returns one, or an AbstractOptimizer.
      total_updates: Of the whole run; None if it has no end.

    Raises:
      OptimizerError: It is none of these.
      SpecError: The SPEC cannot be read; points at the character.
      UserCodeError: The function raised.
    """
    if isinstance(optimizer, AbstractOptimizer):
        return optimizer
    if isinstance(optimizer, str):
        return OptaxOptimizer(optimizer_spec.read(optimizer, total_updates), optimizer)
    return OptaxOptimizer(*optimizer_spec.transformation(optimizer, total_updates))


def check(optimizer: AbstractOptimizer, params: PyTree) -> None:
    """Try the optimizer on the parameters' shapes, without computing anything.

    Raises:
      OptimizerError: It needs more than the loss, or would change a shape, a
        dtype or the tree of the parameters or of its state; or a number of it
        that is live must be known when it is compiled.
    """
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    try:
        state = jax.eval_shape(optimizer.init, params)
        after = jax.eval_shape(optimizer.apply, params, state, params, loss)
    except Exception as error:
        raise OptimizerError(
            f"the optimizer, {optimizer.text}, cannot make an update from a gradient and its "
            f"loss alone: {type(error).__name__}: {error}"
        ) from error
    for what, old, new in zip(("parameters", "state"), (params, state), after, strict=True):
        if described(old) != described(new):
            raise OptimizerError(
                f"the optimizer, {optimizer.text}, changes the shapes, dtypes or structure of its "
                f"{what}, which must stay the same from update to update"
            )
    live = optimizer.live_values({})
    if not live:
        return
    try:
        jax.eval_shape(optimizer.apply, params, state, params, loss, live)
    except Exception as error:
        raise OptimizerError(
            f"the optimizer, {optimizer.text}, cannot be given {', '.join(live)} while it trains: "
            f"{type(error).__name__}: {error}"
        ) from error
