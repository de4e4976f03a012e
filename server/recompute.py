"""A run computed again from its history, line by line, with the code that computed it first.

The gradients are the workers' functions over the workers' data, the updates the
server's `Store`: there is no second arithmetic here. Each gradient is compared
with what was pushed and each version with what was made, so that the first
difference is found where it began. The weights of a version are kept until the
last gradient that was computed at them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from headwater.protos.compression import Compression, pulls
from headwater.protos.crc import crc32c
from headwater.protos.errors import HeadwaterError
from headwater.protos.layout import Bytes
from headwater.server.history import PLAIN, Line
from headwater.server.journal import weights_crc
from headwater.server.optimizer import AbstractOptimizer
from headwater.server.plan import first_store, optimizer_of
from headwater.server.rounds import Rounds
from headwater.server.settings import Settings
from headwater.server.snapshots import handed_over
from headwater.server.store import (
    Base,
    Contribution,
    Diverged,
    NotFinite,
    Published,
    Store,
    base_of,
)
from headwater.server.survey import Survey
from headwater.worker.compression import Pack
from headwater.worker.devices import Devices
from headwater.worker.forms import Forms
from headwater.worker.gradient import AbstractGradientFunction
from headwater.worker.load import LoadedTask
from headwater.worker.loader import Key, Loader
from headwater.worker.local_steps import gradient_function

LOADED_AHEAD = 16
"""Lines whose batches are being loaded, or wait to be used."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where a run and its replay part."""

    version: int
    what: str
    """`weights` that a life of the server began with, `gradient`, `update`, or `file`."""
    text: str
    """For people, to follow the version."""

    def __str__(self) -> str:
        return f"version {self.version:,} differs: {self.text}"


