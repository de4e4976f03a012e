"""`fit` with workers=0: server, worker and evaluations in the calling process, for a debugger.

All code of the task's but the optimizer's runs in the calling thread: a breakpoint in it
stops there, and what it raises goes through as it is. The server has a thread of its own;
it gives nobody's work to another for being slow, since it may be looked at in a debugger.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import RunFailed, Unreachable
from headwater.server.embedded import START_TIMEOUT_S, Server
from headwater.worker.evaluate import Evaluator
from headwater.worker.link import Patience
from headwater.worker.load import LoadedTask
from headwater.worker.loop import Worker
from headwater.worker.platform import ALL_DEVICES, choose_devices
from headwater.worker.task import Task

GRACE_S = 2.5
"""For the server to end in order, unless another is asked for."""

PATIENCE_S = 7 * 24 * 3600.0
"""At a breakpoint."""

LOOK_S = 1.0
"""Between two looks at the status at the least; and for an epoch's last update to be made."""


def train_here(
    task: Task,
    name: str,
    fields: Mapping[str, Any],
    show: Callable[[str], None],
    devices: str = ALL_DEVICES,
) -> Path:
    """Train to the end; the run directory.

    Args:
      task: The task.
      name: What it is called in the run.
      fields: Of `ServerConfig`.
      show: Called now and then with the server's address, to look.
      devices: As --devices of `headwater worker`.

    Raises:
      RunFailed: The run ended with an error. What the user's own code raises goes through.
      UsageError: There are no such devices.
    """
    patient = {"ticket_timeout_s": PATIENCE_S, "compile_timeout_s": PATIENCE_S}
    loaded = LoadedTask(task, name, {}, "")
    chosen = choose_devices(devices)
    with (
        contextlib.ExitStack() as opened,
        Server(task, name=name, **{"grace_s": GRACE_S, **patient, **fields}) as server,
    ):
        evaluator = None
        if task.evaluate is not None:
            evaluator = Evaluator(loaded, server.address, follows=True, min_epoch=1)
            opened.callback(evaluator.close)
        observer = _Observer(server.address, evaluator, show)
        worker = Worker(
            loaded,
            server.address,
            Patience(server.address, START_TIMEOUT_S),
            name="here",
            transport=fields.get("transport", "auto"),
            devices=chosen,
            before_gradient=observer.before_gradient,
            loads_ahead=False,
        )
        server.when_ended(worker.give_up)
        worker.run()
        ended = None
        with contextlib.suppress(TimeoutError):  # it goes on, for the last evaluation
            ended = server.wait(0)
        if ended is not None and ended.state == pb.RUN_FAILED:
            raise RunFailed(ended.message)
        if ended is None:
            observer.at_the_end()
    return server.run_dir


class _Observer:
    """Evaluates and shows, between the worker's gradients."""

    def __init__(
        self, address: str, evaluator: Evaluator | None, show: Callable[[str], None]
    ) -> None:
        self._address = address
        self._evaluator = evaluator
        self._show = show
        self._epoch: int | None = None
        self._looked_time = time.monotonic()

    def before_gradient(self, epoch: int) -> None:
        if self._epoch is not None and epoch > self._epoch and self._evaluator is not None:
            self._evaluator.next(LOOK_S)
        self._epoch = epoch
        if time.monotonic() - self._looked_time > LOOK_S:
            self._show(self._address)
            self._looked_time = time.monotonic()

    def at_the_end(self) -> None:
        with contextlib.suppress(Unreachable):  # it was stopped from elsewhere
            if self._evaluator is not None:
                self._evaluator.next(LOOK_S)
            self._show(self._address)
