"""An optimizer's numbers, changed while it trains; and plain optax until they are."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from headwater.server.optimizer import (
    AbstractOptimizer,
    Change,
    OptaxOptimizer,
    OptimizerError,
    check,
    resolve,
)
from headwater.worker.delayed_nesterov import delayed_nesterov

LOSS = np.float32(1.5)
LIVE, RECOMPILED, IN_STATE = Change.LIVE, Change.RECOMPILED, Change.IN_STATE


def params_of(dtype: Any = jnp.float32) -> Any:
    # Odd sizes, so that both the vectorised loop and its remainder run.
    return {
        "b": jax.random.normal(jax.random.key(1), (19,), dtype),
        "w": jax.random.normal(jax.random.key(2), (37, 53), dtype),
    }


PARAMS = params_of()


def train(
    update: Callable[..., Any], state: Any, params: Any, *rest: Any, updates: int = 4
) -> tuple[Any, Any]:
    for i in range(updates):
        grads = jax.tree.map(lambda x, i=i: (i + 0.3) * x, params)  # of some sum of squares
        params, state = update(grads, state, params, LOSS, *rest)
    return params, state


def plain(transformation: optax.GradientTransformation, params: Any, updates: int = 4) -> Any:
    """The loop of optax's README, jitted."""
    served = optax.with_extra_args_support(transformation)

    @jax.jit
    def update(grads: Any, state: Any, params: Any, loss: Any) -> Any:
        changes, state = served.update(grads, state, params, value=loss)
        return optax.apply_updates(params, changes), state

    return train(update, served.init(params), params, updates=updates)


def served(
    optimizer: AbstractOptimizer, params: Any, live: Any, *scale: Any, updates: int = 4
) -> Any:
    update = jax.jit(optimizer.apply)
    return train(update, optimizer.init(params), params, live, *scale, updates=updates)


def assert_same_bits(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


WRITTEN: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam(1e-3)": lambda: optax.adam(1e-3),
    "adamw(3e-4, weight_decay=0.1)": lambda: optax.adamw(3e-4, weight_decay=0.1),
    "sgd(0.0371, momentum=0.9, nesterov=True)": lambda: optax.sgd(0.0371, 0.9, True),
    "rmsprop(1e-3, centered=True, momentum=0.9)": lambda: optax.rmsprop(
        1e-3, centered=True, momentum=0.9
    ),
    "lion(1e-4)": lambda: optax.lion(1e-4),
    "chain(clip_by_global_norm(1.0), adamw(3e-4, weight_decay=0.1))": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(3e-4, weight_decay=0.1)
    ),
    "sgd(cosine_decay_schedule(0.1, total_updates), momentum=0.9)": lambda: optax.sgd(
        optax.cosine_decay_schedule(0.1, 10), 0.9
    ),
    "adamw(warmup_cosine_decay_schedule(0.0, 0.1, 2, 10))": lambda: optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 10)
    ),
    "delayed_nesterov(0.1, delay=2)": lambda: delayed_nesterov(0.1, delay=2),
    # A traced number alone moves last bits of these, on the CPU in float32.
    "chain(sgd(0.0371), scale(0.37))": lambda: optax.chain(optax.sgd(0.0371), optax.scale(0.37)),
    "adam(1e-3, b1=live(0.9), b2=live(0.999), eps=live(1e-8))": lambda: optax.adam(1e-3),
    "adafactor(0.0371)": lambda: optax.adafactor(0.0371),
    "fromage(0.0371)": lambda: optax.fromage(0.0371),
}


LIKE_OTHERS = (
    "adamw(3e-4, weight_decay=0.1)",
    "rmsprop(1e-3, centered=True, momentum=0.9)",
    "lion(1e-4)",
    "adamw(warmup_cosine_decay_schedule(0.0, 0.1, 2, 10))",
)


DTYPES = [
    pytest.param(jnp.float32, id="float32"),
    pytest.param(jnp.bfloat16, id="bfloat16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, marks=[pytest.mark.slow] if spec in LIKE_OTHERS else [])
        for spec in WRITTEN
    ],
)
def test_with_its_own_numbers_an_update_is_plain_optax_bit_for_bit(spec: str, dtype: Any) -> None:
    params, optimizer = params_of(dtype), resolve(spec, 10)
    want = plain(WRITTEN[spec](), params)
    live = optimizer.live_values({})
    assert live

    assert_same_bits(served(optimizer, params, {}), want)
    assert_same_bits(served(optimizer, params, live), want)
    assert_same_bits(served(optimizer, params, live, 1.0), want)


