"""`Client`: looks at a running server, takes its weights, and steers it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc

from headwater.client.status import Status, as_dict, values_of
from headwater.client.weights import Weights, named
from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.protos.errors import Unreachable, UsageError, from_rpc_error

if TYPE_CHECKING:  # quick commands do without NumPy
    from headwater.client.push_session import PushSession
    from headwater.protos.reading import Read, Reader

log = logging.getLogger("headwater.client")

RPC_TIMEOUT_S = 10.0
SNAPSHOT_TIMEOUT_S = 600.0
"""For a snapshot to be written: 60 GB at 100 MB/s."""
WAIT_S = 30.0
"""Seconds that one Pull of a subscription waits; it is asked again without end."""

_OVER = {pb.RUN_FINISHED, pb.RUN_FAILED, pb.RUN_STOPPING}


class Client:
    """A connection to a server; made at once, used when something is asked.

        with Client("127.0.0.1:50051") as client:
            weights = client.pull()

    Every method raises Unreachable when no server answers, and Refused, with a
    `reason`, when the server says no.

    Args:
      address: HOST:PORT; by default the environment's HEADWATER_SERVER, else
        127.0.0.1:50051.
      timeout_s: For the answer to one question.
    """

    def __init__(self, address: str | None = None, *, timeout_s: float = RPC_TIMEOUT_S) -> None:
        self.address = address or os.environ.get(rpc.SERVER_ENV) or rpc.DEFAULT_ADDRESS
        self._timeout_s = timeout_s
        self._channel = rpc.connect(self.address)
        self._stub = rpc.Stub(self._channel)
        self._opened_reader: Reader | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. The server goes on."""
        self._channel.close()
        if self._opened_reader is not None:
            self._opened_reader.close()

    # ----------------------------------------------------------------- looking

    def status(self, *, watches: bool = False) -> Status:
        """How the run is doing: the values of `headwater status --json`.

        Args:
          watches: You will ask again within a second. A server that ends waits that
            long for you, so that you may see how it ended.
        """
        return as_dict(self._ask("GetStatus", pb.StatusRequest(watches=watches)))

    def settings(self) -> dict[str, dict[str, Any]]:
        """What `set` can change, by name: the values of `headwater set --json`.

        Each has `value`, as text; `is_set`, whether it was changed by `set`; `compiles`,
        whether another value has the update compiled anew; and `planned`, a list of
        {"after_version": …, "value": …, "queued": …}. What is `queued` waits to be written down:
        its version is the earliest, and it is lost if the server ends before.
        """
        return _by_name(self._ask("GetSettings", pb.SettingsRequest()))

    def pull(self, *, for_evaluation: bool = False) -> Weights:
        """The newest version of the weights, whole.

        Args:
          for_evaluation: Those to evaluate, where the optimizer has others than those that
            it moves: an average, or those of a schedule-free optimizer.
        """
        return named(self._reader.pull(pb.PullRequest(for_evaluation=for_evaluation)))

    def subscribe(self, *, every: int = 1, timeout_s: float | None = None) -> Iterator[Weights]:
        """Fresh weights as they come: the current ones at once, then at least `every` versions on.

        Each is the newest there is, so a slow reader skips versions and never
        lags. Ends after the final version of the run. A server that goes away
        is waited for: when it comes back as an older copy of the run, Refused
        is raised.

        Args:
          every: Versions from one to the next; the last may come sooner.
          timeout_s: Seconds without new weights after which TimeoutError is
            raised; None waits as long as it takes.

        Raises:
          UsageError: `every` is less than 1.
          TimeoutError: See `timeout_s`.
          Unreachable: No server answers the first time.
        """
        if every < 1:
            raise UsageError(f"subscribe(every={every}): it must be at least 1")
        request = pb.PullRequest()
        heard = time.monotonic()
        while True:
            request.wait_s = WAIT_S if request.run_id else 0.0
            if timeout_s is not None:
                request.wait_s = min(request.wait_s, max(heard + timeout_s - time.monotonic(), 0))
            read = self._patiently(request, heard, timeout_s)
            fresh = read.weights is not None and (
                read.state in _OVER
                or read.stamp.version >= request.min_version
                or read.stamp.incarnation != request.seen_incarnation
            )
            if fresh:
                yield named(read)
                heard = time.monotonic()
                request.have_version = read.stamp.version
                request.seen_incarnation = read.stamp.incarnation
                request.run_id = read.run_id
                request.min_version = read.stamp.version + every
            if read.state in _OVER:
                return
            if timeout_s is not None and time.monotonic() - heard > timeout_s:
                raise TimeoutError(
                    f"no version {request.min_version} from {self.address} within {timeout_s} s; "
                    f"the newest is {read.stamp.version}"
                )

    # ---------------------------------------------------------------- training

    def train(
        self, *, name: str = "", timeout_s: float | None = None, keep_bytes: int = 256 << 20
    ) -> PushSession:
        """Train with gradients that this program brings itself, each applied exactly once.

            with client.train() as session:
                weights = session.pull()
                session.push(gradient)

        Args:
          name: Shown in `headwater workers`.
          timeout_s: For a server that does not answer, after which Unreachable is raised; None
            waits as long as it takes.
          keep_bytes: Of gradients that are not durable yet and kept to be sent again; when there
            are more the server is asked to write a snapshot.
        """
        from headwater.client.push_session import PushSession

        return PushSession(self.address, name=name, timeout_s=timeout_s, keep_bytes=keep_bytes)

    # ---------------------------------------------------------------- steering

    def report_evaluation(
        self, weights: Weights, metrics: Mapping[str, float], *, seconds: float = 0.0
    ) -> str:
        """Tell the server what an evaluation of `weights` found; shown in status.

        Args:
          weights: As pulled; says which version was evaluated.
          metrics: Such as {"accuracy": 0.97}.
          seconds: How long it took.
        """
        return self._steer(
            "ReportEvaluation",
            pb.EvaluationReport(
                incarnation=weights.incarnation,
                version=weights.version,
                metrics=metrics,
                duration_s=seconds,
                epoch=weights.epoch,
            ),
        )

    def pause(self) -> str:
        """Hold the weights at their version until `resume`. Returns what was done."""
        return self._steer("Pause", pb.PauseRequest(), timeout_s=SNAPSHOT_TIMEOUT_S)

    def resume(self) -> str:
        """Undo `pause`."""
        return self._steer("Resume", pb.ResumeRequest())

    def set(self, values: Mapping[str, str | float], *, at_version: int | None = None) -> str:
        """Change settings of the run, all or none, from the next update on; kept from then on.

        Args:
          values: `consistency`, such as "bounded:4", and numbers of the optimizer, such
            as {"learning_rate": 3e-4}; `settings` has their names. "schedule" puts back
            the schedule that a number was set in place of.
          at_version: For numbers: the update that follows this version is the first
            with them; by default the next one.

        Returns:
          What was done.

        Raises:
          Refused: BAD_SETTING; says what can be set. UNWRITABLE; the server's disk is broken,
            or full: then the change is queued, see `settings`.
        """
        texts = {name: str(value) for name, value in values.items()}
        request = pb.SetRequest(values=texts, at_version=at_version)
        return self._steer("Set", request, timeout_s=SNAPSHOT_TIMEOUT_S)

    def evict(self, worker: str) -> str:
        """Take a worker, by name or id, out of the run for this life of the server.

        Raises:
          Refused: UNKNOWN_WORKER; names those that are connected.
        """
        return self._steer("Evict", pb.EvictRequest(worker=worker))

    def snapshot(self) -> str:
        """Make the current version durable; returns when it is.

        Raises:
          Refused: UNWRITABLE; the server's disk is full or broken.
        """
        return self._steer("Snapshot", pb.SnapshotRequest(), timeout_s=SNAPSHOT_TIMEOUT_S)

    def stop(self) -> str:
        """End the server in order: its weights are kept, its workers exit 0."""
        return self._steer("Stop", pb.StopRequest())

    # --------------------------------------------------------------- privately

    @property
    def _reader(self) -> Reader:
        if self._opened_reader is None:
            from headwater.protos.reading import Reader

            self._opened_reader = Reader(self.address)
        return self._opened_reader

    def _patiently(self, request: pb.PullRequest, heard: float, timeout_s: float | None) -> Read:
        """Pull, and outlast a server that is away, unless it never was there."""
        pause_s = 0.1
        while True:
            try:
                return self._reader.pull(request)
            except Unreachable as error:
                late = timeout_s is not None and time.monotonic() - heard > timeout_s
                if not request.run_id or late:
                    raise
                log.warning("%s; trying again", error)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 2.0)

    def _steer(self, method: str, request: Any, timeout_s: float | None = None) -> str:
        return str(self._ask(method, request, timeout_s).message)

    def _ask(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s or self._timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from None


def _by_name(reply: pb.SettingsReply) -> dict[str, dict[str, Any]]:
    found = [values_of(setting) for setting in reply.settings]
    return {setting.pop("name"): setting for setting in found}
