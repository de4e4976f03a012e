"""Everything of a run that is made, or found again, before it is served."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
from typing import Any

import jax
import numpy as np

from headwater.protos.errors import UsageError
from headwater.protos.layout import LayoutError
from headwater.protos.rpc import split_address
from headwater.protos.snapshot_file import Facts, Snapshot
from headwater.server import failpoints, update_log
from headwater.server.config import ServerConfig
from headwater.server.identity import RunIdentity
from headwater.server.optimizer import AbstractOptimizer, check, resolve
from headwater.server.order import BatchOrder
from headwater.server.recovery import Recovered, recover
from headwater.server.run_dir import RunDir
from headwater.server.run_record import RunRecord
from headwater.server.snapshots import Snapshots, arrays_of, restored
from headwater.server.store import NotFinite, Published, Store, initial
from headwater.server.update_log import LogBroken, NoRoom, Recovery, UpdateLog
from headwater.worker.load import LoadedTask
from headwater.worker.task import TaskError
from headwater.worker.user_code import guard_user_code

log = logging.getLogger("headwater.server")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is ready to be served."""

    config: ServerConfig
    identity: RunIdentity
    order: BatchOrder
    store: Store
    run_dir: RunDir
    snapshots: Snapshots
    log: UpdateLog | None
    """With --durability log."""
    optimizer_text: str
    evaluation: dict[str, Any] | None
    """The newest one of the incarnations before, as it stands in metrics.jsonl."""
    snapshot_version: int
    """Of the newest snapshot on disk; the log may lead further."""
    warnings: tuple[str, ...]
    """What was noticed on the way, for status."""
    awaits_evaluation: bool

    def save(self, published: Published) -> None:
        """Write a version's snapshot.

        Raises:
          OSError: The disk is full or broken.
        """
        _save(self.snapshots, self.identity, self.optimizer_text, published)


def prepare(loaded: LoadedTask, config: ServerConfig) -> Prepared:
    """Begin a run in a new directory, or continue the one that the directory holds.

    Raises:
      UsageError: The task, an option or the run directory cannot work; says which.
    """
    with contextlib.ExitStack() as opened:
        run_dir: RunDir | None = None
        if RunDir.holds_run(config.run_dir):
            run_dir = opened.enter_context(contextlib.closing(RunDir(config.run_dir, loaded.name)))
            if run_dir.record is not None:
                config = run_dir.record.settings(config)
        _check_port_is_free(config.listen)
        try:
            prepared = _prepare(loaded, config, run_dir, opened)
        except (TaskError, LayoutError) as error:
            raise UsageError(str(error)) from None
        except (OSError, NoRoom, LogBroken) as error:
            where = config.run_dir or "runs/"
            raise UsageError(
                f"the run directory {where} cannot be written: "
                f"{getattr(error, 'strerror', None) or error}"
            ) from None
        opened.pop_all()
    failpoints.reach("incarnation-persisted")
    return prepared


def _prepare(
    loaded: LoadedTask, config: ServerConfig, run_dir: RunDir | None, opened: contextlib.ExitStack
) -> Prepared:
    task = loaded.task
    identity = loaded.identity()
    order = BatchOrder(
        example_count=identity.example_count,
        batch_size=config.batch_size or task.batch_size,
        epochs=config.epochs or task.epochs,
        seed=task.seed if config.seed is None else config.seed,
        shuffle=task.shuffle,
        remainder=task.remainder,
    )
    optimizer = resolve(config.optimizer or task.optimizer, order.total)
    check(optimizer, jax.eval_shape(task.init, jax.random.key(order.seed)))
    first = None
    if run_dir is None:
        first = _initial(loaded, optimizer, order.seed)
        run_dir = opened.enter_context(contextlib.closing(RunDir(config.run_dir, loaded.name)))
    order.prepare(0)
    run = RunIdentity(run_dir.run_id, identity, task.tree.layout, loaded.software())
    record = RunRecord.of(run_dir.run_id, loaded, run.layout, order, optimizer.text, config)
    snapshots = Snapshots(run_dir.path, config.keep)
    snapshots.remove_leftovers()
    evaluation = None
    if run_dir.record is None:
        store = first or _initial(loaded, optimizer, order.seed)
        recovered = Recovered(store, 0, 0, 0, ())
        _begin(run_dir, snapshots, run, optimizer.text, store.current)
    else:
        record = run_dir.record.continued_as(record, str(run_dir.path))
        recovered = _recover(loaded, optimizer, order, run, run_dir, run_dir.record, snapshots)
        _check_epochs(order, recovered.store.current)
        evaluation = run_dir.cut_metrics(recovered.store.current.version)
    opened_log = _begin_log(config, run, run_dir, snapshots, optimizer.text, recovered)
    if opened_log is not None:
        opened.callback(opened_log.abandon)
    run_dir.write_record(record)
    return Prepared(
        config=config,
        identity=run,
        order=order,
        store=recovered.store,
        run_dir=run_dir,
        snapshots=snapshots,
        log=opened_log,
        optimizer_text=optimizer.text,
        evaluation=evaluation,
        snapshot_version=snapshots.versions()[-1],
        warnings=recovered.warnings,
        awaits_evaluation=config.await_evaluation and task.evaluate is not None,
    )


