"""`headwater check`: what it finds in a task, and what it says is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from headwater import ArrayData, Generated, Task
from headwater.protos.errors import HeadwaterError, UsageError
from headwater.protos.layout import LayoutError
from headwater.server.check import Report, check_task, lines
from headwater.server.optimizer import OptimizerError
from headwater.worker.load import LoadedTask
from headwater.worker.optimizer_spec import SpecError
from headwater.worker.task import TaskError

X = np.arange(20, dtype=np.float32).reshape(10, 2)


def loss(params: Any, batch: Any, key: jax.Array) -> Any:
    error = batch["x"] @ params["w"] + params["b"] - 1.0
    return (error**2).mean(), {"error": jnp.abs(error).max()}


FIELDS: dict[str, Any] = {
    "init": lambda key: {"w": jnp.zeros(2), "b": jnp.zeros(())},
    "loss": loss,
    "data": ArrayData(x=X),
    "optimizer": "sgd(0.1)",
    "batch_size": 4,
    "epochs": 3,
    "shuffle": False,
    "evaluate": lambda params: {"accuracy": jnp.float32(0.5)},
}


def loaded(**fields: Any) -> LoadedTask:
    return LoadedTask(Task(**FIELDS | fields), "tiny", {}, "")


def check(**fields: Any) -> Report:
    return check_task(loaded(**fields))


@pytest.fixture(scope="module")
def report() -> Report:
    return check()


def test_the_report_says_what_the_task_is(report: Report) -> None:
    assert report.task == "tiny"
    assert report.parameters == 3
    assert report.tensors == {"b": "float32[]", "w": "float32[2]"}
    assert report.gradient_bytes == 64 + 8  # tensors begin at multiples of 64 bytes
    assert (report.examples, report.batch_size, report.batches_per_epoch) == (10, 4, 3)
    assert report.epochs == 3
    assert report.batch == {"x": "float32[4, 2]"}
    assert report.platform == jax.default_backend()


def test_the_report_has_the_first_batchs_loss_and_the_evaluation(report: Report) -> None:
    assert report.loss == 1.0  # all weights are zero, and every target is 1
    assert report.training_metrics == {"error": 1.0}
    assert report.evaluation == {"accuracy": 0.5}
    assert report.notes == []


def test_everything_is_timed(report: Report) -> None:
    times = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    seconds = {name: value for name, value in times.items() if name.endswith("_s")}
    assert seconds.keys() == {
        "init_s", "load_s", "compile_s", "gradient_s", "update_s", "evaluate_s"
    }  # fmt: skip
    assert all(value > 0 for value in seconds.values())


def test_the_report_is_json(report: Report) -> None:
    assert json.loads(json.dumps(dataclasses.asdict(report)))["parameters"] == 3


def test_people_get_it_in_lines(report: Report) -> None:
    timeless = dataclasses.replace(
        report,
        init_s=1.0,
        load_s=0.002,
        compile_s=3.0,
        gradient_s=0.004,
        update_s=0.005,
        evaluate_s=6.0,
        platform="cpu",
    )
    assert lines(timeless) == [
        "tiny: 3 parameters in 2 tensors, 72 bytes a gradient",
        "  b  float32[]",
        "  w  float32[2]",
        "10 examples, 3 batches of 4 an epoch, 9 updates in 3 epochs",
        "init         1.000 s",
        "batch         2.00 ms  x float32[4, 2]",
        "compile      3.000 s   on cpu",
        "gradient      4.00 ms  loss 1  error 1",
        "update        5.00 ms",
        "evaluate     6.000 s   accuracy 0.5",
        "ok; this machine computes 250 gradients/s, for one process alone",
    ]


def test_a_task_without_evaluate_is_noted() -> None:
    report = check(evaluate=None)

    assert (report.evaluation, report.evaluate_s) == (None, None)
    note = "the task has no evaluate, so `headwater run` shows no final metrics"
    assert report.notes == [note]
    assert f"note: {note}" in lines(report)
    assert not [line for line in lines(report) if line.startswith("evaluate")]


def test_a_tensor_that_no_gradient_reaches_is_noted() -> None:
    report = check(
        init=lambda key: {
            "also": jnp.ones(2),
            "b": jnp.zeros(()),
            "empty": jnp.ones((0, 2)),
            "unused": jnp.ones(3),
            "w": jnp.zeros(2),
        }
    )
    assert report.notes == ["no gradient reaches also, unused: zero on the whole first batch"]


def test_a_batch_is_described_by_the_paths_in_it() -> None:
    class Nested:
        def __len__(self) -> int:
            return 8

        def batch(self, indices: np.ndarray, rng: np.random.Generator) -> Any:
            return {"x": X[indices], "pair": (indices.astype(np.uint8), [np.ones((4, 1, 2))])}

    assert check(data=Nested()).batch == {
        "pair/0": "uint8[4]",
        "pair/1/0": "float64[4, 1, 2]",
        "x": "float32[4, 2]",
    }


def test_a_batch_that_is_one_array_is_called_batch() -> None:
    class Bare:
        def __len__(self) -> int:
            return 8

        def batch(self, indices: np.ndarray, rng: np.random.Generator) -> Any:
            return X[indices]

    report = check(
        data=Bare(), loss=lambda params, batch, key: (batch @ params["w"]).mean() + params["b"]
    )
    assert report.batch == {"batch": "float32[4, 2]"}


MADE: dict[str, Any] = {
    "data": Generated(lambda params, key: {"x": jax.random.normal(key, (4, 2))}),
    "shuffle": True,
}
"""Batches without end."""


def test_batches_that_are_made_without_end_can_be_checked() -> None:
    report = check(**MADE)

    assert report.loss == 1.0
    assert lines(report)[3] == "batches of 4, made without end"


def test_a_schedule_over_all_updates_needs_an_end_as_it_does_in_a_server() -> None:
    schedule = "sgd(cosine_decay_schedule(0.1, total_updates))"

    with pytest.raises(SpecError, match="this run has no end: give Generated its batches_per"):
        check(**MADE, optimizer=schedule)

    made = Generated(MADE["data"].make, batches_per_epoch=7)
    assert check(data=made, optimizer=schedule, shuffle=True).batches_per_epoch == 7


def test_the_same_task_can_be_checked_again_with_the_same_figures() -> None:
    task = loaded()
    one, other = check_task(task), check_task(task)
    assert (one.loss, one.training_metrics) == (other.loss, other.training_metrics)


NO_EVALUATION = 'Task.evaluate must return a dict of numbers, such as {"accuracy": 0.9}: '


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        (
            {"init": lambda key: {"n": jnp.zeros(3, int)}},
            LayoutError,
            "n has dtype int32; a parameter is floating or complex",
        ),
        ({"data": [1, 2]}, TaskError, "Task.data is list, which lacks len() or batch"),
        ({"data": ArrayData(x=[])}, TaskError, "Task.data has no examples"),
        (
            {"batch_size": 11, "remainder": "drop"},
            TaskError,
            "an epoch has no batch: 10 examples, batch size 11",
        ),
        ({"optimizer": "adm(1)"}, SpecError, "'adm' is not a function of optax"),
        ({"optimizer": None}, OptimizerError, "Task.optimizer is None; it must be an optax"),
        ({"optimizer": optax.lbfgs()}, OptimizerError, "from a gradient and its loss alone"),
        (
            {"loss": lambda params, batch, key: batch["x"] @ params["w"]},
            TaskError,
            "Task.loss returned float32[4]; it must be one real number",
        ),
        (
            {"loss": lambda params, batch, key: (params["b"], 0.5)},
            TaskError,
            "Task.loss returned float beside the loss; it must be a dict",
        ),
        ({"evaluate": lambda params: 0.5}, UsageError, f"{NO_EVALUATION}it returned 0.5"),
        ({"evaluate": lambda params: {}}, UsageError, f"{NO_EVALUATION}it returned {{}}"),
        (
            {"evaluate": lambda params: {"name": "adam"}},
            UsageError,
            f"{NO_EVALUATION}could not convert string to float: 'adam'",
        ),
        (
            {"loss": lambda params, batch, key: params["w"].sum() / params["b"]},
            HeadwaterError,
            "the first gradient is not finite: the loss is nan; every worker's would be refused",
        ),
        (
            {"loss": lambda params, batch, key: jnp.sqrt(params["w"]).sum() + params["b"]},
            HeadwaterError,
            "the first gradient is not finite: 2 of the 2 numbers in w; every worker's would be",
        ),
    ],
    ids=[
        "integer parameters",
        "a list for data",
        "no examples",
        "no batch",
        "a wrong SPEC",
        "no optimizer",
        "lbfgs",
        "a vector for a loss",
        "metrics that are none",
        "an evaluation that is a number",
        "an evaluation without metrics",
        "an evaluation that is text",
        "a loss that is NaN",
        "a gradient that is infinite",
    ],
)
def test_what_cannot_work_is_said(fields: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        check(**fields)


def test_what_the_users_code_raises_goes_through() -> None:
    def data() -> Any:
        raise FileNotFoundError("digits.npz")

    with pytest.raises(FileNotFoundError, match=r"digits\.npz"):
        check(data=data)


def test_initial_weights_that_are_not_finite_are_said_to_be_so() -> None:
    with pytest.raises(HeadwaterError, match="not finite"):
        check(init=lambda key: {"w": jnp.full(2, jnp.nan), "b": jnp.zeros(())})
