"""How status looks to people, line by line."""

from __future__ import annotations

import io
import textwrap
from typing import Any

import pytest
from rich.console import Console, RenderableType

from headwater.client import show
from headwater.client.status import as_dict
from headwater.protos import parameter_server_pb2 as pb


def worker(**fields: Any) -> pb.WorkerStatus:
    defaults = {
        "id": 1,
        "name": "w1",
        "host": "nova",
        "platform": "cpu",
        "devices": 1,
        "state": "computing",
        "gradients": 12345,
        "examples_per_second": 1234.5,
        "staleness_mean": 0.905,
        "pid": 77,
        "compute_s": 0.0123,
    }
    return pb.WorkerStatus(**defaults | fields)


def reply(**fields: Any) -> pb.StatusReply:
    defaults = {
        "stamp": pb.Stamp(incarnation=2, version=14070, durable_version=14000),
        "run_id": "20270101-120000-abcd",
        "task": "mnist",
        "state": pb.RUN_TRAINING,
        "epoch": 2,
        "epochs": 10,
        "batches_applied": 14070,
        "batches_total": 20000,
        "loss": 0.31249,
        "metrics": {"loss": 0.25, "accuracy": 0.961},
        "metrics_version": 13000,
        "training_metrics": {"accuracy": 0.9131},
        "updates_per_second": 1240.26,
        "examples_per_second": 39688.4,
        "staleness": pb.Staleness(mean=0.904, p50=1, p99=2, max=3),
        "rejected": pb.Rejected(stale=1, lease_lost=2000),
        "parameters": 50890,
        "bytes_in": 2_865_000_000,
        "bytes_out": 203_560,
        "workers": [worker(), worker(id=2, name="w2", state="waiting"), worker(id=3, name="w3")],
        "run_dir": "runs/mnist-1",
        "consistency": "bounded:3",
        "optimizer": "adam(1e-3)",
        "durability": "snapshot",
        "snapshot_every": "30 s",
    }
    return pb.StatusReply(**defaults | fields)


def fresh() -> pb.StatusReply:
    """A server that waits for its first worker."""
    return pb.StatusReply(
        stamp=pb.Stamp(incarnation=1),
        run_id="20270101-120000-abcd",
        task="mnist",
        state=pb.RUN_WAITING,
        epochs=10,
        batches_total=20000,
        parameters=50890,
        run_dir="runs/mnist-1",
        consistency="async",
        optimizer="adam(1e-3)",
        durability="log",
        snapshot_every="500 updates",
    )


def lines(what: RenderableType, **options: Any) -> list[str]:
    """What a terminal of 80 columns shows, without the spaces at the ends of lines."""
    file = io.StringIO()
    Console(width=80, file=file, **options).print(what)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def screen(message: pb.StatusReply) -> list[str]:
    return lines(show.status_screen(as_dict(message)))


def row(message: pb.StatusReply, name: str) -> str:
    (found,) = [line for line in screen(message) if line.startswith(name)]
    return found.removeprefix(name).strip()


def test_a_run_in_training_fills_one_screen() -> None:
    assert screen(reply()) == textwrap.dedent(
        """\
        run         mnist 20270101-120000-abcd, incarnation 2
        state       training
        version     14,070
        durable     14,000 (a snapshot every 30 s)
        epoch       3/10
        batches     14,070 of 20,000 applied
        training    loss 0.3125  accuracy 0.9131
        evaluation  accuracy 0.961  loss 0.25 (version 13,000)
        speed       1,240.3 updates/s, 39,688 examples/s
        staleness   mean 0.90, p50 1, p99 2, max 3
        rejected    1 stale, 2,000 lease_lost
        workers     3: 2 computing, 1 waiting
        optimizer   adam(1e-3), bounded:3
        parameters  50,890; 2.9 GB in, 203.6 kB out
        directory   runs/mnist-1"""
    ).split("\n")


def test_a_server_that_waits_for_its_first_worker_leaves_out_what_is_not_known() -> None:
    assert screen(fresh()) == textwrap.dedent(
        """\
        run         mnist 20270101-120000-abcd, incarnation 1
        state       waiting
        version     0
        durable     0 (every update, before it is acknowledged)
        epoch       1/10
        batches     0 of 20,000 applied
        speed       0.0 updates/s, 0 examples/s
        staleness   mean 0.00, p50 0, p99 0, max 0
        rejected    none
        workers     none
        optimizer   adam(1e-3), async
        parameters  50,890; 0 B in, 0 B out
        directory   runs/mnist-1"""
    ).split("\n")


