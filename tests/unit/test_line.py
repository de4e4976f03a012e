"""Messages and descriptors over a Unix socket: whole, in order, and each with its own."""

from __future__ import annotations

import os
import socket
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos.layout import Layout
from headwater.protos.line import MAX_MESSAGE_BYTES, Splitter, packed, send_some
from headwater.protos.wire import MalformedMessage
from headwater.worker.link import Link

LAYOUT = Layout.of([("a", np.dtype("float32"), (3,))])

pytestmark = pytest.mark.skipif(not hasattr(socket, "SCM_RIGHTS"), reason="no descriptors here")


def socketpair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


@settings(max_examples=50, deadline=None)
@given(
    messages=st.lists(st.tuples(st.binary(max_size=2000), st.integers(0, 3)), max_size=8),
    cuts=st.lists(st.integers(1, 3000), max_size=20),
)
def test_messages_come_out_as_they_went_in_however_they_are_cut(messages, cuts) -> None:
    """Each descriptor is a pipe whose other end tells which it is."""
    pipes = [os.pipe() for _, count in messages for _ in range(count)]
    ours, theirs = socketpair()
    ours.setblocking(False)
    splitter, found, sent, at = Splitter(), [], list(cuts), 0
    try:
        for data, count in messages:
            descriptors = [write for _, write in pipes[at : at + count]]
            at += count
            rest = memoryview(packed(data, descriptors))
            while rest:
                size = sent.pop(0) if sent else len(rest)
                rest, descriptors = rest[send_some(theirs, rest[:size], descriptors) :], []
                found += list(splitter.read(ours) or ())
        assert [(r.data, len(r.descriptors)) for r in found] == messages
        for number, descriptor in enumerate(d for r in found for d in r.descriptors):
            os.write(descriptor, b"%d" % number)
            assert os.read(pipes[number][0], 9) == b"%d" % number
            os.close(descriptor)
    finally:
        for end in (ours, theirs):
            end.close()
        for pipe in pipes:
            for descriptor in pipe:
                os.close(descriptor)


def test_what_comes_first_on_a_workers_line_is_not_lost() -> None:
    """It may be a bye, of a server that took the worker out while it came in."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(b"\0headwater-test-%d" % os.getpid())
        door.listen()
        bye = pb.ServerMessage(bye=pb.Bye(reason=pb.BYE_EVICTED))

        def let_in() -> None:
            with door.accept()[0] as line:
                line.recv(100)
                line.sendall(packed(bye.SerializeToString(), ()))

        server = threading.Thread(target=let_in)
        server.start()
        link = Link("127.0.0.1:1", pb.Progress)
        try:
            offer = pb.SameHost(socket=f"headwater-test-{os.getpid()}", key=bytes(16))
            assert link.attach(offer, "auto", pulled=LAYOUT, pushed=LAYOUT)
            assert link._line is not None
            heard = [message for message, _ in link._receive_on(link._line)]
            assert heard == [bye]
        finally:
            link.close()
            server.join()


def test_the_end_of_the_socket_is_the_end() -> None:
    ours, theirs = socketpair()
    theirs.close()
    assert Splitter().read(ours) is None
    ours.close()


@pytest.mark.parametrize(
    "head",
    [
        (MAX_MESSAGE_BYTES + 1).to_bytes(4, "little") + bytes(4),
        bytes(4) + (17).to_bytes(4, "little"),
        bytes(4) + (1).to_bytes(4, "little"),  # a descriptor that did not come
    ],
    ids=["too long", "too many descriptors", "descriptors missing"],
)
def test_what_is_no_message_is_refused(head: bytes) -> None:
    ours, theirs = socketpair()
    theirs.sendall(head)
    with pytest.raises(MalformedMessage):
        list(Splitter().read(ours) or ())
    ours.close()
    theirs.close()
