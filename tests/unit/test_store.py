"""The weights move exactly as plain optax moves them, or not at all."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from headwater.server.compiled_updates import KEPT_UPDATES
from headwater.server.optimizer import AbstractOptimizer, OptaxOptimizer, resolve
from headwater.server.ranges import Ranges
from headwater.server.settings import Planned, Settings
from headwater.server.store import NotFinite, Published, Store, initial
from headwater.worker.tree import ModelTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    kernel: Any
    bias: Any
    activation: str = dataclasses.field(default="relu", metadata={"static": True})


def matrices() -> Any:
    """Large enough for XLA to use vector instructions, and not a multiple of their width."""
    a, b = jax.random.split(jax.random.key(1))
    return {"kernel": jax.random.normal(a, (33, 17)), "bias": jax.random.normal(b, (17,))}


def bfloat16() -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), matrices())


def odd_tree() -> Any:
    """None leaves, a dataclass, a scalar, an array without elements, a tuple."""
    return {
        "dense": Dense(kernel=matrices()["kernel"], bias=None, activation="tanh"),
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "scale": jnp.float32(0.5),
        "pair": (jnp.ones(3), [jnp.full((1, 1), 2.0)]),
    }


class Still(AbstractOptimizer):
    """Moves nothing: for dtypes that no arithmetic is defined for."""

    text = "still"

    def init(self, params: Any) -> Any:
        return ()

    def apply(self, grads: Any, state: Any, params: Any, loss: jax.Array) -> tuple[Any, Any]:
        return params, state


def store_of(params: Any, optimizer: optax.GradientTransformation | AbstractOptimizer) -> Store:
    if not isinstance(optimizer, AbstractOptimizer):
        optimizer = OptaxOptimizer(optimizer, "the test's")
    tree = ModelTree(params)
    return Store(tree, optimizer, initial(tree, params, optimizer, incarnation=3))


def buffer_of(store: Store, grads: Any) -> np.ndarray:
    """A gradient as it comes over the wire."""
    buffer = store.layout.empty()
    store.layout.pack([np.asarray(leaf) for leaf in jax.tree.leaves(grads)], buffer)
    return buffer


def gradients(params: Any, count: int) -> list[Any]:
    """Trees like `params`, random and different from each other."""
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(5)
    return [
        treedef.unflatten([rng.normal(size=x.shape).astype(x.dtype) for x in leaves])
        for _ in range(count)
    ]


def bits(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Every leaf down to its last bit."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [(x.dtype.name, x.shape, x.tobytes()) for x in arrays]


def plain_optax(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """The step in optax's README, jitted; `extra` is what some transformations take besides."""

    @jax.jit
    def step(params: Any, state: Any, grads: Any, **extra: Any) -> Any:
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def not_bias(params: Any) -> Any:
    return {name: name != "bias" for name in params}


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 10)


@pytest.mark.parametrize(
    ("tx", "make"),
    [
        (optax.adam(1e-2), matrices),
        (optax.adamw(1e-2, weight_decay=0.1, mask=not_bias), matrices),
        (optax.sgd(0.1, momentum=0.9, nesterov=True), matrices),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE)), matrices),
        (optax.MultiSteps(optax.adam(1e-2), 3).gradient_transformation(), matrices),
        (optax.chain(optax.adam(1e-2), optax.apply_every(2)), matrices),
        (optax.noisy_sgd(0.1, key=jax.random.key(4)), matrices),
        (optax.adam(1e-2), bfloat16),
        (optax.sgd(0.1, momentum=0.9), bfloat16),
        (optax.adam(1e-2), odd_tree),
        (optax.adafactor(1e-2), odd_tree),
    ],
    ids=[
        "adam",
        "adamw with a mask",
        "momentum",
        "clipping and a schedule",
        "MultiSteps",
        "apply_every",
        "a key in the state",
        "adam in bfloat16",
        "momentum in bfloat16",
        "adam on an odd tree",
        "adafactor on an odd tree",
    ],
)
def test_served_training_equals_plain_optax_bit_for_bit(
    tx: optax.GradientTransformation, make: Callable[[], Any]
) -> None:
    params = make()
    store = store_of(params, tx)
    step, state = plain_optax(tx), tx.init(params)

    for position, grads in enumerate(gradients(params, 7)):
        published = store.apply(buffer_of(store, grads), 1.0, position)
        params, state = step(params, state, grads)

        assert bits(published.leaves) == bits(params)
        assert bits(without_keys(published.optimizer_state)) == bits(without_keys(state))


