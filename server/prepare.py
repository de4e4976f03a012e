"""Everything of a run that is made, or found again, before it is served."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from headwater.protos.errors import UsageError
from headwater.protos.layout import Layout, LayoutError
from headwater.protos.rpc import split_address
from headwater.protos.snapshot_file import Facts, Snapshot
from headwater.server import failpoints, update_log
from headwater.server.config import ServerConfig
from headwater.server.dial import Dial
from headwater.server.history import History
from headwater.server.identity import RunIdentity
from headwater.server.journal import weights_crc
from headwater.server.optimizer import AbstractOptimizer, check
from headwater.server.plan import first_store, optimizer_of, rounds_of, with_outer_optimizer
from headwater.server.ranges import Ranges
from headwater.server.recovery import Recovered, recover, without_numbers
from headwater.server.rounds import Rounds
from headwater.server.run_dir import RunDir
from headwater.server.run_record import RunRecord
from headwater.server.settings import Settings
from headwater.server.snapshots import Snapshots, arrays_of, handed_over
from headwater.server.staleness import StalenessPolicy
from headwater.server.steering import does_not_fit
from headwater.server.store import NotFinite, Published, Store
from headwater.server.update_log import LogBroken, NoRoom, Recovery, UpdateLog
from headwater.worker.compute import fingerprint
from headwater.worker.load import LoadedTask
from headwater.worker.local_steps import gradient_function
from headwater.worker.task import Task, TaskError

log = logging.getLogger("headwater.server")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is ready to be served."""

    config: ServerConfig
    identity: RunIdentity
    rounds: Rounds
    store: Store
    settings: Settings
    """What is to hold from the start; the store may have others, of the incarnation before."""
    run_dir: RunDir
    starts: Sequence[int]
    """The version that each incarnation began with, the first one's first."""
    snapshots: Snapshots
    log: UpdateLog | None
    """With --durability log."""
    history: History
    inner_optimizer: str
    """With local steps; "" means the task's own."""
    optimizer_text: str
    evaluation: dict[str, Any] | None
    """The newest one of the incarnations before, as it stands in metrics.jsonl."""
    snapshot_version: int
    """Of the newest snapshot on disk; the log may lead further."""
    is_saved: bool
    """Whether that snapshot is of the store's state, settings and all."""
    warnings: tuple[str, ...]
    """What was noticed on the way, for status."""
    awaits_evaluation: bool

    def save(self, published: Published) -> None:
        """Write a version's snapshot.

        Raises:
          OSError: The disk is full or broken.
          LogBroken: The disk failed, before or now.
        """
        self.history.sync()
        # No snapshot is ahead of the log: of what was set at its version a recovery replays
        # all that the log has, and would end with less than the snapshot had.
        if self.log is not None and not self.log.is_synced:
            self.log.sync()
        _save(self.snapshots, self.identity, self.optimizer_text, published, self.rounds)

    def close(self) -> None:
        """Let go of the run, which nobody has begun to serve."""
        self.history.close()
        if self.log is not None:
            self.log.abandon()
        self.run_dir.close()