def test_a_tasks_own_optimizer_with_weight_decay_decays_as_plain_optax() -> None:
    made = optax.adamw(0.1, weight_decay=0.3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))

    assert_same_bits(served(resolve(made, 10), PARAMS, {}), plain(made, PARAMS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [float, np.float32], ids=["python's", "numpy's"])
def test_a_set_learning_rate_is_the_one_that_is_trained_with(dtype: Any, number: Any) -> None:
    params, optimizer = params_of(dtype), resolve("adamw(1e-3)", 10)
    live = {k: number(v) for k, v in optimizer.live_values({"learning_rate": 0.125}).items()}

    assert_same_bits(served(optimizer, params, live), plain(optax.adamw(0.125), params))


def test_a_number_marked_live_is_set_likewise() -> None:
    optimizer = resolve("sgd(0.1, momentum=live(0.9))", 10)
    live = optimizer.live_values({"momentum": 0.5})
    assert live == {"learning_rate": 0.1, "momentum": 0.5}

    got, want = served(optimizer, PARAMS, live), plain(optax.sgd(0.1, 0.5), PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_setting_the_learning_rate_does_not_compile_again() -> None:
    traces = 0

    class Counted(OptaxOptimizer):
        def apply(self, *arguments: Any) -> Any:
            nonlocal traces
            traces += 1
            return super().apply(*arguments)

    expression = resolve("adam(linear_schedule(0.1, 0.0, 10), b1=live(0.9))", 10)._source  # type: ignore[attr-defined]
    optimizer = Counted(expression, "counted")
    update, state = jax.jit(optimizer.apply), optimizer.init(PARAMS)
    params = PARAMS
    for set_values in ({}, {"learning_rate": 0.5}, {"b1": 0.8, "learning_rate": 1}, {"b1": 0.9}):
        params, state = update(PARAMS, state, params, LOSS, optimizer.live_values(set_values))

    assert traces == 1
    assert update._cache_size() == 1


def test_a_set_value_replaces_the_schedule_until_it_is_taken_back() -> None:
    optimizer = resolve("sgd(linear_schedule(0.5, 0.0, 4))", 10)
    update, state, params = jax.jit(optimizer.apply), optimizer.init(PARAMS), {"x": jnp.zeros(1)}
    state = optimizer.init(params)
    moves = []
    for set_values in ({}, {"learning_rate": 2.0}, {"learning_rate": 2.0}, {}):
        live = optimizer.live_values(set_values)
        before = params
        params, state = update({"x": jnp.ones(1)}, state, before, LOSS, live)
        moves.append(float((before["x"] - params["x"])[0]))

    assert math.isnan(optimizer.live_values({})["learning_rate"])
    assert moves == [0.5, 2.0, 2.0, 0.125]  # the schedule has counted on


def test_one_of_two_schedules_may_be_replaced() -> None:
    spec = "partition({'b': sgd(constant_schedule(0.5)), 'w': sgd(constant_schedule(0.25))}, {})"
    spec = spec.replace("{})", "{'b': 'b', 'w': 'w'})")
    optimizer = resolve(spec, 10)
    ones = {"b": jnp.ones(1), "w": jnp.ones(1)}

    live = optimizer.live_values({"sgd#2.learning_rate": 4.0})
    after, _ = jax.jit(optimizer.apply)(ones, optimizer.init(ones), ones, LOSS, live)

    assert jax.tree.map(float, jax.tree.map(jnp.sum, after)) == {"b": 0.5, "w": -3.0}


NAMES: list[tuple[str, dict[str, tuple[float | None, Change]]]] = [
    (
        "adam(1e-3, 0.8)",
        {
            "learning_rate": (1e-3, LIVE),
            "b1": (0.8, RECOMPILED),
            "b2": (0.999, RECOMPILED),
            "eps": (1e-8, RECOMPILED),
            "eps_root": (0.0, RECOMPILED),
        },
    ),
    (
        "chain(clip_by_global_norm(1), sgd(constant_schedule(0.1), momentum=live(0.9)))",
        {
            "max_norm": (1.0, RECOMPILED),
            "learning_rate": (None, LIVE),
            "momentum": (0.9, LIVE),
        },
    ),
    (
        "chain(optax.trace(0.9), sgd(0.1), chain(scale(2), optax.sgd(0.2)), fromage(0.3))",
        {
            "decay": (0.9, RECOMPILED),
            "sgd.learning_rate": (0.1, LIVE),
            "step_size": (2.0, RECOMPILED),
            "sgd#2.learning_rate": (0.2, LIVE),
            "fromage.learning_rate": (0.3, LIVE),
            "min_norm": (1e-6, RECOMPILED),
        },
    ),
    (
        "apply_if_finite(sgd(total_updates), 5)",
        {"max_consecutive_errors": (5.0, RECOMPILED), "learning_rate": (10.0, LIVE)},
    ),
    (
        "delayed_nesterov(0.5)",
        {
            "learning_rate": (0.5, LIVE),
            "momentum": (0.9, RECOMPILED),
            "delay": (8.0, RECOMPILED),
            "activation": (0.0, RECOMPILED),
        },
    ),
    (
        "chain(sgd(0.25), inject_hyperparams(sgd)(0.5, momentum=constant_schedule(0.75)))",
        {
            "learning_rate": (0.25, LIVE),
            "learning_rate#2": (0.5, IN_STATE),
            "momentum": (None, IN_STATE),
        },
    ),
    ("chain(identity())", {}),
]


def numbers_of(optimizer: AbstractOptimizer, state: Any = None) -> dict[str, Any]:
    found = optimizer.hyper_parameters(optimizer.init(PARAMS) if state is None else state)
    assert all(number.name == name for name, number in found.items())
    return {name: (number.value, number.change) for name, number in found.items()}


@pytest.mark.parametrize(("spec", "numbers"), NAMES, ids=[spec for spec, _ in NAMES])
def test_every_number_has_a_name_a_value_and_what_its_change_costs(
    spec: str, numbers: dict[str, tuple[float | None, Change]]
) -> None:
    optimizer = resolve(spec, 10)
    live = {name for name, (_, change) in numbers.items() if change is LIVE}

    assert list(numbers_of(optimizer).items()) == list(numbers.items())
    assert optimizer.live_values({}).keys() == live


def test_set_values_are_told_apart_by_what_their_change_costs() -> None:
    optimizer = resolve("chain(adam(0.1), inject_hyperparams(scale)(1.0))", 10)
    values = {"learning_rate": 1.0, "b1": 2.0, "step_size": 3.0, "nonsense": 4.0}

    assert optimizer.live_values(values) == {"learning_rate": 1.0}
    assert optimizer.compiled_in(values) == {"b1": 2.0}
    assert optimizer.in_state(values) == {"step_size": 3.0, "nonsense": 4.0}


def test_a_recompiled_number_is_as_if_it_had_been_written() -> None:
    optimizer = resolve("chain(clip(1), adam(1e-3, b1=live(0.9)))", 10)

    other = optimizer.with_numbers({"max_delta": 0.5}, PARAMS).with_numbers({"b2": 0.5}, PARAMS)

    assert numbers_of(other)["max_delta"] == (0.5, RECOMPILED)
    assert numbers_of(other)["b2"] == (0.5, RECOMPILED)
    want = plain(optax.chain(optax.clip(0.5), optax.adam(1e-3, b2=0.5)), PARAMS)
    assert_same_bits(served(other, PARAMS, other.live_values({})), want)
    assert numbers_of(optimizer)["b2"] == (0.999, RECOMPILED)


def test_what_was_a_whole_number_stays_one_where_it_can() -> None:
    other = resolve("delayed_nesterov(0.1, delay=3)", 10).with_numbers({"delay": 2.0}, PARAMS)

    assert_same_bits(served(other, PARAMS, {}), plain(delayed_nesterov(0.1, delay=2), PARAMS))


REFUSED = [
    ("adam(1e-3)", {"b3": 0.9}, "has no number 'b3' to change in this way; it has b1, b2, eps"),
    ("adam(1e-3)", {"learning_rate": 1.0}, "has no number 'learning_rate' to change in this way"),
    ("adafactor(1e-3)", {"min_dim_size_to_factor": 2}, "cannot have min_dim_size_to_factor=2: its"),
    ("delayed_nesterov(0.1)", {"delay": 0.0}, "cannot have delay=0.0: optax says: "),
    (
        "delayed_nesterov(0.1)",
        {"delay": 2.5},
        "cannot have delay=2.5: delay must be a whole number, not 2.5",
    ),
]


@pytest.mark.parametrize(("spec", "values", "why"), REFUSED)
def test_a_number_that_cannot_be_had_is_refused(spec: str, values: Any, why: str) -> None:
    with pytest.raises(OptimizerError, match=re.escape(f"the optimizer, {spec}, {why}")):
        resolve(spec, 10).with_numbers(values, PARAMS)


def test_a_number_that_must_be_known_when_compiled_cannot_be_live() -> None:
    optimizer = resolve("adafactor(0.1, live(128))", 10)

    with pytest.raises(OptimizerError, match="cannot be given learning_rate, min_dim_size_to_f"):
        check(optimizer, PARAMS)


NOT_SERVED = {
    *("lbfgs", "contrib.sophia"),  # need the loss as a function
    "noisy_sgd",  # warns unless it has a key
    "optimistic_adam",  # deprecated, says optax
}
LEARNERS = {
    f"{module}{name}"
    for module, place in (("", optax), ("contrib.", optax.contrib))
    for name, function in vars(place).items()
    if inspect.isfunction(function) and not name.startswith("_")
    if [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty or parameter.name == "learning_rate"
    ]
    == ["learning_rate"]
}


@pytest.mark.parametrize("name", sorted(LEARNERS - NOT_SERVED))
def test_every_optimizer_of_optax_takes_its_learning_rate_as_it_trains(name: str) -> None:
    optimizer = resolve(f"{name}(learning_rate=0.1)", 10)

    check(optimizer, PARAMS)
    assert "learning_rate" in optimizer.live_values({})


def test_the_scale_multiplies_the_update_and_not_what_the_state_takes() -> None:
    optimizer = resolve("sgd(0.5, momentum=0.5)", 10)
    state = optimizer.init(PARAMS)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    update = jax.jit(optimizer.apply)

    whole, state_of_whole = update(ones, state, PARAMS, LOSS, {})
    half, state_of_half = update(ones, state, PARAMS, LOSS, {}, np.float32(0.5))

    assert_same_bits(state_of_half, state_of_whole)
    np.testing.assert_allclose(PARAMS["w"] - half["w"], (PARAMS["w"] - whole["w"]) / 2, atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, np.float32(0.5)], ids=["python's", "numpy's"])
def test_a_scale_leaves_bfloat16_as_it_is(scale: Any) -> None:
    params = params_of(jnp.bfloat16)
    for optimizer in (resolve("adam(0.1)", 10), resolve(optax.adam(0.1), 10)):
        after, _ = served(optimizer, params, optimizer.live_values({"update_scale": 0.1}), scale)
        assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}


