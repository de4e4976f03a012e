"""What a Task holds, what it refuses, and that nothing is loaded before it is needed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from headwater import ArrayData, Task
from headwater.protos.layout import LayoutError
from headwater.worker.task import TaskError, batch_sizes, batches_per_epoch

FIELDS: dict[str, Any] = {
    "init": lambda key: {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)},
    "loss": lambda params, batch, key: params["w"].sum(),
    "data": ArrayData(x=np.arange(10)),
    "optimizer": "adam(1e-3)",
}


class Squares:
    """Data of a user's own."""

    def __len__(self) -> int:
        return 4

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return indices**2


def task(**fields: Any) -> Task:
    return Task(**FIELDS | fields)


def test_four_fields_are_enough_and_the_others_have_values_to_begin_with() -> None:
    mine = task()

    assert (mine.batch_size, mine.epochs, mine.seed) == (32, 1, 0)
    assert (mine.shuffle, mine.remainder, mine.evaluate) == (True, "keep", None)


def test_a_task_is_not_altered() -> None:
    with pytest.raises(AttributeError):
        task().batch_size = 7  # type: ignore[misc]


@pytest.mark.parametrize("missing", FIELDS)
def test_a_task_without_one_of_the_four_is_refused(missing: str) -> None:
    with pytest.raises(TypeError, match=missing):
        Task(**{name: value for name, value in FIELDS.items() if name != missing})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("init", {"w": 1}, "Task.init must be a function, not {'w': 1}"),
        ("init", None, "Task.init must be a function, not None"),
        ("loss", "mse", "Task.loss must be a function, not 'mse'"),
        ("evaluate", 0.5, "Task.evaluate must be a function or None, not 0.5"),
        ("batch_size", 0, "Task.batch_size must be a whole number from 1 on, not 0"),
        ("batch_size", -1, "Task.batch_size must be a whole number from 1 on, not -1"),
        ("batch_size", 32.0, "Task.batch_size must be a whole number from 1 on, not 32.0"),
        ("batch_size", "32", "Task.batch_size must be a whole number from 1 on, not '32'"),
        ("batch_size", True, "Task.batch_size must be a whole number from 1 on, not True"),
        ("batch_size", None, "Task.batch_size must be a whole number from 1 on, not None"),
        ("epochs", 0, "Task.epochs must be a whole number from 1 on, not 0"),
        ("epochs", 1.5, "Task.epochs must be a whole number from 1 on, not 1.5"),
        ("epochs", True, "Task.epochs must be a whole number from 1 on, not True"),
        ("seed", -1, "Task.seed must be a whole number in [0, 2**32), not -1"),
        ("seed", 2**32, "Task.seed must be a whole number in [0, 2**32), not 4294967296"),
        ("seed", 0.5, "Task.seed must be a whole number in [0, 2**32), not 0.5"),
        ("seed", None, "Task.seed must be a whole number in [0, 2**32), not None"),
        ("remainder", "pad", 'Task.remainder must be "keep" or "drop", not \'pad\''),
        ("remainder", None, 'Task.remainder must be "keep" or "drop", not None'),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_its_field(
    field: str, value: Any, message: str
) -> None:
    with pytest.raises(TaskError) as error:
        task(**{field: value})

    assert str(error.value) == message


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_a_seed_is_any_number_of_32_bits(seed: int) -> None:
    assert task(seed=seed).seed == seed


# ------------------------------------------------------------- data


def test_data_may_be_a_function_which_is_called_once_and_only_when_it_is_needed() -> None:
    calls = []

    def data() -> ArrayData:
        calls.append("called")
        return ArrayData(x=np.arange(10))

    mine = task(data=data)
    assert mine.tree.names
    assert calls == []

    assert mine.dataset is mine.dataset
    assert len(mine.dataset) == 10
    assert calls == ["called"]


def test_data_of_the_users_own_needs_a_length_and_batches() -> None:
    assert len(task(data=Squares()).dataset) == 4
    assert len(task(data=lambda: Squares()).dataset) == 4  # noqa: PLW0108  (a function)


