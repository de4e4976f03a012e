"""What a worker computes on four devices; tests/unit/test_devices.py has pytest run this there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from headwater import ArrayData, Generated, Task
from headwater.protos.errors import UsageError
from headwater.worker.devices import Placement, example_count
from headwater.worker.gradient import AbstractGradientFunction, GradientFunction, Step
from headwater.worker.local_steps import LocalSteps
from headwater.worker.platform import choose_devices

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 24)).astype(np.float32)
TABLE = RNG.normal(size=(10, 16)).astype(np.float32)


def batch(size: int) -> Any:
    """With leaves that are no examples: a table of its own length, and a number."""
    return {"x": X[:size], "kind": np.arange(size) % 10, "table": TABLE, "scale": np.float32(2)}


def init(key: jax.Array) -> Any:
    a, b, c = jax.random.split(key, 3)
    params = {
        "frozen": jax.random.normal(a, (24, 32)) * 0.2,
        "hidden": jax.random.normal(b, (32, 16)) * 0.2,
        "out": jax.random.normal(c, (16,)),
    }
    return params, {"mean": jnp.zeros(16), "var": jnp.ones(16), "seen": jnp.int32(0)}


def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
    """With dropout, BatchNorm's statistics, and a gather: all of them see the whole batch."""
    kept = jax.random.bernoulli(key, 0.7, batch["x"].shape)
    h = jnp.tanh(jnp.where(kept, batch["x"], 0) @ params["frozen"]) @ params["hidden"]
    mean, var = h.mean(axis=0), h.var(axis=0)
    h = (h - mean) / jnp.sqrt(var + 1e-3) + batch["table"][batch["kind"]]  # (batch, 16)
    value = ((h @ params["out"] - batch["x"].sum(axis=1)) ** 2).mean() * batch["scale"]
    new = {
        "mean": 0.9 * state["mean"] + 0.1 * mean,
        "var": 0.9 * state["var"] + 0.1 * var,
        "seen": state["seen"] + len(batch["x"]),
    }
    return value, {"kept": kept.sum(), "largest": jnp.abs(h).max()}, new


@functools.cache
def task() -> Task:
    return Task(
        init=init, loss=loss, data=ArrayData(x=X), optimizer="adam(0.01)",
        has_state=True, trainable=lambda name: name != "frozen",
    )  # fmt: skip


@functools.cache
def weights() -> list[Any]:
    """As a worker has them: NumPy arrays, and the constants on the device."""
    leaves = task().tree.leaves(task().init(jax.random.key(0)))
    trained, state, constants = task().tree.split(leaves)
    return [*map(np.asarray, [*trained, *state]), *constants]


def assert_alike(
    one: AbstractGradientFunction, other: AbstractGradientFunction, steps: Sequence[Step]
) -> None:
    """Loss, metrics, gradient and state, to rounding; what dropout kept, to the bit."""
    a, b = one(weights(), steps), other(weights(), steps)

    assert a.metrics["kept"] == b.metrics["kept"]
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
    np.testing.assert_allclose(a.metrics["largest"], b.metrics["largest"], rtol=1e-5)
    for x, y in zip(a.leaves, b.leaves, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * float(jnp.abs(y).max()))


@functools.cache
def split() -> GradientFunction:
    return GradientFunction(task(), 5, jax.devices())


@functools.cache
def plain() -> GradientFunction:
    return GradientFunction(task(), 5)


@pytest.mark.parametrize("size", [32, 30])
def test_a_split_gradient_is_that_of_one_device(size: int) -> None:
    assert_alike(split(), plain(), [(batch(size), 2, 3)])


def test_as_many_devices_are_used_as_the_largest_divisor_lets() -> None:
    counts = {32: 4, 30: 3, 10: 2, 7: 1, 3: 3, 1: 1}

    assert {size: Placement(jax.devices(), batch(size)).count for size in counts} == counts
    assert split().device_count(batch(30)) == 3


def test_each_device_has_its_part_and_the_gradient_is_reduced_once_for_all() -> None:
    text = split()._compiled_for(batch(32))[1].as_text()

    assert "f32[8,24]" in text  # a quarter of the batch
    assert "f32[32,24]" not in text
    assert "all-reduce" in text


