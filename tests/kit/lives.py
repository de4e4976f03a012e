"""A server that is killed and started again on its address and run directory; and its witnesses.

The witnesses hold the invariants: exactly once, nothing durable lost, one clock,
whole versions. Whoever breaks one is named with the two looks that contradict.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from headwater.client.client import Client
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import HeadwaterError, Unreachable
from kit import counting
from kit.processes import START_TIMEOUT_S, Command, _address, status_of
from kit.protocol import BareWorker, StreamEnded, counting_gradient, hello_of, key
from kit.waiting import wait_for

TASK = Path(counting.__file__)

RECOVERY_S = 10.0
"""From the start of a server to its first answer, and from there to its first update."""


class Lives:
    """One run's server, in one life after another.

    Args:
      cwd: The run directory is `run` in it.
      task_options: Of kit.counting, as `counting.options` gives them.
      options: Of `headwater server`, the same in every life.
    """

    def __init__(
        self, cwd: Path, task_options: Sequence[str] = (), options: Sequence[str] = ()
    ) -> None:
        self.cwd = cwd
        self.task: str | Path = TASK
        self.run_dir = cwd / "run"
        self.address = "127.0.0.1:0"
        self.command: Command | None = None
        self.incarnations = 0
        self.errors = ""
        """What all lives said."""
        self._options = [*task_options, "--run-dir", "run", *options]

    def __enter__(self) -> Lives:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._forget()
        if kind is not None:
            print(self.errors)

    def start(self, *options: str, wait: bool = True, **environment: str) -> Command:
        """Begin the next life; returns once it answers."""
        self._forget()
        arguments = (
            "server",
            *(("--task", self.task) if self.task else ()),
            "--listen",
            self.address,
            *self._options,
            *options,
        )
        self.command = Command(*arguments, cwd=self.cwd, **environment)
        self.incarnations += 1
        if wait:
            self.address = wait_for(
                lambda: self.command and _address(self.command),
                "the server listens",
                START_TIMEOUT_S,
                lambda: self.command and self.command.errors,
            )
        return self.command

    def kill(self) -> None:
        """As a loss of power would, but for the disk's own cache."""
        assert self.command is not None
        self.command.kill()

    def wait_killed(self, timeout_s: float = 60.0) -> None:
        """Until it has killed itself, at a failpoint."""
        assert self.command is not None
        assert self.command.wait(timeout_s) == -signal.SIGKILL, self.command.errors

    def status(self) -> dict[str, object]:
        return status_of(self.address)

    def finished(self, timeout_s: float = 60.0) -> dict[str, object]:
        return wait_for(
            lambda: (s := self.status()).get("state") == "finished" and s,
            "the run is finished",
            timeout_s,
            lambda: (self.status(), self.command and self.command.errors),
        )

    def _forget(self) -> None:
        if self.command is not None:
            self.errors += self.command.errors
            self.command.__exit__(None, None, None)
            self.command = None


_SERVERS = ("faults", "shadow", "slow_while", "load_s")
"""Task options that a bare worker has no use for, but has to have as the server does."""


@dataclasses.dataclass(frozen=True)
class Look:
    """What the server said at one moment."""

    incarnation: int
    version: int
    durable: int


