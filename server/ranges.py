"""An immutable set of whole numbers, kept as ranges.

Which batches were applied is nearly always "all below n, and a few above", so
ranges stay few however long a run is, and a version can hold its own set.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Disjoint [start, end) pairs in rising order, none touching the next."""

    pairs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Ranges:
        found = cls()
        for number in numbers:
            found = found.add(number)
        return found

    def __contains__(self, number: int) -> bool:
        at = bisect.bisect_right(self.pairs, (number, float("inf"))) - 1
        return at >= 0 and number < self.pairs[at][1]

    def __iter__(self) -> Iterator[int]:
        for start, end in self.pairs:
            yield from range(start, end)

    def __len__(self) -> int:
        return sum(end - start for start, end in self.pairs)

    @property
    def low_water(self) -> int:
        """The lowest number that is not in the set, counting from 0."""
        return self.pairs[0][1] if self.pairs and self.pairs[0][0] == 0 else 0

    def add(self, number: int) -> Ranges:
        """This set and `number`, which must not be in it.

        Raises:
          ValueError: It is: something was about to be counted twice.
        """
        at = bisect.bisect_right(self.pairs, (number, float("inf")))
        before = self.pairs[at - 1] if at else None
        after = self.pairs[at] if at < len(self.pairs) else None
        if before and number < before[1]:
            raise ValueError(f"{number} is in the set already")
        start, end, first, last = number, number + 1, at, at
        if before and before[1] == number:
            start, first = before[0], at - 1
        if after and after[0] == number + 1:
            end, last = after[1], at + 1
        return Ranges((*self.pairs[:first], (start, end), *self.pairs[last:]))
