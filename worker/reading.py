"""Takes whole versions from a server, for those on the worker's side who only read."""

from __future__ import annotations

import dataclasses

import grpc

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.protos.errors import HeadwaterError, Reason, Refused, from_rpc_error
from headwater.protos.layout import Layout, LayoutError, differences
from headwater.protos.wire import unframe
from headwater.worker.weights import Weights

EXTRA_TIMEOUT_S = 600.0
"""Seconds a pull may take after its wait: enough for 10 GB at 20 MB/s."""


@dataclasses.dataclass(frozen=True)
class Read:
    """What a pull gave; `weights` belong to the reader until its next pull."""

    stamp: pb.Stamp
    run_id: str
    state: pb.RunState
    epoch: int
    weights: Weights


class Reader:
    """Pulls weights of one layout.

    Args:
      address: HOST:PORT.
      layout: What the weights must be; another is refused, the difference named.
    """

    def __init__(self, address: str, layout: Layout) -> None:
        self._address = address
        self._layout = layout
        self._channel = rpc.connect(address)
        self.stub = rpc.Stub(self._channel)
        self._weights = Weights(layout)

    def pull(self, request: pb.PullRequest) -> Read:
        """One whole version.

        Raises:
          Refused: The server said no, or serves another layout.
          Unreachable: No answer.
          HeadwaterError: The version did not come whole.
        """
        first: pb.PullReply | None = None
        self._weights.version = -1
        try:
            call = self.stub.Pull(request, timeout=request.wait_s + EXTRA_TIMEOUT_S)
            for data in call:
                reply, body = unframe(pb.PullReply, data)
                if first is None:
                    first = reply
                    self._check(reply.layout)
                if reply.HasField("weights"):
                    self._weights.add(reply.weights, body)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._address) from None
        if first is None or self._weights.version < 0:
            raise HeadwaterError(f"the server at {self._address} sent no whole version")
        return Read(first.stamp, first.run_id, first.state, first.epoch, self._weights)

    def close(self) -> None:
        self._channel.close()

    def _check(self, message: pb.Layout) -> None:
        try:
            theirs = Layout.from_proto(message)
        except LayoutError as error:
            raise HeadwaterError(f"the server's layout: {error}") from None
        if theirs.fingerprint != self._layout.fingerprint:
            found = "; ".join(differences(self._layout, theirs))
            raise Refused(
                Reason.LAYOUT_MISMATCH,
                f"the server's tensors differ from this task's (here: the task, there: the "
                f"server): {found}",
            )