def _initial(loaded: LoadedTask, optimizer: AbstractOptimizer, seed: int) -> Store:
    """Version 0, from the task's own `init`."""
    task = loaded.task
    with guard_user_code("Task.init raised"):
        params = task.init(jax.random.key(seed))
    task.tree.check(params)
    try:
        return Store(task.tree, optimizer, initial(task.tree, params, optimizer))
    except NotFinite as error:
        raise UsageError(f"Task.init gave weights that are not finite: {error}") from None


def _begin(
    run_dir: RunDir,
    snapshots: Snapshots,
    run: RunIdentity,
    optimizer_text: str,
    start: Published,
) -> None:
    """Make version 0 durable. The run exists once run.json does, which is written after it."""
    if any(snapshots.versions()) or update_log.holds_records(run_dir.path):
        raise UsageError(
            f"{run_dir.path} holds snapshots of a run, but no run.json: it cannot be continued, "
            "and is not overwritten. Restore it from a copy, or name another --run-dir"
        )
    update_log.remove_all(run_dir.path)  # begun by one that did not get as far as run.json
    _save(snapshots, run, optimizer_text, start)


def _recover(
    loaded: LoadedTask,
    optimizer: AbstractOptimizer,
    order: BatchOrder,
    run: RunIdentity,
    run_dir: RunDir,
    before: RunRecord,
    snapshots: Snapshots,
) -> Recovered:
    """The state that the incarnation before left, for `optimizer` to go on with."""
    tree, incarnation = loaded.task.tree, before.incarnation + 1
    old_total = dataclasses.replace(order, epochs=before.epochs).total
    old = resolve(before.asked.get("optimizer") or loaded.task.optimizer, old_total)
    snapshot = snapshots.newest()
    recovery = Recovery(run_dir.path, _log_facts(run), snapshot.facts.version)
    try:
        # With the optimizer that made the log's updates, or they would be others.
        recovered = recover(
            snapshot, recovery, tree, old, incarnation=incarnation, software=run.software
        )
        if (old.text, old_total) != (optimizer.text, order.total):
            store = recovered.store
            facts, arrays = _snapshot_of(run, old.text, store.current)
            state = restored(Snapshot(facts, arrays), tree, optimizer, incarnation)
            if recovered.replayed:  # a later recovery would replay with the new optimizer
                snapshots.save(facts, arrays)
                update_log.remove_all(run_dir.path)
            recovered = dataclasses.replace(recovered, store=Store(tree, optimizer, state))
    except NotFinite as error:
        raise UsageError(f"the run's snapshot has weights that are not finite: {error}") from None
    for warning in recovered.warnings:
        log.warning("%s", warning)
    log.info(
        "continuing run %s at version %d, as incarnation %d",
        run.run_id, recovered.store.current.version, incarnation,
    )  # fmt: skip
    return recovered


def _begin_log(
    config: ServerConfig,
    run: RunIdentity,
    run_dir: RunDir,
    snapshots: Snapshots,
    optimizer_text: str,
    recovered: Recovered,
) -> UpdateLog | None:
    current = recovered.store.current
    if config.durability == "log":
        return UpdateLog(
            run_dir.path, _log_facts(run), version=current.version, sequence=recovered.sequence
        )
    if recovered.replayed:
        _save(snapshots, run, optimizer_text, current)  # the log is not gone on with
    if update_log.segments(run_dir.path):
        update_log.remove_all(run_dir.path)
    return None


def _check_epochs(order: BatchOrder, current: Published) -> None:
    end = max((end for _, end in current.applied.pairs), default=0)
    if end > order.total:
        raise UsageError(
            f"--epochs {order.epochs} ends before what the run has trained already: it is in epoch "
            f"{(end - 1) // order.per_epoch + 1}"
        )


def _log_facts(run: RunIdentity) -> dict[str, str]:
    return {"run_id": run.run_id, "layout": run.layout.fingerprint}


def _snapshot_of(
    run: RunIdentity, optimizer_text: str, published: Published
) -> tuple[Facts, dict[str, np.ndarray]]:
    arrays, prefix = arrays_of(run.layout, published)
    facts = Facts(
        run_id=run.run_id,
        task=run.task.name,
        incarnation=published.incarnation,
        version=published.version,
        applied=[list(pair) for pair in published.applied.pairs],
        left_out=[list(pair) for pair in published.left_out.pairs],
        optimizer=optimizer_text,
        optimizer_prefix=prefix,
        software=run.software,
        tensors={},
    )
    return facts, arrays


def _save(
    snapshots: Snapshots, run: RunIdentity, optimizer_text: str, published: Published
) -> None:
    snapshots.save(*_snapshot_of(run, optimizer_text, published))


class PortTaken(UsageError):
    """The address to listen on is not free."""

    def __init__(self, listen: str) -> None:
        super().__init__(
            f"{listen} is in use or not an address of this machine; stop what listens there, or "
            "choose another with --listen HOST:PORT (port 0 takes a free one)"
        )


def _check_port_is_free(listen: str) -> None:
    """Fail in a moment, rather than after the weights have been made."""
    host, port = split_address(listen, "--listen")
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            raise PortTaken(listen) from None
