"""How status looks to people, line by line."""

from __future__ import annotations

import io
import textwrap
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from headwater.client import show
from headwater.client.status import as_dict
from headwater.protos import parameter_server_pb2 as pb

COUNTS = {0: 30, 1: 60, 2: 9, 3: 1}
TIMES = pb.Times(wait_s=0.0012, load_s=0.0001, compute_s=0.0123, wire_s=0.0045)


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
        "staleness": pb.Staleness(mean=0.905, p50=1, p99=2, max=3, histogram=COUNTS),
        "times": TIMES,
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
        "staleness": pb.Staleness(mean=0.904, p50=1, p99=2, max=3, histogram=COUNTS),
        "times": TIMES,
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


class Ascii(io.StringIO):
    """A terminal that has no more than ASCII."""

    encoding = "ascii"


def lines(what: RenderableType, file: io.StringIO | None = None, **options: Any) -> list[str]:
    """What a terminal of 80 columns shows, without the spaces at the ends of lines."""
    file = file or io.StringIO()
    defaults = {"width": 80, "height": 40, "force_terminal": True, "color_system": None}
    Console(file=file, **defaults | options).print(what, soft_wrap=True)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def screen(message: pb.StatusReply, **options: Any) -> list[str]:
    return lines(show.status_screen(as_dict(message)), **options)


def table(message: pb.StatusReply, **options: Any) -> list[str]:
    return lines(show.workers_table(as_dict(message)["workers"]), **options)


