"""A Keras model, with all it is made of, from one process to those that it starts.

Keras's own pickle of a model is its config, which a layer of one's own has only if it was
written with one. These pickles take the objects as they are: layers, losses and metrics of
any class, functions and lambdas, defined in a notebook or not. They never leave the
machine; see handed.py for how they get to the other process.

Of the model's variables only the shapes go along. Their values come from the server.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import keras
import numpy as np
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils.backend_utils import DynamicBackend
from keras.src.utils.tracking import TrackedDict, TrackedList, TrackedSet

from headwater.worker.pickler import Pickler

OVERRIDDEN = ("fit", "make_train_function", "jax_state_sync")
"""Methods that a model has of its own in the process that leads its training."""

_NONE_THERE = ("optimizer", "history", "train_function", "test_function", "predict_function")
"""Attributes that are of use in that process alone."""

_TRACKED = (TrackedList, TrackedDict, TrackedSet)


def dumps(model: keras.Model) -> bytes:
    """A pickle for `loads`; raises whatever pickling raises."""
    buffer = io.BytesIO()
    config = keras.config
    settings = (config.floatx(), config.epsilon(), config.image_data_format())
    _ModelPickler(buffer, model).dump((settings, config.dtype_policy().name, model))
    return buffer.getvalue()


def loads(data: bytes) -> keras.Model:
    """The model, its variables all zero. Sets Keras up as it was where it came from."""
    # From the process that started this one, see handed.py.
    (floatx, epsilon, image_data_format), policy, model = pickle.loads(data)  # noqa: S301
    keras.config.set_floatx(floatx)
    keras.config.set_epsilon(epsilon)
    keras.config.set_image_data_format(image_data_format)
    keras.config.set_dtype_policy(policy)
    return model


class _ModelPickler(Pickler):
    """By attributes, whatever the objects themselves would say."""

    def __init__(self, buffer: io.BytesIO, model: keras.Model) -> None:
        super().__init__(buffer)
        self._served = {id(variable) for variable in model.variables}

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, _TRACKED):
            items = dict(value) if isinstance(value, dict) else list(value)
            return type(value), (), (dict(vars(value)), items), None, None, _fill
        if isinstance(value, keras.Variable) and id(value) in self._served:
            state = {**vars(value), "_value": None, "_initializer": None}
            return _bare, (type(value),), state, None, None, _as_zeros
        if isinstance(value, KerasSaveable | DynamicBackend):
            state = dict(vars(value))
            if isinstance(value, keras.Model):
                state = {name: state[name] for name in state if name not in OVERRIDDEN}
                state |= {name: None for name in _NONE_THERE if name in state}
            return _bare, (type(value),), state, None, None, _settle
        return super().reducer_override(value)


def _bare(kind: type) -> Any:
    """An object without attributes yet: others may be made that it is an attribute of."""
    return object.__new__(kind)


def _settle(value: Any, state: dict[str, Any]) -> None:
    vars(value).update(state)  # no attribute is tracked a second time


def _as_zeros(variable: Any, state: dict[str, Any]) -> None:
    zero = np.zeros((), keras.backend.standardize_dtype(state["_dtype"]))
    vars(variable).update(state, _value=np.broadcast_to(zero, state["_shape"]))  # no memory


def _fill(container: Any, state: tuple[dict[str, Any], Any]) -> None:
    """Without its tracker's knowing, which has counted them."""
    attributes, items = state
    vars(container).update(attributes)
    if isinstance(container, list):
        list.extend(container, items)
    elif isinstance(container, dict):
        dict.update(container, items)
    else:
        set.update(container, items)
