"""A Keras optimizer behind the interface: its own arithmetic, not that of optax's namesake.

optax's Adam adds epsilon at another place, which for small gradients is another step. So
Keras's `stateless_apply` is what is run, with all that belongs to it: schedules, weight
decay, clipping, constraints of the variables, gradients accumulated over steps.

Imports no Keras: it is given an optimizer that is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headwater.server.optimizer import AbstractOptimizer, Change, HyperParameter, Scalar
from headwater.worker.optimizer_spec import OptimizerError
from headwater.worker.tree import PyTree

LEARNING_RATE = "learning_rate"


class KerasOptimizer(AbstractOptimizer):
    """Moves parameters that are a dict by name.

    Its state is a dict as well, `slots` by name, in the order of `optimizer.variables`. The
    first one is what these hold when this is made, so that a model which was trained before
    goes on as it would in Keras.

    Args:
      optimizer: A `keras.optimizers.Optimizer` that is built for the variables of `names`.
      names: Of the trained parameters, in the order of the model's trainable variables.
      slots: Names for the optimizer's own variables, in their order.
    """

    def __init__(self, optimizer: Any, names: Sequence[str], slots: Sequence[str]) -> None:
        self.text = _described(optimizer)
        self._optimizer = optimizer
        self._names = list(names)
        self._slots = list(slots)
        self._first = [np.array(variable.value) for variable in optimizer.variables]
        # A schedule is computed from the count of updates, and is no variable.
        rate = getattr(optimizer, "_learning_rate", None)
        self._rate = next(
            (
                slot
                for slot, variable in zip(slots, optimizer.variables, strict=True)
                if variable is rate
            ),
            None,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.text,)  # workers get the task, and do not move weights

    def init(self, params: PyTree) -> PyTree:
        return dict(zip(self._slots, map(jnp.asarray, self._first), strict=True))

    def apply(
        self,
        grads: PyTree,
        state: PyTree,
        params: PyTree,
        loss: jax.Array,
        live: Mapping[str, Scalar] = MappingProxyType({}),
        scale: Scalar | None = None,
    ) -> tuple[PyTree, PyTree]:
        before = [params[name] for name in self._names]
        after, slots = self._optimizer.stateless_apply(
            [state[slot] for slot in self._slots], [grads[name] for name in self._names], before
        )
        if scale is not None:
            share = jnp.asarray(scale)
            after = [
                jnp.where(share == 1, new, old + share.astype(old.dtype) * (new - old))
                for old, new in zip(before, after, strict=True)
            ]
        return {**params, **dict(zip(self._names, after, strict=True))}, dict(
            zip(self._slots, slots, strict=True)
        )

    def hyper_parameters(self, state: PyTree) -> dict[str, HyperParameter]:
        if self._rate is None:
            return {}
        value = float(state[self._rate])
        return {LEARNING_RATE: HyperParameter(LEARNING_RATE, value, Change.IN_STATE)}

    def set_in_state(self, state: PyTree, values: Mapping[str, float]) -> PyTree:
        known = [] if self._rate is None else [LEARNING_RATE]
        if unknown := sorted(values.keys() - set(known)):
            why = "follows a schedule" if LEARNING_RATE in unknown else "is no number of it"
            raise OptimizerError(
                f"{unknown[0]} cannot be set: it {why}; the optimizer is {self.text}"
            )
        if not values:
            return state
        assert self._rate is not None
        rate = np.asarray(values[LEARNING_RATE], state[self._rate].dtype)
        return {**state, self._rate: jax.device_put(rate)}


def _described(optimizer: Any) -> str:
    """Such as `Keras's SGD(learning_rate=0.01, momentum=0.9)`: what its config has set."""

    def shown(value: Any) -> str:
        if isinstance(value, dict) and "class_name" in value:
            return f"{value['class_name']}({given(value.get('config', {}))})"
        return f"{value:.6g}" if isinstance(value, float) else repr(value)

    def given(config: Mapping[str, Any]) -> str:
        return ", ".join(
            f"{name}={shown(value)}"
            for name, value in sorted(config.items())
            if name != "name" and value not in (None, False)
        )

    return f"Keras's {type(optimizer).__name__}({given(optimizer.get_config())})"