def test_a_tasks_own_optimizer_can_be_scaled() -> None:
    optimizer = resolve(optax.sgd(0.5), 10)
    assert numbers_of(optimizer) == {"update_scale": (1.0, RECOMPILED)}
    assert optimizer.live_values({}) == {}
    assert optimizer.compiled_in({"update_scale": 0.5}) == {}

    live = optimizer.live_values({"update_scale": 0.5})

    assert live == {"update_scale": 0.5}
    assert_same_bits(served(optimizer, PARAMS, live), plain(optax.sgd(0.25), PARAMS))


def test_a_scale_that_is_compiled_in_is_live_from_then_on() -> None:
    optimizer = resolve(optax.sgd(0.5), 10).with_numbers({"update_scale": 0.5}, PARAMS)
    assert numbers_of(optimizer) == {"update_scale": (0.5, LIVE)}

    for live, rate in (({}, 0.25), ({"update_scale": 0.5}, 0.25), ({"update_scale": 2.0}, 1.0)):
        got = served(optimizer, PARAMS, live)
        jax.tree.map(np.testing.assert_allclose, got, plain(optax.sgd(rate), PARAMS))


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def test_injected_numbers_are_found_wherever_they_stand_in_the_state() -> None:
    def outer(step_size: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale(step_size), optax.inject_hyperparams(optax.trace)(0.5), optax.sgd(0.1)
        )

    made = optax.chain(
        optax.masked(optax.inject_hyperparams(optax.sgd)(0.25), matrices),
        optax.inject_hyperparams(outer)(2.0),
        optax.inject_hyperparams(optax.sgd)(0.125, momentum=0.75),
    )

    assert numbers_of(resolve(made, 10)) == {
        "update_scale": (1.0, RECOMPILED),
        "learning_rate": (0.25, IN_STATE),
        "step_size": (2.0, IN_STATE),
        "decay": (0.5, IN_STATE),
        "learning_rate#2": (0.125, IN_STATE),
        "momentum": (0.75, IN_STATE),
    }


