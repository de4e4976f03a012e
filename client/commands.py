"""The commands that look at a server and steer it, and `run`, which starts one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from headwater import __version__
from headwater.client import show
from headwater.client.client import Client
from headwater.client.main import PROCESSES, hand_over
from headwater.client.status import OVER, Status
from headwater.protos import plain_json
from headwater.protos.command import ServerAddress, new_app
from headwater.protos.errors import HeadwaterError, Unreachable, UsageError
from headwater.protos.rpc import DEFAULT_ADDRESS

log = logging.getLogger("headwater.client")

ASK_S = 0.25
"""Seconds between `watch`'s questions."""

GONE_S = 60.0
"""Seconds without an answer after which `watch` gives a server up."""

STOP_TIMEOUT_S = 30.0
"""For a server to be gone after `stop`."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = new_app(
    help="A parameter server for JAX. Start a server, start workers anywhere, look and steer.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"headwater {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def headwater_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


_ANY_ARGUMENTS = {
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "help_option_names": [],
}


def _list_process(name: str, help_text: str) -> None:
    """Have `headwater --help` list a command that is a process of its own."""

    def command(context: typer.Context) -> None:
        hand_over(name, context.args)

    app.command(name, help=help_text, context_settings=_ANY_ARGUMENTS)(command)


for _name, (_, _help) in PROCESSES.items():
    _list_process(_name, _help)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def run(
    context: typer.Context,
    task: Annotated[
        str, typer.Option(metavar="TASK", help="file.py[:NAME] or package.module[:NAME].")
    ],
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Worker processes here.")] = 2,
    task_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An argument of the task's function; repeatable."),
    ] = None,
    platform: Annotated[
        str | None, typer.Option(metavar="cpu|gpu|tpu", help="Where the workers compute.")
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="all|N|0,1",
            help="Devices that a worker splits its batches over, of those it sees: GPUs are dealt "
            "out among the workers first. Default: all; in sync mode 1.",
        ),
    ] = None,
) -> None:
    """Train here: a server, N workers, a progress bar, and the final metrics.

    Every option of `headwater server` may be given as well, such as --epochs, --listen, --run-dir.
    """
    from headwater.client.interrupts import Stopped
    from headwater.client.run import Training, print_result

    training = Training(
        task=task,
        task_options=task_option or [],
        workers=workers,
        platform=platform,
        devices=devices,
        server_options=context.args,
    )
    try:
        facts = training.run()
    except Stopped as stopped:
        raise typer.Exit(128 + stopped.number) from None
    print_result(facts)


# ------------------------------------------------------------------- looking


@app.command()
def new(
    path: Annotated[Path, typer.Argument(metavar="TASK.py", help="The file to write.")],
) -> None:
    """Write a commented task that trains as it is, to make your own of."""
    text = files("headwater.examples").joinpath("starter.py").read_text()
    if path.suffix != ".py":
        raise UsageError(f"{path}: a task is a Python file; name it {path}.py")
    try:
        with path.open("x") as file:
            file.write(text.replace("starter.py", str(path)))
    except FileExistsError:
        raise UsageError(f"{path} is there already, and is not overwritten") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    print(f"wrote {path}; next:")
    print(f"    headwater check --task {path}")
    print(f"    headwater run --task {path} --workers 2")


@app.command()
def status(server: ServerAddress = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """How the run is doing."""
    with Client(server) as client:
        found = client.status()
    if as_json:
        _print_json(found)
    else:
        _print_table(show.status_screen(found))


@app.command()
def workers(server: ServerAddress = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Who is connected, and what each one does."""
    with Client(server) as client:
        found = client.status()["workers"]
    if as_json:
        _print_json(found)
    elif found:
        _print_table(show.workers_table(found))
    else:
        print(
            "no worker is connected; start one with: "
            f"headwater worker --task TASK --server {server}"
        )


@app.command()
def watch(
    server: ServerAddress = DEFAULT_ADDRESS,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Between looks.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line.")] = False,
) -> None:
    """Status and workers, live until the run is over; a line a look where there is no terminal."""
    console = Console()
    with Client(server) as client:
        looks = _looks(client, interval)
        if as_json:
            for found in looks:
                _print_json(found, indent=None)
        elif console.is_terminal and not console.is_dumb_terminal:
            with Live(console=console, auto_refresh=False) as live:
                for found in looks:
                    live.update(show.watch_screen(found), refresh=True)
        else:
            for found in looks:
                print(show.one_line(found), flush=True)


def _looks(client: Client, interval_s: float) -> Iterator[Status]:
    """The status, once an interval until the run is over.

    Asks more often than that, for a server that ends waits only for those who
    asked a moment ago (ending in server/serve.py).

    Raises:
      Unreachable: At the first look, or when the server is gone for a minute.
    """
    found = client.status(watches=True)
    heard, gone = time.monotonic(), False
    while True:
        yield found
        if found["state"] in OVER:
            return
        next_look = time.monotonic() + interval_s
        while time.monotonic() < next_look or gone:
            time.sleep(min(ASK_S, interval_s))
            try:
                found, gone = client.status(watches=True), False
                heard = time.monotonic()
                if found["state"] in OVER:
                    break
            except Unreachable as error:
                if not gone:
                    log.warning("%s; waiting for it, %.0f s at most", error, GONE_S)
                gone = True
                if time.monotonic() - heard > GONE_S:
                    raise