def test_problems_stand_below_the_screen_one_a_line() -> None:
    message = reply(problems=["worker w2 pushed NaN 3 times", "the disk [full] is slow"])

    assert screen(message)[-2:] == [
        "! worker w2 pushed NaN 3 times",
        "! the disk [full] is slow",
    ]


def test_a_finished_run_is_in_its_last_epoch() -> None:
    assert row(reply(epoch=10, state=pb.RUN_FINISHED), "epoch") == "10/10"
    assert row(reply(epoch=9), "epoch") == "10/10"


def test_batches_left_out_are_counted_and_a_total_may_be_unknown() -> None:
    assert row(reply(skipped=1200), "batches") == "14,070 of 20,000 applied, 1,200 left out"
    unknown = reply(batches_applied=7)
    unknown.ClearField("batches_total")
    assert row(unknown, "batches") == "7 applied"


def test_a_loss_of_zero_is_shown() -> None:
    assert row(reply(loss=0.0, training_metrics={}), "training") == "loss 0"


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (pb.RUN_TRAINING, "32"),
        (pb.RUN_FINISHED, "32"),
        (pb.RUN_WAITING, "33"),
        (pb.RUN_PAUSED, "33"),
        (pb.RUN_STOPPING, "33"),
        (pb.RUN_FAILED, "31"),
    ],
)
def test_on_a_terminal_the_state_has_a_colour(state: Any, code: str) -> None:
    screen = show.status_screen(as_dict(reply(state=state)))

    shown = lines(screen, force_terminal=True, color_system="standard", no_color=False)

    assert f"\x1b[{code}m" in shown[1]
    assert "\x1b" not in "".join(lines(screen))


def test_workers_are_a_table_one_row_each() -> None:
    workers = [
        worker(),
        worker(
            id=12,
            name="big",
            platform="gpu",
            devices=8,
            state="waiting",
            gradients=7,
            examples_per_second=0,
            staleness_mean=0,
            compute_s=0.5,
        ),
    ]

    assert lines(show.workers_table(as_dict(reply(workers=workers))["workers"])) == [
        "ID  NAME  HOST  PLATFORM  STATE      GRADIENTS  EXAMPLES/S  STALENESS   COMPUTE",
        "1   w1    nova  cpu x1    computing     12,345       1,234       0.91   12.3 ms",
        "12  big   nova  gpu x8    waiting            7           0       0.00  500.0 ms",
    ]


def test_a_run_is_one_line_in_a_log() -> None:
    assert show.one_line(as_dict(reply())) == (
        "training  epoch 3/10  version 14,070  loss 0.3125  accuracy 0.9131  39,688 examples/s  "
        "staleness 0.90  workers 3"
    )
    assert show.one_line(as_dict(fresh())) == (
        "waiting  epoch 1/10  version 0  0 examples/s  staleness 0.00  workers 0"
    )


def test_workers_are_counted_by_state() -> None:
    def line(*states: str) -> str:
        return show.workers_line([{"state": state} for state in states])

    assert line() == "none"
    assert line("waiting") == "1: 1 waiting"
    assert line("waiting", "computing", "waiting") == "3: 1 computing, 2 waiting"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, ""),
        ({"loss": 0.31249, "accuracy": 1.0}, "loss 0.3125  accuracy 1"),
        ({"loss": 12345.6}, "loss 1.235e+04"),
        ({"loss": float("nan"), "perplexity": float("inf")}, "loss nan  perplexity inf"),
    ],
)
def test_metrics_are_shown_to_four_figures(values: dict[str, float], text: str) -> None:
    assert show.metrics(values) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (203_560, "203.6 kB"),
        (40_000_000, "40.0 MB"),
        (2_865_000_000, "2.9 GB"),
        (5 * 10**12, "5.0 TB"),
        (5 * 10**16, "50000.0 TB"),
    ],
)
def test_bytes_are_shown_in_units_of_a_thousand(count: int, text: str) -> None:
    assert show.size(count) == text


MARKUP = "client/show.py hands texts to rich as markup: escape them, or make them Text"


def test_an_optimizer_with_lists_is_shown_as_it_was_written() -> None:
    spec = "sgd(join_schedules([constant_schedule(0.1)], [2]))"
    assert row(reply(optimizer=spec), "optimizer") == f"{spec}, bounded:3"


@pytest.mark.parametrize("name", ["a[/b]c", "a[red]c"])
def test_a_name_with_brackets_is_shown_as_it_is(name: str) -> None:
    assert row(reply(run_dir=f"runs/{name}"), "directory") == f"runs/{name}"
    (_, shown) = lines(show.workers_table(as_dict(reply(workers=[worker(name=name)]))["workers"]))
    assert name in shown


def test_just_under_a_unit_is_one_of_the_next() -> None:
    assert show.size(999_999) == "1.0 MB"
