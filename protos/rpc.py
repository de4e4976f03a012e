"""The service's methods and gRPC's settings, for both sides, in one place.

`Stub` works over a plain channel and over one of grpc.aio. The two streams
that carry tensors pass raw bytes, which `wire` frames; everything else is
serialised by protobuf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.errors import UsageError

PROTOCOL = 1
"""Of the .proto; a peer with another number is refused."""

DEFAULT_ADDRESS = "127.0.0.1:50051"

SERVER_ENV = "HEADWATER_SERVER"
"""The environment variable that names the server where --server does not."""

Transport = Literal["auto", "grpc", "shm"]
"""How tensors travel between a server and a worker on one machine: auto is through
shared memory where that is possible."""

_SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServer"]
SERVICE_NAME = _SERVICE.full_name
"""Under which its health can be asked for, by the standard gRPC health protocol."""

_RAW = {pb.WorkerMessage.DESCRIPTOR.full_name, pb.ServerMessage.DESCRIPTOR.full_name,
        pb.PullReply.DESCRIPTOR.full_name, pb.SessionPush.DESCRIPTOR.full_name}  # fmt: skip

KEEPALIVE_S = 10.0
"""Seconds between gRPC's pings, and that TCP waits for an acknowledgement; on both sides."""

_MAX_MESSAGE_BYTES = 4 << 20

_COMMON = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),  # no limit
    ("grpc.enable_retries", 0),  # a retried push would not be exactly-once
]

SERVER_OPTIONS = [
    *_COMMON,
    ("grpc.so_reuseport", 0),  # a second server on the port must fail
    # Half the workers' ping interval, or their pings would end the connection.
    ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_S * 500)),
    ("grpc.keepalive_permit_without_calls", 1),
]

CHANNEL_OPTIONS = [
    *_COMMON,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Of all things, this is how long one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Its own connection for each channel: closing one must not cut another.
    ("grpc.use_local_subchannel_pool", 1),
]


class Stub:
    """The service's methods over a channel, by their names in the .proto."""

    def __init__(self, channel: Any) -> None:
        for method in _SERVICE.methods:
            call = getattr(channel, _arity(method))(
                f"/{_SERVICE.full_name}/{method.name}",
                request_serializer=_serializer(method.input_type),
                response_deserializer=_deserializer(method.output_type),
            )
            setattr(self, method.name, call)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the service has no method {name!r}")


def split_address(address: str, flag: str) -> tuple[str, int]:
    """HOST:PORT as its two parts; IPv6 hosts stand in brackets.

    Raises:
      UsageError: It has no port, or one out of range; names `flag`.
    """
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    bracketed = bare != host
    if (
        not bare
        or set(bare) & set("[]")
        or (":" in bare) != bracketed
        or not (port.isascii() and port.isdecimal() and int(port) < 1 << 16)
    ):
        raise UsageError(f"{flag} takes HOST:PORT such as {DEFAULT_ADDRESS}, not {address!r}")
    return bare, int(port)


def join_address(host: str, port: int) -> str:
    """The opposite of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def connect(address: str) -> grpc.Channel:
    """A plain-text channel to `address` (HOST:PORT) with the settings above.

    Raises:
      UsageError: It is not HOST:PORT.
    """
    split_address(address, "--server")
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


def handlers(implementation: object) -> grpc.GenericRpcHandler:
    """Serve the .proto's methods by the methods of `implementation` of the same names.

    A request that does not parse is handed over as the DecodeError it raised;
    gRPC itself would tell the peer of Python's exception.
    """
    table = {}
    for method in _SERVICE.methods:
        kind: Callable[..., Any] = getattr(grpc, f"{_arity(method)}_rpc_method_handler")
        table[method.name] = kind(
            getattr(implementation, method.name),
            request_deserializer=_or_error(_deserializer(method.input_type)),
            response_serializer=_serializer(method.output_type),
        )
    return grpc.method_handlers_generic_handler(_SERVICE.full_name, table)


def _or_error(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if parse is None:
        return None

    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            return error

    return parsed


def _arity(method: Any) -> str:
    many = {False: "unary", True: "stream"}
    return f"{many[method.client_streaming]}_{many[method.server_streaming]}"


def _serializer(kind: Any) -> Callable[[Any], bytes] | None:
    if kind.full_name in _RAW:
        return None
    return lambda message: message.SerializeToString()


def _deserializer(kind: Any) -> Callable[[bytes], Any] | None:
    if kind.full_name in _RAW:
        return None
    return message_factory.GetMessageClass(kind).FromString
