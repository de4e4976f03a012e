"""`headwater evaluate`: the task's own evaluation of the weights being served.

A process of its own, so that evaluating slows no worker. With --follow it
evaluates at the end of every epoch and reports to the server, until the run is
over; it never lags, because it always takes the newest version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import grpc
import typer

from headwater.protos import command, plain_json, rpc
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import Unreachable, UsageError, from_rpc_error
from headwater.worker.options import Platform, TaskArg, TaskOptions
from headwater.worker.platform import choose_platform

if TYPE_CHECKING:
    from headwater.worker.load import LoadedTask
    from headwater.worker.task import Task

log = logging.getLogger("headwater.evaluate")

WAIT_S = 30.0
"""Seconds that one Pull waits for the next version to evaluate."""

RPC_TIMEOUT_S = 10.0

_OVER = {pb.RUN_FINISHED, pb.RUN_FAILED, pb.RUN_STOPPING}

app = command.new_app()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one version was found to be."""

    run_id: str
    incarnation: int
    version: int
    epoch: int
    metrics: Mapping[str, float]
    seconds: float

    def line(self) -> str:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in sorted(self.metrics.items()))
        return f"version {self.version} (epoch {self.epoch})  {figures}  [{self.seconds:.1f} s]"


class Evaluator:
    """Evaluates the weights that a server serves, and reports to it. Close it.

    Args:
      follows: It comes back for every epoch.
      min_epoch: How many epochs the first weights should have behind them; see `next`.

    Raises:
      UsageError: The task has no `evaluate`.
    """

    def __init__(
        self, loaded: LoadedTask, address: str, *, follows: bool, min_epoch: int = 0
    ) -> None:
        from headwater.protos.reading import Reader

        if loaded.task.evaluate is None:
            raise UsageError(
                f"the task {loaded.name} has no evaluate; give Task(evaluate=...) a function of "
                "the parameters that returns a dict of numbers"
            )
        self._task = loaded.task
        self._address = address
        # What the user's evaluate is given it may keep: the best parameters so far, say.
        self._reader = Reader(address, self._task.tree.layout, reuse=False)
        self._request = pb.PullRequest(evaluates=follows, for_evaluation=True, min_epoch=min_epoch)
        self._first_epoch = self._due_epoch = min_epoch
        self._evaluated = 0, -1  # incarnation and version
        self.is_over = False
        """Whether there will be no other weights."""

    def close(self) -> None:
        self._reader.close()

    def next(self, wait_s: float) -> Evaluation | None:
        """Evaluate at the end of the next epoch, or of the run; None if that is not yet.

        Args:
          wait_s: Seconds to wait for it.

        Raises:
          UsageError: `evaluate` returned something else than a dict of numbers. What the
            user's own code raises goes through.
          Refused: The server serves other tensors.
          Unreachable: No server; after it was once reached that is waited for instead.
        """
        request = self._request
        request.wait_s = wait_s
        try:
            read = self._reader.pull(request)
        except Unreachable as error:
            if not request.run_id:
                raise
            log.warning("%s; trying again", error)
            # It may come back with fewer epochs behind it; to wait for more would miss those.
            request.min_epoch = self._first_epoch
            time.sleep(1)
            return None
        if read.stamp.incarnation != request.seen_incarnation:
            self._due_epoch = self._first_epoch
        request.run_id = read.run_id
        request.seen_incarnation = read.stamp.incarnation
        assert read.weights is not None  # no version was named as known
        version = read.weights.version
        evaluated = read.stamp.incarnation, version
        # With an epoch barrier it may be an older one, and others follow it.
        is_newest = version >= read.stamp.version
        self.is_over = is_newest and (read.state in _OVER or read.epoch >= read.epochs)
        is_due = self.is_over or read.epoch >= self._due_epoch
        self._due_epoch = request.min_epoch = max(self._due_epoch, read.epoch + 1)
        if evaluated == self._evaluated or not is_due:
            return None
        began = time.perf_counter()
        metrics = evaluated_by(self._task, read.weights.leaves)
        seconds = time.perf_counter() - began
        self._evaluated = evaluated
        found = Evaluation(
            read.run_id, read.stamp.incarnation, version, read.epoch, metrics, seconds
        )
        _report(self._reader.stub, found, self._address)
        return found


def evaluations(loaded: LoadedTask, address: str, *, follow: bool) -> Iterator[Evaluation]:
    """Evaluate the served weights, and report to the server; once, or until the run is over.

    Raises:
      As `Evaluator` and its `next` do.
    """
    evaluator = Evaluator(loaded, address, follows=follow)
    with contextlib.closing(evaluator):
        wait_s = 0.0
        while not evaluator.is_over:
            if found := evaluator.next(wait_s):
                yield found
                if not follow:
                    return
            wait_s = WAIT_S


def evaluated_by(task: Task, leaves: Sequence[Any]) -> dict[str, float]:
    """What the task's own evaluation finds of these tensors, in layout order.

    Raises:
      UsageError: See `numbers`.
    """
    assert task.evaluate is not None
    tree = task.tree
    state = (tree.state(leaves),) if task.has_state else ()
    return numbers(task.evaluate(tree.params(leaves), *state))


def numbers(metrics: object) -> dict[str, float]:
    """What `Task.evaluate` returned, as numbers.

    Raises:
      UsageError: It is no dict of numbers, or an empty one.
    """
    try:
        if not isinstance(metrics, Mapping) or not metrics:
            raise TypeError(f"it returned {metrics!r}")
        return {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError) as error:
        raise UsageError(
            f'Task.evaluate must return a dict of numbers, such as {{"accuracy": 0.9}}: {error}'
        ) from None


def _report(stub: rpc.Stub, found: Evaluation, address: str) -> None:
    """Tell the server; that it is no longer there does not spoil the evaluation."""
    report = pb.EvaluationReport(
        incarnation=found.incarnation,
        version=found.version,
        metrics=found.metrics,
        duration_s=found.seconds,
        epoch=found.epoch,
    )
    try:
        stub.ReportEvaluation(report, timeout=RPC_TIMEOUT_S)
    except grpc.RpcError as error:
        log.warning("the evaluation was not reported: %s", from_rpc_error(error, address))


@app.command()
def evaluate(
    task: TaskArg,
    task_option: TaskOptions = None,
    server: command.ServerAddress = rpc.DEFAULT_ADDRESS,
    follow: Annotated[
        bool, typer.Option("--follow", help="Evaluate every epoch, until the run is over.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line.")] = False,
    platform: Platform = None,
    nice: Annotated[
        int, typer.Option(min=0, max=19, help="Give way to other processes; 19 the most.")
    ] = 0,
) -> None:
    """Evaluate the served weights with the task's own evaluate, and report the result back."""
    if nice:
        os.nice(nice)
    choose_platform(platform)
    from headwater.worker.load import load_task_on
    from headwater.worker.user_code import guard_user_code

    loaded = load_task_on(platform, task, task_option or ())
    with guard_user_code(f"evaluating the task {loaded.name} raised"):
        for found in evaluations(loaded, server, follow=follow):
            line = plain_json.dumps(dataclasses.asdict(found)) if as_json else found.line()
            print(line, flush=True)


def main() -> None:
    command.watch_lifeline(lambda: os.kill(os.getpid(), signal.SIGTERM))
    command.run(app, "headwater evaluate")