def test_a_class_is_a_function_that_returns_data() -> None:
    assert len(task(data=Squares).dataset) == 4


def test_data_that_can_be_called_is_still_data() -> None:
    class Callable(Squares):
        def __call__(self) -> None:
            raise AssertionError("it was called")

    assert len(task(data=Callable()).dataset) == 4


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ([1, 2, 3], "list"),
        (np.arange(3), "ndarray"),
        ({"x": np.arange(3)}, "dict"),
        (None, "NoneType"),
        (lambda: [1, 2, 3], "list"),
        (lambda: None, "NoneType"),
    ],
)
def test_data_that_gives_no_batches_is_refused(data: Any, kind: str) -> None:
    with pytest.raises(TaskError) as error:
        task(data=data).dataset  # noqa: B018

    assert str(error.value) == (
        f"Task.data is {kind}, which lacks len() or batch(indices, rng); wrap arrays in "
        "ArrayData(x=..., y=...), and lists or map-style datasets in from_items(source)"
    )


def test_data_without_examples_is_refused() -> None:
    with pytest.raises(TaskError, match=r"^Task\.data has no examples$"):
        task(data=ArrayData(x=[])).dataset  # noqa: B018


def test_what_the_users_data_raises_goes_through_and_is_tried_again() -> None:
    files = iter([FileNotFoundError("digits.npz"), ArrayData(x=[1])])

    def data() -> Any:
        found = next(files)
        if isinstance(found, Exception):
            raise found
        return found

    mine = task(data=data)
    with pytest.raises(FileNotFoundError, match=r"digits\.npz"):
        mine.dataset  # noqa: B018
    assert len(mine.dataset) == 1


# ------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("batch_size", "remainder", "sizes", "count"),
    [
        (5, "keep", [5], 2),
        (5, "drop", [5], 2),
        (4, "keep", [4, 2], 3),
        (4, "drop", [4], 2),
        (10, "keep", [10], 1),
        (11, "keep", [10], 1),
        (1, "keep", [1], 10),
    ],
)
def test_an_epoch_is_cut_into_batches_and_a_short_one_is_kept_or_dropped(
    batch_size: int, remainder: Any, sizes: list[int], count: int
) -> None:
    assert batch_sizes(task(remainder=remainder), batch_size) == sizes
    assert batches_per_epoch(10, batch_size, remainder) == count


def test_an_epoch_without_a_batch_is_refused() -> None:
    with pytest.raises(TaskError) as error:
        batches_per_epoch(10, 11, "drop")

    assert str(error.value) == (
        "an epoch has no batch: 10 examples, batch size 11, and the short batch is dropped; use "
        'remainder="keep" or a smaller batch size'
    )
    assert batch_sizes(task(remainder="drop"), 11) == []


# ------------------------------------------------------------- parameters


def test_a_worker_traces_init_and_never_runs_it() -> None:
    seen = []

    def init(key: jax.Array) -> Any:
        seen.append(key)
        return {"w": jax.random.normal(key, (1000, 1000))}

    tree = task(init=init).tree

    assert tree.names == ["w"]
    assert [isinstance(key, jax.core.Tracer) for key in seen] == [True]


def test_the_tree_is_traced_once() -> None:
    mine = task()
    assert mine.tree is mine.tree


def test_an_init_that_gives_no_parameters_is_refused() -> None:
    with pytest.raises(LayoutError, match="steps has dtype int32"):
        task(init=lambda key: {"steps": jnp.zeros(3, int)}).tree  # noqa: B018


def test_named_weights_are_restored_to_the_users_tree() -> None:
    weights = {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}

    params = task().restore(weights)

    assert params.keys() == {"w", "b"}
    assert params["w"] is weights["w"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"w": np.ones((2, 3))}, r"another model: missing \['b'\]"),
        ({"w": np.ones((3, 2)), "b": np.ones(3)}, r"w has shape \[3, 2\], the model's is \[2, 3\]"),
    ],
)
def test_weights_of_another_model_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        task().restore(weights)