def test_an_injected_number_keeps_its_kind_and_its_name_and_compiles_nothing() -> None:
    made = optax.inject_hyperparams(optax.adamw)(1e-3, weight_decay=0.1)
    optimizer = resolve(made, 10)
    params, update = params_of(jnp.bfloat16), jax.jit(optimizer.apply)
    _, state = train(update, optimizer.init(params), params)
    assert numbers_of(optimizer, state).keys() == numbers_of(optimizer).keys()

    changed = optimizer.set_in_state(state, {"learning_rate": 0.5, "weight_decay": 0})
    train(update, changed, params)

    assert update._cache_size() == 1
    assert changed.hyperparams["learning_rate"].dtype == jnp.bfloat16
    assert numbers_of(optimizer, changed)["learning_rate"] == (0.5, IN_STATE)
    assert numbers_of(optimizer, changed)["weight_decay"] == (0.0, IN_STATE)
    assert_same_bits(changed.inner_state, state.inner_state)
    assert float(state.hyperparams["learning_rate"]) < 0.01  # as it was


@pytest.mark.parametrize("static", [{}, {"static_args": "mask"}], ids=["a schedule", "static"])
def test_an_injected_mask_is_no_number_and_decay_is_plain_optaxs(static: Any) -> None:
    """Unless it is static, inject_hyperparams calls the mask with the count."""

    def mask(params: Any) -> Any:
        return {"b": False, "w": True}

    made = optax.inject_hyperparams(optax.adamw, **static)(1e-3, weight_decay=0.1, mask=mask)
    optimizer = resolve(made, 10)
    names = numbers_of(optimizer)

    assert sorted(names) == [
        *("b1", "b2", "eps", "eps_root", "learning_rate", "update_scale", "weight_decay")
    ]
    if static:
        check(optimizer, PARAMS)
        state = optimizer.set_in_state(optimizer.init(PARAMS), {"weight_decay": 0.1})
        assert_same_bits(train(jax.jit(optimizer.apply), state, PARAMS), plain(made, PARAMS))


