"""What a call's end means to whoever made it."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from headwater.protos.errors import (
    REASON_KEY,
    HeadwaterError,
    Reason,
    Refused,
    Unreachable,
    from_rpc_error,
)

ADDRESS = "nova:50051"


class Ended(grpc.RpcError):
    """As grpc tells it."""

    def __init__(self, code: grpc.StatusCode, details: str, reason: str = "") -> None:
        self.code = lambda: code
        self.details = lambda: details
        metadata = ((REASON_KEY, reason),) if reason else ()
        self.trailing_metadata: Any = lambda: metadata


def error_of(code: grpc.StatusCode, details: str, reason: str = "") -> HeadwaterError:
    return from_rpc_error(Ended(code, details, reason), ADDRESS)


def test_a_call_that_an_ending_server_cancelled_found_it_unreachable() -> None:
    error = error_of(grpc.StatusCode.CANCELLED, "CANCELLED")

    assert type(error) is Unreachable
    assert str(error) == (
        f"the server at {ADDRESS} ended before it answered; try again when it is back"
    )


def test_a_call_that_was_cancelled_here_says_nothing_of_the_server() -> None:
    error = error_of(grpc.StatusCode.CANCELLED, "Channel closed!")

    assert type(error) is HeadwaterError
    assert str(error) == "the call was given up here: Channel closed!"


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_no_answer_is_unreachable(code: grpc.StatusCode) -> None:
    error = error_of(code, "whatever")

    assert type(error) is Unreachable
    assert str(error).startswith(f"no Headwater server answers at {ADDRESS}; start one")


def test_a_refusal_is_known_by_its_reason_whatever_its_code() -> None:
    error = error_of(grpc.StatusCode.CANCELLED, "no such worker", "UNKNOWN_WORKER")

    assert isinstance(error, Refused)
    assert error.reason is Reason.UNKNOWN_WORKER
    assert str(error) == "no such worker"
