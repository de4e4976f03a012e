"""Where workers of the same user on the same machine come in: a Unix socket beside gRPC.

A worker is let in for the stream that its key was told on. What it proves by coming
at all, no host name would: that it shares this kernel, this network namespace and
this user, and can be handed memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable, Sequence

from headwater.protos import parameter_server_pb2 as pb
from headwater.protos import shared_memory
from headwater.protos.errors import UsageError
from headwater.protos.line import Splitter, is_own_peer, packed, send_some
from headwater.protos.rpc import Transport
from headwater.protos.wire import MalformedMessage

log = logging.getLogger("headwater.server")

KEY_TIMEOUT_S = 5.0
"""For who came in to say its key."""

ACCEPT_AGAIN_S = 1.0
"""After nobody could be let in: no descriptors were left, say."""


class ServerLine:
    """The server's end of one worker's socket. Lives on the event loop; nothing of it blocks.

    `on_message(data)` and `on_end(error)` may be set; the latter is called once, with
    None where the worker closed its end, unless it was closed here.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._splitter = Splitter()
        self._backlog: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._drained = asyncio.Event()
        self._drained.set()
        self._open = True
        self.on_message: Callable[[bytes], None] = lambda data: None
        self.on_end: Callable[[Exception | None], None] = lambda error: None
        self._loop.add_reader(connection, self._read)

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send one message, or what fits of it now and the rest when there is room."""
        if not self._open:
            return
        self._backlog.append((memoryview(packed(data, descriptors)), descriptors))
        if self._drained.is_set():
            self._write()

    @property
    def is_drained(self) -> bool:
        """Whether everything has left."""
        return self._drained.is_set()

    async def drain(self) -> None:
        """Returns when everything has left, or the line is closed."""
        await self._drained.wait()

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._splitter.close()
            self._backlog.clear()
            self._drained.set()

    def _read(self) -> None:
        try:
            found = self._splitter.read(self._socket)
            if found is None:
                self._end(None)
                return
            for data, descriptors in found:
                if descriptors:
                    for descriptor in descriptors:  # the splitter has them no longer
                        os.close(descriptor)
                    raise MalformedMessage("a worker sends no descriptors")
                self.on_message(data)
                if not self._open:
                    return
        except BlockingIOError:
            return
        except (OSError, MalformedMessage) as error:
            self._end(error)

    def _write(self) -> None:
        try:
            while self._backlog:
                data, descriptors = self._backlog[0]
                sent = send_some(self._socket, data, descriptors)
                if sent < len(data):
                    self._backlog[0] = data[sent:], ()
                else:
                    self._backlog.popleft()
        except BlockingIOError:
            if self._drained.is_set():
                self._drained.clear()
                self._loop.add_writer(self._socket, self._write)
            return
        except OSError as error:
            self._end(error)
            return
        if not self._drained.is_set():
            self._loop.remove_writer(self._socket)
            self._drained.set()

    def _end(self, error: Exception | None) -> None:
        if self._open:
            self.close()
            self.on_end(error)


def open_door(transport: Transport) -> Door | None:
    """The door, if workers on this machine are to have one.

    Raises:
      UsageError: There cannot be one here, and it was asked for.
    """
    if transport == "grpc":
        return None
    try:
        return Door()
    except OSError as error:
        if transport == "shm":
            raise UsageError(
                f"--transport shm is not possible here: {error.strerror or error}; use auto or grpc"
            ) from None
        log.info("workers on this machine use gRPC as others do: %s", error.strerror or error)
        return None


class Door:
    """Listens, and brings each who knows a key to whom the key is of.

    Lives on the event loop.

    Raises:
      OSError: There is no such socket here: not on Linux, or no memory to share.
    """

    def __init__(self) -> None:
        if not shared_memory.IS_AVAILABLE:
            raise OSError("shared memory between processes needs Linux")
        shared_memory.SharedMemory(1, read_only=True).close()  # fails here, where it can be said
        self.name = f"headwater-{secrets.token_hex(8)}"
        self._expected: dict[bytes, Callable[[ServerLine], None]] = {}
        self._loop = asyncio.get_running_loop()
        self._resume: asyncio.TimerHandle | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind(b"\0" + self.name.encode())
        self._socket.listen(128)
        self._loop.add_reader(self._socket, self._accept)

    def offer(self, attach: Callable[[ServerLine], None]) -> pb.SameHost:
        """Let one worker in; `attach` gets its line."""
        key = secrets.token_bytes(16)
        self._expected[key] = attach
        return pb.SameHost(socket=self.name, key=key)

    def withdraw(self, offer: pb.SameHost) -> None:
        """Expect it no longer, if it has not come."""
        self._expected.pop(offer.key, None)

    def close(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _accept(self) -> None:
        """Let in all who wait: a busy loop comes by seldom."""
        while True:
            try:
                connection, _ = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("a worker on this machine could not be let in: %s", error)
                self._pause()
                return
            self._let_in(connection)

    def _pause(self) -> None:
        """Who waits stays ready to be read: asked at once, the same would fail without end."""
        self._loop.remove_reader(self._socket)
        self._resume = self._loop.call_later(
            ACCEPT_AGAIN_S, self._loop.add_reader, self._socket, self._accept
        )

    def _let_in(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if not is_own_peer(connection):
            connection.close()
            return
        line = ServerLine(connection)
        timer = self._loop.call_later(KEY_TIMEOUT_S, line.close)

        def on_key(key: bytes) -> None:
            timer.cancel()
            attach = self._expected.pop(key, None)
            if attach is None:
                line.close()
            else:
                attach(line)

        line.on_message = on_key
        line.on_end = lambda error: timer.cancel()
