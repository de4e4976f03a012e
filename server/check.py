"""`headwater check`: tries a task out as a server and a worker would, in one process.

Loads it, makes the weights, loads one batch, computes one gradient and one
update, and evaluates; prints what it found, and stops at the first thing that
is wrong.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from headwater.protos import command, plain_json
from headwater.protos.errors import HeadwaterError, UsageError
from headwater.worker.options import DevicesOption, Platform, TaskArg, TaskOptions
from headwater.worker.platform import choose_devices, choose_platform

if TYPE_CHECKING:
    from headwater.worker.devices import Devices
    from headwater.worker.gradient import Gradient
    from headwater.worker.load import LoadedTask
    from headwater.worker.task import Task

T = TypeVar("T")

REPEATS = 5
"""Of what is timed; the median counts."""

app = command.new_app()


@dataclasses.dataclass(frozen=True)
class Report:
    """What a task is, and what its parts take. Seconds are medians of REPEATS."""

    task: str
    parameters: int
    gradient_bytes: int
    tensors: Mapping[str, str]
    """Name to dtype and shape."""
    examples: int
    batch_size: int
    batches_per_epoch: int
    epochs: int
    batch: Mapping[str, str]
    """Path in the batch to dtype and shape."""
    platform: str
    devices: int
    """That the batch is split over."""
    init_s: float
    load_s: float
    compile_s: float
    gradient_s: float
    update_s: float
    evaluate_s: float | None
    loss: float
    training_metrics: Mapping[str, float]
    evaluation: Mapping[str, float] | None
    notes: list[str]
    """What is allowed, and probably not meant."""


def check_task(loaded: LoadedTask, devices: Devices = ()) -> Report:
    """Try a task out.

    Args:
      loaded: The task.
      devices: To split the batch over; none leaves it to JAX's default device.

    Raises:
      UsageError: Something in it cannot work; says what.
      HeadwaterError: The first gradient is not finite. What the user's code
        raises goes through.
    """
    import jax
    import numpy as np

    from headwater.server.config import ServerConfig
    from headwater.server.dial import Dial
    from headwater.server.optimizer import check
    from headwater.server.plan import optimizer_of, rounds_of
    from headwater.server.store import NotFinite, Store, initial
    from headwater.worker.data import batch_rng
    from headwater.worker.evaluate import evaluated_by
    from headwater.worker.local_steps import gradient_of_one

    task = loaded.task
    rounds = rounds_of(task, ServerConfig())
    order = rounds.order
    optimizer = optimizer_of(task, None, None, rounds.updates(Dial()))
    tree = task.tree
    made, init_s = _timed(lambda: task.init(jax.random.key(task.seed)))
    tree.check(made)
    check(optimizer, tree.trained_shapes)
    try:
        store = Store(tree, optimizer, initial(tree, made, optimizer))
    except NotFinite as error:
        raise UsageError(f"Task.init gave weights that are not finite: {error}") from None
    layout = store.layout

    indices = order.indices(0)
    batch, load_s = _median(lambda: task.dataset.batch(indices, batch_rng(task.seed, 0, 0)))
    function = gradient_of_one(task, task.seed, devices)
    compile_s = function.compile(batch)
    leaves = [np.asarray(leaf) for leaf in store.current.tensors]
    gradient, gradient_s = _median(lambda: function(leaves, [(batch, 0, 0)]))
    buffer = layout.moving.empty()
    layout.moving.pack(map(np.asarray, gradient.leaves), buffer)
    try:
        _, update_s = _timed(lambda: store.apply(buffer, gradient.loss, 0))
    except NotFinite as error:
        raise HeadwaterError(
            f"the first gradient is not finite: {error}; every worker's would be refused"
        ) from None

    evaluation, evaluate_s = None, None
    if task.evaluate is not None:
        evaluation, evaluate_s = _timed(lambda: evaluated_by(task, leaves))
    return Report(
        task=loaded.name,
        parameters=layout.parameter_count,
        gradient_bytes=layout.moving.total_bytes,
        tensors={spec.name: spec.describe() for spec in layout.tensors},
        examples=order.example_count,
        batch_size=order.batch_size,
        batches_per_epoch=order.per_epoch,
        epochs=order.epochs,
        batch=_describe(batch),
        platform=loaded.platform(),
        devices=function.device_count(batch),
        init_s=init_s,
        load_s=load_s,
        compile_s=compile_s,
        gradient_s=gradient_s,
        update_s=update_s,
        evaluate_s=evaluate_s,
        loss=gradient.loss,
        training_metrics=gradient.metrics,
        evaluation=evaluation,
        notes=_notes(task, gradient),
    )


def _describe(batch: Any) -> dict[str, str]:
    import jax
    import numpy as np

    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        or "batch": f"{np.asarray(leaf).dtype.name}{list(np.shape(leaf))}"
        for path, leaf in leaves
    }


def _notes(task: Task, gradient: Gradient) -> list[str]:
    still = [
        name
        for name, leaf in zip(task.tree.names, task.tree.split(gradient.leaves)[0], strict=False)
        if leaf.size and not leaf.any()
    ]
    notes = []
    if still:
        notes.append(f"no gradient reaches {', '.join(still)}: zero on the whole first batch")
    if task.evaluate is None:
        notes.append("the task has no evaluate, so `headwater run` shows no final metrics")
    return notes


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    """What `call` returns, when it has been computed, and the seconds it took."""
    import jax

    began = time.perf_counter()
    value = jax.block_until_ready(call())
    return value, time.perf_counter() - began


def _median(call: Callable[[], T]) -> tuple[T, float]:
    runs = [_timed(call) for _ in range(REPEATS)]
    return runs[-1][0], sorted(seconds for _, seconds in runs)[REPEATS // 2]


def lines(report: Report) -> list[str]:
    """The report for people."""
    from headwater.worker.data import ENDLESS_BATCHES

    wide = max(map(len, report.tensors))
    updates = report.batches_per_epoch * report.epochs
    batch = ", ".join(f"{name} {what}" for name, what in report.batch.items())
    figures = {"loss": report.loss, **report.training_metrics}
    model = f"{report.parameters:,} parameters in {len(report.tensors)} tensors"
    epoch = f"{report.batches_per_epoch:,} batches of {report.batch_size} an epoch"
    run = f"{report.examples:,} examples, {epoch}, {updates:,} updates in {report.epochs} epochs"
    if report.batches_per_epoch >= ENDLESS_BATCHES:
        run = f"batches of {report.batch_size}, made without end"
    found = [
        f"{report.task}: {model}, {report.gradient_bytes:,} bytes a gradient",
        *(f"  {name:{wide}}  {what}" for name, what in report.tensors.items()),
        run,
        f"init      {report.init_s:8.3f} s",
        f"batch     {report.load_s * 1e3:8.2f} ms  {batch}",
        f"compile   {report.compile_s:8.3f} s   on {_place(report)}",
        f"gradient  {report.gradient_s * 1e3:8.2f} ms  {_figures(figures)}",
        f"update    {report.update_s * 1e3:8.2f} ms",
    ]
    if report.evaluation is not None and report.evaluate_s is not None:
        found.append(f"evaluate  {report.evaluate_s:8.3f} s   {_figures(report.evaluation)}")
    rate = 1 / max(report.gradient_s, 1e-9)
    found += [f"note: {note}" for note in report.notes]
    found.append(f"ok; this machine computes {rate:,.0f} gradients/s, for one process alone")
    return found


def _place(report: Report) -> str:
    if report.devices == 1:
        return report.platform
    return f"{report.devices} {report.platform} devices, which a batch is split over"


def _figures(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


@app.command()
def check(
    task: TaskArg,
    task_option: TaskOptions = None,
    platform: Platform = None,
    devices: DevicesOption = "all",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try a task out: load it, one batch, one gradient, one update; no server, no worker."""
    choose_platform(platform)
    from headwater.protos.layout import LayoutError
    from headwater.worker.load import load_task_on
    from headwater.worker.task import TaskError
    from headwater.worker.user_code import guard_user_code

    loaded = load_task_on(platform, task, task_option or ())
    chosen = choose_devices(devices) if loaded.task.backend is None else ()
    with guard_user_code(f"the task {loaded.name} raised"):
        try:
            report = check_task(loaded, chosen)
        except (TaskError, LayoutError) as error:
            raise UsageError(str(error)) from None
    if as_json:
        print(plain_json.dumps(dataclasses.asdict(report), indent=2))
    else:
        print("\n".join(lines(report)))


def main() -> None:
    command.run(app, "headwater check")
