"""A task on its way to processes of our own: what arrives, and what is said of what cannot."""

from __future__ import annotations

import functools
import importlib.util
import linecache
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from headwater import ArrayData, Generated, Task, from_items
from headwater.protos.errors import HeadwaterError, UsageError
from headwater.worker import handed


def task_of(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "init": lambda key: {"w": jnp.arange(3.0)},
        "loss": lambda params, batch, key: params["w"].sum(),
        "data": ArrayData(x=np.arange(8)),
        "optimizer": "adam(1e-3)",
    }
    return Task(**{**fields, **changes})


def arrived(task: Task, readers: int = 1) -> Task:
    """The task as the last of so many readers of one descriptor gets it."""
    with handed.write(task) as file:
        found = [handed.read(os.dup(file.fileno())) for _ in range(readers)]
    return found[-1]


@jax.custom_vjp
def clipped(x: jax.Array) -> jax.Array:
    return x


clipped.defvjp(lambda x: (x, None), lambda kept, gradient: (jnp.clip(gradient, -0.5, 0.5),))


@functools.partial(jax.jit, static_argnums=1)
def times(x: jax.Array, n: int) -> jax.Array:
    return (x * n).sum()


def total(x: jax.Array) -> jax.Array:
    return x.sum()


LOSSES: dict[str, Callable[[Any], Any]] = {
    "jit": lambda w: times(w, 2),
    "custom_vjp": lambda w: clipped(w).sum(),
    "checkpoint": jax.checkpoint(total, policy=jax.checkpoint_policies.dots_saveable),
    "vmap": lambda w: jax.vmap(total)(w[None]).sum(),
    "grad": lambda w: jax.grad(total)(w).sum(),
    "partial": functools.partial(total),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_jax_made_of_functions_arrives(name: str) -> None:
    function = LOSSES[name]
    loss = arrived(task_of(loss=lambda params, batch, key: function(params["w"]))).loss
    w = jnp.arange(3.0)

    found = jax.value_and_grad(lambda w: loss({"w": w}, None, None))(w)  # type: ignore[arg-type]

    assert jax.tree.all(jax.tree.map(np.array_equal, found, jax.value_and_grad(function)(w)))


def test_an_object_with_a_home_arrives_as_the_one_that_is_there() -> None:
    assert arrived(task_of(evaluate=jax.nn.relu)).evaluate is jax.nn.relu


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1, 0, 9))),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.5),
        "adam(1e-3)",
        lambda total: optax.sgd(optax.cosine_decay_schedule(0.1, total)),
    ],
)
def test_an_optimizer_arrives(optimizer: Any) -> None:
    found = arrived(task_of(optimizer=optimizer)).optimizer
    params = {"w": jnp.ones(3)}

    def first_update(optimizer: Any) -> Any:
        return optimizer.update(params, optimizer.init(params), params)[0]

    if isinstance(optimizer, str):
        assert found == optimizer
    else:
        made = callable(optimizer)
        pair = (optimizer(5), found(5)) if made else (optimizer, found)
        assert jax.tree.all(jax.tree.map(np.array_equal, *map(first_update, pair)))


@pytest.mark.parametrize(
    "data",
    [
        ArrayData(x=np.arange(1000)),
        from_items([{"x": 1}, {"x": 2}]),
        Generated(lambda params, key: jax.random.normal(key), 3),
        lambda: ArrayData(x=np.arange(8)),
    ],
)
def test_data_arrive(data: Any) -> None:
    task = task_of(data=data)
    task.dataset, task.tree  # noqa: B018  (loaded and traced here, which must not matter)

    found = arrived(task, readers=3)

    assert vars(found).keys() == {name for name in vars(task) if name not in ("dataset", "tree")}
    positions = np.array([1, 0])
    rng = np.random.default_rng(0)
    batches = [one.dataset.batch(positions, rng) for one in (task, found)]
    assert jax.tree.all(jax.tree.map(np.array_equal, *batches))


def test_a_traceback_names_file_and_line_and_shows_what_was_typed() -> None:
    name, text = "<ipython-input-7>", "def loss(params, batch, key):\n    return params['v']\n"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text, name, "exec"), space)  # noqa: S102  (as a notebook does)
    with handed.write(task_of(loss=space["loss"])) as file:
        linecache.cache.pop(name)  # another process has it not

        found = handed.read(os.dup(file.fileno()))

    with pytest.raises(KeyError) as raised:
        found.loss({}, None, None)  # type: ignore[arg-type]
    last = traceback.extract_tb(raised.tb)[-1]
    assert (last.filename, last.lineno, last.line) == (name, 2, "return params['v']")


@pytest.fixture
def hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that is loaded from where nobody looks for one."""
    path = tmp_path / "hidden_module.py"
    path.write_text("def one(key):\n    return two()\n\ndef two():\n    return {'w': 2}\n")
    spec = importlib.util.spec_from_file_location("hidden_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hidden_module", module)
    spec.loader.exec_module(module)
    return module


def test_functions_of_a_module_that_nobody_else_finds_arrive(
    hidden: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with handed.write(task_of(init=hidden.one)) as file:
        monkeypatch.delitem(sys.modules, "hidden_module")

        assert handed.read(os.dup(file.fileno())).init(None) == {"w": 2}  # type: ignore[arg-type]


def test_one_that_is_found_is_imported_from_where_it_is(
    hidden: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(str(hidden.__file__)).parent)

    assert arrived(task_of(init=hidden.one)).init is hidden.one


class Holder:
    """Data that hold what cannot be sent."""

    def __init__(self, part: Any) -> None:
        self.parts = {"lock": part}

    def __len__(self) -> int:
        return 1

    def batch(self, indices: Any, rng: Any) -> Any:
        return indices


def test_what_cannot_be_sent_is_named_in_one_line() -> None:
    lock = threading.Lock()

    def locked() -> bool:
        return lock.locked()

    wrong: dict[str, dict[str, Any]] = {
        "Task.loss uses locked, which uses lock": {"loss": lambda params, batch, key: locked()},
        "Task.evaluate uses <lambda>, which uses locked, which uses lock": {
            "evaluate": jax.jit(lambda params: locked())
        },
        "Task.data uses parts, which uses its 'lock'": {"data": Holder(lock)},
        "Task.data uses a default": {"data": lambda given=lock: given},
        "Task.optimizer uses file": {"optimizer": functools.partial(print, file=lock)},
    }
    for way, changes in wrong.items():
        with pytest.raises(UsageError) as raised:
            handed.write(task_of(**changes))

        said = f"the task cannot be handed to other processes: {way}: cannot pickle '_thread.lock'"
        assert str(raised.value).startswith(said)
        assert "use workers=0" in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="macOS has none")
def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    full = functools.partial(open, "/dev/full", "wb")
    monkeypatch.setattr(handed.tempfile, "TemporaryFile", full)

    with pytest.raises(HeadwaterError, match=r"could not be written to .*: No space left"):
        handed.write(task_of(data=ArrayData(x=np.zeros(1 << 20))))
