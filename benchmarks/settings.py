"""The ways to be consistent that `benchmarks.consistency` measures."""

from __future__ import annotations

import dataclasses
import math

NESTEROV = "sgd(0.7, momentum=0.9, nesterov=True)"
"""DiLoCo's outer optimizer. Too long for a table, where it is only Nesterov."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a training is consistent. The fields are options of `headwater server`."""

    workers: int
    consistency: str = "async"
    staleness: str = "none"
    local_steps: int = 1
    optimizer: str = ""
    """The server's own choice where it is empty; so is `inner_optimizer`."""
    inner_optimizer: str = ""

    @property
    def name(self) -> str:
        words = [self.consistency]
        if self.staleness != "none":
            words.append(self.staleness)
        if self.local_steps > 1:
            words.append(f"H={self.local_steps}")
        if self.optimizer:
            words.append("Nesterov" if self.optimizer == NESTEROV else self.optimizer)
        if self.inner_optimizer:
            words.append(f"inner {self.inner_optimizer}")
        return ", ".join([*words, f"{self.workers} worker{'s' * (self.workers > 1)}"])

    @property
    def options(self) -> list[str]:
        options = ["--consistency", self.consistency, "--staleness", self.staleness]
        options += ["--local-steps", str(self.local_steps)]
        if self.optimizer:
            options += ["--optimizer", self.optimizer]
        if self.inner_optimizer:
            options += ["--inner-optimizer", self.inner_optimizer]
        return options

    @property
    def number(self) -> int:
        """K of bounded:K, N of sync:N, else 0."""
        return int(self.consistency.partition(":")[2] or 0)

    @property
    def at_once(self) -> int:
        """Workers that the dial lets compute at the same time."""
        bounds = {"bounded": self.number + 1, "sync": self.number}
        return min(self.workers, bounds.get(self.consistency.partition(":")[0], self.workers))

    def updates(self, batch_count: int) -> int:
        """How many updates one epoch of so many batches makes."""
        pushes = math.ceil(batch_count / self.local_steps)
        is_sync = self.consistency.startswith("sync")
        return math.ceil(pushes / self.number) if is_sync else pushes


DELAYED = "delayed_nesterov(0.7, delay=8)"
OUTER = (NESTEROV, "sgd(0.7)", "sgd(1.0)", "delayed_nesterov(0.7, delay=4)", DELAYED)
CONVERGENCE = (
    *(Setting(workers) for workers in (1, 2, 4, 8)),
    Setting(8, "bounded:2"),
    Setting(8, "sync:4"),
    Setting(8, staleness="scale"),
    Setting(8, staleness="compensate"),
    *(Setting(4, local_steps=8, optimizer=outer) for outer in OUTER),
    Setting(4, "sync:4", local_steps=8, optimizer=NESTEROV),
    Setting(1, local_steps=8, optimizer="sgd(1.0)"),
    *(Setting(8, local_steps=8, optimizer=outer) for outer in OUTER[3:]),
    Setting(4, local_steps=8, optimizer=DELAYED, inner_optimizer="sgd(0.3)"),
    *(Setting(4, local_steps=32, optimizer=outer) for outer in OUTER),
)
BOUND = tuple(Setting(4, dial) for dial in [*(f"bounded:{k}" for k in (0, 1, 4, 16)), "async"])
BYTES = tuple(Setting(workers, local_steps=h) for workers in (1, 2) for h in (1, 8, 32))
