"""A bad network: a TCP proxy that cuts, refuses and slows what passes through it.

Runs on an event loop in a thread of its own. It knows nothing of gRPC: a cut
after N bytes falls wherever the N-th byte is, mostly in the middle of a part.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

CHUNK_BYTES = 1 << 16
ANSWER_TIMEOUT_S = 30.0
"""For the thread to do what it was asked."""


class Cut(NamedTuple):
    """When a connection breaks: once `after_bytes` have passed in one direction."""

    to_server: bool
    after_bytes: int
    reset: bool
    """By RST, which loses what is still on its way; else by FIN, after it has arrived."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """What has happened so far."""

    connections: int = 0
    """Accepted, the refused ones among them."""
    refused: int = 0
    """Reset at once: on purpose, or because the target did not answer."""
    cuts_to_server: int = 0
    """Connections cut after so many bytes of what the client sends."""
    cuts_to_client: int = 0
    """The same of what the server sends."""
    cuts_at_once: int = 0
    """Connections cut by `cut_all` or `closed`."""
    bytes_to_server: int = 0
    bytes_to_client: int = 0


class Proxy:
    """Passes on what comes to `address`, to `target`. Use as a context.

    Args:
      target: HOST:PORT; may be set anew, for the connections to come.
      plan: Asked for each new connection: its cut, or None to let it live. May be
        set anew.
    """

    def __init__(self, target: str, plan: Callable[[], Cut | None] = lambda: None) -> None:
        self.target = target
        self.plan = plan
        self.bytes_per_s: float | None = None
        """Towards the server, for each connection; None as fast as it goes. May be set."""
        self.stalled = False
        """While set, nothing passes to the server, and nothing is cut. May be set."""
        self.stalled_back = False
        """The same of what the server sends."""
        self.delay_s = 0.0
        """That each piece of up to 64 kB takes in either direction. May be set."""
        self.address = ""
        self.stats = Stats()
        self._refusing = False
        self._connections: list[_Connection] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kit-proxy")

    def __enter__(self) -> Proxy:
        self._thread.start()
        listener = socket.create_server(("127.0.0.1", 0))
        # Small, so that what is slowed waits with its sender and not here.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK_BYTES)
        self._server = self._in_loop(asyncio.start_server(self._serve, sock=listener))
        host, port = listener.getsockname()
        self.address = f"{host}:{port}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._in_loop(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ANSWER_TIMEOUT_S)
        self._loop.close()

    def cut_all(self, *, reset: bool = True) -> int:
        """Cut every connection now, by RST or by closing it; how many there were."""
        return self._in_loop(self._cut_all(reset))

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Inside, nobody is connected: what was open is cut, what is new is reset."""
        self._refusing = True
        self.cut_all()
        try:
            yield
        finally:
            self._refusing = False

    # ------------------------------------------------------------- in the loop

    def _in_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(ANSWER_TIMEOUT_S)

    def _count(self, **more: int) -> None:
        now = {name: getattr(self.stats, name) + n for name, n in more.items()}
        self.stats = dataclasses.replace(self.stats, **now)

    async def _cut_all(self, reset: bool) -> int:
        cut = [c for c in self._connections if not c.over.done()]
        for connection in cut:
            connection.end(reset)
        self._count(cuts_at_once=len(cut))
        return len(cut)

    async def _end(self) -> None:
        self._refusing, self.stalled, self.stalled_back = True, False, False
        me = asyncio.current_task()
        while True:
            for connection in self._connections:
                _reset(connection.client)  # those too that are closed and not read from
                _reset(connection.server)
            await asyncio.sleep(0)  # aborted transports close their sockets in the next turn
            others = asyncio.all_tasks() - {me}
            if not others:
                # Not before: a connection that is being accepted would be left open.
                return self._server.close()
            await asyncio.wait(others, timeout=0.1)  # they may open further ones

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._count(connections=1)
        server = None if self._refusing else await _connect(self.target)
        if server is None:
            self._count(refused=1)
            return _reset(writer)
        connection = _Connection(writer, server[1])
        self._connections.append(connection)
        if self._refusing:  # since a moment ago
            self._count(refused=1)
            return connection.end(reset=True)
        return await self._pass_on(connection, reader, server[0])

    async def _pass_on(
        self,
        connection: _Connection,
        from_client: asyncio.StreamReader,
        from_server: asyncio.StreamReader,
    ) -> None:
        cut = self.plan()
        pumps = [
            asyncio.create_task(
                self._pump(connection, cut, from_client, connection.server, to_server=True)
            ),
            asyncio.create_task(
                self._pump(connection, cut, from_server, connection.client, to_server=False)
            ),
        ]
        try:
            await asyncio.wait([*pumps, connection.over], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            connection.end(reset=False)

    async def _pump(
        self,
        connection: _Connection,
        cut: Cut | None,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        to_server: bool,
    ) -> None:
        """Pass bytes on in one direction until an end is reached: theirs, or the cut's."""
        left = cut.after_bytes if cut and cut.to_server == to_server else None
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if to_server and self.bytes_per_s:
                    await asyncio.sleep(len(data) / self.bytes_per_s)
                await asyncio.sleep(self.delay_s)
                while self.stalled if to_server else self.stalled_back:  # noqa: ASYNC110  (set from other threads)
                    await asyncio.sleep(0.01)
                passed = data if left is None else data[:left]
                writer.write(passed)
                await writer.drain()
                if to_server:
                    self._count(bytes_to_server=len(passed))
                else:
                    self._count(bytes_to_client=len(passed))
                if left is not None and cut is not None:
                    left -= len(passed)
                    if left <= 0:
                        connection.end(cut.reset)
                        self._count(**{"cuts_to_server" if to_server else "cuts_to_client": 1})
                        return


class _Connection:
    """The two sockets of one connection."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, reset: bool) -> None:
        """End both sides; only the first call counts."""
        if not self.over.done():
            self.over.set_result(None)
            for writer in (self.client, self.server):
                if reset:
                    _reset(writer)
                else:
                    writer.close()  # when what was written has left


async def _connect(target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    host, _, port = target.rpartition(":")
    try:
        return await asyncio.open_connection(host, int(port))
    except OSError:
        return None


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # closed already
        linger = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.get_extra_info("socket").setsockopt(*linger)
    writer.transport.abort()
