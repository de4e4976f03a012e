"""How status looks to people: one screen, one line; the workers' table is in workers_table.py.

No I/O of its own. What fits is decided when it is drawn: the terminal's width,
height and encoding come with the drawing, and may change while one watches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from headwater.client import charts
from headwater.client.status import Status
from headwater.client.texts import plain
from headwater.client.workers_table import STATE_STYLES, WorkersTable, unbroken

_INDENT = 12
"""Cells of a row's name and the gap after it."""

_LEAST_BARS, _MOST_BARS = 16, 40
"""A histogram of many values that would have fewer bars gets a line of its own."""
_LEAST_TIME_BAR, _MOST_TIME_BAR = 10, 40

_MAY_GO = ("directory", "parameters", "optimizer", "durable")
"""Rows that make room for workers in `watch`, in this order."""


class _Drawn:
    """What depends on where it is drawn."""

    def __init__(self, draw: Callable[[Console, ConsoleOptions], RenderResult]) -> None:
        self._draw = draw

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return self._draw(console, options)


def status_screen(status: Status, without: Collection[str] = ()) -> RenderableType:
    """The run at a glance, less the rows named; each is one line where there is no terminal."""

    def draw(console: Console, options: ConsoleOptions) -> RenderResult:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True, min_width=_INDENT - 2)
        grid.add_column(overflow="fold")  # the end of a long path is what one looks for
        for name, value in _status_rows(status, options):
            if name not in without:
                text = Text(plain(value, options.encoding)) if isinstance(value, str) else value
                grid.add_row(name, text)
        yield from console.render(grid, unbroken(options))
        for problem in status["problems"]:
            yield Text(plain(f"! {problem}", options.encoding), style="red")

    return _Drawn(draw)


def watch_screen(status: Status) -> RenderableType:
    """The run and its workers, in no more lines than the terminal has."""

    def draw(console: Console, options: ConsoleOptions) -> RenderResult:
        workers = status["workers"]
        for count in range(len(_MAY_GO) + 1):
            screen = status_screen(status, _MAY_GO[:count])
            # Less a line between, the table's heading, and one for the cursor.
            room = options.max_height - len(console.render_lines(screen, options)) - 3
            if len(workers) <= room:
                break
        yield screen
        if not workers:
            return
        shown = workers if len(workers) <= room else workers[: max(1, room - 1)]
        yield ""
        yield WorkersTable(shown)
        if len(shown) < len(workers):
            yield Text(f"and {len(workers) - len(shown)} more: headwater workers", style="dim")

    return _Drawn(draw)


