"""Local steps push what a plain optax loop moves the weights by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from headwater import ArrayData, Task
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import HeadwaterError
from headwater.worker.gradient import GradientFunction, Step
from headwater.worker.link import Patience
from headwater.worker.load import LoadedTask
from headwater.worker.local_steps import LocalSteps
from headwater.worker.loop import Worker
from headwater.worker.optimizer_spec import SpecError
from headwater.worker.task import TaskError

SEED = 11
PER_EPOCH = 5

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype(np.float32)


def batch(number: int, size: int = 8) -> dict[str, np.ndarray]:
    x = X[8 * number : 8 * number + size]
    return {"x": x, "y": x.sum(axis=1)}


def steps(*numbers: int, epoch: int = 2) -> list[Step]:
    """The last batch of an epoch is short."""
    return [(batch(n, 3 if n == PER_EPOCH - 1 else 8), epoch, n) for n in numbers]


def init(key: jax.Array) -> Any:
    a, b = jax.random.split(key)
    return {"w": jax.random.normal(a, (3,)), "hidden": (jax.random.normal(b, (2, 2)), None)}


def loss(params: Any, batch: Any, key: jax.Array) -> Any:
    """With dropout, so that the key counts."""
    keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    error = jnp.where(keep, batch["x"], 0.0) @ params["w"] - batch["y"]
    penalty = (params["hidden"][0] ** 2).sum()
    return (error**2).mean() + penalty, {"error": jnp.abs(error).mean()}


def task(loss: Any = loss, init: Any = init) -> Task:
    return Task(init=init, loss=loss, data=ArrayData(x=X), optimizer="sgd(0.1)")


def weights(task: Task) -> list[np.ndarray]:
    """As a worker has them: views of one buffer, in layout order."""
    buffer = task.tree.layout.empty()
    task.tree.layout.pack(task.tree.leaves(task.init(jax.random.key(task.seed))), buffer)
    return list(task.tree.layout.views(buffer).values())


def local_steps(task: Task, optimizer: Any, epochs: int = 3) -> LocalSteps:
    return LocalSteps(task, SEED, optimizer=optimizer, epochs=epochs, batches_per_epoch=PER_EPOCH)


def walk(task: Task, optimizer: Any, of: Sequence[Step], state: Any = None) -> list[np.ndarray]:
    """A plain optax loop's weights, after it."""
    optimizer = optax.with_extra_args_support(optimizer)

    @jax.jit
    def step(params: Any, state: Any, batch: Any, epoch: Any, number: Any) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), epoch), number)
        values, grads = jax.value_and_grad(task.loss, has_aux=True)(params, batch, key)
        updates, state = optimizer.update(grads, state, params, value=values[0])
        return optax.apply_updates(params, updates), state

    params = task.tree.restore([np.copy(leaf) for leaf in weights(task)])
    state = optimizer.init(params) if state is None else state
    for data, epoch, number in of:
        params, state = step(params, state, data, np.uint32(epoch), np.uint32(number))
    return [np.asarray(leaf) for leaf in task.tree.leaves(params)]


def assert_pushes(task: Task, optimizer: Any, of: Sequence[Step], after: list[np.ndarray]) -> None:
    """To the last bit."""
    got = local_steps(task, optimizer)(weights(task), of)
    for leaf, base, local in zip(got.leaves, weights(task), after, strict=True):
        np.testing.assert_array_equal(leaf, base - local)


def test_one_step_of_plain_descent_is_the_gradient() -> None:
    mine = task()

    got = local_steps(mine, "sgd(1.0)")(weights(mine), steps(3))
    want = GradientFunction(mine, SEED)(weights(mine), steps(3))

    assert (got.loss, got.metrics) == (want.loss, want.metrics)
    for leaf, gradient in zip(got.leaves, want.leaves, strict=True):
        np.testing.assert_allclose(leaf, gradient, rtol=1e-5, atol=1e-6)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(1e-2),
    "value": optax.contrib.momo(0.1),
    "plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
    "keeps the weights": optax.contrib.dog(),
    "keeps them twice": optax.contrib.prodigy(),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
}