def prepare(loaded: LoadedTask, config: ServerConfig) -> Prepared:
    """Begin a run in a new directory, or continue the one that the directory holds.

    Raises:
      UsageError: The task, an option or the run directory cannot work; says which.
    """
    with contextlib.ExitStack() as opened:
        run_dir: RunDir | None = None
        given = config
        if RunDir.holds_run(config.run_dir):
            run_dir = opened.enter_context(contextlib.closing(RunDir(config.run_dir, loaded.name)))
            if run_dir.record is not None:
                config = run_dir.record.settings(config)
        if run_dir is None or run_dir.record is None:
            config = with_outer_optimizer(config)  # and recorded: it stays, whatever is asked later
        _check_port_is_free(config.listen)
        try:
            prepared = _prepare(loaded, config, given, run_dir, opened)
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
    loaded: LoadedTask,
    config: ServerConfig,
    given: ServerConfig,
    run_dir: RunDir | None,
    opened: contextlib.ExitStack,
) -> Prepared:
    task = loaded.task
    identity = loaded.identity()
    rounds = rounds_of(task, config)
    order = rounds.order
    updates = rounds.updates(Dial.parse(config.consistency or "async"))
    optimizer = optimizer_of(task, config.optimizer, config.ema, updates)
    check(optimizer, task.tree.trained_shapes)
    if rounds.steps > 1:
        _check_inner_optimizer(task, rounds, config.inner_optimizer)
    layout = task.tree.layout
    settings = _settings(Settings(), config)
    first_of = loaded, optimizer, order.seed, settings, config.init
    if run_dir is None or run_dir.record is None:
        _check_fits(settings, config, rounds, layout)
    first = None
    if run_dir is None:
        first = first_store(*first_of)
        run_dir = opened.enter_context(contextlib.closing(RunDir(config.run_dir, loaded.name)))
    order.prepare(0)
    run = RunIdentity(run_dir.run_id, identity, layout, loaded.software())
    record = RunRecord.of(
        run_dir.run_id, loaded, run.layout, rounds, updates, optimizer.text, config
    )
    snapshots = Snapshots(run_dir.path, config.keep)
    snapshots.remove_leftovers()
    evaluation = None
    if run_dir.record is None:
        store = first or first_store(*first_of)
        recovered = Recovered(store, 0, 0, 0, ())
        _begin(run_dir, snapshots, run, optimizer.text, store.current, rounds)
    else:
        record = run_dir.record.continued_as(record, str(run_dir.path))
        recovered = _recover(
            loaded, optimizer, updates, rounds, run, run_dir, run_dir.record, snapshots,
            keeps_log=config.durability == "log",
        )  # fmt: skip
        _check_epochs(rounds, recovered.store.current)
        _check_fits(_settings(recovered.store.current.settings, given), config, rounds, layout)
        evaluation = run_dir.cut_metrics(recovered.store.current.version)
    opened_log = None
    if config.durability == "log":
        opened_log = _begin_log(run, run_dir, recovered)
        opened.callback(opened_log.abandon)
    recovered.store.receive(config.pushes)
    current = recovered.store.current
    history = History(run_dir.path, current.version, current.applied, current.settings)
    opened.callback(history.close)
    history.go_on(recovered.lines)
    history.append(_incarnation(record, config, run, current))
    history.sync()  # before it counts as begun: nothing else says what its updates were made with
    record = record.begun_at(current.version, run_dir.record)
    run_dir.write_record(record)
    return Prepared(
        config=config,
        identity=run,
        rounds=rounds,
        settings=_settings(current.settings, given),
        history=history,
        inner_optimizer=config.inner_optimizer or "",
        store=recovered.store,
        run_dir=run_dir,
        starts=record.starts,
        snapshots=snapshots,
        log=opened_log,
        optimizer_text=optimizer.text,
        evaluation=evaluation,
        snapshot_version=snapshots.versions()[-1],
        is_saved=recovered.is_saved,
        warnings=(*recovered.warnings, *_unjudged(loaded, config)),
        awaits_evaluation=config.await_evaluation and task.evaluate is not None,
    )


def _check_inner_optimizer(task: Task, rounds: Rounds, inner_optimizer: str | None) -> None:
    """Find here, where it was typed, what every worker would find."""
    gradient_function(
        task,
        rounds.order.seed,
        steps=rounds.steps,
        inner_optimizer=inner_optimizer,
        epochs=rounds.order.epochs,
        batches_per_epoch=rounds.order.per_epoch,
    )


def _settings(before: Settings, given: ServerConfig) -> Settings:
    """With what was asked for now."""
    after = before
    if given.consistency is not None:
        after = dataclasses.replace(after, dial=Dial.parse(given.consistency))
    if given.staleness is not None:
        after = dataclasses.replace(after, staleness=StalenessPolicy.parse(given.staleness))
    return after


