"""From a run directory back to the state of the server that is gone.

The newest whole snapshot, then, where there is a log, every update since: each
with the same compiled function that made it, so that on the same machine and
software the weights are the same bits. Where they are not, that is said, and
training goes on from what came out: every batch still counts once.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from headwater.protos.errors import UsageError
from headwater.protos.snapshot_file import Snapshot
from headwater.server.history import Line
from headwater.server.journal import weights_crc
from headwater.server.log_records import Kind, Record
from headwater.server.optimizer import AbstractOptimizer
from headwater.server.push_sessions import PushId
from headwater.server.settings import Settings
from headwater.server.snapshots import restored
from headwater.server.store import Diverged, Step, Store
from headwater.server.update_log import Recovery
from headwater.worker.tree import ModelTree

log = logging.getLogger("headwater.server")

SAY_S = 5.0
"""Between lines while a long log is read."""


@dataclasses.dataclass(frozen=True)
class Recovered:
    """What was found."""

    store: Store
    snapshot_version: int
    replayed: int
    """Updates and left-out batches taken from the log."""
    sequence: int
    """Of the log's last record; 0 where there is none."""
    warnings: tuple[str, ...]
    lines: tuple[Line, ...] = ()
    """What the history has to say of what was replayed."""
    ends_early: bool = False
    """Whether the log has more, which is not to be gone on from."""
    is_saved: bool = True
    """Whether the newest snapshot on disk is of this very state, settings and all."""


def recover(
    snapshot: Snapshot,
    recovery: Recovery,
    tree: ModelTree,
    optimizer: AbstractOptimizer,
    *,
    incarnation: int,
    software: Mapping[str, str],
) -> Recovered:
    """The store as it was.

    Args:
      snapshot: The newest whole one.
      recovery: Of the log beside it.
      tree: Of the task's model.
      optimizer: The one that made the log's updates.
      incarnation: This one.
      software: Library to version, now.

    Raises:
      UsageError: The files are of another task or optimizer, or the log is damaged.
      NotFinite: The snapshot's weights are not finite.
    """
    began = said = time.monotonic()
    start = restored(snapshot, tree, optimizer, incarnation)
    made_with = snapshot.facts.optimizer
    settings, dropped = without_numbers(start.settings, made_with, optimizer.text)
    store = Store(tree, optimizer, dataclasses.replace(start, settings=settings))
    warnings = [*_changes(snapshot.facts.software, software), *dropped]
    lines: list[Line] = []
    replayed, same_bits, ends_early = 0, True, False
    for record in recovery:
        if ends_early or not _is_new(record, store):
            continue
        if same_bits and record.kind is Kind.UPDATE:
            same_bits = weights_crc(store.current) == record.weights_crc
            if not same_bits:
                warnings.append(
                    f"the log's updates up to version {store.current.version} gave other bits than "
                    "before the crash (another machine, or other software); training goes on "
                    "from what they gave now"
                )
        try:
            _replay(record, store)
        except Diverged as error:
            # Written down before it was tried, as all are; it never made a version.
            warnings.append(f"the update of version {record.version} is taken back: {error}")
            ends_early = True
            continue
        lines.append(_line(record))
        replayed += 1
        if time.monotonic() - said > SAY_S:
            said = time.monotonic()
            log.info("replaying the log: version %d", store.current.version)
    if replayed:
        log.info(
            "replayed %d records of the log in %.1f s, from version %d to %d",
            replayed, time.monotonic() - began, snapshot.facts.version, store.current.version,
        )  # fmt: skip
    return Recovered(
        store,
        snapshot.facts.version,
        replayed,
        recovery.sequence,
        tuple(warnings),
        tuple(lines),
        ends_early,
        is_saved=not replayed and made_with == optimizer.text,
    )


def without_numbers(before: Settings, old: str, new: str) -> tuple[Settings, list[str]]:
    """With no numbers that were set of an optimizer, unless it is the same one; and warnings."""
    if old == new or not (before.numbers or before.planned):
        return before, []
    warning = f"the optimizer is {new} now: the numbers that were set of {old} no longer hold"
    return dataclasses.replace(before, numbers={}, planned=()), [warning]


def _is_new(record: Record, store: Store) -> bool:
    """Whether the state lacks a record; raises where records before it are missing."""
    current = store.current
    if record.kind is Kind.SETTINGS:
        # Harmless a second time, where the snapshot has them already: the log has them all
        # (Prepared.save), so that the last ones are the last again.
        if record.version < current.version:
            return False
    elif _push(record) is not None:
        if record.version <= current.version:
            return False
    elif _positions(record)[0] in current.applied:
        return False
    expected = current.version + (record.kind is Kind.UPDATE)
    if record.version != expected:
        raise UsageError(
            f"the log goes on with version {record.version}, and the state is at "
            f"{current.version}: updates are missing. Restore the run directory from a copy"
        )
    return True


def _positions(record: Record) -> tuple[int, ...]:
    if record.kind is Kind.LEFT_OUT:
        return (record.detail,)
    return tuple(position for position, *_ in record.detail if position is not None)


def _push(record: Record) -> PushId | None:
    """The session's push that an update consists of."""
    if record.kind is not Kind.UPDATE or record.detail[0][0] is not None:
        return None
    return PushId(*record.detail[0][-1])


def _line(record: Record) -> Line:
    """As the history had it, or would have."""
    what = {Kind.UPDATE: "u", Kind.LEFT_OUT: "out", Kind.SETTINGS: "set"}[record.kind]
    return {"v": record.version, what: record.detail}


def _replay(record: Record, store: Store) -> None:
    if record.kind is Kind.LEFT_OUT:
        store.leave_out(record.detail)
        return
    if record.kind is Kind.SETTINGS:
        store.set(Settings.from_json(record.detail))
        return
    gradient: Any = np.frombuffer(record.gradient, np.uint8)
    if gradient.ctypes.data % 64:  # the tensors in it have to be aligned
        aligned = store.layout.moving.empty()
        aligned[:] = gradient
        gradient = aligned
    leaves = list(store.layout.moving.views(gradient).values())
    staleness = max(store.current.version - base for _, base, *_ in record.detail)
    step = Step(leaves, record.loss, _positions(record), staleness, push=_push(record))
    store.move(step)


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    changed = [
        f"{name} was {before[name]} and is {now[name]}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]
    return [f"software changed since the last snapshot: {'; '.join(changed)}"] if changed else []
