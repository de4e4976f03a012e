"""A server from start to end: build it, serve, and end the run in order.

    finished   weights on disk -> `finished` in status -> bye to workers and
               readers -> evaluation of the final version -> exit, if asked to
    stopped    what was begun is applied -> weights on disk -> bye -> exit
    failed     weights on disk -> `failed` with the reason -> bye -> exit 1

Nothing here waits without a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import jax
import numpy as np

from headwater import __version__
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.protos.errors import UsageError
from headwater.protos.layout import LayoutError
from headwater.protos.rpc import join_address, split_address
from headwater.server.config import ServerConfig
from headwater.server.coordinator import Coordinator
from headwater.server.encoder import Encoder
from headwater.server.identity import RunIdentity
from headwater.server.optimizer import check, resolve
from headwater.server.order import ORDER_VERSION, BatchOrder
from headwater.server.run_dir import RunDir
from headwater.server.service import Service
from headwater.server.status import status
from headwater.server.store import NotFinite, Published, Store
from headwater.worker.load import LoadedTask
from headwater.worker.task import TaskError
from headwater.worker.user_code import guard_user_code

log = logging.getLogger("headwater.server")

TICK_S = 0.25
STANDSTILL_S = 1.0
"""A tick later than this means that the process itself was stopped."""
PROGRESS_S = 1.0
"""Between progress lines in metrics.jsonl."""
SAVE_RETRY_S = 2.0
SAVE_TIMEOUT_S = 600.0
"""For somebody to make room on the disk for the final weights; `pull` can take them meanwhile."""
CLOSE_TIMEOUT_S = 2.0
"""For streams to end after bye."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything of a run that is made before it is served."""

    config: ServerConfig
    identity: RunIdentity
    order: BatchOrder
    store: Store
    run_dir: RunDir
    optimizer_text: str
    awaits_evaluation: bool


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a server ended."""

    state: pb.RunState
    version: int
    message: str
    """With RUN_FAILED, why."""
    saved: bool
    """Whether that version is on disk."""


def prepare(loaded: LoadedTask, config: ServerConfig) -> Prepared:
    """Load the data's length, make the initial weights, compile the update, make the run directory.

    Raises:
      UsageError: The task, an option or the run directory cannot work; says which.
    """
    task = loaded.task
    _check_port_is_free(config.listen)
    try:
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
        with guard_user_code("Task.init raised"):
            params = task.init(jax.random.key(order.seed))
        task.tree.check(params)
        check(optimizer, params)
        store = Store(task.tree, params, optimizer, incarnation=1)
    except NotFinite as error:
        raise UsageError(f"Task.init gave weights that are not finite: {error}") from None
    except (TaskError, LayoutError) as error:
        raise UsageError(str(error)) from None
    order.prepare(0)
    run_dir = RunDir(config.run_dir, loaded.name)
    run_dir.write_run(
        {
            "incarnation": 1,
            "task": loaded.name,
            "options": dict(loaded.options),
            "layout": store.layout.fingerprint,
            "example_count": order.example_count,
            "batch_size": order.batch_size,
            "epochs": order.epochs,
            "seed": order.seed,
            "order_version": ORDER_VERSION,
            "optimizer": optimizer.text,
            "consistency": config.consistency,
            "headwater": __version__,
        }
    )
    return Prepared(
        config,
        RunIdentity(run_dir.run_id, identity, store.layout, loaded.software()),
        order,
        store,
        run_dir,
        optimizer.text,
        awaits_evaluation=config.await_evaluation and task.evaluate is not None,
    )


class Serving:
    """One server on the running event loop. `run` returns when it has ended."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._stopping = asyncio.Event()
        self._done: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._encoder = Encoder(prepared.store.layout)
        self.run_state = Coordinator(
            prepared.store,
            prepared.order,
            prepared.identity,
            prepared.config,
            self._done.set_result,
            run_dir=str(prepared.run_dir.path),
            optimizer_text=prepared.optimizer_text,
        )

    def stop(self) -> None:
        """End the server in order. Call on the event loop; may be called again."""
        self._stopping.set()

    async def run(self, on_ready: Callable[[str], None]) -> Ended:
        """Serve until the run is over; `on_ready` gets the address once it is open.

        Raises:
          UsageError: The port is taken.
        """
        run, config = self.run_state, self._prepared.config
        server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
        service = Service(run, self._encoder, self.stop, self._log_evaluation)
        server.add_generic_rpc_handlers((rpc.handlers(service),))
        host, _ = split_address(config.listen, "--listen")
        try:
            port = server.add_insecure_port(config.listen)
        except RuntimeError:
            raise port_taken(config.listen) from None
        await server.start()
        on_ready(join_address(host, port))
        began = time.monotonic()
        try:
            async with self._background(self._tick(), self._log_progress(), self._shuffle_ahead()):
                stopped = asyncio.create_task(self._stopping.wait())
                ends: list[asyncio.Future[Any]] = [stopped, self._done]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                stopped.cancel()
            ended = await self._end()
        finally:
            await server.stop(CLOSE_TIMEOUT_S)
            self._encoder.close()
            await asyncio.to_thread(run.applier.close)
        self._log_end(ended, time.monotonic() - began)
        return ended

    # ------------------------------------------------------------------ ending

    async def _end(self) -> Ended:
        run = self.run_state
        error = self._done.result() if self._done.done() else None
        finished = self._done.done() and error is None
        if not finished:
            await run.stop_training(apply_held=error is None)
        saved = await self._save_patiently(run.current)
        if not saved and finished:
            error = f"the final weights could not be written to {run.run_dir}"
        run.state_override = (
            pb.RUN_FAILED if error else pb.RUN_FINISHED if finished else pb.RUN_STOPPING
        )
        if error:
            run.problems.append(error)
        run.end_waits()
        run.bye_to_all()
        if finished and not error:
            if not self._prepared.config.exit_when_done:
                log.info(
                    "finished at version %d; still serving the weights, end with `headwater stop`",
                    run.current.version,
                )
                async with self._background(self._tick()):
                    await self._stopping.wait()
            else:
                await self._wait_for_evaluation()
        return Ended(run.state_override, run.current.version, error or "", saved)

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
        """Make a version durable; when the disk will not have it, try until somebody stops us."""
        run = self.run_state
        end = run.clock() + SAVE_TIMEOUT_S
        while (problem := await self._save(published)) is not None:
            if self._stopping.is_set() or run.clock() > end:
                return False
            if problem not in run.problems:
                run.problems.append(problem)
                log.error(
                    "%s; trying again for %.0f min: make room, or take them with `headwater pull`",
                    problem,
                    SAVE_TIMEOUT_S / 60,
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), SAVE_RETRY_S)
        return True

    async def _save(self, published: Published) -> str | None:
        """Make a version durable; returns what was wrong, if anything."""
        run, layout = self.run_state, self.run_state.layout
        names = [spec.name for spec in layout.tensors]
        arrays = dict(zip(names, map(np.asarray, published.leaves), strict=True))
        metadata = {
            "run_id": run.identity.run_id,
            "task": run.identity.task.name,
            "incarnation": str(published.incarnation),
            "version": str(published.version),
        }
        try:
            await asyncio.to_thread(self._prepared.run_dir.save_weights, arrays, metadata)
        except OSError as error:
            return f"the weights of version {published.version} could not be written: {error}"
        run.durable_version = published.version
        return None

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
                self.run_state.shift(now - last - TICK_S)
            last = now
            self.run_state.tick()

    async def _shuffle_ahead(self) -> None:
        """Have the next epoch's order ready before its first lease."""
        order, prepared = self._prepared.order, 0
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
                "epoch": self.run_state.ledger.epoch,
                "metrics": metrics,
                "seconds": report.duration_s,
            },
        )

    def _log_end(self, ended: Ended, seconds: float) -> None:
        newest = self.run_state.evaluations.newest
        final = newest is not None and newest.version == ended.version
        self._log("progress", _progress(status(self.run_state)))
        self._log(
            "end",
            {
                "state": _state_name(ended.state),
                "version": ended.version,
                "metrics": dict(newest.metrics) if newest is not None and final else {},
                "seconds": seconds,
                "updates_per_second": ended.version / seconds if seconds else 0.0,
            },
        )

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        try:
            self._prepared.run_dir.log_metrics(kind, values)
        except OSError as error:
            message = f"metrics.jsonl could not be written: {error.strerror}"
            if message not in self.run_state.problems:
                self.run_state.problems.append(message)
                log.error("%s", message)


def port_taken(listen: str) -> UsageError:
    return UsageError(
        f"{listen} is in use or not an address of this machine; stop what listens there, or choose "
        "another with --listen HOST:PORT (port 0 takes a free one)"
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
            raise port_taken(listen) from None


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
        "staleness_max": now.staleness.max,
        "workers": len(now.workers),
    }


def _state_name(state: pb.RunState) -> str:
    return {pb.RUN_FINISHED: "finished", pb.RUN_FAILED: "failed"}.get(state, "stopped")