class Witness:
    """Looks at the server all the time, and takes whole weights now and then.

    Fails, when it is closed, if the clock or what was durable ever went back, or
    if a pull was a mixture of versions: the cells of the counting task's weights
    add up to the batch size for each version.
    """

    def __init__(self, address: str, batch_size: int, *, acknowledged_is_durable: bool) -> None:
        self._address = address
        self._batch_size = batch_size
        self._log_level = acknowledged_is_durable
        self._over = threading.Event()
        self._last = Look(0, 0, 0)
        self._durable: Counter[int] = Counter()
        """The greatest version that was called durable, by the life that did."""
        self.broken: list[str] = []
        self.looks = 0
        self.pulls = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="witness")

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join(30)
        if kind is None:
            assert not self.broken, "\n".join(self.broken)
            assert self.looks

    def acknowledged(self, incarnation: int, version: int) -> None:
        """A worker was told APPLIED."""
        if self._log_level:
            with self._lock:
                self._durable[incarnation] = max(self._durable[incarnation], version)

    def see(self, stamp: Look) -> None:
        with self._lock:
            last, self._last = self._last, stamp
            self.looks += 1
            if stamp.incarnation < last.incarnation:
                self.broken.append(f"the incarnation went back: {last}, {stamp}")
            if stamp.incarnation == last.incarnation and stamp.version < last.version:
                self.broken.append(f"the version went back within a life: {last}, {stamp}")
            # Of the lives before: its own may have gone on while this look was on its way.
            before = max([0, *(v for i, v in self._durable.items() if i < stamp.incarnation)])
            if stamp.version < before:
                self.broken.append(f"version {before} was durable, and is lost: {stamp}")
            if stamp.durable > stamp.version:
                self.broken.append(f"more is durable than there is: {stamp}")
            self._durable[stamp.incarnation] = max(self._durable[stamp.incarnation], stamp.durable)

    def _watch(self) -> None:
        turn = 0
        while not self._over.wait(0.02):
            with contextlib.suppress(Unreachable), Client(self._address) as client:
                while not self._over.wait(0.02):
                    turn += 1
                    status = client.status()
                    self.see(
                        Look(status["incarnation"], status["version"], status["durable_version"])
                    )
                    if turn % 10 == 0:
                        self._pull(client)

    def _pull(self, client: Client) -> None:
        try:
            weights = client.pull()
        except Unreachable:
            raise
        except HeadwaterError:
            return  # cut in the middle: it said so
        self.pulls += 1
        total = float(weights["count"].sum())
        if total != weights.version * self._batch_size:
            self.broken.append(f"a pull of version {weights.version} holds {total} examples")


class SteadyWorker:
    """A bare worker in a thread: it trains the counting task until bye, whoever dies meanwhile."""

    def __init__(
        self, address: str, witness: Witness, name: str, pause_s: float = 0.0, **task: Any
    ) -> None:
        bare = {n: v for n, v in task.items() if n not in _SERVERS}  # the server's
        self._hello = hello_of(counting.task(**bare), "counting")
        self._hello.task.options.update({name: str(value) for name, value in task.items()})
        self._address = address
        self._witness = witness
        self._name = name
        self.pause_s = pause_s
        self.acknowledged = 0
        self.streams = 0
        self.bye: pb.Bye | None = None
        self.error: BaseException | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"steady {name}")

    def __enter__(self) -> SteadyWorker:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join(60)
        if kind is None and self.error is not None:
            raise self.error

    def wait_bye(self, timeout_s: float = 60.0) -> None:
        wait_for(lambda: self.bye or self.error, f"bye to {self._name}", timeout_s)

    def _run(self) -> None:
        try:
            with BareWorker(self._address, self._hello, name=self._name) as worker:
                while self.bye is None and not self._over.is_set():
                    try:
                        self._one_stream(worker)
                    except StreamEnded as ended:
                        if ended.code is grpc.StatusCode.OK and worker.heard("bye"):
                            self.bye = worker.heard("bye")[-1]
                        elif ended.reason not in ("", "SILENT", "SLOW_READER", "SERVER_ENDED"):
                            raise
                    if worker.heard("bye"):
                        self.bye = worker.heard("bye")[-1]
                        if self.bye.reason == pb.BYE_STOPPED:
                            self.bye = None  # the run goes on later
                    time.sleep(0.05)
        except BaseException as error:
            self.error = error

    def _one_stream(self, worker: BareWorker) -> None:
        worker.hello.seen_incarnation = max(worker.hello.seen_incarnation, worker.stamp.incarnation)
        welcome = worker.join()
        worker.hello.run_id = welcome.run_id
        self.streams += 1
        while not self._over.is_set():
            ticket = worker.ticket(timeout_s=120)
            time.sleep(self.pause_s)
            indices = worker.leased.pop(key(ticket))
            worker.push(ticket, counting_gradient(worker.layout, indices))
            outcome = worker.outcome(timeout_s=120)
            if outcome.code == pb.OUTCOME_APPLIED:
                self.acknowledged += 1
                self._witness.acknowledged(worker.stamp.incarnation, outcome.version)
                stamp = worker.stamp
                if outcome.version > stamp.version:
                    self._witness.broken.append(f"acknowledged {outcome.version} at {stamp}")


@contextlib.contextmanager
def steady_workers(
    address: str, witness: Witness, count: int, pause_s: float = 0.0, **task: Any
) -> Iterator[list[SteadyWorker]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(SteadyWorker(address, witness, f"steady-{n}", pause_s, **task))
            for n in range(count)
        ]


def descriptors(pid: int) -> int:
    """Open files of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