def without_keys(tree: Any) -> Any:
    """PRNG keys as the numbers they are made of."""

    def number(x: Any) -> Any:
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(number, tree)


@pytest.mark.parametrize("tx", [optax.polyak_sgd(), optax.contrib.reduce_on_plateau(patience=1)])
def test_an_optimizer_that_takes_the_loss_gets_the_pushs_own(
    tx: optax.GradientTransformation,
) -> None:
    params = matrices()
    store = store_of(params, tx)
    step, state = plain_optax(tx), tx.init(params)

    for position, grads in enumerate(gradients(params, 5)):
        loss = 2.0 + position
        published = store.apply(buffer_of(store, grads), loss, position)
        params, state = step(params, state, grads, value=jnp.float32(loss))

        assert bits(published.leaves) == bits(params)
        assert bits(published.optimizer_state) == bits(state)


def test_the_optimizer_sees_the_users_own_tree() -> None:
    seen = []

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        seen.append((updates, params))
        return updates, state

    params = odd_tree()
    store_of(params, optax.GradientTransformation(lambda params: (), update))

    ((updates, traced),) = seen
    assert jax.tree.structure(updates) == jax.tree.structure(traced) == jax.tree.structure(params)
    assert traced["dense"].activation == "tanh"
    assert traced["none"] is None


def test_a_new_store_is_at_version_0_with_nothing_applied() -> None:
    params = matrices()
    store = store_of(params, optax.adam(1e-2))

    now = store.current
    assert (now.incarnation, now.version) == (3, 0)
    assert (now.applied, now.left_out) == (Ranges(), Ranges())
    assert bits(now.leaves) == bits(params)
    assert bits(now.optimizer_state) == bits(optax.adam(1e-2).init(params))


def test_the_version_and_what_was_applied_grow_together() -> None:
    params = matrices()
    store = store_of(params, optax.sgd(0.1))
    buffer = buffer_of(store, params)

    history = [store.apply(buffer, 1.0, position) for position in (2, 0, 7)]

    assert [p.version for p in history] == [1, 2, 3]
    assert [list(p.applied) for p in history] == [[2], [0, 2], [0, 2, 7]]
    assert [p.incarnation for p in history] == [3, 3, 3]
    assert store.current is history[-1]


def test_no_batch_counts_twice() -> None:
    params = matrices()
    store = store_of(params, optax.sgd(0.1))
    store.apply(buffer_of(store, params), 1.0, 4)
    before = store.current

    with pytest.raises(ValueError, match="4 is in the set already"):
        store.apply(buffer_of(store, params), 1.0, 4)
    with pytest.raises(ValueError, match="4 is in the set already"):
        store.leave_out(4)

    assert store.current is before


def test_leaving_a_batch_out_keeps_the_version_and_the_weights() -> None:
    params = matrices()
    store = store_of(params, optax.adam(1e-2))
    before = store.apply(buffer_of(store, params), 1.0, 0)

    after = store.leave_out(3)

    assert store.current is after
    assert after.version == before.version == 1
    assert (list(after.applied), list(after.left_out)) == ([0, 3], [3])
    assert (list(before.applied), list(before.left_out)) == ([0], [])
    assert after.leaves is before.leaves
    assert after.optimizer_state is before.optimizer_state


