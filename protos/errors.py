"""What can go wrong, as one tree of exceptions and one table of refusals.

HeadwaterError                 something to tell the user in one sentence
  UsageError                   wrong usage or input, found before anything started
  Refused                      the server understood and said no; carries a Reason
  Unreachable                  no answer; trying again later may help
  RunFailed                    the run ended with an error

On the wire a refusal is a gRPC status code and, in the trailing metadata
`headwater-reason`, one word of `Reason`; no peer parses prose.
"""

from __future__ import annotations

import enum
from typing import Any

import grpc

REASON_KEY = "headwater-reason"

_Code = grpc.StatusCode

_CANCELLED_HERE = ("Channel closed!", "Locally cancelled by application!")
"""What grpc says of a call that this process itself gave up."""


class Reason(enum.Enum):
    """Why a call was refused: the word on the wire, and the status it goes with."""

    PROTOCOL_MISMATCH = _Code.FAILED_PRECONDITION, "the two sides speak different protocols"
    TASK_MISMATCH = _Code.FAILED_PRECONDITION, "the two sides have different tasks"
    LAYOUT_MISMATCH = _Code.FAILED_PRECONDITION, "the two sides' tensors differ"
    COMPUTE_MISMATCH = _Code.FAILED_PRECONDITION, "a worker would compute other bits"
    WRONG_RUN = _Code.FAILED_PRECONDITION, "the server keeps another run"
    OLD_INCARNATION = _Code.FAILED_PRECONDITION, "the server is older than what was seen of the run"
    RUN_OVER = _Code.FAILED_PRECONDITION, "the run is over, or the server is being stopped"
    NOT_IN_SYNC = _Code.FAILED_PRECONDITION, "sync mode takes gradients of batches alone"
    SESSION_FORGOTTEN = _Code.FAILED_PRECONDITION, "nobody knows any more what was applied of it"
    MALFORMED = _Code.INVALID_ARGUMENT, "the message breaks the protocol"
    FUTURE_VERSION = _Code.INVALID_ARGUMENT, "the version has not been made yet"
    BAD_SETTING = _Code.INVALID_ARGUMENT, "no such setting, or it cannot have that value"
    UNKNOWN_WORKER = _Code.NOT_FOUND, "no such worker"
    EVICTED = _Code.PERMISSION_DENIED, "the worker was evicted"
    FENCED = _Code.ABORTED, "a newer stream of this worker took over"
    SILENT = _Code.DEADLINE_EXCEEDED, "nothing was heard for too long"
    COMPILE_TIMEOUT = _Code.DEADLINE_EXCEEDED, "compiling took too long"
    SLOW_READER = _Code.DEADLINE_EXCEEDED, "the reader took its bytes too slowly"
    SERVER_ENDED = _Code.UNAVAILABLE, "the server had to end; the next one goes on"
    UNWRITABLE = _Code.RESOURCE_EXHAUSTED, "the server's disk is full or broken"

    def __init__(self, code: grpc.StatusCode, meaning: str) -> None:
        self.code = code
        self.meaning = meaning


class HeadwaterError(Exception):
    """Something to tell the user in one sentence; `exit_status` is the command's."""

    exit_status = 1


class UsageError(HeadwaterError):
    """Wrong usage or input, found before anything started."""

    exit_status = 2


class Refused(HeadwaterError):
    """The server understood and said no; do not retry as is."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def exit_status(self) -> int:  # type: ignore[override]
        """2 where the caller's own input has to change, else 1."""
        return 1 if self.reason in _NOT_THE_CALLERS_INPUT else 2


_NOT_THE_CALLERS_INPUT = {
    Reason.EVICTED,
    Reason.FENCED,
    Reason.SILENT,
    Reason.COMPILE_TIMEOUT,
    Reason.SLOW_READER,
    Reason.OLD_INCARNATION,
    Reason.RUN_OVER,
    Reason.SESSION_FORGOTTEN,
    Reason.SERVER_ENDED,
    Reason.UNWRITABLE,
}


class Unreachable(HeadwaterError):
    """No server answered."""

    exit_status = 3


class RunFailed(HeadwaterError):
    """The run ended with an error."""


def refusal_of(error: grpc.RpcError) -> Refused | None:
    """The refusal that a gRPC error carries, or None when it carries none."""
    metadata: Any = error.trailing_metadata()
    for key, value in metadata or ():
        if key == REASON_KEY and value in Reason.__members__:
            return Refused(Reason[value], error.details() or Reason[value].meaning)
    return None


def from_rpc_error(error: grpc.RpcError, address: str) -> HeadwaterError:
    """A gRPC error as one of ours; `address` is named where nothing answered."""
    refusal = refusal_of(error)
    if refusal is not None:
        return refusal
    code: grpc.StatusCode = error.code()
    if code in (_Code.UNAVAILABLE, _Code.DEADLINE_EXCEEDED):
        return Unreachable(
            f"no Headwater server answers at {address}; start one with `headwater server`, "
            "or name another address with --server HOST:PORT"
        )
    details = error.details() or ""
    if code is _Code.CANCELLED and any(text in details for text in _CANCELLED_HERE):
        return HeadwaterError(f"the call was given up here: {details}")
    if code is _Code.CANCELLED:
        # So an ending server answers what it has not begun to serve, rather than
        # UNAVAILABLE: https://github.com/grpc/grpc/issues/41785.
        return Unreachable(
            f"the server at {address} ended before it answered; try again when it is back"
        )
    if code is _Code.UNIMPLEMENTED:
        return Unreachable(f"what answers at {address} is not a Headwater server of this version")
    return HeadwaterError(f"the server at {address} failed ({code.name}): {details}")