def workers_table(workers: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One row a worker."""
    return WorkersTable(workers)


def _status_rows(status: Status, options: ConsoleOptions) -> Iterable[tuple[str, str | Text]]:
    yield "run", f"{status['task']} {status['run_id']}, incarnation {status['incarnation']}"
    yield "state", Text(status["state"], style=STATE_STYLES.get(status["state"], ""))
    yield "version", f"{status['version']:,}"
    yield "durable", _durable(status)
    if status["example_count"] or status["batches_total"] or status["batches_applied"]:
        yield "epoch", epoch(status)
        yield "batches", _batches(status)
    if status["loss"] is not None:
        yield "training", metrics({"loss": status["loss"], **status["training_metrics"]})
    if status["metrics"]:
        figures = metrics(status["metrics"])
        yield "evaluation", f"{figures} (version {status['metrics_version']:,})"
    examples = f"{status['examples_per_second']:,.0f} examples/s"
    yield "speed", f"{status['updates_per_second']:,.1f} updates/s, {examples}"
    yield "staleness", _staleness(status["staleness"], options)
    if any(charts.seconds_of(status["times"])):
        yield "push time", _push_time(status["times"], options)
    refused = ", ".join(f"{count:,} {why}" for why, count in status["rejected"].items() if count)
    yield "rejected", refused or "none"
    yield "workers", workers_line(status["workers"])
    were_set = [f"{name}={value:g}" for name, value in status["optimizer_numbers"].items()]
    yield "optimizer", ", ".join([status["optimizer"], *were_set, _consistency(status)])
    yield (
        "parameters",
        f"{status['parameters']:,}; {size(status['bytes_in'])} in, {size(status['bytes_out'])} out",
    )
    yield "directory", status["run_dir"]


def _staleness(stale: Mapping[str, Any], options: ConsoleOptions) -> Text:
    figures = (
        f"mean {stale['mean']:.2f}, p50 {stale['p50']}, p99 {stale['p99']}, max {stale['max']}"
    )
    end, shown_end = charts.axis_end([stale])
    if not end:
        return Text(figures)  # a single bar says nothing
    room = options.max_width - _INDENT
    beside = _bar_room(end, room - len(figures) - 2)
    fits = beside >= min(end + 1, _LEAST_BARS)
    bar_room = beside if fits else _bar_room(end, room)
    values = charts.round_step(end, max(_LEAST_BARS, min(_MOST_BARS, bar_room)))
    bars = charts.histogram(stale["histogram"], end, values, ascii_only=options.ascii_only)
    each = f" ({values:,} a bar)" if values > 1 else ""
    return Text(f"{figures}{_gap(fits, options)}0 {bars} {shown_end}{each}")


def _bar_room(end: int, width: int) -> int:
    """Bars that fit between the ends of their axis, with what each stands for if not for one."""
    room = width - len(f"0  {end}+")
    return room if end < room else room - len(" (100 a bar)")


def _gap(fits: bool, options: ConsoleOptions) -> str:
    """Between figures and their chart, which goes below them where there is no room beside."""
    return "  " if fits or not options.is_terminal else "\n"


def _push_time(times: Mapping[str, float], options: ConsoleOptions) -> Text:
    legend = charts.time_legend(times, ascii_only=options.ascii_only)
    room = options.max_width - _INDENT
    left = room - legend.cell_len - 2
    fits = left >= _LEAST_TIME_BAR
    width = max(_LEAST_TIME_BAR, min(_MOST_TIME_BAR, left if fits else room))
    bar = charts.time_bar(times, width, ascii_only=options.ascii_only)
    return legend.append(_gap(fits, options)).append_text(bar)


def _consistency(status: Status) -> str:
    words = [status["consistency"]]
    if status.get("staleness_policy", "none") not in ("", "none"):
        words.append(f"staleness {status['staleness_policy']}")
    if status.get("local_steps", 1) > 1:
        inner = status["inner_optimizer"] or "the task's optimizer"
        words.append(f"{status['local_steps']} local steps of {inner}")
    if status.get("compression", "none") not in ("", "none"):
        words.append(f"gradients as {status['compression']}")
    if status.get("pull_dtype", "own") not in ("", "own"):
        words.append(f"weights as {status['pull_dtype']}")
    return ", ".join(words)


def _durable(status: Status) -> str:
    how = f"a snapshot every {status['snapshot_every']}"
    if status["durability"] == "log":
        how = "every update, before it is acknowledged"
    return f"{status['durable_version']:,} ({how})"


def _batches(status: Status) -> str:
    total = status["batches_total"]
    done = f"{status['batches_applied']:,} of {total:,}" if total else status["batches_applied"]
    skipped = f", {status['skipped']:,} left out" if status["skipped"] else ""
    return f"{done} applied{skipped}"


def epoch(status: Status) -> str:
    """The epoch in work, counted from 1 as people do: `3/10`."""
    return f"{min(status['epoch'] + 1, status['epochs'])}/{status['epochs']}"


def metrics(values: Mapping[str, float | None]) -> str:
    """Figures in one line: `loss 0.312  accuracy 0.913`; None, JSON's for no number, is nan."""
    return "  ".join(
        f"{name} {math.nan if value is None else value:.4g}" for name, value in values.items()
    )


def workers_line(workers: list[dict[str, Any]]) -> str:
    """How many are in which state: `2: 1 computing, 1 waiting`."""
    states: dict[str, int] = {}
    for worker in workers:
        states[worker["state"]] = states.get(worker["state"], 0) + 1
    each = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"{len(workers)}: {each}" if workers else "none"


def settings_table(settings: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `headwater set` can change."""
    grid = Table.grid(padding=(0, 2))
    for style in ("", "bold", "dim"):
        grid.add_column(style=style)
    for name, setting in settings.items():
        notes = ["set"] if setting["is_set"] else []
        notes += [
            f"{p['value']} from version {p['after_version']:,} on"
            + (" at the earliest (queued: not written down yet)" if p["queued"] else "")
            for p in setting["planned"]
        ]
        if setting["compiles"]:
            notes.append("to change it compiles the update anew")
        grid.add_row(*map(Text, (name, setting["value"], "; ".join(notes))))
    return grid


def one_line(status: Status) -> str:
    """The run in a line, for logs and pipes."""
    figures = {} if status["loss"] is None else {"loss": status["loss"]}
    figures |= status["training_metrics"]
    return (
        f"{status['state']}  epoch {epoch(status)}  version {status['version']:,}  "
        f"{metrics(figures)}{'  ' if figures else ''}"
        f"{status['examples_per_second']:,.0f} examples/s  "
        f"staleness {status['staleness']['mean']:.2f}  workers {len(status['workers'])}"
    )


def size(count: float) -> str:
    """Bytes for people: `40.0 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95 or (unit == "B" and count < 1000):
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