def test_a_published_version_never_changes_when_later_ones_are_made() -> None:
    params = odd_tree()
    store = store_of(params, optax.adam(1e-2))
    first, *rest = gradients(params, 6)
    published = store.apply(buffer_of(store, first), 1.0, 0)
    before = bits((published.leaves, published.optimizer_state)), list(published.applied)

    for position, grads in enumerate(rest, start=1):
        store.apply(buffer_of(store, grads), 1.0, position)

    assert store.current.version == 6
    assert (bits((published.leaves, published.optimizer_state)), list(published.applied)) == before


def test_a_published_version_cannot_be_written() -> None:
    params = matrices()
    published = store_of(params, optax.sgd(0.1)).current

    with pytest.raises(dataclasses.FrozenInstanceError):
        published.version = 2  # type: ignore[misc]
    assert not np.asarray(published.leaves[0]).flags.writeable


def test_the_gradients_buffer_may_be_overwritten_as_soon_as_apply_returns() -> None:
    # As large as a layer is, so that a late read of it would be seen.
    params = {"w": jnp.ones((1024, 1024))}
    store = store_of(params, optax.sgd(1.0, momentum=0.9))
    buffer = buffer_of(store, {"w": np.full((1024, 1024), 0.5, np.float32)})

    published = store.apply(buffer, 1.0, 0)
    buffer[:] = 0xFF  # NaN in every place

    assert (np.asarray(published.leaves[0]) == 0.5).all()
    assert np.isfinite(np.concatenate(jax.tree.leaves(published.optimizer_state))).all()


def test_the_weights_are_not_the_memory_that_init_returned() -> None:
    mine = ModelTree({"w": np.ones(1024, np.float32)}).layout.empty().view(np.float32)
    mine[:] = 1.0  # aligned as XLA likes it, so that sharing it would be possible
    store = store_of({"w": mine}, optax.sgd(0.1))

    mine[:] = 7.0

    assert (np.asarray(store.current.leaves[0]) == 1.0).all()


BAD = [
    (np.float32, np.nan),
    (np.float32, np.inf),
    (np.float32, -np.inf),
    (np.float16, np.inf),
    (jnp.bfloat16, np.nan),
    (jnp.bfloat16, -np.inf),
    (np.complex64, np.nan),
    (np.complex64, complex(0, np.inf)),
    (np.complex64, complex(0, np.nan)),
    (jnp.float8_e4m3fn, np.nan),
    (jnp.float8_e4m3fnuz, np.nan),
    (jnp.float8_e4m3b11fnuz, np.nan),
    (jnp.float8_e5m2, np.inf),
    (jnp.float8_e5m2fnuz, np.nan),
    (jnp.float8_e3m4, np.inf),
    (jnp.float8_e8m0fnu, np.nan),
]


@pytest.mark.parametrize(
    ("dtype", "bad"), BAD, ids=[f"{np.dtype(dtype).name} {bad}" for dtype, bad in BAD]
)
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(
    dtype: Any, bad: complex
) -> None:
    params = {
        "a": jnp.ones(2),
        "b": jnp.ones((2, 3), dtype),
        "c": jnp.ones(4, dtype),
    }
    store = store_of(params, Still())
    grads = jax.tree.map(np.array, params)
    grads["b"][1, ::2] = bad
    grads["c"][:] = bad
    before = store.current

    with pytest.raises(NotFinite) as refused:
        store.apply(buffer_of(store, grads), 1.0, 0)

    assert str(refused.value) == "2 of the 6 numbers in b"
    assert store.current is before
    assert store.apply(buffer_of(store, params), 1.0, 0).version == 1


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_is_refused_and_changes_nothing(loss: float) -> None:
    params = matrices()
    store = store_of(params, optax.adam(1e-2))
    before = store.current

    with pytest.raises(NotFinite, match=f"^the loss is {loss}$"):
        store.apply(buffer_of(store, params), loss, 0)

    assert store.current is before


def test_a_scalar_that_is_not_finite_is_named_too() -> None:
    store = store_of(odd_tree(), optax.sgd(0.1))
    grads = odd_tree() | {"scale": jnp.float32(np.nan)}

    with pytest.raises(NotFinite, match=r"^1 of the 1 numbers in scale$"):
        store.apply(buffer_of(store, grads), 1.0, 0)


