"""The command-line options that all commands with a task have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from headwater.protos.rpc import Transport

TaskArg = Annotated[
    str, typer.Option(metavar="TASK", help="file.py[:NAME] or package.module[:NAME].")
]
TaskOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--task-option",
        metavar="NAME=VALUE",
        help="An argument of the task's function; may be given again.",
    ),
]
Platform = Annotated[
    str | None,
    typer.Option(
        metavar="cpu|gpu|tpu", help="Where it computes. Default: JAX's own choice; for PyTorch cpu."
    ),
]
DevicesOption = Annotated[
    str,
    typer.Option(
        metavar="all|N|0,1",
        help="Local devices that a batch is split over: all, the first N, or these.",
    ),
]
TransportOption = Annotated[
    Transport,
    typer.Option(
        metavar="auto|grpc|shm",
        help="How tensors travel on one machine: shared memory where possible; gRPC always; "
        "shared memory or nothing.",
    ),
]
