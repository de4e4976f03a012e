"""Delayed Nesterov is the published update, and safe to jit and to inject numbers into."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from headwater.worker.delayed_nesterov import DelayedNesterovState, delayed_nesterov

RNG = np.random.default_rng(0)
THETA = RNG.normal(size=(3, 2)).astype(np.float32)
GRADIENTS = RNG.normal(size=(13, 3, 2)).astype(np.float32)


def published(
    theta: np.ndarray, gradients: np.ndarray, rates: Any, beta: float, n: int, c: float
) -> np.ndarray:
    """Liu et al. 2024, the delayed Nesterov update, in float64."""
    theta, m, total = theta.astype(np.float64), np.zeros((3, 2)), np.zeros((3, 2))
    for t, g in enumerate(gradients.astype(np.float64)):
        total = total + g
        if (t + 1) % n == 0:
            m = beta * m + total / n
            theta = theta - rates(t) * ((1 - c * n + c) * beta * m + g / n)
            total = np.zeros((3, 2))
        else:
            theta = theta - rates(t) * (c * beta * m + g / n)
    return theta


def descend(optimizer: optax.GradientTransformation, theta: Any, gradients: Any) -> tuple[Any, Any]:
    """Where it ends, and its state."""
    state = optimizer.init(theta)

    @jax.jit
    def step(theta: Any, state: Any, g: Any) -> Any:
        updates, state = optimizer.update(g, state, theta)
        return optax.apply_updates(theta, updates), state

    for g in gradients:
        theta, state = step(theta, state, g)
    return theta, state


@pytest.mark.parametrize("rate", [0.3, lambda t: 0.3 / (t + 1)], ids=["number", "schedule"])
@pytest.mark.parametrize(
    ("delay", "activation"),
    [
        (1, 0.0),
        (4, 0.1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1.0), (4, 0.0), (4, 0.25))),
    ],
)
def test_the_update_is_the_published_one(rate: Any, delay: int, activation: float) -> None:
    got, _ = descend(delayed_nesterov(rate, 0.8, delay, activation), THETA, GRADIENTS)

    rates = rate if callable(rate) else lambda t: rate
    want = published(THETA, GRADIENTS, rates, 0.8, delay, activation)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_with_a_delay_of_one_it_is_nesterovs_momentum() -> None:
    got, _ = descend(delayed_nesterov(0.1, 0.9, delay=1), THETA, GRADIENTS)
    want, _ = descend(optax.sgd(0.1, 0.9, nesterov=True), THETA, GRADIENTS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_delays_worth_of_updates_moves_as_one_nesterov_step_along_their_mean() -> None:
    rounds = GRADIENTS[:12].reshape(3, 4, 3, 2)

    got, _ = descend(delayed_nesterov(0.1, 0.9, delay=4), THETA, GRADIENTS[:12])
    want, _ = descend(optax.sgd(0.1, 0.9, nesterov=True), THETA, rounds.mean(axis=1))

    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_each_leaf_keeps_its_dtype(dtype: Any) -> None:
    theta = {"a": jnp.ones(3, dtype), "none": None}

    def step(rate: jax.Array, state: Any) -> Any:
        return delayed_nesterov(rate, delay=2, activation=0.1).update(theta, state)

    state = delayed_nesterov(0.1).init(theta)
    updates, after = jax.jit(step)(jnp.float32(0.1), state)

    assert updates["a"].dtype == dtype
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    assert isinstance(after, DelayedNesterovState)
    assert after.count.dtype == jnp.int32


def test_its_numbers_can_be_injected() -> None:
    injected = optax.inject_hyperparams(delayed_nesterov)(0.3, 0.8, 4, 0.1)

    got, state = descend(injected, THETA, GRADIENTS)

    want, _ = descend(delayed_nesterov(0.3, 0.8, 4, 0.1), THETA, GRADIENTS)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert state.hyperparams["learning_rate"] == np.float32(0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, "momentum is 1.0; it must be in [0, 1)"),
        ({"momentum": -0.1}, "momentum is -0.1; it must be in [0, 1)"),
        ({"momentum": float("nan")}, "momentum is nan; it must be in [0, 1)"),
        ({"delay": 0}, "delay is 0; it must be a whole number from 1 on"),
        ({"delay": 2.5}, "delay is 2.5; it must be a whole number from 1 on"),
        ({"delay": True}, "delay is True; it must be a whole number from 1 on"),
        (
            {"delay": 4, "activation": 0.3},
            "activation is 0.3; it must be in [0, 1/delay], here [0, 0.25]",
        ),
        ({"activation": -0.1}, "activation is -0.1; it must be in [0, 1/delay], here [0, 0.125]"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        delayed_nesterov(0.1, **arguments)
