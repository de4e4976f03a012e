"""Takes whole versions of the weights from a server, for those who only read."""

from __future__ import annotations

import dataclasses

import grpc

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import rpc
from headwater.protos.assembly import Weights
from headwater.protos.errors import HeadwaterError, Reason, Refused, from_rpc_error
from headwater.protos.layout import Layout, LayoutError, differences
from headwater.protos.wire import MalformedMessage, unframe

EXTRA_TIMEOUT_S = 600.0
"""Seconds a pull may take after its wait: enough for 10 GB at 20 MB/s."""


@dataclasses.dataclass(frozen=True)
class Read:
    """What a pull gave. If memory is reused, `weights` are good until the next pull but one."""

    stamp: pb.Stamp
    run_id: str
    state: pb.RunState
    epoch: int
    """How many are complete in this version, of `epochs`."""
    epochs: int
    weights: Weights | None
    """None when the reader has this version already."""


class Reader:
    """Pulls weights over a channel of its own.

    Args:
      address: HOST:PORT.
      expected: What the weights must be; another layout is refused, the
        difference named. None takes any.
      reuse: Fill the same memory again, if the layout is known; for those who keep nothing.
    """

    def __init__(self, address: str, expected: Layout | None = None, *, reuse: bool = True) -> None:
        self.address = address
        self._channel = rpc.connect(address)
        self.stub = rpc.Stub(self._channel)
        self._expected = expected
        self._reused = Weights(expected) if expected and reuse else None

    def pull(self, request: pb.PullRequest) -> Read:
        """One whole version, or none if it is the one that the request says it has.

        Raises:
          Refused: The server said no, or serves another layout.
          Unreachable: No answer.
          HeadwaterError: The version did not come whole.
        """
        first: pb.PullReply | None = None
        weights: Weights | None = None
        try:
            call = self.stub.Pull(request, timeout=request.wait_s + EXTRA_TIMEOUT_S)
            for data in call:
                reply, body = unframe(pb.PullReply, data)
                if first is None:
                    first = reply
                    if reply.HasField("layout"):
                        weights = self._begin(reply.layout)
                if reply.HasField("weights") and weights is not None:
                    weights.add(reply.weights, body)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from None
        except MalformedMessage as error:
            raise HeadwaterError(f"the server at {self.address} sent nonsense: {error}") from None
        if first is None or (weights is not None and weights.version < 0):
            raise HeadwaterError(f"the server at {self.address} sent no whole version")
        return Read(first.stamp, first.run_id, first.state, first.epoch, first.epochs, weights)

    def close(self) -> None:
        self._channel.close()

    def _begin(self, message: pb.Layout) -> Weights:
        try:
            theirs = Layout.from_proto(message)
        except LayoutError as error:
            raise HeadwaterError(f"the server's layout: {error}") from None
        ours = self._expected
        if ours is not None and theirs.fingerprint != ours.fingerprint:
            raise Refused(
                Reason.LAYOUT_MISMATCH,
                "the server's tensors differ from this task's (here: the task, there: the "
                f"server): {'; '.join(differences(ours, theirs))}",
            )
        if self._reused is None:
            return Weights(theirs, reuse=False)
        self._reused.restart()
        return self._reused