def test_a_mask_that_was_taken_for_a_schedule_of_true_or_false_is_no_number() -> None:
    made = optax.inject_hyperparams(optax.adamw)(1e-3, weight_decay=0.1, mask=matrices)

    assert "mask" not in numbers_of(resolve(made, 10))


def test_what_an_injected_schedule_overwrites_cannot_be_set() -> None:
    made = optax.inject_hyperparams(optax.sgd)(optax.constant_schedule(0.5), momentum=0.75)
    optimizer = resolve(made, 10)
    state = optimizer.init(PARAMS)
    assert numbers_of(optimizer)["learning_rate"] == (None, IN_STATE)

    with pytest.raises(OptimizerError) as error:
        optimizer.set_in_state(state, {"momentum": 0.5, "learning_rate": 0.1})

    assert str(error.value) == (
        "the optimizer, the task's own optimizer, cannot have learning_rate=0.1: a schedule "
        "overwrites it at each update; set update_scale"
    )


def test_a_number_that_is_not_in_the_state_cannot_be_set_there() -> None:
    optimizer = resolve("inject_hyperparams(sgd)(0.5)", 10)

    with pytest.raises(OptimizerError, match=r"has no number 'b1' .*; it has learning_rate$"):
        optimizer.set_in_state(optimizer.init(PARAMS), {"b1": 0.5})