def wide(top: int = 300) -> pb.Staleness:
    """As many updates of each staleness."""
    counts = dict.fromkeys(range(top + 1), 7)
    return pb.Staleness(mean=top / 2, p50=top // 2, p99=top - 3, max=top, histogram=counts)


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
        staleness   mean 0.90, p50 1, p99 2, max 3  0 ▄▇▂▁ 3
        push time   ░ wait 1.2  ▒ load 0.1  █ compute 12.3  ▓ wire 4.5 ms  ░█████████▓▓▓
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

    shown = lines(screen, color_system="standard", no_color=False)

    assert f"\x1b[{code}m" in shown[1]
    assert "\x1b" not in "".join(lines(screen))


def test_staleness_that_is_always_0_has_no_bars() -> None:
    stale = pb.Staleness(histogram={0: 1000})
    assert row(reply(staleness=stale), "staleness") == "mean 0.00, p50 0, p99 0, max 0"


def test_a_wide_range_of_staleness_has_its_bars_on_a_line_of_their_own() -> None:
    shown = screen(reply(staleness=wide()))

    at = shown.index("staleness   mean 150.00, p50 150, p99 297, max 300")
    assert shown[at + 1] == "            0 ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇ 298+ (10 a bar)"
    assert shown[at + 2].startswith("push time")


def test_a_wide_terminal_shows_more_bars_beside_their_figures() -> None:
    shown = screen(reply(staleness=wide(30)), width=120)
    assert f"staleness   mean 15.00, p50 15, p99 27, max 30  0 {'▃' * 28}▇ 28+" in shown


def test_what_is_beyond_the_99th_percentile_shares_one_bar() -> None:
    counts = {0: 500, 1: 490, 2: 6, 5000: 4}
    stale = pb.Staleness(mean=20.5, p50=0, p99=1, max=5000, histogram=counts)
    assert row(reply(staleness=stale), "staleness") == (
        "mean 20.50, p50 0, p99 1, max 5000  0 ▇▇▁ 2+"
    )


def test_long_times_are_in_seconds() -> None:
    times = pb.Times(wait_s=65.23, load_s=0.04, compute_s=1234.5, wire_s=2)
    assert row(reply(times=times), "push time") == (
        "░ wait 65.2  ▒ load 0.0  █ compute 1,234  ▓ wire 2.0 s  ░███████████"
    )


def test_a_narrow_terminal_has_the_bar_of_times_below_its_legend() -> None:
    shown = screen(reply(), width=66)

    at = shown.index("push time   ░ wait 1.2  ▒ load 0.1  █ compute 12.3  ▓ wire 4.5 ms")
    assert shown[at + 1] == f"            {'░' * 3}{'█' * 27}{'▓' * 10}"


def test_the_consistency_is_told_where_it_is_not_the_default() -> None:
    def told(**fields: Any) -> str:
        return row(reply(optimizer="sgd(0.7)", consistency="async", **fields), "optimizer")

    assert told(staleness_policy="none", local_steps=1) == "sgd(0.7), async"
    assert told(staleness_policy="drop:4") == "sgd(0.7), async, staleness drop:4"
    assert told(local_steps=8) == "sgd(0.7), async, 8 local steps of the task's optimizer"
    assert (
        told(optimizer_numbers={"learning_rate": 3e-4}) == "sgd(0.7), learning_rate=0.0003, async"
    )
    assert told(local_steps=8, inner_optimizer="adam(1)").endswith("8 local steps of adam(1)")
    assert told(compression="none", pull_dtype="own") == "sgd(0.7), async"
    assert (
        told(compression="topk:0.01", pull_dtype="bfloat16")
        == "sgd(0.7), async, gradients as topk:0.01, weights as bfloat16"
    )


def test_where_the_encoding_has_no_blocks_the_charts_are_ascii() -> None:
    message = reply(staleness=wide(12), workers=[worker(name="zoë", staleness=wide(12))])
    watched = lines(show.watch_screen(as_dict(message)), Ascii())

    assert "  0 ----------# 10+" in "".join(watched)
    assert "push time   . wait 1.2  - load 0.1  # compute 12.3  = wire 4.5 ms  " in watched[10]
    assert watched[10].endswith("  .#########===")
    assert watched[-1].split()[1] == "zo?"
    assert "".join(watched).isascii()


def test_no_peer_steers_the_terminal() -> None:
    evil = "\x1b[2J\x9b31m\u202ename\n"
    names = reply(
        workers=[worker(name=evil, host=evil)], run_dir=evil, problems=[evil], optimizer=evil
    )
    watched = lines(show.watch_screen(as_dict(names)), width=200)

    assert all(line.isprintable() for line in watched)
    assert "?[2J?31m?name" in watched[-1]


def test_where_there_is_no_terminal_every_row_is_one_line() -> None:
    path = "runs/" + "deep/" * 40
    message = reply(run_dir=path, staleness=wide(), optimizer="chain(" + "sgd(0.1), " * 20 + ")")
    shown = screen(message, force_terminal=False)

    assert [line.split()[0] for line in shown] == [line.split()[0] for line in screen(reply())]
    assert shown[-1] == f"directory   {path}"
    assert "298+" in shown[9]


def test_on_a_terminal_a_long_path_is_shown_whole() -> None:
    path = "/home/" + "deep/" * 40 + "end"
    shown = screen(reply(run_dir=path))
    assert "".join(line[12:] for line in shown[-4:]) == path


def test_workers_are_a_table_one_row_each() -> None:
    fast = pb.Times(compute_s=0.5)
    idle = pb.Staleness(histogram={0: 7})
    workers = [
        worker(),
        worker(
            id=12, name="worker-12", platform="gpu", devices=8, state="waiting", gradients=7,
            examples_per_second=0, staleness_mean=0, staleness=idle, times=fast,
        ),
        worker(
            id=13, name="new", state="compiling", gradients=0, examples_per_second=0,
            staleness_mean=0, staleness=None, times=None,
        ),
    ]  # fmt: skip

    assert table(reply(workers=workers)) == [
        "ID  NAME       STATE      GRADIENTS  EXAMPLES/S  STALENESS 0-3  PUSH TIME",
        "1   w1         computing     12,345       1,234  0.91 ▄▇▂▁      ████▓▓ 18.1 ms",
        "12  worker-12  waiting            7           0  0.00 ▇         ██████  500 ms",
        "13  new        compiling          0           0     -           -",
    ]


def test_a_wider_terminal_has_more_of_the_workers() -> None:
    def headings(width: int, **options: Any) -> list[str]:
        heading, _ = table(reply(workers=[worker(name="worker-1")]), width=width, **options)
        return heading.replace(" 0-3", "").replace("PUSH TIME", "TIME").split()

    usual = ["ID", "NAME", "STATE", "GRADIENTS", "EXAMPLES/S", "STALENESS", "TIME"]
    times = ["WAIT", "LOAD", "COMPUTE", "WIRE"]
    all_there_are = [
        *("ID", "NAME", "HOST", "PLATFORM", "STATE", "GRADIENTS", "EXAMPLES/S"),
        *("STALENESS", "P50", "P99", "MAX", "TIME", *times),
    ]
    assert headings(80) == usual
    assert headings(120) == ["ID", "NAME", "HOST", *usual[2:], *times]
    assert headings(160) == all_there_are
    assert headings(80, force_terminal=False) == all_there_are
    assert headings(40) == ["ID", "NAME", "STATE", "STALENESS"]


@pytest.mark.parametrize("width", [30, 48, 60, 66, 80, 100, 120, 140])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_no_row_of_the_workers_is_broken_in_two(count: int, width: int) -> None:
    workers = [
        worker(id=n, name=f"the long name 東京 of worker {n}", staleness=wide())
        for n in range(1, count + 1)
    ]
    shown = table(reply(workers=workers), width=width)

    assert len(shown) == 1 + count
    assert all(cell_len(line) <= width for line in shown)


def test_a_name_is_cropped_where_it_would_cost_figures() -> None:
    (_, shown) = table(reply(workers=[worker(name="a-name-of-many-characters")]))
    assert shown.startswith("1   a-name-of-…  computing")


@pytest.mark.parametrize(("rows", "shown_count"), [(40, 12), (31, 12), (24, 8), (20, 4)])
def test_watch_never_fills_more_than_the_terminal(rows: int, shown_count: int) -> None:
    message = reply(workers=[worker(id=n, name=f"w{n}") for n in range(1, 13)])
    watched = lines(show.watch_screen(as_dict(message)), height=rows)

    assert len(watched) < rows
    heading = next(n for n, line in enumerate(watched) if line.startswith("ID"))
    below = watched[heading + 1 :]
    assert [line.split()[1] for line in below[:shown_count]] == [
        f"w{n}" for n in range(1, shown_count + 1)
    ]
    more = [f"and {12 - shown_count} more: headwater workers"] if shown_count < 12 else []
    assert below[shown_count:] == more
    assert ("directory" in "".join(watched)) == (rows > 30)


def test_watch_without_workers_is_the_status() -> None:
    assert lines(show.watch_screen(as_dict(fresh()))) == screen(fresh())


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


def test_a_metric_that_is_no_number_is_nan() -> None:
    nan = float("nan")
    assert show.metrics({"loss": nan, "accuracy": None}) == "loss nan  accuracy nan"
    found = reply(loss=nan, metrics={"loss": nan}, training_metrics={"accuracy": nan})
    assert row(found, "training") == "loss nan  accuracy nan"
    assert row(found, "evaluation") == "loss nan (version 13,000)"
    assert "  loss nan  accuracy nan  " in show.one_line(as_dict(found))


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
    (_, shown) = table(reply(workers=[worker(name=name)]))
    assert name in shown


def test_just_under_a_unit_is_one_of_the_next() -> None:
    assert show.size(999_999) == "1.0 MB"


def test_what_is_set_and_not_in_force_yet_is_shown_as_queued() -> None:
    planned = [
        {"after_version": 1200, "value": "0.5", "queued": True},
        {"after_version": 3000, "value": "0.25", "queued": False},
    ]
    setting = {"value": "1.0", "is_set": False, "compiles": False, "planned": planned}
    (line,) = lines(show.settings_table({"learning_rate": setting}), width=200)
    assert line == (
        "learning_rate  1.0  0.5 from version 1,200 on at the earliest (queued: not written down "
        "yet); 0.25 from version 3,000 on"
    )
