"""A worker's gradient is jax.value_and_grad of the user's loss, and the same anywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from headwater import ArrayData, Generated, Task
from headwater.worker.gradient import MADE, GradientFunction
from headwater.worker.task import TaskError

SEED = 11

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3)).astype(np.float32)
BATCH = {"x": X, "y": X.sum(axis=1)}


def init(key: jax.Array) -> Any:
    a, b = jax.random.split(key)
    return {"w": jax.random.normal(a, (3,)), "hidden": (jax.random.normal(b, (2, 2)), None)}


def loss(params: Any, batch: Any, key: jax.Array) -> Any:
    """With dropout, so that the key counts."""
    keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    error = jnp.where(keep, batch["x"], 0.0) @ params["w"] - batch["y"]
    penalty = (params["hidden"][0] ** 2).sum()
    return (error**2).mean() + penalty, {"error": jnp.abs(error).max(), "kept": keep.mean()}


def task(loss: Callable[..., Any] = loss, init: Callable[..., Any] = init) -> Task:
    return Task(init=init, loss=loss, data=ArrayData(x=X), optimizer="sgd(0.1)")


def weights(task: Task) -> list[np.ndarray]:
    """As a worker has them: NumPy arrays in layout order."""
    params = task.init(jax.random.key(task.seed))
    return [np.asarray(leaf) for leaf in task.tree.leaves(params)]


def test_loss_and_gradient_are_those_of_value_and_grad_with_the_batchs_key() -> None:
    mine = task()
    params = mine.tree.restore(weights(mine))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 3), 14)

    got = GradientFunction(mine, SEED)(weights(mine), [(BATCH, 3, 14)])
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, BATCH, key)

    assert got.loss == float(value)
    assert got.metrics == {name: float(metric) for name, metric in metrics.items()}
    for leaf, want in zip(got.leaves, mine.tree.leaves(grads), strict=True):
        assert isinstance(leaf, jax.Array)
        np.testing.assert_allclose(leaf, want, rtol=1e-6)


def test_leaves_have_the_shapes_and_dtypes_of_the_layout() -> None:
    def init(key: jax.Array) -> Any:
        return {
            "half": jnp.ones((2, 2), jnp.bfloat16),
            "scalar": jnp.float32(1),
            "empty": jnp.ones((0, 4)),
            "complex": jnp.ones(3, jnp.complex64),
        }

    def loss(params: Any, batch: Any, key: jax.Array) -> Any:
        return sum(jnp.abs(x).astype(jnp.float32).sum() for x in jax.tree.leaves(params))

    mine = task(loss, init)

    got = GradientFunction(mine, SEED)(weights(mine), [(BATCH, 0, 0)])

    assert [(x.shape, x.dtype) for x in got.leaves] == [
        (t.shape, t.dtype) for t in mine.tree.layout.tensors
    ]
    mine.tree.layout.pack(got.leaves, mine.tree.layout.empty())


def test_the_same_batch_gives_the_same_bits_on_another_worker() -> None:
    one, other = GradientFunction(task(), SEED), GradientFunction(task(), SEED)
    one(weights(task()), [(BATCH, 0, 0)])  # a past of its own

    a = one(weights(task()), [(BATCH, 2, 5)])
    b = other(weights(task()), [(BATCH, 2, 5)])

    assert (a.loss, a.metrics) == (b.loss, b.metrics)
    assert [x.tobytes() for x in a.leaves] == [x.tobytes() for x in b.leaves]


def test_another_seed_epoch_or_number_is_another_key() -> None:
    one, other = GradientFunction(task(), SEED), GradientFunction(task(), SEED + 1)
    places = [(2, 5), (5, 2), (2, 6), (3, 5)]

    losses = [one(weights(task()), [(BATCH, *place)]).loss for place in places]
    losses += [other(weights(task()), [(BATCH, *place)]).loss for place in places]

    assert len(set(losses)) == 8


def test_the_largest_epoch_and_number_have_a_key() -> None:
    last = 2**32 - 1
    assert np.isfinite(GradientFunction(task(), last)(weights(task()), [(BATCH, last, last)]).loss)


def test_what_a_gradient_was_does_not_change_with_the_next() -> None:
    function = GradientFunction(task(), SEED)
    first = function(weights(task()), [(BATCH, 0, 0)])
    before = [x.copy() for x in first.leaves]

    for number in range(1, 6):
        function(weights(task()), [(BATCH, 0, number)])

    for leaf, was in zip(first.leaves, before, strict=True):
        np.testing.assert_array_equal(leaf, was)


def test_the_weights_may_be_written_again_when_the_gradient_is_there() -> None:
    mine = task(lambda params, batch, key: (params["w"] ** 2).sum(), lambda key: {"w": key_free()})
    buffer = mine.tree.layout.empty()
    (w,) = mine.tree.layout.views(buffer).values()
    w[:] = 3.0

    got = GradientFunction(mine, SEED)([w], [(BATCH, 0, 0)])
    w[:] = np.nan

    assert (got.leaves[0] == 6.0).all()


def key_free() -> jax.Array:
    return jnp.zeros(4096)


def test_a_short_batch_is_its_own_mean() -> None:
    function = GradientFunction(
        task(lambda params, batch, key: (batch["x"] @ params["w"]).mean() + 0 * norm(params)), SEED
    )
    short = {"x": X[:3]}

    function(weights(task()), [({"x": X}, 0, 0)])
    got = function(weights(task()), [(short, 0, 1)])

    np.testing.assert_allclose(got.leaves[1], X[:3].mean(axis=0), rtol=1e-6)


def norm(params: Any) -> jax.Array:
    """Something of every parameter."""
    return sum((x**2).sum() for x in jax.tree.leaves(params))


def test_each_shape_of_batch_is_compiled_once() -> None:
    traced = []

    def counted(params: Any, batch: Any, key: jax.Array) -> Any:
        traced.append(batch["x"].shape)
        return loss(params, batch, key)

    function = GradientFunction(task(counted), SEED)
    short = {name: array[:3] for name, array in BATCH.items()}

    assert function.compile(BATCH) > 0.0
    assert function.compile(BATCH) == 0.0
    assert function.compile(jax.tree.map(np.zeros_like, BATCH)) == 0.0
    assert function.compile(short) > 0.0
    for number, batch in enumerate([BATCH, short, BATCH, short]):
        function(weights(task()), [(batch, 0, number)])

    assert traced == [(8, 3), (3, 3)]


def test_a_batch_that_was_not_compiled_for_is_compiled_for_when_it_comes() -> None:
    function = GradientFunction(task(), SEED)

    function(weights(task()), [(BATCH, 0, 0)])

    assert function.compile(BATCH) == 0.0


def test_batches_of_another_dtype_or_structure_are_compiled_for_too() -> None:
    def total(params: Any, batch: Any, key: jax.Array) -> Any:
        return sum(jnp.mean(x) for x in jax.tree.leaves(batch)) + 0 * norm(params)

    function = GradientFunction(task(total), SEED)
    ones = np.ones((2, 2), np.float32)

    for batch, want in [(ones, 1), ([ones, ones], 2), (ones.astype(np.uint8), 1), ((ones,), 1)]:
        assert function(weights(task()), [(batch, 0, 0)]).loss == want


def test_a_loss_without_metrics_has_none() -> None:
    mine = task(lambda params, batch, key: norm(params))
    assert GradientFunction(mine, SEED)(weights(mine), [(BATCH, 0, 0)]).metrics == {}


def test_metrics_are_plain_numbers_whatever_the_loss_returned() -> None:
    def loss(params: Any, batch: Any, key: jax.Array) -> Any:
        return norm(params), {"half": jnp.bfloat16(0.5), "count": jnp.int32(3), "one": 1.0}

    metrics = GradientFunction(task(loss), SEED)(weights(task()), [(BATCH, 0, 0)]).metrics

    assert metrics == {"half": 0.5, "count": 3.0, "one": 1.0}
    assert {type(value) for value in metrics.values()} == {float}


@pytest.mark.parametrize("value", [lambda w: w.sum(), lambda w: (w.sum(), {})], ids=["bare", "two"])
def test_a_loss_in_half_precision_is_taken(value: Callable[[Any], Any]) -> None:
    mine = task(
        lambda params, batch, key: value(params["w"]), lambda key: {"w": jnp.ones(3, jnp.bfloat16)}
    )
    assert GradientFunction(mine, SEED)(weights(mine), [(BATCH, 0, 0)]).loss == 3.0


ONE_NUMBER = (
    "; it must be one real number, the mean over the batch's examples, alone or as (loss, metrics)"
)
NO_DICT = ' beside the loss; it must be a dict of scalars such as {"accuracy": accuracy}'


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda w: w, f"Task.loss returned float32[3]{ONE_NUMBER}"),
        (lambda w: w[:1], f"Task.loss returned float32[1]{ONE_NUMBER}"),
        (lambda w: w.sum() * 1j, f"Task.loss returned complex64[]{ONE_NUMBER}"),
        (lambda w: w.sum().astype(int), f"Task.loss returned int32[]{ONE_NUMBER}"),
        (lambda w: (w, {}), f"Task.loss returned float32[3]{ONE_NUMBER}"),
        (lambda w: (w.sum(), w.sum()), NO_DICT),
        (lambda w: (w.sum(), None), f"Task.loss returned NoneType{NO_DICT}"),
        (lambda w: (w.sum(), {"all": w}), "metric 'all' is float32[3], not a scalar"),
        (lambda w: (w.sum(), {7: w.sum()}), "metric 7 is float32[], not a scalar"),
    ],
    ids=[
        "a vector",
        "a vector of one",
        "complex",
        "integer",
        "a vector and metrics",
        "an array for metrics",
        "None for metrics",
        "a metric that is a vector",
        "a metric with a number for a name",
    ],
)
def test_a_loss_that_returns_something_else_is_refused(
    returned: Callable[[Any], Any], message: str
) -> None:
    mine = task(lambda params, batch, key: returned(params["w"]))

    with pytest.raises(TaskError, match=re.escape(message)):
        GradientFunction(mine, SEED).compile(BATCH)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda w: None, f"Task.loss returned NoneType{ONE_NUMBER}"),
        (lambda w: "low", f"Task.loss returned str{ONE_NUMBER}"),
        (lambda w: (w.sum(), {}, {}), f"Task.loss returned tuple{ONE_NUMBER}"),
        (lambda w: {"loss": w.sum()}, f"Task.loss returned dict{ONE_NUMBER}"),
        (lambda w: (w.sum(), {"name": "adam"}), "metric 'name' is str, not a scalar"),
        (lambda w: (w.sum(), {"nothing": None}), "metric 'nothing' is NoneType, not a scalar"),
        (lambda w: (w.sum(), {"list": [1.0]}), "metric 'list' is list, not a scalar"),
    ],
    ids=["None", "text", "three values", "a dict", "a text metric", "a metric None", "a list"],
)
def test_a_loss_that_returns_no_numbers_is_refused(
    returned: Callable[[Any], Any], message: str
) -> None:
    mine = task(lambda params, batch, key: returned(params["w"]))

    with pytest.raises(TaskError, match=re.escape(message)):
        GradientFunction(mine, SEED).compile(BATCH)


@pytest.mark.parametrize("metric", [lambda: jnp.complex64(1j), lambda: jax.random.key(0)])
def test_a_metric_that_is_no_real_number_is_refused(metric: Callable[[], Any]) -> None:
    function = GradientFunction(task(lambda params, batch, key: (1.0, {"odd": metric()})), SEED)

    with pytest.raises(TaskError, match="metric 'odd' is "):
        function(weights(task()), [(BATCH, 0, 0)])


def test_what_the_users_loss_raises_goes_through() -> None:
    def broken(params: Any, batch: Any, key: jax.Array) -> Any:
        raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        GradientFunction(task(broken), SEED).compile(BATCH)


def test_gradient_descent_on_complex_parameters_converges() -> None:
    """JAX's gradient of a complex parameter is the conjugate of the way up."""
    target = np.array([1 + 2j, -3j, 0.5], np.complex64)

    def distance(params: Any, batch: Any, key: jax.Array) -> Any:
        return (jnp.abs(params["w"] - target) ** 2).sum()

    mine = task(distance, lambda key: {"w": jnp.ones(3, jnp.complex64)})
    optimizer = optax.sgd(0.1)
    (w,) = weights(mine)
    state = optimizer.init(w)
    function = GradientFunction(mine, SEED)

    losses = []
    for number in range(50):
        gradient = function([w], [(BATCH, 0, number)])
        losses.append(gradient.loss)
        updates, state = optimizer.update(gradient.leaves[0], state)
        w = np.asarray(optax.apply_updates(w, updates))

    # Each step takes a fifth of what is left, so the loss falls by 0.64 a step.
    assert losses[1] == pytest.approx(0.64 * losses[0], rel=1e-4)
    np.testing.assert_allclose(w, target, atol=1e-3)


