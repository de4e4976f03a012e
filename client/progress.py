"""Shows a training while it goes on: a live bar where that can be, else a line now and then."""

from __future__ import annotations

import importlib.util
import logging
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from headwater.client import show
from headwater.client.status import Status

log = logging.getLogger("headwater.client")

LINE_S = 10.0
"""Between lines where there is no terminal; a new epoch gets one at once."""


class Screen(Console):
    """Falls silent when nobody reads any more, rather than end the training that it shows."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Display:
    """Use as a context; `show` as often as there is something new.

    Args:
      console: By default standard output.
      live: Redraw a bar where that can be done.
    """

    def __init__(self, console: Console | None = None, *, live: bool = True) -> None:
        console = console or Screen()
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            expand=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._live = (
            Live(console=console, refresh_per_second=8, transient=True)
            if live and can_redraw(console)
            else None
        )
        self._said_epoch = -1
        self._said_time = 0.0

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        try:
            self._console.print(Text(text), soft_wrap=True)
        except OSError as error:
            self._console.quiet = True
            log.warning("progress cannot be shown any more: %s", error.strerror)

    def wait_for(self, what: str) -> None:
        """Say what is being waited for, before there is a status."""
        if self._live:
            self._bar.update(self._task, description=what)
            self._live.update(self._bar)
        else:
            self.say(what)

    def show(self, status: Status) -> None:
        """The run as it stands."""
        if self._live:
            total = status["batches_total"]
            self._bar.update(
                self._task,
                description=f"epoch {show.epoch(status)}",
                total=total,
                completed=status["batches_applied"] + status["skipped"],
            )
            lines = [Text(line, no_wrap=True) for line in _figures(status)]
            self._live.update(Group(self._bar, *lines))
            return
        now = time.monotonic()
        if status["version"] and (
            status["epoch"] != self._said_epoch or now - self._said_time > LINE_S
        ):
            self._said_epoch, self._said_time = status["epoch"], now
            self.say(show.one_line(status))


def can_redraw(console: Console) -> bool:
    """Whether what was shown can be replaced: on a terminal, or by a notebook's widgets."""
    if console.quiet:
        return False
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


def _figures(status: Status) -> list[str]:
    """Lines below the bar, each short enough for a terminal of 80 columns."""
    if status["loss"] is None:
        return [f"workers {show.workers_line(status['workers'])}"]
    training = [
        f"version {status['version']:,}",
        show.metrics({"loss": status["loss"], **status["training_metrics"]}),
        f"{status['examples_per_second']:,.0f} examples/s",
        f"staleness {status['staleness']['mean']:.2f}",
    ]
    evaluated = show.metrics(status["metrics"])
    return ["  ".join(training), *([f"evaluated  {evaluated}"] if evaluated else [])]
