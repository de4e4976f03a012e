"""A server from its first reply to its exit; what is made before that: prepare.py.

    finished   snapshot -> `finished` in status -> bye to workers and readers
               -> evaluation of the final version -> exit, if asked to
    stopped    not serving -> gradients under way come in -> snapshot -> bye -> exit
    failed     snapshot -> `failed` with the reason -> bye -> exit 1

A server that is killed at any point of this goes on from there when it is
started again. Nothing here waits without a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.protos.compression import NONE
from headwater.protos.rpc import join_address, split_address
from headwater.protos.weights_file import save_weights
from headwater.server import failpoints
from headwater.server.coordinator import Coordinator
from headwater.server.door import open_door
from headwater.server.encoder import Encoder
from headwater.server.pace import Pace
from headwater.server.packed_versions import EvaluationVersions, PackedVersions
from headwater.server.prepare import PortTaken, Prepared
from headwater.server.run_state import Run
from headwater.server.saver import Saver
from headwater.server.service import Service
from headwater.server.session import Ways
from headwater.server.slots import VersionSlots
from headwater.server.status import status
from headwater.server.store import Published
from headwater.server.update_log import LogBroken, NoRoom

log = logging.getLogger("headwater.server")

TICK_S = 0.25
STANDSTILL_S = 1.0
"""A tick later than this means that the process itself was stopped."""
PROGRESS_S = 1.0
"""Between progress lines in metrics.jsonl."""
SAVE_RETRY_S = 2.0
SAVE_TIMEOUT_S = 600.0
"""For somebody to make room on the disk for the final weights; `pull` can take them meanwhile."""
LINGER_S = 0.6
"""For those who ask for the status again and again to see the last one."""
CLOSE_TIMEOUT_S = 2.0
"""For streams to end after bye."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a server ended."""

    state: pb.RunState
    version: int
    message: str
    """With RUN_FAILED, why."""
    durable_version: int
    """The newest that is on disk."""

    @property
    def saved(self) -> bool:
        """Whether the version that it ended at is on disk."""
        return self.durable_version >= self.version