SLOW = {"plateau", "keeps the weights", "adamw"}


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optimizer, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, optimizer in OPTIMIZERS.items()
    ],
)
def test_what_is_pushed_is_the_way_of_a_plain_optax_loop(optimizer: Any) -> None:
    """With the epoch's short last batch."""
    of = steps(1, 2, 3, 4)
    assert_pushes(task(), optimizer, of, walk(task(), optimizer, of))


def test_the_state_begins_afresh_with_each_ticket() -> None:
    mine = task()
    function = local_steps(mine, "adam(0.01)")

    one = function(weights(mine), steps(0, 1))
    function(weights(mine), steps(2, 3, 4))
    again = function(weights(mine), steps(0, 1))

    assert (one.loss, one.metrics) == (again.loss, again.metrics)
    assert [x.tobytes() for x in one.leaves] == [x.tobytes() for x in again.leaves]


DECAY = optax.linear_schedule(1.0, 0.0, 3 * PER_EPOCH)
SCHEDULED = {
    "sgd": optax.sgd(DECAY),
    "adam": optax.adam(DECAY),
    "weight decay": optax.chain(optax.sgd(0.1), optax.add_decayed_weights(DECAY)),
    "injected": optax.inject_hyperparams(optax.adam)(DECAY),
    "inside injected": optax.inject_hyperparams(
        lambda momentum: optax.sgd(DECAY, momentum=momentum)
    )(DECAY),
    "masked": optax.masked(optax.sgd(DECAY), {"w": True, "hidden": (False, None)}),
}
QUICK = ("adam", "inside injected", "masked")


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(optimizer, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, optimizer in SCHEDULED.items()
    ],
)
def test_schedules_stand_where_the_first_batch_stands_in_the_run(optimizer: Any) -> None:
    mine, of = task(), steps(1, 2, 3, epoch=2)
    params = mine.tree.restore(weights(mine))
    with_extra = optax.with_extra_args_support(optimizer)
    zeros = jax.tree.map(jnp.zeros_like, params)

    # Updates without a gradient; what they leave behind in moments is put back.
    fresh = state = with_extra.init(params)
    for _ in range(2 * PER_EPOCH + 1):
        _, state = with_extra.update(zeros, state, params)
    state = jax.tree.map(
        lambda new, old: old if isinstance(old, optax.ScaleByAdamState) else new,
        state,
        fresh,
        is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState),
    )

    assert_pushes(mine, optimizer, of, walk(mine, optimizer, of, state))


def test_an_expressions_total_updates_are_the_runs_batches() -> None:
    mine, of = task(), steps(0, 1, epoch=0)
    total = 3 * PER_EPOCH
    assert_pushes(
        mine,
        "sgd(1.0 / total_updates)",
        of,
        walk(mine, optax.sgd(1.0 / total), of),
    )
    assert_pushes(mine, lambda n: optax.sgd(1.0 / n), of, walk(mine, optax.sgd(1.0 / total), of))


def test_loss_and_metrics_are_means_over_the_examples() -> None:
    mine = task(
        lambda params, batch, key: (
            batch["y"].mean() + 0 * params["w"].sum(),
            {"x": batch["x"].mean()},
        )
    )

    got = local_steps(mine, "sgd(0.1)")(weights(mine), steps(2, 3, 4))

    x = np.concatenate([X[16:32], X[32:35]])
    assert got.loss == pytest.approx(x.sum(axis=1).mean(), rel=1e-5)
    assert got.metrics == {"x": pytest.approx(x.mean(), rel=1e-5)}


def test_the_weights_are_left_alone_and_may_be_written_again() -> None:
    mine = task(
        lambda params, batch, key: (params["w"] ** 2).sum(), lambda key: {"w": jnp.ones(4096)}
    )
    (w,) = weights(mine)

    got = local_steps(mine, "sgd(0.25)")([w], steps(0, 1))

    np.testing.assert_array_equal(w, np.ones(4096))
    assert not np.shares_memory(got.leaves[0], w)
    w[:] = np.nan
    np.testing.assert_array_equal(got.leaves[0], np.full(4096, 0.75))