# ----------------------------------------------------- batches that are made


def made(params: Any, key: jax.Array) -> Any:
    """Depends on the weights, as what an actor sees does."""
    x = jax.random.normal(key, (8, 3))
    return {"x": x, "y": x @ params["w"] + 1.0}


GENERATED = Task(init=init, loss=loss, data=Generated(made, 10), optimizer="sgd(0.1)")


def test_a_made_batch_is_a_constant_to_the_gradient_and_has_a_key_of_its_own() -> None:
    params = GENERATED.tree.restore(weights(GENERATED))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 3), 14)
    batch = made(params, jax.random.fold_in(key, MADE))

    got = GradientFunction(GENERATED, SEED)(weights(GENERATED), [(None, 3, 14)])
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, key)

    np.testing.assert_allclose(got.loss, value, rtol=1e-6)
    for leaf, want in zip(got.leaves, GENERATED.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(leaf, want, rtol=1e-5)


def test_the_same_batch_is_made_on_any_worker_and_another_for_each_number() -> None:
    here, there = (GradientFunction(GENERATED, SEED) for _ in range(2))
    numbers = [(0, 1), (0, 2), (1, 1)]

    losses = [here(weights(GENERATED), [(None, *n)]).loss for n in numbers]

    assert losses == [there(weights(GENERATED), [(None, *n)]).loss for n in numbers]
    assert len(set(losses)) == len(numbers)


def test_the_losss_own_keys_are_not_that_of_the_batch() -> None:
    key = jax.random.key(0)
    loss_keys = [*jax.random.split(key, 1000), *(jax.random.fold_in(key, n) for n in range(100))]

    of_batch = jax.random.key_data(jax.random.fold_in(key, MADE)).tolist()

    assert of_batch not in [jax.random.key_data(k).tolist() for k in loss_keys]