class Serving:
    """One server on the running event loop. `run` returns when it has ended."""

    def __init__(self, prepared: Prepared, pace: Pace | None = None) -> None:
        self._prepared = prepared
        self._stopping = asyncio.Event()
        self._done: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        evaluation = None if prepared.evaluation is None else _report(prepared.evaluation)
        layout = prepared.store.layout
        door = open_door(prepared.config.transport)
        packed = PackedVersions(layout.moving, prepared.config.pulls)
        readers = Encoder(PackedVersions(layout, NONE))
        self._evaluated = EvaluationVersions(prepared.store.tree, prepared.store.optimizer)
        evaluators = Encoder(self._evaluated) if self._evaluated.differs else readers
        self._ways = Ways(Encoder(packed), readers, evaluators, VersionSlots(packed), door)
        self._health = health.aio.HealthServicer()
        self._grace_ends = 0.0
        self._early_stop = prepared.config.early_stop()
        self._is_good_enough = asyncio.Event()
        self.run_state = Run(
            prepared.store,
            prepared.rounds,
            prepared.identity,
            prepared.config,
            self._done.set_result,
            run_dir=str(prepared.run_dir.path),
            optimizer_text=prepared.optimizer_text,
            inner_optimizer=prepared.inner_optimizer,
            settings=prepared.settings,
            pace=pace,
            starts=prepared.starts,
        )
        self.run_state.evaluations.needs_optimizer_state = self._evaluated.differs
        self.run_state.evaluations.newest = evaluation
        for number, warning in enumerate(prepared.warnings):
            self.run_state.problems[f"recovery-{number}"] = warning
        # Last, because it starts threads: what fails here comes before them.
        self._coordinator = Coordinator(
            self.run_state,
            prepared.store,
            self._log,
            update_log=prepared.log,
            history=prepared.history,
        )
        self._updates = self._coordinator.updates
        self._saver = Saver(self.run_state, self._updates, prepared)

    async def stopping(self) -> None:
        """Returns when the server was told to end."""
        await self._stopping.wait()

    def stop(self) -> None:
        """End the server in order. Call on the event loop; may be called again."""
        if not self._stopping.is_set():
            grace_s = self._prepared.config.grace_s
            self._grace_ends = self.run_state.clock() + grace_s
            self._prepared.run_dir.ends_within(grace_s)
            self._stopping.set()

    def allow_epochs(self, count: int) -> None:
        """Let so many epochs be begun, of those of `Pace`. Call on the event loop."""
        self._coordinator.allow_epochs(count)

    async def run(self, on_ready: Callable[[str], None]) -> Ended:
        """Serve until the run is over; `on_ready` gets the address once it is open.

        Raises:
          UsageError: The port is taken.
        """
        run, config = self.run_state, self._prepared.config
        server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
        service = Service(
            self._coordinator, self._ways, self._saver, self.stop, self._log_evaluation
        )
        server.add_generic_rpc_handlers((rpc.handlers(service),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        host, _ = split_address(config.listen, "--listen")
        try:
            port = server.add_insecure_port(config.listen)
        except RuntimeError:
            self._ways.close()
            self._close_applier()
            raise PortTaken(config.listen) from None
        for name in ("", rpc.SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        on_ready(join_address(host, port))
        first = run.current.version
        self._coordinator.begin()
        try:
            async with self._background(
                self._tick(),
                self._log_progress(),
                self._shuffle_ahead(),
                self._saver.save_when_due(),
            ):
                told = [
                    asyncio.create_task(event.wait())
                    for event in (self._stopping, self._is_good_enough)
                ]
                ends: list[asyncio.Future[Any]] = [*told, self._done]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for task in told:
                    task.cancel()
                ended = await self._end()
        finally:
            await server.stop(CLOSE_TIMEOUT_S)
            self._ways.close()
            await asyncio.to_thread(self._close_applier)
        self._log_end(ended, first)
        return ended

    def _close_applier(self) -> None:
        journal = self._updates.journal
        if journal is not None:
            journal.give_up()
        self._updates.applier.close()
        self._prepared.history.close()
        if journal is not None:
            try:
                journal.close()
            except (NoRoom, LogBroken) as error:
                log.warning("the update log could not be closed in order: %s", error)

    # ------------------------------------------------------------------ ending

    async def _end(self) -> Ended:
        run = self.run_state
        error = self._done.result() if self._done.done() else None
        finished = self._done.done() and error is None
        if finished:
            # Pushes of sessions may be behind the last batch.
            await self._coordinator.stop_training(apply_held=False)
            failpoints.reach("end-applied")
        else:
            finished = error is None and not self._stopping.is_set()  # by its evaluations
            if not finished:
                await self._health.enter_graceful_shutdown()  # NOT_SERVING, to all who ask
            if error is None:
                await self._coordinator.drain(self._prepared.config.grace_s / 2)
            await self._coordinator.stop_training(apply_held=error is None)
            if error is None and self._done.done():  # what came on its way failed
                error = self._done.result()
        saved = not run.log_broken and await self._save_patiently(run.current)
        if not saved and finished:
            error = f"the final weights could not be written to {run.run_dir}"
        failpoints.reach("end-durable")
        run.state_override = (
            pb.RUN_FAILED if error else pb.RUN_FINISHED if finished else pb.RUN_STOPPING
        )
        if error:
            run.problems["end"] = error
        failpoints.reach("end-finished")
        self._coordinator.end_waits()
        if run.log_broken:
            self._coordinator.cut_all("the server's disk failed")
        else:
            self._coordinator.bye_to_all()
        failpoints.reach("end-bye")
        await self._let_lookers_see(run.clock())
        if finished and not error:
            if not self._prepared.config.exit_when_done:
                log.info(
                    "finished at version %d; still serving the weights, end with `headwater stop`",
                    run.current.version,
                )
                await self._stopping.wait()
                await self._health.enter_graceful_shutdown()
            else:
                await self._wait_for_evaluation()
        failpoints.reach("end-evaluated")
        return Ended(run.state_override, run.current.version, error or "", run.durable_version)

    async def _let_lookers_see(self, since: float) -> None:
        """Go on for a moment, so that those who watch learn how it ended."""
        run = self.run_state
        while run.lookers.unaware(since) and run.clock() - since < LINGER_S:  # noqa: ASYNC110
            await asyncio.sleep(LINGER_S / 20)  # asked for by nobody who could set an event

    async def _wait_for_evaluation(self) -> None:
        run, patience = self.run_state, self._prepared.config.evaluation_timeout_s
        end = run.clock() + patience
        said = False
        while run.clock() < end and not self._stopping.is_set():
            version, now = run.current.version, run.clock()
            if run.evaluations.is_done(version) or not (
                self._prepared.awaits_evaluation or run.evaluations.expected(now, patience)
            ):
                return
            if not said:
                log.info("waiting up to %.0f s for the evaluation of the final version", patience)
                said = True
            await asyncio.sleep(0.05)

    async def _save_patiently(self, published: Published) -> bool:
        """Make a version durable; when the disk will not have it, try until the time is up.

        When told to stop, that is the grace; else SAVE_TIMEOUT_S.
        """
        run = self.run_state
        end = run.clock() + SAVE_TIMEOUT_S
        while await self._saver.save(published) is not None:
            if run.clock() > (self._grace_ends if self._stopping.is_set() else end):
                return False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), SAVE_RETRY_S)
            if self._stopping.is_set():
                await asyncio.sleep(min(SAVE_RETRY_S, 0.5))
        await self._save_weights(published)
        return True

    async def _save_weights(self, published: Published) -> None:
        """Leave the weights alone as a file of their own, for those who want nothing else.

        And those for evaluation as another, where the optimizer has such.
        """
        run, run_dir = self.run_state, self._prepared.run_dir
        metadata = {
            "run_id": run.identity.run_id,
            "task": run.identity.task.name,
            "incarnation": str(published.incarnation),
            "version": str(published.version),
        }
        files: dict[Path, Sequence[Any]] = {run_dir.weights_path: published.tensors}
        if self._evaluated.differs:
            found = await asyncio.to_thread(self._evaluated.arrays, published)
            files[run_dir.evaluation_path] = found
        names = [spec.name for spec in run.layout.tensors]
        for path, tensors in files.items():
            weights = dict(zip(names, map(np.asarray, tensors), strict=True))
            try:
                await asyncio.to_thread(save_weights, path, weights, metadata)
            except OSError as error:
                run.problems["weights"] = (
                    f"{path} could not be written: {error.strerror}; "
                    f"the weights are in {self._prepared.snapshots.path(published.version)}"
                )
                log.error("%s", run.problems["weights"])

    # -------------------------------------------------------------- background

    @contextlib.asynccontextmanager
    async def _background(self, *jobs: Any) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(job) for job in jobs]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    log.error("a background job failed", exc_info=result)

    async def _tick(self) -> None:
        clock = self.run_state.clock
        last = clock()
        while True:
            await asyncio.sleep(TICK_S)
            now = clock()
            if now - last > TICK_S + STANDSTILL_S:
                log.warning("the server stood still for %.1f s; deadlines are moved", now - last)
                self._coordinator.shift(now - last - TICK_S)
            last = now
            self._coordinator.tick()

    async def _shuffle_ahead(self) -> None:
        """Have the next epoch's order ready before its first lease."""
        order, prepared = self._prepared.rounds.order, 0
        while prepared < order.epochs:
            wanted = self.run_state.ledger.epoch + 2
            while prepared < min(wanted + 1, order.epochs):
                await asyncio.to_thread(order.prepare, prepared)
                prepared += 1
            await asyncio.sleep(TICK_S)

    async def _log_progress(self) -> None:
        logged = -1
        while True:
            await asyncio.sleep(PROGRESS_S)
            await asyncio.to_thread(self._prepared.history.flush)
            if problem := self._prepared.history.problem:
                self.run_state.problems["history"] = problem
            else:
                self.run_state.problems.pop("history", None)
            now = status(self.run_state)
            if now.stamp.version != logged:
                logged = now.stamp.version
                await asyncio.to_thread(self._log, "progress", _progress(now))

    def _log_evaluation(self, report: pb.EvaluationReport) -> None:
        metrics = dict(report.metrics)
        log.info(
            "evaluation of version %d: %s",
            report.version,
            ", ".join(f"{k} {v:.4g}" for k, v in sorted(metrics.items())),
        )
        self._log(
            "evaluation",
            {
                "version": report.version,
                "epoch": report.epoch if report.HasField("epoch") else self.run_state.ledger.epoch,
                "metrics": metrics,
                "seconds": report.duration_s,
            },
        )
        self._judge(report.version, metrics)

    def _judge(self, version: int, metrics: Mapping[str, float]) -> None:
        """End the run where the evaluation is as --stop-when or --patience has it."""
        if self.run_state.is_done or self._is_good_enough.is_set():
            return
        problems = self.run_state.problems
        problems.pop("early stop", None)
        if missing := self._early_stop.missing(metrics):
            names, known = " and no ".join(map(repr, missing)), ", ".join(sorted(metrics))
            problems["early stop"] = (
                f"the evaluation has no {names}, which --stop-when or --patience goes by; it has "
                f"{known or 'nothing'}"
            )
            log.warning("%s", problems["early stop"])
        if reason := self._early_stop.add(version, metrics):
            log.info("the run is over: %s", reason)
            self._log("early stop", {"version": version, "reason": reason})
            self._is_good_enough.set()

    def _log_end(self, ended: Ended, first: int) -> None:
        seconds = self.run_state.figures.training_s
        newest = self.run_state.evaluations.newest
        final = newest is not None and newest.version == ended.version
        self._log("progress", _progress(status(self.run_state)))
        self._log(
            "end",
            {
                "state": _state_name(ended.state),
                "version": ended.version,
                "metrics": dict(sorted(newest.metrics.items())) if newest and final else {},
                "skipped": len(self.run_state.current.left_out),
                "seconds": seconds,
                "updates_per_second": (ended.version - first) / seconds if seconds else 0.0,
            },
        )

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        problems = self.run_state.problems
        try:
            self._prepared.run_dir.log_metrics(kind, values)
            problems.pop("metrics", None)
        except OSError as error:
            if "metrics" not in problems:
                problems["metrics"] = f"metrics.jsonl could not be written: {error.strerror}"
                log.error("%s", problems["metrics"])