def test_the_same_batch_gives_the_same_bits_again() -> None:
    another = GradientFunction(task(), 5, jax.devices())

    a, b = (f(weights(), [(batch(32), 0, 1)]) for f in (split(), another))

    assert [x.tobytes() for x in a.leaves] == [x.tobytes() for x in b.leaves]


def test_one_device_computes_the_bits_that_are_computed_without_naming_any() -> None:
    one, third = (GradientFunction(task(), 5, [jax.devices()[at]]) for at in (0, 2))

    a, b, c = (f(weights(), [(batch(32), 0, 1)]) for f in (plain(), one, third))

    assert a.loss == b.loss == c.loss
    for x, y, z in zip(a.leaves, b.leaves, c.leaves, strict=True):
        assert x.tobytes() == y.tobytes() == z.tobytes()
        assert (x.devices(), z.devices()) == ({jax.devices()[0]}, {jax.devices()[2]})


def test_local_steps_go_over_batches_that_are_split_differently() -> None:
    steps = [(batch(size), 1, at) for at, size in enumerate([32, 32, 30, 32])]
    how: Any = {"optimizer": "adam(0.01)", "epochs": 2, "batches_per_epoch": 5}

    split, plain = LocalSteps(task(), 5, devices=jax.devices(), **how), LocalSteps(task(), 5, **how)

    assert_alike(split, plain, steps)


def test_constants_are_placed_once() -> None:
    constants = [jnp.ones(3), jnp.ones(4)]
    placement = Placement(jax.devices(), batch(32))

    placed = placement.put_constants(constants)

    assert placement.put_constants(list(constants)) is placed
    assert len(placed[0].devices()) == 4
    assert placement.put_constants([constants[0], jnp.zeros(4)]) is not placed


def test_batches_that_are_made_are_not_split() -> None:
    made = Task(
        init=lambda key: {"w": jnp.ones(3)},
        loss=lambda params, batch, key: (batch @ params["w"]).mean(),
        data=Generated(lambda params, key: jax.random.normal(key, (32, 3))),
        optimizer="sgd(0.1)",
    )
    split, plain = GradientFunction(made, 5, jax.devices()), GradientFunction(made, 5)

    a, b = (f([np.ones(3, np.float32)], [(None, 0, 1)]) for f in (split, plain))

    assert split.device_count(None) == 1
    assert a.leaves[0].tobytes() == b.leaves[0].tobytes()


def test_callbacks_in_a_loss_see_the_whole_batch() -> None:
    def mean(x: np.ndarray) -> np.ndarray:
        assert x.shape == (32, 24)
        return x.mean(dtype=np.float32)

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        shift = jax.pure_callback(mean, jax.ShapeDtypeStruct((), jnp.float32), batch["x"])
        return ((batch["x"] + shift) @ params).mean()

    mine = Task(init=lambda key: jnp.ones(24), loss=loss, data=ArrayData(x=X), optimizer="sgd(1)")
    split, plain = GradientFunction(mine, 5, jax.devices()), GradientFunction(mine, 5)

    a, b = (f([np.ones(24, np.float32)], [({"x": X[:32]}, 0, 1)]) for f in (split, plain))

    np.testing.assert_allclose(a.leaves[0], b.leaves[0], rtol=1e-5)


def test_a_batchs_size_is_the_leading_axis_of_most_of_it() -> None:
    assert example_count(batch(32)) == 32
    assert example_count({"table": TABLE, "x": X}) == 64
    assert example_count({"scale": 3.0}) == example_count(None) == 0


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("all", [0, 1, 2, 3]), ("2", [0, 1]), ("0,2", [0, 2]), ("3,", [3]), ("4", [0, 1, 2, 3])],
)
def test_devices_are_named(text: str, numbers: list[int]) -> None:
    assert choose_devices(text) == [jax.local_devices()[number] for number in numbers]


@pytest.mark.parametrize("text", ["5", "0", "4,", "0,0", "1,9", "99999999999999"])
def test_devices_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        choose_devices(text)

    assert str(refused.value) == (
        f"--devices {text}: there are 4 cpu devices, 0 to 3; name each once"
    )


@pytest.mark.parametrize("text", ["", "-1", "a", "0,,1", ",1", "1.5", "all,1"])
def test_what_names_no_devices_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"it is all, a number for the first so many, or"):
        choose_devices(text)
