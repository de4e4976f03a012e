"""How status looks to people: one screen, one table, one line. No I/O of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headwater.client.status import Status

_STATE_STYLES = {
    "training": "green",
    "finished": "green",
    "waiting": "yellow",
    "paused": "yellow",
    "stopping": "yellow",
    "failed": "red",
    "hung": "red",
    "quarantined": "red",
}


def status_screen(status: Status) -> RenderableType:
    """The run at a glance."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    for name, value in _status_rows(status):
        grid.add_row(name, Text(value) if isinstance(value, str) else value)
    problems = [Text(f"! {problem}", style="red") for problem in status["problems"]]
    return Group(grid, *problems)


def _status_rows(status: Status) -> Iterable[tuple[str, RenderableType]]:
    state = Text(status["state"], style=_STATE_STYLES.get(status["state"], ""))
    yield "run", f"{status['task']} {status['run_id']}, incarnation {status['incarnation']}"
    yield "state", state
    yield "version", f"{status['version']:,}"
    yield "durable", _durable(status)
    yield "epoch", epoch(status)
    yield "batches", _batches(status)
    if status["loss"] is not None:
        yield "training", metrics({"loss": status["loss"], **status["training_metrics"]})
    if status["metrics"]:
        figures = metrics(status["metrics"])
        yield "evaluation", f"{figures} (version {status['metrics_version']:,})"
    examples = f"{status['examples_per_second']:,.0f} examples/s"
    yield "speed", f"{status['updates_per_second']:,.1f} updates/s, {examples}"
    stale = status["staleness"]
    yield (
        "staleness",
        f"mean {stale['mean']:.2f}, p50 {stale['p50']}, p99 {stale['p99']}, max {stale['max']}",
    )
    refused = ", ".join(f"{count:,} {why}" for why, count in status["rejected"].items() if count)
    yield "rejected", refused or "none"
    yield "workers", workers_line(status["workers"])
    yield "optimizer", f"{status['optimizer']}, {_consistency(status)}"
    yield (
        "parameters",
        f"{status['parameters']:,}; {size(status['bytes_in'])} in, {size(status['bytes_out'])} out",
    )
    yield "directory", status["run_dir"]


def _consistency(status: Status) -> str:
    words = [status["consistency"]]
    if status.get("staleness_policy", "none") not in ("", "none"):
        words.append(f"staleness {status['staleness_policy']}")
    if status.get("local_steps", 1) > 1:
        inner = status["inner_optimizer"] or "the task's optimizer"
        words.append(f"{status['local_steps']} local steps of {inner}")
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


def metrics(values: Mapping[str, float]) -> str:
    """Figures in one line: `loss 0.312  accuracy 0.913`."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def workers_line(workers: list[dict[str, Any]]) -> str:
    """How many are in which state: `2: 1 computing, 1 waiting`."""
    states: dict[str, int] = {}
    for worker in workers:
        states[worker["state"]] = states.get(worker["state"], 0) + 1
    each = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"{len(workers)}: {each}" if workers else "none"


def workers_table(workers: list[dict[str, Any]]) -> Table:
    """One row a worker."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("ID", "NAME", "HOST", "PLATFORM", "STATE"):
        table.add_column(heading)
    for heading in ("GRADIENTS", "EXAMPLES/S", "STALENESS", "COMPUTE"):
        table.add_column(heading, justify="right")
    for worker in workers:
        table.add_row(
            str(worker["id"]),
            Text(worker["name"]),  # as they are: a peer's text is no markup
            Text(worker["host"]),
            Text(f"{worker['platform']} x{worker['devices']}"),
            Text(worker["state"], style=_STATE_STYLES.get(worker["state"], "")),
            f"{worker['gradients']:,}",
            f"{worker['examples_per_second']:,.0f}",
            f"{worker['staleness_mean']:.2f}",
            f"{worker['compute_s'] * 1000:,.1f} ms",
        )
    return table


def settings_table(settings: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `headwater set` can change."""
    grid = Table.grid(padding=(0, 2))
    for style in ("", "bold", "dim"):
        grid.add_column(style=style)
    for name, setting in settings.items():
        notes = ["set"] if setting["is_set"] else []
        notes += [
            f"{p['value']} from version {p['after_version']:,} on" for p in setting["planned"]
        ]
        if setting["compiles"]:
            notes.append("to change it compiles the update anew")
        grid.add_row(name, setting["value"], "; ".join(notes))
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