def test_what_was_pushed_does_not_change_with_the_next_ticket() -> None:
    mine = task()
    function = local_steps(mine, "adam(0.01)")
    first = function(weights(mine), steps(0, 1))
    before = [leaf.copy() for leaf in first.leaves]

    for _ in range(5):
        function(weights(mine), steps(2, 3))

    for leaf, was in zip(first.leaves, before, strict=True):
        np.testing.assert_array_equal(leaf, was)


def test_what_a_step_returns_outlives_the_next_ones() -> None:
    """Though it is, to JAX, one with an array of the weights or of the inner state."""
    keeps_the_loss = optax.GradientTransformationExtraArgs(
        lambda params: jnp.float32(0), lambda g, state, params=None, *, value, **_: (g, value)
    )

    def loss(params: Any, batch: Any, key: jax.Array) -> Any:
        return params["x"] ** 2, {"x": params["x"], "y": params["y"]}

    mine = task(loss, lambda key: {"x": jnp.float32(1), "y": jnp.float32(5)})
    inner = optax.chain(optax.sgd(0.25), keeps_the_loss)

    got = local_steps(mine, inner)(weights(mine), steps(0, 1, 2))

    assert got.loss == (1 + 1 / 4 + 1 / 16) / 3
    assert got.metrics == {"x": (1 + 1 / 2 + 1 / 4) / 3, "y": 5}


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

    got = local_steps(mine, "adam(1e-2)")(weights(mine), steps(0, 1))

    assert [(x.shape, x.dtype) for x in got.leaves] == [
        (t.shape, t.dtype) for t in mine.tree.layout.tensors
    ]


def test_complex_parameters_go_down() -> None:
    target = np.array([1 + 2j, -3j, 0.5], np.complex64)

    def distance(params: Any, batch: Any, key: jax.Array) -> Any:
        return (jnp.abs(params["w"] - target) ** 2).sum()

    mine = task(distance, lambda key: {"w": jnp.ones(3, jnp.complex64)})

    (way,) = local_steps(mine, "sgd(0.5)")(weights(mine), steps(0)).leaves

    np.testing.assert_allclose(1 - way, target, atol=1e-6)


def test_each_shape_of_batch_is_compiled_once() -> None:
    traced = []

    def counted(params: Any, batch: Any, key: jax.Array) -> Any:
        traced.append(batch["x"].shape)
        return loss(params, batch, key)

    mine = task(counted)
    function = local_steps(mine, "adam(0.01)")

    assert function.compile(batch(0)) > 0.0
    assert function.compile(batch(1)) == 0.0
    assert function.compile(batch(4, 3)) > 0.0
    for of in steps(0, 1), steps(2, 3, 4), steps(4):
        function(weights(mine), of)

    assert traced == [(8, 3), (3, 3)]


def test_every_step_is_reported() -> None:
    mine, seen = task(), []

    local_steps(mine, "sgd(0.1)")(weights(mine), steps(1, 2, 3, 4), lambda: seen.append(1))

    assert len(seen) == 4


def grows(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.concatenate([x, x]), params)


REFUSED = {
    "more than the loss": (
        optax.lbfgs(0.1),
        "the task's own optimizer, cannot make a local step from a gradient and its loss alone: ",
    ),
    "another shape": (
        optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (grows(g), s)),
        "the inner optimizer, the task's own optimizer, cannot make a local step",
    ),
    "another state": (
        optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (g, grows(s))),
        "the task's own optimizer, changes the shapes, dtypes or structure of its state, which",
    ),
    "by an expression": ("lbfgs()", "the inner optimizer, lbfgs(), cannot make a local step"),
}


@pytest.mark.parametrize(("optimizer", "message"), REFUSED.values(), ids=REFUSED)
def test_an_inner_optimizer_that_cannot_work_is_refused(optimizer: Any, message: str) -> None:
    with pytest.raises(TaskError, match=re.escape(message)):
        local_steps(task(), optimizer)


def test_a_loss_that_cannot_work_is_refused_as_without_local_steps() -> None:
    function = local_steps(task(lambda params, batch, key: params["w"]), "sgd(0.1)")
    with pytest.raises(TaskError, match=re.escape("Task.loss returned float32[3]; it must be")):
        function.compile(batch(0))