def _check_fits(settings: Settings, config: ServerConfig, rounds: Rounds, layout: Layout) -> None:
    """Refuse them before run.json and the update log have them: both outlive a refusal."""
    if problem := does_not_fit(settings.dial, config, rounds.order, layout):
        raise UsageError(problem)


def _incarnation(
    record: RunRecord, config: ServerConfig, run: RunIdentity, current: Published
) -> dict[str, Any]:
    """The history's line on a server that begins to serve."""
    return {
        "v": current.version,
        "incarnation": record.incarnation,
        "run_id": run.run_id,
        "epochs": record.epochs,
        "updates": record.updates,
        "optimizer": record.optimizer,
        "optimizer_spec": config.optimizer,
        "ema": config.ema,
        "init": config.init,
        "inner_optimizer_spec": config.inner_optimizer,
        "compression": str(config.pushes),
        "pull_dtype": config.pull_dtype,
        "weights": weights_crc(current),
        "set": current.settings.to_json(),
        "software": dict(run.software),
        "compute": dict(fingerprint()),
    }


def _begin(
    run_dir: RunDir,
    snapshots: Snapshots,
    run: RunIdentity,
    optimizer_text: str,
    start: Published,
    rounds: Rounds,
) -> None:
    """Make version 0 durable. The run exists once run.json does, which is written after it."""
    if any(snapshots.versions()) or update_log.holds_records(run_dir.path):
        raise UsageError(
            f"{run_dir.path} holds snapshots of a run, but no run.json: it cannot be continued, "
            "and is not overwritten. Restore it from a copy, or name another --run-dir"
        )
    update_log.remove_all(run_dir.path)  # begun by one that did not get as far as run.json
    _save(snapshots, run, optimizer_text, start, rounds)


def _recover(
    loaded: LoadedTask,
    optimizer: AbstractOptimizer,
    updates: int | None,
    rounds: Rounds,
    run: RunIdentity,
    run_dir: RunDir,
    before: RunRecord,
    snapshots: Snapshots,
    *,
    keeps_log: bool,
) -> Recovered:
    """The state that the incarnation before left, for `optimizer` to go on with.

    Until run.json names `optimizer`, what is on disk is what the one before it made,
    numbers that were set of it included: a crash on the way takes nothing back, and
    whichever is asked for next begins from the same.
    """
    tree, incarnation = loaded.task.tree, before.incarnation + 1
    asked = before.asked
    old = optimizer_of(loaded.task, asked.get("optimizer"), asked.get("ema"), before.updates)
    snapshot = _in_rounds(snapshots.newest(), rounds)
    recovery = Recovery(run_dir.path, _log_facts(run), snapshot.facts.version)
    try:
        # With the optimizer that made the log's updates, or they would be others.
        recovered = recover(
            snapshot, recovery, tree, old, incarnation=incarnation, software=run.software
        )
        is_other = (old.text, before.updates) != (optimizer.text, updates)
        if recovered.ends_early or is_other or not keeps_log:
            # A later recovery would replay what is wrong, or with the new optimizer.
            recovered = _without_log(recovered, run_dir, snapshots, run, old.text, rounds)
        if is_other:
            recovered = _handed_over(recovered, loaded, old, optimizer)
    except NotFinite as error:
        raise UsageError(f"the run's snapshot has weights that are not finite: {error}") from None
    for warning in recovered.warnings:
        log.warning("%s", warning)
    log.info(
        "continuing run %s at version %d, as incarnation %d",
        run.run_id, recovered.store.current.version, incarnation,
    )  # fmt: skip
    return recovered


