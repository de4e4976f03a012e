"""Weights for evaluation: an average beside the weights, and those of schedule-free optimizers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from headwater.server.averaged import Averaged
from headwater.server.optimizer import AbstractOptimizer, resolve
from headwater.server.packed_versions import EvaluationVersions
from headwater.server.settings import Settings
from headwater.server.store import Published, Store, initial
from headwater.worker.tree import ModelTree

DECAY = 0.9


def store_of(optimizer: AbstractOptimizer, dtype: Any = jnp.float32) -> Store:
    params = {"w": jnp.full(3, 1.0, dtype), "b": jnp.zeros((), dtype)}
    tree = ModelTree(params)
    return Store(tree, optimizer, initial(tree, params, optimizer))


def train(store: Store, updates: int) -> list[Published]:
    """The versions, by gradients drawn from the same seed every time."""
    draw, versions = np.random.default_rng(0), [store.current]
    for number in range(updates):
        buffer = store.layout.empty()
        gradients = [jnp.asarray(draw.normal(size=t.shape), t.dtype) for t in store.layout.tensors]
        store.layout.pack(map(np.asarray, gradients), buffer)
        versions.append(store.apply(buffer, 0.5, number))
    return versions


def evaluated(store: Store, published: Published) -> list[np.ndarray]:
    return EvaluationVersions(store.tree, store.optimizer).arrays(published)


def test_the_weights_move_as_they_would_without_an_average() -> None:
    alone = train(store_of(resolve("adam(0.1)", 20)), 20)[-1]
    averaged = train(store_of(Averaged(resolve("adam(0.1)", 20), DECAY)), 20)[-1]

    for one, other in zip(alone.leaves, averaged.leaves, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_the_average_weighs_every_version_by_its_age(dtype: Any) -> None:
    it = store_of(Averaged(resolve("sgd(0.1)", 20), DECAY), dtype)
    versions = train(it, 20)

    ages = np.arange(19, -1, -1)
    shares = DECAY**ages / (DECAY**ages).sum()
    for at, found in enumerate(evaluated(it, versions[-1])):
        each = np.stack([np.asarray(v.leaves[at]).astype(np.complex64) for v in versions[1:]])
        assert found.dtype == dtype
        np.testing.assert_allclose(
            found.astype(np.complex64), np.tensordot(shares, each, 1), atol=1e-2, rtol=1e-2
        )


def test_small_steps_are_not_lost_in_a_narrow_dtype() -> None:
    it = store_of(Averaged(resolve("sgd(0.0)", 20), 0.999), jnp.bfloat16)
    (b, w) = evaluated(it, train(it, 1000)[-1])
    np.testing.assert_array_equal(w.astype(np.float32), 1.0)
    np.testing.assert_array_equal(b.astype(np.float32), 0.0)


def test_before_the_first_update_the_average_is_the_weights() -> None:
    it = store_of(Averaged(resolve("sgd(0.1)", 20), DECAY))
    for found, leaf in zip(evaluated(it, it.current), it.current.leaves, strict=True):
        np.testing.assert_array_equal(found, leaf)


def test_numbers_of_the_optimizer_within_can_be_set() -> None:
    it = store_of(Averaged(resolve("sgd(0.1, momentum=0.5)", 20), DECAY))
    assert set(it.optimizer.hyper_parameters(it.current.optimizer_state)) == {
        "learning_rate", "momentum",
    }  # fmt: skip

    settings = Settings(numbers={"learning_rate": 0.0, "momentum": 0.0})
    it.prepare(settings)
    it.set(settings)

    before = it.current.leaves
    for one, other in zip(train(it, 3)[-1].leaves, before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "transformation",
    [
        optax.contrib.schedule_free_sgd(0.1, b1=0.9),
        optax.chain(optax.clip_by_global_norm(10.0), optax.contrib.schedule_free_adamw(0.1)),
    ],
)
def test_schedule_free_optimizers_are_evaluated_at_their_own_weights(transformation: Any) -> None:
    it = store_of(resolve(transformation, 20))
    last = train(it, 10)[-1]

    state = last.optimizer_state
    own = state if isinstance(state, optax.contrib.ScheduleFreeState) else state[-1]
    params = it.tree.trained.restore(list(last.leaves))
    expected = jax.tree.leaves(optax.contrib.schedule_free_eval_params(own, params))
    found = evaluated(it, last)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert not np.allclose(found[-1], last.leaves[-1])


def test_other_optimizers_have_no_weights_of_their_own_for_evaluation() -> None:
    it = store_of(resolve("adam(0.1)", 20))
    assert not EvaluationVersions(it.tree, it.optimizer).differs
    for found, leaf in zip(evaluated(it, it.current), it.current.leaves, strict=True):
        np.testing.assert_array_equal(found, leaf)
