"""How workers' states become the model's: by the rule, stably, and never with NaN."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from headwater.protos.layout import CONSTANT, PARAMETER, STATE, LayoutError
from headwater.server.model_state import merged
from headwater.server.optimizer import OptaxOptimizer
from headwater.server.store import Contribution, NotFinite, Store, base_of, initial
from headwater.worker.data import ArrayData
from headwater.worker.gradient import GradientFunction
from headwater.worker.local_steps import LocalSteps
from headwater.worker.task import Task, TaskError
from headwater.worker.tree import ModelTree

MOMENTUM = 0.9


def made(key: jax.Array) -> tuple[Any, Any]:
    params = {"b": jnp.zeros(1), "frozen": jnp.arange(3), "w": jnp.zeros(2)}
    return params, {"mean": jnp.zeros(2), "seen": jnp.zeros((), jnp.int32)}


def is_trained(name: str) -> bool:
    return name != "frozen"


def tree() -> ModelTree:
    return ModelTree(made(jax.random.key(0)), has_state=True, trainable=is_trained)


def store() -> Store:
    optimizer = OptaxOptimizer(optax.sgd(0.1), "the test's")
    return Store(tree(), optimizer, initial(tree(), made(jax.random.key(0)), optimizer))


def pushed(store: Store, state: Any, gradient: float = 0.0) -> np.ndarray:
    layout = store.layout.moving
    buffer = layout.empty()
    leaves = [jnp.full(1, gradient), jnp.full(2, gradient), *tree().state_leaves(state)]
    layout.pack(map(np.asarray, leaves), buffer)
    return buffer


def contribution(store: Store, base: Any, state: Any, position: int, size: int = 1) -> Contribution:
    return Contribution(
        position, base.version, size, 0.0, pushed(store, state), kept=base_of(base, store.layout)
    )


def test_the_layout_has_parameters_then_state_then_constants() -> None:
    layout = tree().layout

    assert [(t.name, t.role) for t in layout.tensors] == [
        ("b", PARAMETER), ("w", PARAMETER), ("mean", STATE), ("seen", STATE), ("frozen", CONSTANT),
    ]  # fmt: skip
    assert [t.name for t in layout.moving.tensors] == ["b", "w", "mean", "seen"]
    assert layout.parameter_count == 3


def test_what_init_gave_is_made_of_the_layouts_tensors_again() -> None:
    given = made(jax.random.key(0))
    named = dict(zip(tree().names, tree().leaves(given), strict=True))

    params, state = tree().restore_named(named)

    assert jax.tree.structure((params, state)) == jax.tree.structure(given)
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves(given), strict=True)
    )


def test_the_optimizer_sees_nothing_where_a_constant_is() -> None:
    seen = tree().trained.restore([1, 2])
    assert seen == {"b": 1, "frozen": None, "w": 2}
    assert tree().trained.leaves(seen) == [1, 2]


@pytest.mark.parametrize(
    ("init", "options", "message"),
    [
        ({"w": jnp.ones(1)}, {"has_state": True}, "gave dict; with has_state it is \\(params, st"),
        (({"w": jnp.ones(1)}, {"w": jnp.ones(1)}), {"has_state": True}, "two tensors are called"),
        (({"w": jnp.ones(1)}, {"m": jnp.ones(1, bool)}), {"has_state": True}, "m has dtype bool"),
        (({"w": jnp.ones(1)}, {"k": jax.random.key(0)}), {"has_state": True}, "k is a PRNG key"),
        ({"w": jnp.ones(1)}, {"trainable": lambda name: False}, "left nothing to train of w"),
        ({"w": jnp.ones(1, int)}, {}, "or make them constants \\(trainable\\)"),
    ],
)
def test_models_that_cannot_be_served_are_refused(init: Any, options: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ModelTree(init, **options)


def test_a_fresh_state_is_taken_as_it_is() -> None:
    new = [jnp.ones(2), jnp.int32(5)]
    assert merged([jnp.zeros(2), jnp.int32(1)], [new], [32], (), 0) is new


def test_a_stale_state_moves_by_its_change_over_one_more_than_its_staleness() -> None:
    current, base, new = (
        [jnp.full(2, x), jnp.int32(n)] for x, n in ((1.0, 100), (0.5, 70), (0.9, 102))
    )
    mean, seen = merged(current, [new], [32], base, 3)

    np.testing.assert_allclose(mean, 1.0 + (0.9 - 0.5) / 4, rtol=1e-6)
    assert int(seen) == 100 + (102 - 70)


def test_of_a_group_floats_are_the_mean_over_examples_and_integers_count_all() -> None:
    current = [jnp.zeros(2), jnp.int32(10)]
    new = [[jnp.full(2, 1.0), jnp.int32(42)], [jnp.full(2, 4.0), jnp.int32(26)]]

    mean, seen = merged(current, new, [32, 16], (), 0)

    np.testing.assert_allclose(mean, (32 * 1.0 + 16 * 4.0) / 48, rtol=1e-6)
    assert int(seen) == 10 + 32 + 16


@pytest.mark.parametrize("staleness", [1, 32])
def test_running_averages_stay_close_to_those_of_one_process(staleness: int) -> None:
    """BatchNorm's statistics at momentum 0.9; all changes added, they would diverge from 16 on."""
    draw = np.random.default_rng(0)
    it, one = store(), np.zeros(2)
    versions = [it.current]
    for number in range(400):
        batch = 3.0 + draw.normal(size=2)
        one = MOMENTUM * one + (1 - MOMENTUM) * batch
        base = versions[max(0, number - staleness)]
        mean, seen = tree().split(base.leaves)[1]
        state = {"mean": MOMENTUM * mean + (1 - MOMENTUM) * batch, "seen": seen + 8}
        state["mean"] = jnp.asarray(state["mean"], jnp.float32)
        it.move(it.step([contribution(it, base, state, number)]))
        versions.append(it.current)

    _, _, mean, seen = it.current.leaves
    assert int(seen) == 400 * 8
    np.testing.assert_allclose(mean, one, atol=0.5)
    np.testing.assert_allclose(mean, 3.0, atol=0.6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused_and_changes_nothing(bad: float) -> None:
    it = store()
    before = it.current
    state = {"mean": jnp.array([0.0, bad]), "seen": jnp.int32(1)}
    push = pushed(it, state)

    for refuse in (
        lambda: it.check_pushed(push, 0.0),
        lambda: it.move(it.step([contribution(it, before, state, 0)])),
    ):
        with pytest.raises(NotFinite, match="1 of the 2 numbers in mean"):
            refuse()
        assert it.current is before


def test_the_next_version_does_not_share_memory_with_what_was_pushed() -> None:
    it = store()
    push = pushed(it, {"mean": jnp.ones(2), "seen": jnp.int32(1)}, gradient=1.0)

    published = it.apply(push, 0.0, 0)
    push[:] = 0xFF

    np.testing.assert_array_equal(published.leaves[2], 1.0)
    np.testing.assert_allclose(published.leaves[1], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(published.tensors[-1], [0, 1, 2])


# ----------------------------------------------------------------- the worker's


def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
    x = batch["x"]
    after = {"mean": 0.9 * state["mean"] + 0.1 * x.mean(0), "seen": state["seen"] + len(x)}
    y = x @ (params["w"] * params["frozen"][1:]) + params["b"]
    return ((y - 1.0) ** 2).mean(), {"mse": 0.0}, after


X = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)


def task(**changes: Any) -> Task:
    given: dict[str, Any] = {
        "init": made, "loss": loss, "data": ArrayData(x=X), "optimizer": optax.sgd(0.1),
        "batch_size": 4, "has_state": True, "trainable": is_trained,
    }  # fmt: skip
    return Task(**{**given, **changes})


def weights(task: Task) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in task.tree.leaves(task.init(jax.random.key(0)))]