def test_after_a_refusal_training_goes_on_as_if_the_bad_one_had_never_come() -> None:
    params, tx = matrices(), optax.adam(1e-2)
    first, second = gradients(params, 2)
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), first)
    store, other = store_of(params, tx), store_of(params, tx)

    store.apply(buffer_of(store, first), 1.0, 0)
    with pytest.raises(NotFinite):
        store.apply(buffer_of(store, bad), 1.0, 1)
    store.apply(buffer_of(store, second), 1.0, 1)
    other.apply(buffer_of(other, first), 1.0, 0)
    other.apply(buffer_of(other, second), 1.0, 1)

    assert bits(store.current.leaves) == bits(other.current.leaves)
    assert bits(store.current.optimizer_state) == bits(other.current.optimizer_state)


def test_the_largest_numbers_of_a_dtype_are_finite() -> None:
    # Summing them, as a quicker check would, gives infinity.
    largest = float(jnp.finfo(jnp.float32).max)
    params = {"w": jnp.zeros(64), "h": jnp.zeros(64, jnp.float16)}
    store = store_of(params, Still())
    grads = {"w": np.full(64, largest, np.float32), "h": np.full(64, 65504, np.float16)}

    assert store.apply(buffer_of(store, grads), 3e38, 0).version == 1


def test_initial_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NotFinite, match=r"^2 of the 3 numbers in w$"):
        store_of({"w": jnp.array([np.nan, 1.0, np.inf])}, optax.sgd(0.1))


def compilations(log: pytest.LogCaptureFixture, what: Callable[[], Any]) -> list[str]:
    """What XLA compiled meanwhile."""
    log.clear()
    with jax.log_compiles(), log.at_level(logging.WARNING, "jax"):
        what()
    return [r.getMessage() for r in log.records if "Finished XLA compilation" in r.getMessage()]


def test_nothing_is_compiled_after_the_store_is_made(caplog: pytest.LogCaptureFixture) -> None:
    params = odd_tree()
    store = store_of(params, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE)))
    buffers = [buffer_of(store, grads) for grads in gradients(params, 3)]

    def three_updates() -> Published:
        for position, buffer in enumerate(buffers):
            store.apply(buffer, 1.0, position)
        return store.current

    assert compilations(caplog, three_updates) == []
    assert store.current.version == 3


def test_the_test_before_would_see_a_compilation(caplog: pytest.LogCaptureFixture) -> None:
    assert compilations(caplog, lambda: store_of(matrices(), optax.sgd(0.1)))


def test_of_the_updates_that_were_compiled_the_newest_and_those_in_use_are_kept() -> None:
    tree = ModelTree({"w": jnp.zeros(4)})
    optimizer = resolve("sgd(1.0, momentum=0.5)", 10)
    store = Store(tree, optimizer, initial(tree, {"w": jnp.zeros(4)}, optimizer))

    def compiles(momentum: float, *planned: Planned) -> bool:
        settings = Settings(numbers={"momentum": momentum}, planned=planned)
        compiled = store.prepare(settings)
        store.set(settings)
        return compiled

    plan = Planned(9, "momentum", 0.99)
    many = [n / 100 for n in range(KEPT_UPDATES + 2)]
    assert compiles(many[0], plan)
    assert all(compiles(momentum, plan) for momentum in many[1:])

    assert not compiles(many[-1], plan), "in use, and planned"
    assert not any(compiles(momentum) for momentum in many[1:])
    assert compiles(many[0]), "forgotten"


def test_weights_keep_their_dtype_where_the_optimizer_computes_in_a_wider_one() -> None:
    params = bfloat16()
    store = store_of(params, optax.scale(jnp.float32(0.1)))

    published = store.apply(buffer_of(store, params), 1.0, 0)

    assert [x.dtype for x in published.leaves] == [jnp.bfloat16, jnp.bfloat16]
