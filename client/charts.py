"""Charts of one line: in blocks, or in ASCII where the terminal's encoding has none.

They say as much without colour: every part of a whole has a glyph of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.text import Text

from headwater.client.texts import LONG_S, number

# Not the full block: a chart would grow into the one on the line above.
_HEIGHTS = " ▁▂▃▄▅▆▇"
_ASCII_HEIGHTS = " .:-=+*#"

TIMES = ("wait", "load", "compute", "wire")
"""Where the time of a push goes, in the order of `Times` in the .proto."""
_FILLS = "░▒█▓"
_ASCII_FILLS = ".-#="
_STYLES = ("yellow", "blue", "green", "magenta")


def axis_end(staleness: Sequence[Mapping[str, int]]) -> tuple[int, str]:
    """Where the bars of these end, and how to say it: `3`, or `13+` where the last holds the rest.

    The hundredth part that is beyond p99 may reach far, as when a worker was
    stopped for a while, and would press all others into the first bar.
    """
    greatest = max(each["max"] for each in staleness)
    end = min(greatest, max(each["p99"] for each in staleness) + 1)
    return end, f"{end}+" if end < greatest else f"{end}"


def histogram(counts: Mapping[int, int], end: int, values: int, *, ascii_only: bool) -> str:
    """A bar for every `values` values from 0 on; the last is that of `end` and all beyond.

    The highest bar is the fullest; what was counted at all is seen.
    """
    bins = [0] * (end // values + 1)
    for value, count in counts.items():
        bins[min(value, end) // values] += count
    heights = _ASCII_HEIGHTS if ascii_only else _HEIGHTS
    most = max(*bins, 1)
    return "".join(heights[math.ceil(n * (len(heights) - 1) / most)] for n in bins)


def round_step(end: int, bar_count: int) -> int:
    """1, 2 or 5 times a power of ten: the least that brings 0 to `end` into so many bars."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if end // step < bar_count:
                return step
        power *= 10


def seconds_of(times: Mapping[str, float]) -> list[float]:
    """The parts, in the order of TIMES; zeros before the first push."""
    return [times[f"{name}_s"] for name in TIMES]


def time_bar(times: Mapping[str, float], width: int, *, ascii_only: bool) -> Text:
    """A push from its worker's asking to its whole gradient: each part as long as its share."""
    fills = _ASCII_FILLS if ascii_only else _FILLS
    cells = shares(seconds_of(times), width)
    return Text.assemble(
        *((fill * n, style) for fill, style, n in zip(fills, _STYLES, cells, strict=True))
    )


def time_legend(times: Mapping[str, float], *, ascii_only: bool) -> Text:
    """What the bar's glyphs stand for, and how long each took."""
    fills = _ASCII_FILLS if ascii_only else _FILLS
    seconds = seconds_of(times)
    in_s = max(seconds) >= LONG_S
    legend = Text("  ").join(
        Text.assemble((fill, style), f" {name} {number(part, in_s=in_s)}")
        for fill, style, name, part in zip(fills, _STYLES, TIMES, seconds, strict=True)
    )
    return legend.append(" s" if in_s else " ms")


def shares(parts: Sequence[float], width: int) -> list[int]:
    """How many of `width` cells each part of a whole gets; all of them, if it is not 0.

    The cells that rounding down leaves go to the greatest remainders.
    """
    total = sum(parts)
    if total <= 0:
        return [0] * len(parts)
    exact = [part * width / total for part in parts]
    cells = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: cells[i] - exact[i])
    for i in by_remainder[: width - sum(cells)]:
        cells[i] += 1
    return cells