def test_a_worker_gives_the_gradient_of_what_is_trained_and_the_new_state() -> None:
    mine, batch = task(), {"x": X[:4]}
    params, state = made(jax.random.key(0))

    got = GradientFunction(mine, 0)(weights(mine), [(batch, 0, 0)])

    def plain(trained: Any) -> Any:
        return loss({**params, **trained}, state, batch, jax.random.key(0))[0]

    grads = jax.grad(plain)({"b": params["b"], "w": params["w"]})
    b, w, mean, seen = got.leaves
    np.testing.assert_allclose(b, grads["b"], rtol=1e-5)
    np.testing.assert_allclose(w, grads["w"], rtol=1e-5)
    np.testing.assert_allclose(mean, 0.1 * X[:4].mean(0), rtol=1e-5)
    assert int(seen) == 4


def test_state_goes_through_local_steps_one_after_the_other() -> None:
    mine = task()
    walk = LocalSteps(mine, 0, optimizer="sgd(0.1)", epochs=1, batches_per_epoch=2)
    steps = [({"x": X[:4]}, 0, 0), ({"x": X[4:]}, 0, 1)]

    _, _, mean, seen = walk(weights(mine), steps).leaves

    np.testing.assert_allclose(mean, 0.09 * X[:4].mean(0) + 0.1 * X[4:].mean(0), rtol=1e-5)
    assert int(seen) == 8


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda state: (jnp.float32(0), {}), "returned 2 values; with has_state it returns"),
        (lambda state: (jnp.float32(0), {}, {"mean": jnp.ones(2)}), "a state of another structure"),
        (
            lambda state: (jnp.float32(0), {}, {**state, "mean": jnp.ones(3)}),
            r"returned float32\[3\] for the state mean, which is float32\[2\]",
        ),
        (
            lambda state: (jnp.float32(0), {}, {**state, "seen": jnp.float32(1)}),
            r"returned float32\[\] for the state seen, which is int32\[\]",
        ),
    ],
)
def test_a_loss_that_returns_another_state_is_refused(returned: Any, message: str) -> None:
    mine = task(loss=lambda params, state, batch, key: returned(state))
    with pytest.raises(TaskError, match=message):
        GradientFunction(mine, 0).compile({"x": X[:4]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"has_state": 1}, "Task.has_state must be True or False, not 1"),
        ({"trainable": ["w"]}, r"Task.trainable must be a function or None, not \['w'\]"),
    ],
)
def test_fields_that_cannot_work_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        task(**changes)
