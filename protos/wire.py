"""Frames the messages that carry tensors, byte-compatible with the .proto.

Protobuf's Python copies a `bytes` field on both sides, which costs up to half
of the throughput. So a message with a body is written as its small part,
serialised by protobuf, followed by the body's own field; on receipt the body
is a memoryview into what gRPC handed over. Any protobuf implementation reads
what this writes, and this reads what any writes, in whatever order of fields.

Source: the Protocol Buffers encoding guide; Arrow Flight frames its record
batches in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

M = TypeVar("M", bound=Message)

BODY_FIELD = 15
"""The number of `bytes body` in every message framed here."""

PART_BYTES = 1 << 20
"""Bytes of tensor data in one message. 1 MiB measured best for gRPC in Python;
16 MiB is half as fast."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_BODY_TAG = BODY_FIELD << 3 | _LENGTH  # fits in one byte


class MalformedMessage(ValueError):
    """The bytes are not a message of this type; says at which offset it showed."""


class Framed(NamedTuple, Generic[M]):
    """A message and the bytes that came in its `body` field (None if it had none)."""

    message: M
    body: memoryview | None


def frame(message: Message, *body: memoryview | bytes) -> bytes:
    """Serialise `message` with the pieces of `body`, joined, as its `body` field.

    Without a piece there is no body. `message.body` must be unset.

    Framed messages may be joined: the bytes of two messages of one type, one
    after the other, are the merged message (protobuf's own rule). The server
    puts a worker's ticket before weights that were encoded once for everyone.
    """
    head = message.SerializeToString()
    if not body:
        return head
    size = sum(piece.nbytes if isinstance(piece, memoryview) else len(piece) for piece in body)
    return b"".join((head, bytes((_BODY_TAG,)), _varint(size), *body))


def unframe(kind: type[M], data: bytes) -> Framed[M]:
    """Parse `data` as a `kind` without copying its body.

    Raises:
      MalformedMessage: `data` is not a `kind`.
    """
    view = memoryview(data)
    body: memoryview | None = None
    small = bytearray()
    taken = 0
    for tag, start, payload, end in _fields(data):
        if tag == _BODY_TAG:
            small += view[taken:start]
            body = view[payload:end]  # protobuf: the last occurrence counts
            taken = end
    small += view[taken:]
    message = kind()
    try:
        message.ParseFromString(bytes(small))
    except DecodeError as error:
        raise MalformedMessage(f"not a {kind.__name__}: {error}") from None
    return Framed(message, body)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(tag, start of field, start of payload, end) of each top-level field."""
    at, size = 0, len(data)
    while at < size:
        start = at
        tag, at = _read_varint(data, at)
        wire_type = tag & 7
        payload = at
        if wire_type == _LENGTH:
            length, payload = _read_varint(data, at)
            at = payload + length
        elif wire_type == _VARINT:
            _, at = _read_varint(data, at)
        elif wire_type == _FIXED64:
            at += 8
        elif wire_type == _FIXED32:
            at += 4
        else:
            raise MalformedMessage(f"wire type {wire_type} at byte {start} is not known")
        if at > size:
            raise MalformedMessage(f"the field at byte {start} runs past the message's end")
        yield tag, start, payload, at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise MalformedMessage(f"a number breaks off at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