@app.command()
def pull(
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="Written whole or not.")],
    server: ServerAddress = DEFAULT_ADDRESS,
    evaluation: Annotated[
        bool,
        typer.Option(
            "--evaluation", help="Those to evaluate: the average (--ema), say, if there is one."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take the newest weights, as one safetensors file."""
    from headwater.protos.weights_file import save_weights

    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent} to write {out.name} into")
    began = time.perf_counter()
    with Client(server) as client:
        weights = client.pull(for_evaluation=evaluation)
    facts = {
        "run_id": weights.run_id,
        "incarnation": weights.incarnation,
        "version": weights.version,
        "epoch": weights.epoch,
    }
    try:
        save_weights(out, weights, {name: str(value) for name, value in facts.items()})
    except OSError as error:
        raise HeadwaterError(
            f"{out} could not be written: {error.strerror}; what was there before is as it was"
        ) from None
    count = sum(array.nbytes for array in weights.values())
    if as_json:
        _print_json({"file": str(out), "tensors": len(weights), "bytes": count, **facts})
    else:
        print(
            f"version {weights.version} of run {weights.run_id}: {len(weights)} tensors, "
            f"{show.size(count)}, in {time.perf_counter() - began:.2f} s -> {out}"
        )


@app.command("check-snapshot")
def check_snapshot(
    snapshots: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="snapshot-….safetensors of a run.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a file.")] = False,
) -> None:
    """Check every byte of a snapshot, and say what it holds. Needs no server."""
    from headwater.client.check_snapshot import check, lines

    failed = []
    for path in snapshots:
        found = check(path)
        if as_json:
            _print_json(found, indent=None)
        elif found["error"] is None:
            print("\n".join(lines(found)), flush=True)
        if found["error"] is not None:
            failed.append(found["error"])
    if failed:
        raise HeadwaterError("; ".join(failed))


# ------------------------------------------------------------------ steering


@app.command()
def pause(server: ServerAddress = DEFAULT_ADDRESS) -> None:
    """Hold the weights at their version, until `resume`."""
    _steer(server, Client.pause)


@app.command()
def resume(server: ServerAddress = DEFAULT_ADDRESS) -> None:
    """Undo `pause`."""
    _steer(server, Client.resume)


@app.command("set")
def set_(
    values: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=VALUE…", help="Such as learning_rate=3e-4; none: list all."),
    ] = None,
    at_version: Annotated[
        int | None,
        typer.Option(metavar="V", min=0, help="The update after this version has it first."),
    ] = None,
    server: ServerAddress = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Change settings while the run trains: the consistency, the optimizer's numbers.

    They hold from the next update on, and through crashes; learning_rate=schedule takes a number
    back that was set in place of a schedule. Without NAME=VALUE: list what can be set, and how it
    stands.
    """
    wanted = dict(map(_assignment, values or ()))
    if at_version is not None and not wanted:
        raise UsageError("--at-version needs NAME=VALUE, such as learning_rate=3e-4")
    with Client(server) as client:
        message = client.set(wanted, at_version=at_version) if wanted else ""
        if as_json:
            _print_json(client.settings())
        elif message:
            print(message)
        else:
            _print_table(show.settings_table(client.settings()))


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UsageError(f"{text!r}: write NAME=VALUE, such as learning_rate=3e-4")
    return name, value


@app.command()
def evict(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="A name or an id.")],
    server: ServerAddress = DEFAULT_ADDRESS,
) -> None:
    """Take a worker out of the run, and what it was doing back."""
    _steer(server, lambda client: client.evict(worker))


@app.command()
def snapshot(server: ServerAddress = DEFAULT_ADDRESS) -> None:
    """Make the current version durable now, and wait until it is."""
    _steer(server, Client.snapshot)


@app.command()
def stop(server: ServerAddress = DEFAULT_ADDRESS) -> None:
    """End the server in order: the run is kept and can be continued, its workers exit 0."""
    with Client(server) as client:
        print(client.stop(), flush=True)
        end = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < end:
            try:
                client.status()
            except HeadwaterError:
                print("stopped")
                return
            time.sleep(0.1)
    raise HeadwaterError(f"the server at {server} still answers after {STOP_TIMEOUT_S:.0f} s")


def _steer(server: str, what: Callable[[Client], str]) -> None:
    with Client(server) as client:
        print(what(client))


def _print_json(value: Any, indent: int | None = 2) -> None:
    print(plain_json.dumps(value, indent), flush=True)


def _print_table(table: RenderableType) -> None:
    """On a terminal as wide as it is; elsewhere each line as long as what is in it."""
    console = Console()
    if console.is_terminal:
        console.print(table, soft_wrap=True)
        return
    with console.capture() as captured:
        console.print(table, soft_wrap=True)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), flush=True)
