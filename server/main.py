"""`headwater server`: keeps the weights of one run and serves them until it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from headwater.protos import command
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import RunFailed, UsageError
from headwater.protos.reproducible import fix
from headwater.protos.rpc import DEFAULT_ADDRESS
from headwater.server import failpoints
from headwater.server.config import ServerConfig
from headwater.worker.options import TaskOptions, TransportOption
from headwater.worker.platform import use_platform

if TYPE_CHECKING:
    from headwater.server.prepare import Prepared
    from headwater.server.serve import Ended, Serving
    from headwater.worker.load import LoadedTask

log = logging.getLogger("headwater.server")

app = command.new_app()


@app.command()
def server(
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="file.py[:NAME] or package.module[:NAME]. Without it --init and --optimizer say "
            "what is served, to programs that bring gradients of their own.",
        ),
    ] = None,
    task_option: TaskOptions = None,
    examples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Without --task: the workers' examples, dealt out in batches. Default: none, and "
            "no batches; only push sessions move the weights.",
        ),
    ] = None,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")
    ] = DEFAULT_ADDRESS,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Let other machines in, in clear text and without tokens."),
    ] = False,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where the run is kept; a run that is there is continued. Default: "
            "runs/TASK-RUN_ID."
        ),
    ] = None,
    consistency: Annotated[
        str | None,
        typer.Option(
            metavar="async|bounded:K|sync:N",
            help="How stale a gradient may be: as it comes; at most K versions; or not at all, N "
            "batches making one update. Default: async, or what was in force.",
        ),
    ] = None,
    staleness: Annotated[
        str | None,
        typer.Option(
            metavar="none|scale|compensate:L|drop:K",
            help="What becomes of a stale gradient. Default: none, or what was in force.",
        ),
    ] = None,
    local_steps: Annotated[
        int | None,
        typer.Option(metavar="H", help="Batches that a worker trains on between two pushes."),
    ] = None,
    inner_optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="With local steps, the workers' own. Default: the task's."
        ),
    ] = None,
    compress: Annotated[
        str | None,
        typer.Option(
            metavar="none|bfloat16|int8|topk:RATIO",
            help="How gradients are sent. Default: none, or as before.",
        ),
    ] = None,
    pull_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="own|bfloat16",
            help="How weights are sent to workers. Default: own, or as before.",
        ),
    ] = None,
    pipeline: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(
            help="Workers compute the next gradient while the last one travels, at the price of "
            "staleness. auto: two or more workers, over a network or with accelerators."
        ),
    ] = "auto",
    lease_seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="Of work reserved for a worker ahead.")
    ] = ServerConfig.lease_s,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", help="How often every example is used.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Examples in a batch.")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="An optax expression, such as 'adam(1e-3)'."),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            metavar="DECAY",
            help="Evaluate an exponential average of the weights, of this decay, such as 0.999.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of initial weights, order and keys.")
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            metavar="WEIGHTS.safetensors",
            help="Begin with these weights, such as `headwater pull` writes, in place of "
            "Task.init's; without --task, serve the arrays of this file. A run that is continued "
            "goes on with its own.",
        ),
    ] = None,
    exit_when_done: Annotated[
        bool, typer.Option("--exit-when-done", help="End when the run is finished.")
    ] = False,
    await_evaluation: Annotated[
        bool,
        typer.Option(
            "--await-evaluation",
            help="Before that, wait up to a minute for `headwater evaluate` to report.",
        ),
    ] = False,
    epoch_barrier: Annotated[
        bool,
        typer.Option(
            "--epoch-barrier",
            help="Begin an epoch when the one before is complete, and keep the version that it "
            "ended with until it is evaluated.",
        ),
    ] = False,
    stop_when: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC>=X",
            help="End the run with the first evaluation like this, such as 'accuracy>=0.97'.",
        ),
    ] = None,
    patience: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC:N",
            help="End the run after N evaluations none of which was better than the best before.",
        ),
    ] = None,
    on_nonfinite: Annotated[
        Literal["end", "skip"],
        typer.Option(help="A batch that nobody can compute ends the run, or is left out."),
    ] = "end",
    durability: Annotated[
        Literal["snapshot", "log"],
        typer.Option(
            help="What a crash of the server may cost: snapshot, the updates since the last one; "
            "log, nothing that was acknowledged, at the price of writing every gradient to disk."
        ),
    ] = "snapshot",
    snapshot_every: Annotated[
        str, typer.Option(metavar="30s|500", help="Time or updates between snapshots.")
    ] = ServerConfig.snapshot_every,
    keep: Annotated[int, typer.Option(metavar="N", help="Snapshots kept.")] = ServerConfig.keep,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="To end in order after SIGTERM or stop.")
    ] = ServerConfig.grace_s,
    max_staged_bytes: Annotated[
        int, typer.Option(metavar="BYTES", help="Of gradients on their way into the weights.")
    ] = ServerConfig.max_staged_bytes,
    session_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Of silence, before a worker is forgotten.")
    ] = ServerConfig.session_timeout_s,
    ticket_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Without progress, before a batch is given to another worker; at least ten of "
            "the worker's own slowest steps.",
        ),
    ] = ServerConfig.ticket_timeout_s,
    transport: TransportOption = "auto",
    platform: Annotated[
        str, typer.Option(metavar="cpu|gpu|tpu", help="Where the optimizer runs.")
    ] = "cpu",
) -> None:
    """Keep the weights of one run and apply the workers' gradients to them.

    Each option overrides the task's own value. Ctrl-C or SIGTERM makes the last version durable
    and ends; the same command with --run-dir DIR goes on from there, after a crash as well.
    """
    config = ServerConfig(
        listen=listen,
        insecure=insecure,
        run_dir=run_dir,
        consistency=consistency,
        staleness=staleness,
        local_steps=local_steps,
        inner_optimizer=inner_optimizer,
        compress=compress,
        pull_dtype=pull_dtype,
        pipeline=pipeline,
        lease_s=lease_seconds,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        ema=ema,
        seed=seed,
        init=None if init is None else str(init.absolute()),
        exit_when_done=exit_when_done,
        epoch_barrier=epoch_barrier,
        stop_when=stop_when,
        patience=patience,
        await_evaluation=await_evaluation,
        on_nonfinite=on_nonfinite,
        durability=durability,
        snapshot_every=snapshot_every,
        keep=keep,
        grace_s=grace,
        max_staged_bytes=max_staged_bytes,
        session_timeout_s=session_timeout,
        ticket_timeout_s=ticket_timeout,
        transport=transport,
    )
    # The gradients' owners are elsewhere: a GPU here is better left to a worker.
    if (consistency or _recorded_consistency(run_dir)).startswith("sync"):
        fix(os.environ)
    use_platform(platform)
    failpoints.arm(os.environ.get(failpoints.ENV, ""))
    from headwater.server.prepare import PortTaken, prepare
    from headwater.worker.load import load_task
    from headwater.worker.user_code import guard_user_code

    if task is not None:
        if examples is not None:
            raise UsageError(f"--examples {examples}: the task's data say how many there are")
        loaded = load_task(task, task_option or ())
    elif task_option:
        raise UsageError("--task-option is an argument of the task's function; add --task TASK")
    else:
        from headwater.server.weights_task import weights_task

        loaded = weights_task(config, examples)
    try:
        with guard_user_code(f"the task {loaded.name} raised"):
            prepared = prepare(loaded, config)
        ended, interrupted = asyncio.run(_serve(prepared, loaded, task))
    except PortTaken:
        command.announce_ready({"port_taken": True})  # `run` knows others
        raise
    for number in (signal.SIGINT, signal.SIGTERM):  # it is ending, and says how
        signal.signal(number, signal.SIG_IGN)
    prepared.run_dir.close()
    folder = prepared.run_dir.path
    place = f"version {ended.version} is in {folder}"
    if not ended.saved:
        place = f"version {ended.version} could not be written; the newest that can be continued "
        place += f"from is version {ended.durable_version}"
    again = f"go on with: {_resume_command(folder, loaded)}"
    if ended.state == pb.RUN_FAILED:
        raise RunFailed(f"{ended.message}; {place}; {again}")
    if not ended.saved:
        raise RunFailed(f"{place}; {again}")
    if ended.state == pb.RUN_FINISHED:
        log.info("finished; %s, its weights in %s", place, prepared.run_dir.weights_path)
    else:
        log.info("stopped; %s", place)
        log.info("%s", again)
    if interrupted:
        raise KeyboardInterrupt


def _recorded_consistency(run_dir: Path | None) -> str:
    """What a run that is continued was started with; known before JAX is, which loads the task."""
    from headwater.server.run_dir import RunDir

    record = RunDir.recorded(run_dir)
    return record.asked.get("consistency") or "" if record is not None else ""


def _resume_command(run_dir: Path, loaded: LoadedTask) -> str:
    """What was typed, with the run directory in it."""
    if loaded.is_handed:
        return f"fit(…, run_dir={str(run_dir)!r})"
    words = sys.argv[1:]
    if not any(word == "--run-dir" or word.startswith("--run-dir=") for word in words):
        words = [*words, "--run-dir", str(run_dir)]
    return shlex.join(["headwater", "server", *words])


async def _serve(prepared: Prepared, loaded: LoadedTask, spec: str | None) -> tuple[Ended, bool]:
    """Serve until the end; the second value tells whether Ctrl-C was the cause."""
    from headwater.server.serve import Serving

    serving, config = Serving(prepared), prepared.config
    received: list[int] = []

    def on_signal(number: int, _: object) -> None:
        if received:  # the second ends it at once
            os._exit(128 + number)
        received.append(number)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(serving.stop)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Not the loop's own way, which is undone when the loop ends, before the process does.
        signal.signal(number, on_signal)

    def on_ready(address: str) -> None:
        order, layout = prepared.rounds.order, prepared.store.layout
        batches = f"{order.epochs} epochs of {order.per_epoch} batches of {order.batch_size}"
        log.info(
            "%s: %s parameters in %d tensors; %s; %s",
            loaded.name, f"{layout.parameter_count:,}", len(layout.tensors),
            prepared.optimizer_text, batches if order.has_batches else "no batches",
        )  # fmt: skip
        log.info("run directory %s", prepared.run_dir.path)
        log.info("%s", _cost(config))
        log.info("    %s", _resume_command(prepared.run_dir.path, loaded))
        if loaded.is_handed:
            log.info("listening on %s", address)
        elif spec is None:
            what = "workers" if order.has_batches else "push sessions"
            log.info("listening on %s; for %s of your own programs", address, what)
        else:
            log.info("listening on %s; add workers with", address)
            log.info("    headwater worker --task %s --server %s", spec, address)
        command.announce_ready(
            {
                "address": address,
                "run_dir": str(prepared.run_dir.path),
                "run_id": prepared.run_dir.run_id,
                "evaluates": loaded.task.evaluate is not None,
            }
        )

    hurry = asyncio.create_task(_end_within(serving, config.grace_s))
    ended = await serving.run(on_ready)
    hurry.cancel()
    return ended, signal.SIGINT in received


async def _end_within(serving: Serving, grace_s: float) -> None:
    """End the process when it takes too long to end in order: nothing durable is lost by that."""
    await serving.stopping()
    await asyncio.sleep(grace_s)
    version = serving.run_state.durable_version
    log.error("not ended within --grace %g s; the newest durable version is %d", grace_s, version)
    os._exit(1)


def _cost(config: ServerConfig) -> str:
    """What a crash may cost."""
    if config.durability == "log":
        return "a crash costs no update that was acknowledged; continue after it with"
    return (
        f"a crash costs at most what came in {config.snapshot_interval}, and while a snapshot was "
        "being written; continue after it with"
    )


def main() -> None:
    command.watch_lifeline(lambda: os.kill(os.getpid(), signal.SIGTERM))
    command.run(app, "headwater server")
