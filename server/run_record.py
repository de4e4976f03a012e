"""run.json: what a run is, so that it is continued as itself or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from headwater import __version__
from headwater.protos.errors import UsageError
from headwater.protos.layout import Layout
from headwater.server.config import ServerConfig
from headwater.server.order import ORDER_VERSION
from headwater.server.rounds import Rounds
from headwater.worker.load import LoadedTask

FORMAT = 1
"""Of the run directory as a whole."""

_ASKED = (
    *("epochs", "batch_size", "optimizer", "ema", "seed", "init"),
    *("consistency", "local_steps", "inner_optimizer", "compress", "pull_dtype"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The contents of run.json."""

    run_id: str
    incarnation: int
    """Of the server that wrote it, which it did before it served."""
    task: str
    options: Mapping[str, str]
    layout: str
    """The layout's fingerprint."""
    example_count: int
    batch_size: int
    seed: int
    shuffle: bool
    remainder: str
    order_version: int
    epochs: int
    local_steps: int
    updates: int | None
    """Of the whole run, as schedules count them."""
    optimizer: str
    asked: Mapping[str, Any]
    """The options of `headwater server` that override the task's values; they go on to hold."""
    arrays: Mapping[str, tuple[str, tuple[int, ...]]] | None = None
    """Of a run without task code: dtype and shape of what it serves, by name, in their order."""
    starts: Sequence[int] = dataclasses.field(default_factory=list)
    """The version that each incarnation began with. Lower than the one before only where the
    newest snapshot was damaged since."""
    headwater: str = __version__

    @classmethod
    def of(
        cls,
        run_id: str,
        loaded: LoadedTask,
        layout: Layout,
        rounds: Rounds,
        updates: int | None,
        optimizer: str,
        config: ServerConfig,
    ) -> RunRecord:
        """What the first incarnation of a run writes."""
        order = rounds.order
        return cls(
            run_id=run_id,
            incarnation=1,
            task=loaded.name,
            options=dict(loaded.options),
            layout=layout.fingerprint,
            example_count=order.example_count,
            batch_size=order.batch_size,
            seed=order.seed,
            shuffle=order.shuffle,
            remainder=order.remainder,
            order_version=ORDER_VERSION,
            epochs=order.epochs,
            local_steps=rounds.steps,
            updates=updates,
            optimizer=optimizer,
            asked={name: getattr(config, name) for name in _ASKED},
            arrays=loaded.arrays,
        )

    @classmethod
    def parse(cls, text: str, place: str) -> RunRecord:
        """Read run.json.

        Raises:
          UsageError: It is damaged, or a later Headwater wrote it.
        """
        try:
            values = json.loads(text)
            written = values.pop("format")
            if written > FORMAT:
                raise UsageError(
                    f"{place} has format {written}, and this version of Headwater reads up to "
                    f"{FORMAT}; continue the run with the version that began it, or a later one"
                )
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{place} was damaged ({error}); restore it from a copy, or start anew in another "
                "directory"
            ) from None

    def begun_at(self, version: int, before: RunRecord | None) -> RunRecord:
        """With the version that this incarnation begins with."""
        known = [] if before is None else list(before.starts)
        unknown = self.incarnation - 1 - len(known)  # a run of before this was written
        return dataclasses.replace(self, starts=[*[0] * unknown, *known, version])

    def text(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    def settings(self, config: ServerConfig) -> ServerConfig:
        """`config`, with what was asked for earlier where it does not ask."""
        missing: dict[str, Any] = {
            name: self.asked.get(name) for name in _ASKED if getattr(config, name) is None
        }
        return dataclasses.replace(config, **missing)

    def differences(self, other: RunRecord) -> str:
        """What makes the other one another run: `seed: 0 in the directory, 1 now`; "" if nothing.

        Epochs, optimizer and the like may change in the middle of a run.
        """
        return "; ".join(
            f"{what}: {here} in the directory, {there} now"
            for what, here, there in (
                ("task", self.task, other.task),
                ("task options", _options(self.options), _options(other.options)),
                ("tensors", self.layout[:12], other.layout[:12]),
                ("examples", self.example_count, other.example_count),
                ("batch size", self.batch_size, other.batch_size),
                ("seed", self.seed, other.seed),
                ("shuffle", self.shuffle, other.shuffle),
                ("remainder", self.remainder, other.remainder),
                ("local steps", self.local_steps, other.local_steps),
                ("version of the batch order", self.order_version, other.order_version),
            )
            if here != there
        )

    def continued_as(self, new: RunRecord, place: str) -> RunRecord:
        """The record of the next incarnation, which wants to go on as `new`.

        Raises:
          UsageError: That would be another run; says what differs.
        """
        if changed := self.differences(new):
            raise UsageError(
                f"{place} holds another run than the one that would continue it ({changed}); "
                "start it as it was, or name another --run-dir"
            )
        return dataclasses.replace(new, run_id=self.run_id, incarnation=self.incarnation + 1)


def _options(options: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(options.items())) or "none"
