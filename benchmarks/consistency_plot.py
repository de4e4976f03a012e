"""Draws what `benchmarks.consistency` measured of convergence. Needs matplotlib."""

from __future__ import annotations

import io
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from PIL import Image  # comes with matplotlib

if TYPE_CHECKING:
    from benchmarks.kept import Run
    from benchmarks.settings import Setting

# Okabe and Ito's, which the colour-blind can tell apart, less their yellow, which is too pale on
# white; a grey, and Tol's wine and olive, make them enough.
COLOURS = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
    *("#999999", "#882255", "#999933"),
)
LINES = {1: ("-", "o"), 8: ("--", "s"), 32: (":", "^")}
"""By local steps: of the line, and of the dots."""
TICKS = (20, 40, 60, 70, 80, 85, 90, 92, 94, 95, 96, 97, 98)
"""Of the accuracy, in %."""
APART = 0.08
"""Versions of staleness between settings that have the same."""
COLOUR_COUNT = 128
"""In the file; with all the shades between a line and the paper."""


def draw(runs: Mapping[Setting, Sequence[Run]], path: Path) -> None:
    """Accuracy by epoch, and at the end by staleness; a colour and a style each setting."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_epoch, by_staleness) = pyplot.subplots(
        1, 2, sharey=True, figsize=(12.5, 6.8), layout="constrained"
    )
    colours = {h: itertools.cycle(COLOURS) for h in LINES}
    places = side_by_side(runs)
    for setting, repeats in runs.items():
        if repeats:
            line, marker = LINES[setting.local_steps]
            look = {"color": next(colours[setting.local_steps]), "label": setting.name}
            accuracies = [100 * run["accuracy"] for run in repeats]
            by_epoch.plot(*mean_curve(repeats), line, **look)
            at = [places[setting]] * len(repeats)
            by_staleness.plot(at, accuracies, marker, ls="none", alpha=0.75, **look)
    by_epoch.set(xlabel="epoch", ylabel="test accuracy, %", title="Mean of the seeds, by epoch")
    by_staleness.set(
        xlabel="mean staleness, versions; those of about the same side by side",
        title="At the end, a dot a seed",
    )
    scale_by_error(by_epoch)
    for axes in (by_epoch, by_staleness):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = legend_handles(by_epoch, by_staleness)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    save(figure, path)


def mean_curve(repeats: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Whole epochs, and the accuracy then in %; a busy machine was asked a little later."""
    curves = [np.array(run["curve"]).T for run in repeats]
    epochs = np.arange(1, round(curves[0][0][-1]) + 1)
    accuracies = [np.interp(epochs, at, accuracy) for at, accuracy in curves]
    return epochs, 100 * np.mean(accuracies, axis=0)


def side_by_side(runs: Mapping[Setting, Sequence[Run]]) -> dict[Setting, float]:
    """Where each setting's dots are: at its staleness, less or more a little, to see them all."""
    groups: dict[int, list[Setting]] = {}
    for setting, repeats in runs.items():
        if repeats:
            mean = statistics.fmean(run["staleness_mean"] for run in repeats)
            groups.setdefault(round(mean), []).append(setting)
    return {
        setting: staleness + APART * (number - (len(group) - 1) / 2)
        for staleness, group in groups.items()
        for number, setting in enumerate(group)
    }


def scale_by_error(axes: Any) -> None:
    """From 97 to 98 % is as far as from 40 to 60: what is left of the error is what counts."""
    axes.set_yscale("function", functions=(to_scale, from_scale))
    axes.set_yticks(TICKS, labels=[f"{tick:g}" for tick in TICKS])
    axes.set_ylim(20, 98)


def to_scale(percent: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(100 - percent, 1e-6))


def from_scale(value: np.ndarray) -> np.ndarray:
    return 100 - np.exp(-value)


def legend_handles(lines: Any, dots: Any) -> list[Any]:
    """One for each setting, with its line and its dot; a column for each kind of line."""
    columns: dict[str, list[Any]] = {}
    for line, dot in zip(lines.get_lines(), dots.get_lines(), strict=True):
        handle = Line2D([], [], color=line.get_color(), label=line.get_label())
        handle.set(linestyle=line.get_linestyle(), marker=dot.get_marker())
        columns.setdefault(line.get_linestyle(), []).append(handle)
    # A legend is filled from top to bottom, all columns equally high.
    height = max(map(len, columns.values()), default=0)
    blank = Line2D([], [], ls="none", label=" ")
    return [h for column in columns.values() for h in (column + [blank] * height)[:height]]


def save(figure: Any, path: Path) -> None:
    """With a palette, which makes it a third as large."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90, format="png")
    Image.open(drawn).convert("RGB").quantize(COLOUR_COUNT).save(path, optimize=True)