class Sent:
    """A link that keeps what is sent."""

    def __init__(self) -> None:
        self.messages: list[pb.WorkerMessage] = []
        self.body = b""
        self.slots = None

    def attach(self, *_: object, **__: object) -> bool:
        return False

    def send(self, message: pb.WorkerMessage, *body: memoryview) -> None:
        self.messages.append(message)
        self.body += b"".join(body)


def worker(local_steps: int, inner_optimizer: str = "") -> tuple[Worker, Sent]:
    """One that has joined, has the weights of version 7, and leases epoch 2."""
    mine = Task(
        init=init, loss=loss, data=ArrayData(x=X[:35], y=X[:35].sum(axis=1)),
        optimizer="sgd(0.1)", batch_size=8, epochs=3,
    )  # fmt: skip
    life, link = (
        Worker(LoadedTask(mine, "mine", {}, ""), "localhost:1", Patience("localhost:1", 1)),
        Sent(),
    )
    buffer = mine.tree.layout.empty()
    mine.tree.layout.pack(mine.tree.leaves(mine.init(jax.random.key(0))), buffer)
    message = pb.ServerMessage(
        welcome=pb.Welcome(
            seed=SEED, batch_size=8, epochs=3, batches_per_epoch=PER_EPOCH,
            local_steps=local_steps, inner_optimizer=inner_optimizer,
        ),
        weights=pb.WeightsPart(version=7, total_bytes=buffer.nbytes),
        lease=pb.Lease(
            granted=[
                pb.Batch(id=pb.BatchId(epoch=2, number=n), indices=range(8 * n, min(35, 8 * n + 8)))
                for n in range(PER_EPOCH)
            ]
        ),
    )  # fmt: skip
    life._handle(link, message, buffer.data)  # type: ignore[arg-type]
    return life, link


def compute(life: Worker, link: Sent, *numbers: int) -> pb.Push:
    ids = [pb.BatchId(epoch=2, number=n) for n in numbers]
    message = pb.ServerMessage(ticket=pb.Ticket(batches=ids, base=7))
    life._handle(link, message, None)  # type: ignore[arg-type]
    life._compute(link, life._waiting.popleft())  # type: ignore[arg-type]
    return link.messages[-1].push


@pytest.mark.parametrize(("expression", "inner"), [("", "sgd(0.1)"), ("adam(0.1)", "adam(0.1)")])
def test_a_worker_pushes_the_way_over_its_tickets_batches(expression: str, inner: str) -> None:
    life, link = worker(local_steps=3, inner_optimizer=expression)
    before = life._steps

    push = compute(life, link, 2, 3, 4)

    want = local_steps(task(), inner)(weights(task()), steps(2, 3, 4))
    layout = task().tree.layout
    buffer = layout.empty()
    layout.pack(want.leaves, buffer)
    assert link.body == buffer.tobytes()
    assert (push.loss, push.metrics) == (want.loss, want.metrics)
    assert push.compute_s > 0.0
    assert push.load_s > 0.0
    assert life._steps - before >= 3 + 3  # batches loaded, and steps taken


def test_a_worker_names_the_option_that_gave_an_inner_optimizer_it_cannot_read() -> None:
    message = "--inner-optimizer, character 1: 'adm' is not a function of optax; did you mean adam?"
    with pytest.raises(SpecError, match=rf"^{re.escape(message)}"):
        worker(local_steps=3, inner_optimizer="adm(0.1)")


@pytest.mark.parametrize("local_steps", [0, 1])
def test_without_local_steps_it_pushes_the_gradient(local_steps: int) -> None:
    life, link = worker(local_steps)

    push = compute(life, link, 2)

    want = GradientFunction(task(), SEED)(weights(task()), steps(2))
    assert (push.loss, push.metrics) == (want.loss, want.metrics)


@pytest.mark.parametrize(("local_steps", "numbers"), [(1, [0, 1]), (3, [0, 1, 2, 3]), (3, [])])
def test_a_ticket_of_another_size_than_was_agreed_is_refused(
    local_steps: int, numbers: list[int]
) -> None:
    life, link = worker(local_steps)
    message = f"ticket has {len(numbers)} batches, its welcome said local_steps={local_steps};"
    with pytest.raises(HeadwaterError, match=re.escape(message)):
        compute(life, link, *numbers)