class Recomputation:
    """The run as far as its lines were taken.

    Args:
      loaded: The task.
      rounds: Of the run.
      survey: Of the lines that will come.
      gradients_platform: Where the gradients are to be computed; None leaves it to JAX.
    """

    def __init__(
        self, loaded: LoadedTask, rounds: Rounds, survey: Survey, gradients_platform: str | None
    ) -> None:
        self._loaded = loaded
        self._rounds = rounds
        self._survey = survey
        self._platform = gradients_platform
        self._servers_platform: str | None = None
        self._loader = Loader(loaded.task.dataset, rounds.order.seed)
        self._store: Store | None = None
        self._optimizer: AbstractOptimizer | None = None
        self._gradients: dict[int, AbstractGradientFunction] = {}
        self._gradient_of: Callable[[int], AbstractGradientFunction] | None = None
        self._forms: Forms | None = None
        self._sent: Pack | None = None
        self._kept: dict[int, Published] = {}
        self._buffers: list[Bytes] = []
        self.difference: Difference | None = None
        """Why it ended early."""
        self.lives: set[int] = set()
        """Incarnations that had this version."""
        self.same: Published | None = None
        """The newest version before the first difference."""
        self.checked_version = -1
        """The newest whose weights were compared with the run's."""

    @property
    def current(self) -> Published:
        """The newest version."""
        return self.store.current

    @property
    def store(self) -> Store:
        if self._store is None:
            raise HeadwaterError("the history begins with an update, and with no server before it")
        return self._store

    def close(self) -> None:
        self._loader.close()

    def run(self, lines: Iterable[Line]) -> Iterator[int]:
        """Take the lines, to their end or the first difference; the version after each.

        Raises:
          HeadwaterError: A line cannot be followed; says why.
          UsageError: The task is not as it was.
        """
        for line in self._loading_ahead(lines):
            self.difference = self._take(line)
            if self.difference is None:
                self.same = self.current
            yield self.current.version
            if self.difference is not None:
                return

    # ------------------------------------------------------------------ data

    def _loading_ahead(self, lines: Iterable[Line]) -> Iterator[Line]:
        waiting: deque[Line] = deque()
        for line in lines:
            for position, *_ in line.get("u", ()):
                self._load(position)
            waiting.append(line)
            if len(waiting) > LOADED_AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _load(self, position: int) -> None:
        if position >= self._rounds.total:
            raise HeadwaterError(
                f"the history is damaged: it has a gradient of round {position}, and the run has "
                f"{self._rounds.total}; restore it from a copy"
            )
        for batch in self._rounds.batches(position):
            # As a worker gets them: in the order of the wire.
            self._loader.grant(self._key(batch), self._rounds.order.indices(batch).tolist())

    def _key(self, batch: int) -> Key:
        at = self._rounds.order.id(batch)
        return at.epoch, at.shard, at.number

    # ----------------------------------------------------------------- lines

    def _take(self, line: Line) -> Difference | None:
        if "incarnation" in line:
            return self._begin(line)
        if "u" in line:
            return self._update(line)
        with _on(self._servers_platform):
            if "out" in line:
                self.store.leave_out(line["out"])
            elif "set" in line:
                self.store.set(Settings.from_json(line["set"]))
        return None

    def _begin(self, line: Line) -> Difference | None:
        """A server begins: with the task's first weights, or with what it found."""
        task, order = self._loaded.task, self._rounds.order
        settings = Settings.from_json(line["set"])
        optimizer = optimizer_of(task, line["optimizer_spec"], line["ema"], line["updates"])
        if optimizer.text != line["optimizer"]:
            raise HeadwaterError(
                f"from version {line['v']} on the run was trained with {line['optimizer']}, and "
                f"the task has {optimizer.text} now; replay it with the task as it was"
            )
        self._gradients.clear()
        self._gradient_of = lambda devices: gradient_function(
            task,
            order.seed,
            steps=self._rounds.steps,
            inner_optimizer=line["inner_optimizer_spec"],
            epochs=line["epochs"],
            batches_per_epoch=order.per_epoch,
            devices=self._local_devices(devices),
        )
        compression = Compression.parse(line["compression"])
        if compression.keeps_residual:
            raise HeadwaterError(
                f"from version {line['v']} on gradients were sent with --compress {compression}, "
                "which adds to each what its worker had left out before: that was not recorded, "
                "and cannot be computed again"
            )
        layout = task.tree.layout
        self._forms = Forms(layout, line["compression"], line["pull_dtype"] or "", order.seed)
        self._sent = Pack(layout.moving, pulls(line["pull_dtype"]))
        self._buffers = []
        self._servers_platform = line["compute"].get("platform")
        with _on(self._servers_platform):
            if self._store is None or self._optimizer is None:
                first_of = self._loaded, optimizer, order.seed, settings, line["init"]
                self._store = first_store(*first_of)
                which = "the first weights have other bits"
            else:
                before = dataclasses.replace(self.current, settings=settings)
                start = handed_over(
                    before, task.tree, self._optimizer, optimizer, line["incarnation"]
                )
                self._store = Store(task.tree, optimizer, start)
                which = f"incarnation {line['incarnation']} went on from weights with other bits"
        self._store.receive(compression)
        self._optimizer = optimizer
        self.lives.add(line["incarnation"])
        self._keep()
        return self._compared("weights", which, line["weights"])

    def _update(self, line: Line) -> Difference | None:
        contributions = []
        for number, (position, base, worker, crc, *marks) in enumerate(line["u"]):
            loss, gradient = self._computed(position, base, worker, number)
            if crc is not None and (found := crc32c(gradient.data)) != crc:
                return Difference(
                    line["v"],
                    "gradient",
                    f"the gradient of {self._rounds.name(position)}, computed by "
                    f"{self._survey.workers[worker].name} at version {base:,}, has other bits "
                    f"({_crcs(found, crc)})",
                )
            contributions.append(
                Contribution(
                    position,
                    base,
                    self._rounds.size(position),
                    loss,
                    gradient,
                    kept=self._base(base, is_plain=PLAIN in marks),
                )
            )
        try:
            with _on(self._servers_platform):
                self.store.move(self.store.step(contributions))
        except (NotFinite, Diverged) as error:
            text = f"its gradients have the same bits, and what they make is not finite: {error}"
            return Difference(line["v"], "update", text)
        self.lives = {self.current.incarnation}
        self._drop(line)
        self._keep()
        which = "its gradients have the same bits, and the weights after the update have others"
        if self.checked_version < self.current.version - 1:
            which = (
                f"every gradient had the same bits, and the weights have others, by an update "
                f"after version {self.checked_version:,}"
            )
        return self._compared("update", which, line.get("w"))

    def _compared(self, what: str, which: str, expected: int | None) -> Difference | None:
        if expected is None:
            return None
        version, found = self.current.version, weights_crc(self.current)
        if found != expected:
            return Difference(version, what, f"{which} ({_crcs(found, expected)})")
        self.checked_version = version
        return None

    # ------------------------------------------------------------- gradients

    def _computed(self, position: int, base: int, worker: str, number: int) -> tuple[float, Bytes]:
        """The loss, and the gradient as that worker pushed it, in the `number`th buffer."""
        forms, sent = self._forms, self._sent
        if (
            self._gradient_of is None
            or forms is None
            or sent is None
            or base not in self._kept
            or position in self.current.applied
        ):
            raise HeadwaterError(
                f"the history is damaged: it cannot be that {self._rounds.name(position)} was "
                f"computed at version {base} for version {self.current.version + 1}; restore it "
                "from a copy"
            )
        steps = []
        for batch in self._rounds.batches(position):
            at = self._rounds.order.id(batch)
            steps.append((self._loader.take(self._key(batch)), at.epoch, at.number))
        weights = sent(self._kept[base].leaves)
        _, epoch, first = steps[0]
        count = self._survey.workers[worker].device_count
        if count not in self._gradients:
            self._gradients[count] = self._gradient_of(count)
        with _on(self._platform):
            unpacked = [*forms.unpack(weights), *self.current.constants]
            gradient = self._gradients[count](unpacked, steps)
            pushed = forms.pack(gradient.leaves, epoch, first)
        while number >= len(self._buffers):
            self._buffers.append(forms.pushed.empty())
        forms.pushed.pack(pushed, self._buffers[number])
        return gradient.loss, self._buffers[number]

    def _local_devices(self, count: int) -> Devices:
        """So many, or as many as there are, which is a warning before; none for JAX's choice."""
        if count == 1:
            return ()
        with _on(self._platform):
            return jax.local_devices(backend=self._platform)[:count]

    def _base(self, version: int, *, is_plain: bool) -> Base:
        """What the server had kept of a version, with the settings that hold now."""
        then = dataclasses.replace(self._kept[version], settings=self.current.settings)
        base = base_of(then, self.store.layout)
        return dataclasses.replace(base, params=None) if is_plain else base

    def _keep(self) -> None:
        version = self.current.version
        if self._survey.last_used[version] > version:
            self._kept[version] = dataclasses.replace(self.current, optimizer_state=None)

    def _drop(self, line: Line) -> None:
        for _, base, *_ in line["u"]:
            if self._survey.last_used[base] <= line["v"]:
                self._kept.pop(base, None)


def _on(platform: str | None) -> Any:
    """Compute there; where JAX does so anyway, it is told nothing."""
    if platform is None or platform == jax.default_backend():
        return contextlib.nullcontext()
    try:
        return jax.default_device(jax.devices(platform)[0])
    except RuntimeError:
        raise HeadwaterError(
            f"a part of the run was computed on {platform}, which JAX does not find here; replay "
            "it on a machine that has it"
        ) from None


def _crcs(found: int, expected: int) -> str:
    return f"CRC32C {found:08x} here, {expected:08x} in the run"