def _progress(now: pb.StatusReply) -> dict[str, Any]:
    return {
        "version": now.stamp.version,
        "epoch": now.epoch,
        "batches_applied": now.batches_applied,
        "loss": now.loss if now.HasField("loss") else None,
        "training_metrics": dict(now.training_metrics),
        "updates_per_second": now.updates_per_second,
        "examples_per_second": now.examples_per_second,
        "staleness_mean": now.staleness.mean,
        "staleness_p50": now.staleness.p50,
        "staleness_p99": now.staleness.p99,
        "staleness_max": now.staleness.max,
        "wait_s": now.times.wait_s,
        "load_s": now.times.load_s,
        "compute_s": now.times.compute_s,
        "wire_s": now.times.wire_s,
        "workers": len(now.workers),
        "session_updates": now.session_updates,
    }


def _state_name(state: pb.RunState) -> str:
    return {pb.RUN_FINISHED: "finished", pb.RUN_FAILED: "failed"}.get(state, "stopped")


def _report(line: dict[str, Any]) -> pb.EvaluationReport:
    """An evaluation as metrics.jsonl has it."""
    metrics = {name: value for name, value in line["metrics"].items() if value is not None}
    return pb.EvaluationReport(version=line["version"], metrics=metrics, duration_s=line["seconds"])
