"""A server inside the calling process, for notebooks and tests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from headwater.protos.errors import HeadwaterError, UsageError
from headwater.server.config import ServerConfig
from headwater.server.pace import Pace
from headwater.server.prepare import prepare
from headwater.server.serve import Ended, Serving
from headwater.server.store import Published
from headwater.worker.load import LoadedTask
from headwater.worker.task import Task
from headwater.worker.tree import ModelTree

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0


class Server:
    """Serves a task from a thread of this process.

        with Server(task) as server:
            ...  # workers join at server.address

    Args:
      task: The task; workers must have the same one under the same `name`.
      name: What workers' --task is called: a file's stem, or a module's last part.
      pace: Of a program that leads the run by epochs.
      options: See `ServerConfig`; `listen` is a free port of 127.0.0.1 unless given.

    Raises:
      UsageError: The task or an option cannot work.
    """

    def __init__(
        self, task: Task, *, name: str = "task", pace: Pace | None = None, **options: Any
    ) -> None:
        self._pace = pace
        known = {field.name for field in dataclasses.fields(ServerConfig)}
        if unknown := options.keys() - known:
            from headwater.server.keywords import meant

            name = min(unknown)
            raise UsageError(f"Server takes no {name!r}{meant(name, known)}")
        config = ServerConfig(**{"listen": "127.0.0.1:0", **options})
        self._prepared = prepare(LoadedTask(task, name, {}, ""), config)
        self.address = ""
        """HOST:PORT, once started."""
        self.run_dir = self._prepared.run_dir.path
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serving: Serving | None = None
        self._ready: Future[str] = Future()
        self._ended: Future[Ended] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run()), name="headwater-server", daemon=True
        )

    def __enter__(self) -> Server:
        self._thread.start()
        self.address = self._ready.result(START_TIMEOUT_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End in order and wait for it, a minute at most.

        Raises:
          HeadwaterError: It did not end in time.
        """
        if self._loop is not None and self._serving is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._serving.stop)
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            raise HeadwaterError(f"the server did not end within {STOP_TIMEOUT_S:.0f} s")
        self._prepared.run_dir.close()

    def wait(self, timeout_s: float | None = None) -> Ended:
        """Wait for the server to end by itself; only with `exit_when_done` does it.

        Raises:
          TimeoutError: It has not ended in time.
        """
        return self._ended.result(timeout_s)

    def when_ended(self, call: Callable[[], None]) -> None:
        """Have it called, in a thread of the server's, when the server has ended."""
        self._ended.add_done_callback(lambda _: call())

    @property
    def published(self) -> Published:
        """The newest version, without a copy."""
        serving = self._serving
        return self._prepared.store.current if serving is None else serving.run_state.current

    @property
    def tree(self) -> ModelTree:
        """Of the model that is served."""
        return self._prepared.store.tree

    def allow_epochs(self, count: int) -> None:
        """Let so many epochs be begun; see `Pace`."""
        if self._loop is not None and self._serving is not None:
            with contextlib.suppress(RuntimeError):  # the server has ended, as `wait` tells
                self._loop.call_soon_threadsafe(self._serving.allow_epochs, count)

    async def _run(self) -> None:
        try:
            self._loop = asyncio.get_running_loop()
            self._serving = self._begin()
            self._ended.set_result(await self._serving.run(self._ready.set_result))
        except BaseException as error:
            has_started = self._ready.done()
            if not has_started:
                self._prepared.run_dir.close()  # before it is told: there will be no `stop`
            for future in (self._ready, self._ended):
                if not future.done():
                    future.set_exception(error)
            if has_started:
                raise  # else `__enter__` does

    def _begin(self) -> Serving:
        try:
            return Serving(self._prepared, self._pace)
        except BaseException:
            self._prepared.close()
            raise
