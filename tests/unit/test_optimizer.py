"""Which optimizers can be served, and what is said about the others."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from headwater.server.optimizer import (
    AbstractOptimizer,
    OptaxOptimizer,
    OptimizerError,
    check,
    resolve,
)
from headwater.worker.optimizer_spec import SpecError
from headwater.worker.user_code import UserCodeError

PARAMS = {"b": jnp.zeros(2), "w": jnp.ones((2, 3))}
GRADS = {"b": jnp.array([1.0, -2.0]), "w": jnp.full((2, 3), 0.5)}
LOSS = jnp.float32(1.5)


def after(optimizer: AbstractOptimizer, updates: int = 3) -> Any:
    """The parameters after a few updates, each jitted as the server does it."""
    params, state, apply = PARAMS, optimizer.init(PARAMS), jax.jit(optimizer.apply)
    for _ in range(updates):
        params, state = apply(GRADS, state, params, LOSS)
    return jax.tree.map(np.asarray, params)


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def test_a_spec_a_transformation_and_a_function_of_the_updates_are_the_same_optimizer() -> None:
    want = after(OptaxOptimizer(optax.sgd(optax.linear_schedule(0.1, 0.0, 10)), "by hand"))

    spec = resolve("sgd(linear_schedule(0.1, 0.0, total_updates))", 10)
    made = resolve(optax.sgd(optax.linear_schedule(0.1, 0.0, 10)), 10)
    function = resolve(lambda updates: optax.sgd(optax.linear_schedule(0.1, 0.0, updates)), 10)

    for optimizer in (spec, made, function):
        assert_same(after(optimizer), want)


def test_an_optimizer_is_told_by_its_spec_or_as_the_tasks_own() -> None:
    assert resolve("sgd( 0.1 )", 10).text == "sgd( 0.1 )"
    assert resolve(optax.sgd(0.1), 10).text == "the task's own optimizer"
    assert resolve(lambda updates: optax.sgd(0.1), 10).text == "the task's own optimizer"


def test_an_optimizer_of_ours_is_taken_as_it_is() -> None:
    mine = OptaxOptimizer(optax.sgd(0.1), "mine")
    assert resolve(mine, 10) is mine


def test_a_spec_that_cannot_be_read_points_at_the_place() -> None:
    with pytest.raises(SpecError, match=r"character 1: 'adm' .*; did you mean adam\?"):
        resolve("adm(1e-3)", 10)


def test_what_the_tasks_function_raises_is_shown_as_the_users_own() -> None:
    def mine(total_updates: int) -> optax.GradientTransformation:
        raise KeyError(f"no rate for {total_updates}")

    with pytest.raises(UserCodeError) as error:
        resolve(mine, 10)

    first, *_, last = str(error.value).splitlines()
    assert first == "Task.optimizer raised"
    assert last == "KeyError: 'no rate for 10'"
    assert "in resolve" not in str(error.value)


@pytest.mark.parametrize("wrong", [None, 0.1, ["adam(1e-3)"], {"adam": 1e-3}])
def test_what_is_no_optimizer_is_refused_with_all_that_would_be_one(wrong: Any) -> None:
    with pytest.raises(OptimizerError) as error:
        resolve(wrong, 10)

    assert str(error.value) == (
        f"Task.optimizer is {wrong!r}; it must be an optax GradientTransformation, a string such "
        'as "adam(1e-3)", or a function of the number of updates that returns one'
    )


@pytest.mark.parametrize(
    ("function", "got"),
    [(lambda updates: None, "NoneType"), (lambda updates: 0.1, "float"), (float, "float")],
)
def test_a_function_that_returns_no_optimizer_is_refused(function: Any, got: str) -> None:
    with pytest.raises(OptimizerError, match=rf"^Task\.optimizer\(10\) returned {got}, not"):
        resolve(function, 10)


@pytest.mark.parametrize(
    "optimizer",
    [
        "sgd(0.1)",
        "adamw(1e-3)",
        "polyak_sgd()",
        "adafactor(1e-3)",
        "contrib.reduce_on_plateau()",
        "contrib.prodigy()",
        "contrib.schedule_free_adamw()",
        "apply_if_finite(adam(1e-3), 3)",
        "inject_hyperparams(adam)(learning_rate=linear_schedule(0.1, 0.0, total_updates))",
        optax.MultiSteps(optax.adam(1e-3), 4).gradient_transformation(),
        optax.noisy_sgd(0.1, key=jax.random.key(0)),
    ],
    ids=lambda optimizer: optimizer if isinstance(optimizer, str) else "",
)
def test_what_needs_a_gradient_and_its_loss_alone_is_served(optimizer: Any) -> None:
    check(resolve(optimizer, 10), PARAMS)


def test_nothing_is_computed_to_check_an_optimizer() -> None:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    check(resolve("adam(1e-3)", 10), shapes)


@pytest.mark.parametrize("spec", ["lbfgs()", "scale_by_backtracking_linesearch(10)"])
def test_a_line_search_is_refused_for_it_needs_the_loss_as_a_function(spec: str) -> None:
    with pytest.raises(OptimizerError) as error:
        check(resolve(spec, 10), PARAMS)

    assert str(error.value).startswith(
        f"the optimizer, {spec}, cannot make an update from a gradient and its loss alone: "
        "TypeError: "
    )
    assert "'value_fn'" in str(error.value)


def test_an_optimizer_that_raises_is_refused_with_what_it_said() -> None:
    mask = optax.masked(optax.sgd(0.1), {"w": True})  # of another tree

    with pytest.raises(OptimizerError, match="the task's own optimizer, cannot make an update"):
        check(resolve(mask, 10), PARAMS)


def transformation(init: Any, update: Any) -> AbstractOptimizer:
    return resolve(optax.GradientTransformation(lambda params: init, update), 10)


class Narrows(AbstractOptimizer):
    """Gives float16 back for float32."""

    text = "narrows"

    def init(self, params: Any) -> Any:
        return ()

    def apply(self, grads: Any, state: Any, params: Any, *rest: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda x: x.astype(jnp.float16), params), state


class Drops(Narrows):
    text = "drops"

    def apply(self, grads: Any, state: Any, params: Any, *rest: Any) -> tuple[Any, Any]:
        return {"w": params["w"]}, state


class Flattens(Narrows):
    text = "flattens"

    def apply(self, grads: Any, state: Any, params: Any, *rest: Any) -> tuple[Any, Any]:
        return jax.tree.map(jnp.ravel, params), state


@pytest.mark.parametrize("optimizer", [Narrows(), Drops(), Flattens()], ids=lambda o: o.text)
def test_an_optimizer_that_changes_the_kind_of_its_parameters_is_refused(
    optimizer: AbstractOptimizer,
) -> None:
    with pytest.raises(OptimizerError) as error:
        check(optimizer, PARAMS)

    assert str(error.value) == (
        f"the optimizer, {optimizer.text}, changes the shapes, dtypes or structure of its "
        "parameters, which must stay the same from update to update"
    )


@pytest.mark.parametrize(
    ("init", "update"),
    [
        (jnp.zeros(()), lambda g, s, p=None: (g, s.astype(jnp.float16))),
        (jnp.zeros(()), lambda g, s, p=None: (g, jnp.stack([s, s]))),
        ((jnp.zeros(()),), lambda g, s, p=None: (g, (*s, jnp.zeros(())))),
        (0, lambda g, s, p=None: (g, s + 0.5)),
    ],
    ids=["its dtype", "its shape", "its structure", "a number's kind"],
)
def test_an_optimizer_whose_state_changes_its_kind_is_refused(init: Any, update: Any) -> None:
    with pytest.raises(OptimizerError, match="structure of its state, which must stay the same"):
        check(transformation(init, update), PARAMS)


def test_python_numbers_in_the_state_become_arrays_and_count_on() -> None:
    def update(grads: Any, state: Any, params: Any = None) -> Any:
        return grads, {"count": state["count"] + 1, "rate": state["rate"] / 2, "on": state["on"]}

    optimizer = transformation({"count": 0, "rate": 0.5, "on": True}, update)
    check(optimizer, PARAMS)
    state = optimizer.init(PARAMS)
    apply = jax.jit(optimizer.apply)
    params = PARAMS
    for _ in range(3):
        params, state = apply(GRADS, state, params, LOSS)

    assert jax.tree.map(np.asarray, state) == {"count": 3, "rate": 0.0625, "on": True}
    assert apply._cache_size() == 1  # the first state was already of the kind of the others
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(optimizer.init(PARAMS)))


def test_a_transformation_that_takes_no_extra_arguments_gets_none() -> None:
    def update(grads: Any, state: Any, params: Any = None) -> Any:  # no **extra
        return jax.tree.map(jnp.negative, grads), state

    moved = after(transformation((), update), updates=1)

    np.testing.assert_array_equal(moved["b"], [-1.0, 2.0])


def test_the_loss_reaches_a_transformation_as_value() -> None:
    def update(grads: Any, state: Any, params: Any = None, *, value: Any, **extra: Any) -> Any:
        assert not extra
        return jax.tree.map(lambda g: -value * g, grads), state

    optimizer = resolve(optax.GradientTransformationExtraArgs(lambda params: (), update), 10)
    check(optimizer, PARAMS)

    np.testing.assert_array_equal(after(optimizer, updates=1)["b"], [-1.5, 3.0])


def test_an_error_names_the_optimizer_by_its_text() -> None:
    with pytest.raises(OptimizerError, match=re.escape("the optimizer, lbfgs( ), cannot")):
        check(resolve("lbfgs( )", 10), PARAMS)
