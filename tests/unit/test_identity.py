"""Who may take part in a run, and what the others are told."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused
from headwater.protos.layout import Layout
from headwater.protos.rpc import PROTOCOL
from headwater.server.identity import RunIdentity

FLOAT32 = np.dtype(np.float32)


def layout(**shapes: tuple[int, ...]) -> Layout:
    """Tensors of float32 by name and shape."""
    return Layout.of((name, FLOAT32, shape) for name, shape in shapes.items())


def task() -> pb.TaskIdentity:
    return pb.TaskIdentity(
        name="mnist", options={"width": "64"}, example_count=5000, batch_size=32, seed=7
    )


def hello() -> pb.Hello:
    """One that may take part."""
    return pb.Hello(
        protocol=PROTOCOL,
        instance=1,
        attempt=1,
        task=task(),
        layout=layout(w=(784, 64), b=(64,)).to_proto(),
        software={"jax": "0.10.2"},
    )


IDENTITY = RunIdentity(
    run_id="20270101-120000-abcd",
    task=task(),
    layout=layout(w=(784, 64), b=(64,)),
    software={"jax": "0.10.2", "python": "3.11.9"},
)


def refusal(message: pb.Hello, incarnation: int = 3) -> Refused:
    with pytest.raises(Refused) as error:
        IDENTITY.check(message, incarnation)
    return error.value


def test_a_worker_of_the_same_task_and_layout_takes_part() -> None:
    assert IDENTITY.check(hello(), incarnation=1) == []


def test_a_worker_that_speaks_another_protocol_is_told_to_install_the_same_version() -> None:
    message = hello()
    message.protocol = PROTOCOL + 1

    refused = refusal(message)

    assert refused.reason is Reason.PROTOCOL_MISMATCH
    assert str(refused) == (
        f"the worker speaks protocol {PROTOCOL + 1}, the server {PROTOCOL}; install the same "
        "version of headwater on both"
    )


def test_another_protocol_is_refused_before_anything_else_is_read() -> None:
    message = pb.Hello(protocol=PROTOCOL + 1, run_id="another", task=pb.TaskIdentity(name="other"))

    assert refusal(message).reason is Reason.PROTOCOL_MISMATCH


@pytest.mark.parametrize("field", ["instance", "attempt"])
def test_a_worker_without_an_instance_or_attempt_is_malformed(field: str) -> None:
    message = hello()
    message.ClearField(field)

    refused = refusal(message)

    assert refused.reason is Reason.MALFORMED
    assert str(refused) == "hello.instance and hello.attempt must not be 0"


def test_a_worker_of_another_run_is_told_which_run_is_here() -> None:
    message = hello()
    message.run_id = "20260101-000000-ffff"

    refused = refusal(message)

    assert refused.reason is Reason.WRONG_RUN
    assert str(refused) == (
        "this server keeps run 20270101-120000-abcd, not 20260101-000000-ffff; the run you took "
        "part in is not here"
    )


def test_a_run_id_is_shown_without_what_would_move_the_cursor() -> None:
    message = hello()
    message.run_id = "\x1b[2Jevil\n"

    assert "not [2Jevil;" in str(refusal(message))


def test_a_worker_comes_back_to_its_own_run_in_a_later_incarnation() -> None:
    message = hello()
    message.run_id = IDENTITY.run_id
    message.seen_incarnation = 3

    assert IDENTITY.check(message, incarnation=3) == []
    assert IDENTITY.check(message, incarnation=4) == []


def test_a_worker_that_saw_a_later_incarnation_refuses_a_restored_backup() -> None:
    message = hello()
    message.seen_incarnation = 4

    refused = refusal(message, incarnation=3)

    assert refused.reason is Reason.OLD_INCARNATION
    assert str(refused) == (
        "this server is incarnation 3 of its run, but incarnation 4 has been seen: it was restored "
        "from an older copy. Start it from the newest copy of the run directory"
    )


def test_a_reader_is_held_to_the_same_run_and_incarnation() -> None:
    IDENTITY.check_run("", 0, 1)
    IDENTITY.check_run(IDENTITY.run_id, 1, 1)
    for run_id, seen, reason in (
        ("another", 0, Reason.WRONG_RUN),
        (IDENTITY.run_id, 2, Reason.OLD_INCARNATION),
    ):
        with pytest.raises(Refused) as error:
            IDENTITY.check_run(run_id, seen, 1)
        assert error.value.reason is reason


def rename(theirs: pb.TaskIdentity) -> None:
    theirs.name = "cifar"


def widen(theirs: pb.TaskIdentity) -> None:
    theirs.options["width"] = "128"


def drop_options(theirs: pb.TaskIdentity) -> None:
    theirs.options.clear()


def lose_examples(theirs: pb.TaskIdentity) -> None:
    theirs.example_count = 4999


def halve_batches(theirs: pb.TaskIdentity) -> None:
    theirs.batch_size = 16


def reseed(theirs: pb.TaskIdentity) -> None:
    theirs.seed = 8


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (rename, "task: cifar in the worker, mnist in the server"),
        (widen, "options: width=128 in the worker, width=64 in the server"),
        (drop_options, "options: none in the worker, width=64 in the server"),
        (lose_examples, "examples: 4999 in the worker, 5000 in the server"),
        (halve_batches, "batch size: 16 in the worker, 32 in the server"),
        (reseed, "seed: 8 in the worker, 7 in the server"),
    ],
)
def test_a_worker_with_another_task_is_told_what_differs(
    change: Callable[[pb.TaskIdentity], None], text: str
) -> None:
    message = hello()
    change(message.task)

    refused = refusal(message)

    assert refused.reason is Reason.TASK_MISMATCH
    assert str(refused) == f"the worker's task is another than the server's: {text}"


def test_everything_that_differs_in_the_task_is_named_at_once() -> None:
    message = hello()
    rename(message.task)
    reseed(message.task)

    assert str(refusal(message)).endswith(
        ": task: cifar in the worker, mnist in the server; seed: 8 in the worker, 7 in the server"
    )


def test_the_order_in_which_options_were_given_makes_no_difference() -> None:
    identity = RunIdentity("run", task(), IDENTITY.layout, {})
    identity.task.options["depth"] = "2"
    message = hello()
    message.task.ClearField("options")
    for name, value in (("depth", "2"), ("width", "64")):
        message.task.options[name] = value

    assert identity.check(message, incarnation=1) == []


@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        (layout(w=(784, 32), b=(64,)), "w: here float32[784,32], there float32[784,64]"),
        (layout(w=(784, 64)), "b: here missing, there float32[64]"),
        (layout(w=(784, 64), b=(64,), c=()), "c: here float32[], there missing"),
        (
            Layout.of([("w", np.dtype(np.float16), (784, 64)), ("b", FLOAT32, (64,))]),
            "w: here float16[784,64], there float32[784,64]",
        ),
        (
            layout(b=(64,), w=(784, 64)),
            "the same tensors in another order: b here where w is there",
        ),
    ],
    ids=["shape", "missing", "extra", "dtype", "order"],
)
def test_a_worker_with_other_tensors_is_told_which(theirs: Layout, text: str) -> None:
    message = hello()
    message.layout.CopyFrom(theirs.to_proto())

    refused = refusal(message)

    assert refused.reason is Reason.LAYOUT_MISMATCH
    assert str(refused) == (
        "the worker's tensors differ from the server's (here: the worker, there: the server): "
        f"{text}"
    )


def test_a_layout_that_breaks_the_rules_is_malformed_and_says_where() -> None:
    message = hello()
    message.layout.tensors[1].offset = 1

    refused = refusal(message)

    assert refused.reason is Reason.MALFORMED
    assert re.match(r"hello\.layout: 'b' starts at byte 1; ", str(refused))


def test_a_worker_without_a_layout_is_malformed() -> None:
    message = hello()
    message.ClearField("layout")

    refused = refusal(message)

    assert refused.reason is Reason.MALFORMED
    assert str(refused).startswith("hello.layout: there is no tensor")


def test_other_versions_of_software_are_a_warning_each_and_no_refusal() -> None:
    message = hello()
    message.software.update({"python": "3.12.1", "jax": "0.9.0", "optax": "0.2.5"})

    assert IDENTITY.check(message, incarnation=1) == [
        "jax is 0.9.0 here, 0.10.2 on the server",
        "python is 3.12.1 here, 3.11.9 on the server",
    ]


def test_software_of_one_side_only_is_nothing_to_warn_of() -> None:
    message = hello()
    message.software.clear()
    message.software["torch"] = "2.5"

    assert IDENTITY.check(message, incarnation=1) == []
