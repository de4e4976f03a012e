"""What can be changed while a run trains, as it stands at one version.

Part of every published version, so that snapshots, the update log and the
history hold it, and what a crash brings back is what was in force. Pure values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from headwater.server.dial import Dial
from headwater.server.staleness import StalenessPolicy


@dataclasses.dataclass(frozen=True)
class Planned:
    """A number of the optimizer that will change."""

    after_version: int
    """The update that follows this version is the first with the new value."""
    name: str
    value: float | None
    """None: what the optimizer's own schedule gives, again."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """See the fields; all have the values that a run begins with."""

    dial: Dial = dataclasses.field(default_factory=Dial)
    staleness: StalenessPolicy = dataclasses.field(default_factory=StalenessPolicy)
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The optimizer's numbers that were set; the others have their expression's values."""
    planned: tuple[Planned, ...] = ()
    compute: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """In sync mode, what computes the run (worker/compute.py), once a worker has come."""

    def at(self, version: int) -> Settings:
        """What holds for the update that follows `version`."""
        due = [plan for plan in self.planned if plan.after_version <= version]
        if not due:
            return self
        return dataclasses.replace(
            self,
            numbers=_changed(self.numbers, {plan.name: plan.value for plan in due}),
            planned=self.planned[len(due) :],
        )

    def with_numbers(
        self, values: Mapping[str, float | None], after_version: int | None
    ) -> Settings:
        """With these numbers, at once or after a version; without those that are None.

        What was planned for the same numbers, from then on, is forgotten.
        """
        since = -1 if after_version is None else after_version
        kept = [p for p in self.planned if p.name not in values or p.after_version < since]
        if after_version is None:
            numbers = _changed(self.numbers, values)
            return dataclasses.replace(self, numbers=numbers, planned=tuple(kept))
        new = [Planned(after_version, name, value) for name, value in sorted(values.items())]
        planned = sorted([*kept, *new], key=lambda plan: plan.after_version)
        return dataclasses.replace(self, planned=tuple(planned))

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return {
            "consistency": str(self.dial),
            "staleness": str(self.staleness),
            "numbers": dict(self.numbers),
            "planned": [[p.after_version, p.name, p.value] for p in self.planned],
            "compute": dict(self.compute),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        """The opposite of `to_json`."""
        return cls(
            Dial.parse(values["consistency"]),
            StalenessPolicy.parse(values["staleness"]),
            values["numbers"],
            tuple(Planned(*plan) for plan in values["planned"]),
            values["compute"],
        )


def _changed(
    numbers: Mapping[str, float], values: Mapping[str, float | None]
) -> Mapping[str, float]:
    together = {**numbers, **values}
    return {name: value for name, value in together.items() if value is not None}
