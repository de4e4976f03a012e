"""`headwater worker`: computes gradients for a server until the run is over."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Annotated

import typer

from headwater.protos import command
from headwater.protos.reproducible import fix
from headwater.protos.rpc import DEFAULT_ADDRESS
from headwater.worker.link import Patience, consistency_of
from headwater.worker.options import (
    DevicesOption,
    Platform,
    TaskArg,
    TaskOptions,
    TransportOption,
)
from headwater.worker.platform import check_devices, choose_devices, choose_platform

if TYPE_CHECKING:
    from headwater.worker.loop import Worker

app = command.new_app()


@app.command()
def worker(
    task: TaskArg,
    task_option: TaskOptions = None,
    server: command.ServerAddress = DEFAULT_ADDRESS,
    name: Annotated[str, typer.Option(help="Shown in status. Default: worker-N.")] = "",
    platform: Platform = None,
    devices: DevicesOption = "all",
    transport: TransportOption = "auto",
    connect_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="For the first connection. After one success it tries without end.",
        ),
    ] = 60.0,
) -> None:
    """Compute gradients for a server. Ctrl-C or SIGTERM finishes the one in hand and leaves."""
    check_devices(devices)
    patience = Patience(server, connect_timeout)
    # Before JAX starts its threads. Who sets NPROC, as `run` does, has seen to the rest as well.
    if "NPROC" not in os.environ and consistency_of(server, patience).startswith("sync"):
        fix(os.environ)
    choose_platform(platform)
    from headwater.worker.load import load_task_on
    from headwater.worker.loop import Worker
    from headwater.worker.user_code import guard_user_code

    loaded = load_task_on(platform, task, task_option or ())
    chosen = choose_devices(devices) if loaded.task.backend is None else ()
    with guard_user_code(f"the task {loaded.name} raised"):
        life = Worker(loaded, server, patience, name=name, transport=transport, devices=chosen)
        with _leaving_on_signals(life) as received:
            life.run()
    if signal.SIGINT in received:
        raise KeyboardInterrupt


class _leaving_on_signals:  # noqa: N801  (used as a function)
    """The first signal makes the worker leave in order; the second ends it at once."""

    def __init__(self, life: Worker) -> None:
        self._life = life
        self._received: list[int] = []

    def __enter__(self) -> list[int]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        return self._received

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_signal(self, number: int, _: object) -> None:
        if self._received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received.append(number)
        self._life.leave()


def main() -> None:
    command.watch_lifeline(lambda: os.kill(os.getpid(), signal.SIGTERM))
    command.run(app, "headwater worker")
