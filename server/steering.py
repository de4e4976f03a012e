"""Steering a run while it trains: pause and resume, the dial, the optimizer's numbers.

What is set holds from the next update on, or from a version on, and is part of
every version published from then on: snapshots, the update log and the history
have it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Reason, Refused, UsageError
from headwater.protos.layout import Layout
from headwater.server.applier import Result
from headwater.server.config import NEEDS_BATCHES, NOT_IN_SYNC, ServerConfig
from headwater.server.dial import Dial
from headwater.server.optimizer import (
    UPDATE_SCALE,
    AbstractOptimizer,
    Change,
    HyperParameter,
)
from headwater.server.order import BatchOrder
from headwater.server.roster import printable
from headwater.server.run_state import Run
from headwater.server.settings import Planned, Settings
from headwater.server.staging import Staging
from headwater.server.store import Published, Store
from headwater.server.updates import Updates
from headwater.worker.compute import differences
from headwater.worker.optimizer_spec import OptimizerError

CONSISTENCY = "consistency"
"""The one setting that is not a number of the optimizer's."""

SCHEDULE = "schedule"
"""Stands for the number that a schedule gives."""

CHANGE_TIMEOUT_S = 30.0
"""For the updates that are on their way into the weights already."""


class Steering:
    """What a user may change from outside.

    Args:
      updates: Its applier makes the changes.
      pump: Called when more may be applied or granted than before.
      on_event: Called with a kind and values of each change, for the run's event log.
    """

    def __init__(
        self,
        run: Run,
        store: Store,
        updates: Updates,
        pump: Callable[[], None],
        on_event: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._run = run
        self._store = store
        self._updates = updates
        self._pump = pump
        self._on_event = on_event
        self._paused_time: float | None = None
        self._setting = asyncio.Lock()

    # ------------------------------------------------------------ pause, resume

    async def pause(self) -> str:
        """Hold the weights at their version; returns when nothing is being applied any more.

        Or after CHANGE_TIMEOUT_S: then it says what those that were on their way still wait for.
        They move the version when that is over.
        """
        run = self._run
        if run.state_override is not None:
            return "the run is over; there is nothing to pause"
        if not run.admission.paused:
            run.admission.paused = True
            self._paused_time = run.clock()
            self._on_event("pause", {"version": run.current.version})
        try:
            await asyncio.wait_for(self._updates.idle.wait(), CHANGE_TIMEOUT_S)
        except TimeoutError:
            return f"paused, but what was on its way still waits: {self._what_holds_up()}"
        return f"paused at version {run.current.version}"

    def resume(self) -> str:
        """Undo `pause`; deadlines go on from where they stood."""
        run = self._run
        if run.state_override is not None:
            return "the run is over; there is nothing to go on with"
        if run.admission.paused and self._paused_time is not None:
            run.admission.paused = False
            now = run.clock()
            run.admission.shift(now - self._paused_time, now)
            self._paused_time = None
            self._on_event("resume", {"version": run.current.version})
            self._pump()
        return "training goes on"

    # ------------------------------------------------------------------ settings

    async def settings(self) -> list[pb.Setting]:
        """All that can be set, and how it stands."""
        published, newest = self._run.current, self._run.settings
        optimizer = self._store.optimizer
        numbers = await asyncio.to_thread(_numbers, optimizer, published)
        live = optimizer.live_values(published.settings.numbers)
        return list(_described(numbers, live, published, newest))

    async def set(self, values: Mapping[str, str], at_version: int | None) -> str:
        """Change settings, all or none; returns what was done when it holds, for people.

        Args:
          values: By name, as text.
          at_version: The update that follows it is the first with the numbers; None: the next.

        Raises:
          Refused: BAD_SETTING; says what can be set. UNWRITABLE: the update log failed, and
            nothing was changed; or it is full, and the change is queued.
        """
        async with self._setting:
            dial, numbers = await self._read(values, at_version)
            changed = self._run.settings
            if numbers:
                changed = changed.with_numbers(numbers, at_version)
                try:
                    await asyncio.to_thread(self._store.prepare, changed)
                except OptimizerError as error:
                    raise _bad(str(error)) from None
            self._check_is_ahead(at_version)
            # The settings may have moved on while the update was compiled.
            changed = self._run.settings.with_numbers(numbers, at_version)
            if dial is not None:
                compute = self._shared_compute(dial)
                changed = dataclasses.replace(changed, dial=dial, compute=compute)
            published = await self._change(
                changed, {"values": dict(values), "at_version": at_version}
            )
        since = published.version if at_version is None else at_version
        shown = ", ".join(f"{name}={value}" for name, value in values.items())
        return f"{shown} from version {since} on"

    async def _change(self, settings: Settings, event: Mapping[str, Any]) -> Published:
        def note(done: asyncio.Future[Result]) -> None:
            if isinstance(result := done.result(), Published):
                self._on_event("set", {"version": result.version, **event})

        done = self._updates.change(settings)
        done.add_done_callback(note)  # also if it is done when nobody waits for it any more
        self._updates.turn(settings.dial)
        self._pump()
        try:
            result = await asyncio.wait_for(asyncio.shield(done), CHANGE_TIMEOUT_S)
        except TimeoutError:
            raise Refused(
                Reason.UNWRITABLE,
                f"not done within {CHANGE_TIMEOUT_S:.0f} s: {self._what_holds_up()}. It is still "
                "queued: it takes effect once that is over, and is lost if the server ends before",
            ) from None
        if isinstance(result, Published):
            return result
        raise Refused(Reason.UNWRITABLE, f"nothing was changed: {result}")

    def _what_holds_up(self) -> str:
        return self._run.problems.get("log", "updates that came before are slow")

    async def _read(
        self, values: Mapping[str, str], at_version: int | None
    ) -> tuple[Dial | None, dict[str, float | None]]:
        """The dial, if it is to be turned, and the optimizer's numbers, None for a schedule."""
        run = self._run
        if run.state_override is not None or run.is_done:
            raise _bad("the run is over; nothing can be set any more")
        if not values:
            raise _bad("nothing was given to be set")
        dial = None
        texts = dict(values)
        if CONSISTENCY in texts:
            if at_version is not None:
                raise _bad(f"{CONSISTENCY} changes at once; only numbers can wait for a version")
            dial = self._dial(texts.pop(CONSISTENCY))
        if not texts:
            return dial, {}
        self._check_is_ahead(at_version)
        known = await asyncio.to_thread(_numbers, self._store.optimizer, run.current)
        numbers = {}
        for name, text in texts.items():
            if name not in known:
                raise _unknown(name, known)
            numbers[name] = _number(known[name], text)
        return dial, numbers

    def _check_is_ahead(self, at_version: int | None) -> None:
        run = self._run
        next_version = run.current.version + run.admission.applying_count
        if at_version is not None and at_version < next_version:
            raise _bad(
                f"version {at_version} is past: the run is at version {run.current.version}, and "
                f"nothing can be set before version {next_version}; nothing was changed"
            )

    # ----------------------------------------------------------------- the dial

    def _dial(self, text: str) -> Dial:
        try:
            dial = Dial.parse(text, CONSISTENCY)
        except UsageError as error:
            raise _bad(str(error)) from None
        run = self._run
        if problem := does_not_fit(dial, run.config, run.order, run.layout):
            raise _bad(problem)
        self._shared_compute(dial)
        return dial

    def _shared_compute(self, dial: Dial) -> Mapping[str, str]:
        """In sync mode, what all computes with.

        Raises:
          Refused: BAD_SETTING; the workers that are here do not compute alike.
        """
        if dial.group is None:
            return {}
        if self._run.in_groups:
            return self._run.settings.compute
        members = list(self._run.roster.members.values())
        for member in members:
            if not member.hello.compute:
                raise _bad(f"{member.name} does not say what it computes with, which sync needs")
            if found := differences(member.hello.compute, members[0].hello.compute):
                raise _bad(
                    f"in sync mode all workers compute the same bits, and {member.name} and "
                    f"{members[0].name} do not (here: the first, there: the second): "
                    f"{printable(found, 1000)}; evict one of them first"
                )
        return dict(members[0].hello.compute) if members else {}

    def check_compute(self, hello: pb.Hello) -> None:
        """In sync mode all compute alike: as the first worker does, which this settles.

        Raises:
          Refused: COMPUTE_MISMATCH.
        """
        settings = self._run.settings
        if not self._run.in_groups:
            return
        if not hello.compute:
            raise Refused(
                Reason.COMPUTE_MISMATCH,
                "sync mode needs to know what a worker computes with, and hello.compute is empty",
            )
        if not settings.compute:
            self._updates.change(dataclasses.replace(settings, compute=dict(hello.compute)))
        elif found := differences(hello.compute, settings.compute):
            raise Refused(
                Reason.COMPUTE_MISMATCH,
                "in sync mode every worker computes the same bits, and this one would not "
                f"(here: the worker, there: the run): {printable(found, 1000)}",
            )


def does_not_fit(dial: Dial, config: ServerConfig, order: BatchOrder, layout: Layout) -> str:
    """What is wrong with the dial there, in such a run; "" where it fits."""
    if dial.group is None:
        return ""
    if not order.has_batches:
        return f"consistency {dial}: {NEEDS_BATCHES}"
    if config.pushes.keeps_residual:
        return f"consistency {dial} does not go with --compress {config.pushes}: {NOT_IN_SYNC}"
    pushed = config.pushes.packed(layout.moving)
    slots = Staging(pushed, config.max_staged_bytes).slots
    if dial.group <= slots:
        return ""
    return (
        f"consistency {dial} holds {dial.group} gradients of {pushed.total_bytes:,} bytes at "
        f"once, and --max-staged-bytes has room for {slots}; raise it, or use smaller groups"
    )


def _numbers(optimizer: AbstractOptimizer, published: Published) -> dict[str, HyperParameter]:
    return optimizer.hyper_parameters(published.optimizer_state)


def _unknown(name: str, known: Iterable[str]) -> Refused:
    what = (
        f"there is no setting {printable(name)!r} that can be changed while the run trains; there "
        f"are {', '.join([CONSISTENCY, *known])}"
    )
    if UPDATE_SCALE in known:
        # A GradientTransformation's own numbers are closed in its functions.
        what += (
            ". An optimizer written as an expression, such as 'adam(1e-3)', has its numbers here"
        )
    return _bad(what)


def _number(known: HyperParameter, text: str) -> float | None:
    has_schedule = known.value is None
    if has_schedule and text == SCHEDULE:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        own = f"; or {SCHEDULE}, which is its own" if has_schedule else ""
        raise _bad(f"{known.name}={printable(text)}: it takes a number, such as 3e-4{own}")
    return value


def _described(
    numbers: Mapping[str, HyperParameter],
    live: Container[str],
    published: Published,
    newest: Settings,
) -> Iterable[pb.Setting]:
    """How all stand in a version; what of the newest is not in force in it is queued."""
    now = published.settings
    newest = newest.at(published.version - 1)  # queued before this version, with plans of its past
    dials = [_queued(published.version, str(newest.dial))] if newest.dial != now.dial else []
    yield pb.Setting(name=CONSISTENCY, value=str(now.dial), planned=dials)
    for name, number in numbers.items():
        value = now.numbers.get(name, number.value)
        yield pb.Setting(
            name=name,
            value=_text(value),
            is_set=name in now.numbers,
            compiles=number.change is Change.RECOMPILED and name not in live,
            planned=_planned(name, published, newest),
        )


def _planned(name: str, published: Published, newest: Settings) -> list[pb.PlannedValue]:
    now = published.settings
    found = [
        pb.PlannedValue(after_version=plan.after_version, value=_text(plan.value))
        for plan in now.planned
        if plan.name == name
    ]
    queued = [plan for plan in newest.planned if plan.name == name and plan not in now.planned]
    value = newest.numbers.get(name)
    if value != now.numbers.get(name):
        queued = [Planned(published.version, name, value), *queued]
    found += [_queued(plan.after_version, _text(plan.value)) for plan in queued]
    return sorted(found, key=lambda plan: plan.after_version)


def _text(value: float | None) -> str:
    return SCHEDULE if value is None else repr(float(value))


def _queued(after_version: int, value: str) -> pb.PlannedValue:
    return pb.PlannedValue(after_version=after_version, value=value, queued=True)


def _bad(what: str) -> Refused:
    return Refused(Reason.BAD_SETTING, what)
