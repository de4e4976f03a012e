"""What `frame` and `unframe` promise, held against the code generated from the .proto."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.wire import MalformedMessage, frame, unframe

# The same examples every time and no limits of time: the verdict is about the code alone.
steady = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
quick = settings(steady, max_examples=100)
thorough = settings(steady, max_examples=300)

KINDS: tuple[Any, ...] = (pb.WorkerMessage, pb.ServerMessage, pb.PullReply)
"""Every message that carries a body."""


def _maybe(kind: Any, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """None, which leaves a field unset, or a message of these fields."""
    return st.none() | st.builds(kind, **fields)


u64 = st.integers(0, 2**64 - 1)
texts = st.text(max_size=20)
numbers = st.floats(allow_nan=False)  # a NaN equals nothing, itself included
bodies = st.binary(max_size=300)
pieces = st.lists(bodies, max_size=3)
"""Of a body; none at all is no body."""
stamps = _maybe(pb.Stamp, incarnation=u64, version=u64, durable_version=u64)
weights_parts = _maybe(pb.WeightsPart, version=u64, offset=u64, total_bytes=u64)
tokens = _maybe(pb.Token, life=u64, number=u64)
tensors = st.builds(pb.Tensor, name=texts, dtype=texts, shape=st.lists(u64, max_size=3))
layouts = _maybe(pb.Layout, tensors=st.lists(tensors, max_size=3))
metrics = st.dictionaries(texts, numbers, max_size=2)

worker_messages = st.one_of(
    st.builds(pb.WorkerMessage, hello=_maybe(pb.Hello, instance=u64, layout=layouts, name=texts)),
    st.builds(pb.WorkerMessage, push=_maybe(pb.Push, token=tokens, loss=numbers, metrics=metrics)),
    st.builds(pb.WorkerMessage, push_part=_maybe(pb.PushPart, token=tokens, offset=u64)),
    st.builds(pb.WorkerMessage, leave=_maybe(pb.Leave)),
)
server_messages = st.builds(
    pb.ServerMessage,
    stamp=stamps,
    outcome=_maybe(pb.Outcome, token=tokens, version=u64, message=texts),
    weights=weights_parts,
    ticket=_maybe(pb.Ticket, token=tokens, base=u64, deadline_s=numbers),
)
pull_replies = st.builds(
    pb.PullReply, stamp=stamps, layout=layouts, weights=weights_parts, run_id=texts, epoch=u64
)
messages = worker_messages | server_messages | pull_replies


@quick
@given(messages, pieces)
def test_the_generated_code_reads_what_frame_writes(message: Any, body: list[bytes]) -> None:
    read = type(message).FromString(frame(message, *body))

    assert read.body == b"".join(body)
    read.ClearField("body")
    assert read == message


@quick
@given(messages, bodies.filter(len))
def test_unframe_reads_what_the_generated_code_writes(message: Any, body: bytes) -> None:
    whole = type(message)()
    whole.CopyFrom(message)
    whole.body = body

    read = unframe(type(message), whole.SerializeToString())

    assert read.message == message
    assert read.body == body


@quick
@given(messages, pieces)
def test_unframe_gives_back_what_was_framed(message: Any, body: list[bytes]) -> None:
    read = unframe(type(message), frame(message, *body))

    assert read.message == message
    # No body and an empty one stay different.
    assert read.body == (b"".join(body) if body else None)


@quick
@given(messages, st.lists(bodies, max_size=3), st.data())
def test_fields_are_read_in_any_order_and_of_several_bodies_the_last_counts(
    message: Any, some_bodies: list[bytes], data: st.DataObject
) -> None:
    kind = type(message)
    fields = [kind(**{field.name: value}) for field, value in message.ListFields()]
    ordered = data.draw(st.permutations(fields + [kind(body=b) for b in some_bodies if b]))
    joined = b"".join(field.SerializeToString() for field in ordered)

    read = unframe(kind, joined)

    expected = kind.FromString(joined)
    assert (read.body or b"") == expected.body
    assert read.message == message


def test_a_body_that_comes_first_is_read() -> None:
    part = pb.WeightsPart(version=3)
    first = pb.PullReply(body=b"abc").SerializeToString()

    read = unframe(pb.PullReply, first + frame(pb.PullReply(weights=part)))

    assert read.message == pb.PullReply(weights=part)
    assert read.body == b"abc"


@quick
@given(server_messages, server_messages, pieces, pieces)
def test_framed_messages_that_are_joined_are_the_merged_message(
    first: pb.ServerMessage,
    second: pb.ServerMessage,
    first_body: list[bytes],
    second_body: list[bytes],
) -> None:
    read = unframe(pb.ServerMessage, frame(first, *first_body) + frame(second, *second_body))

    first.MergeFrom(second)
    assert read.message == first
    last = second_body or first_body
    assert read.body == (b"".join(last) if last else None)


def test_one_encoding_of_weights_is_a_server_message_and_a_pull_reply() -> None:
    stamp, part = pb.Stamp(incarnation=1, version=7), pb.WeightsPart(version=7, total_bytes=3)
    data = frame(pb.ServerMessage(stamp=stamp, weights=part), b"abc")

    read = unframe(pb.PullReply, data)

    assert read.message == pb.PullReply(stamp=stamp, weights=part)
    assert read.body == b"abc"


@quick
@given(bodies)
def test_a_field_that_this_version_does_not_know_hides_nothing(body: bytes) -> None:
    unknown = pb.Tensor(shape=[1, 2]).SerializeToString()  # field 4 of what knows no field 4
    assert unframe(pb.Leave, unknown + frame(pb.Leave(), body)).body == body


@quick
@given(messages, bodies)
def test_a_body_is_never_copied(message: Any, body: bytes) -> None:
    data = frame(message, body)

    read = unframe(type(message), data)

    assert read.body is not None
    assert read.body.obj is data


def test_a_body_starts_where_it_lies_in_the_message() -> None:
    body = bytes(range(100))
    data = frame(pb.PullReply(epoch=5), body)

    read = unframe(pb.PullReply, data)

    assert read.body is not None
    lies_at = np.frombuffer(read.body, np.uint8).ctypes.data
    assert lies_at - np.frombuffer(data, np.uint8).ctypes.data == data.index(body)


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    """A framed message with some bytes changed, put in, or cut off."""
    message = draw(messages)
    data = bytearray(frame(message, *draw(pieces)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(data)


@thorough
@given(st.sampled_from(KINDS), st.binary(max_size=60) | _damaged())
@example(pb.ServerMessage, b"\x80" * 100_000)  # a number without an end
@example(pb.ServerMessage, b"\x7a" + b"\xff" * 9 + b"\x01")  # a body of 2**64 - 1 bytes
@example(pb.ServerMessage, b"\x7a\x05abc")  # a body cut off
@example(pb.ServerMessage, b"\x7b" * 50_000)  # groups within groups
@example(pb.ServerMessage, b"\x7c")  # the end of no group
@example(pb.ServerMessage, b"\x7e\x7f")  # wire types that do not exist
@example(pb.ServerMessage, b"\x0a\x7f")  # a submessage cut off
@example(pb.ServerMessage, b"\x09\x00\x00")  # eight bytes, of which two are there
@example(pb.ServerMessage, b"\x0d\x00")  # four bytes, of which one is there
@example(pb.ServerMessage, b"\x00\x00")  # field number 0
@example(pb.PullReply, b"\x2a\x02\xff\xfe")  # text that is not UTF-8
def test_no_bytes_raise_anything_but_malformed_message(kind: Any, data: bytes) -> None:
    try:
        read = unframe(kind, data)
    except MalformedMessage:
        return
    assert isinstance(read.message, kind)
    assert not read.message.body


@thorough
@given(st.sampled_from(KINDS), _damaged())
def test_what_both_can_read_is_read_as_the_generated_code_reads_it(kind: Any, data: bytes) -> None:
    try:
        expected: Message = kind.FromString(data)
        read = unframe(kind, data)
    except (DecodeError, MalformedMessage):
        return
    merged = kind(body=bytes(read.body or b""))
    merged.MergeFrom(read.message)
    # As bytes, since damage can make a NaN. Fields unknown to the type keep their
    # place in the bytes of `expected` only.
    expected.DiscardUnknownFields()
    merged.DiscardUnknownFields()
    assert merged.SerializeToString(deterministic=True) == expected.SerializeToString(
        deterministic=True
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a", "a number breaks off at byte 1"),
        (b"\x7a\x05abc", "the field at byte 0 runs past the message's end"),
        (b"\x7a\x01a\x7b", "wire type 3 at byte 3 is not known"),
        (b"\x80" * 20, "a number breaks off at byte 10"),
        (b"\x0a\x01\xff", "not a ServerMessage: "),
    ],
)
def test_a_malformed_message_says_where_it_breaks(data: bytes, message: str) -> None:
    with pytest.raises(MalformedMessage, match=message):
        unframe(pb.ServerMessage, data)