def _without_log(
    recovered: Recovered,
    run_dir: RunDir,
    snapshots: Snapshots,
    run: RunIdentity,
    optimizer_text: str,
    rounds: Rounds,
) -> Recovered:
    """With all of it in a snapshot, and no log, which is not gone on with."""
    if not recovered.is_saved:
        _save(snapshots, run, optimizer_text, recovered.store.current, rounds)
    if update_log.segments(run_dir.path):
        update_log.remove_all(run_dir.path)
    return dataclasses.replace(recovered, is_saved=True)


def _handed_over(
    recovered: Recovered,
    loaded: LoadedTask,
    old: AbstractOptimizer,
    optimizer: AbstractOptimizer,
) -> Recovered:
    """For another optimizer to go on with. `recover` does the same from the old one's snapshot."""
    tree, current = loaded.task.tree, recovered.store.current
    settings, warnings = without_numbers(current.settings, old.text, optimizer.text)
    current = dataclasses.replace(current, settings=settings)
    state = handed_over(current, tree, old, optimizer, current.incarnation)
    return dataclasses.replace(
        recovered,
        store=Store(tree, optimizer, state),
        warnings=(*recovered.warnings, *warnings),
        is_saved=False,
    )


def _begin_log(run: RunIdentity, run_dir: RunDir, recovered: Recovered) -> UpdateLog:
    version = recovered.store.current.version
    return UpdateLog(run_dir.path, _log_facts(run), version=version, sequence=recovered.sequence)


def _check_epochs(rounds: Rounds, current: Published) -> None:
    end = max((end for _, end in current.applied.pairs), default=0)
    if end > rounds.total:
        raise UsageError(
            f"--epochs {rounds.order.epochs} ends before what the run has trained already: it is "
            f"in epoch {(end - 1) // rounds.per_epoch + 1}"
        )


def _log_facts(run: RunIdentity) -> dict[str, str]:
    return {"run_id": run.run_id, "layout": run.layout.fingerprint}


def _in_rounds(snapshot: Snapshot, rounds: Rounds) -> Snapshot:
    """With rounds for the batches that a snapshot counts."""
    facts = snapshot.facts
    done, skipped = (
        rounds.of_batches(Ranges(tuple((start, end) for start, end in pairs)))
        for pairs in (facts.applied, facts.left_out)
    )
    facts = dataclasses.replace(facts, applied=_pairs(done), left_out=_pairs(skipped))
    return Snapshot(facts, snapshot.arrays)


def _pairs(ranges: Ranges) -> list[list[int]]:
    return [list(pair) for pair in ranges.pairs]


def _snapshot_of(
    run: RunIdentity, optimizer_text: str, published: Published, rounds: Rounds
) -> tuple[Facts, dict[str, np.ndarray]]:
    arrays, prefix = arrays_of(run.layout, published)
    facts = Facts(
        run_id=run.run_id,
        task=run.task.name,
        incarnation=published.incarnation,
        version=published.version,
        applied=_pairs(rounds.in_batches(published.applied)),
        left_out=_pairs(rounds.in_batches(published.left_out)),
        settings=published.settings.to_json(),
        optimizer=optimizer_text,
        optimizer_prefix=prefix,
        software=run.software,
        tensors={},
        sessions=published.sessions.to_json(),
    )
    return facts, arrays


def _save(
    snapshots: Snapshots,
    run: RunIdentity,
    optimizer_text: str,
    published: Published,
    rounds: Rounds,
) -> None:
    snapshots.save(*_snapshot_of(run, optimizer_text, published, rounds))


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


def _unjudged(loaded: LoadedTask, config: ServerConfig) -> list[str]:
    """What is to be said of rules that no evaluation of this run's own will meet."""
    if not config.early_stop() or loaded.task.evaluate is not None or loaded.arrays is not None:
        return []
    text = (
        "--stop-when and --patience go by evaluations, and the task has no `evaluate`: unless "
        "another program reports some, the run goes on to its end"
    )
    log.warning("%s", text)
    return [text]
