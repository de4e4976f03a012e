"""Who comes to the server's door is let in, however busy the server, as soon as it can be."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from headwater.protos.line import packed, send_some
from headwater.protos.shared_memory import IS_AVAILABLE
from headwater.protos.wire import MalformedMessage
from headwater.server.door import ACCEPT_AGAIN_S, Door, ServerLine

pytestmark = pytest.mark.skipif(not IS_AVAILABLE, reason="shared memory needs Linux")

COUNT = 5


def visit(door: Door, attach: Callable[[ServerLine], None]) -> socket.socket:
    """Come to the door, and say the key."""
    offer = door.offer(attach)
    visitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    visitor.connect(b"\0" + offer.socket.encode())
    visitor.sendall(packed(offer.key, ()))
    return visitor


def test_all_who_wait_are_let_in_at_one_go() -> None:
    async def come() -> int:
        door, attached = Door(), list[ServerLine]()
        visitors = [visit(door, attached.append) for _ in range(COUNT)]
        for _ in range(3):  # turns of the loop: to accept, to read, and to spare
            await asyncio.sleep(0)
        count = len(attached)
        for end in (*visitors, *attached, door):
            end.close()
        return count

    assert asyncio.run(come()) == COUNT


def test_without_descriptors_it_is_said_once_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def come() -> bool:
        door = Door()
        line: asyncio.Future[ServerLine] = asyncio.get_running_loop().create_future()
        visitor = visit(door, line.set_result)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))  # of what is open, all stays
        try:
            await asyncio.sleep(ACCEPT_AGAIN_S / 2)
            was_let_in = line.done()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for end in (visitor, await asyncio.wait_for(line, 20 * ACCEPT_AGAIN_S), door):
            end.close()
        return was_let_in

    with caplog.at_level(logging.WARNING):
        assert not asyncio.run(come())
    assert len(caplog.records) == 1
    assert "could not be let in: " in caplog.text


def test_descriptors_that_come_with_a_message_are_closed() -> None:
    async def come() -> Exception | None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        line, ended = ServerLine(ours), asyncio.get_running_loop().create_future()
        line.on_end = ended.set_result
        sent = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
        send_some(theirs, packed(b"gift", sent), sent)
        for descriptor in sent:
            os.close(descriptor)
        theirs.close()
        return await asyncio.wait_for(ended, 20)

    before = len(list(Path("/proc/self/fd").iterdir()))

    assert isinstance(asyncio.run(come()), MalformedMessage)

    assert len(list(Path("/proc/self/fd").iterdir())) == before
