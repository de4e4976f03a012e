"""What was measured, repeat by repeat, and the table of it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass
class Figure:
    """One line of the table."""

    part: str
    name: str
    unit: str
    limit: str
    """The name of the figure that bounds it, of the same unit; "" where nothing does."""
    values: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.values)


class Figures:
    """All of them, by name, in the order in which they came."""

    def __init__(self) -> None:
        self.part = ""
        """Whose figures `add` is given."""
        self.all: dict[str, Figure] = {}

    def add(self, name: str, unit: str, value: float, limit: str = "") -> None:
        """One more repeat's value. `limit` may be measured later."""
        figure = self.all.setdefault(name, Figure(self.part, name, unit, limit))
        assert (figure.unit, figure.limit) == (unit, limit), f"two figures are called {name!r}"
        figure.values.append(value)

    def table(self) -> Iterator[str]:
        """As Markdown, which is also readable where it is printed."""
        order = list(dict.fromkeys(figure.part for figure in self.all.values()))
        wide = max((len(name) for name in self.all), default=4)
        names = ("unit", "median", "min", "max", "runs", "ratio", "to")
        yield f"| {'what':{wide}} | {' | '.join(f'{name:>9}' for name in names)} |"
        yield f"| {'-' * wide} | {' | '.join(['--------:'] * len(names))} |"
        for figure in sorted(self.all.values(), key=lambda figure: order.index(figure.part)):
            low, high = min(figure.values), max(figure.values)
            cells = [figure.unit, *map(number, (figure.median, low, high))]
            cells += [str(len(figure.values)), self.ratio(figure), figure.limit]
            yield f"| {figure.name:{wide}} | {' | '.join(f'{cell:>9}' for cell in cells)} |"

    def ratio(self, figure: Figure) -> str:
        """To its limit's median, where that was measured."""
        limit = self.all.get(figure.limit)
        if limit is None:
            return ""
        assert limit.unit == figure.unit, f"{figure.name} is in {figure.unit}, not as its limit"
        return f"{figure.median / limit.median:.3g}"

    def as_json(self) -> dict[str, Any]:
        return {name: dataclasses.asdict(figure) for name, figure in self.all.items()}


def number(value: float) -> str:
    """Three digits of it, or all that stand before the point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
