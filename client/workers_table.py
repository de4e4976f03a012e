"""One row a worker, with as many columns as the terminal has room for.

So that no row is broken in two: first the less important columns go, then the
ends of long names. Where there is no terminal all is shown, whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from headwater.client import charts
from headwater.client.texts import cropped, duration, plain

STATE_STYLES = {
    "training": "green",
    "finished": "green",
    "waiting": "yellow",
    "paused": "yellow",
    "stopping": "yellow",
    "failed": "red",
    "hung": "red",
    "quarantined": "red",
}

_ALWAYS = ("ID", "NAME", "STATE")
_IF_IT_FITS = (
    ("STALENESS",),
    ("PUSH TIME",),
    ("GRADIENTS",),
    ("EXAMPLES/S",),
    ("WAIT", "LOAD", "COMPUTE", "WIRE"),
    ("HOST",),
    ("P50", "P99", "MAX"),
    ("PLATFORM",),
)
"""The most important first; the columns of a group come together or not at all."""

_UNBROKEN = 10_000
"""Columns of a line that nothing wraps."""
_GAP = 2
_NAME_WIDTH = 8
"""Of names that columns are left out for; the rest of a longer one takes what room is left."""
_STATE_WIDTH = 9
"""Of the usual states: the columns stay where they are when the state changes."""
_BAR_WIDTH, _TIME_WIDTH = 6, 7
_LEAST_BARS = 4

Worker = Mapping[str, Any]
"""As `client.status()["workers"]` has it."""


def unbroken(options: ConsoleOptions) -> ConsoleOptions:
    """Where there is no terminal, lines as long as they are: for `grep`, and for files."""
    return options if options.is_terminal else options.update(width=_UNBROKEN)


@dataclasses.dataclass(frozen=True)
class _Column:
    heading: str
    cells: Sequence[Text]
    justify: Literal["left", "right"] = "right"
    least: int = 0

    @property
    def width(self) -> int:
        return max(self.least, cell_len(self.heading), *(cell.cell_len for cell in self.cells))


class WorkersTable:
    """Drawn by rich, into whatever width it is given."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self._workers:
            return
        options = unbroken(options)
        columns = _fitting(_columns(self._workers, options), options)
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, _GAP, 0, 0))
        for column in columns:
            table.add_column(
                column.heading,
                justify=column.justify,
                no_wrap=True,
                overflow="crop",
                min_width=column.least,
            )
        for row in zip(*(column.cells for column in columns), strict=True):
            table.add_row(*row)
        yield from console.render(table, options)


def _columns(workers: Sequence[Worker], options: ConsoleOptions) -> dict[str, _Column]:
    """All there are, in the order they are shown."""

    def texts(text: Callable[[Worker], str]) -> list[Text]:
        return [Text(plain(text(worker), options.encoding)) for worker in workers]

    def of_pushes(text: Callable[[Worker], str]) -> list[Text]:
        return [Text(text(worker) if worker["gradients"] else "-") for worker in workers]

    columns = [
        _Column("ID", texts(lambda w: str(w["id"])), "left"),
        _Column("NAME", texts(lambda w: w["name"]), "left"),
        _Column("HOST", texts(lambda w: w["host"]), "left"),
        _Column("PLATFORM", texts(_platform), "left"),
        _Column("STATE", [_state(w, options.encoding) for w in workers], "left", _STATE_WIDTH),
        _Column("GRADIENTS", texts(lambda w: f"{w['gradients']:,}")),
        _Column("EXAMPLES/S", texts(lambda w: f"{w['examples_per_second']:,.0f}")),
        _staleness(workers, options.ascii_only),
        _Column("P50", of_pushes(lambda w: f"{w['staleness']['p50']:,}")),
        _Column("P99", of_pushes(lambda w: f"{w['staleness']['p99']:,}")),
        _Column("MAX", of_pushes(lambda w: f"{w['staleness']['max']:,}")),
        _Column("PUSH TIME", [_push_time(w, options.ascii_only) for w in workers], "left"),
        _Column("WAIT", of_pushes(lambda w: duration(w["times"]["wait_s"]))),
        _Column("LOAD", of_pushes(lambda w: duration(w["times"]["load_s"]))),
        _Column("COMPUTE", of_pushes(lambda w: duration(w["times"]["compute_s"]))),
        _Column("WIRE", of_pushes(lambda w: duration(w["times"]["wire_s"]))),
    ]
    return {column.heading.partition(" 0-")[0]: column for column in columns}


def _platform(worker: Worker) -> str:
    # A program without tickets does not say what it computes on.
    return f"{worker['platform']} x{worker['devices']}" if worker["platform"] else "-"


def _state(worker: Worker, encoding: str) -> Text:
    return Text(plain(worker["state"], encoding), style=STATE_STYLES.get(worker["state"], ""))


def _staleness(workers: Sequence[Worker], ascii_only: bool) -> _Column:
    """The mean, and a histogram on an axis that all workers share: the heading has its ends."""
    end, shown_end = charts.axis_end([worker["staleness"] for worker in workers])
    heading = f"STALENESS 0-{shown_end}" if end else "STALENESS"
    means = [f"{w['staleness_mean']:.2f}" if w["gradients"] else "-" for w in workers]
    room = max(map(len, means))
    values = math.ceil((end + 1) / max(_LEAST_BARS, len(heading) - room - 1))
    cells = []
    for worker, mean in zip(workers, means, strict=True):
        counts = worker["staleness"]["histogram"] if end else {}
        bars = charts.histogram(counts, end, values, ascii_only=ascii_only)
        cells.append(Text(f"{mean:>{room}} {bars}".rstrip()))
    return _Column(heading, cells, "left")


def _push_time(worker: Worker, ascii_only: bool) -> Text:
    total = sum(charts.seconds_of(worker["times"]))
    if not total:
        return Text("-")
    bar = charts.time_bar(worker["times"], _BAR_WIDTH, ascii_only=ascii_only)
    return bar.append(f" {duration(total):>{_TIME_WIDTH}}")


def _fitting(columns: dict[str, _Column], options: ConsoleOptions) -> list[_Column]:
    """Those that there is room for, with their names cropped to what room there is."""
    name = columns["NAME"]
    least = min(name.width, _NAME_WIDTH)

    def width(chosen: Collection[str]) -> int:
        """Without the name."""
        return sum(columns[c].width + _GAP for c in chosen if c != "NAME")

    chosen = set(_ALWAYS)
    for group in _IF_IT_FITS:
        if width(chosen.union(group)) + least <= options.max_width:
            chosen.update(group)
    room = max(least, options.max_width - width(chosen))
    columns["NAME"] = dataclasses.replace(
        name,
        cells=[
            Text(cropped(cell.plain, room, ascii_only=options.ascii_only)) for cell in name.cells
        ],
    )
    return [column for heading, column in columns.items() if heading in chosen]
