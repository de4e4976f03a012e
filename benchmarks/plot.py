"""Draws what `make bench` measured. Needs matplotlib, of the extra `bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import matplotlib.pyplot as plt

from benchmarks import capacity, limits, transfer
from benchmarks.figures import Figures

matplotlib.use("Agg")

X = TypeVar("X")


def draw(figures: Figures, folder: Path) -> None:
    """capacity.png and transfer.png, whichever was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(figure.part == "capacity" for figure in figures.all.values()):
        draw_capacity(figures, folder / "capacity.png")
    if any(figure.part == "transfer" for figure in figures.all.values()):
        draw_transfer(figures, folder / "transfer.png")


def draw_capacity(figures: Figures, path: Path) -> None:
    """Updates per second above, the server's CPU below, against the number of workers."""
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 6), layout="constrained")
    curve(above, figures, capacity.WORKERS, capacity.updates, "measured")
    curve(above, figures, capacity.WORKERS, capacity.ideal, "if all else were free", style=":")
    top = max(figures.all[capacity.updates(n)].median for n in capacity.WORKERS)
    above.set(ylabel="updates/s", ylim=(0, 1.3 * top), title="Workers that wait 20 ms a gradient")
    above.legend()
    curve(below, figures, capacity.WORKERS, capacity.server_cpu, "server")
    below.set(xscale="log", xlabel="workers", ylabel="server's CPU, % of a core")
    below.set_xticks(capacity.WORKERS, [str(n) for n in capacity.WORKERS])
    below.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def draw_transfer(figures: Figures, path: Path) -> None:
    """MB/s against the size of the model, beside what gRPC alone carries."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for workers, optimizer in ((1, "sgd"), (2, "sgd"), (1, "adam"), (2, "adam")):

        def name(size: str, workers: int = workers, optimizer: str = optimizer) -> str:
            return transfer.name_of(size, workers, optimizer)

        curve(axes, figures, list(transfer.SIZES), name, name("")[2:])
    axes.axhline(figures.all[limits.EXCHANGE].median, color="gray", ls=":", label="raw gRPC")
    axes.set(xlabel="float32 parameters", ylabel="MB/s, pushed + pulled", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def curve(
    axes: Any,
    figures: Figures,
    values: Sequence[X],
    name: Callable[[X], str],
    label: str,
    style: str = "-",
) -> None:
    """Medians of the figures that were measured, with their least and greatest."""
    there = [(x, figures.all[name(x)]) for x in values if name(x) in figures.all]
    low = [figure.median - min(figure.values) for _, figure in there]
    high = [max(figure.values) - figure.median for _, figure in there]
    medians = [figure.median for _, figure in there]
    axes.errorbar(
        [x for x, _ in there], medians, [low, high], label=label, ls=style, capsize=3, marker="."
    )