def test_a_whole_number_in_the_state_stays_whole() -> None:
    optimizer = resolve("inject_hyperparams(scale)(2)", 10)
    params = {"x": jnp.ones(2, jnp.float32)}
    state = optimizer.init(params)
    assert state.hyperparams["step_size"].dtype == jnp.int32

    assert int(optimizer.set_in_state(state, {"step_size": 3.0}).hyperparams["step_size"]) == 3
    with pytest.raises(OptimizerError, match=r"cannot have step_size=2\.5: it is a whole number"):
        optimizer.set_in_state(state, {"step_size": 2.5})


BEYOND = [
    ("inject_hyperparams(scale)(2)", {"step_size": 1e30}, "int32 .* -2147483648 to 2147483647"),
    (
        "inject_hyperparams(scale)(2.0)",
        {"step_size": -1e39},
        r"float32 .* 3\.4028234663852886e\+38",
    ),
    ("sgd(0.1, momentum=live(0.9))", {"momentum": 1e39}, r"float32 .* 3\.4028234663852886e\+38"),
    ("adam(1e-3)", {"b1": 1e39}, r"float32 .* 3\.4028234663852886e\+38"),
]


@pytest.mark.parametrize(("spec", "values", "holds"), BEYOND)
def test_a_value_that_a_number_cannot_hold_is_refused(spec: str, values: Any, holds: str) -> None:
    optimizer = resolve(spec, 10)
    state = optimizer.init(PARAMS)
    shown = re.escape(", ".join(f"{name}={value!r}" for name, value in values.items()))

    with pytest.raises(OptimizerError, match=f"cannot have {shown}: {holds}$"):
        take(optimizer, state, values)


def test_the_largest_that_a_number_can_hold_is_taken() -> None:
    largest = float(jnp.finfo(jnp.float32).max)
    injected = resolve("inject_hyperparams(scale)(2.0)", 10)

    assert resolve("adam(1e-3)", 10).live_values({"learning_rate": largest}) == {
        "learning_rate": largest
    }
    state = injected.set_in_state(injected.init(PARAMS), {"step_size": -largest})
    assert state.hyperparams["step_size"] == -largest


@pytest.mark.parametrize(("dtype", "most"), [(jnp.float16, 65504.0), (jnp.float8_e4m3fn, 448.0)])
def test_a_narrow_number_in_the_state_holds_less(dtype: Any, most: float) -> None:
    optimizer = resolve(optax.inject_hyperparams(optax.scale)(jnp.asarray(2, dtype)), 10)
    state = optimizer.init({"x": jnp.ones(2, dtype)})
    assert state.hyperparams["step_size"].dtype == dtype

    kept = optimizer.set_in_state(state, {"step_size": most})
    assert float(kept.hyperparams["step_size"]) == most
    with pytest.raises(
        OptimizerError, match=f"{np.dtype(dtype)} holds numbers from -{most} to {most}"
    ):
        optimizer.set_in_state(state, {"step_size": 2 * most})


def take(optimizer: AbstractOptimizer, state: Any, values: dict[str, float]) -> None:
    """Set them, each where it belongs."""
    optimizer.live_values(values)
    optimizer.with_numbers(optimizer.compiled_in(values), PARAMS)
    optimizer.set_in_state(state, optimizer.in_state(values))


class Fixed(AbstractOptimizer):
    """Has no numbers."""

    text = "fixed"

    def init(self, params: Any) -> Any:
        return ()

    def apply(self, grads: Any, state: Any, params: Any, *rest: Any) -> tuple[Any, Any]:
        return params, state


def test_an_optimizer_of_ones_own_need_have_no_numbers() -> None:
    optimizer = Fixed()

    assert optimizer.hyper_parameters(()) == optimizer.live_values({"a": 1.0}) == {}
    assert optimizer.with_numbers({}, PARAMS) is optimizer
    assert optimizer.set_in_state((), {}) == ()
    for change in (
        optimizer.with_numbers,
        lambda values, state: optimizer.set_in_state((), values),
    ):
        with pytest.raises(OptimizerError, match=r"fixed, has no number 'a' .*; it has none"):
            change({"a": 1.0}, PARAMS)
